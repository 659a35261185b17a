"""What the leakage probe measured, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tabulate import tabulate

from ..metrics import PROBE, Metric
from .by_class import ClassLeakage, by_class_table
from .by_layer import LayerLeakage, by_layer_table
from .comparison import Metrics, plain
from .limits import LimitComparison


@dataclass(frozen=True)
class LeakageReport:
    """What the probe measured; percent, and nats for losses.

    Attributes:
        on: what is measured: the second stage on fixed RoIs.
        metrics: how they are named and shown.
        dataset: its name.
        images: how many were used.
        rois: of all images.
        foreground_rois: likewise.
        images_per_worker: that share a batch in the mode "own_worker".
        batch_norms: names of the layers whose batch was changed; if empty, all modes are equal.
        batch_sizes: mean number of RoIs of a normalization batch of the box head, by mode.
        modes: metrics by mode.
        own_shares: mean share of RoIs of the own worker in a batch of the box head, by mode, in
            percent.
        windows: of images that were shuffled together, which is what intervals are over.
        leakage: own worker minus shuffled: what the head reads from the RoIs of its own images.
        inconsistency: own worker minus population: what it loses at inference.
        staleness: shuffled minus population: the part of it that is no leak.
        limit: on LeakyShapes, the accuracy of "own_worker" against the best possible from one
            object; None elsewhere, and where no RoI sees one object alone.
        left_out: by name, why a head that has BN was not measured.
        by_layer: what leaks through each layer, if that was measured.
        by_class: the same of each class that has objects, worst first, if that was measured.
    """

    on: ClassVar[str] = "rois"
    metrics: ClassVar[dict[str, Metric]] = PROBE

    dataset: str
    images: int
    rois: int
    foreground_rois: int
    images_per_worker: int
    batch_norms: list[str]
    batch_sizes: dict[str, float]
    own_shares: dict[str, float]
    windows: int
    modes: dict[str, Metrics]
    leakage: Metrics
    inconsistency: Metrics
    staleness: Metrics
    limit: LimitComparison | None
    left_out: dict[str, str]
    by_layer: Sequence[LayerLeakage] = ()
    by_class: Sequence[ClassLeakage] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers; null for what there is none of."""
        return {"on": self.on} | {key: plain(value) for key, value in vars(self).items()}

    def text(self) -> str:
        """For a terminal: the table, and how to read it."""
        changed = len(self.batch_norms)
        about = (
            f"{self.dataset}: {self.images} images, {self.rois} RoIs of the training sampler, "
            f"{self.foreground_rois} of them foreground. {changed} layers normalize with other "
            f"batches: the RoIs of an image, those of a worker's images (images a worker: "
            f"{self.images_per_worker}), as many of random images; and with population statistics."
        )
        if changed:
            about += (
                f" Of a random batch, {self.own_shares['shuffled']:.0f} % are of the own worker. "
                f"Intervals are over {self.windows} windows of images that share batches"
                + (", so there are none." if self.windows == 1 else ".")
            )
        if not changed:
            about += (
                " The measured heads have no BN layer whose batch could be changed, so all modes "
                "are equal: nothing leaks through their statistics."
            )
        for head, reason in self.left_out.items():
            about += f" Left out: {head}: {reason}"
        about += (
            " AP on the sampler's RoIs, which hold the ground truth boxes, compares the modes; it "
            "is not the detector's AP."
        )
        text = f"{about}\n{self.table()}"
        if self.limit is not None:
            limit = self.limit
            text += (
                f"\nFrom one object ({limit.cue}) an accuracy of {limit.limit:.1f} % is possible "
                f"({limit.method}). On the {limit.rois} foreground RoIs that see one object only, "
                f"with the own worker's batch, it is {limit.accuracy.text(1)} %: "
                f"{limit.above.text(1)} points above."
            )
        if self.by_layer:
            text += f"\n\nLeakage by layer:\n\n{by_layer_table(self.by_layer)}"
        if self.by_class:
            text += f"\n\nLeakage by class:\n\n{by_class_table(self.by_class, self.metrics)}"
        return text

    def table(self, style: str = "simple") -> str:
        """A row a mode and a difference, a column a metric.

        Args:
            style: of the package ``tabulate``.
        """
        differences = {
            "leakage = own_worker - shuffled": self.leakage,
            "inconsistency = own_worker - population": self.inconsistency,
            "staleness = shuffled - population": self.staleness,
        }
        return table_of(self.modes | differences, self.metrics, style)


def table_of(rows: dict[str, Metrics], metrics: dict[str, Metric], style: str) -> str:
    """A row a normalization batch and a difference of two, a column a metric.

    Args:
        rows: what is in them, by their names; those with nothing are left out.
        metrics: how they are named and shown.
        style: of the package ``tabulate``.
    """
    shown = {name: values for name, values in rows.items() if values}
    names = list(next(iter(shown.values())))
    body = [
        (row, *(values[name].text(metrics[name].decimals) for name in names))
        for row, values in shown.items()
    ]
    titles = (metrics[name].title for name in names)
    return str(tabulate(body, ("normalization batch", *titles), style))
