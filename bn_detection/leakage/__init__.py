"""What leaks between the RoIs of an image through a normalization batch: measured, and bounded."""

from ..estimate import Estimate
from .limits import LimitComparison, sampled_accuracy_limit
from .probe import check_probe, check_probe_config, images_per_worker, measure_leakage
from .report import LeakageReport

__all__ = [
    "Estimate",
    "LeakageReport",
    "LimitComparison",
    "check_probe",
    "check_probe_config",
    "images_per_worker",
    "measure_leakage",
    "sampled_accuracy_limit",
]
