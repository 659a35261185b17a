"""The leakage probe: a detector's second stage on fixed RoIs, with other normalization batches.

After *Rethinking "Batch" in BatchNorm* (Wu & Johnson 2021), Sec. 5 on leakage between the RoIs of
an image: only the normalization batch changes, so what changes in the outputs came through it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..config import ConfigError
from ..data import LeakyShapesConfig
from ..estimate import Estimate, Ratio, resample
from ..metrics import PROBE
from ..population import untouched
from .average_precision import AveragePrecision
from .batches import MODES, batch_norms, normalization_batches, normalizing, run_in_batches
from .limits import LimitComparison, compare_with_limit, leaky_shapes_config
from .rois import (
    ImageRois,
    coco_objects,
    labelled_images,
    receptive_margin,
    sample_rois,
    sees_one_object,
)

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
# Own batches are compared with RoIs that come from at least so many workers.
_LEAST_WORKERS = 4
_MASK = "roi_heads.mask_head"

Metric = Callable[[np.ndarray], np.ndarray]
Metrics = dict[str, Estimate]


@dataclass(frozen=True)
class LeakageReport:
    """What the probe measured; percent, and nats for losses.

    Attributes:
        dataset: its name.
        images: how many were used.
        rois: of all images.
        foreground_rois: likewise.
        images_per_worker: that share a batch in the mode "own_worker".
        batch_norms: names of the layers whose batch was changed; if empty, all modes are equal.
        batch_sizes: mean number of RoIs of a normalization batch of the box head, by mode.
        modes: metrics by mode.
        leakage: own worker minus shuffled: what the head reads from the RoIs of its own images.
        inconsistency: own worker minus population: what it loses at inference.
        limit: on LeakyShapes, the accuracy of "own_worker" against the best possible from one
            object; None elsewhere, and where no RoI sees one object alone.
        left_out: by name, why a head that has BN was not measured.
    """

    dataset: str
    images: int
    rois: int
    foreground_rois: int
    images_per_worker: int
    batch_norms: list[str]
    batch_sizes: dict[str, float]
    modes: dict[str, Metrics]
    leakage: Metrics
    inconsistency: Metrics
    limit: LimitComparison | None
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers; null for what there is none of."""
        return _plain(vars(self))

    def text(self) -> str:
        """For a terminal: the table, and how to read it."""
        changed = len(self.batch_norms)
        about = (
            f"{self.dataset}: {self.images} images, {self.rois} RoIs of the training sampler, "
            f"{self.foreground_rois} of them foreground. {changed} layers normalize with other "
            f"batches: the RoIs of an image, those of a worker's images (images a worker: "
            f"{self.images_per_worker}), as many of random images; and with population statistics."
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
        return text

    def table(self, style: str = "simple") -> str:
        """A row a mode and a difference, a column a metric.

        Args:
            style: of the package ``tabulate``.
        """
        rows = {**self.modes, "leakage": self.leakage, "inconsistency": self.inconsistency}
        names = {"leakage": "leakage = own_worker - shuffled"}
        names["inconsistency"] = "inconsistency = own_worker - population"
        metrics = list(self.leakage)
        body = [
            (
                names.get(row, row),
                *(values[metric].text(PROBE[metric].decimals) for metric in metrics),
            )
            for row, values in rows.items()
        ]
        titles = (PROBE[metric].title for metric in metrics)
        return tabulate(body, ("normalization batch", *titles), style)


def measure_leakage(cfg: CfgNode, model: nn.Module, *, num_workers: int = 1) -> LeakageReport:
    """Evaluate a detector's second stage with four kinds of normalization batch.

    The RoIs are those that training would sample from the labelled images of ``DATASETS.TEST[0]``,
    resized as inference does, the same for all modes. The model, and the random number generators,
    are afterwards as they were.

    Args:
        cfg: with the keys of :func:`bn_detection.add_bn_detection_config`; ``BN.LEAKAGE`` says how
            many images.
        model: a ``GeneralizedRCNN`` with ``StandardROIHeads``, of ``cfg``, its weights loaded.
        num_workers: of the training, to tell the images of a worker from SOLVER.IMS_PER_BATCH,
            where neither BN.LEAKAGE.IMAGES_PER_WORKER nor BN.VIRTUAL_WORKERS does.

    Raises:
        ConfigError: a model without such a second stage, named by its class; a dataset without
            labels or with too few images; outputs that are not finite; a wrong key.
    """
    check_probe(cfg, model)
    per_worker = images_per_worker(cfg, num_workers)
    records = _choose(cfg, per_worker)
    name, heads = cfg.DATASETS.TEST[0], model.roi_heads
    left_out = _left_out(heads, name, records)
    mask = heads.mask_head if _has_bn(heads, "mask") and _MASK not in left_out else None
    modes = _distinct_modes(_box_head(heads), mask, per_worker)
    scores = _Scores(model, mask, modes, per_worker)
    rois = sample_rois(cfg, model, records, masks=mask is not None)
    with untouched(model), torch.no_grad(), closing(rois):
        model.eval()
        scores.look_for_limit(name)
        for window in _windows(rois, len(records), per_worker, cfg.BN.LEAKAGE.SHUFFLED_IMAGES):
            scores.add(window)
    return scores.report(name, left_out, cfg.BN.LEAKAGE.RESAMPLES)


def check_probe_config(cfg: CfgNode) -> None:
    """Refuse a config that the probe cannot use, whatever the model.

    Raises:
        ConfigError: names the key.
    """
    node = cfg.BN.LEAKAGE
    least = {"NUM_IMAGES": 0, "IMAGES_PER_WORKER": 0, "SHUFFLED_IMAGES": 1, "RESAMPLES": 1}
    for key, minimum in least.items():
        if node[key] < minimum:
            raise ConfigError(f"BN.LEAKAGE.{key} {node[key]}: it must be at least {minimum}.")
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: the probe takes its labelled images from there.")


def check_probe(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse what the probe cannot measure.

    Raises:
        ConfigError: names the class or key.
    """
    check_probe_config(cfg)
    heads = getattr(model, "roi_heads", None)
    parts = {
        "the model": (model, GeneralizedRCNN),
        "its proposal generator": (getattr(model, "proposal_generator", None), RPN),
        "its ROI heads": (heads, StandardROIHeads),
        "its box predictor": (getattr(heads, "box_predictor", None), FastRCNNOutputLayers),
    }
    for what, (part, needed) in parts.items():
        if not isinstance(part, needed) or isinstance(part, CascadeROIHeads):
            raise ConfigError(
                f"The leakage probe measures a second stage on RoIs: {what} must be a "
                f"{needed.__name__} (and no CascadeROIHeads), and is a {type(part).__name__}."
            )
    if getattr(heads.box_predictor, "use_sigmoid_ce", False):
        raise ConfigError(
            "The leakage probe reports the softmax cross entropy of the classes, and the box "
            "predictor has a sigmoid for each (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True)."
        )


def images_per_worker(cfg: CfgNode, num_workers: int) -> int:
    """Images whose RoIs share a normalization batch in the mode "own_worker".

    BN.LEAKAGE.IMAGES_PER_WORKER, or SOLVER.IMS_PER_BATCH, scaled as Detectron2 does with
    SOLVER.REFERENCE_WORLD_SIZE, over the (virtual) workers.

    Raises:
        ConfigError: the images cannot be divided among the workers.
    """
    if cfg.BN.LEAKAGE.IMAGES_PER_WORKER:
        return cfg.BN.LEAKAGE.IMAGES_PER_WORKER
    workers, images = cfg.BN.VIRTUAL_WORKERS or num_workers, cfg.SOLVER.IMS_PER_BATCH
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers
    per_worker, left = divmod(images * num_workers, reference * workers)
    if left:
        scaled = "" if reference == num_workers else f" (SOLVER.REFERENCE_WORLD_SIZE {reference})"
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {images}{scaled} cannot be divided among the {workers} workers "
            "of the training; set BN.LEAKAGE.IMAGES_PER_WORKER."
        )
    return per_worker


def _choose(cfg: CfgNode, per_worker: int) -> list[dict[str, Any]]:
    """Evenly spaced labelled images, as many as fill some workers."""
    name, wanted = cfg.DATASETS.TEST[0], cfg.BN.LEAKAGE.NUM_IMAGES
    records = labelled_images(cfg, name)
    number = min(wanted or len(records), len(records)) // per_worker * per_worker
    if number < 2 * per_worker:
        raise ConfigError(
            f'DATASETS.TEST "{name}" with BN.LEAKAGE.NUM_IMAGES {wanted}: {len(records)} images '
            f"have labels, and with {per_worker} images a worker (BN.LEAKAGE.IMAGES_PER_WORKER) "
            f"the probe needs {2 * per_worker} or more."
        )
    return [records[i] for i in np.arange(number) * len(records) // number]


def _windows(
    rois: Iterator[ImageRois], expected: int, per_worker: int, shuffled_images: int
) -> Iterator[list[ImageRois]]:
    """Images to shuffle together: workers divided evenly into parts of about the wanted size."""
    workers = expected // per_worker
    number = max(workers // max(shuffled_images // per_worker, _LEAST_WORKERS), 1)
    last_logged = start = time.monotonic()
    done = 0
    for k in range(number):
        size = (workers * (k + 1) // number - workers * k // number) * per_worker
        window = list(islice(rois, size))
        # An image that could not be read leaves its worker incomplete.
        window = window[: len(window) // per_worker * per_worker]
        if window:
            yield window
        done += size
        now = time.monotonic()
        if now - last_logged > _LOG_SECONDS:
            last_logged = now
            left = (now - start) / done * (expected - done)
            logger.info("%d of %d images, about %.0f s left", done, expected, left)


def _box_head(heads: nn.Module) -> nn.Module:
    return nn.Sequential(heads.box_head, heads.box_predictor)


def _has_bn(heads: nn.Module, kind: str) -> bool:
    return getattr(heads, f"{kind}_on") and bool(batch_norms(getattr(heads, f"{kind}_head")))


def _left_out(heads: nn.Module, dataset: str, records: list[dict[str, Any]]) -> dict[str, str]:
    """By name, why a head that has BN cannot be measured."""
    reasons = {}
    if _has_bn(heads, "mask"):
        objects = [item for record in records for item in record["annotations"]]
        without = sum("segmentation" not in item for item in objects)
        if heads.mask_pooler is None or not isinstance(heads.mask_head, BaseMaskRCNNHead):
            reasons[_MASK] = (
                f"it is a {type(heads.mask_head).__name__}, and the probe measures mask heads on "
                "pooled RoI features with the layers of Detectron2's BaseMaskRCNNHead."
            )
        elif without:
            reasons[_MASK] = f'{without} of {len(objects)} objects of "{dataset}" have no mask.'
    if _has_bn(heads, "keypoint"):
        reasons["roi_heads.keypoint_head"] = "the probe measures box and mask heads."
    return reasons


def _distinct_modes(box: nn.Module, mask: nn.Module | None, per_worker: int) -> dict[str, str]:
    """By mode, the mode that is computed for it: the same one where both are the same."""
    if not batch_norms(box) and mask is None:
        return dict.fromkeys(MODES, "population")
    return {
        mode: "own_worker" if mode == "own_image" and per_worker == 1 else mode for mode in MODES
    }


class _OfMode:
    """What is kept of each image in a mode."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.boxes: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []
        self.batch_sizes: list[int] = []

    def put(self, name: str, of_images: Iterable[float]) -> None:
        self.sums.setdefault(name, []).extend(of_images)


class _Scores:
    """Collects the results of each image, and makes the report of them."""

    def __init__(
        self, model: nn.Module, mask: nn.Module | None, modes: dict[str, str], per_worker: int
    ) -> None:
        self._model, self._heads = model, model.roi_heads
        self._box, self._mask = _box_head(self._heads), mask
        self._modes, self._per_worker = modes, per_worker
        self._of = {mode: _OfMode() for mode in dict.fromkeys(modes.values())}
        self._images: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []
        self._counts: list[tuple[int, int]] = []
        self._dials: LeakyShapesConfig | None = None
        self._margin = 0
        self._alone: list[int] = []
        self._windows = 0
        layers = {"roi_heads.box_head": self._heads.box_head}
        layers["roi_heads.box_predictor"] = self._heads.box_predictor
        layers |= {_MASK: mask} if mask is not None else {}
        self._names = [
            f"{head}.{n}" for head, module in layers.items() for n in batch_norms(module)
        ]

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
        batch = _Window(window, self._images[first:])
        if self._dials is not None:
            alone = [sees_one_object(image, self._margin) for image in window]
            self._alone += [int(of_image.sum()) for of_image in alone]
            batch.alone = torch.cat(alone)
        for mode, kept in self._of.items():
            logits, deltas = self._run(self._box, batch.box_features, batch.counts, mode, kept)
            kept_boxes = self._score_boxes(batch, logits, deltas, kept)
            if self._mask is not None and sum(batch.foreground_counts):
                (masks,) = self._run(
                    self._mask, batch.mask_features, batch.foreground_counts, mode, None
                )
                self._score_masks(batch, masks, kept_boxes, kept)
            elif self._mask is not None:
                for name in ("mask_correct", "mask_loss", "pixels"):
                    kept.put(name, [0] * len(window))
        self._windows += 1

    def _run(
        self,
        head: nn.Module,
        features: Tensor,
        counts: list[int],
        mode: str,
        kept: _OfMode | None,
    ) -> tuple[Tensor, ...]:
        batches = normalization_batches(mode, counts, self._per_worker, self._windows)
        if kept is not None:
            kept.batch_sizes += [len(rows) for rows in batches]
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
        self, batch: _Window, logits: Tensor, deltas: Tensor, kept: _OfMode
    ) -> list[tuple[Instances, Tensor]]:
        loss = cross_entropy(logits, batch.classes, reduction="none").double()
        correct = (logits.argmax(1) == batch.classes) & batch.foreground
        values = {"loss": loss, "correct": correct, "alone_correct": correct & batch.alone}
        for name, of_rois in values.items():
            kept.put(name, (of_image.sum().item() for of_image in of_rois.split(batch.counts)))
        found, rows = self._heads.box_predictor.inference((logits, deltas), batch.proposals)
        for image, instances in zip(batch.images, found, strict=True):
            copied = Instances(instances.image_size, **instances.get_fields())
            copied.pred_boxes = instances.pred_boxes.clone()
            kept.boxes += _box_detections(image, copied)
        return list(zip(found, rows, strict=True))

    def _score_masks(
        self,
        batch: _Window,
        masks: Tensor,
        found: list[tuple[Instances, Tensor]],
        kept: _OfMode,
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
            of_images = of_pixels.sum((1, 2)).split(batch.foreground_counts)
            kept.put(name, (of_image.sum().item() for of_image in of_images))
        of_images = masks.split(batch.foreground_counts)
        everything = zip(batch.images, batch.window, found, of_images, strict=True)
        for image, rois, (instances, of_rows), of_image in everything:
            kept.masks += _mask_detections(image, rois, instances, of_rows, of_image)

    def report(self, dataset: str, left_out: dict[str, str], resamples: int) -> LeakageReport:
        if len(self._images) < 2 * self._per_worker:
            raise ConfigError(
                f'DATASETS.TEST "{dataset}": {len(self._images)} images could be used; with '
                f"{self._per_worker} images a worker the probe needs {2 * self._per_worker}."
            )
        weights = resample(len(self._images), resamples)
        computed = {
            mode: {name: metric(weights) for name, metric in self._metrics(kept).items()}
            for mode, kept in self._of.items()
        }
        values = {mode: computed[source] for mode, source in self._modes.items()}

        def difference(other: str) -> Metrics:
            own = values["own_worker"]
            return {name: Estimate.of(own[name] - values[other][name]) for name in own}

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
            modes={
                mode: {name: Estimate.of(of) for name, of in metrics.items()}
                for mode, metrics in values.items()
            },
            leakage=difference("shuffled"),
            inconsistency=difference("population"),
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
        return compare_with_limit(self._dials, accuracy, rois)

    def _metrics(self, kept: _OfMode) -> dict[str, Metric]:
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


class _Window:
    """The RoIs of some images, together."""

    def __init__(self, window: list[ImageRois], images: Sequence[dict[str, Any]]) -> None:
        self.window, self.images = window, images
        self.proposals = [image.proposals for image in window]
        self.counts = [len(image.proposals) for image in window]
        self.box_features = torch.cat([image.box_features for image in window])
        self.classes = torch.cat([image.proposals.gt_classes for image in window])
        self.foreground = torch.cat([image.foreground for image in window])
        self.foreground_counts = [int(image.foreground.sum()) for image in window]
        self.mask_features: Tensor | None = None
        if window[0].mask_features is not None:
            self.mask_features = torch.cat([image.mask_features for image in window])
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


def _box_detections(image: dict[str, Any], found: Instances) -> list[dict[str, Any]]:
    found = detector_postprocess(found, image["height"], image["width"]).to("cpu")
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": image["id"], "bbox": box, "score": score, "category_id": category}
        for box, score, category in zip(
            boxes.tolist(), found.scores.tolist(), found.pred_classes.tolist(), strict=True
        )
    ]


def _mask_detections(
    image: dict[str, Any], rois: ImageRois, found: Instances, rows: Tensor, masks: Tensor
) -> list[dict[str, Any]]:
    """The detections that come from foreground RoIs, each with the mask of its RoI, in its box."""
    from_foreground = rois.foreground[rows]
    found, rows = found[from_foreground], rows[from_foreground]
    if not len(found):
        return []
    at = torch.cumsum(rois.foreground, 0)[rows] - 1
    channel = torch.zeros_like(at) if masks.shape[1] == 1 else found.pred_classes
    placed = Instances(
        found.image_size,
        pred_boxes=Boxes(rois.proposals.proposal_boxes.tensor[rows].clone()),
        scores=found.scores,
        pred_classes=found.pred_classes,
        pred_masks=masks[at, channel][:, None].sigmoid(),
    )
    placed = detector_postprocess(placed, image["height"], image["width"]).to("cpu")
    pixels = placed.pred_masks.numpy().astype(np.uint8).transpose(1, 2, 0)
    return [
        {"image_id": image["id"], "segmentation": mask, "score": score, "category_id": category}
        for mask, score, category in zip(
            rle.encode(np.asfortranarray(pixels)),
            placed.scores.tolist(),
            placed.pred_classes.tolist(),
            strict=True,
        )
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate | LimitComparison):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
