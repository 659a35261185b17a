"""What came out of a study: every number of it, by metric, run, evaluation and seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..metrics import EVALUATION, PROBE, Metric
from .estimates import Estimate, estimate, minus, paired_difference, with_images
from .matrix import Cell
from .study_file import Study

PHASES = {"first half of training": (0.0, 0.5), "last fifth of training": (0.8, 1.0)}
"""What stands for the evaluation where a number is of the training itself: a part of it."""

BOX_AP, MASK_AP, KEYPOINT_AP = (metric.short for metric in EVALUATION.values())
TRAINING_ACCURACY = "training accuracy"
# Of the probe on detections, as that on RoIs names them.
_MODES = {"image": "own image", "worker": "own worker", "shuffle": "shuffled"}
LEAKAGES = tuple(
    f"{kind} in {name}" for name in ("accuracy", BOX_AP) for kind in ("leakage", "inconsistency")
)
HEADLINES = (BOX_AP, MASK_AP, KEYPOINT_AP, TRAINING_ACCURACY, *LEAKAGES)
"""The metrics that have a table each, where there is a number of them."""


@dataclass(frozen=True)
class Training:
    """A training that has left something in its folder.

    Attributes:
        folder: its OUTPUT_DIR.
        versions: of the installed packages.
        device: the model of the CPU or GPU; None where it is not recorded.
        seconds: of all its attempts; None where it did not succeed.
        curves: by scalar, value by iteration from 0.
    """

    folder: Path
    versions: dict[str, str]
    device: str | None
    seconds: float | None
    curves: dict[str, dict[int, float]]

    def read_config(self) -> dict[str, Any]:
        """The whole config; empty where it is not recorded."""
        path = self.folder / "config.yaml"
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(path.read_text(), loader) if path.is_file() else {}

    def accuracy(self, start: float, end: float) -> float | None:
        """Mean accuracy on foreground RoIs in a part of the iterations, in percent."""
        curve = self.curves.get("fast_rcnn/fg_cls_accuracy", {})
        number = max(curve, default=0) + 1
        part = [value for k, value in curve.items() if start * number <= k < end * number]
        return 100 * sum(part) / len(part) if part else None


@dataclass(frozen=True)
class StudyResults:
    """The numbers of a study.

    Attributes:
        study: the study.
        values: by metric, by run and evaluation, by seed.
        metrics: what each evaluation wrote, by run, evaluation and seed.
        trainings: by run and seed.
        seconds: of each evaluation that has a task of its own, with its recalibration.
    """

    study: Study
    values: dict[str, dict[tuple[str, str], dict[int, Estimate]]] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[int, Any]]] = field(default_factory=dict)
    trainings: dict[tuple[str, int], Training] = field(default_factory=dict)
    seconds: dict[Cell, float] = field(default_factory=dict)

    def add(self, metric: str, cell: Cell, measured: Estimate) -> None:
        """Keep a number."""
        place = self.values.setdefault(metric, {}).setdefault((cell.run, cell.evaluation), {})
        place[cell.seed] = measured

    def evaluations(self, metric: str) -> list[str]:
        """The evaluations that have numbers of a metric, in the order of the study."""
        found = {evaluation for _, evaluation in self.values.get(metric, {})}
        return [name for name in (*self.study.evaluations, *PHASES) if name in found]

    def by_seed(self, metric: str, run: str, evaluation: str) -> dict[int, float | None]:
        """The values of one run under one evaluation; empty where there is none."""
        place = self.values.get(metric, {}).get((run, evaluation), {})
        return {seed: place[seed].to_json()["value"] for seed in sorted(place)}

    def estimate(self, metric: str, run: str, evaluation: str) -> Estimate:
        """Mean and interval over the seeds, and over the images where the probe has measured that.

        Of one seed, the interval is over the images alone, if it is known.
        """
        place = self.values.get(metric, {}).get((run, evaluation), {})
        known = [measured for measured in place.values() if measured.is_known]
        if len(known) == 1 and known[0].has_interval:
            return known[0]
        return with_images(estimate([*self.by_seed(metric, run, evaluation).values()]), known)

    def difference(self, metric: str, run: str, evaluation: str) -> Estimate:
        """Difference to the baseline run under the same evaluation, paired over the seeds.

        The images of both are the same, and their errors are taken for independent: images that
        are easy for both make the interval too wide.
        """
        found = paired_difference(
            self.by_seed(metric, run, evaluation),
            self.by_seed(metric, self.study.baseline, evaluation),
        )
        own, reference = (
            self.values.get(metric, {}).get((name, evaluation), {})
            for name in (run, self.study.baseline)
        )
        if own is reference:
            return found
        common = [seed for seed in own if seed in reference]
        return with_images(found, [minus(own[seed], reference[seed]) for seed in common])


def collect_results(study: Study, results: Mapping[Cell, Path], folder: Path) -> StudyResults:
    """Read all that a study has made.

    Args:
        study: the study.
        results: by cell that is done, its ``results.json``, or ``probe.json`` of a probe.
        folder: of the study, with the trainings.

    Returns:
        The numbers; percent, points (differences of percents), or the unit of a loss.
    """
    collected = StudyResults(study)
    for cell, path in results.items():
        content = json.loads(path.read_text())
        if study.evaluations[cell.evaluation].probe is None:
            content = content["results"]
            for task, metric in EVALUATION.items():
                if task in content:
                    found = Estimate.from_json({"value": content[task]["AP"]})
                    collected.add(metric.short, cell, found)
        else:
            _add_probe(collected, cell, content)
        by_run = collected.metrics.setdefault(cell.run, {})
        by_run.setdefault(cell.evaluation, {})[cell.seed] = content
        place = folder / cell.run / f"seed_{cell.seed}" / "evaluations" / cell.evaluation
        records = [_read_json(place / f"{name}.json") for name in ("recalibration", "evaluation")]
        if any(records):
            collected.seconds[cell] = sum(record.get("seconds", 0.0) for record in records)
    for run in study.runs:
        for seed in study.seeds:
            place = folder / run / f"seed_{seed}"
            if place.is_dir():
                training = _read_training(place)
                collected.trainings[run, seed] = training
                for phase, part in PHASES.items():
                    accuracy = training.accuracy(*part)
                    # A training that has not come to its end has other halves.
                    if training.seconds is not None and accuracy is not None:
                        cell = Cell(run, phase, seed)
                        collected.add(TRAINING_ACCURACY, cell, Estimate(accuracy))
    return collected


def unit(name: str) -> str:
    """The unit of a metric of a study."""
    metric = _metric(name)
    is_difference = name.startswith(("leakage", "inconsistency")) or name.endswith("limit")
    return metric.of_difference if is_difference else metric.unit


def decimals(name: str) -> int:
    """The decimals that a metric of a study is shown with."""
    return _metric(name).decimals


def _metric(name: str) -> Metric:
    """What is measured, such as accuracy of "leakage in accuracy" and of "accuracy, shuffled"."""
    what = name.rpartition(" in ")[2].partition(",")[0].removesuffix(" above the limit")
    known = [m for m in (*PROBE.values(), *EVALUATION.values()) if what.endswith(m.short)]
    return max(known, key=lambda metric: len(metric.short))


def _add_probe(collected: StudyResults, cell: Cell, content: dict[str, Any]) -> None:
    modes = {_MODES.get(mode, mode.replace("_", " ")): of for mode, of in content["modes"].items()}
    named = {f"{{}}, {mode}": of for mode, of in modes.items()}
    named |= {f"{kind} in {{}}": content[kind] for kind in ("leakage", "inconsistency")}
    for name, numbers in named.items():
        for key, number in numbers.items():
            collected.add(name.format(PROBE[key].short), cell, Estimate.from_json(number))
    limit = content.get("limit")
    # Nothing is above a limit of 100 %.
    if limit is not None and (limit["limit"] or 100) < 100:
        collected.add("accuracy above the limit", cell, Estimate.from_json(limit["above"]))


def _read_training(folder: Path) -> Training:
    versions = _read_json(folder / "versions.json")
    return Training(
        folder,
        versions=versions.get("versions", {}),
        device=versions.get("device"),
        seconds=_read_json(folder / "training.json").get("seconds"),
        curves=read_curves(folder / "metrics.json"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file; empty where there is none, or where a kill cut it short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Detectron2's scalars; what ran again after an interruption replaces what it had written.

    Args:
        path: ``metrics.json`` of a training.

    Returns:
        By name and iteration, from 0.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        for name, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value) and name != "iteration":
                curves.setdefault(name, {})[record["iteration"]] = float(value)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}
