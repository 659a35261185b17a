"""What this package must know of a family of detectors: one small adapter each."""

from .detector import (
    Detector,
    FormError,
    Sample,
    detector_of,
    find_maps,
    in_roi_heads,
    poolers,
    register_detector,
    roi_heads,
    rows_are_images,
)
from .detectron2_models import Detectron2Detector
from .torchvision_models import TorchvisionDetector

__all__ = [
    "Detector",
    "Detectron2Detector",
    "FormError",
    "Sample",
    "TorchvisionDetector",
    "detector_of",
    "find_maps",
    "in_roi_heads",
    "poolers",
    "register_detector",
    "roi_heads",
    "rows_are_images",
]
