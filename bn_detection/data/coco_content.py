"""The content of files in COCO's format: read as JSON, and checked record by record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detectron2.data.datasets import load_coco_json

from ..config import one_line
from ..substitutes import substituted
from .records import Needs, annotation_problem

_LISTS = ("images", "annotations", "categories")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def load_coco(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    """Detectron2's ``load_coco_json`` of a file that is checked before.

    Raises:
        ValueError: says what is wrong, and with which record.
    """
    content = read_coco(json_file)

    from pycocotools import coco  # it takes long to import

    index = coco.COCO

    def read_already(_: str) -> coco.COCO:
        indexed = index()
        indexed.dataset = content
        indexed.createIndex()
        return indexed

    try:
        # Detectron2 looks the class up when it loads; this one does not read the file again.
        with substituted(coco, "COCO", read_already):
            return load_coco_json(json_file, image_root, name)
    except Exception as error:
        problem = next(_annotation_problems(content), f"{type(error).__name__}: {one_line(error)}")
        raise ValueError(problem) from error


def read_coco(json_file: str) -> dict[str, Any]:
    """The content of a file in COCO's format, its lists, ids and references checked.

    Raises:
        ValueError: says what is wrong, and with which record.
    """
    content = _read_json(json_file)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; COCO's format is an object.")
    for key in _LISTS:
        if not isinstance(content.get(key), list):
            raise ValueError(
                f'it has no list "{key}"; COCO\'s format needs "images", "annotations" (empty for '
                'images without labels) and "categories".'
            )
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f'its list "{key}" is empty.')
    categories = _by_id(content["categories"], "category", _is_number, "whole number")
    for category in content["categories"]:
        if not isinstance(category.get("name"), str):
            name = f"its name is {category['name']!r}" if "name" in category else "it has no name"
            raise ValueError(f"the category {category['id']}: {name}; it must be text.")
    images = _by_id(content["images"], "image", _is_id, "whole number or text")
    for image in content["images"]:
        for key in ("file_name", "height", "width"):
            if key not in image:
                raise ValueError(f"the image {image['id']!r} has no {key}.")
        if not isinstance(image["file_name"], str):
            raise ValueError(
                f"the image {image['id']!r}: its file_name is {image['file_name']!r}; it must be "
                "text."
            )
    for number, annotation in enumerate(content["annotations"], 1):
        if not isinstance(annotation, dict):
            raise ValueError(f"the annotation {number} is {annotation!r:.80}, no object.")
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        # Those of images that are not there are passed over: parts of a dataset have them.
        if not _is_id(image_id):
            raise ValueError(f"the annotation {number} has image_id={image_id!r}, which is no id.")
        if not _is_id(category_id) or category_id not in categories:
            raise ValueError(
                f"the annotation {number} has category_id={category_id!r}, which no category has."
            )
        mask = annotation.get("segmentation")
        if not (mask is None or isinstance(mask, list | dict)) or (
            isinstance(mask, list) and not all(isinstance(polygon, list) for polygon in mask)
        ):
            file = images[image_id]["file_name"] if image_id in images else image_id
            raise ValueError(
                f"image {file}, annotation {number}: its segmentation is {mask!r:.80}; it must be "
                "a list of polygons, or an RLE."
            )
    # Those of COCO 2014 that are known under this name have some twice.
    if "minival" not in json_file:
        _by_id(content["annotations"], "annotation", _is_id, "whole number")
    return content


def evaluation_problems(content: dict[str, Any], needs: Needs) -> Iterator[str]:
    """What keeps COCO's evaluation from using annotations, of each that cannot be used."""
    images = {image["id"]: image for image in content["images"]}
    for number, annotation in enumerate(content["annotations"], 1):
        image = images.get(annotation["image_id"])
        if image is None:  # pycocotools passes it over
            continue
        problem = next(
            (f"it has no {key}" for key in ("id", "area", "iscrowd") if key not in annotation), None
        )
        size = (image.get("height"), image.get("width"))
        problem = problem or annotation_problem(annotation, size, needs, training=False)
        if problem:
            yield f"image {image['file_name']}, annotation {number}: {problem}."


def _annotation_problems(content: dict[str, Any]) -> Iterator[str]:
    images = {image["id"]: image for image in content["images"]}
    for number, annotation in enumerate(content["annotations"], 1):
        image = images.get(annotation["image_id"], {})
        size = (image.get("height"), image.get("width"))
        needs = Needs("polygon" if annotation.get("segmentation") else None)
        problem = annotation_problem(annotation, size, needs, training=False)
        if problem:
            yield f"image {image.get('file_name')}, annotation {number}: {problem}."


def _read_json(json_file: str) -> Any:
    data = Path(json_file).read_bytes()
    if data.startswith(_BYTE_ORDER_MARK):
        raise ValueError(
            "it begins with a byte order mark, which JSON does not have; save it as UTF-8 without."
        )
    try:
        # Bytes could be UTF-16 too, which pycocotools does not read.
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 ({error}).") from error
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply for JSON.") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}).") from error


def _is_number(value: Any) -> bool:
    return type(value) is int


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _by_id(
    records: list[Any], kind: str, is_right: Callable[[Any], bool], what: str
) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"the {kind} {number} is {record!r:.80}, no object.")
        value = record.get("id")
        if not is_right(value):
            has = f"its id is {value!r}" if "id" in record else "it has no id"
            raise ValueError(f"the {kind} {number}: {has}; it must be a {what}.")
        if value in found:
            raise ValueError(f"the {kind} {number}: the id {value!r} is that of another {kind}.")
        found[value] = record
    if len({type(value) for value in found}) > 1:
        raise ValueError(f"some ids of its list of {kind} records are numbers, others text.")
    return found
