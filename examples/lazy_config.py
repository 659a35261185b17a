"""LazyConfigs of small detectors that use every component of bn_detection, without YAML.

    python examples/lazy_config.py
    python examples/lazy_config.py mask_rcnn.roi_heads.box_head.conv_norm=GhostBN

Each is built, makes two training steps on random images, and is evaluated: seconds on a CPU. In a
project of your own, put the nodes in the ``.py`` config that ``LazyConfig.load`` reads.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

from bn_detection import BNOptions
from bn_detection.heads import (
    BNConvDeconvKeypointHead,
    BNConvFCHead,
    BNConvUpsampleHead,
    BNFCOSHead,
    BNRetinaNet,
    BNRetinaNetHead,
    SmallConvBackbone,
    SmallPyramidBackbone,
)
from bn_detection.norm import LevelOptions

CLASSES = 3
KEYPOINTS = 4
CHANNELS = 32
SIDE = 128
STEPS = 2
PIXELS = {"pixel_mean": [127.5] * 3, "pixel_std": [60.0] * 3}
LEVELS = ["p2", "p3", "p4"]


def mask_rcnn() -> Any:
    """A normalization of its own for each of the box, the mask and the keypoint head."""
    features = LazyCall(ShapeSpec)(channels=CHANNELS, height=7, width=7)
    pooler = LazyCall(ROIPooler)(
        output_size=7, scales=[0.25], sampling_ratio=0, pooler_type="ROIAlignV2"
    )
    return LazyCall(GeneralizedRCNN)(
        backbone=LazyCall(SmallConvBackbone)(in_channels=3, channels=CHANNELS),
        proposal_generator=LazyCall(RPN)(
            in_features=["p2"],
            head=LazyCall(StandardRPNHead)(in_channels=CHANNELS, num_anchors=1),
            anchor_generator=LazyCall(DefaultAnchorGenerator)(
                sizes=[[32]], aspect_ratios=[1.0], strides=[4], offset=0.0
            ),
            anchor_matcher=LazyCall(Matcher)(
                thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
            ),
            box2box_transform=LazyCall(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
            batch_size_per_image=32,
            positive_fraction=0.5,
            pre_nms_topk=[100, 50],
            post_nms_topk=[50, 20],
        ),
        roi_heads=LazyCall(StandardROIHeads)(
            num_classes=CLASSES,
            batch_size_per_image=16,
            positive_fraction=0.5,
            proposal_matcher=LazyCall(Matcher)(
                thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
            ),
            box_in_features=["p2"],
            box_pooler=pooler,
            # This process stands for two workers, between which RoIs are shuffled. On several GPUs
            # leave virtual_workers out.
            box_head=LazyCall(BNConvFCHead)(
                input_shape=features,
                conv_dims=[CHANNELS, CHANNELS],
                fc_dims=[64],
                conv_norm="ShuffleBN",
                bn_options=LazyCall(BNOptions)(virtual_workers=2),
            ),
            box_predictor=LazyCall(FastRCNNOutputLayers)(
                input_shape=LazyCall(ShapeSpec)(channels=64),
                box2box_transform=LazyCall(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
                num_classes=CLASSES,
            ),
            mask_in_features=["p2"],
            mask_pooler=pooler,
            mask_head=LazyCall(BNConvUpsampleHead)(
                input_shape=features,
                num_classes=CLASSES,
                conv_dims=[CHANNELS, CHANNELS],
                conv_norm="SyncBN",
                bn_options=LazyCall(BNOptions)(momentum=0.01),
            ),
            keypoint_in_features=["p2"],
            keypoint_pooler=pooler,
            keypoint_head=LazyCall(BNConvDeconvKeypointHead)(
                input_shape=features,
                num_keypoints=KEYPOINTS,
                loss_normalizer="visible",
                conv_dims=[CHANNELS],
                conv_norm="GhostBN",
                bn_options=LazyCall(BNOptions)(ghost_size=4),
            ),
        ),
        **PIXELS,
    )


def retinanet() -> Any:
    """SyncBN over all feature levels together (Table 5, row 1)."""
    return LazyCall(BNRetinaNet)(
        backbone=LazyCall(SmallPyramidBackbone)(in_channels=3, channels=CHANNELS),
        head=_level_head(BNRetinaNetHead, train="shared", population="shared", num_anchors=1),
        head_in_features=LEVELS,
        anchor_generator=LazyCall(DefaultAnchorGenerator)(
            sizes=[[16], [32], [64]], aspect_ratios=[1.0], strides=[4, 8, 16], offset=0.0
        ),
        box2box_transform=LazyCall(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=LazyCall(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        num_classes=CLASSES,
        test_score_thresh=0.0,  # what is not trained is never sure
        **PIXELS,
    )


def fcos() -> Any:
    """SyncBN over each feature level, with a population for each (row 4)."""
    return LazyCall(FCOS)(
        backbone=LazyCall(SmallPyramidBackbone)(in_channels=3, channels=CHANNELS),
        head=_level_head(BNFCOSHead, train="separate", population="separate"),
        head_in_features=LEVELS,
        num_classes=CLASSES,
        test_score_thresh=0.0,  # what is not trained is never sure
        **PIXELS,
    )


def _level_head(head: type[nn.Module], *, train: str, population: str, **more: Any) -> Any:
    return LazyCall(head)(
        input_shape=[LazyCall(ShapeSpec)(channels=CHANNELS) for _ in LEVELS],
        num_classes=CLASSES,
        conv_dims=[CHANNELS, CHANNELS],
        norm="SyncBN",
        levels=LazyCall(LevelOptions)(train=train, population=population, affine="shared"),
        bn_options=LazyCall(BNOptions)(),
        **more,
    )


def configs() -> Any:
    """The LazyConfig of each detector, by name."""
    return OmegaConf.create(
        {"mask_rcnn": mask_rcnn(), "retinanet": retinanet(), "fcos": fcos()},
        flags={"allow_objects": True},
    )


def random_images(number: int = 2) -> list[dict[str, Any]]:
    """Noise, with two objects an image: boxes, masks and keypoints."""
    corners = torch.tensor([[10.0, 10.0, 42.0, 42.0], [60.0, 50.0, 120.0, 110.0]])
    masks = torch.zeros(len(corners), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    spread = torch.linspace(0.2, 0.8, KEYPOINTS)[None, :, None]
    points = corners[:, None, :2] + spread * (corners[:, None, 2:] - corners[:, None, :2])
    visible = torch.full((len(corners), KEYPOINTS, 1), 2.0)
    objects = Instances(
        (SIDE, SIDE),
        gt_boxes=Boxes(corners),
        gt_classes=torch.tensor([0, 1]),
        gt_masks=BitMasks(masks),
        gt_keypoints=Keypoints(torch.cat([points, visible], dim=2)),
    )
    images = torch.randint(0, 255, (number, 3, SIDE, SIDE))
    return [{"image": i, "height": SIDE, "width": SIDE, "instances": objects} for i in images]


def train(model: nn.Module) -> list[dict[str, float]]:
    """The losses of each of a few steps on the same images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    images = random_images()
    steps = []
    with EventStorage() as storage:
        for _ in range(STEPS):
            losses = model.train()(images)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
            steps.append({name: loss.item() for name, loss in losses.items()})
    return steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the LazyConfigs")
    cfg = LazyConfig.apply_overrides(configs(), parser.parse_args(arguments).overrides)
    for name, node in cfg.items():
        torch.manual_seed(0)
        model = instantiate(node)
        *_, losses = train(model)
        with torch.no_grad():
            found = model.eval()(random_images(1))[0]["instances"]
        ours = {type(m).__name__ for m in model.modules() if "bn_detection" in type(m).__module__}
        print(f"{name}: {', '.join(sorted(ours))}")
        print(f"  losses of step {STEPS}: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
        print(f"  {len(found)} detections in one image")


if __name__ == "__main__":
    main()
