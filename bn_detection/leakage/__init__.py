"""What leaks between the RoIs of an image through a normalization batch: measured, and bounded."""

from ..estimate import Estimate
from .by_class import ClassLeakage
from .by_layer import LayerLeakage
from .from_config import measure_own_detections
from .limits import LimitComparison, sampled_accuracy_limit
from .on_detections import DetectionReport, measure_detections
from .potential import LeakPotential, measure_leak_potential
from .probe import (
    check_probe,
    check_probe_config,
    images_per_worker,
    measure_layers,
    measure_leakage,
)
from .report import LeakageReport
from .second_stage import UnknownSecondStage

__all__ = [
    "ClassLeakage",
    "DetectionReport",
    "Estimate",
    "LayerLeakage",
    "LeakPotential",
    "LeakageReport",
    "LimitComparison",
    "UnknownSecondStage",
    "check_probe",
    "check_probe_config",
    "images_per_worker",
    "measure_detections",
    "measure_layers",
    "measure_leak_potential",
    "measure_leakage",
    "measure_own_detections",
    "sampled_accuracy_limit",
]
