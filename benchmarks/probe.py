"""What the leakage probe costs, in evaluations of the same images.

The probe with its four modes, intervals included, and an evaluation as ``tools/train_net.py
--eval-only`` does it, in turns in one process; the ratio is the median over paired turns, of
processor time, which other processes disturb less than the clock. The quickstart's Mask R-CNN is
trained for a moment first, for detections of the usual number; R50-FPN with a box head of 4
convolutions has random weights and a few images of 640 px, resized to 800.

    python benchmarks/probe.py --quick     # the quickstart model, one turn; R50-FPN on 4 images
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from bn_detection.data import LeakyShapesConfig, make_leaky_shapes
from bn_detection.engine import Trainer, load_config
from bn_detection.engine.setup import register_datasets
from bn_detection.leakage import measure_leakage
from bn_detection.leakage.second_stage import SecondStage

CONFIGS = Path(__file__).parents[1] / "configs"
LARGE = LeakyShapesConfig(image_size=640, object_size=(80, 160), texture_period=30.0)


def config(name: str, *overrides: object) -> CfgNode:
    opts = [str(part) for part in overrides]
    cfg = load_config(argparse.Namespace(config_file=str(CONFIGS / name), opts=opts))
    register_datasets(cfg)
    return cfg


def quickstart(folder: str, iterations: int) -> tuple[CfgNode, nn.Module]:
    fast = ("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (), "OUTPUT_DIR", folder)
    cfg = config("quickstart/mask_rcnn_bn.yaml", *fast, "BN.LEAKAGE.IMAGES_PER_WORKER", 1)
    training = cfg.clone()
    training.DATASETS.TEST = ()
    trainer = Trainer(training)
    trainer.train()
    return cfg, trainer.model


def large(folder: str, images: int) -> tuple[CfgNode, nn.Module]:
    root = Path(folder, "large")
    make_leaky_shapes(root, images, seed=0, config=LARGE, split="val")
    dataset = ["probe_large", f"{root}/annotations.json", f"{root}/images"]
    cfg = config(
        "mask_rcnn_bn.yaml",
        *("DATASETS.COCO_JSON", [dataset], "DATASETS.TEST", ("probe_large",)),
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 4),
        *("OUTPUT_DIR", folder, "DATALOADER.NUM_WORKERS", 0),
        *("BN.LEAKAGE.IMAGES_PER_WORKER", 2),
    )
    return cfg, Trainer.build_model(cfg)


def seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Of processor and clock."""
    start = time.process_time(), time.perf_counter()
    function(*arguments)
    return time.process_time() - start[0], time.perf_counter() - start[1]


def compare(name: str, cfg: CfgNode, model: nn.Module, turns: int) -> None:
    times: dict[str, list[tuple[float, float]]] = {"evaluation": [], "probe": [], "by layer": []}
    for _ in range(turns):
        times["evaluation"].append(seconds(Trainer.test, cfg, model))
        times["probe"].append(seconds(measure_leakage, cfg, model))
        times["by layer"].append(seconds(partial(measure_leakage, by_layer=True), cfg, model))
    layers = sum(len(of) for of in SecondStage(model).layers.values())
    turned = list(zip(*([cpu for cpu, _ in of] for of in times.values()), strict=True))
    ratio = statistics.median(probe / evaluation for evaluation, probe, _ in turned)
    a_layer = statistics.median((both - probe) / one / layers for one, probe, both in turned)
    values = [f"{what} {statistics.median(t for t, _ in of):.1f} s" for what, of in times.items()]
    print(
        f"{name}: {', '.join(values)}; {ratio:.2f} evaluations, and {a_layer:.2f} for each of "
        f"{layers} layers",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one turn, and few images")
    parser.add_argument("--only", choices=("quickstart", "R50-FPN"), help="one of the models")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "R50-FPN":
            cfg, model = quickstart(folder, 200)
            compare("quickstart", cfg, model, 1 if args.quick else 5)
        if args.only != "quickstart":
            cfg, model = large(folder, 4 if args.quick else 16)
            compare("R50-FPN, 4-conv head", cfg, model, 1 if args.quick else 3)


if __name__ == "__main__":
    main()
