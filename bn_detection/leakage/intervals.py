"""Bootstrap intervals over images, paired between measurements on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; NaN where there is none.

    Attributes:
        value: on the images as they are.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """From what :func:`resample` gives: the percentile interval (Efron & Tibshirani 1993).

        Args:
            values: float ``(1 + B,)``; NaN of resamples without a value are passed over.
        """
        value, resampled = float(values[0]), values[1:]
        resampled = resampled[np.isfinite(resampled)]
        if not math.isfinite(value) or not len(resampled):
            return cls(value, math.nan, math.nan)
        low, high = np.percentile(resampled, _PERCENTILES)
        return cls(value, float(low), float(high))

    def text(self, decimals: int) -> str:
        """With the interval, where there is one; "-" where there is no value."""
        if not math.isfinite(self.value):
            return "-"
        value, low, high = (f"{number:.{decimals}f}" for number in vars(self).values())
        return f"{value} [{low}, {high}]" if math.isfinite(self.low) else value

    def to_json(self) -> dict[str, float | None]:
        """By name; null for what is not finite."""
        return {k: v if math.isfinite(v) else None for k, v in vars(self).items()}


def resample(num_images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each image is in each bootstrap resample.

    Args:
        num_images: I.
        resamples: B.
        seed: of the drawing.

    Returns:
        int64 ``(1 + B, I)``: a row of ones, the images as they are, and the resamples.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=resamples)
    return np.concatenate([np.ones((1, num_images), drawn.dtype), drawn])


@dataclass(frozen=True)
class Ratio:
    """A metric that is one sum over images divided by another.

    Attributes:
        numerator: float ``(I,)``, of each image.
        denominator: likewise.
    """

    numerator: np.ndarray
    denominator: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Args: weights: ``(B, I)``. Returns ``(B,)``, NaN where the denominator is 0."""
        below = weights @ self.denominator.astype(float)
        above = weights @ self.numerator.astype(float)
        return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)
