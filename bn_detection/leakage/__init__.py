"""What leaks between the RoIs of an image through a normalization batch: measured, and bounded."""

from ..estimate import Estimate
from .from_config import measure_own_detections
from .limits import LimitComparison, sampled_accuracy_limit
from .on_detections import DetectionReport, measure_detections
from .probe import check_probe, check_probe_config, images_per_worker, measure_leakage
from .report import LeakageReport

__all__ = [
    "DetectionReport",
    "Estimate",
    "LeakageReport",
    "LimitComparison",
    "check_probe",
    "check_probe_config",
    "images_per_worker",
    "measure_detections",
    "measure_leakage",
    "measure_own_detections",
    "sampled_accuracy_limit",
]
