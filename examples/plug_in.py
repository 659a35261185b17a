"""ShuffleBN in a stock Detectron2 model, with one added line, and out of it again.

    python examples/plug_in.py

A model of Detectron2's model zoo, with random weights, trains a few steps on random images. Then
its layers become plain ``nn.BatchNorm2d`` again, and a second process, which never imports
``bn_detection``, loads the checkpoint in the stock model: the outputs must be the same. Takes about
half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

CONFIG = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
STEPS = 3
TOLERANCE = 1e-5


def stock_model() -> nn.Module:
    """From Detectron2 alone. Its box head is the stage res5 of the ResNet, on RoIs."""
    cfg = model_zoo.get_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # what is not trained is never sure
    torch.manual_seed(0)
    return build_model(cfg)


def random_images(number: int, side: int = 160) -> list[dict[str, Any]]:
    """Noise with two bright rectangles, which are the objects."""
    generator = torch.Generator().manual_seed(1)
    images = []
    for _ in range(number):
        image = torch.randint(0, 100, (3, side, side), generator=generator)
        corner = torch.randint(0, side // 2, (2, 2), generator=generator)
        boxes = torch.cat([corner, corner + side // 3], dim=1)
        for x0, y0, x1, y1 in boxes.tolist():
            image[:, y0:y1, x0:x1] += 150
        objects = Instances(
            (side, side), gt_boxes=Boxes(boxes.float()), gt_classes=torch.tensor([0, 1])
        )
        images.append({"image": image, "height": side, "width": side, "instances": objects})
    return images


@torch.no_grad()
def detections(model: nn.Module) -> Tensor:
    """Boxes and scores that the model finds in two images."""
    found = [output["instances"] for output in model.eval()(random_images(2))]
    return torch.cat([torch.cat([f.pred_boxes.tensor, f.scores[:, None]], dim=1) for f in found])


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest one, relative to the largest value."""
    if actual.shape != expected.shape or len(expected) == 0:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max())


def train_and_save(folder: Path) -> None:
    # Imported here, because the second process must do without.
    from bn_detection import BNOptions, convert_norm, to_plain_batch_norm

    model = stock_model()
    print(f"Built {CONFIG}: stock Detectron2, random weights.")

    # The added line. This process stands for two workers: ShuffleBN shuffles RoIs between workers,
    # so on its own it would be BN. In training on several GPUs leave out the options.
    names = convert_norm(model, "ShuffleBN", "roi_heads.*", options=BNOptions(virtual_workers=2))

    print(f"Converted {len(names)} layers to ShuffleBN: {names[0]}, ..., {names[-1]}.")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = random_images(4)
    with EventStorage() as storage:
        for step in range(STEPS):
            loss = sum(model.train()(images[step % 2 :: 2]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            storage.step()
            print(f"Step {step + 1} of {STEPS}: loss {loss:.3f}.")

    expected = detections(model)
    to_plain_batch_norm(model)
    plain = {type(model.get_submodule(name)) for name in names} == {nn.BatchNorm2d}
    print(f"Back to plain: all {len(names)} layers are torch.nn.BatchNorm2d: {plain}.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pth")
    torch.save(expected, folder / "detections.pth")
    print(f"Saved {folder / 'model.pth'}, and {len(expected)} detections of the ShuffleBN model.")


def load_and_compare(folder: Path) -> int:
    model = stock_model()
    model.load_state_dict(torch.load(folder / "model.pth"))
    largest = difference(detections(model), torch.load(folder / "detections.pth"))
    imported = "bn_detection" in sys.modules
    print(f"New process: stock model loaded; bn_detection imported: {imported}.")
    print(f"Largest difference of the detections, relative: {largest:.1e}.")
    return 0 if largest <= TOLERANCE and not imported else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("output", "plug_in"))
    parser.add_argument("--load-only", action="store_true", help="what the second process does")
    args = parser.parse_args()
    if args.load_only:
        return load_and_compare(args.output_dir)
    train_and_save(args.output_dir)
    command = [sys.executable, __file__, "--load-only", "--output-dir", str(args.output_dir)]
    sys.stdout.flush()
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
