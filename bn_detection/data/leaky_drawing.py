"""The images of LeakyShapes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from ..config import ConfigError
from ..dials import LeakyShapesConfig

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
