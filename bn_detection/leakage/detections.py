"""What the heads found, as COCO's detections."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from torch import Tensor

from .rois import ImageRois


def box_detections(image: dict[str, Any], found: Instances) -> list[dict[str, Any]]:
    """The boxes found in an image.

    Args:
        image: its id and size.
        found: in the coordinates of the resized image.
    """
    found = detector_postprocess(found, image["height"], image["width"]).to("cpu")
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": image["id"], "bbox": box, "score": score, "category_id": category}
        for box, score, category in zip(
            boxes.tolist(), found.scores.tolist(), found.pred_classes.tolist(), strict=True
        )
    ]


def mask_detections(
    image: dict[str, Any], rois: ImageRois, found: Instances, rows: Tensor, masks: Tensor
) -> list[dict[str, Any]]:
    """The detections that come from foreground RoIs, each with the mask of its RoI, in its box.

    Args:
        image: its id and size.
        rois: its RoIs.
        found: of the box head, D detections.
        rows: ``(D,)``, the RoI of each.
        masks: logits ``(F, classes, S, S)`` of the foreground RoIs.
    """
    from_foreground = rois.foreground[rows]
    found, rows = found[from_foreground], rows[from_foreground]
    if not len(found):
        return []
    at = torch.cumsum(rois.foreground, 0)[rows] - 1
    channel = torch.zeros_like(at) if masks.shape[1] == 1 else found.pred_classes
    placed = Instances(
        found.image_size,
        pred_boxes=Boxes(rois.proposals.proposal_boxes.tensor[rows].clone()),
        scores=found.scores,
        pred_classes=found.pred_classes,
        pred_masks=masks[at, channel][:, None].sigmoid(),
    )
    placed = detector_postprocess(placed, image["height"], image["width"]).to("cpu")
    pixels = placed.pred_masks.numpy().astype(np.uint8).transpose(1, 2, 0)
    return [
        {"image_id": image["id"], "segmentation": mask, "score": score, "category_id": category}
        for mask, score, category in zip(
            rle.encode(np.asfortranarray(pixels)),
            placed.scores.tolist(),
            placed.pred_classes.tolist(),
            strict=True,
        )
    ]
