"""Means, intervals and paired differences over the seeds of a study, and over its images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from ..estimate import Estimate

LEVEL = 0.95
_ROUNDING = 1e-9


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean of the values that are defined, and Student's interval for it.

    For n values with standard deviation s (of n - 1 degrees of freedom), mean plus and minus
    t(0.975, n - 1) s / sqrt(n): Student, *The probable error of a mean*, Biometrika 6 (1908).

    Args:
        values: one a seed; None where it is not defined.

    Returns:
        The mean, without an interval for a single value.
    """
    defined = [value for value in values if value is not None]
    number = len(defined)
    if number == 0:
        return Estimate(math.nan, number=0, over="seeds")
    mean = float(np.mean(defined))
    if number == 1:
        return Estimate(mean, over="seeds")
    error = float(np.std(defined, ddof=1)) / math.sqrt(number)
    half = float(stats.t.ppf((1 + LEVEL) / 2, number - 1)) * error
    return Estimate(mean, mean - half, mean + half, number, "seeds")


def with_images(over_seeds: Estimate, over_images: Iterable[Estimate]) -> Estimate:
    """A mean over seeds, with an interval over the images that all of them were measured on too.

    The half-widths are combined in squares, as those of two independent errors (Zou & Donner,
    Statistics in Medicine 27, 2008), half^2 = half_seeds^2 + mean(half_images^2): the error of the
    images is common to the seeds and does not shrink with their number. It is cautious: what of a
    seed's error over images is its own is in both terms.

    Args:
        over_seeds: the mean.
        over_images: the measurement of each seed, with its interval.

    Returns:
        The estimate over "seeds and images"; that over seeds where one of the two has no interval.
    """
    squares = [each.half_width**2 for each in over_images if each.has_interval]
    if not squares or not over_seeds.has_interval:
        return over_seeds
    half = math.hypot(over_seeds.half_width, math.sqrt(float(np.mean(squares))))
    value = over_seeds.value
    return Estimate(value, value - half, value + half, over_seeds.number, "seeds and images")


def minus(measured: Estimate, reference: Estimate) -> Estimate:
    """The difference of two measurements, with the interval that it has if they are independent."""
    value = measured.value - reference.value
    half = math.hypot(measured.half_width, reference.half_width)
    return Estimate(value, value - half, value + half)


def paired_difference(
    values: Mapping[int, float | None], reference: Mapping[int, float | None]
) -> Estimate:
    """Mean difference of two variants over the seeds that both have, with its interval.

    A seed gives both variants the same initial weights and the same images in the same order, so
    differences of one seed vary less than the variants themselves.

    Args:
        values: by seed.
        reference: by seed; subtracted.

    Returns:
        The :func:`estimate` of the differences, of which those below 1e-9 are rounding, and 0.
    """
    pairs = [(values[seed], reference[seed]) for seed in values if seed in reference]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return estimate([0.0 if abs(each) < _ROUNDING else each for each in differences])
