"""The statistics that inference uses: how they are estimated, and are the same on all workers."""

from .average import AverageStatistics, average_running_statistics
from .change import StatisticsChange, change_between, statistics_change
from .collect import (
    ROIS,
    Forward,
    apply_statistics,
    call,
    collect_statistics,
    quiet_collection,
)
from .estimators import (
    ESTIMATORS,
    Estimator,
    PopulationStatistics,
    register_estimator,
    standard_error,
)
from .freeze import AFFINE, FreezeStatistics
from .hook import PreciseStatistics, estimate_statistics
from .layers import SYNC_BATCH_NORMS, describe_batch_norms
from .mixing import (
    PRIOR,
    OnlineStatistics,
    frozen_batch_norms,
    mix_statistics,
    mixing_weight,
)
from .observe import batch_norms_in_training
from .record import record_change, table_of_changes
from .trace import TraceStatistics, read_trace
from .untouched import untouched

__all__ = [
    "AFFINE",
    "ESTIMATORS",
    "PRIOR",
    "ROIS",
    "SYNC_BATCH_NORMS",
    "AverageStatistics",
    "Estimator",
    "Forward",
    "FreezeStatistics",
    "OnlineStatistics",
    "PopulationStatistics",
    "PreciseStatistics",
    "StatisticsChange",
    "TraceStatistics",
    "apply_statistics",
    "average_running_statistics",
    "batch_norms_in_training",
    "call",
    "change_between",
    "collect_statistics",
    "describe_batch_norms",
    "estimate_statistics",
    "frozen_batch_norms",
    "mix_statistics",
    "mixing_weight",
    "quiet_collection",
    "read_trace",
    "record_change",
    "register_estimator",
    "standard_error",
    "statistics_change",
    "table_of_changes",
    "untouched",
]
