"""The page of a diagnosis. It draws with matplotlib, which a training does not need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..metrics import DISTANCES
from ..page import COLORS, figure, new_figure, render
from .by_layer_figure import by_layer_figure, by_layer_metrics
from .diagnosis import Diagnosis, by_distance
from .layers import LayerReport
from .on_detections import DetectionReport
from .report import LeakageReport

_LAYERS_DRAWN = 40
_DRAWN = {
    "ema_to_precise": ("running statistics (EMA)", "o"),
    "batch_to_precise": ("a normalization batch", "s"),
}


def page(diagnosis: Diagnosis) -> str:
    """A page of HTML that needs no network."""
    probe = diagnosis.probe
    return render(
        "diagnosis.html.j2",
        diagnosis=diagnosis,
        distances=DISTANCES,
        probe_figure=None if probe is None else _probe_figure(probe),
        by_layer_figures=_by_layer_figures(probe),
        layers_figure=_layers_figure(diagnosis.layers),
    )


def _probe_figure(report: LeakageReport | DetectionReport) -> Markup:
    metrics = [metric for metric in ("accuracy", "box_ap") if metric in report.metrics]
    labels = {mode: mode.replace("_", " ") for mode in report.modes}
    made, panels = new_figure(3.2 * len(metrics), 2.6, ncols=len(metrics), sharey=True)
    panels = np.atleast_1d(panels)
    for panel, metric in zip(panels, metrics, strict=True):
        for row, mode in enumerate(labels):
            estimate = report.modes[mode][metric]
            panel.plot([estimate.low, estimate.high], [row, row], color=COLORS[0], linewidth=2)
            panel.plot(estimate.value, row, marker="o", color=COLORS[0])
        panel.set_xlabel(report.metrics[metric].title)
        panel.set_yticks(range(len(labels)), labels.values())
    panels[0].invert_yaxis()
    alt = "; ".join(
        f"{report.metrics[metric].title}: "
        + ", ".join(f"{label} {report.modes[m][metric].text(2)}" for m, label in labels.items())
        for metric in metrics
    )
    what = "The second stage on the same RoIs" if report.on == "rois" else "Own detections"
    caption = f"{what} with {len(labels)} normalization batches, with 95 % intervals over images."
    return figure(made, alt, caption)


def _by_layer_figures(report: LeakageReport | DetectionReport | None) -> list[Markup]:
    if not isinstance(report, LeakageReport):
        return []
    caption = "What leaks through each layer, with 95 % intervals."
    return [
        figure(*by_layer_figure(report.by_layer, metric), caption)
        for metric in by_layer_metrics(report.by_layer)
    ]


def _layers_figure(layers: Sequence[LayerReport]) -> Markup | None:
    measured = [x for x in by_distance(layers) if x.ema_to_precise and x.batch_to_precise]
    drawn = measured[:_LAYERS_DRAWN]
    if not drawn:
        return None
    made, axes = new_figure(6.4, 1.2 + 0.25 * len(drawn))
    for color, (distance, (label, marker)) in zip(COLORS, _DRAWN.items(), strict=False):
        values = [getattr(layer, distance).value for layer in drawn]
        axes.plot(values, range(len(drawn)), marker, color=color, label=label)
    axes.set_yticks(range(len(drawn)), [layer.name for layer in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("distance to the precise statistics, standard deviations")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    alt = "; ".join(
        f"{x.name}: EMA {x.ema_to_precise.value:.2f}, batch {x.batch_to_precise.value:.2f}"
        for x in drawn
        if x.ema_to_precise and x.batch_to_precise
    )
    caption = "How far the statistics of training and of inference are from those of the data."
    if len(drawn) < len(measured):
        caption += f" The {len(drawn)} layers with the largest distances."
    return figure(made, alt, caption)
