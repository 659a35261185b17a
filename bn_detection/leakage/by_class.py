"""Which classes leak: the differences of the normalization batches, class by class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ..estimate import Estimate
from ..metrics import Metric
from .comparison import Metrics, Values, compared, plain


@dataclass(frozen=True)
class ClassLeakage:
    """What was measured of the objects of a class, by metric.

    Attributes:
        name: of the class.
        objects: of it, in the images that were used.
        modes: as in the report.
        leakage: likewise.
        inconsistency: likewise.
        staleness: likewise.
    """

    name: str
    objects: int
    modes: dict[str, Metrics]
    leakage: Metrics
    inconsistency: Metrics
    staleness: Metrics

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {key: plain(value) for key, value in vars(self).items()}


def leakages_by_class(
    values: Values,
    own: str,
    foreign: str,
    names: Sequence[str],
    objects: Iterable[tuple[int, int]],
) -> list[ClassLeakage]:
    """Of each class that has objects, worst first: by the lower end of the leakage.

    It is that of the first metric. Classes whose objects are all in one window have no interval,
    and come last.

    Args:
        values: float ``(1 + B, C)``, each.
        own: the mode with batches of own images.
        foreign: the mode with shuffled batches.
        names: of the C classes.
        objects: the window and class of each.
    """
    windows_of: dict[int, list[int]] = {}
    for window, c in objects:
        windows_of.setdefault(c, []).append(window)
    found = []
    for c, windows in sorted(windows_of.items()):
        of_class = {
            mode: {name: of[:, c] for name, of in metrics.items()}
            for mode, metrics in values.items()
        }
        # Windows without an object of the class say nothing of how much it varies.
        fields = compared(of_class, own, foreign, len(set(windows)))
        found.append(ClassLeakage(names[c], len(windows), **fields))
    return sorted(found, key=_leakage, reverse=True)


def by_class_table(
    classes: Iterable[ClassLeakage], metrics: Mapping[str, Metric], style: str = "simple"
) -> str:
    """A row a class and metric.

    Args:
        classes: the classes.
        metrics: how they are named and shown.
        style: of the package ``tabulate``.
    """
    kinds = ("leakage", "inconsistency", "staleness")
    rows = [
        (
            of.name,
            of.objects,
            metrics[metric].title,
            *(
                getattr(of, kind)[metric].text(metrics[metric].decimals)
                if metric in getattr(of, kind)
                else "-"
                for kind in kinds
            ),
        )
        for of in classes
        for metric in next(iter(of.modes.values()))
    ]
    return str(tabulate(rows, ("class", "objects", "metric", *kinds), style))


def _leakage(of: ClassLeakage) -> tuple[float, float]:
    first = next(iter(of.leakage.values()), Estimate(math.nan))
    return (
        first.low if first.has_interval else -math.inf,
        first.value if first.is_known else -math.inf,
    )
