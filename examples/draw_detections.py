"""Photographs with the boxes that the runs of a study find, a column a run and evaluation.

    python examples/draw_detections.py output/studies/bccd --output detections.png \
        --columns "BN/population statistics" "BN/batch statistics" "ShuffleBN/population statistics"

Nothing is computed: the study has left its detections. The first column is the ground truth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer

import bn_detection
from bn_detection.engine import load_config

_FILE = "coco_instances_results.json"
COLORS = ("#ffd400", "#ff4b4b", "#2a8cff", "#3ddc84", "#ff7ae0", "#00e0e0")
"""Of the classes, in their order."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="its folder, such as output/studies/bccd")
    parser.add_argument("--columns", nargs="+", required=True, metavar="RUN/EVALUATION")
    parser.add_argument("--seed", default="1", help="of the trainings; default: 1")
    parser.add_argument(
        "--images", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="by number, from 0"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that is drawn")
    parser.add_argument("--output", type=Path, default=Path("detections.png"))
    return parser


def detections(study: Path, column: str, seed: str) -> list[dict[str, Any]]:
    """What one evaluation of a run found, in COCO's format."""
    run, _, evaluation = column.partition("/")
    training = study / run / f"seed_{seed}"
    folder = training / "evaluations" / evaluation
    # That which ends the training has no folder of its own.
    pattern = "eval_*" if folder.is_dir() else "inference"
    files = [*(folder if folder.is_dir() else training).glob(f"{pattern}/*/{_FILE}")]
    if len(files) != 1:
        raise SystemExit(f"{folder}: {len(files)} files of detections are there, not one.")
    found: list[dict[str, Any]] = json.loads(files[0].read_text())
    return found


def draw(pixels: np.ndarray, boxes: Sequence[tuple[Sequence[float], str]]) -> np.ndarray:
    """An image with boxes in ``x y width height``, each in its color."""
    visualizer = Visualizer(pixels)
    for box, color in boxes:
        corners = BoxMode.convert(list(box), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        visualizer.draw_box(corners, alpha=1, edge_color=color)
    drawn: np.ndarray = visualizer.output.get_image()
    return drawn


def main(args: argparse.Namespace) -> None:
    first = args.study / args.columns[0].partition("/")[0] / f"seed_{args.seed}"
    cfg = load_config(argparse.Namespace(config_file=str(first / "config.yaml"), opts=[]))
    bn_detection.register_datasets(cfg)
    (name,) = cfg.DATASETS.TEST
    records = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    classes = metadata.thing_classes
    numbers = metadata.thing_dataset_id_to_contiguous_id
    found = {column: detections(args.study, column, args.seed) for column in args.columns}
    columns = ["ground truth", *found]
    figure, axes = plt.subplots(
        len(args.images),
        len(columns),
        figsize=(2.2 * len(columns), 1.75 * len(args.images)),
        squeeze=False,
        layout="constrained",
    )
    for row, number in zip(axes, args.images, strict=True):
        record = records[number]
        pixels = read_image(record["file_name"], "RGB")
        for axis, column in zip(row, columns, strict=True):
            boxes = [(o["bbox"], COLORS[o["category_id"]]) for o in record["annotations"]]
            if column in found:
                boxes = [
                    (o["bbox"], COLORS[numbers[o["category_id"]]])
                    for o in found[column]
                    if o["image_id"] == record["image_id"] and o["score"] >= args.threshold
                ]
            axis.imshow(draw(pixels, boxes))
            axis.set_axis_off()
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column.replace("/", ",\n"), fontsize=10)
    figure.legend(
        handles=[plt.Line2D([], [], color=color) for color in COLORS[: len(classes)]],
        labels=list(classes),
        loc="outside lower center",
        ncols=len(classes),
    )
    figure.savefig(args.output, dpi=100)
    print(f"Wrote {args.output}: {len(args.images)} images, {len(columns)} columns.")


if __name__ == "__main__":
    main(parser().parse_args())
