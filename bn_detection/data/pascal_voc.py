"""Folders of Pascal VOC as COCO's JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from ..config import ConfigError
from ..files import make_folder, replacing
from .image_folder import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VOCSummary(NamedTuple):
    """What :func:`voc_to_coco` has written.

    Attributes:
        num_images: also of those without an object.
        num_objects: in all images.
        classes: their names; the category of the first is 1.
    """

    num_images: int
    num_objects: int
    classes: tuple[str, ...]


class _Object(NamedTuple):
    name: str
    difficult: bool
    corners: list[float]


class _NoDoctype(ElementTree.TreeBuilder):
    """VOC's files declare nothing; what a file declares could expand to gigabytes."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which annotations have not")


def voc_to_coco(
    root: str | Path,
    output: str | Path,
    split: str | None = None,
    *,
    classes: Sequence[str] = (),
    overwrite: bool = False,
) -> VOCSummary:
    """Write the annotations of a Pascal VOC folder as COCO's JSON.

    Boxes of VOC are ``xmin ymin xmax ymax`` in pixels that count from 1, the last one included:
    ``x = xmin - 1`` and ``width = xmax - xmin + 1``, as in Detectron2's own loader of VOC. Objects
    that are ``difficult`` get ``iscrowd`` 1: they are not trained on, and finding them or not
    counts for nothing. A box that leaves its image is clipped; one that is left with no area is
    left out, with a line in the log.

    Args:
        root: has ``Annotations/*.xml``, ``JPEGImages/`` and, for a split, ``ImageSets/Main/*.txt``.
        output: the file to write, whole or not at all.
        split: such as ``train``; None for all annotations.
        classes: in the order of their categories; by default all that ``Annotations/`` has, of
            whatever split, sorted by name.
        overwrite: whether a file that is there is replaced.

    Raises:
        ConfigError: names the file that is missing, malformed or there already.
    """
    root, output = Path(root).expanduser(), Path(output).expanduser()
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists. Give another --output, or --overwrite to replace it.")
    for folder in (root / "Annotations", root / "JPEGImages"):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder, and Pascal VOC's has one.")
    everything = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
    stems = everything if split is None else _read_split(root, split)
    needed = stems if classes else [*dict.fromkeys([*stems, *everything])]
    read = {stem: _read(root / "Annotations" / f"{stem}.xml") for stem in needed}
    found = {thing.name for objects in read.values() for thing in objects}
    names = tuple(classes) or tuple(sorted(found))
    numbers = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, stem in enumerate(stems, start=1):
        file, size = _image(root / "JPEGImages", stem)
        width, height = size
        images.append({"id": image_id, "file_name": file.name, "width": width, "height": height})
        path = root / "Annotations" / f"{stem}.xml"
        for thing in read[stem]:
            if thing.name not in numbers:
                raise ConfigError(f"{path}: the class {thing.name} is none of {', '.join(names)}.")
            box = _box(thing.corners, width, height)
            if box is None:
                logger.warning(
                    "%s: the %s at %s has no area within the image and is left out.",
                    *(path, thing.name, " ".join(f"{value:g}" for value in thing.corners)),
                )
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": numbers[thing.name],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(thing.difficult),
                }
            )
    dataset = {
        "info": {"description": f"{root.resolve().name}, {split or 'all annotations'}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
    make_folder(output.parent, f"--output {output}")
    with replacing(output) as unfinished:
        unfinished.write_text(json.dumps(dataset, separators=(",", ":")), encoding="utf-8")
    return VOCSummary(len(images), len(annotations), names)


def _read_split(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        # A list of one class has a second column, of -1, 0 and 1.
        lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise ConfigError(f"--split {split}: {path}: {error.strerror}. Splits: {there}.") from error
    stems = [columns[0] for columns in lines if columns]
    if not stems:
        raise ConfigError(f"--split {split}: {path} names no image.")
    return stems


def _read(path: Path) -> list[_Object]:
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        tree = ElementTree.parse(path, parser).getroot()
        return [_read_object(thing) for thing in tree.iter("object")]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise ConfigError(f"{path} is no annotation of Pascal VOC: {error}.") from error


def _read_object(thing: ElementTree.Element) -> _Object:
    texts = {key: thing.findtext(key, "").strip() for key in ("name", "difficult")}
    if not texts["name"]:
        raise ValueError("an object has no name")
    corners = []
    for key in _CORNERS:
        text = thing.findtext(f"bndbox/{key}", "").strip()
        try:
            corners.append(float(text))
        except ValueError:
            corners.append(math.nan)
        if not math.isfinite(corners[-1]):
            raise ValueError(f"{key} of a {texts['name']} is {text!r}")
    return _Object(texts["name"], texts["difficult"] == "1", corners)


def _image(folder: Path, stem: str) -> tuple[Path, tuple[int, int]]:
    """The file of an image, which VOC calls as its annotations, and its size."""
    for suffix in (".jpg", *IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            try:
                with Image.open(path) as image:
                    return path, image.size
            except OSError as error:
                raise ConfigError(f"{path} cannot be read as an image: {error}") from error
    raise ConfigError(f"{folder / stem}.jpg: there is no such image, nor one of another format.")


def _box(corners: Sequence[float], width: int, height: int) -> list[float] | None:
    """``x y width height`` of the part within the image; None where there is none."""
    xmin, ymin, xmax, ymax = corners
    if xmax <= xmin or ymax <= ymin:
        return None
    left, top = max(xmin - 1, 0.0), max(ymin - 1, 0.0)
    right, bottom = min(xmax, float(width)), min(ymax, float(height))
    return [left, top, right - left, bottom - top] if right > left and bottom > top else None
