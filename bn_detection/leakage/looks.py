"""What an early layer sees of the objects of a dataset: simple features of their crops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..config import ConfigError, one_line

_SIDE = 32
_SCALES = (1, 2, 4)


class Looks(NamedTuple):
    """Objects of images.

    Attributes:
        features: float64 ``(N, 14)``, standardized: mean and standard deviation of each colour,
            energy of horizontal and vertical gradients at three scales, size and aspect.
        labels: int64 ``(N,)``, the class of each.
        images: int64 ``(N,)``, the image of each, from 0, without gaps.
    """

    features: NDArray[np.float64]
    labels: NDArray[np.int64]
    images: NDArray[np.int64]


def read_looks(records: list[dict[str, Any]], where: str, *, progress: bool = False) -> Looks:
    """Read the objects of images; crowds, and boxes of less than a pixel, are passed over.

    Args:
        records: in Detectron2's format of dataset dicts, checked.
        where: the dataset, for messages.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Raises:
        ConfigError: an image cannot be read.
    """
    crops: list[NDArray[np.uint8]] = []
    boxes: list[NDArray[np.float64]] = []
    labels: list[int] = []
    images: list[int] = []
    for record in tqdm(records, desc="images", disable=None if progress else True):
        objects = [item for item in record["annotations"] if not item.get("iscrowd", 0)]
        found = []
        if objects:
            picture = _read(record["file_name"], where)
            corners = [
                BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
                for item in objects
            ]
            limits = np.tile(picture.size, 2)
            clipped = np.clip(np.array(corners, float).reshape(-1, 4), 0, limits)
            sides = clipped[:, 2:] - clipped[:, :2]
            found = [k for k in range(len(objects)) if sides[k].min() >= 1]
        for k in found:
            crop = picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=clipped[k])
            crops.append(np.asarray(crop))
            boxes.append(sides[k])
            labels.append(objects[k]["category_id"])
            images.append(images[-1] + (k == found[0]) if images else 0)
    features = _features(np.array(crops), np.array(boxes)) if crops else np.empty((0, 0))
    return Looks(features, np.array(labels, np.int64), np.array(images, np.int64))


def mean_of_others(values: NDArray[np.float64], images: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each object, the mean over the other objects of its image; its own value without others.

    Args:
        values: ``(N, D)``.
        images: ``(N,)``, from 0.

    Returns:
        ``(N, D)``.
    """
    sums = np.zeros((int(images.max()) + 1, values.shape[1]))
    np.add.at(sums, images, values)
    others = number_of_others(images)[:, None]
    mean: NDArray[np.float64] = (sums[images] - values) / np.maximum(others, 1)
    return np.where(others > 0, mean, values)


def number_of_others(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many other objects the image of each has.

    Args:
        images: ``(N,)``, from 0.

    Returns:
        ``(N,)``.
    """
    return np.bincount(images)[images] - 1


def _read(name: str, where: str) -> Image.Image:
    try:
        return Image.fromarray(read_image(name, "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{where}: image {name} cannot be read: {one_line(error)}") from error


def _features(crops: NDArray[np.uint8], sides: NDArray[np.float64]) -> NDArray[np.float64]:
    pixels = crops.astype(np.float32)
    columns = [pixels.mean((1, 2)), pixels.std((1, 2))]
    grey = pixels.mean(3)
    for scale in _SCALES:
        shape = (len(grey), _SIDE // scale, scale, _SIDE // scale, scale)
        coarse = grey.reshape(shape).mean((2, 4))
        energy = [np.abs(np.diff(coarse, axis=axis)).mean((1, 2)) for axis in (1, 2)]
        columns.append(np.log1p(np.stack(energy, 1)))
    columns.append(np.log(np.stack([sides.prod(1), sides[:, 0] / sides[:, 1]], 1)))
    features = np.concatenate(columns, 1).astype(np.float64)
    standard: NDArray[np.float64] = (features - features.mean(0)) / (features.std(0) + 1e-6)
    return standard
