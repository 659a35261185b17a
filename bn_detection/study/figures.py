"""The figures of a study; each is there only where its data are."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..page import COLORS, MARKERS, new_figure
from ..population import read_trace
from ..population.trace import FILE_NAME as TRACE
from .estimates import Estimate, estimate
from .results import BOX_AP, LEAKAGES, StudyResults
from .trace_figure import draw_panel

MOST_ROWS = 30
"""Runs or evaluations that a figure with a row each shows."""
_MOST_CURVES = len(COLORS)
_MOST_PANELS = 4
_MOST_LETTERS = 48
_EPS = 1e-5


class Drawn(NamedTuple):
    """A figure of the report.

    Attributes:
        name: stem of its files.
        figure: of matplotlib.
        alt: what it shows, with the numbers.
        caption: for all readers.
    """

    name: str
    figure: Figure
    alt: str
    caption: str


def draw_all(results: StudyResults) -> list[Drawn]:
    """Draw what a study has data for.

    Args:
        results: of the study.

    Returns:
        The figures, in the order of the report.
    """
    makers = (_over_x_axis, _ap_by_inference, _leak_by_run, _training_curves)
    makers += (_ema_against_population, _traces, _levels)
    return [drawn for maker in makers if (drawn := maker(results)) is not None]


def in_words(found: Estimate, places: int = 1) -> str:
    """An estimate as text, such as "74.2 ± 2.0" or, over images, "74.2 [72.0, 76.1]"."""
    if not found.is_known:
        return "undefined"
    if found.over == "images" or not found.has_interval:
        return found.text(places)
    # Not -0.0.
    return f"{round(found.value, places) + 0.0:.{places}f} ± {found.half_width:.{places}f}"


def fewer_seeds(results: StudyResults, found: Estimate) -> str:
    """Such as "2 of 3 seeds" where an estimate is over fewer than the study has, else empty."""
    number = len(results.study.seeds)
    return f"{found.number} of {number} seeds" if 0 < found.number < number else ""


def meaning_of_bars(results: StudyResults, over_images: bool = False) -> str:
    """What the error bars of a figure are."""
    number = len(results.study.seeds)
    if number > 1:
        images = " and the images (of one seed over the images)" if over_images else ""
        return f"Bars: 95 % intervals over {number} seeds{images}."
    if over_images:
        return "One seed; bars: 95 % intervals over images."
    return "One seed: no interval."


def _over_x_axis(results: StudyResults) -> Drawn | None:
    """A line an evaluation, over the numbers that name the runs."""
    study = results.study
    names = results.evaluations(BOX_AP)
    if study.x_axis is None or not names:
        return None
    figure, axes = new_figure()
    words = []
    for index, name in enumerate(names):
        points = {run: results.estimate(BOX_AP, run, name) for run in study.runs}
        points = {run: point for run, point in points.items() if point.is_known}
        axes.errorbar(
            [float(run) for run in points],
            [point.value for point in points.values()],
            [point.half_width if point.has_interval else 0 for point in points.values()],
            label=_label(name),
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
        )
        row = "; ".join(f"{run}: {in_words(point)}" for run, point in points.items())
        words.append(f"{name}: {row}.")
    axes.set_xscale("log")
    axes.set_xticks([float(run) for run in study.runs], list(study.runs))
    axes.minorticks_off()
    axes.set_xlabel(_label(study.x_axis, 80))
    axes.set_ylabel("box AP (%)")
    _legend_above(figure, axes)
    alt = f"Box AP over {study.x_axis}. {' '.join(words)}"
    caption = f"Box AP over {study.x_axis}. {meaning_of_bars(results)}"
    return Drawn("over_x_axis", figure, alt, caption)


def _ap_by_inference(results: StudyResults) -> Drawn | None:
    """A row a run and a mark an evaluation, or the other way round if there are fewer runs."""
    runs, names = list(results.study.runs), results.evaluations(BOX_AP)
    if not names or results.study.x_axis is not None:
        return None
    by_run = len(names) <= len(runs)
    rows, marks = (runs, names) if by_run else (names, runs)
    places = {
        row: {
            mark: results.estimate(BOX_AP, *((row, mark) if by_run else (mark, row)))
            for mark in marks[:_MOST_CURVES]
        }
        for row in rows[:MOST_ROWS]
    }
    figure, axes = _row_figure(len(places))
    _dots(axes, places)
    axes.set_xlabel("box AP (%)")
    if len(marks) > 1:
        _legend_above(figure, axes)
    alt = f"Box AP by {'run and evaluation' if by_run else 'evaluation and run'}. "
    caption = f"Box AP by what inference normalizes with. {meaning_of_bars(results)}"
    caption += _left_out(rows, MOST_ROWS, "rows") + _left_out(marks, _MOST_CURVES, "marks")
    return Drawn("ap_by_inference", figure, alt + _rows_in_words(places), caption)


def _leak_by_run(results: StudyResults) -> Drawn | None:
    """Leakage and inconsistency of the probe, in accuracy and in box AP."""
    metrics = [metric for metric in LEAKAGES if results.evaluations(metric)]
    if not metrics:
        return None
    evaluations = list(dict.fromkeys(e for m in metrics for e in results.evaluations(m)))
    quantities = list(dict.fromkeys(metric.split(" in ")[1] for metric in metrics))
    measured = [
        (f"{run}, {name}" if len(evaluations) > 1 else run, run, name)
        for run in results.study.runs
        for name in evaluations
        if any(results.by_seed(metric, run, name) for metric in metrics)
    ]
    figure, panels = _row_figure(min(len(measured), MOST_ROWS), panels=len(quantities))
    words = []
    for panel, quantity in zip(np.atleast_1d(panels), quantities, strict=True):
        places = {
            title: {
                kind: results.estimate(f"{kind} in {quantity}", run, name)
                for kind in ("leakage", "inconsistency")
            }
            for title, run, name in measured[:MOST_ROWS]
        }
        _dots(panel, places)
        panel.axvline(0, color="black", linewidth=1)
        panel.set_xlabel(f"{quantity} (points)")
        words.append(f"In {quantity}: {_rows_in_words(places)}")
    _legend_above(figure, np.atleast_1d(panels)[0])
    caption = (
        "Leakage (own worker's batch minus RoIs shuffled over images) and inconsistency (own "
        "worker's batch minus population statistics), by the probe. "
        f"{meaning_of_bars(results, over_images=True)}{_left_out(measured, MOST_ROWS, 'rows')}"
    )
    return Drawn("leak_by_run", figure, "Leakage and inconsistency. " + " ".join(words), caption)


def _training_curves(results: StudyResults) -> Drawn | None:
    """Loss, and accuracy on foreground RoIs where it was recorded: a line a run."""
    scalars = {
        "total_loss": "training loss",
        "fast_rcnn/fg_cls_accuracy": "foreground accuracy",
        "leakage/accuracy": "leakage, points of accuracy",
    }
    curves: dict[str, dict[str, list[dict[int, float]]]] = {}
    for (run, _), training in results.trainings.items():
        for scalar in scalars:
            if len(training.curves.get(scalar, {})) > 1:
                by_run = curves.setdefault(scalar, {})
                by_run.setdefault(run, []).append(training.curves[scalar])
    if not curves:
        return None
    runs = [run for run in results.study.runs if any(run in of for of in curves.values())]
    figure, panels = new_figure(max(6.4, 4.3 * len(curves)), 3.8, ncols=len(curves))
    words = []
    for panel, scalar in zip(np.atleast_1d(panels), curves, strict=True):
        ends = []
        for run, color in zip(runs, COLORS, strict=False):
            seeds = curves[scalar].get(run, [])
            if not seeds:
                continue
            common = sorted(set.intersection(*({*curve} for curve in seeds)))
            for curve in seeds if len(seeds) > 1 else ():
                panel.plot(list(curve), list(curve.values()), color=color, linewidth=0.5, alpha=0.4)
            mean = [float(np.mean([curve[i] for curve in seeds])) for i in common]
            panel.plot(common, mean, color=color, linewidth=1.6, label=_label(run))
            if mean:
                ends.append(f"{run}: {mean[-1]:.3g} at iteration {common[-1]}")
        panel.set_xlabel("iteration")
        panel.set_ylabel(scalars[scalar])
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]) if scalar.startswith("leak") else 0)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        words.append(f"{scalars[scalar].capitalize()}: {'; '.join(ends)}.")
    _legend_above(figure, np.atleast_1d(panels)[0])
    caption = "Training loss" + (" and accuracy on foreground RoIs" if len(curves) > 1 else "")
    caption += " over the iterations: medians of 20 iterations, as Detectron2 writes them."
    caption += " Thick lines are means over seeds." if len(results.study.seeds) > 1 else ""
    caption += _left_out(runs, _MOST_CURVES, "runs")
    return Drawn("training_curves", figure, "Training curves. " + " ".join(words), caption)


def _ema_against_population(results: StudyResults) -> Drawn | None:
    """How far recomputed statistics are from those of the checkpoint, by run and recalibration."""
    names = [name for name, e in results.study.evaluations.items() if e.recalibrate is not None]
    places: dict[str, dict[str, Estimate]] = defaultdict(dict)
    for run in results.study.runs:
        for name in names:
            distances = [
                distance
                for seed in results.study.seeds
                if (training := results.trainings.get((run, seed)))
                and (distance := _recalibration_distance(training.folder, name)) is not None
            ]
            if distances:
                places[run][name] = estimate(distances)
    if not places:
        return None
    shown = {
        run: dict(list(of.items())[:_MOST_CURVES]) for run, of in list(places.items())[:MOST_ROWS]
    }
    figure, axes = _row_figure(len(shown))
    _dots(axes, shown)
    axes.set_xlim(left=0)
    axes.set_xlabel("distance of the means, in standard deviations")
    _legend_above(figure, axes)
    alt = "Distance between the EMA and recomputed population statistics. "
    caption = (
        "EMA against population: root mean square, over layers and channels, of the change of the "
        "mean when the statistics are recomputed, in standard deviations of the checkpoint's. "
        + meaning_of_bars(results)
        + _left_out(list(places), MOST_ROWS, "rows")
        + _left_out(names, _MOST_CURVES, "recalibrations")
    )
    words = _rows_in_words(shown, 2)
    return Drawn("ema_against_population", figure, alt + words, caption)


def _recalibration_distance(folder: Path, evaluation: str) -> float | None:
    path = folder / "evaluations" / evaluation / "recalibrated.json"
    if not path.is_file():
        return None
    layers = json.loads(path.read_text())["layers"].values()
    # A layer that saw fewer than two values has none.
    changes = [layer.get("change_of_mean") for layer in layers]
    squares = [change**2 for change in changes if change is not None]
    return float(np.sqrt(np.mean(squares))) if squares else None


def _traces(results: StudyResults) -> Drawn | None:
    """Mini-batch, EMA and population statistics of one channel of the last layer, over training."""
    traced: dict[str, tuple[str, int, list[dict[str, Any]]]] = {}
    for (run, _), training in results.trainings.items():
        path = training.folder / TRACE
        if run not in traced and path.is_file() and (records := read_trace(path)):
            layer, channel = records[-1]["layer"], records[-1]["channel"]
            own = [r for r in records if (r["layer"], r["channel"]) == (layer, channel)]
            traced[run] = (layer, channel, own)
    if not traced:
        return None
    shown = dict(list(traced.items())[:_MOST_PANELS])
    figure, panels = new_figure(
        7.4, 2.1 * len(shown) + 0.5, nrows=len(shown), ncols=2, squeeze=False, sharex=True
    )
    words = []
    for row, (run, (layer, channel, records)) in zip(panels, shown.items(), strict=True):
        for panel, moment in zip(row, ("mean", "var"), strict=True):
            draw_panel(panel, records, moment)
        title = textwrap.fill(f"{run}: mean, channel {channel} of {layer}", 56)
        row[0].set_title(_label(title, 112), size=8, loc="left")
        row[1].set_title("variance", size=8, loc="left")
        last = {key: value for record in records for key, value in record.items()}
        ends = [
            f"{kind} {last[key]:.3g}"
            for kind, key in (
                *(("mini-batch", "batch_mean"), ("EMA", "ema_mean")),
                ("population", "population_mean"),
            )
            if last.get(key) is not None
        ]
        words.append(f"{run}, channel {channel} of {layer}, last means: {', '.join(ends)}.")
    for panel in panels[-1]:
        panel.set_xlabel("iteration")
    _legend_above(figure, panels[0][0])
    caption = (
        "Mini-batch, EMA and population statistics of one channel over training (BN.TRACE), one "
        f"seed a run.{_left_out(list(traced), _MOST_PANELS, 'runs')}"
    )
    return Drawn("traces", figure, "Statistics over training. " + " ".join(words), caption)


def _levels(results: StudyResults) -> Drawn | None:
    """How far the population statistics of each FPN level are from those of the first."""
    found = dict(_with_levels(results))
    if not found:
        return None
    shown = dict(list(found.items())[:_MOST_PANELS])
    figure, panels = new_figure(
        max(3.2 * len(shown), 6.4), 3.6, ncols=len(shown), squeeze=False, sharey=True
    )
    words = []
    for panel, (title, layers) in zip(panels[0], shown.items(), strict=True):
        for index, (layer, distances) in enumerate(layers.items()):
            panel.plot(
                range(len(distances)),
                distances,
                label=_label(layer),
                color=COLORS[index % len(COLORS)],
                marker=MARKERS[index % len(MARKERS)],
            )
            numbers = ", ".join(f"{distance:.2f}" for distance in distances)
            words.append(f"{title}, {layer}: {numbers}.")
        panel.set_xticks(range(max(map(len, layers.values()))))
        panel.set_xlabel("level")
        panel.set_title(_label(textwrap.fill(title, 34), 100), size=8, loc="left")
    panels[0][0].set_ylabel("distance of the means\n(standard deviations)")
    _legend_above(figure, panels[0][0])
    caption = (
        "Level statistics: root mean square over channels of the difference between the mean of a "
        "level and that of the first one, in standard deviations of the first level's. One seed a "
        f"run.{_left_out(list(found), _MOST_PANELS, 'checkpoints')}"
    )
    alt = "Distance of each level's mean from the first level's, level by level. "
    return Drawn("levels", figure, alt + " ".join(words), caption)


def _with_levels(results: StudyResults) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Of the first seed, checkpoints with a population a level: by layer, its distances."""
    seen = set()
    for (run, _), training in results.trainings.items():
        if run in seen:
            continue
        seen.add(run)
        recalibrated = sorted(training.folder.glob("evaluations/*/recalibrated.pth"))
        for path in (training.folder / "model_final.pth", *recalibrated):
            if path.is_file() and (layers := _level_distances(path)):
                yield (run if path.stem == "model_final" else f"{run}, {path.parent.name}"), layers
                break


def _level_distances(path: Path) -> dict[str, list[float]]:
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    state = state.get("model", state)
    means = {name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")}
    layers = {}
    for first in sorted(name for name in means if name.endswith(".0")):
        layer = first.removesuffix(".0")
        levels = [first]
        while f"{layer}.{len(levels)}" in means:
            levels.append(f"{layer}.{len(levels)}")
        if len(levels) > 1:
            std = (state[f"{first}.running_var"].double() + _EPS).sqrt()
            shifts = [
                (state[f"{level}.running_mean"] - state[f"{first}.running_mean"]) / std
                for level in levels
            ]
            layers[layer] = [float(shift.square().mean().sqrt()) for shift in shifts]
    return layers


def _row_figure(rows: int, panels: int = 1) -> tuple[Figure, Any]:
    """Panels side by side, with a height for so many rows."""
    width = 7.2 if panels == 1 else 8.6
    return new_figure(width, 1.3 + 0.34 * max(rows, 2), ncols=panels, sharey=panels > 1)


def _dots(axes: Axes, places: dict[str, dict[str, Estimate]]) -> None:
    """A row a key, with a mark and an interval for each of its estimates."""
    marks = list(dict.fromkeys(mark for row in places.values() for mark in row))
    for index, mark in enumerate(marks):
        offset = (index - (len(marks) - 1) / 2) * min(0.16, 0.7 / len(marks))
        points = [
            (found, row + offset)
            for row, of in enumerate(places.values())
            if (found := of.get(mark)) is not None and found.is_known
        ]
        means = np.array([found.value for found, _ in points])
        ends = np.array(
            [(f.low, f.high) if f.has_interval else (f.value, f.value) for f, _ in points]
        ).reshape(-1, 2)
        axes.errorbar(
            means,
            [y for _, y in points],
            xerr=np.abs(ends.T - means),
            label=_label(mark),
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5.5,
            linestyle="none",
            capsize=2.5,
        )
    axes.set_yticks(range(len(places)), map(_label, places))
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _label(text: str, letters: int = _MOST_LETTERS) -> str:
    """A text as matplotlib shows it: short, not as mathematics, and not left out of a legend."""
    if len(text) > letters:
        text = f"{text[: letters // 2]}\N{HORIZONTAL ELLIPSIS}{text[-(letters // 2) :]}"
    return f"{' ' if text.startswith('_') else ''}{text}".replace("$", r"\$")


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # In inches: a letter is about 1/12, the line or mark beside a label half of one.
    fitting = int(figure.get_figwidth() / (max(map(len, labels)) / 12 + 0.6))
    columns = min(max(fitting, 1), len(labels))
    figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=columns)


def _rows_in_words(rows: dict[str, dict[str, Estimate]], places: int = 1) -> str:
    sentences = []
    for row, of in rows.items():
        parts = [f"{mark} {in_words(found, places)}" for mark, found in of.items() if found.number]
        sentences.append(f"{row}: {', '.join(parts)}.")
    return " ".join(sentences)


def _left_out(items: Sequence[Any], most: int, noun: str) -> str:
    return f" The first {most} of {len(items):,} {noun} are shown." if len(items) > most else ""
