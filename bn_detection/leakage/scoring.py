"""The second stage on windows of images, with every normalization batch, and its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..config import ConfigError
from ..data import LeakyShapesConfig
from ..estimate import Estimate, Ratio, resample
from .average_precision import AveragePrecision
from .batches import (
    MODES,
    batch_norms,
    normalization_batches,
    normalizing,
    own_shares,
    run_in_batches,
)
from .detections import box_detections, mask_detections
from .limits import LimitComparison, compare_with_limit, leaky_shapes_config
from .report import LeakageReport, Metrics
from .rois import ImageRois, coco_objects, receptive_margin, sees_one_object

MASK_HEAD = "roi_heads.mask_head"
Metric = Callable[[NDArray[np.int64]], NDArray[np.float64]]


class _Mode:
    """What is kept of each image in a mode."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.boxes: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []
        self.batch_sizes: list[int] = []
        self.own_shares: list[float] = []

    def put(self, name: str, of_images: Iterable[float]) -> None:
        self.sums.setdefault(name, []).extend(of_images)


class Scores:
    """Collects the results of each image, and makes the report of them."""

    def __init__(self, model: nn.Module, mask: nn.Module | None, per_worker: int) -> None:
        """
        Args:
            model: a ``GeneralizedRCNN`` with ``StandardROIHeads``, in eval mode.
            mask: its mask head, if that is measured.
            per_worker: images of a worker.
        """
        heads: Any = model.roi_heads
        self._model, self._heads, self._mask, self._per_worker = model, heads, mask, per_worker
        self._box = nn.Sequential(heads.box_head, heads.box_predictor)
        layers = {"roi_heads.box_head": heads.box_head}
        layers |= {"roi_heads.box_predictor": heads.box_predictor}
        layers |= {MASK_HEAD: mask} if mask is not None else {}
        self._names = [f"{head}.{n}" for head, part in layers.items() for n in batch_norms(part)]
        # By mode, the mode that is computed for it: one, where both are the same.
        self._modes = dict.fromkeys(MODES, "population")
        if self._names:
            self._modes = {mode: mode for mode in MODES}
            self._modes |= {"own_image": "own_worker"} if per_worker == 1 else {}
        self._of = {mode: _Mode() for mode in dict.fromkeys(self._modes.values())}
        self._images: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []
        self._counts: list[tuple[int, int]] = []
        self._dials: LeakyShapesConfig | None = None
        self._margin = 0
        self._alone: list[int] = []
        self._windows = 0
        self._window_of: list[int] = []

    def look_for_limit(self, dataset: str) -> None:
        """Note which RoIs see one object only, if the dataset's best accuracy is known."""
        self._dials = leaky_shapes_config(dataset)
        if self._dials is not None:
            self._margin = receptive_margin(
                self._model, self._dials.image_size, self._heads.box_in_features
            )

    def add(self, window: list[ImageRois]) -> None:
        """Run the heads on a window of images, in every mode."""
        first = len(self._images)
        for number, image in enumerate(window, first):
            height, width = image.record.get("height"), image.record.get("width")
            size = (height, width) if height else image.proposals.image_size
            self._images.append({"id": number, "height": size[0], "width": size[1]})
            self._objects += coco_objects(number, image.record, self._mask is not None)
            self._counts.append((len(image.proposals), int(image.foreground.sum())))
        batch = Window(window, self._images[first:])
        if self._dials is not None:
            alone = [sees_one_object(image, self._margin) for image in window]
            self._alone += [int(of_image.sum()) for of_image in alone]
            batch.alone = torch.cat(alone)
        for mode, kept in self._of.items():
            logits, deltas = self._run(self._box, batch.box_features, batch.counts, mode, kept)
            kept_boxes = self._score_boxes(batch, logits, deltas, kept)
            if self._mask is not None and any(batch.foreground_counts):
                (masks,) = self._run(
                    self._mask, batch.mask_features, batch.foreground_counts, mode, None
                )
                self._score_masks(batch, masks, kept_boxes, kept)
            elif self._mask is not None:
                for name in ("mask_correct", "mask_loss", "pixels"):
                    kept.put(name, [0] * len(window))
        self._window_of += [self._windows] * len(window)
        self._windows += 1

    def _run(
        self,
        head: Any,
        features: Tensor,
        counts: list[int],
        mode: str,
        kept: _Mode | None,
    ) -> tuple[Tensor, ...]:
        batches = normalization_batches(mode, counts, self._per_worker, self._windows)
        if kept is not None:
            kept.batch_sizes += [len(rows) for rows in batches]
            kept.own_shares += own_shares(batches, counts, self._per_worker)
        is_mask = head is self._mask

        def layers(x: Tensor) -> tuple[Tensor, ...]:
            return (head.layers(x),) if is_mask else head(x)

        with normalizing(head, mode):
            outputs = run_in_batches(layers, features, batches)
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise ConfigError(
                f"MODEL.WEIGHTS: the {'mask' if is_mask else 'box'} head's outputs are not finite "
                f'with the normalization batch "{mode}". The weights may have diverged.'
            )
        return outputs

    def _score_boxes(
        self, batch: Window, logits: Tensor, deltas: Tensor, kept: _Mode
    ) -> list[tuple[Instances, Tensor]]:
        loss = cross_entropy(logits, batch.classes, reduction="none").double()
        correct = (logits.argmax(1) == batch.classes) & batch.foreground
        values = {"loss": loss, "correct": correct, "alone_correct": correct & batch.alone}
        for name, of_rois in values.items():
            kept.put(
                name, (of_image.sum().item() for of_image in torch.split(of_rois, batch.counts))
            )
        found, rows = self._heads.box_predictor.inference((logits, deltas), batch.proposals)
        for image, instances in zip(batch.images, found, strict=True):
            copied = Instances(instances.image_size, **instances.get_fields())
            copied.pred_boxes = instances.pred_boxes.clone()
            kept.boxes += box_detections(image, copied)
        return list(zip(found, rows, strict=True))

    def _score_masks(
        self,
        batch: Window,
        masks: Tensor,
        found: list[tuple[Instances, Tensor]],
        kept: _Mode,
    ) -> None:
        classes = batch.classes[batch.foreground]
        agnostic = masks.shape[1] == 1
        rows = torch.arange(len(masks), device=masks.device)
        logits = masks[rows, torch.zeros_like(classes) if agnostic else classes]
        targets = batch.mask_targets(masks.shape[-1])
        loss = binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
        values = {
            "mask_loss": loss.double(),
            "mask_correct": (logits > 0) == targets,
            "pixels": torch.ones_like(targets),
        }
        for name, of_pixels in values.items():
            of_images = torch.split(of_pixels.sum((1, 2)), batch.foreground_counts)
            kept.put(name, (of_image.sum().item() for of_image in of_images))
        of_images = torch.split(masks, batch.foreground_counts)
        everything = zip(batch.images, batch.window, found, of_images, strict=True)
        for image, rois, (instances, of_rows), of_image in everything:
            kept.masks += mask_detections(image, rois, instances, of_rows, of_image)

    def report(self, dataset: str, left_out: dict[str, str], resamples: int) -> LeakageReport:
        if len(self._images) < 2 * self._per_worker:
            raise ConfigError(
                f'DATASETS.TEST "{dataset}": {len(self._images)} images could be used; with '
                f"{self._per_worker} images a worker the probe needs {2 * self._per_worker}."
            )
        weights = resample(self._windows, resamples)[:, self._window_of]
        computed = {
            mode: {name: metric(weights) for name, metric in self._metrics(kept).items()}
            for mode, kept in self._of.items()
        }
        values = {mode: computed[source] for mode, source in self._modes.items()}
        estimate = partial(Estimate.of, units=self._windows)

        def difference(one: str, other: str) -> Metrics:
            first, second = values[one], values[other]
            return {name: estimate(first[name] - second[name]) for name in first}

        rois, foreground = np.array(self._counts).sum(0).tolist()
        return LeakageReport(
            dataset=dataset,
            images=len(self._images),
            rois=rois,
            foreground_rois=foreground,
            images_per_worker=self._per_worker,
            batch_norms=self._names,
            batch_sizes={
                mode: float(np.mean(self._of[source].batch_sizes))
                for mode, source in self._modes.items()
            },
            own_shares={
                mode: 100 * float(np.mean(self._of[source].own_shares))
                for mode, source in self._modes.items()
            },
            windows=self._windows,
            modes={
                mode: {name: estimate(of) for name, of in metrics.items()}
                for mode, metrics in values.items()
            },
            leakage=difference("own_worker", "shuffled"),
            inconsistency=difference("own_worker", "population"),
            staleness=difference("shuffled", "population"),
            limit=self._limit(weights),
            left_out=left_out,
        )

    def _limit(self, weights: np.ndarray) -> LimitComparison | None:
        rois = sum(self._alone)
        if self._dials is None or rois == 0:
            return None
        own = self._of[self._modes["own_worker"]]
        correct = np.array(own.sums["alone_correct"])
        accuracy = Ratio(100 * correct, np.array(self._alone))(weights)
        return compare_with_limit(self._dials, accuracy, rois, self._windows)

    def _metrics(self, kept: _Mode) -> dict[str, Metric]:
        rois, foreground = np.array(self._counts).T
        sums = {name: np.array(values) for name, values in kept.sums.items()}
        num_classes = self._heads.num_classes

        def ap(detections: list[dict[str, Any]], iou_type: str) -> Metric:
            return AveragePrecision(self._images, self._objects, detections, num_classes, iou_type)

        metrics: dict[str, Metric] = {
            "accuracy": Ratio(100 * sums["correct"], foreground),
            "loss": Ratio(sums["loss"], rois),
            "box_ap": ap(kept.boxes, "bbox"),
        }
        if self._mask is not None:
            metrics["mask_accuracy"] = Ratio(100 * sums["mask_correct"], sums["pixels"])
            metrics["mask_loss"] = Ratio(sums["mask_loss"], sums["pixels"])
            metrics["mask_ap"] = ap(kept.masks, "segm")
        return metrics


class Window:
    """The RoIs of some images, together."""

    def __init__(self, window: list[ImageRois], images: Sequence[dict[str, Any]]) -> None:
        self.window, self.images = window, images
        self.proposals = [image.proposals for image in window]
        self.counts = [len(image.proposals) for image in window]
        self.box_features = torch.cat([image.box_features for image in window])
        self.classes = torch.cat([image.proposals.gt_classes for image in window])
        self.foreground = torch.cat([image.foreground for image in window])
        self.foreground_counts = [int(image.foreground.sum()) for image in window]
        of_masks = [x.mask_features for x in window if x.mask_features is not None]
        self.mask_features = torch.cat(of_masks) if of_masks else self.box_features[:0]
        self.alone = torch.zeros_like(self.foreground)
        self._targets: Tensor | None = None

    def mask_targets(self, side: int) -> Tensor:
        """Bool ``(F, side, side)``, as training crops them."""
        if self._targets is None:
            parts = []
            for image in self.window:
                matched = image.proposals[image.foreground]
                if len(matched):
                    boxes = matched.proposal_boxes.tensor
                    parts.append(matched.gt_masks.crop_and_resize(boxes, side).to(boxes.device))
            self._targets = torch.cat(parts)
        return self._targets
