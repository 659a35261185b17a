"""Components registered with Detectron2: importing this package registers them."""

from .backbone import SmallConvBackbone
from .configure import configure_model
from .norms import NORMS, norm_factory
from .roi_heads import BNConvFCHead, BNConvUpsampleHead

__all__ = [
    "NORMS",
    "BNConvFCHead",
    "BNConvUpsampleHead",
    "SmallConvBackbone",
    "configure_model",
    "norm_factory",
]
