"""The one normalization layer, its partitions and collectives. Knows torch alone."""

from .batch_norms import (
    ANY_DIMENSIONS,
    TrackingBatchNorm,
    as_maps,
    check_initialized,
    input_dimensions,
    is_exact,
    register_exact,
    take_hooks,
    take_tensors,
    tracks_statistics,
)
from .collectives import Collectives, world_size
from .convert import lineage, matches, replace_layers, set_inference
from .functional import GroupStatistics, group_statistics, grouped_batch_norm
from .kernels import KERNELS
from .layer import INFERENCE, PartitionedBatchNorm2d, partitioned
from .levels import LevelBatchNorm2d, LevelOptions
from .partition import (
    Groups,
    Partition,
    build_partition,
    check_choice,
    images_per_virtual_worker,
    partition_name,
    partition_names,
    register_partition,
    shuffled_groups,
    virtual_share,
)
from .renorm import RenormSchedule
from .scope import Rows, Scope, normalizes_in_training, set_clock, set_rows_per_image
from .shuffle import ExchangePlan, exchange, plan_exchange, restore

__all__ = [
    "ANY_DIMENSIONS",
    "INFERENCE",
    "KERNELS",
    "Collectives",
    "ExchangePlan",
    "GroupStatistics",
    "Groups",
    "LevelBatchNorm2d",
    "LevelOptions",
    "Partition",
    "PartitionedBatchNorm2d",
    "RenormSchedule",
    "Rows",
    "Scope",
    "TrackingBatchNorm",
    "as_maps",
    "build_partition",
    "check_choice",
    "check_initialized",
    "exchange",
    "group_statistics",
    "grouped_batch_norm",
    "images_per_virtual_worker",
    "input_dimensions",
    "is_exact",
    "lineage",
    "matches",
    "normalizes_in_training",
    "partition_name",
    "partition_names",
    "partitioned",
    "plan_exchange",
    "register_exact",
    "register_partition",
    "replace_layers",
    "restore",
    "set_clock",
    "set_inference",
    "set_rows_per_image",
    "shuffled_groups",
    "take_hooks",
    "take_tensors",
    "tracks_statistics",
    "virtual_share",
    "world_size",
]
