"""What leaks through the normalization batches of any detector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import nn

from ..detectors import Detector, Sample, detector_of, find_maps, in_roi_heads
from ..leakage import DetectionReport, measure_detections
from ..norm import tracks_statistics
from ..population import untouched
from .images import Data, Images, detections

# Of each window of images that are mixed, so that few of the rows are of the own worker.
_WORKERS = 8
_LEAST_WINDOWS = 2


def measure_leakage(
    model: nn.Module,
    data: Data,
    *,
    images_per_worker: int = 1,
    num_images: int = 256,
    modules: Sequence[str] | None = None,
    by_class: bool = False,
) -> DetectionReport:
    """The AP of a detector's own detections, by what its inference normalizes with.

    With the statistics of the own images; with those of as many random RoIs of other images; and
    with population statistics. The model is afterwards as it was.

    Args:
        model: a detector of torchvision, Detectron2 or another family with an adapter; or any
            module in torchvision's convention.
        data: ``(annotations.json, folder)``, the name of a dataset of Detectron2's, or a dataset or
            loader of images and targets. It needs labels.
        images_per_worker: images of a step of the training on one GPU, whose rows shared a batch.
        num_images: to use at most.
        modules: globs over the names of the BN layers to change; by default those of the ROI heads,
            or of a detector without such layers all.
        by_class: whether to report each class, too.

    Raises:
        ConfigError: there is no such file or dataset, or what is in it is wrong.
        ValueError: no labels, or images for less than two windows of two workers; or
            (:class:`bn_detection.detectors.FormError`) outputs of another form.
    """
    detector = detector_of(model)
    images = Images(data, detector, num_images)
    return measure(detector, images, images_per_worker, modules or default(model), by_class)


def default(model: nn.Module) -> list[str]:
    """Globs of the layers whose batches matter most."""
    layers = [name for name, layer in model.named_modules() if tracks_statistics(layer)]
    return [name for name in layers if in_roi_heads(model, name)] or ["*"]


def measure(
    detector: Detector,
    images: Images,
    images_per_worker: int,
    modules: Sequence[str],
    by_class: bool = False,
) -> DetectionReport:
    """As :func:`measure_leakage`, of images that are read."""
    if not images.have_labels:
        raise ValueError(f"{images.name}: images without labels have no AP to compare.")
    workers = len(images) // images_per_worker
    window = min(max(workers // _LEAST_WINDOWS, 1), _WORKERS) * images_per_worker
    if workers < 2 * _LEAST_WINDOWS:
        raise ValueError(
            f"{images.name}: {len(images)} images are {workers} workers of {images_per_worker}, "
            f"and at least {2 * _LEAST_WINDOWS} workers are needed."
        )
    if not detector.maps_are_images:
        with untouched(detector.model):
            detector.model.eval()
            layers = {n: m for n, m in detector.model.named_modules() if tracks_statistics(m)}
            find_maps(detector, layers, list(islice(images, 2)))
    truth = images.truth()
    categories = {category["id"] for category in truth["categories"]}
    masks = bool(truth["annotations"]) and all("segmentation" in x for x in truth["annotations"])

    def detect(batch: Sequence[Sample]) -> list[dict[str, Any]]:
        found = detections(detector, batch, masks=masks)
        return [item for item in found if item["category_id"] in categories]

    return measure_detections(
        detector.model,
        images.batches(window),
        detect,
        truth,
        ("image" if images_per_worker == 1 else "worker", "shuffle", "population"),
        modules=modules,
        images_per_worker=images_per_worker,
        dataset=images.name,
        by_class=by_class,
    )
