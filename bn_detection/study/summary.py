"""What came out of a study: a table, a figure, and every number in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tabulate import tabulate

from .folder import write_json
from .matrix import Cell
from .study_file import Study

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
_MARKERS = "osD^vP"

Summaries = dict[tuple[str, str], dict[str, Any]]


def summarize(study: Study, results: Mapping[Cell, Path], folder: Path) -> Path:
    """Print the table of a study, and write its numbers, and its figure if it has one.

    Args:
        study: the study.
        results: the ``results.json`` of each cell that is done.
        folder: of the study.

    Returns:
        The path of ``results.json``: box AP in percent, by run and evaluation, with each seed's;
        all metrics; and the versions that the trainings ran with.
    """
    metrics: dict[str, dict[str, dict[int, Any]]] = {}
    versions = []
    for cell, path in results.items():
        content = json.loads(path.read_text())["results"]
        metrics.setdefault(cell.run, {}).setdefault(cell.evaluation, {})[cell.seed] = content
        of_training = folder / cell.run / f"seed_{cell.seed}" / "versions.json"
        found = json.loads(of_training.read_text())["versions"]
        versions += [] if found in versions else [found]
    summaries = {
        (run, name): _summary({seed: content["bbox"]["AP"] for seed, content in by_seed.items()})
        for run, evaluations in metrics.items()
        for name, by_seed in evaluations.items()
    }
    _print_table(study, summaries)
    if study.x_axis is not None:
        _draw(study, summaries, folder / study.name)
    path = folder / "results.json"
    content = {"study": study.name, "about": study.about, "seeds": study.seeds}
    content["versions"] = versions
    content["box AP"] = [
        {"run": run, "evaluation": name, **summary} for (run, name), summary in summaries.items()
    ]
    content["metrics by run, evaluation and seed"] = metrics
    write_json(path, content)
    return path


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of some values, and half the width of its 95 % interval of Student's t.

    Args:
        values: at least one.

    Returns:
        The mean; the half width, or None for one value.
    """
    number, mean = len(values), float(np.mean(values))
    if number == 1:
        return mean, None
    error = float(np.std(values, ddof=1)) / math.sqrt(number)
    return mean, _t_quantile(number - 1) * error


def _t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t, by integrating its density."""
    t = np.linspace(0, 13, 130_001)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    gammas = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density *= math.exp(gammas) / math.sqrt(math.pi * degrees)
    areas = np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))
    return float(np.interp(0.475, areas, t[1:]))


def _summary(by_seed: dict[int, float]) -> dict[str, Any]:
    mean, half_width = mean_and_half_width(list(by_seed.values()))
    return {"mean": mean, "half_width_95": half_width, "by_seed": by_seed}


def _print_table(study: Study, summaries: Summaries) -> None:
    """Runs by evaluations, the longer of the two downwards."""

    def entry(run: str, name: str) -> str:
        if run not in study.evaluations[name].runs:
            return ""
        if (run, name) not in summaries:
            return "failed"
        mean, width, by_seed = summaries[run, name].values()
        text = f"{mean:.1f}" if width is None else f"{mean:.1f} ± {width:.1f}"
        return text if len(by_seed) == len(study.seeds) else f"{text} ({len(by_seed)} seeds)"

    rows = [[run, *(entry(run, name) for name in study.evaluations)] for run in study.runs]
    rows.insert(0, ["", *study.evaluations])
    if len(study.evaluations) > len(study.runs):
        rows = list(zip(*rows, strict=True))
    number = len(study.seeds)
    meaning = "one seed" if number == 1 else f"{number} seeds: mean ± half of the 95 % interval"
    print(f"\nBox AP, {meaning}\n")
    print(tabulate(rows, "firstrow", tablefmt="simple", disable_numparse=True))


def _draw(study: Study, summaries: Summaries, path: Path) -> None:
    """A line an evaluation, over the numbers that name the runs."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for index, name in enumerate(study.evaluations):
        points = {
            float(run): summaries[run, name] for run in study.runs if (run, name) in summaries
        }
        axes.errorbar(
            list(points),
            [point["mean"] for point in points.values()],
            [point["half_width_95"] or 0 for point in points.values()],
            label=name,
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            capsize=3,
        )
    axes.set_xscale("log")
    axes.set_xticks([float(run) for run in study.runs], list(study.runs))
    axes.minorticks_off()
    axes.set_xlabel(study.x_axis)
    axes.set_ylabel("box AP")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd")
    figure.legend(loc="outside upper left", frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(f"{path}.{suffix}", dpi=150)
    plt.close(figure)
    print(f"\nFigure: {path}.png and .svg")
