"""What other population statistics are worth: the AP of a detector with its own and with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..estimate import Estimate, resample
from ..population import PopulationStatistics, apply_statistics, untouched
from .average_precision import mean_of_classes
from .comparison import plain
from .on_detections import (
    Detections,
    Truth,
    ap_by_class,
    checked,
    image_id_of,
    load_truth,
    objects_of,
)

Detect = Callable[[list[Any]], Detections]


@dataclass(frozen=True)
class Trial:
    """The box AP of a detector's own detections, with its statistics and with others; percent.

    Attributes:
        images: that it was measured on.
        before: with the statistics that it has.
        after: with the others.
        gain: the difference; points. Intervals are over images.
    """

    images: int
    before: Estimate
    after: Estimate
    gain: Estimate

    def to_json(self) -> dict[str, Any]:
        """JSON types; null for what there is none of."""
        return {key: plain(value) for key, value in vars(self).items()}

    @property
    def text(self) -> str:
        """In a sentence."""
        return (
            f"Box AP with the statistics of these images: {self.after.text(1)}, with those that it "
            f"has {self.before.text(1)}: {'+' if self.gain.value > 0 else ''}{self.gain.text(1)} "
            "points"
        )


@torch.no_grad()
def measure_trial(
    batches: Iterable[list[Any]],
    before: Detect,
    after: Detect,
    truth: Truth,
    *,
    resamples: int = 1000,
    dataset: str = "",
) -> Trial:
    """Compare a detector with itself on the same images.

    Population statistics are those of no batch, so the units of the bootstrap are images.

    Args:
        batches: lists of images, as in :func:`bn_detection.leakage.measure_detections`.
        before: gives COCO's results of the detector as it is, likewise.
        after: those of the detector with other statistics.
        truth: COCO's annotations, likewise.
        resamples: for the 95 % intervals.
        dataset: its name, for messages.

    Raises:
        ValueError: there is no batch, or no object in its images; ids that ``truth`` lacks.
    """
    coco = load_truth(truth)
    found: tuple[Detections, Detections] = [], []
    ids: list[Any] = []
    for batch in batches:
        images = [image_id_of(image) for image in batch]
        ids += images
        for detect, results in zip((before, after), found, strict=True):
            results += checked(detect(batch), images, coco)
    objects_of(coco, ids, dataset)
    weights = resample(len(ids), resamples)
    old, new = (
        mean_of_classes(ap_by_class(coco, ids, results, weights)["box_ap"]) for results in found
    )
    return Trial(len(ids), *(Estimate.of(values, len(ids)) for values in (old, new, new - old)))


@contextmanager
def having(model: nn.Module, statistics: Mapping[str, PopulationStatistics]) -> Iterator[None]:
    """Let a model, in eval mode, have other population statistics for a while.

    Args:
        model: any module; its statistics, mode and the random number generators are restored.
        statistics: by name of the layer.
    """
    with untouched(model):
        apply_statistics(model, dict(statistics))
        model.eval()
        yield
