"""A bar chart of the leakage by layer. It draws with matplotlib, which a training does not need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ..metrics import PROBE
from ..page import COLORS, new_figure
from .by_layer import LayerLeakage

_BAR = 0.38
_KINDS = {"removed": "gone without the layer", "alone": "through the layer alone"}
_PREFIX = "roi_heads."


def by_layer_metrics(layers: Sequence[LayerLeakage]) -> list[str]:
    """The accuracies that the layers have: of boxes, masks, keypoints, or of each stage."""
    return [m for m in dict.fromkeys(m for x in layers for m in x.removed) if "accuracy" in m]


def by_layer_figure(layers: Sequence[LayerLeakage], metric: str) -> tuple[Figure, str]:
    """The leakage through each layer of a head, in points, with intervals.

    Args:
        layers: of a report.
        metric: one of :func:`by_layer_metrics`; layers without it are left out.

    Returns:
        The figure, and what it shows in words.
    """
    drawn = [layer for layer in layers if metric in layer.removed]
    made, axes = new_figure(6.4, 1.4 + 0.5 * len(drawn))
    rows = np.arange(len(drawn))
    for k, (kind, label) in enumerate(_KINDS.items()):
        estimates = [getattr(layer, kind)[metric] for layer in drawn]
        values = np.array([estimate.value for estimate in estimates])
        place = rows + (k - 0.5) * _BAR
        axes.barh(place, values, _BAR, color=COLORS[k], label=label)
        known = np.array([estimate.has_interval for estimate in estimates])
        if known.any():
            ends = np.array([[x.low, x.high] for x in estimates])[known]
            axes.hlines(place[known], *ends.T, color="#7a7a7a", linewidth=2)
    axes.set_yticks(rows, [layer.name.removeprefix(_PREFIX) for layer in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#7a7a7a", linewidth=0.8)
    axes.set_xlabel(f"leakage in {PROBE[metric].name}, {PROBE[metric].of_difference}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    words = "; ".join(
        f"{layer.name}: "
        + ", ".join(f"{getattr(layer, k)[metric].text(1)} {label}" for k, label in _KINDS.items())
        for layer in drawn
    )
    return made, words
