"""What is measured of a detector and its BN layers: names, units and decimals, said once."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How a number is named and shown.

    Attributes:
        short: a name within a table of its kind.
        name: in full.
        unit: of the number.
        decimals: that it is shown with.
        of_difference: the unit of a difference of two.
    """

    short: str
    name: str
    unit: str
    decimals: int
    of_difference: str

    @property
    def capitalized(self) -> str:
        """The name at the start of a sentence."""
        return self.name[0].upper() + self.name[1:]

    @property
    def title(self) -> str:
        """Name and unit, for the head of a column."""
        return f"{self.name}, {self.unit}"


def _percent(short: str, name: str) -> Metric:
    return Metric(short, name, "%", 1, "points")


def _loss(short: str, unit: str) -> Metric:
    return Metric(short, short, unit, 3, unit)


def _distance(name: str) -> Metric:
    return Metric(name, name, "standard deviations", 2, "standard deviations")


class _ByName(dict[str, Metric]):
    """With the metrics of a cascade's stages, such as "accuracy_stage1"."""

    def __missing__(self, name: str) -> Metric:
        of_all, found, stage = name.partition("_stage")
        if not found:
            raise KeyError(name)
        metric = self[of_all]
        short, full = (f"stage {stage} {text}" for text in (metric.short, metric.name))
        return metric._replace(short=short, name=full)


PROBE = _ByName(
    {
        "accuracy": _percent("accuracy", "foreground accuracy"),
        "loss": _loss("loss", "nats/RoI"),
        "box_ap": _percent("box AP", "box AP on the sampler's RoIs"),
        "mask_accuracy": _percent("mask accuracy", "mask accuracy"),
        "mask_loss": _loss("mask loss", "nats/pixel"),
        "mask_ap": _percent("mask AP", "mask AP on the sampler's RoIs"),
        "keypoint_accuracy": _percent("keypoint accuracy", "keypoint accuracy"),
        "keypoint_loss": _loss("keypoint loss", "nats/keypoint"),
    }
)
"""Of the leakage probe."""

DETECTIONS = {"box_ap": _percent("box AP", "box AP"), "mask_ap": _percent("mask AP", "mask AP")}
"""Of the probe on detections."""

DISTANCES = {
    "ema_to_precise": _distance("EMA to precise"),
    "batch_to_precise": _distance("batch to precise"),
    "ema_to_batch": _distance("EMA to batch"),
    "levels_apart": _distance("levels apart"),
}
"""Between the statistics of a layer."""

EVALUATION = {
    "bbox": _percent("box AP", "box AP"),
    "segm": _percent("mask AP", "mask AP"),
    "keypoints": _percent("keypoint AP", "keypoint AP"),
}
"""Of COCO's evaluation, by its name of the task."""
