"""The dials of LeakyShapes, and what one object can tell with them; not with the generator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from .config import ConfigError


def _dial(default: Any, meaning: str, low: float = 0, high: float = math.inf) -> Any:
    return field(default=default, metadata={"help": meaning, "range": (low, high)})


@dataclass(frozen=True)
class LeakyShapesConfig:
    """The dials of the generator; brightness is in grey levels (0 to 255), lengths in pixels.

    :func:`bn_detection.data.draw_image` refuses objects too many or too large to find room.

    Raises:
        ConfigError: a value is out of its range; the message names the field.
    """

    image_size: int = _dial(128, "side of the square images, px", 8)
    num_classes: int = _dial(4, "number of classes C", 2)
    objects_per_image: tuple[int, int] = _dial((6, 9), "fewest and most objects in an image", 1)
    object_size: tuple[int, int] = _dial((22, 33), "smallest and largest side of an object, px", 8)
    object_scales: int = _dial(
        1, "octaves of size: an object and its stripes are 1, 2, 4, ... times as large", 1
    )
    gap: int = _dial(4, "least distance between the boxes of two objects, px")
    base_brightness: float = _dial(128.0, "mean brightness of objects", 0, 255)
    class_step: float = _dial(22.0, "brightness between two classes (leaky cue); 0 = off")
    cast_std: float = _dial(40.0, "standard deviation of the cast of an image")
    object_std: float = _dial(4.0, "standard deviation of each object's own brightness")
    texture_amplitude: float = _dial(16.0, "amplitude of the stripes (honest cue); 0 = off")
    texture_period: float = _dial(8.0, "period of the stripes, px", 2)
    pixel_noise: float = _dial(10.0, "standard deviation of the noise on object pixels")
    background_mean: float = _dial(110.0, "mean brightness of background pixels", 0, 255)
    background_std: float = _dial(8.0, "standard deviation of background pixels")
    class_correlation: float = _dial(
        0.0, "probability that an object has its image's shared class, not one of its own", 0, 1
    )

    def __post_init__(self) -> None:
        for dial in fields(self):
            value, (low, high) = getattr(self, dial.name), dial.metadata["range"]
            pair = isinstance(dial.default, tuple)
            whole = pair or isinstance(dial.default, int)
            numbers = value if pair and isinstance(value, tuple) else (value,)
            if not (
                len(numbers) == 1 + pair
                and all(isinstance(number, int if whole else Real) for number in numbers)
                and all(low <= number <= high and math.isfinite(number) for number in numbers)
                and sorted(numbers) == list(numbers)
            ):
                kind = "two whole numbers" if pair else "a whole number" if whole else "a number"
                order = ", the smaller first" if pair else ""
                most = "" if high == math.inf else f" and at most {high:g}"
                raise self._error(dial.name, f"{kind} of at least {low:g}{most}{order}")
        largest = self.object_size[1] << (self.object_scales - 1)
        if largest > self.image_size:
            raise self._error(
                "object_size",
                f"such that the largest object, {largest} px with object_scales "
                f"{self.object_scales}, is at most the image_size, {self.image_size}",
            )

    def _error(self, name: str, right: str) -> ConfigError:
        return ConfigError(f"LeakyShapes {name} is {getattr(self, name)}; it must be {right}.")


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
