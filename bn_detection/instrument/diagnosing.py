"""A diagnosis of any detector."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from detectron2.config import get_cfg
from torch import nn

from ..config import add_bn_detection_config
from ..detectors import Detector, Sample, detector_of
from ..heads import HEADS, norm_layers
from ..leakage.diagnosis import Diagnosis
from ..leakage.findings import Examined, conclude, configured_rules, frozen_far, stale
from ..leakage.layers import batch_norms, inspect_layers, spans_workers
from ..leakage.trial import Trial, having, measure_trial
from ..population import (
    ROIS,
    PopulationStatistics,
    collect_statistics,
    mix_statistics,
    mixing_weight,
    quiet_collection,
    untouched,
)
from .images import Data, Images, detections
from .measuring import default, measure


def diagnose(
    model: nn.Module,
    data: Data,
    *,
    images_per_worker: int = 2,
    workers: int = 1,
    num_images: int = 256,
    thresholds: Sequence[tuple[str, float]] = (),
) -> Diagnosis:
    """Diagnose the BN layers of a detector: what hurts it, by how much, and what fixes it.

    The model is afterwards as it was. A model in eval mode is taken to be trained with all its
    layers in train mode; one in train mode as it is.

    Args:
        model: as in :func:`bn_detection.measure_leakage`.
        data: likewise. Without labels the AP by normalization batch is left out.
        images_per_worker: images of a step of the training on one GPU.
        workers: GPUs of the training.
        num_images: to use at most.
        thresholds: ``(id, number)`` each, in place of those of findings.

    Raises:
        ConfigError: there is no such file or dataset, or what is in it is wrong.
        ValueError: too few images for a batch; or
            (:class:`bn_detection.detectors.FormError`) outputs of another form.
        FloatingPointError: a layer saw a value that is not finite; names it.
    """
    start = time.monotonic()
    detector = detector_of(model)
    settings: dict[str, Any] = {
        "model": type(model).__name__,
        "weights": "as given",
        "family": type(detector).__name__,
        "workers": workers,
        "images_per_worker": images_per_worker,
    }
    layers, probe, left_out = [], None, []
    if batch_norms(model):
        images = Images(data, detector, num_images)
        settings["data"] = images.name
        rois = ROIS[0 if images.have_labels else 1]
        with untouched(model):
            if not model.training:
                model.train()
            together = workers if spans_workers(model) else 1
            size = images_per_worker * together
            if len(images) < 2 * size:
                raise ValueError(
                    f"{images.name}: {len(images)} images are no two batches of {size}."
                )
            with quiet_collection():  # the distances have intervals
                layers = inspect_layers(
                    model,
                    images.batches(size),
                    len(images) // size,
                    rois=rois,
                    forward=lambda _, batch: detector.forward(batch),
                )
        if any(layer.trains for layer in layers):
            try:
                probe = measure(detector, images, images_per_worker, default(model))
            except ValueError as error:
                left_out.append(f"The AP by normalization batch: {error}")
        else:
            left_out.append("The AP by normalization batch: no layer normalizes with a batch.")
        settings["statistics_from"] = f"{len(images)} images of {images.name}"
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    for key in HEADS:
        cfg.MODEL[key].NAME = ""
    cfg.BN.DIAGNOSIS.THRESHOLDS = [list(entry) for entry in thresholds]
    examined = Examined(
        cfg,
        layers,
        [name for name, _ in norm_layers(model)],
        None if probe is None else probe.to_json(),
        workers,
        False,
    )
    if layers and images.have_labels:
        try:
            examined = replace(examined, trials=_try(examined, detector, images, size))
        except ValueError as error:
            left_out.append(f"What other statistics give: {error}")
    findings, notes = conclude(examined)
    settings |= {
        "seconds": round(time.monotonic() - start),
        "versions": {"torch": torch.__version__},
    }
    of_python = [replace(finding, in_python=True) for finding in findings]
    return Diagnosis(settings, layers, probe, of_python, notes, left_out)


def _try(examined: Examined, detector: Detector, images: Images, size: int) -> dict[str, Trial]:
    """What statistics of the images give to layers whose own are far from them."""
    model, rules = detector.model, configured_rules(examined.cfg)
    weight = mixing_weight(len(images))
    cures = {
        "BN103": (stale(examined, rules["BN103"]), None),
        "BN302": (frozen_far(examined, rules["BN302"]), weight),
    }
    found = {}
    for name, (layers, mixing) in cures.items():
        if not layers:
            continue
        with untouched(model), quiet_collection():
            if not model.training:
                model.train()
            statistics = collect_statistics(
                model,
                images.batches(size),
                len(images) // size,
                modules=[layer.name for layer in layers],
                mixing=mixing,
                forward=lambda _, batch: detector.forward(batch),
            )
        if mixing is not None:
            statistics = mix_statistics(model, statistics, mixing)
        found[name] = _compare(detector, images, size, statistics)
    return found


def _compare(
    detector: Detector,
    images: Images,
    size: int,
    statistics: Mapping[str, PopulationStatistics],
) -> Trial:
    before = partial(detections, detector, masks=False)

    def after(batch: Sequence[Sample]) -> list[dict[str, Any]]:
        with having(detector.model, statistics):
            return before(batch)

    with untouched(detector.model):
        detector.model.eval()
        return measure_trial(images.batches(size), before, after, images.truth())
