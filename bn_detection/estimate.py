"""A number with its 95 % interval, and bootstrap intervals.

Images that share a normalization batch depend on each other. What is resampled are units that share
none, whole; measurements on the same units are paired: they are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; NaN where there is none.

    Attributes:
        value: the number.
        low: lower end of the interval.
        high: upper end.
        number: of the values that it is a mean of.
        over: what the interval is over: "images", "seeds", or "seeds and images".
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    number: int = 1
    over: str = "images"

    @classmethod
    def of(cls, values: NDArray[Any], units: int) -> Estimate:
        """From what :func:`resample` gives: the percentile interval (Efron & Tibshirani 1993).

        The interval of n units is widened by t(n - 1) / z sqrt(n / (n - 1)), of 97.5 %, which
        makes that of a mean Student's.

        Args:
            values: float ``(1 + B,)``; NaN of resamples without a value are passed over.
            units: that were resampled; from one there is no interval.
        """
        from scipy.special import ndtri, stdtrit  # takes as long to import as this package

        value, resampled = float(values[0]), values[1:]
        resampled = resampled[np.isfinite(resampled)]
        if not math.isfinite(value) or not len(resampled) or units < 2:
            return cls(value)
        widened = stdtrit(units - 1, 0.975) / ndtri(0.975)
        widened *= math.sqrt(units / (units - 1))
        low, high = value + widened * (np.percentile(resampled, _PERCENTILES) - value)
        return cls(value, float(low), float(high))

    @property
    def is_known(self) -> bool:
        """Whether there is a number."""
        return math.isfinite(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Estimate:
        """From what :meth:`to_json` gives; what is null or not there is NaN."""
        ends = [record.get(key) for key in ("value", "low", "high")]
        value, low, high = (math.nan if end is None else end for end in ends)
        return cls(value, low, high)

    @property
    def sign(self) -> int | None:
        """1 where the interval is above zero, -1 below, 0 where it has zero, None without one."""
        return int(self.low > 0) - int(self.high < 0) if self.has_interval else None

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def exceeds(self, margin: float) -> bool:
        """Whether the whole interval is above a margin; false without an interval.

        An effect that is no larger than the margin is then said to be larger at most once in 40
        times. An interval above 0 with a value above the margin would promise that of 0 alone.
        """
        return self.low > margin

    def scaled(self, factor: float) -> Estimate:
        """The estimate of a multiple of the number."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.value, low, high, self.number, self.over)

    def text(self, decimals: int) -> str:
        """With the interval, where there is one; "-" where there is no value."""
        if not self.is_known:
            return "-"
        value, low, high = (f"{x:.{decimals}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]" if self.has_interval else value

    def to_json(self) -> dict[str, float | None]:
        """The number and its interval by name; null for what is not finite."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {key: end if math.isfinite(end) else None for key, end in ends.items()}


def resample(units: int, resamples: int, seed: int = 0) -> NDArray[np.int64]:
    """How often each unit is in each bootstrap resample.

    Args:
        units: n.
        resamples: B.
        seed: of the drawing.

    Returns:
        int64 ``(1 + B, n)``: a row of ones, the units as they are, and the resamples.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(units, np.full(units, 1 / units), size=resamples)
    return np.concatenate([np.ones((1, units), drawn.dtype), drawn])


@dataclass(frozen=True)
class Ratio:
    """A metric that is one sum over images divided by another.

    Attributes:
        numerator: float ``(I,)`` or ``(I, C)``, of each image.
        denominator: likewise.
    """

    numerator: NDArray[Any]
    denominator: NDArray[Any]

    def __call__(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Args: weights: ``(B, I)``. Returns ``(B,)`` or ``(B, C)``, NaN where it divides by 0."""
        below: NDArray[np.float64] = weights @ self.denominator.astype(float)
        above = weights @ self.numerator.astype(float)
        ratio = np.full_like(below, np.nan)
        np.divide(above, below, out=ratio, where=below > 0)
        return ratio
