"""Components registered with Detectron2: importing this package registers them."""

from .backbone import SmallConvBackbone
from .configure import configure_model
from .convert import convert_norm
from .norms import SHUFFLE_MODES, BNOptions, NormFactory, norm_names
from .roi_heads import BNConvDeconvKeypointHead, BNConvFCHead, BNConvUpsampleHead

__all__ = [
    "SHUFFLE_MODES",
    "BNConvDeconvKeypointHead",
    "BNConvFCHead",
    "BNConvUpsampleHead",
    "BNOptions",
    "NormFactory",
    "SmallConvBackbone",
    "configure_model",
    "convert_norm",
    "norm_names",
]
