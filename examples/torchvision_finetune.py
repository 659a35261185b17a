"""torchvision's Faster R-CNN v2, trained on one image a step, and what its BN layers make of it.

    python examples/torchvision_finetune.py                  # BN, as torchvision builds it
    python examples/torchvision_finetune.py --norm GN        # with one added line

In the form of torchvision's own script (references/detection/train.py), on LeakyShapes, on a CPU in
minutes: a stock ``fasterrcnn_resnet50_fpn_v2``, whose box head, FPN and backbone have live BN, gets
one image a step, as on a single small GPU. Then it is diagnosed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.data.detection_utils import read_image
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_tensor

import bn_detection
from bn_detection.data import make_leaky_shapes


class CocoDetection(Dataset[Any]):
    """Images and targets in torchvision's convention."""

    def __init__(self, annotations: Path, images: Path) -> None:
        self.coco, self.images = COCO(str(annotations)), images
        self.ids = sorted(self.coco.imgs)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.coco.imgs[self.ids[number]]
        objects = self.coco.imgToAnns[image["id"]]
        boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float)
        target = {
            "boxes": box_convert(boxes.reshape(-1, 4), "xywh", "xyxy"),
            "labels": torch.tensor([item["category_id"] for item in objects]),
            "image_id": torch.tensor(image["id"]),
        }
        pixels = read_image(str(self.images / image["file_name"]), format="RGB")
        return to_tensor(pixels.copy()), target


def build_model(num_classes: int) -> nn.Module:
    """The stock model, with images and numbers of RoIs for a CPU."""
    return fasterrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        min_size=128,
        max_size=128,
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_fg_iou_thresh=0.5,
        box_positive_fraction=0.5,
    )


def train(model: nn.Module, loader: DataLoader[Any], steps: int, lr: float) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warmup, 1) * (0.1 if k > 0.8 * steps else 1)
    )
    model.train()
    step, start = 0, time.monotonic()
    while step < steps:
        for images, targets in loader:
            losses = model(list(images), list(targets))
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0 or step == steps:
                seconds = time.monotonic() - start
                print(f"step {step} of {steps}: loss {loss.item():.3f}, {seconds:.0f} s")
            if step == steps:
                return


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", default="", help="of the box head, in place of torchvision's BN")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=64, help="of the diagnosis")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=1, help="images a step")
    parser.add_argument("--output-dir", type=Path, default=Path("output", "torchvision_finetune"))
    args = parser.parse_args(arguments)
    for split, number in (("train", 400), ("val", args.images)):
        if not (args.output_dir / split).exists():
            make_leaky_shapes(args.output_dir / split, number, seed=0, split=split)
    torch.manual_seed(0)
    data = [
        CocoDetection(
            args.output_dir / split / "annotations.json", args.output_dir / split / "images"
        )
        for split in ("train", "val")
    ]
    loader: DataLoader[Any] = DataLoader(
        data[0],
        args.batch_size,
        shuffle=True,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
    )
    model = build_model(num_classes=1 + len(data[0].coco.cats))
    if args.norm:
        # The added line.
        bn_detection.convert_norm(model, args.norm, "roi_heads.*")
    train(model, loader, args.steps, args.lr)
    torch.save({"model": model.state_dict()}, args.output_dir / f"{args.norm or 'BN'}.pth")

    found = bn_detection.diagnose(
        model, data[1], images_per_worker=args.batch_size, num_images=args.images
    )
    print(found.text())


if __name__ == "__main__":
    main()
