"""Tables and figure of the results of ``population.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from report import describe, format_seconds, format_size, format_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "pooled": "pooled",
    "mean_of_variances": "mean of variances",
    "fvcore": "fvcore",
    "standard_error": "standard error (pooled)",
}
_STYLES = {
    "pooled": {"color": "#0077bb", "marker": "o"},
    "mean_of_variances": {"color": "#ee7733", "marker": "s"},
    # Where the pooled estimate is.
    "fvcore": {"color": "#000000", "marker": "x", "linestyle": "none", "markersize": 9},
    "standard_error": {"color": "#0077bb", "marker": "_", "linestyle": ":"},
}


def markdown(document: dict[str, Any]) -> str:
    """The tables of one run.

    Args:
        document: what ``population.py`` wrote.
    """
    plan, tolerance, workers = (document[key] for key in ("plan", "tolerance", "workers"))
    return "\n".join(
        [
            f"### CPU, {document['date']}\n",
            f"{describe(document['machine'])}\n",
            f"**Time and memory, {plan['images']} images, one worker**\n",
            _times(document["times"]),
            "**Error by images used**\n",
            _errors(document["errors"]),
            f"The running averages that {plan['iterations']} iterations of training left: "
            f"{_percent(document['errors']['ema_of_training'])}.\n",
            f"**Tolerance {_percent(tolerance['tolerance'])}**\n",
            f"{tolerance['images']:,} images in {tolerance['seconds']:.1f} s; standard error "
            f"{_percent(tolerance['standard_error'])}.\n",
            f"**Two workers, {workers['images']} images**\n",
            f"Each runs {workers['batches_of_each']} of {2 * workers['batches_of_each']} batches: "
            f"{workers['seconds']:.2f} s, {workers['ratio']:.2f} times the "
            f"{workers['one_worker_seconds']:.2f} s of one worker. Collectives of each estimate: "
            f"{workers['collectives']}.\n",
        ]
    )


def _times(times: dict[str, dict[str, float]]) -> str:
    header = ["BN in", "fvcore", "here", "ratio", "fvcore's memory", "memory here", "ratio"]
    rows = [
        [
            name,
            format_seconds(result["fvcore_seconds"]),
            format_seconds(result["seconds"]),
            f"{result['ratio']:.2f}",
            format_size(result["fvcore_peak_bytes"]),
            format_size(result["peak_bytes"]),
            f"{result['memory_ratio']:.2f}",
        ]
        for name, result in times.items()
    ]
    return format_table(header, rows)


def _errors(errors: dict[str, Any]) -> str:
    columns = [[_percent(value) for value in errors["estimators"][name]] for name in LABELS]
    numbers = [f"{number:,}" for number in errors["images"]]
    rows = [list(row) for row in zip(numbers, *columns, strict=True)]
    return format_table(["images", *LABELS.values()], rows)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def draw(document: dict[str, Any], path: Path) -> None:
    """Error against images used, both logarithmic.

    Args:
        document: what ``population.py`` wrote.
        path: of the image.
    """
    errors = document["errors"]
    images = errors["images"]
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, label in LABELS.items():
        axes.plot(images, errors["estimators"][name], label=label, **_STYLES[name])
    first = errors["estimators"]["pooled"][0]
    guide = [0.6 * first * (images[0] / number) ** 0.5 for number in images]
    axes.plot(images, guide, color="0.6", linewidth=1, label=r"$1/\sqrt{\mathrm{images}}$")
    axes.axhline(
        errors["ema_of_training"], color="0.3", linestyle="-.", label="running averages of training"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(images, [f"{number:,}" for number in images])
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [_percent(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("images used")
    axes.set_ylabel("relative error of the worst layer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
