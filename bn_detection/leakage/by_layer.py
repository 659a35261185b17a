"""Which layer leaks: the batch of one layer at a time changed, and of all but one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tabulate import tabulate

from ..estimate import Estimate, resample
from ..metrics import PROBE
from .second_stage import Outputs, SecondStage
from .window import Sums, Window

OWN, FOREIGN = "own_worker", "shuffled"


@dataclass(frozen=True)
class LayerLeakage:
    """What a head reads through one of its layers, by metric of the head.

    Attributes:
        name: of the layer.
        removed: all layers with the own worker's batch, minus the same with a shuffled batch in
            this layer: the leak that is gone without it.
        alone: this layer with the own worker's batch and all others with shuffled ones, minus
            shuffled batches in all: the leak that there is through it alone.
    """

    name: str
    removed: dict[str, Estimate] = field(default_factory=dict)
    alone: dict[str, Estimate] = field(default_factory=dict)

    def leaks(self, metric: str, margin: float) -> bool:
        """Whether the layer carries a part of the leak that is larger than a margin.

        Where two layers read the same, neither removes much; where one reads what the other
        shows, neither leaks alone. So either is enough.
        """
        return any(metric in of and of[metric].exceeds(margin) for of in (self.removed, self.alone))

    def to_json(self) -> dict[str, Any]:
        """By name."""
        differences = {
            kind: {metric: estimate.to_json() for metric, estimate in of.items()}
            for kind, of in (("removed", self.removed), ("alone", self.alone))
        }
        return {"name": self.name, **differences}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> LayerLeakage:
        """From what :meth:`to_json` gives."""
        removed, alone = (
            {metric: Estimate.from_json(value) for metric, value in record[kind].items()}
            for kind in ("removed", "alone")
        )
        return cls(record["name"], removed, alone)


class LayerScores:
    """Collects the scores of each image with the batches of one layer changed, and of all others.

    A part has 2 L + 2 passes for its L layers, on RoIs that were pooled once, each from its first
    layer that differs on; without boxes or masks at image size.

    Attributes:
        most_windows: how many are used; :meth:`add` passes over any more.
    """

    most_windows = 8

    def __init__(self, stage: SecondStage, parts: Sequence[str]) -> None:
        """
        Args:
            stage: the second stage.
            parts: of it, those to measure.
        """
        self._stage, self._parts = stage, parts
        self._sums: dict[tuple[str, str, str], Sums] = {}
        self._window_of: list[int] = []

    def add(self, window: Window) -> None:
        """Run the parts on a window of images."""
        number = self._window_of[-1] + 1 if self._window_of else 0
        if number == self.most_windows:
            return
        for part in self._parts:
            layers = list(self._stage.layers[part])
            for mode, other in ((OWN, FOREIGN), (FOREIGN, OWN)):
                modes = dict.fromkeys(self._stage.all_layers, mode)
                self._put(part, "", mode, window.run(modes, [part], keep=True), window)
                for layer in layers if len(layers) > 1 else ():
                    changed = window.run(modes | {layer: other}, [part])
                    self._put(part, layer, other, changed, window)
        self._window_of += [number] * len(window.images)

    def _put(
        self, part: str, layer: str, mode: str, outputs: dict[str, Outputs], window: Window
    ) -> None:
        self._sums.setdefault((part, layer, mode), Sums()).put(window.scores(outputs))

    def leakages(self, resamples: int) -> list[LayerLeakage]:
        """Of each layer, in the order of the model."""
        windows = self._window_of[-1] + 1 if self._window_of else 0
        weights = resample(windows, resamples)[:, self._window_of]
        values = {
            key: {name: metric(weights) for name, metric in sums.metrics().items()}
            for key, sums in self._sums.items()
        }
        found: dict[str, LayerLeakage] = {}
        for part in self._parts:
            own, foreign = values[part, "", OWN], values[part, "", FOREIGN]
            for layer in self._stage.layers[part]:
                # Of a single layer the others are none.
                without = values.get((part, layer, FOREIGN), foreign)
                alone = values.get((part, layer, OWN), own)
                of_layer = found.setdefault(layer, LayerLeakage(layer))
                of_layer.removed.update(_differences(own, without, windows))
                of_layer.alone.update(_differences(alone, foreign, windows))
        return list(found.values())


def by_layer_table(layers: Iterable[LayerLeakage], style: str = "simple") -> str:
    """A row a layer and metric.

    Args:
        layers: the layers.
        style: of the package ``tabulate``.
    """
    rows = [
        (
            layer.name,
            PROBE[metric].title,
            layer.removed[metric].text(PROBE[metric].decimals),
            layer.alone[metric].text(PROBE[metric].decimals),
        )
        for layer in layers
        for metric in layer.removed
    ]
    headers = ("layer", "leakage in", "gone without the layer", "through the layer alone")
    return str(tabulate(rows, headers, style))


def _differences(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], windows: int
) -> dict[str, Estimate]:
    return {name: Estimate.of(one[name] - other[name], windows) for name in one}
