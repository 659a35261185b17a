#!/usr/bin/env python
"""Draw the figures of docs/idea.md and CONTRIBUTING.md, each for a light and for a dark page.

python docs/figures.py [FOLDER]    # default: docs/images
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from rooms import draw_rooms

from bn_detection.data import LeakyShapesConfig
from bn_detection.norm import shuffled_groups

THEMES = {"light": ("#1f2328", "#ffffff", "#59636e"), "dark": ("#f0f6fc", "#0d1117", "#9198a1")}
# Of groups and classes: told apart without colour vision, on both backgrounds, by white letters.
COLORS = ("#3f74a3", "#c4533a", "#2f8a5b", "#8a63b8")
WORKERS, IMAGES, ROIS = 2, 2, 4  # images of a worker, RoIs of an image


def draw_partitions() -> Figure:
    """The groups that each partition gives the same 16 RoIs."""
    image = np.repeat(np.arange(WORKERS * IMAGES), ROIS)
    worker = image // IMAGES
    count = IMAGES * ROIS
    shuffled = np.concatenate([ids.numpy() for ids in shuffled_groups([count] * WORKERS, 2, 3)])
    rng = np.random.default_rng(1)
    ghost = np.concatenate([rng.permutation(np.repeat([k, k + 1], ROIS)) for k in (0, 2)])
    rows = {
        "worker": ("BN", worker),
        "world": ("SyncBN", 0 * worker),
        "shuffle": ("ShuffleBN", shuffled),
        "ghost": ("GhostBN", ghost),
        "image": ("ImageBN", image),
    }
    figure, axes = plt.subplots(figsize=(8, 3.7), layout="constrained")
    places = np.arange(len(image)) + 0.35 * image + 0.7 * worker
    for height, (name, (norm, groups)) in enumerate(rows.items()):
        axes.text(-1.2, -height, f"{name}  ({norm})", ha="right", va="center")
        for x, group in zip(places, groups, strict=True):
            _roi(axes, x, -height, int(group))
    for k in range(WORKERS * IMAGES):
        axes.text(places[image == k].mean(), 0.75, f"image {k + 1}", ha="center", color="C7")
    for k in range(WORKERS):
        mine = places[worker == k]
        axes.text(mine.mean(), 1.55, f"worker {k + 1}", ha="center", weight="bold")
        axes.plot([mine.min() - 0.4, mine.max() + 0.4], [1.35, 1.35], color="C7", linewidth=1)
    axes.set(xlim=(-5.9, places.max() + 0.6), ylim=(-4.6, 2.1), aspect="equal")
    axes.set_axis_off()
    return figure


def _roi(axes: Axes, x: float, y: float, group: int, size: float = 0.8) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - size / 2, y - size / 2),
            size,
            size,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=COLORS[group],
            edgecolor="none",
        )
    )
    axes.text(x, y, "ABCD"[group], color="white", ha="center", va="center", weight="bold", size=9)


def draw_leak() -> Figure:
    """What is left of an object's brightness, by class, after normalization with three batches."""
    dials = LeakyShapesConfig()
    images, objects = 4000, 8
    rng = np.random.default_rng(0)
    label = rng.integers(dials.num_classes, size=(images, objects))
    brightness = dials.class_step * (label - (dials.num_classes - 1) / 2)
    brightness = brightness + rng.normal(0, dials.cast_std, (images, 1))
    brightness += rng.normal(0, dials.object_std, label.shape)
    others = rng.choice(brightness.ravel(), (images, objects, objects - 1))
    panels = {
        "the objects of its image": _normalize(brightness, brightness[:, None]),
        "random objects of many images": _normalize(
            brightness, np.concatenate([brightness[..., None], others], -1)
        ),
        "the population": _normalize(brightness, brightness.reshape(1, 1, -1)),
    }
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.7), sharey=True, layout="constrained")
    bins = np.linspace(-3, 3, 61)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for k in range(dials.num_classes):
            chosen = values[label == k]
            shares = np.histogram(chosen, bins)[0] / len(chosen)
            axis.stairs(shares, bins, fill=True, alpha=0.55, color=COLORS[k])
            axis.stairs(shares, bins, color=COLORS[k], linewidth=1.2)
            highest = shares.argmax()
            if title == "the objects of its image":
                name = "class 0" if k == 0 else str(k)
                axis.text(bins[highest], shares.max(), name, ha="center", va="bottom", size=9)
        axis.set_title(f"normalized with\n{title}", size=10)
        axis.set_xlabel(f"best accuracy {_best_accuracy(values, label, bins):.0%}", size=10)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].margins(y=0.12)
    return figure


def _normalize(x: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Each value with the mean and standard deviation of its batch: the last axis."""
    return (x - batches.mean(-1)) / batches.std(-1)


def _best_accuracy(values: np.ndarray, label: np.ndarray, bins: np.ndarray) -> float:
    """Share of objects in whose bin their class is the most frequent."""
    wide = np.concatenate([[-np.inf], bins, [np.inf]])
    counts = np.stack([np.histogram(values[label == k], wide)[0] for k in range(label.max() + 1)])
    return counts.max(0).sum() / counts.sum()


def draw_exchange() -> Figure:
    """Shuffling RoIs between two workers, and shuffling which statistics they use."""
    groups = [[0, 1, 1, 0], [1, 0, 0, 1]]
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axes, title in zip(panels, ("features: RoIs move", "statistics: sums move"), strict=True):
        axes.set_title(title, size=11)
        for rank, x in enumerate((0, 5.4)):
            axes.text(x + 1.5, 3.95, f"worker {rank + 1}", ha="center", weight="bold")
            for k, group in enumerate(groups[rank]):
                _roi(axes, x + k, 3.2, group)
        axes.set(xlim=(-0.8, 9.2), ylim=(-1.5, 4.4), aspect="equal")
        axes.set_axis_off()
    features, statistics = panels
    for k, (rank, place) in enumerate([(0, 0), (0, 3), (1, 1), (1, 2)]):
        _arrow(features, (5.4 * rank + place, 2.7), (k, 1.3))
    for k, (rank, place) in enumerate([(0, 1), (0, 2), (1, 0), (1, 3)]):
        _arrow(features, (5.4 * rank + place, 2.7), (5.4 + k, 1.3))
    for rank, x in enumerate((0, 5.4)):
        for k in range(4):
            _roi(features, x + k, 0.8, rank)
        features.text(x + 1.5, 0, "normalize", ha="center", va="center")
    features.text(4.2, -0.9, "then all of them back", ha="center", va="center", color="C7")
    for k, x in enumerate((3.0, 5.4)):
        for worker in (1.5, 6.9):
            _arrow(statistics, (worker, 2.7), (x, 1.5), both=True)
        statistics.add_patch(Circle((x, 0.85), 0.6, facecolor=COLORS[k], edgecolor="none"))
        statistics.text(x, 0.85, "AB"[k], color="white", ha="center", va="center", weight="bold")
        statistics.text(x, 0, "n, Σx, Σx²", ha="center", va="center", size=9)
    note = "each RoI is normalized where it is"
    statistics.text(4.2, -0.9, note, ha="center", va="center", color="C7")
    return figure


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], both: bool = False
) -> None:
    style = {"arrowstyle": "<->" if both else "->", "color": "C7", "linewidth": 1}
    axes.annotate("", end, start, arrowprops=style)


FIGURES: dict[str, Callable[[], Figure]] = {
    "idea_partitions": draw_partitions,
    "idea_leak": draw_leak,
    "idea_exchange": draw_exchange,
    "rooms": draw_rooms,
}


def main(folder: Path) -> None:
    """Write each figure as ``<name>_light.svg`` and ``<name>_dark.svg``."""
    for theme, (text, background, muted) in THEMES.items():
        style = {
            "text.color": text,
            "axes.labelcolor": text,
            "axes.edgecolor": muted,
            "xtick.color": muted,
            "axes.facecolor": background,
            "figure.facecolor": background,
            "axes.prop_cycle": plt.cycler(color=[*COLORS, "0.5", "0.5", "0.5", muted]),
            "font.size": 10,
            "svg.hashsalt": "bn_detection",
            "svg.fonttype": "none",
        }
        for name, draw in FIGURES.items():
            with plt.rc_context(style):
                figure = draw()
                path = folder / f"{name}_{theme}.svg"
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
