"""Means, intervals and paired differences over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bn_detection.estimate import Estimate
from bn_detection.study.estimates import estimate, minus, paired_difference, with_images
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


def test_the_interval_over_seeds_and_images_by_hand() -> None:
    over_images = [Estimate(19.0, 17.0, 21.0), Estimate(20.0, 16.0, 24.0), Estimate(21.0)]
    found = with_images(estimate([19.0, 20.0, 21.0]), over_images)
    # 4.303 / sqrt(3) over the seeds; a mean of 2 ** 2 and 4 ** 2 over the images.
    assert found.half_width == pytest.approx((4.303**2 / 3 + 10) ** 0.5, rel=1e-4)
    assert (found.value, found.number, found.over) == (20.0, 3, "seeds and images")
    for without in ([], [Estimate(19.0)]):
        assert with_images(estimate([19.0, 21.0]), without) == estimate([19.0, 21.0])
    assert with_images(estimate([19.0]), over_images) == estimate([19.0])


def test_a_difference_of_measurements_by_hand() -> None:
    found = minus(Estimate(9.0, 6.0, 12.0), Estimate(5.0, 1.0, 9.0))
    assert (found.value, found.low, found.high) == (4.0, -1.0, 9.0)
    assert not minus(Estimate(9.0, 6.0, 12.0), Estimate(5.0)).has_interval


@pytest.mark.parametrize("of_seed", [0.0, 0.5, 2.0])
def test_the_same_images_for_each_seed_are_covered_too(of_seed: float) -> None:
    """Seeds, images, and how a seed takes an image, all normal: a two-way layout with one cell."""
    rng = np.random.default_rng(0)
    number, images, studies = 3, 40, 2000
    of_images = rng.normal(0, 6, (studies, 1, images))
    of_both = rng.normal(0, 3, (studies, number, images))
    seeds = rng.normal(0, of_seed, (studies, number, 1))
    measured = 10 + seeds + of_images + of_both
    over_seeds = over_both = 0
    for study in measured:
        means = study.mean(-1)
        half = stats.t.ppf(0.975, images - 1) * study.std(-1, ddof=1) / images**0.5
        ends = [Estimate(m, m - h, m + h) for m, h in zip(means, half, strict=True)]
        alone = estimate([*means])
        both = with_images(alone, ends)
        over_seeds += alone.low < 10 < alone.high
        over_both += both.low < 10 < both.high
    assert over_both / studies > 0.945
    # What is wrong with the seeds alone: they do not see the error that they share.
    assert over_seeds / studies < (0.8 if of_seed < 1 else 0.95)


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
