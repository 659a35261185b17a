"""What leaks between the RoIs of an image through a normalization batch: measured, and bounded."""

from .intervals import Estimate
from .probe import LeakageReport, check_probe, images_per_worker, measure_leakage

__all__ = [
    "Estimate",
    "LeakageReport",
    "check_probe",
    "images_per_worker",
    "measure_leakage",
]
