"""The leak in one table and one figure: BN and ShuffleBN on LeakyShapes, two ways of inference."""

from __future__ import annotations

import json
import time
from pathlib import Path

import matplotlib
from tabulate import tabulate

from ..command_line import command_line
from ..data import LeakyShapesConfig, draw_image
from ..shipped import SHIPPED
from .executors import LocalExecutor
from .matrix import Task
from .results import read_curves
from .scheduler import execute

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_QUICKSTART = SHIPPED / "quickstart"
VARIANTS = {
    "BN": _QUICKSTART / "mask_rcnn_bn.yaml",
    "ShuffleBN": _QUICKSTART / "mask_rcnn_shuffle.yaml",
}
MEANING = {
    ("BN", "population"): "In training the head had learned to read the other objects of the image "
    "from the mean and variance of the batch. The running statistics do not show them.",
    (
        "BN",
        "batch",
    ): "Inference normalizes the RoIs of the image together, as training did: what it "
    "had learned to read is back. The AP it gains by that is leakage.",
    ("ShuffleBN", "population"): "In training each RoI was normalized with random RoIs of both "
    "workers, which say less about its image: the head learned the object itself.",
    ("ShuffleBN", "batch"): "The statistics of one image are not those of the mixed batches that "
    "it was trained with: nothing is gained.",
}

# After 1200 steps some seeds are in the middle of learning the object itself.
LENGTH = ["SOLVER.MAX_ITER", "1600", "SOLVER.STEPS", "(1270,)"]
LIVE = ["BN.LEAKAGE.PERIOD", "200"]

AveragePrecisions = dict[str, dict[str, dict[str, float]]]


def run_demo(folder: Path, *, workers: int = 2, overrides: list[str] | None = None) -> Path:
    """Train and evaluate BN and ShuffleBN, print the table, write the figures and the results.

    What is already finished in ``folder`` is not done again, and an interrupted training goes on.

    Args:
        folder: for everything that is made, except the dataset.
        workers: CPU workers.
        overrides: ``KEY VALUE`` pairs for both configs.

    Returns:
        The path of ``results.json``: box and mask AP, in percent, by variant and statistics.

    Raises:
        RuntimeError: a training or an evaluation failed; the end of its output has been printed.
    """
    start = time.monotonic()
    tasks: list[Task] = []
    results_of: dict[tuple[str, str], Path] = {}
    for name, config in VARIANTS.items():
        output = folder.absolute() / name
        command = command_line("train", "--config-file", config, "--num-gpus", workers)
        options = ["OUTPUT_DIR", str(output), *LENGTH, *LIVE, *(overrides or [])]
        training = Task(
            f"{name}: training",
            "training",
            [*command, "--resume", *options],
            output / "training.json",
        )
        by_batch = output / "eval_model_final_batch"
        options += ["MODEL.WEIGHTS", str(output / "model_final.pth"), "BN.INFERENCE", "batch"]
        evaluation = Task(
            f"{name}: evaluation with batch statistics",
            "evaluation",
            [*command, "--eval-only", *options],
            output / "evaluation.json",
            training,
            (by_batch,),
        )
        tasks += [training, evaluation]
        results_of[name, "population"] = output / "inference" / "results.json"
        results_of[name, "batch"] = by_batch / "results.json"
    if failed := execute(tasks, LocalExecutor()):
        raise RuntimeError(f"{len(failed)} of {len(tasks)} steps are not done; see {failed[0].log}")
    precisions: AveragePrecisions = {name: {} for name in VARIANTS}
    for (name, statistics), path in results_of.items():
        precisions[name][statistics] = _read_ap(path)
    results = folder / "results.json"
    results.write_text(json.dumps({"AP": precisions}, indent=2) + "\n")
    _draw(precisions, folder / "leak.png")
    curves = {name: _leak_over_training(folder / name) for name in VARIANTS}
    _draw_curves(curves, folder / "leak_over_training.png")
    _print_table(precisions)
    figures = " ".join(str(folder / name) for name in ("leak.png", "leak_over_training.png"))
    print(f"\nFigures: {figures}   Numbers: {results}")
    print(f"Done in {time.monotonic() - start:.0f} s. To do it again, remove {folder}.")
    return results


def _read_ap(path: Path) -> dict[str, float]:
    results = json.loads(path.read_text())["results"]
    return {"box": results["bbox"]["AP"], "mask": results["segm"]["AP"]}


def _leak_over_training(folder: Path) -> dict[int, float]:
    return read_curves(folder / "metrics.json").get("leakage/accuracy", {})


def _print_table(precisions: AveragePrecisions) -> None:
    rows = []
    for (variant, statistics), meaning in MEANING.items():
        ap = precisions[variant][statistics]
        rows.append((variant, statistics, ap["box"], ap["mask"], meaning))
    headers = ("box and mask head", "inference with", "box AP", "mask AP", "what it means")
    print()
    print(
        tabulate(
            rows,
            headers,
            tablefmt="simple_grid",
            floatfmt=".1f",
            maxcolwidths=[None, None, None, None, 60],
        )
    )


def _draw(precisions: AveragePrecisions, path: Path) -> None:
    """Two images of the dataset, and bars of box AP by variant and statistics."""
    figure, axes = plt.subplot_mosaic(
        [["dark", "AP"], ["bright", "AP"]],
        figsize=(9, 4.4),
        width_ratios=[1, 2.6],
        layout="constrained",
    )
    dataset = LeakyShapesConfig()
    images = sorted((draw_image(dataset, 0, "val", k) for k in range(20)), key=lambda i: i.cast)
    # Not the extremes, which are clipped to black and white.
    for name, image in (("dark", images[4]), ("bright", images[-4])):
        axes[name].imshow(image.pixels, cmap="gray", vmin=0, vmax=255)
        axes[name].set_axis_off()
        for thing in image.objects:
            x, y, width, height = thing.box
            axes[name].text(
                x + width / 2,
                y + height / 2,
                thing.label,
                color="white",
                size=8,
                ha="center",
                va="center",
                bbox={"boxstyle": "circle,pad=0.2", "color": "black", "alpha": 0.6},
            )
    title = (
        "Two images with their classes:\na higher class is brighter than\nthe others of its image"
    )
    axes["dark"].set_title(title, size=9)

    colors = {"population": "#4477aa", "batch": "#ee6677"}
    for offset, (statistics, color) in zip((-0.2, 0.2), colors.items(), strict=True):
        heights = [precisions[variant][statistics]["box"] for variant in VARIANTS]
        places = [k + offset for k in range(len(VARIANTS))]
        bars = axes["AP"].bar(places, heights, 0.38, color=color, label=f"{statistics} statistics")
        axes["AP"].bar_label(bars, fmt="%.1f", padding=2)
    names = ["BN, each worker\nits own images", "BN, RoIs shuffled\nacross workers"]
    axes["AP"].set_xticks(range(len(VARIANTS)), names)
    axes["AP"].set_ylabel("box AP on held-out images")
    axes["AP"].set_ylim(0, 100)
    axes["AP"].set_title("BN reads the other RoIs of its batch, and misses them at inference")
    axes["AP"].spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes["AP"].get_legend_handles_labels(),
        title="inference normalizes with",
        loc="outside lower right",
        frameon=False,
        ncols=2,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_curves(curves: dict[str, dict[int, float]], path: Path) -> None:
    """The leak over the iterations, a line a variant."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.axhline(0, color="black", linewidth=1)
    for (name, curve), color in zip(curves.items(), ("#ee6677", "#4477aa"), strict=True):
        axes.plot([i + 1 for i in curve], list(curve.values()), "o-", color=color, label=name)
    axes.set_xlabel("iterations of training")
    axes.set_ylabel("leakage, points of accuracy")
    axes.set_title("BN learns to read the other RoIs of its batch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
