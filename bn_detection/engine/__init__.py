"""From a command line to a trained and evaluated model."""

from ..command_line import argument_parser
from ..workers import Stopped, WorkerError, launch, run
from .checkpoint import AtomicCheckpointer
from .checks import check_config
from .diagnosis import diagnose, preflight_diagnosis
from .evaluation import COCOEvaluator, build_evaluator
from .probing import preflight_probe, probe
from .recalibration import choose_workers, preflight_recalibration, recalibrate
from .setup import load_config, preflight, setup
from .trainer import Trainer, evaluate, train

__all__ = [
    "AtomicCheckpointer",
    "COCOEvaluator",
    "Stopped",
    "Trainer",
    "WorkerError",
    "argument_parser",
    "build_evaluator",
    "check_config",
    "choose_workers",
    "diagnose",
    "evaluate",
    "launch",
    "load_config",
    "preflight",
    "preflight_diagnosis",
    "preflight_probe",
    "preflight_recalibration",
    "probe",
    "recalibrate",
    "run",
    "setup",
    "train",
]
