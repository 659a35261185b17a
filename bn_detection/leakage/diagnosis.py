"""A diagnosis as a whole: its layers, its probe and its findings, for machines and for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from tabulate import tabulate

from ..page import COLORS, figure, new_figure, render
from .findings import Finding
from .intervals import Estimate
from .layers import LayerReport
from .probe import LeakageReport

_ROWS_SHOWN = 15
_LAYERS_DRAWN = 40
_WIDTH = 100


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the BN layers of a model.

    Attributes:
        settings: what was diagnosed, on what, with which versions: by name.
        layers: the BN layers.
        probe: of the second stage, or None.
        findings: worst first.
        notes: what is worth knowing and no finding.
        left_out: what could not be measured, and why.
    """

    settings: Mapping[str, Any]
    layers: Sequence[LayerReport]
    probe: LeakageReport | None
    findings: Sequence[Finding]
    notes: Sequence[str]
    left_out: Sequence[str]

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if not self.layers:
            return "The model has no BN layer: there is nothing to diagnose."
        if not self.findings:
            measured = "was measured" if self.left_out else "was examined"
            return f"No finding in what {measured}."
        number = len(self.findings)
        return f"{number} finding{'s' if number > 1 else ''}, worst first."

    def to_json(self) -> dict[str, Any]:
        """JSON types; numbers that are unknown are null."""
        return {
            "settings": dict(self.settings),
            "verdict": self.verdict,
            "findings": [finding.to_json() for finding in self.findings],
            "notes": list(self.notes),
            "left_out": list(self.left_out),
            "layers": [layer.to_json() for layer in self.layers],
            "probe": None if self.probe is None else self.probe.to_json(),
        }

    def text(self) -> str:
        """For a terminal."""
        parts = []
        if self.layers:
            parts.append(self._table())
        if self.probe is not None:
            parts.append(self.probe.text())
        parts.append(self.verdict)
        parts += [_finding(k, finding) for k, finding in enumerate(self.findings, 1)]
        parts += [_paragraph("Note: ", note) for note in self.notes]
        parts += [_paragraph("Left out: ", reason) for reason in self.left_out]
        return "\n\n".join(parts)

    def html(self) -> str:
        """A page that needs no network."""
        probe = self.probe
        return render(
            "diagnosis.html.j2",
            diagnosis=self,
            probe_figure=None if probe is None else _probe_figure(probe),
            layers_figure=_layers_figure(self.layers),
        )

    def _table(self) -> str:
        by_distance = sorted(self.layers, key=_size, reverse=True)
        rows = [
            (
                layer.name,
                layer.sharing,
                None
                if layer.rows_per_batch is None
                else f"{layer.rows_per_batch:.0f} {layer.rows}",
                layer.values_per_batch,
                _cell(layer.ema_to_precise),
                _cell(layer.batch_to_precise),
                _cell(layer.levels_apart),
                len(layer.dead),
            )
            for layer in by_distance[:_ROWS_SHOWN]
        ]
        headers = (
            "layer",
            "batch of",
            "rows",
            "values",
            "EMA to precise",
            "batch to precise",
            "levels apart",
            "dead",
        )
        table = tabulate(rows, headers, floatfmt=".0f", missingval="-")
        more = len(self.layers) - len(rows)
        about = (
            "Distances between statistics, in standard deviations of the layer's input, with 95 % "
            "intervals:"
        )
        return f"{about}\n{table}" + (f"\n... and {more} more layers" if more > 0 else "")


def _size(layer: LayerReport) -> float:
    return -1.0 if layer.ema_to_precise is None else layer.ema_to_precise.value


def _cell(estimate: Estimate | None) -> str | None:
    return None if estimate is None else estimate.text(2)


def _paragraph(first: str, text: str) -> str:
    return textwrap.fill(first + text, _WIDTH, subsequent_indent="  ", break_long_words=False)


def _finding(number: int, finding: Finding) -> str:
    lines = [_paragraph(f"{number}. ", finding.title)]
    if finding.cost is not None:
        lines.append(f"   Likely cost: {finding.cost.text(1)} points of box AP")
    lines += [f"   - {item}" for item in finding.evidence]
    lines.append(_paragraph("   ", finding.advice))
    lines.append(textwrap.indent(finding.yaml.rstrip(), "     "))
    return "\n".join(lines)


_MODES = {
    "own_image": "own image",
    "own_worker": "own worker",
    "shuffled": "shuffled",
    "population": "population",
}


def _probe_figure(report: LeakageReport) -> Markup:
    metrics = {"accuracy": "Foreground accuracy, %", "box_ap": "Box AP (sampler's RoIs)"}
    made, panels = new_figure(6.4, 2.6, ncols=2, sharey=True)
    for panel, (metric, title) in zip(panels, metrics.items(), strict=True):
        for row, mode in enumerate(_MODES):
            estimate = report.modes[mode][metric]
            panel.plot([estimate.low, estimate.high], [row, row], color=COLORS[0], linewidth=2)
            panel.plot(estimate.value, row, marker="o", color=COLORS[0])
        panel.set_xlabel(title)
        panel.set_yticks(range(len(_MODES)), _MODES.values())
    panels[0].invert_yaxis()
    alt = "; ".join(
        f"{title}: "
        + ", ".join(f"{label} {report.modes[m][metric].text(2)}" for m, label in _MODES.items())
        for metric, title in metrics.items()
    )
    caption = (
        "The second stage on the same RoIs with four normalization batches, with 95 % intervals "
        "over images."
    )
    return figure(made, alt, caption)


def _layers_figure(layers: Sequence[LayerReport]) -> Markup | None:
    measured = [x for x in layers if x.ema_to_precise and x.batch_to_precise]
    drawn = sorted(measured, key=_size, reverse=True)[:_LAYERS_DRAWN]
    if not drawn:
        return None
    kinds = {
        "ema_to_precise": ("running statistics (EMA)", "o"),
        "batch_to_precise": ("a normalization batch", "s"),
    }
    made, axes = new_figure(6.4, 1.2 + 0.25 * len(drawn))
    for color, (attribute, (label, marker)) in zip(COLORS, kinds.items(), strict=False):
        values = [getattr(layer, attribute).value for layer in drawn]
        axes.plot(values, range(len(drawn)), marker, color=color, label=label)
    axes.set_yticks(range(len(drawn)), [layer.name for layer in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("distance to the precise statistics, standard deviations")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    alt = "; ".join(
        f"{x.name}: EMA {x.ema_to_precise.value:.2f}, batch {x.batch_to_precise.value:.2f}"
        for x in drawn
    )
    caption = "How far the statistics of training and of inference are from those of the data."
    if len(drawn) < len(measured):
        caption += f" The {len(drawn)} layers with the largest distances."
    return figure(made, alt, caption)
