"""The one normalization layer, its partitions and collectives. Knows torch alone."""

from .collectives import Collectives, world_size
from .convert import matches, replace_layers, set_inference, take_tensors
from .functional import GroupStatistics, group_statistics, grouped_batch_norm
from .kernels import KERNELS
from .layer import INFERENCE, PartitionedBatchNorm2d
from .levels import LevelBatchNorm2d, LevelOptions
from .partition import (
    Groups,
    Partition,
    build_partition,
    check_choice,
    images_per_virtual_worker,
    partition_names,
    register_partition,
    shuffled_groups,
    virtual_share,
)
from .renorm import RenormSchedule
from .scope import Rows, Scope, normalizes_in_training, set_clock, set_rows_per_image
from .shuffle import ExchangePlan, exchange, plan_exchange, restore

__all__ = [
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
    "build_partition",
    "check_choice",
    "exchange",
    "group_statistics",
    "grouped_batch_norm",
    "images_per_virtual_worker",
    "matches",
    "normalizes_in_training",
    "partition_names",
    "plan_exchange",
    "register_partition",
    "replace_layers",
    "restore",
    "set_clock",
    "set_inference",
    "set_rows_per_image",
    "shuffled_groups",
    "take_tensors",
    "virtual_share",
    "world_size",
]
