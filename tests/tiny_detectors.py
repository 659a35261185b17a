"""Small detectors of torchvision's convention, which take no time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

CHANNELS = 8
SIDE = 48


def tiny_rcnn(norm: Any = nn.BatchNorm2d) -> nn.Module:
    """torchvision's Faster R-CNN on one convolution."""
    torch.manual_seed(0)
    backbone: Any = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 4, 1), nn.ReLU())
    backbone.out_channels = CHANNELS
    return FasterRCNN(
        backbone,
        min_size=SIDE,
        max_size=SIDE,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        rpn_pre_nms_top_n_train=20,
        rpn_post_nms_top_n_train=10,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=10,
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=FastRCNNConvFCHead((CHANNELS, 5, 5), [CHANNELS], [16], norm_layer=norm),
        box_predictor=FastRCNNPredictor(16, 3),
        box_score_thresh=0.0,
        box_batch_size_per_image=8,
    )


def without_norm() -> nn.Module:
    """The same without a normalization layer."""
    return tiny_rcnn(None)


class OwnDetector(nn.Module):
    """Every image has two boxes, with scores by a layer that normalizes images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        features = self.layers(torch.stack(images)).mean((2, 3))
        if targets is not None:
            return {"loss": features.sum()}
        boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0], [20.0, 20.0, 44.0, 44.0]])
        labels = torch.tensor([1, 2])
        return [{"boxes": boxes, "scores": f[:2].sigmoid(), "labels": labels} for f in features]


def own_detector() -> nn.Module:
    torch.manual_seed(0)
    return OwnDetector()


def no_module() -> Any:
    return {"a": "dict"}


def other_form() -> nn.Module:
    """Its outputs are a tensor."""

    class Other(OwnDetector):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            features = self.layers(torch.stack(images))
            return {"loss": features.sum()} if targets is not None else features

    return Other()


def needs_arguments(number: int) -> Any:
    return number


def items(number: int = 12, *, labels: bool = True) -> list[Any]:
    """Images of noise with two objects, and their targets."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(number):
        image = torch.rand(3, SIDE, SIDE, generator=generator)
        boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0], [20.0, 20.0, 44.0, 44.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        made.append((image, target) if labels else image)
    return made
