"""Detectron2's detectors, from whatever config they were built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.modeling import Backbone, ROIHeads
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .detector import Detector, FormError, Sample, register_detector


@register_detector("detectron2")
class Detectron2Detector(Detector):
    """A model of Detectron2: a list of dicts in; losses, or a list of dicts of ``Instances`` out.

    Images are given at the size that they have. Items of Detectron2's own loaders, dicts with
    ``image`` and ``instances``, are resized and augmented as its mapper did.
    """

    roi_heads = (ROIHeads,)
    poolers: ClassVar = {ROIPooler: lambda args: [len(boxes) for boxes in args[1]]}
    maps_are_images = True
    first_label = 0

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return any(isinstance(module, Backbone) for module in model.modules())

    @property
    def num_labels(self) -> int | None:
        part: Any
        for part in (getattr(self.model, "roi_heads", None), self.model):
            if hasattr(part, "num_classes"):
                return int(part.num_classes)
        return None

    def read(self, item: Any) -> tuple[Any, Any] | None:
        if not (isinstance(item, dict) and isinstance(item.get("image"), Tensor)):
            return None
        target: dict[str, Any] = {}
        if "instances" in item:
            objects = item["instances"]
            target |= {"boxes": objects.gt_boxes.tensor, "labels": objects.gt_classes}
            if isinstance(getattr(objects, "gt_masks", None), BitMasks):
                target["masks"] = objects.gt_masks.tensor.to(torch.uint8)
        return self._in_rgb(item["image"].float() / 255), target

    def forward(self, samples: Sequence[Sample]) -> Any:
        with EventStorage(0):  # which losses and samplers write to
            return self.model([self._dict(*sample) for sample in samples])

    def detect(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        found = []
        for output in self.forward(samples):
            if "instances" not in output:
                raise FormError(
                    f"{type(self.model).__name__} in eval mode gave a dict with the keys "
                    f"{', '.join(output)}, and no instances: it is no detector of objects."
                )
            objects = output["instances"].to("cpu")
            item = {
                "boxes": objects.pred_boxes.tensor,
                "scores": objects.scores,
                "labels": objects.pred_classes,
            }
            if objects.has("pred_masks"):
                item["masks"] = objects.pred_masks[:, None].float()
            found.append(item)
        return found

    def _in_rgb(self, image: Tensor) -> Tensor:
        """From the model's order of channels to RGB, or back."""
        return image.flip(0) if getattr(self.model, "input_format", "BGR") == "BGR" else image

    def _dict(self, image: Tensor, target: dict[str, Any]) -> dict[str, Any]:
        height, width = image.shape[1:]
        made: dict[str, Any] = {
            "image": 255 * self._in_rgb(image),
            "height": height,
            "width": width,
        }
        if "boxes" in target:
            objects = Instances((height, width), gt_boxes=Boxes(target["boxes"]))
            objects.gt_classes = target["labels"]
            if "masks" in target:
                objects.gt_masks = BitMasks(target["masks"])
            made["instances"] = objects
        return made
