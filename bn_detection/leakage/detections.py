"""What the heads found, as COCO's detections."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from torch import Tensor
from torch.nn.functional import grid_sample

from .rois import ImageRois

_THRESHOLD = 0.5
# Of one grid to sample.
_MOST_PIXELS = 1 << 22


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
        probabilities=masks[at, channel].sigmoid(),
    )
    placed = detector_postprocess(placed, image["height"], image["width"]).to("cpu")
    pasted = paste(placed.probabilities, placed.pred_boxes.tensor, *placed.image_size)
    pixels = pasted.numpy().astype(np.uint8).transpose(1, 2, 0)
    return [
        {"image_id": image["id"], "segmentation": mask, "score": score, "category_id": category}
        for mask, score, category in zip(
            rle.encode(np.asfortranarray(pixels)),
            placed.scores.tolist(),
            placed.pred_classes.tolist(),
            strict=True,
        )
    ]


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Place masks in an image, as Detectron2's ``paste_masks_in_image`` does.

    All masks of an image at once, which takes a fraction of the time where they are small.

    Args:
        masks: probabilities, ``(N, S, S)``.
        boxes: ``(N, 4)``, XYXY, each with an area.
        height: of the image.
        width: likewise.

    Returns:
        Bool ``(N, height, width)``.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool)
    size = torch.tensor([width, height])
    low = (boxes[:, :2].floor().long() - 1).clamp(min=0)
    high = torch.minimum(boxes[:, 2:].ceil().long() + 1, size)
    side = int((high - low).amax()) if len(boxes) else 0
    for start in range(0, len(masks), rows := max(_MOST_PIXELS // max(side, 1) ** 2, 1)):
        part = slice(start, start + rows)
        centres = low[part, :, None] + torch.arange(side) + 0.5
        first, last = boxes[part, :2, None], boxes[part, 2:, None]
        x, y = ((centres - first) / (last - first) * 2 - 1).unbind(1)
        grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], 3)
        found = grid_sample(masks[part, None], grid, align_corners=False)[:, 0] >= _THRESHOLD
        corners = torch.cat([low[part], high[part]], 1).tolist()
        for n, (x0, y0, x1, y1) in enumerate(corners):
            pasted[start + n, y0:y1, x0:x1] = found[n, : y1 - y0, : x1 - x0]
    return pasted
