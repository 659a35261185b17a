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
from .layers import describe_batch_norms
from .trace import TraceStatistics, read_trace
from .untouched import untouched

__all__ = [
    "ESTIMATORS",
    "AverageStatistics",
    "PopulationStatistics",
    "PreciseStatistics",
    "TraceStatistics",
    "apply_statistics",
    "average_running_statistics",
    "batch_norms_in_training",
    "collect_statistics",
    "describe_batch_norms",
    "read_trace",
    "untouched",
]
