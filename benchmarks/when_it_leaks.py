#!/usr/bin/env python
"""Draw when a head leaks, and whether bn-detection leak-potential foretells it.

python benchmarks/when_it_leaks.py

measures the potential of the datasets of configs/studies/dials.yaml that are not yet in
docs/studies/leak_potential.json, sets it against the leakage in docs/studies/dials.json, and draws
docs/images/when_it_leaks.png and leak_potential.png. This adds a dataset of another study, whose
results are in docs/studies/STUDY.json:

python benchmarks/when_it_leaks.py --add NAME STUDY RUN annotations.json images/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from detectron2.data import MetadataCatalog
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from bn_detection.data import register_builtin
from bn_detection.leakage import measure_leak_potential
from bn_detection.study.study_file import read_study

ROOT = Path(__file__).parents[1]
STUDIES, IMAGES = ROOT / "docs" / "studies", ROOT / "docs" / "images"
POTENTIAL = STUDIES / "leak_potential.json"
# By metric of the study: what it is called, and its colour.
MEASURED = {
    "leakage in accuracy": ("leakage, points of accuracy", "#3f74a3"),
    "inconsistency in box AP": ("AP lost at inference", "#c4533a"),
}
# By dial: the title of its panel, and its value in the run "base".
DIALS = {
    "cast_std": ("brightness that an image's objects share: std", 40),
    "class_step": ("brightness between two classes", 22),
    "class_correlation": ("share of objects with their image's class", 0),
    "objects_per_image": ("objects an image", "6-9"),
    "texture_amplitude": ("strength of what an object shows by itself", 16),
    "images_a_worker": ("images a worker", 1),
    "RoIs_an_image": ("RoIs an image", 32),
    "convolutions": ("convolutions of the head", 4),
    "iterations": ("iterations", 1000),
}
RESAMPLES = 2000
Entry = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def measured(study: str, run: str, metric: str) -> dict[str, Any] | None:
    """Mean and interval of the probe of a run; None where it was not run."""
    found = [
        entry for entry in read(STUDIES / f"{study}.json").get(metric, ()) if entry["run"] == run
    ]
    return found[0] if found else None


def datasets() -> Iterator[tuple[str, str]]:
    """Run and training set of those runs of the study that differ in the dataset."""
    for run, of in read_study(ROOT / "configs" / "studies" / "dials.yaml").runs.items():
        if run == "base" or "DATASETS.TRAIN" in of.overrides:
            yield run, of.overrides.get("DATASETS.TRAIN", ["leaky_shapes_train"])[0]


def measure(content: dict[str, Any], added: list[list[str]]) -> None:
    """Add the potential of the datasets that are not there yet."""
    known = content.setdefault("datasets", {})
    for run, dataset in datasets():
        if run not in known:
            register_builtin([dataset])
            of = MetadataCatalog.get(dataset)
            known[run] = potential_of("dials", run, of.json_file, of.image_root)
    for name, study, run, json_file, image_root in added:
        known[name] = potential_of(study, run, json_file, image_root)


def potential_of(study: str, run: str, json_file: str, image_root: str) -> dict[str, Any]:
    """What leak-potential prints, without paths."""
    found = measure_leak_potential(json_file, image_root, progress=True).to_json()
    del found["dataset"]
    return {"study": study, "run": run, **found}


def correlate(content: dict[str, Any]) -> None:
    """Rank correlations of potential and outcome, with bootstrap intervals over datasets."""
    content["rank correlation"] = {}
    for metric in MEASURED:
        pairs = [
            (of["potential"]["accuracy"]["value"], entry["mean"])
            for of in content["datasets"].values()
            if (entry := measured(of["study"], of["run"], metric))
        ]
        x, y = np.array(pairs).T
        result = spearmanr(x, y)
        drawn = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
        # A resample of one dataset alone has no ranks.
        kept = [rows for rows in drawn if len({*x[rows]}) > 1 and len({*y[rows]}) > 1]
        low, high = np.percentile([spearmanr(x[k], y[k]).statistic for k in kept], (2.5, 97.5))
        content["rank correlation"][metric] = {
            "value": round(float(result.statistic), 3),
            "low": round(float(low), 3),
            "high": round(float(high), 3),
            "p": float(f"{result.pvalue:.2g}"),
            "datasets": len(x),
        }
    # Measures that were tried before, as they were then.
    for of in content.get("tried", {}).values():
        found = {run: measured("dials", run, "leakage in accuracy") for run in of["points"]}
        pairs = [(of["points"][run], entry["mean"]) for run, entry in found.items() if entry]
        of["rank correlation"] = round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 3)


def draw_dials() -> Figure:
    """A panel a dial: leakage and AP lost over its values."""
    runs = read(STUDIES / "dials.json")["runs"]
    figure, axes = plt.subplots(3, 3, figsize=(11, 8.5), layout="constrained")
    for axis, (dial, (title, base)) in zip(axes.flat, DIALS.items(), strict=True):
        values = {run.partition("=")[2]: run for run in runs if run.startswith(f"{dial}=")}
        values[str(base)] = "base"
        order = sorted(values, key=lambda text: float(text.partition("-")[0]))
        for offset, (metric, (label, color)) in zip((-0.06, 0.06), MEASURED.items(), strict=True):
            found = [measured("dials", values[text], metric) for text in order]
            x = [k + offset for k, of in enumerate(found) if of]
            _errorbar(axis, x, [of for of in found if of], color, label=label)
        names = [f"{text}\nbase" if values[text] == "base" else text for text in order]
        axis.set_xticks(range(len(order)), names)
        axis.set_xlim(-0.4, len(order) - 0.6)
        axis.set_title(title, fontsize=10)
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.grid(axis="y", color="0.9")
    low, high = zip(*(axis.get_ylim() for axis in axes.flat), strict=True)
    plt.setp(axes, ylim=(min(low), max(high)))
    axes[0, 0].legend(fontsize=9, frameon=False, loc="upper left")
    figure.supylabel("points: accuracy of RoIs, and box AP")
    return figure


def _errorbar(axis: Axes, x: list[float], of: list[Entry], color: str, **more: Any) -> None:
    """Means, their intervals as far as the axis reaches, and a dot a seed."""
    for k, entry in zip(x, of, strict=True):
        seeds = entry["by_seed"].values()
        axis.plot([k] * len(seeds), seeds, ".", color=color, alpha=0.5, markersize=4)
    mean = [entry["mean"] for entry in of]
    ends = [
        [0.0 if entry[key] is None else abs(entry[key] - entry["mean"]) for entry in of]
        for key in ("low_95", "high_95")
    ]
    axis.errorbar(x, mean, ends, marker="o", color=color, capsize=3, **more)
    # The intervals of two seeds would leave no room for anything else.
    seen = [value for line in axis.lines for value in line.get_ydata() if line.get_marker() == "."]
    margin = 0.12 * (max(seen) - min(seen)) + 1
    axis.set_ylim(min(seen) - margin, max(seen) + margin)


def draw_potential(content: dict[str, Any]) -> Figure:
    """A point a dataset: outcome over potential."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for axis, (metric, (label, color)) in zip(axes, MEASURED.items(), strict=True):
        points: dict[str, tuple[float, float]] = {}
        for name, of in content["datasets"].items():
            entry = measured(of["study"], of["run"], metric)
            if entry is not None:
                gain = of["potential"]["accuracy"]
                x, ends = gain["value"], (gain["low"], gain["high"])
                _errorbar(axis, [x], [entry], color)
                axis.plot(ends, [entry["mean"]] * 2, color=color, alpha=0.6)
                points[name] = x, entry["mean"]
        of = content["rank correlation"][metric]
        axis.set_title(
            f"rank correlation {of['value']:.2f} [{of['low']:.2f}, {of['high']:.2f}], "
            f"p = {of['p']:.2g}, {of['datasets']} datasets",
            fontsize=10,
        )
        axis.set_xlabel("leak potential, points of accuracy, before any training")
        axis.set_ylabel(label)
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.grid(color="0.92")
        axis.set_xlim(right=1.25 * max(x for x, _ in points.values()))
        _name(axis, points)
    return figure


def _name(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names beside points, each above those that would overlap it."""
    placed: list[tuple[float, float]] = []
    for name, place in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = axis.transData.transform(place)
        while any(abs(x - a) < 130 and abs(y - b) < 12 for a, b in placed):
            y += 2
        placed.append((x, y))
        shift = 6, (y - axis.transData.transform(place)[1]) * 72 / axis.figure.dpi + 3
        axis.annotate(name, place, shift, textcoords="offset points", fontsize=8)


def main() -> None:
    """Measure what is missing, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("NAME", "STUDY", "RUN", "JSON", "FOLDER")
    parser.add_argument("--add", nargs=5, action="append", default=[], metavar=names)
    args = parser.parse_args()
    content = read(POTENTIAL)
    measure(content, args.add)
    correlate(content)
    POTENTIAL.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    figures: dict[str, Callable[[], Figure]] = {
        "when_it_leaks": draw_dials,
        "leak_potential": lambda: draw_potential(content),
    }
    for name, draw in figures.items():
        draw().savefig(IMAGES / f"{name}.png", dpi=110)
        print(f"Wrote {IMAGES / name}.png")


if __name__ == "__main__":
    main()
