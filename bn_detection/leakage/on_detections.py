"""The probe on detections: a detector's own AP, by what its inference normalizes with.

Only the normalization batch changes, so what changes in the AP came through it. The detector is any
that takes images and gives boxes: its proposals, and whatever follows them, are its own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from torch import Tensor, nn

from ..estimate import resample
from ..metrics import DETECTIONS, Metric
from ..norm import (
    ImagePartition,
    Partition,
    ShufflePartition,
    kept_inference,
    matches,
    set_inference,
    tracks_statistics,
)
from ..notebook import preformatted
from ..population import untouched
from .average_precision import AveragePrecision, mean_of_classes
from .by_class import ClassLeakage, by_class_table, leakages_by_class
from .comparison import Metrics, compared, plain
from .report import table_of

Truth: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | COCO"
Detections = list[dict[str, Any]]


@dataclass(frozen=True)
class DetectionReport:
    """What the probe on detections measured; percent.

    Attributes:
        on: what is measured: the detector's own detections.
        metrics: how they are named and shown.
        dataset: its name.
        images: how many were used.
        objects: that there are to find in them.
        images_per_worker: whose rows share a batch in "worker".
        batch_norms: names of the layers whose batch was changed; if empty, all modes are equal.
        windows: batches of images, which is what intervals are over.
        own_share: of the images of a window, those of a worker: mean, in percent.
        modes: metrics by what inference normalized with.
        leakage: own images (of a worker, where that was measured) minus shuffled.
        inconsistency: own images minus population: what it loses at inference.
        staleness: shuffled minus population: the part of it that is no leak.
        by_class: the same of each class that has objects, worst first, if that was measured.
    """

    on: ClassVar[str] = "detections"
    metrics: ClassVar[dict[str, Metric]] = DETECTIONS

    dataset: str
    images: int
    objects: int
    images_per_worker: int
    batch_norms: list[str]
    windows: int
    own_share: float
    modes: dict[str, Metrics]
    leakage: Metrics
    inconsistency: Metrics
    staleness: Metrics
    by_class: Sequence[ClassLeakage] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers; null for what there is none of."""
        return {"on": self.on} | {key: plain(value) for key, value in vars(self).items()}

    @property
    def about(self) -> str:
        """What was measured, and how to read it."""
        measured = (
            f"{self.dataset}: the AP of the detector's own detections in {self.images} images, "
            f"which have {self.objects} objects. "
        )
        if not self.batch_norms:
            return measured + (
                "The model has no BN layer whose batch could be changed, so all modes are equal: "
                "nothing leaks through its statistics."
            )
        return measured + (
            f"{len(self.batch_norms)} layers normalize with other batches: the RoIs (or feature "
            f"maps) of the own images (images a worker: {self.images_per_worker}), those of other "
            "images, and with population statistics. Of the images that are shuffled together, "
            f"{self.own_share:.0f} % are of the own worker. Intervals are over {self.windows} "
            "windows of images that share batches"
            + (", so there are none." if self.windows == 1 else ".")
        )

    def text(self) -> str:
        """For a terminal: what was measured, and the table."""
        text = f"{self.about}\n{self.table()}"
        if self.by_class:
            text += f"\n\nLeakage by class:\n\n{by_class_table(self.by_class, self.metrics)}"
        return text

    def _repr_html_(self) -> str:
        return preformatted(self.text())

    def table(self, style: str = "simple") -> str:
        """A row a mode and a difference, a column a metric.

        Args:
            style: of the package ``tabulate``.
        """
        own = _own(self.modes)
        differences = {
            f"leakage = {own} - shuffle": self.leakage,
            f"inconsistency = {own} - population": self.inconsistency,
            "staleness = shuffle - population": self.staleness,
        }
        return table_of(self.modes | differences, self.metrics, style)


def measure_detections(
    model: nn.Module,
    batches: Iterable[list[Any]],
    detect: Callable[[list[Any]], Detections],
    truth: Truth,
    partitions: Sequence[str] = ("image", "shuffle", "population"),
    *,
    modules: Sequence[str] = ("*",),
    images_per_worker: int = 1,
    resamples: int = 1000,
    dataset: str = "",
    image_id: Callable[[Any], Any] | None = None,
    by_class: bool = False,
) -> DetectionReport:
    """The AP of a detector's own detections, by what its inference normalizes with.

    Each batch is one forward, once for each of the partitions. The model, and the random number
    generators, are afterwards as they were.

    Args:
        model: the module that ``detect`` calls, whatever its mode; it runs in eval mode.
        batches: lists of images, in a random order: the images of a batch are mixed by "shuffle",
            so each should hold those of 8 workers or more, and a whole number of workers.
        detect: runs the model on a batch; gives COCO's results (``image_id``, ``category_id``,
            ``bbox`` as XYWH in px, ``score``, and ``segmentation`` where there are masks).
        truth: COCO's annotations: a file, its content, or the object that has read it. Images
            that no batch has do not count.
        partitions: what to compare: "population"; "image", the rows (RoIs, or feature maps) of an
            image; "worker", those of ``images_per_worker`` images, in order; "shuffle", as many
            random rows of all images of the batch (whole feature maps: of all images); or another
            of :func:`bn_detection.norm.inference_partition_names`.
        modules: globs over the names of the BN layers to change.
        images_per_worker: in training.
        resamples: for the 95 % intervals, of batches.
        dataset: its name, for the report.
        image_id: of an image of a batch, by default its ``["image_id"]``, or that of its target in
            a pair of image and target.
        by_class: whether to report each class, too.

    Raises:
        ValueError: there is no batch, or no object in its images; an unknown partition; ids that
            ``truth`` does not have; rows of which nothing says the images
            (:func:`bn_detection.norm.set_rows_per_image`).
    """
    coco = load_truth(truth)
    image_id = image_id or image_id_of
    layers = [
        name
        for name, module in model.named_modules()
        if matches(name, modules) and tracks_statistics(module)
    ]
    # Without layers to change, all are equal.
    computed = list(partitions) if layers else ["population"]
    found: dict[str, Detections] = {name: [] for name in computed}
    windows: list[list[Any]] = []
    with torch.no_grad(), untouched(model), kept_inference(model):
        model.eval()
        for seed, batch in enumerate(batches):
            windows.append([image_id(image) for image in batch])
            for name in computed:
                _normalize_by(model, modules, name, images_per_worker, seed)
                found[name] += checked(detect(batch), windows[-1], coco)
    ids = [image for window in windows for image in window]
    objects = objects_of(coco, ids, dataset)
    window_of = {image: number for number, window in enumerate(windows) for image in window}
    weights = resample(len(windows), resamples)[:, [window_of[image] for image in ids]]
    of = {name: ap_by_class(coco, ids, results, weights) for name, results in found.items()}
    shared = [metric for metric in DETECTIONS if all(metric in values for values in of.values())]
    of_classes = {
        name: {metric: of.get(name, of[computed[0]])[metric] for metric in shared}
        for name in partitions
    }
    values = {
        name: {metric: mean_of_classes(each) for metric, each in metrics.items()}
        for name, metrics in of_classes.items()
    }
    own, numbers = _own(values), _numbers(coco)
    names = [str(coco.cats[category].get("name", category)) for category in numbers]
    places = [(window_of[item["image_id"]], numbers[item["category_id"]]) for item in objects]
    share = [min(images_per_worker / len(window), 1.0) for window in windows for _ in window]
    return DetectionReport(
        dataset=dataset,
        images=len(ids),
        objects=len(objects),
        images_per_worker=images_per_worker,
        batch_norms=layers,
        windows=len(windows),
        own_share=100 * float(np.mean(share)),
        **compared(values, own, "shuffle", len(windows)),
        by_class=leakages_by_class(of_classes, own, "shuffle", names, places) if by_class else (),
    )


def _own(modes: Iterable[str]) -> str:
    return "worker" if "worker" in modes else "image"


def _normalize_by(
    model: nn.Module, modules: Sequence[str], name: str, images_per_worker: int, seed: int
) -> None:
    if name == "population":
        set_inference(model, "population", modules)
        return
    of_workers: dict[str, Partition] = {
        "worker": ImagePartition(images_per_worker),
        "shuffle": ShufflePartition(images_per_group=images_per_worker),
    }
    set_inference(model, "batch", modules, partition=of_workers.get(name, name), seed=seed)


def objects_of(coco: COCO, ids: Sequence[Any], dataset: str) -> list[dict[str, Any]]:
    """The objects that there are to find in some images.

    Raises:
        ValueError: there is no image, or no object in them; ids that the ground truth lacks.
    """
    unknown = [image for image in ids if image not in coco.imgs]
    if unknown or not ids:
        which = f"has no image {unknown[0]!r}, which a batch has" if unknown else "has no batch"
        raise ValueError(f"The probe on detections {dataset}: the ground truth {which}.")
    objects = [
        item for image in ids for item in coco.imgToAnns[image] if not item.get("iscrowd", 0)
    ]
    if not objects:
        raise ValueError(
            f"The probe on detections {dataset}: none of its {len(ids)} images has an object."
        )
    return objects


def load_truth(truth: Truth) -> COCO:
    """COCO's annotations of a file, of its content, or as they are."""
    if isinstance(truth, COCO):
        return truth
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(truth, Mapping):
            coco = COCO()
            coco.dataset = dict(truth)
            coco.createIndex()
            return coco
        return COCO(str(truth))


def image_id_of(image: Any) -> Any:
    """Of an image of a batch: its ``["image_id"]``, or that of its target in a pair."""
    known = image if isinstance(image, Mapping) else image[1]
    number = known["image_id"]
    return number.item() if isinstance(number, Tensor) else number


def checked(results: Detections, images: Sequence[Any], coco: COCO) -> Detections:
    """Detections in these images.

    Raises:
        ValueError: an unknown image or category.
    """
    for key, known in (("image_id", images), ("category_id", coco.cats)):
        for result in results:
            if result[key] not in known:
                raise ValueError(
                    f"A detection has {key} {result[key]!r}; known are "
                    f"{', '.join(map(repr, list(known)[:10]))}."
                )
    return results


def _numbers(coco: COCO) -> dict[Any, int]:
    """Of each category."""
    return {category: number for number, category in enumerate(sorted(coco.cats))}


def ap_by_class(
    coco: COCO, ids: Sequence[Any], results: Detections, weights: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """AP of each resample and class, ``(B, C)``, by metric."""
    numbers = {image: number for number, image in enumerate(ids)}
    classes = _numbers(coco)

    def numbered(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **item,
                "image_id": numbers[item["image_id"]],
                "category_id": classes[item["category_id"]],
            }
            for item in items
        ]

    images = [{**coco.imgs[image], "id": number} for image, number in numbers.items()]
    truth = numbered(item for image in ids for item in coco.imgToAnns[image])
    found = numbered(results)
    of_metric = {"box_ap": "bbox"}
    if all("segmentation" in item for item in (*truth, *found)):
        of_metric["mask_ap"] = "segm"
    return {
        metric: AveragePrecision(images, truth, found, len(classes), iou_type).by_class(weights)
        for metric, iou_type in of_metric.items()
    }
