"""Generated outputs of a study, as its tools leave them, for the tests of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bn_detection.study.matrix import Cell
from bn_detection.study.study_file import Study, read_study

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "mask_rcnn_bn.yaml"
MODES = ("own_image", "own_worker", "shuffled", "population")


def make_study(
    folder: Path, runs: list[str], seeds: list[int], *, probe: bool = False, head: str = ""
) -> Study:
    """A study of runs with evaluations "population", "batch" (of the first run) and "leak"."""
    lines = ["about: What the normalization batch is made of.", f"seeds: {seeds}", head, "runs:"]
    lines += [f"  {json.dumps(run)}: {{config: {CONFIG}}}" for run in runs]
    lines += ["evaluations:", "  population:"]
    lines += ["  batch:", f"    runs: {json.dumps(runs[:1])}"]
    lines += ["    overrides: {BN.INFERENCE: batch}"]
    lines += ["  leak: {probe: {}}"] if probe else []
    path = folder / "small.yaml"
    path.write_text("\n".join(lines) + "\n")
    return read_study(path)


def write_ap(folder: Path, cell: Cell, **aps: float | None) -> Path:
    """The results.json of a cell, with AP by task."""
    path = folder / cell.run / f"seed_{cell.seed}" / cell.evaluation / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"results": {task: {"AP": ap} for task, ap in aps.items()}}
    path.write_text(json.dumps(content))
    return path


def write_probe(
    folder: Path, cell: Cell, accuracy: Mapping[str, float], limit: float | None = None
) -> Path:
    """The probe.json of a cell, with box AP at 90 % of the accuracy of each mode."""

    def number(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 1, "high": value + 1}

    def numbers(value: float) -> dict[str, dict[str, float]]:
        return {"accuracy": number(value), "loss": number(0.2), "box_ap": number(0.9 * value)}

    content = {
        "modes": {mode: numbers(accuracy[mode]) for mode in MODES},
        "leakage": numbers(accuracy["own_worker"] - accuracy["shuffled"]),
        "inconsistency": numbers(accuracy["own_worker"] - accuracy["population"]),
        "limit": None,
    }
    if limit is not None:
        content["limit"] = {"limit": limit, "above": number(accuracy["own_worker"] - limit)}
    path = folder / cell.run / f"seed_{cell.seed}" / cell.evaluation / "probe.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_training(
    folder: Path, run: str, seed: int, accuracies: list[float], done: bool = True
) -> Path:
    """What a training leaves: scalars every 20 iterations, versions, and its record."""
    place = folder / run / f"seed_{seed}"
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, accuracy in enumerate(accuracies):
        iteration = 20 * index + 19
        loss = 3 / (1 + index) + 0.01 * seed
        record = {"iteration": iteration, "total_loss": loss, "fast_rcnn/fg_cls_accuracy": accuracy}
        lines.append(json.dumps(record))
    (place / "metrics.json").write_text("\n".join(lines) + "\n")
    versions = {"versions": {"python": "3.11", "torch": "2.14"}, "device": "A processor"}
    (place / "versions.json").write_text(json.dumps(versions))
    if done:
        (place / "training.json").write_text('{"command": [], "seconds": 93.5}')
    return place


def write_trace(folder: Path, run: str, seed: int) -> None:
    """A bn_trace.jsonl of one layer and channel."""
    lines = []
    for iteration in range(19, 400, 20):
        record = {"iteration": iteration, "layer": "box_head.norm", "channel": 3}
        values = {"batch_mean": (iteration % 7) / 7, "batch_var": 1.0, "ema_mean": 0.4}
        lines.append(json.dumps(record | values | {"ema_var": 0.9}))
        if iteration % 100 == 99:
            population = {"population_mean": 0.5, "population_var": 0.95}
            lines.append(json.dumps(record | population))
    path = folder / run / f"seed_{seed}" / "bn_trace.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))


def make_results(folder: Path, study: Study) -> dict[Cell, Path]:
    """Every cell of a study: the first run leaks, the others do not."""
    random = np.random.default_rng(0)
    results = {}
    for index, run in enumerate(study.runs):
        base = 74.0 if index == 0 else 87.0 + 0.5 * (index % 7)
        for seed in study.seeds:
            ap = base + float(random.normal(0, 0.8))
            training = np.linspace(0.3, 0.97 if index == 0 else 0.9, 20)
            write_training(folder, run, seed, [float(value) for value in training])
            cell = Cell(run, "population", seed)
            results[cell] = write_ap(folder, cell, bbox=ap, segm=ap - 3)
            if index == 0:
                cell = Cell(run, "batch", seed)
                results[cell] = write_ap(folder, cell, bbox=ap + 10, segm=ap + 6)
            if "leak" in study.evaluations:
                own = ap + (12 if index == 0 else 0.4)
                accuracy = dict(zip(MODES, (own, own, ap, ap - 0.3), strict=True))
                cell = Cell(run, "leak", seed)
                results[cell] = write_probe(folder, cell, accuracy)
    return results
