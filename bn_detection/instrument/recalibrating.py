"""Population statistics of any detector, estimated anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..detectors import detector_of
from ..notebook import preformatted
from ..population import (
    ROIS,
    apply_statistics,
    batch_norms_in_training,
    collect_statistics,
    describe_batch_norms,
    record_change,
    table_of_changes,
    untouched,
)
from .images import Data, Images


@dataclass(frozen=True)
class Recalibration:
    """What was estimated, and what it changed.

    Attributes:
        settings: on what, and how: by name.
        layers: what the statistics of each layer rest on, and what they changed, by its name.
        about: the layers, where none takes part.
    """

    settings: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]
    about: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON types; null for what is unknown."""
        layers = {name: dict(record) for name, record in self.layers.items()}
        return {"settings": dict(self.settings), "layers": layers}

    def text(self) -> str:
        """For a terminal."""
        if not self.layers:
            return f"Nothing was changed. {self.about}"
        return (
            f"Statistics of {len(self.layers)} layers from {self.settings['images']} images of "
            f"{self.settings['data']}. Change of the normalized values: root mean square over "
            "channels of their shift, (new mean - old) / old std, and of ln(new std / old std).\n"
            f"{table_of_changes({name: dict(record) for name, record in self.layers.items()})}"
        )

    def _repr_html_(self) -> str:
        return preformatted(self.text())


def recalibrate(
    model: nn.Module,
    data: Data,
    *,
    images_per_batch: int = 2,
    num_images: int = 256,
    modules: Sequence[str] = ("*",),
    rois: str | None = None,
    estimator: str = "pooled",
) -> Recalibration:
    """Estimate the population statistics of BN layers from images, and give them to the model.

    All else of the model is afterwards as it was.

    Args:
        model: as in :func:`bn_detection.measure_leakage`.
        data: likewise, or images without labels: a folder, or a loader of images.
        images_per_batch: in a forward; in their statistics layers normalize with the batch, as they
            do in training.
        num_images: to use at most.
        modules: globs over the names of the layers.
        rois: ``training``, the RoIs that training samples with the labels; or ``inference``, the
            proposals of the model. By default ``training`` where there are labels.
        estimator: one of :data:`bn_detection.population.ESTIMATORS`.

    Raises:
        ConfigError: there is no such file or dataset, or what is in it is wrong.
        ValueError: there are no images, or ``rois`` are of the training, and there are no labels.
        FloatingPointError: a layer saw a value that is not finite; the model keeps its statistics.
    """
    detector = detector_of(model)
    settings: dict[str, Any] = {"estimator": estimator, "modules": list(modules)}
    with untouched(model):
        if not model.training:
            model.train()
        layers = batch_norms_in_training(model, modules)
        if not layers:
            return Recalibration(settings, {}, describe_batch_norms(model))
        images = Images(data, detector, num_images)
        rois = rois or ROIS[0 if images.have_labels else 1]
        if rois == "training" and not images.have_labels:
            raise ValueError(
                f'{images.name} has no labels, and rois="training" are sampled with them. Leave '
                'rois out, or give rois="inference".'
            )
        size = min(images_per_batch, len(images))
        statistics = collect_statistics(
            model,
            images.batches(size),
            len(images) // size,
            modules=modules,
            estimator=estimator,
            rois=rois,
            forward=lambda _, batch: detector.forward(batch),
        )
    records = {name: record_change(layers[name], new) for name, new in statistics.items()}
    apply_statistics(model, statistics)
    used = len(images) // size * size
    settings |= {"data": images.name, "images": used, "images_per_batch": size, "rois": rois}
    return Recalibration(settings, records)
