"""COCO's AP of many bootstrap resamples of the images, matching each image once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

_EVERY_AREA = [0, 1e10]
_MOST_DETECTIONS = 100
# Numbers of one temporary array: what fits into a processor's cache, nearly.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Class:
    """The detections of a class, by falling score, and its objects."""

    image: np.ndarray  # (D,) the image of a detection
    matched: np.ndarray  # (T, D) whether it finds an object, by IoU threshold
    ignored: np.ndarray  # (T, D) whether it counts for nothing
    objects: np.ndarray  # (I,) objects of an image


class AveragePrecision:
    """AP by COCO's definition, as a function of how often each image counts.

    The mean, over classes with objects, IoU thresholds 0.50:0.05:0.95 and 101 recalls, of the
    interpolated precision (Lin et al. 2014; pycocotools' ``COCOeval``, area "all", 100 detections).
    Counting an image w times gives what pycocotools gives for w copies of it, apart from the order
    of detections with equal scores.
    """

    def __init__(
        self,
        images: Sequence[dict[str, Any]],
        objects: Sequence[dict[str, Any]],
        detections: Sequence[dict[str, Any]],
        num_classes: int,
        iou_type: str,
    ) -> None:
        """
        Args:
            images: with ``id`` 0, 1, ..., ``height`` and ``width``.
            objects: ground truth in COCO's format, ``category_id`` from 0.
            detections: with ``image_id``, ``category_id``, ``score``, and ``bbox`` (XYWH, px) or
                ``segmentation`` (RLE).
            num_classes: of the dataset.
            iou_type: "bbox" or "segm".
        """
        categories = [{"id": c} for c in range(num_classes)]
        truth, found = (
            _coco(images, items, categories, iou_type) for items in (objects, detections)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            matching = COCOeval(truth, found, iou_type)
            matching.params.areaRng, matching.params.areaRngLbl = [_EVERY_AREA], ["all"]
            matching.params.maxDets = [_MOST_DETECTIONS]
            matching.evaluate()
        self._recalls = matching.params.recThrs
        num_images, results = len(images), matching.evalImgs
        self._classes = [
            _class(results[c * num_images : (c + 1) * num_images], num_images)
            for c in range(num_classes)
        ]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """
        Args:
            weights: int ``(B, I)``, how often each image counts.

        Returns:
            ``(B,)``, in percent; NaN where no object counts.
        """
        return mean_of_classes(self.by_class(weights))

    def by_class(self, weights: np.ndarray) -> np.ndarray:
        """
        Args:
            weights: int ``(B, I)``, how often each image counts.

        Returns:
            ``(B, C)``, in percent; NaN where no object of the class counts.
        """
        values = np.full((len(weights), len(self._classes)), np.nan)
        for c, found in enumerate(self._classes):
            objects = weights @ found.objects
            of_class = 100 * self._of_class(found, weights, objects)
            values[:, c] = np.where(objects > 0, of_class, np.nan)
        return values

    def _of_class(self, found: _Class, weights: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """``(B,)``, from 0 to 1; 0 where there are no objects."""
        ap = np.zeros(len(weights))
        if not found.matched.any():
            return ap
        rows = max(_CHUNK // len(found.image), 1)
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            ap[part] = self._of_rows(found, weights[part], objects[part])
        return ap

    def _of_rows(self, found: _Class, weights: np.ndarray, objects: np.ndarray) -> np.ndarray:
        counts = weights[:, found.image]
        seen = np.cumsum(counts, axis=1)
        total = np.zeros(len(weights))
        for matched, ignored in zip(found.matched, found.ignored, strict=True):
            # Recall rises, and so precision counts, at these detections alone.
            rises = np.flatnonzero(matched & ~ignored)
            if not len(rises):
                continue
            of = np.cumsum(counts * ~ignored, axis=1) if ignored.any() else seen
            true = np.cumsum(counts[:, rises], axis=1)
            precision = true / np.maximum(of[:, rises], 1)
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = self._reached(true, np.maximum(objects, 1)[:, None])
            total += (np.diff(reached, axis=1, prepend=0) * precision).sum(1)
        return np.where(objects > 0, total, 0) / (len(found.matched) * len(self._recalls))

    def _reached(self, true: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """How many of the recalls are reached, as by a search in them, which takes longer."""
        nearly = true * (len(self._recalls) - 1) // objects
        # Rounded, a recall may be above the fraction that it stands for.
        reached: np.ndarray = nearly + (self._recalls[nearly] <= true / objects)
        return reached


def mean_of_classes(values: np.ndarray) -> np.ndarray:
    """``(B,)`` of ``(B, C)``: of the classes with a value; NaN where none has one."""
    known = np.isfinite(values)
    mean = np.full(len(values), np.nan)
    np.divide(np.nansum(values, 1), known.sum(1), out=mean, where=known.any(1))
    return mean


def _coco(
    images: Sequence[dict[str, Any]],
    items: Sequence[dict[str, Any]],
    categories: list[dict[str, int]],
    iou_type: str,
) -> COCO:
    """An index of objects or detections, in pycocotools' own form."""
    annotations = []
    for number, item in enumerate(items, start=1):  # pycocotools takes an id of 0 for no match
        box = item.get("bbox", (0, 0, 0, 0))
        area = item.get("area", box[2] * box[3])
        annotations.append({"iscrowd": 0, **item, "id": number, "area": area})
    coco = COCO()
    coco.dataset = {
        "images": list(images),
        "annotations": annotations,
        "categories": categories,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _class(results: Sequence[dict[str, Any] | None], num_images: int) -> _Class:
    objects = np.zeros(num_images, np.int64)
    images, scores, matched, ignored = [], [], [], []
    for result in results:
        if result is None:
            continue
        image = result["image_id"]
        objects[image] = np.count_nonzero(np.asarray(result["gtIgnore"]) == 0)
        images.append(np.full(len(result["dtScores"]), image))
        scores.append(np.asarray(result["dtScores"], float))
        matched.append(np.asarray(result["dtMatches"]) > 0)
        ignored.append(np.asarray(result["dtIgnore"]) > 0)
    if not images:
        none = np.zeros((1, 0), bool)
        return _Class(np.zeros(0, np.int64), none, none, objects)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    return _Class(
        np.concatenate(images)[order],
        np.concatenate(matched, axis=1)[:, order],
        np.concatenate(ignored, axis=1)[:, order],
        objects,
    )
