"""Means, intervals and paired differences over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bn_detection.study.estimates import estimate, paired_difference
from bn_detection.study.results import decimals, unit

# Extra hours of sleep of ten patients with two drugs: Student, Biometrika 6 (1908), p. 20.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([50.0], 50.0, None),
        # Two-sided 95 % points of Student's t from tables: 12.706, 4.303, 2.776, 2.262.
        ([1.0, 3.0], 2.0, 12.706),
        ([1.0, 2.0, 3.0], 2.0, 4.303 / 3**0.5),
        ([-2.0, -1.0, 0.0, 1.0, 2.0], 0.0, 2.776 * 2.5**0.5 / 5**0.5),
        ([0.0] * 5 + [2.0] * 5, 1.0, 2.262 * (10 / 9) ** 0.5 / 10**0.5),
        ([1.0, None, 3.0], 2.0, 12.706),
    ],
)
def test_mean_and_interval(
    values: list[float | None], mean: float, half_width: float | None
) -> None:
    found = estimate(values)
    assert found.value == pytest.approx(mean)
    assert found.has_interval == (half_width is not None)
    assert half_width is None or found.half_width == pytest.approx(half_width, rel=3e-4)
    assert found.number == sum(value is not None for value in values)


def test_paired_difference_of_students_own_example() -> None:
    found = paired_difference(dict(enumerate(SECOND)), dict(enumerate(FIRST)))
    # The difference of 1.58 h and its interval, as textbooks and R's t.test give them.
    assert found.value == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert found.sign == 1
    unpaired = estimate(SECOND).half_width
    assert found.half_width < unpaired


def test_paired_difference_is_that_of_scipy() -> None:
    random = np.random.default_rng(3)
    for number in (2, 3, 5, 30):
        a, b = random.normal(80, 5, (2, number))
        found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        # The interval excludes zero exactly where the two-sided test rejects.
        assert (found.sign != 0) == (stats.ttest_rel(a, b).pvalue < 0.05)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    found = [estimate(list(values)) for values in random.normal(7, 3, (4000, 3))]
    covered = np.mean([each.low < 7 < each.high for each in found])
    # Binomial standard error 0.0034.
    assert covered == pytest.approx(0.95, abs=0.015)


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired_difference({1: 5.0, 2: 7.0, 3: None, 4: 9.0}, {1: 4.0, 2: 4.0, 3: 1.0, 5: 0.0})
    assert (found.value, found.number) == (2.0, 2)
    assert found.low == pytest.approx(2 - 12.7062, abs=1e-4)
    assert found.sign == 0


def test_a_difference_that_is_rounding_is_none() -> None:
    values = {1: 70.1, 2: 71.2, 3: 72.3}
    found = paired_difference({seed: value + 3e-14 for seed, value in values.items()}, values)
    assert (found.value, found.half_width, found.sign) == (0.0, 0.0, 0)
    found = paired_difference({seed: value + 1e-3 for seed, value in values.items()}, values)
    assert found.value == pytest.approx(1e-3)
    assert found.sign == 1


@pytest.mark.parametrize(
    ("values", "number"), [([], 0), ([None, None], 0), ([3.0], 1), ([3.0, None], 1)]
)
def test_no_interval_where_none_is_supported(values: list[float | None], number: int) -> None:
    found = estimate(values)
    assert np.isnan([found.low, found.high, found.half_width]).all()
    assert found.sign is None
    assert found.number == number
    assert found.is_known == (number > 0)


@pytest.mark.parametrize(
    ("name", "of", "places"),
    [
        ("box AP", "%", 1),
        ("training accuracy", "%", 1),
        ("mask accuracy, own image", "%", 1),
        ("leakage in accuracy", "points", 1),
        ("accuracy above the limit", "points", 1),
        ("loss, shuffled", "nats/RoI", 3),
        ("inconsistency in mask loss", "nats/pixel", 3),
    ],
)
def test_units_and_decimals_of_a_study_are_those_of_the_table(
    name: str, of: str, places: int
) -> None:
    assert (unit(name), decimals(name)) == (of, places)
