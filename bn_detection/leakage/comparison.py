"""Normalization batches compared: the metrics with each, and the differences that a probe tells."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..estimate import Estimate

Metrics = dict[str, Estimate]
Values = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""By mode and metric: that of the images as they are, and of their resamples."""


def compared(values: Values, own: str, foreign: str, units: int) -> dict[str, Any]:
    """The fields ``modes``, ``leakage``, ``inconsistency`` and ``staleness`` of a report.

    Args:
        values: float ``(1 + B,)``, each; a difference from a mode that is not there is empty.
        own: the mode with batches of own images.
        foreign: the mode with shuffled batches.
        units: that were resampled.
    """
    estimate = partial(Estimate.of, units=units)

    def difference(one: str, other: str) -> Metrics:
        if not {one, other} <= values.keys():
            return {}
        return {name: estimate(of - values[other][name]) for name, of in values[one].items()}

    return {
        "modes": {
            mode: {name: estimate(of) for name, of in metrics.items()}
            for mode, metrics in values.items()
        },
        "leakage": difference(own, foreign),
        "inconsistency": difference(own, "population"),
        "staleness": difference(foreign, "population"),
    }


def plain(value: Any) -> Any:
    """A report, or a part of it, in plain dicts, lists and numbers; null for what there is none of.

    Args:
        value: what it holds, itself or within dicts, lists and tuples, may have a ``to_json``.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.to_json() if hasattr(value, "to_json") else value
