"""A diagnosis as a whole: its layers, its probe and its findings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ..metrics import DISTANCES
from ..notebook import framed
from .findings import Finding, as_yaml, combined
from .layers import LayerReport
from .on_detections import DetectionReport
from .report import LeakageReport

SCHEMA = 1
"""Of ``diagnosis.json``: raised when a key goes, or comes to mean something else."""

_ROWS_SHOWN = 15
_WIDTH = 100
_SHOWN_DISTANCES = ("ema_to_precise", "batch_to_precise", "levels_apart")


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the BN layers of a model.

    Attributes:
        settings: what was diagnosed, on what, with which versions: by name.
        layers: the BN layers.
        probe: of the second stage, or of the detector's own detections, or None.
        findings: worst first.
        notes: what is worth knowing and no finding.
        left_out: what could not be measured, and why.
    """

    settings: Mapping[str, Any]
    layers: Sequence[LayerReport]
    probe: LeakageReport | DetectionReport | None
    findings: Sequence[Finding]
    notes: Sequence[Finding]
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

    @property
    def yaml_of_all(self) -> str:
        """The keys of all findings in one config, where there are several; else ""."""
        several = len(self.findings) > 1 and not self.findings[0].in_python
        return as_yaml(combined(self.findings)) if several else ""

    def to_json(self) -> dict[str, Any]:
        """JSON types; numbers that are unknown are null."""
        return {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "verdict": self.verdict,
            "findings": [finding.to_json() for finding in self.findings],
            "yaml_of_all": self.yaml_of_all,
            "notes": [note.to_json() for note in self.notes],
            "left_out": list(self.left_out),
            "layers": [layer.to_json() for layer in self.layers],
            "probe": None if self.probe is None else self.probe.to_json(),
        }

    def _repr_html_(self) -> str:
        """The page, for a notebook."""
        from .diagnosis_page import page  # with matplotlib, which a training does not need

        return framed(page(self))

    def text(self) -> str:
        """For a terminal."""
        parts = []
        if self.layers:
            parts.append(self.table())
        if self.probe is not None:
            parts.append(self.probe.text())
        parts.append(self.verdict)
        parts += [_finding(k, finding) for k, finding in enumerate(self.findings, 1)]
        if self.yaml_of_all:
            together = textwrap.indent(self.yaml_of_all.rstrip(), "  ")
            parts.append(f"The keys of all findings together:\n{together}")
        parts += [_paragraph(f"Note {note.id}: ", note.title) for note in self.notes]
        parts += [_paragraph("Left out: ", reason) for reason in self.left_out]
        return "\n\n".join(parts)

    def table(self, style: str = "simple") -> str:
        """The layers that normalize with a batch, then frozen ones; furthest from the data first.

        Args:
            style: of the package ``tabulate``.
        """
        ordered = by_distance(self.layers)
        rows = [
            (
                layer.name,
                layer.sharing,
                None
                if layer.rows_per_batch is None
                else f"{layer.rows_per_batch:.0f} {layer.rows}",
                layer.values_per_batch,
                *(_cell(layer, distance) for distance in _SHOWN_DISTANCES),
                len(layer.dead),
            )
            for layer in ordered[:_ROWS_SHOWN]
        ]
        distances = (DISTANCES[distance].short for distance in _SHOWN_DISTANCES)
        headers = ("layer", "batch of", "rows", "values", *distances, "dead")
        table = tabulate(rows, headers, style, floatfmt=".0f", missingval="-")
        left = ordered[_ROWS_SHOWN:]
        frozen = sum(not layer.trains for layer in left)
        about = (
            "Distances between statistics, in standard deviations of the layer's input, with 95 % "
            "intervals:"
        )
        more = f"\n\n... and {len(left)} more layers ({frozen} frozen), in the JSON and the page"
        return f"{about}\n\n{table}" + (more if left else "")


def by_distance(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Those that normalize with a batch first, of each kind those furthest from the data."""

    def place(layer: LayerReport) -> tuple[bool, float]:
        distance = layer.ema_to_precise
        return not layer.trains, 1.0 if distance is None else -distance.value

    return sorted(layers, key=place)


def _cell(layer: LayerReport, distance: str) -> str | None:
    estimate = getattr(layer, distance)
    return None if estimate is None else estimate.text(DISTANCES[distance].decimals)


def _paragraph(first: str, text: str) -> str:
    return textwrap.fill(first + text, _WIDTH, subsequent_indent="  ", break_long_words=False)


def _finding(number: int, finding: Finding) -> str:
    lines = [_paragraph(f"{number}. {finding.id}: ", finding.headline)]
    if finding.symptom:
        lines.append(_paragraph("   ", finding.title))
    if finding.cost is not None:
        lines.append(f"   Likely cost: {finding.cost.text(1)} points of box AP")
    lines += [f"   - {item.text}" for item in finding.evidence]
    lines.append(_paragraph("   ", f"{finding.advice} ({finding.docs})"))
    lines.append(textwrap.indent(finding.cure.rstrip(), "     "))
    return "\n".join(lines)
