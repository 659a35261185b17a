"""Components registered with Detectron2: importing this package registers them."""

from .backbone import SmallConvBackbone, SmallPyramidBackbone
from .configure import configure_model
from .convert import convert_norm, norm_layers, to_plain_batch_norm
from .dense import BNFCOSHead, BNRetinaNet, BNRetinaNetHead, level_options
from .norms import FROZEN, SHUFFLE_MODES, BNOptions, NormFactory, norm_names
from .roi_heads import (
    HEADS,
    BNConvDeconvKeypointHead,
    BNConvFCHead,
    BNConvUpsampleHead,
    Head,
    PartitionedHead,
)
from .timm_backbone import TimmBackbone

__all__ = [
    "FROZEN",
    "HEADS",
    "SHUFFLE_MODES",
    "BNConvDeconvKeypointHead",
    "BNConvFCHead",
    "BNConvUpsampleHead",
    "BNFCOSHead",
    "BNOptions",
    "BNRetinaNet",
    "BNRetinaNetHead",
    "Head",
    "NormFactory",
    "PartitionedHead",
    "SmallConvBackbone",
    "SmallPyramidBackbone",
    "TimmBackbone",
    "configure_model",
    "convert_norm",
    "level_options",
    "norm_layers",
    "norm_names",
    "to_plain_batch_norm",
]
