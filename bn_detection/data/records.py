"""Whether a dataset is what a model needs: which record is not, and why, before training."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError

from ..config import ConfigError

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Of Pillow: one channel with more than 8 bits, of which Detectron2 keeps 255 for all above it."""
_CORRUPTED = "corrupted://"
_SHOWN = 80


class NoObjectsError(ConfigError):
    """A dataset has no object to train on."""


@dataclass(frozen=True)
class Needs:
    """What annotations must have beside boxes and categories.

    Attributes:
        masks: INPUT.MASK_FORMAT; None without masks.
        keypoints: of each object; None without keypoints.
    """

    masks: str | None = None
    keypoints: int | None = None


def needs_of(cfg: CfgNode) -> Needs:
    """What a model trains on and is evaluated by."""
    with_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    return Needs(
        cfg.INPUT.MASK_FORMAT if with_heads and cfg.MODEL.MASK_ON else None,
        keypoints if with_heads and cfg.MODEL.KEYPOINT_ON else None,
    )


def check_records(records: Iterable[dict[str, Any]], where: str, needs: Needs) -> None:
    """Check the images of a dataset, and the objects that training takes from them.

    Args:
        records: in Detectron2's format of dataset dicts.
        where: the key and the dataset, for messages.
        needs: of the model.

    Raises:
        ConfigError: names the image, the annotation, and what would be right.
    """
    for record in records:
        problem = _image_problem(record)
        if problem:
            raise ConfigError(f"{where}: image {record.get('file_name')!a}: {problem}.")
        size = record.get("height"), record.get("width")
        for number, annotation in enumerate(record.get("annotations", ()), 1):
            if annotation.get("iscrowd", 0):  # training passes it over
                continue
            problem = annotation_problem(annotation, size, needs)
            if problem:
                name = f"image {record['file_name']}, annotation {number}"
                raise ConfigError(f"{where}: {name}: {problem}.")


def check_objects(records: Sequence[dict[str, Any]], where: str) -> None:
    """Check that a dataset with labels has an object to train on.

    Raises:
        NoObjectsError: it has none.
    """
    annotations = [item for record in records for item in record.get("annotations", ())]
    if not all("annotations" in record for record in records) or any(
        not item.get("iscrowd", 0) for item in annotations
    ):
        return
    what = "it has no annotations" if not annotations else "all its annotations are iscrowd: 1"
    raise NoObjectsError(
        f"{where}: {what}, so no image has an object to train on. An object has iscrowd: 0."
    )


def check_classes_agree(classes: dict[str, Sequence[str]], keys: dict[str, str]) -> list[str]:
    """Check that a class has the same index in all datasets of a job.

    Args:
        classes: names of the classes, by dataset; the first is trained on.
        keys: the key that names each dataset.

    Returns:
        Warnings: of classes whose names differ, which can be the same classes.

    Raises:
        ConfigError: a dataset has classes of the first one in another place.
    """
    (first, known), *others = classes.items()
    warnings = []
    for name, names in others:
        for index, (one, other) in enumerate(zip(known, names, strict=False)):
            if one == other:
                continue
            pair = f'{keys[name]}: dataset "{name}": its class {index} is "{other}"'
            if other in known or one in names:
                raise ConfigError(
                    f'{pair}, and that of {keys[first]} "{first}" is "{one}". Classes are counted '
                    "in the order of their category ids: give the same ids to the same names."
                )
            warnings.append(f'{pair}; that of {keys[first]} "{first}" is "{one}".')
    return warnings


def check_first_images(records: Iterable[dict[str, Any]], where: str) -> None:
    """Open the first image of each kind of file, and compare it with its record.

    Images that are missing or cannot be decoded pass: they are left out when they are read.

    Raises:
        ConfigError: an image is no regular file, has more than 8 bits a channel, or another size
            than its record says.
    """
    seen = set()
    for record in records:
        name = str(record.get("file_name"))
        kind = os.path.splitext(name)[1].lower()
        if kind in seen:
            continue
        seen.add(kind)
        problem = image_file_problem(name)
        if problem:
            raise ConfigError(f"{where}: image {name}: {problem}.")
        size = _size_of_file(original_path(name))
        expected = record.get("width"), record.get("height")
        if size and None not in expected and size != expected:
            raise ConfigError(
                f"{where}: image {name}: its file has {_size(*size)} pixels (width x height), and "
                f"its record {_size(*expected)}."
            )


def original_path(name: str) -> str:
    """The path of an image, of a corrupted one (``corrupted://...``) that of the clean one."""
    return name.split("/", 3)[3] if name.startswith(_CORRUPTED) else name


def image_file_problem(name: str) -> str | None:
    """What keeps a file that is there from being read as an image of 8 bits; None if nothing does.

    Args:
        name: path or URL; nothing is known of a URL.
    """
    path = original_path(name)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "it is no regular file"
        with Image.open(path) as image:
            mode = image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # what reads it says why
    if mode in _DEEP_MODES:
        return (
            f"it has 16 bits a channel or more (mode {mode}), of which all above 255 would be read "
            "as white; scale it to 8 bits"
        )
    return None


def annotation_problem(
    annotation: dict[str, Any], size: tuple[Any, Any], needs: Needs, *, training: bool = True
) -> str | None:
    """What is wrong with an annotation, or None.

    Args:
        annotation: of Detectron2's or COCO's format.
        size: height and width of its image; None where they are not known.
        needs: of the model.
        training: whether the masks must be of the INPUT.MASK_FORMAT; evaluation takes any.
    """
    if "bbox" not in annotation:
        return "it has no bbox"
    box = annotation["bbox"]
    sides = 5 if annotation.get("bbox_mode") == BoxMode.XYWHA_ABS else 4
    if not _finite(box, sides):
        return (
            f"its bbox is {_show(box)}; it must be {'five' if sides == 5 else 'four'} finite "
            "numbers: x, y, width, height" + (", angle" if sides == 5 else "")
        )
    if needs.masks is not None:
        problem = _mask_problem(annotation, size, needs.masks if training else None)
        if problem:
            return problem
    if needs.keypoints is not None:
        return _keypoint_problem(annotation, needs.keypoints)
    return None


def _mask_problem(
    annotation: dict[str, Any], size: tuple[Any, Any], mask_format: str | None
) -> str | None:
    mask = annotation.get("segmentation")
    if mask is None or (isinstance(mask, list) and not mask):
        return (
            "it has no segmentation, and MODEL.MASK_ON is True; set MODEL.MASK_ON False for boxes "
            "alone"
        )
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list | tuple | np.ndarray):
                return f"its segmentation is {_show(mask)}; it must be a list of polygons"
            # Detectron2 leaves these out of COCO's files, as pycocotools does.
            if mask_format is not None and (len(polygon) < 6 or len(polygon) % 2):
                return (
                    f"its segmentation has a polygon of {len(polygon)} numbers; at least three "
                    "points are needed, each with x and y"
                )
            if not _finite(polygon, len(polygon)):
                return (
                    f"its segmentation has a polygon with what is no finite number: "
                    f"{_show(polygon)}"
                )
        return None
    if isinstance(mask, dict):
        expected = mask.get("size")
        if not isinstance(expected, list | tuple) or len(expected) != 2 or "counts" not in mask:
            return f"its segmentation is {_show(mask)}; an RLE has size and counts"
        found = tuple(expected)
    elif isinstance(mask, np.ndarray):
        found = mask.shape
    else:
        return f"its segmentation is {_show(mask)}; it must be a list of polygons, or an RLE"
    if None not in size and found != tuple(size):
        return (
            f"its segmentation is of {found[0]} x {found[1]} pixels (height x width), and the "
            f"image of {size[0]} x {size[1]}"
        )
    if mask_format == "polygon":
        return (
            'its segmentation is a bitmap (RLE), and INPUT.MASK_FORMAT is "polygon"; set '
            "INPUT.MASK_FORMAT bitmask, which takes both"
        )
    return None


def _keypoint_problem(annotation: dict[str, Any], number: int) -> str | None:
    keypoints = annotation.get("keypoints")
    if keypoints is None:
        return "it has no keypoints, and MODEL.KEYPOINT_ON is True"
    if not _finite(keypoints, 3 * number):
        return (
            f"its keypoints are {_show(keypoints)}; MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {number} "
            f"needs {3 * number} finite numbers: x, y and visibility of each"
        )
    return None


def _image_problem(record: dict[str, Any]) -> str | None:
    name = record.get("file_name")
    if name is None:
        return "it has no file_name"
    if not isinstance(name, str):
        return f"its file_name is {_show(name)}; it must be text"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its file_name is no text in UTF-8"
    for key in ("height", "width"):
        value = record.get(key, 1)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            return f"its {key} is {_show(value)}; it must be a whole number of pixels"
    return None


def _finite(values: Any, length: int) -> bool:
    """Whether these are so many finite numbers."""
    if isinstance(values, str | bytes):
        return False
    try:
        return len(values) == length and math.isfinite(sum(values))
    except (TypeError, OverflowError, ValueError):
        return False


def _size(width: Any, height: Any) -> str:
    return f"{width} x {height}"


def _size_of_file(path: str) -> tuple[int, int] | None:
    """Width and height after its EXIF rotation; None if it cannot be opened."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
