"""BatchNorm in detectors: normalization batches, population statistics and leakage.

An extension of Detectron2 after *Rethinking "Batch" in BatchNorm* (Wu & Johnson, 2021,
arXiv:2105.07576). Importing it registers its components; ``add_bn_detection_config`` adds its keys.
"""

from . import heads, norm
from .config import ConfigError, add_bn_detection_config
from .data import register_datasets
from .heads import BNOptions, configure_model, convert_norm, to_plain_batch_norm
from .norm import PartitionedBatchNorm2d, set_inference

__version__ = "0.1.0"

__all__ = [
    "BNOptions",
    "ConfigError",
    "PartitionedBatchNorm2d",
    "add_bn_detection_config",
    "configure_model",
    "convert_norm",
    "heads",
    "norm",
    "register_datasets",
    "set_inference",
    "to_plain_batch_norm",
]
