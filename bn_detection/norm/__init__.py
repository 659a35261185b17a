"""The one normalization layer, its collectives, and RoI shuffling. Knows torch alone."""

from .functional import world_batch_norm
from .layer import INFERENCE, PARTITIONS, PartitionedBatchNorm2d, check_choice, set_inference
from .shuffle import ExchangePlan, RoIShuffle, exchange, plan_exchange, restore

__all__ = [
    "INFERENCE",
    "PARTITIONS",
    "ExchangePlan",
    "PartitionedBatchNorm2d",
    "RoIShuffle",
    "check_choice",
    "exchange",
    "plan_exchange",
    "restore",
    "set_inference",
    "world_batch_norm",
]
