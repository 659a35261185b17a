"""The dials of LeakyShapes; not with the generator, to be listed without importing it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from .config import ConfigError


def _dial(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class LeakyShapesConfig:
    """The dials of the generator; brightness is in grey levels (0 to 255), lengths in pixels.

    :func:`bn_detection.data.draw_image` refuses objects too many or too large to find room.

    Raises:
        ConfigError: a value is out of its range; the message names the field.
    """

    image_size: int = _dial(128, "side of the square images, px")
    num_classes: int = _dial(4, "number of classes C")
    objects_per_image: tuple[int, int] = _dial((6, 9), "fewest and most objects in an image")
    object_size: tuple[int, int] = _dial((22, 33), "smallest and largest side of an object, px")
    object_scales: int = _dial(
        1, "octaves of size: an object and its stripes are 1, 2, 4, ... times as large"
    )
    gap: int = _dial(4, "least distance between the boxes of two objects, px")
    base_brightness: float = _dial(128.0, "mean brightness of objects")
    class_step: float = _dial(22.0, "brightness between two classes (leaky cue); 0 = off")
    cast_std: float = _dial(40.0, "standard deviation of the cast of an image")
    object_std: float = _dial(4.0, "standard deviation of each object's own brightness")
    texture_amplitude: float = _dial(16.0, "amplitude of the stripes (honest cue); 0 = off")
    texture_period: float = _dial(8.0, "period of the stripes, px")
    pixel_noise: float = _dial(10.0, "standard deviation of the noise on object pixels")
    background_mean: float = _dial(110.0, "mean brightness of background pixels")
    background_std: float = _dial(8.0, "standard deviation of background pixels")
    class_correlation: float = _dial(
        0.0, "probability that an object has its image's shared class, not one of its own"
    )

    def __post_init__(self) -> None:
        for dial in fields(self):
            value = getattr(self, dial.name)
            if isinstance(dial.default, tuple):
                if not (
                    isinstance(value, tuple)
                    and len(value) == 2
                    and all(isinstance(number, int) for number in value)
                ):
                    raise self._error(dial.name, "a tuple of two whole numbers")
            elif isinstance(dial.default, int) and not isinstance(value, int):
                raise self._error(dial.name, "a whole number")
            elif not math.isfinite(value):
                raise self._error(dial.name, "a finite number")
        for name in ("objects_per_image", "object_size"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise self._error(name, "two numbers, 1 <= smallest <= largest")
        at_least = {"num_classes": 2, "image_size": 8, "texture_period": 2, "object_scales": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise self._error(name, f"at least {least}")
        for name in ("base_brightness", "background_mean"):
            if not 0 <= getattr(self, name) <= 255:
                raise self._error(name, "from 0 to 255")
        not_negative = ("gap", "class_step", "cast_std", "object_std", "texture_amplitude")
        for name in (*not_negative, "pixel_noise", "background_std"):
            if getattr(self, name) < 0:
                raise self._error(name, "0 or more")
        if not 0 <= self.class_correlation <= 1:
            raise self._error("class_correlation", "from 0 to 1")
        if self.object_size[0] < 8:
            raise self._error("object_size", "at least 8 px, for shapes and stripes to show")
        largest = self.object_size[1] << (self.object_scales - 1)
        if largest > self.image_size:
            raise self._error(
                "object_size",
                f"such that the largest object, {largest} px with object_scales "
                f"{self.object_scales}, is at most the image_size, {self.image_size}",
            )

    def _error(self, name: str, right: str) -> ConfigError:
        return ConfigError(f"LeakyShapes {name} is {getattr(self, name)}; it must be {right}.")
