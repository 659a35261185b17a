"""The second stage on windows of images, with every normalization batch, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from torch import nn

from ..config import ConfigError
from ..data import LeakyShapesConfig
from ..estimate import Ratio, resample
from .average_precision import AveragePrecision, mean_of_classes
from .batches import MODES, own_shares
from .by_class import ClassLeakage, leakages_by_class
from .by_layer import FOREIGN, OWN
from .comparison import Values, compared
from .detections import box_detections, mask_detections
from .limits import LimitComparison, compare_with_limit, leaky_shapes_config
from .report import LeakageReport
from .rois import coco_objects, receptive_margin, sees_one_object
from .second_stage import MASK, Outputs, SecondStage
from .window import Sums, Window

_ByMetric = dict[str, np.ndarray]


class _Mode:
    """What is kept of each image in a mode."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.by_class: list[list[np.ndarray]] = []
        self.boxes: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []
        self.batch_sizes: list[int] = []
        self.own_shares: list[float] = []
        self.alone_correct: list[float] = []


class Scores:
    """Collects the results of each image, and makes the report of them."""

    def __init__(self, model: nn.Module, stage: SecondStage, per_worker: int) -> None:
        """
        Args:
            model: a ``GeneralizedRCNN``, in eval mode.
            stage: its second stage.
            per_worker: images of a worker.
        """
        self._model, self._stage, self._per_worker = model, stage, per_worker
        # By mode, the mode that is computed for it: one, where both are the same.
        self._modes = dict.fromkeys(MODES, "population")
        if stage.all_layers:
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
                self._model, self._dials.image_size, self._stage.in_features
            )

    def add(self, window: Window) -> None:
        """Run the heads on a window of images, in every mode."""
        first = len(self._images)
        for number, image in enumerate(window.images, first):
            height, width = image.record.get("height"), image.record.get("width")
            size = (height, width) if height else image.proposals.image_size
            self._images.append({"id": number, "height": size[0], "width": size[1]})
            self._objects += coco_objects(number, image.record, MASK in self._stage.layers)
            self._counts.append((len(image.proposals), int(image.foreground.sum())))
        alone = None
        if self._dials is not None:
            of_images = [sees_one_object(image, self._margin) for image in window.images]
            self._alone += [int(of_image.sum()) for of_image in of_images]
            alone = torch.cat(of_images)
        for mode, kept in self._of.items():
            divisions = dict.fromkeys(self._stage.all_layers, mode)
            outputs = window.run(divisions)
            kept.sums.put(window.scores(outputs))
            kept.by_class.append(window.correct_by_class(outputs))
            self._detect(window, self._images[first:], outputs, kept)
            first_part = self._stage.boxes[0]
            batches, counts = window.batches(first_part, mode)
            kept.batch_sizes += [len(rows) for rows in batches]
            kept.own_shares += own_shares(batches, counts, self._per_worker)
            if alone is not None:
                correct = window.correct(first_part, outputs[first_part])
                kept.alone_correct += window.by_image(first_part, correct & alone)
        self._window_of += [self._windows] * len(window.images)
        self._windows += 1

    def _detect(
        self,
        window: Window,
        images: Sequence[dict[str, Any]],
        outputs: Mapping[str, Outputs],
        kept: _Mode,
    ) -> None:
        found = self._stage.detections(
            [outputs[part] for part in self._stage.boxes],
            [window.instances[part] for part in self._stage.boxes],
        )
        for image, (instances, _) in zip(images, found, strict=True):
            copied = Instances(instances.image_size, **instances.get_fields())
            copied.pred_boxes = instances.pred_boxes.clone()
            kept.boxes += box_detections(image, copied)
        if MASK in outputs:
            masks = torch.split(outputs[MASK][0], window.foreground_counts)
            for image, rois, (instances, rows), of_image in zip(
                images, window.images, found, masks, strict=True
            ):
                kept.masks += mask_detections(image, rois, instances, rows, of_image)

    def report(self, dataset: str, resamples: int, *, by_class: bool) -> LeakageReport:
        if len(self._images) < 2 * self._per_worker:
            raise ConfigError(
                f'DATASETS.TEST "{dataset}": {len(self._images)} images could be used; with '
                f"{self._per_worker} images a worker the probe needs {2 * self._per_worker}."
            )
        weights = resample(self._windows, resamples)[:, self._window_of]
        computed = {mode: self._values(kept, weights) for mode, kept in self._of.items()}
        values, of_classes = (
            {mode: computed[source][k] for mode, source in self._modes.items()} for k in (0, 1)
        )
        rois, foreground = np.array(self._counts).sum(0).tolist()
        return LeakageReport(
            dataset=dataset,
            images=len(self._images),
            rois=rois,
            foreground_rois=foreground,
            images_per_worker=self._per_worker,
            batch_norms=list(self._stage.all_layers),
            batch_sizes={
                mode: float(np.mean(self._of[source].batch_sizes))
                for mode, source in self._modes.items()
            },
            own_shares={
                mode: 100 * float(np.mean(self._of[source].own_shares))
                for mode, source in self._modes.items()
            },
            windows=self._windows,
            **compared(values, OWN, FOREIGN, self._windows),
            limit=self._limit(weights),
            left_out=self._stage.left_out,
            by_class=self._by_class(dataset, of_classes) if by_class else (),
        )

    def _by_class(self, dataset: str, values: Values) -> list[ClassLeakage]:
        names = MetadataCatalog.get(dataset).get("thing_classes")
        objects = (
            (self._window_of[item["image_id"]], item["category_id"])
            for item in self._objects
            if not item["iscrowd"]
        )
        every = names or list(map(str, range(self._stage.num_classes)))
        return leakages_by_class(values, OWN, FOREIGN, every, objects)

    def _limit(self, weights: np.ndarray) -> LimitComparison | None:
        rois = sum(self._alone)
        if self._dials is None or rois == 0:
            return None
        own = self._of[self._modes["own_worker"]]
        accuracy = Ratio(100 * np.array(own.alone_correct), np.array(self._alone))(weights)
        return compare_with_limit(self._dials, accuracy, rois, self._windows)

    def _values(self, kept: _Mode, weights: np.ndarray) -> tuple[_ByMetric, _ByMetric]:
        """Of all classes, ``(B,)``, and of each, ``(B, C)``."""

        def ap(detections: list[dict[str, Any]], iou_type: str) -> np.ndarray:
            return AveragePrecision(
                self._images, self._objects, detections, self._stage.num_classes, iou_type
            ).by_class(weights)

        of_classes = {"box_ap": ap(kept.boxes, "bbox")}
        if MASK in self._stage.layers:
            of_classes["mask_ap"] = ap(kept.masks, "segm")
        known = {name: metric(weights) for name, metric in kept.sums.metrics().items()}
        known |= {name: mean_of_classes(of) for name, of in of_classes.items()}
        first = ("accuracy", "loss", "box_ap")
        correct, rois = (np.concatenate(of) for of in zip(*kept.by_class, strict=True))
        return (
            {name: known[name] for name in dict.fromkeys((*first, *known))},
            {"accuracy": Ratio(100 * correct, rois)(weights), **of_classes},
        )
