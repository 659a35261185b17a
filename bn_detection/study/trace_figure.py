"""The figure of a trace: mini-batch, EMA and population statistics over training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ..config import ConfigError
from ..norm import matches
from ..population import read_trace
from ..population.trace import FILE_NAME

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_MOMENTS = {"mean": "mean", "var": "variance"}
_STYLES = {
    "batch": {"label": "mini-batch", "color": "#bbbbbb", "linewidth": 0.8, "zorder": 1},
    "ema": {"label": "EMA", "color": "#4477aa", "linewidth": 1.6, "zorder": 2},
    "population": {
        "label": "population",
        "color": "#ee6677",
        "linestyle": "none",
        "marker": "o",
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
        "zorder": 3,
    },
}


def draw_trace(output_dir: Path, layers: Sequence[str] = ("*",)) -> list[Path]:
    """Draw ``bn_trace.png`` and ``bn_trace.svg`` from the trace of a training.

    A row a layer; for each channel a panel of the mean and one of the variance, over iterations.

    Args:
        output_dir: OUTPUT_DIR of a training with BN.TRACE.PERIOD.
        layers: globs over the names of the layers to draw.

    Returns:
        The paths of the figures.

    Raises:
        ConfigError: there is no trace, or no layer in it matches.
    """
    path = output_dir / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: train with BN.TRACE.PERIOD 20 to have it.")
    traced: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in read_trace(path):
        traced[record["layer"]][record["channel"]].append(record)
    chosen = [layer for layer in traced if matches(layer, layers)]
    if not chosen:
        raise ConfigError(
            f"--layer {', '.join(layers)} matches no layer of {path}, which has "
            f"{', '.join(traced) or 'no record'}."
        )
    columns = len(_MOMENTS) * max(len(traced[layer]) for layer in chosen)
    figure = plt.figure(
        figsize=(max(3.1 * columns, 5), 2.1 * len(chosen) + 0.6), layout="constrained"
    )
    rows = figure.subfigures(len(chosen), squeeze=False)[:, 0]
    for row, layer in zip(rows, chosen, strict=True):
        row.suptitle(layer, size=9, weight="bold")
        panels = list(row.subplots(1, columns, squeeze=False)[0])
        for channel, records in traced[layer].items():
            for moment, name in _MOMENTS.items():
                panel = panels.pop(0)
                draw_panel(panel, records, moment)
                panel.set_title(f"channel {channel}: {name}", size=8)
        for panel in panels:
            panel.set_axis_off()
    for panel in rows[-1].axes:
        panel.set_xlabel("iteration", size=8)
    handles = figure.subfigs[0].axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    figures = [output_dir / f"bn_trace.{suffix}" for suffix in ("png", "svg")]
    for file in figures:
        figure.savefig(file, dpi=130)
    plt.close(figure)
    return figures


def draw_panel(panel: Axes, records: list[dict[str, Any]], moment: str) -> None:
    """Draw the statistics of one channel over iterations.

    Args:
        panel: where to.
        records: of one layer and channel, from :func:`read_trace`.
        moment: "mean" or "var".
    """
    for kind, style in _STYLES.items():
        points = [(r["iteration"], r[key]) for r in records if (key := f"{kind}_{moment}") in r]
        points = [(x, y) for x, y in points if y is not None]
        panel.plot(*zip(*points, strict=True) if points else ([], []), **style)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
