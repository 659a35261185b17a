"""The statistics that inference uses: how they are estimated, and are the same on all workers."""

from .average import AverageStatistics, average_running_statistics
from .collect import (
    ESTIMATORS,
    PopulationStatistics,
    apply_statistics,
    batch_norms_in_training,
    collect_statistics,
)
from .hook import PreciseStatistics
from .untouched import untouched

__all__ = [
    "ESTIMATORS",
    "AverageStatistics",
    "PopulationStatistics",
    "PreciseStatistics",
    "apply_statistics",
    "average_running_statistics",
    "batch_norms_in_training",
    "collect_statistics",
    "untouched",
]
