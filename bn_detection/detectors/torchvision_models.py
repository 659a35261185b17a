"""torchvision's detectors: ``GeneralizedRCNN``, ``RetinaNet``, ``FCOS``, ``SSD``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from .detector import Detector, register_detector

_MODELS = (GeneralizedRCNN, RetinaNet, FCOS, SSD)


@register_detector("torchvision")
class TorchvisionDetector(Detector):
    """A model that is one of torchvision's detectors, or has one in it.

    ``roi_heads`` pools the proposals of each image for its box head, and the positive ones alone
    for its mask and keypoint heads, which are then those that have a class.
    """

    roi_heads = (RoIHeads,)
    poolers: ClassVar = {MultiScaleRoIAlign: lambda args: [len(boxes) for boxes in args[1]]}
    maps_are_images = True

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return any(isinstance(module, _MODELS) for module in model.modules())

    @property
    def num_labels(self) -> int | None:
        for module in self.model.modules():
            part: Any = module
            if isinstance(module, RoIHeads) and hasattr(part.box_predictor, "cls_score"):
                return int(part.box_predictor.cls_score.out_features)
            if isinstance(module, RetinaNet | FCOS):
                return int(part.head.classification_head.num_classes)
            if isinstance(module, SSD):
                return int(part.head.classification_head.num_columns)
        return None
