"""The leak in one table and one figure: BN and ShuffleBN on LeakyShapes, two ways of inference."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
from tabulate import tabulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quickstart"
VARIANTS = {"BN": "mask_rcnn_bn.yaml", "ShuffleBN": "mask_rcnn_shuffle.yaml"}
MEANING = {
    ("BN", "population"): "Each RoI is judged alone, but in training the others of its image could "
    "be read from their common mean and variance, and it relied on them.",
    ("BN", "batch"): "The RoIs of an image are normalized together again: what it had learned to "
    "read is back. The AP gained is leakage.",
    ("ShuffleBN", "population"): "Training mixed the RoIs of both workers' images, so there was "
    "less to read, and it learned from the RoI itself.",
    ("ShuffleBN", "batch"): "The statistics of one image are not those that it was trained with, "
    "and it gains nothing from them.",
}
# What of train_net.py's output is shown while it runs.
PROGRESS = (
    (
        r"eta: (?P<left>\S+) +iter: (?P<done>\d+) .*total_loss: (?P<loss>\S+)",
        "iteration {done}, loss {loss}, time left {left}",
    ),
    (
        r"Inference done (?P<done>\d+)/(?P<all>\d+).*ETA=(?P<left>\S+)",
        "image {done} of {all}, time left {left}",
    ),
)
AveragePrecisions = dict[str, dict[str, dict[str, float]]]


def run_demo(folder: Path, *, workers: int = 2, overrides: list[str] | None = None) -> Path:
    """Train and evaluate BN and ShuffleBN, print the table, write the figure and the results.

    What is already finished in ``folder`` is not done again, and an interrupted training goes on.

    Args:
        folder: for everything that is made, except the dataset.
        workers: CPU workers.
        overrides: ``KEY VALUE`` pairs for both configs.

    Returns:
        The path of ``results.json``: box and mask AP, in percent, by variant and statistics.

    Raises:
        RuntimeError: a training or an evaluation failed; the message has the end of its output.
    """
    start = time.monotonic()
    precisions: AveragePrecisions = {}
    for name, config in VARIANTS.items():
        output = folder / name
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume"]
        command += ["--config-file", str(CONFIGS / config), "--num-gpus", str(workers)]
        options = ["OUTPUT_DIR", str(output), *(overrides or [])]
        trained = output / "inference" / "results.json"
        if not trained.is_file():
            _run(f"{name}: training", [*command, *options], output)
        by_batch = output / "eval_model_final_batch" / "results.json"
        if not by_batch.is_file():
            options = ["--eval-only", *options, "BN.INFERENCE", "batch"]
            _run(f"{name}: evaluation with batch statistics", [*command, *options], output)
        precisions[name] = {"population": _read_ap(trained), "batch": _read_ap(by_batch)}
    results = folder / "results.json"
    results.write_text(json.dumps({"AP": precisions}, indent=2) + "\n")
    _draw(precisions, folder / "leak.png")
    _print_table(precisions)
    print(f"\nFigure: {folder / 'leak.png'}   Numbers: {results}")
    print(f"Done in {time.monotonic() - start:.0f} s. To do it again, remove {folder}.")
    return results


def _run(title: str, command: list[str], output: Path) -> None:
    """Run a command; of its output show progress and time left, and keep all in a file."""
    output.mkdir(parents=True, exist_ok=True)
    log = output / "console.txt"
    print(title, flush=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            for pattern, shown in PROGRESS:
                if match := re.search(pattern, line):
                    print("   ", shown.format(**match.groupdict()), flush=True)
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-30:])
        raise RuntimeError(f"{title} failed ({process.returncode}); the end of {log}:\n{tail}")


def _read_ap(path: Path) -> dict[str, float]:
    results = json.loads(path.read_text())["results"]
    return {"box": results["bbox"]["AP"], "mask": results["segm"]["AP"]}


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
    """Bars of box AP: two variants, each with population and with batch statistics."""
    colors = {"population": "#4477aa", "batch": "#ee6677"}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for offset, (statistics, color) in zip((-0.2, 0.2), colors.items(), strict=True):
        heights = [precisions[variant][statistics]["box"] for variant in VARIANTS]
        places = [k + offset for k in range(len(VARIANTS))]
        bars = axes.bar(places, heights, 0.38, color=color, label=f"{statistics} statistics")
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(range(len(VARIANTS)), ["BN, per worker", "BN, RoIs shuffled\nacross workers"])
    axes.set_ylabel("box AP (LeakyShapes, held-out images)")
    axes.set_ylim(0, 109)
    axes.set_title(
        "BN in the heads reads the other RoIs of its batch,\nand misses them at inference"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="inference normalizes with", frameon=False, ncols=2, loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
