"""LeakyShapes: COCO-format images in which the leak between the objects of an image is a dial.

Every image has a hidden *cast*, a brightness offset that all of its objects share and its
background does not show. The class of an object is encoded twice:

* the *leaky cue*, its brightness relative to the other objects of its image: of little use to a
  classifier that sees one RoI, and plain to one that sees the RoI's batch;
* the *honest cue*, the phase of the stripes on its lower half relative to its upper half: enough by
  itself, but harder to learn.

With the honest cue off, the best possible accuracy of a classifier that sees one object has a
closed form, :func:`honest_accuracy_limit`; accuracy above it is leakage.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import ConfigError
from ..dials import LeakyShapesConfig

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the same parameters would no longer give the same pixels."""

_LAYOUT_ATTEMPTS = 200
_POLYGON_VERTICES = 32  # a multiple of 4, so that the extremes of a shape are vertices


@dataclass(frozen=True)
class LeakyObject:
    """One object.

    Attributes:
        label: its class, from 0.
        box: ``(x, y, width, height)``, px, integers: exactly the extent of its pixels.
        polygon: its outline, float64 ``(V, 2)``, px.
        brightness: its mean grey level before noise and clipping.
    """

    label: int
    box: tuple[int, int, int, int]
    polygon: np.ndarray
    brightness: float


@dataclass(frozen=True)
class LeakyImage:
    """One image.

    Attributes:
        pixels: uint8 ``(image_size, image_size)``, grey.
        owner: int16, same shape: the index of the object a pixel belongs to, -1 for background.
        objects: its objects.
        cast: the brightness offset its objects share.
        clipped: number of object pixels that were below 0 or above 255.
    """

    pixels: np.ndarray
    owner: np.ndarray
    objects: tuple[LeakyObject, ...]
    cast: float
    clipped: int


@dataclass(frozen=True)
class LeakyShapesSummary:
    """What :func:`make_leaky_shapes` left on disk.

    Attributes:
        annotations: path of the COCO-format annotations.
        images: the folder of the images.
        num_images: how many images.
        num_objects: how many objects in all of them.
        clipped_fraction: the share of object pixels that did not fit into 0 to 255.
        reused: whether an identical dataset was there already.
    """

    annotations: Path
    images: Path
    num_images: int
    num_objects: int
    clipped_fraction: float
    reused: bool


def honest_accuracy_limit(config: LeakyShapesConfig) -> float:
    """The best possible accuracy from the brightness of one object, the honest cue being off.

    C Gaussians with equal priors, ``class_step`` apart, whose standard deviation ``s`` joins the
    cast and the object's own brightness. The best decision is the nearest mean, and is right with
    probability ``(1 + (C - 1) erf(class_step / (2 sqrt(2) s))) / C``. Pixel noise, clipping and
    what a network fails to learn can only lower it.

    Args:
        config: whatever its texture, which is left out of account.

    Returns:
        A fraction, from 1/C to 1.
    """
    spread = math.hypot(config.cast_std, config.object_std)
    if config.class_step == 0:
        inside = 0.0
    elif spread == 0:
        inside = 1.0
    else:
        inside = math.erf(config.class_step / (2 * math.sqrt(2) * spread))
    return (1 + (config.num_classes - 1) * inside) / config.num_classes


def draw_image(config: LeakyShapesConfig, seed: int, split: str, index: int) -> LeakyImage:
    """Draw one image; it depends on the arguments alone, not on other images.

    Args:
        config: the dials.
        seed: of the dataset, 0 or more.
        split: its name, such as ``"train"``: splits of one seed have different images.
        index: of the image, from 0.

    Raises:
        ConfigError: the objects do not fit into the image.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    boxes, scales = _layout(config, rng)
    cast = float(rng.normal(0, config.cast_std))
    shared = int(rng.integers(config.num_classes))
    shape = (config.image_size, config.image_size)
    canvas = rng.normal(config.background_mean, config.background_std, shape)
    owner = np.full(shape, -1, np.int16)
    objects = []
    for i, (box, scale) in enumerate(zip(boxes, scales, strict=True)):
        label = int(rng.integers(config.num_classes))
        if rng.random() < config.class_correlation:
            label = shared
        level = config.class_step * (label - (config.num_classes - 1) / 2)
        own = float(rng.normal(0, config.object_std))
        brightness = config.base_brightness + level + cast + own
        mask, polygon = draw_shape(rng, *box)
        period = scale * config.texture_period
        patch = brightness + _texture(config, rng, label, period, *box[2:])
        patch += rng.normal(0, config.pixel_noise, mask.shape)
        x, y, width, height = box
        window = (slice(y, y + height), slice(x, x + width))
        canvas[window][mask] = patch[mask]
        owner[window][mask] = i
        objects.append(LeakyObject(label, box, polygon, brightness))
    grey = np.rint(canvas)
    clipped = int(np.count_nonzero(((grey < 0) | (grey > 255)) & (owner >= 0)))
    pixels = np.clip(grey, 0, 255).astype(np.uint8)
    return LeakyImage(pixels, owner, tuple(objects), cast, clipped)


def _layout(
    config: LeakyShapesConfig, rng: np.random.Generator
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Boxes ``(x, y, width, height)`` at least ``gap`` apart, each uniform over what is free, and
    the scale of each.
    """
    low, high = config.objects_per_image
    count = int(rng.integers(low, high + 1))
    smallest, largest = config.object_size
    for _ in range(_LAYOUT_ATTEMPTS):
        scales = 2 ** rng.integers(config.object_scales, size=(count, 1))
        sizes = (scales * rng.integers(smallest, largest + 1, (count, 2))).tolist()
        boxes: list[tuple[int, int, int, int]] = []
        for width, height in sizes:
            free = np.ones((config.image_size - height + 1, config.image_size - width + 1), bool)
            for x, y, w, h in boxes:
                top, left = y - height - config.gap + 1, x - width - config.gap + 1
                free[max(top, 0) : y + h + config.gap, max(left, 0) : x + w + config.gap] = False
            places = np.flatnonzero(free)
            if not len(places):
                break
            y, x = divmod(int(rng.choice(places)), free.shape[1])
            boxes.append((x, y, width, height))
        else:
            return boxes, scales.ravel().tolist()
    raise ConfigError(
        f"LeakyShapes: {count} objects of {smallest} to {largest} px, {config.gap} px apart and of "
        f"{config.object_scales} scales, found no room on {config.image_size} px in "
        f"{_LAYOUT_ATTEMPTS} attempts. Lower objects_per_image, object_size, object_scales or gap, "
        "or raise image_size."
    )


def draw_shape(
    rng: np.random.Generator, x: int, y: int, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """An oval, a squircle, a rounded box or an octagon that touches all sides of its box.

    Args:
        rng: draws which of them.
        x: left side of the box, px.
        y: its top, px.
        width: of the box, px.
        height: of the box, px.

    Returns:
        Its pixels, bool ``(height, width)``, and its outline in the image, float64 ``(V, 2)``.
    """
    # Coordinates run from -1 to 1 over the box.
    across = np.abs((2 * np.arange(width) + 1) / width - 1)
    down = np.abs((2 * np.arange(height) + 1) / height - 1)[:, None]
    kind = int(rng.integers(4))
    if kind < 3:
        exponent = (2.5, 4.0, 8.0)[kind]
        mask = across**exponent + down**exponent <= 1
        angles = np.arange(_POLYGON_VERTICES) * (2 * np.pi / _POLYGON_VERTICES)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        outline = np.sign(circle) * np.abs(circle) ** (2 / exponent)
    else:
        mask = across + down <= 1.5
        corners = [(1, 0.5), (0.5, 1), (-0.5, 1), (-1, 0.5)]
        outline = np.array(corners + [(-u, -v) for u, v in corners])
    return mask, (outline + 1) * (width / 2, height / 2) + (x, y)


def _texture(
    config: LeakyShapesConfig,
    rng: np.random.Generator,
    label: int,
    period: float,
    width: int,
    height: int,
) -> np.ndarray:
    """Vertical stripes, float64 ``(height, width)``: the lower half is ``label / C`` periods on."""
    phase = rng.uniform(0, 2 * np.pi)
    angle = 2 * np.pi * np.arange(width) / period + phase
    rows = np.sin([angle, angle + 2 * np.pi * label / config.num_classes])
    return config.texture_amplitude * rows[(np.arange(height) >= height / 2).astype(int)]


def make_leaky_shapes(
    root: str | os.PathLike[str],
    num_images: int,
    seed: int,
    config: LeakyShapesConfig | None = None,
    *,
    split: str,
    progress: bool = False,
) -> LeakyShapesSummary:
    """Write a dataset: ``root/images/*.png`` and ``root/annotations.json`` in COCO's format.

    ``root`` appears complete or not at all. A dataset made with the same parameters is used again;
    anything else at ``root`` is left alone. ``info["leaky_shapes"]`` in the annotations holds the
    parameters, and each image its ``cast``.

    Args:
        root: the folder to make; its parents are made if needed.
        num_images: how many images. The first ``n`` do not depend on it.
        seed: 0 or more.
        config: the dials; by default :class:`LeakyShapesConfig`'s.
        split: such as ``"train"``: splits of one seed have different images.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Raises:
        ConfigError: ``root`` holds something else, or an argument is out of its range.
    """
    if num_images < 1 or seed < 0:
        raise ConfigError(
            f"LeakyShapes num_images is {num_images} and seed is {seed}; they must be at least 1 "
            "and at least 0."
        )
    root = Path(os.path.abspath(root))
    config = config or LeakyShapesConfig()
    made_with = {
        "version": VERSION,
        "split": split,
        "seed": seed,
        "num_images": num_images,
        "config": _as_json(config),
    }
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        return _reuse(root, made_with)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        # A subfolder: the temporary directory itself is for its owner's eyes only.
        folder = Path(scratch, root.name)
        (folder / "images").mkdir(parents=True)
        _write(folder, made_with, config, progress)
        try:
            folder.rename(root)
        except OSError:
            if not root.is_dir():
                raise
            return _reuse(root, made_with)  # another process was faster
    return _summary(root, _load(root), reused=False)


def _write(
    folder: Path, made_with: dict[str, Any], config: LeakyShapesConfig, progress: bool
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    clipped = covered = 0
    split, seed, num_images = (made_with[key] for key in ("split", "seed", "num_images"))
    for index in tqdm(
        range(num_images), desc=split, unit="image", disable=None if progress else True
    ):
        drawn = draw_image(config, seed, split, index)
        clipped += drawn.clipped
        covered += int(np.count_nonzero(drawn.owner >= 0))
        name = f"{index:06d}.png"
        grey = Image.fromarray(drawn.pixels)
        Image.merge("RGB", (grey,) * 3).save(folder / "images" / name, compress_level=1)
        images.append(
            {
                "id": index + 1,
                "file_name": name,
                "width": config.image_size,
                "height": config.image_size,
                "cast": round(drawn.cast, 4),
            }
        )
        for thing in drawn.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": thing.label + 1,
                    "segmentation": [np.round(thing.polygon, 2).ravel().tolist()],
                    "bbox": list(thing.box),
                    "area": round(_polygon_area(thing.polygon), 2),
                    "iscrowd": 0,
                }
            )
    dataset = {
        "info": {
            "description": f"LeakyShapes, {split}",
            "leaky_shapes": made_with,
            "clipped_fraction": clipped / covered,
        },
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": c + 1, "name": f"class_{c}", "supercategory": "shape"}
            for c in range(config.num_classes)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(dataset, separators=(",", ":")))


def _polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


def _as_json(config: LeakyShapesConfig) -> dict[str, Any]:
    """The dials as JSON gives them back: lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def _load(root: Path) -> dict[str, Any]:
    try:
        dataset = json.loads((root / "annotations.json").read_text())
        dataset["info"]["leaky_shapes"]["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{root} exists and is not a LeakyShapes dataset. Give another folder, or remove it."
        ) from error
    return dataset


def _reuse(root: Path, made_with: dict[str, Any]) -> LeakyShapesSummary:
    dataset = _load(root)
    found = dataset["info"]["leaky_shapes"]
    # A dial that did not exist yet had no effect, as its default has none.
    found["config"] = {**_as_json(LeakyShapesConfig()), **found["config"]}
    if found != made_with:
        old, new = ({**block, **block["config"]} for block in (found, made_with))
        names = [name for name in {**old, **new} if name != "config"]
        differing = [
            f"{name} {old.get(name)} there, {new.get(name)} asked for"
            for name in names
            if old.get(name) != new.get(name)
        ]
        raise ConfigError(
            f"{root} holds a LeakyShapes dataset made with other parameters "
            f"({'; '.join(differing)}). Give another folder, or remove it."
        )
    there = sum(1 for _ in (root / "images").glob("*.png"))
    if there != made_with["num_images"]:
        raise ConfigError(
            f"{root} holds {there} of {made_with['num_images']} images. Remove it to make it anew."
        )
    logger.info("Using the dataset at %s, made with the same parameters.", root)
    return _summary(root, dataset, reused=True)


def _summary(root: Path, dataset: dict[str, Any], reused: bool) -> LeakyShapesSummary:
    return LeakyShapesSummary(
        annotations=root / "annotations.json",
        images=root / "images",
        num_images=len(dataset["images"]),
        num_objects=len(dataset["annotations"]),
        clipped_fraction=dataset["info"]["clipped_fraction"],
        reused=reused,
    )
