"""Images with their objects, from a COCO JSON, a dataset of Detectron2's, a folder, or a loader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from pycocotools import mask as coco_masks
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_tensor

from ..config import ConfigError
from ..data import register_builtin, register_coco_json, register_image_folder
from ..detectors import Detector, Sample

Data = str | Path | tuple[str | Path, str | Path] | Iterable[Any]
"""``(annotations.json, folder)``; the name of a dataset of Detectron2's; a folder of images without
labels; or a dataset or loader of images and targets in torchvision's convention."""

_FORMS = (
    "an image (3, H, W), a pair of image and target, or batches of them: (images, targets) or a "
    "list of pairs; a target is a dict with boxes (N, 4) in absolute x0, y0, x1, y1 and labels "
    "(N,)"
)


class Images:
    """The images to measure on, in a random order that is always the same.

    Those of files are read each time; those of a loader, which may shuffle and augment, are kept in
    memory.

    Args:
        data: where they are from.
        detector: that they are for, which says how classes are numbered.
        number: of images to use at most; of a loader, in its order.

    Attributes:
        name: of the data, for messages and reports.

    Raises:
        ConfigError: there is no such file, folder or dataset, or what is in it is wrong.
        ValueError: there is no image; or an item of a loader is no image with a target.
    """

    def __init__(self, data: Data, detector: Detector, number: int) -> None:
        self._detector = detector
        self._records: list[dict[str, Any]] = []
        self._samples: list[Sample] = []
        self._names: dict[int, str] = {}
        if isinstance(data, str | Path) or _is_coco(data):
            self.name, records = _records_of(data)
            kept = _order(len(records))[:number]
            self._records = [records[k] for k in kept]
            self._labels = _numbering(self.name, detector)
            classes = MetadataCatalog.get(self.name).get("thing_classes", ())
            self._names = {self._labels[number]: name for number, name in enumerate(classes)}
        else:
            self.name = type(data).__name__
            self._samples = list(islice(_samples_of(data, detector), number))
        if not len(self):
            raise ValueError(f"{self.name} has no image to measure on.")

    def __len__(self) -> int:
        return len(self._records) or len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        if self._samples:
            yield from self._samples
        for number, record in enumerate(self._records):
            yield _read(record, number, self._labels)

    def batches(self, size: int) -> Iterator[list[Sample]]:
        """Whole batches of the images."""
        images = iter(self)
        while len(batch := list(islice(images, size))) == size:
            yield batch

    @property
    def have_labels(self) -> bool:
        """Whether every image says which objects it has, and some has one."""
        if self._records:
            return all("annotations" in record for record in self._records) and any(
                record["annotations"] for record in self._records
            )
        return all("boxes" in target for _, target in self._samples) and any(
            len(target["boxes"]) for _, target in self._samples
        )

    def truth(self) -> dict[str, Any]:
        """The objects as COCO's annotations; a category is a label of the detector."""
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for image, target in self:
            height, width = image.shape[1:]
            images.append({"id": target["image_id"], "height": height, "width": width})
            boxes = box_convert(target["boxes"], "xyxy", "xywh").tolist()
            crowds = target.get("iscrowd", torch.zeros(len(boxes), dtype=torch.long)).tolist()
            shapes = encoded(target["masks"]) if "masks" in target else [None] * len(boxes)
            for box, label, crowd, shape in zip(
                boxes, target["labels"].tolist(), crowds, shapes, strict=True
            ):
                item = {"id": len(objects) + 1, "image_id": target["image_id"]}
                item |= {"category_id": label, "bbox": box, "area": box[2] * box[3]}
                item |= {"iscrowd": int(crowd)} | ({"segmentation": shape} if shape else {})
                objects.append(item)
        known = range(self._detector.first_label, self._detector.num_labels or 0)
        labels = {item["category_id"] for item in objects} | set(known)
        categories = [
            {"id": label, "name": self._names.get(label, str(label))} for label in sorted(labels)
        ]
        return {"images": images, "annotations": objects, "categories": categories}


def detections(
    detector: Detector, samples: Sequence[Sample], *, masks: bool
) -> list[dict[str, Any]]:
    """What a detector finds, as COCO's results.

    Args:
        detector: its model in eval mode.
        samples: the images.
        masks: whether the objects have masks to compare with.
    """
    results = []
    for (_, target), found in zip(samples, detector.detect(samples), strict=True):
        boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
        shapes: list[Any] = [None] * len(boxes)
        if masks and "masks" in found:
            shapes = encoded(found["masks"].reshape(len(boxes), *found["masks"].shape[-2:]) > 0.5)
        for box, score, label, shape in zip(
            boxes, found["scores"].tolist(), found["labels"].tolist(), shapes, strict=True
        ):
            item = {"image_id": target["image_id"], "category_id": int(label)}
            item |= {"bbox": box, "score": score} | ({"segmentation": shape} if shape else {})
            results.append(item)
    return results


def encoded(masks: Tensor) -> list[dict[str, Any]]:
    """Run-length codes of masks ``(N, H, W)``."""
    arrays = masks.to(torch.uint8).cpu().numpy()
    return [coco_masks.encode(np.asfortranarray(array)) for array in arrays]


def _is_coco(data: Any) -> bool:
    return (
        isinstance(data, tuple)
        and len(data) == 2
        and all(isinstance(part, str | os.PathLike) for part in data)
    )


def _order(number: int) -> list[int]:
    """A random one: neighbours in a file look alike."""
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    return order


def _records_of(data: Any) -> tuple[str, list[dict[str, Any]]]:
    if isinstance(data, tuple):
        name = os.path.abspath(data[0])
        register_coco_json([[name, *map(str, data)]])
    elif os.path.isdir(data):
        name = register_image_folder(str(data))
    else:
        name = str(data)
        register_builtin([name])
        if name not in DatasetCatalog:
            raise ConfigError(
                f"There is no folder and no registered dataset {name}. Data are "
                "(annotations.json, folder), a dataset of Detectron2's, a folder of images, or a "
                "loader of (image, target)."
            )
    return name, DatasetCatalog.get(name)


def _numbering(name: str, detector: Detector) -> dict[int, int]:
    """The label that the detector has for each class, by its number from 0 in the dataset.

    The category ids of the file, if the detector can have them as labels; else 1, 2, ... in their
    order. Of a detector without background they are 0, 1, ...
    """
    metadata = MetadataCatalog.get(name)
    classes = range(len(metadata.get("thing_classes", ())))
    first, known = detector.first_label, detector.num_labels
    if known is not None and len(classes) > known - first:
        raise ConfigError(
            f"{name} has {len(classes)} classes, and the model {known - first} (beside the "
            "background, where it has one)."
        )
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {number: number for number in classes})
    fits = first > 0 and all(first <= i and (known is None or i < known) for i in ids)
    return {number: i if fits else first + number for i, number in ids.items()}


def _read(record: dict[str, Any], number: int, labels: dict[int, int]) -> Sample:
    try:
        image = to_tensor(read_image(record["file_name"], format="RGB").copy())
    except Exception as error:
        raise ConfigError(f"{record['file_name']} cannot be read: {error}") from error
    target: dict[str, Any] = {"image_id": number}
    if "annotations" not in record:
        return image, target
    items = [item for item in record["annotations"] if min(item["bbox"][2:]) > 0]
    with_masks = bool(items) and all("segmentation" in item for item in items)
    objects = annotations_to_instances(items, image.shape[1:], mask_format="bitmask")
    target["boxes"] = objects.gt_boxes.tensor.float()
    target["labels"] = torch.tensor([labels[item["category_id"]] for item in items]).long()
    if with_masks:
        target["masks"] = objects.gt_masks.tensor.to(torch.uint8)
    target["iscrowd"] = torch.tensor([item.get("iscrowd", 0) for item in items]).long()
    return image, target


def _samples_of(data: Any, detector: Detector) -> Iterator[Sample]:
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ValueError(f"The data are a {type(data).__name__}; they must give {_FORMS}.")
    items: Iterable[Any] = data
    if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__len__"):
        items = (data[k] for k in _order(len(data)))
    pairs = (pair for item in items for pair in _pairs(item, detector))
    for number, (image, target) in enumerate(pairs):
        yield _sample(image, target, number)


def _pairs(item: Any, detector: Detector) -> Iterator[tuple[Any, Any]]:
    """Images and targets of an item of a loader."""
    own = detector.read(item)
    if own is not None:
        yield own
        return
    if isinstance(item, list | tuple):
        if len(item) == 2 and _is_image(item[0]) and not _is_image(item[1]):
            yield item[0], item[1]
            return
        if len(item) == 2 and _are_images(item[0]) and not _are_images(item[1]):
            targets = item[1] if isinstance(item[1], list | tuple) else [None] * len(item[0])
            yield from zip(item[0], targets, strict=True)
            return
        for part in item:
            yield from _pairs(part, detector)
        return
    if isinstance(item, Tensor) and item.dim() == 4:
        yield from ((image, None) for image in item)
        return
    yield item, None


def _is_image(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.dim() == 3) or hasattr(value, "getbands")


def _are_images(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 4
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_image, value))


def _sample(image: Any, target: Any, number: int) -> Sample:
    if hasattr(image, "getbands"):
        image = to_tensor(image.convert("RGB"))
    if not _is_image(image) or image.shape[0] != 3:
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise ValueError(
            f"Item {number} of the data is a {type(image).__name__}{shape}; they must give "
            f"{_FORMS}."
        )
    if not image.is_floating_point():
        image = image.float() / 255
    made: dict[str, Any] = {"image_id": number}
    if not target:
        return image, made
    if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys():
        have = f"the keys {', '.join(map(str, target))}" if isinstance(target, dict) else "no keys"
        raise ValueError(
            f"The target of item {number} is a {type(target).__name__} with {have}; the data must "
            f"give {_FORMS}."
        )
    made["boxes"] = torch.as_tensor(target["boxes"]).reshape(-1, 4).float()
    made["labels"] = torch.as_tensor(target["labels"]).long()
    if len(made["boxes"]) != len(made["labels"]):
        raise ValueError(
            f"The target of item {number} has {len(made['boxes'])} boxes and "
            f"{len(made['labels'])} labels."
        )
    for key in ("masks", "iscrowd"):
        if key in target:
            made[key] = torch.as_tensor(target[key])
    return image, made
