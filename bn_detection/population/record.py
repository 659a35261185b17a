"""What new statistics change in layers, for a record and a table."""

from __future__ import annotations

import math
from typing import Any

from tabulate import tabulate

from ..norm import TrackingBatchNorm
from .change import statistics_change
from .estimators import PopulationStatistics

_ROWS_SHOWN = 12


def record_change(layer: TrackingBatchNorm, new: PopulationStatistics) -> dict[str, Any]:
    """JSON types: what new statistics of a layer rest on, and what they change in it.

    Args:
        layer: with its old statistics.
        new: of the layer; of fewer than two values it keeps the old ones.
    """
    record: dict[str, Any] = {"values": new.count}
    if new.count < 2:
        return record
    change = statistics_change(layer, new)
    channel = change.largest_channel
    return record | {
        "relative_standard_error": _or_none(new.relative_error),
        "change_of_mean": _or_none(change.rms_mean),
        "change_of_log_std": _or_none(change.rms_std),
        "largest": {
            "channel": channel,
            "change_of_mean": _or_none(change.mean[channel].item()),
            "change_of_log_std": _or_none(change.std[channel].item()),
        },
    }


def _or_none(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def table_of_changes(by_layer: dict[str, dict[str, Any]]) -> str:
    """The records of :func:`record_change`, by layer: those that change most, for a terminal."""

    def size(record: dict[str, Any]) -> float:
        changes = (record.get("change_of_mean"), record.get("change_of_log_std"))
        return max((change for change in changes if change is not None), default=-1.0)

    rows = []
    most_changed = sorted(by_layer.items(), key=lambda item: size(item[1]), reverse=True)
    for name, record in most_changed[:_ROWS_SHOWN]:
        error = record.get("relative_standard_error")
        largest = record.get("largest", {})
        rows.append(
            (
                name,
                record["values"],
                None if error is None else f"{error:.2%}",
                record.get("change_of_mean"),
                record.get("change_of_log_std"),
                largest.get("channel"),
            )
        )
    headers = ("layer", "values", "standard error", "shift", "ln std", "most changed channel")
    table = tabulate(rows, headers, floatfmt=".3f", missingval="-")
    more = len(by_layer) - len(rows)
    return f"{table}\n... and {more} layers that changed less" if more > 0 else table
