"""The instrument in Python: any detector that is built, and its images."""

from .diagnosing import diagnose
from .images import Data, Images
from .measuring import measure_leakage
from .recalibrating import Recalibration, recalibrate

__all__ = ["Data", "Images", "Recalibration", "diagnose", "measure_leakage", "recalibrate"]
