"""Detectron2's FCOS with BN over its levels: a LazyConfig whose head is this project's.

    python examples/fcos_levels.py
    python examples/fcos_levels.py model.head.norm=BN model.head.levels.population=shared

FCOS of the model zoo has GroupNorm in its head, which is applied to five feature levels. With BN
instead, it matters what the levels share in training and at inference (docs/levels.md). With random
weights and images: two training steps, inference, and the same inference in the stock model. Takes
half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from bn_detection import BNOptions, to_plain_batch_norm
from bn_detection.heads import BNFCOSHead
from bn_detection.norm import LevelOptions

CONFIG = "COCO-Detection/fcos_R_50_FPN_1x.py"
STEPS = 2
SIDE = 128
TOLERANCE = 1e-4


def stock_config() -> Any:
    """With BN in the head, which Detectron2 then gives each level."""
    cfg = model_zoo.get_config(CONFIG)
    cfg.model.head.norm = "BN"
    cfg.model.test_score_thresh = 0.0  # what is not trained is never sure
    return cfg


def config(overrides: list[str]) -> Any:
    cfg = stock_config()
    cfg.model.head._target_ = BNFCOSHead
    cfg.model.head.norm = "SyncBN"
    cfg.model.head.levels = LazyCall(LevelOptions)(
        train="separate", population="separate", affine="shared"
    )
    cfg.model.head.bn_options = LazyCall(BNOptions)(momentum=0.1)
    return LazyConfig.apply_overrides(cfg, overrides)


def random_images() -> list[dict[str, Any]]:
    boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 60.0], [30.0, 40.0, 120.0, 120.0]]))
    objects = Instances((SIDE, SIDE), gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
    images = torch.randint(0, 255, (2, 3, SIDE, SIDE))
    return [{"image": i, "height": SIDE, "width": SIDE, "instances": objects} for i in images]


@torch.no_grad()
def scores(model: nn.Module, images: list[dict[str, Any]]) -> Tensor:
    return torch.cat([output["instances"].scores for output in model.eval()(images)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the LazyConfig")
    cfg = config(parser.parse_args().overrides)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    print(f"Built {CONFIG} with {instantiate(cfg.model.head.levels)} in its head.")

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    images = random_images()
    with EventStorage():
        for step in range(STEPS):
            loss = sum(model.train()(images).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"Step {step + 1} of {STEPS}: loss {loss:.3f}.")
    expected = scores(model, images)

    to_plain_batch_norm(model)
    stock = instantiate(stock_config().model)
    stock.load_state_dict(model.state_dict())
    actual = scores(stock, images)
    same = actual.shape == expected.shape
    largest = float((actual - expected).abs().max() / expected.max()) if same else float("inf")
    print(f"{len(expected)} detections; in the stock model their scores differ by {largest:.1e}.")
    return 0 if largest <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
