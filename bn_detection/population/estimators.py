"""Estimators of population statistics: what is kept of each batch, and what is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..norm import GroupStatistics


@dataclass(frozen=True)
class PopulationStatistics:
    """An estimate of the population statistics of a layer.

    Attributes:
        mean: ``(C,)`` float64.
        var: ``(C,)`` float64, unbiased.
        mean_error: ``(C,)`` float64, standard error of ``mean`` by batch means; nan from one batch.
        var_error: ``(C,)`` float64, that of ``var``.
        count: values a channel (N x H x W) of all workers that it rests on.
    """

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor
    count: int

    @property
    def relative_error(self) -> float:
        """One number, free of scale: the larger of two root mean squares over the channels, of the
        error of the mean over the standard deviation, and of the error of the variance over it.
        """
        var = self.var.clamp(min=torch.finfo(torch.float32).tiny)
        errors = (self.mean_error / var.sqrt(), self.var_error / var)
        return max(float(error.square().mean().sqrt()) for error in errors)


class Estimator(Protocol):
    """Turns the statistics of groups into population statistics.

    What it keeps of some values are R rows of C numbers, float64; zeros for none.

    Attributes:
        rows: R.
    """

    rows: int

    def keep(self, statistics: GroupStatistics) -> Tensor:
        """``(R, C)``, from the groups of one forward."""

    def merge(self, parts: Tensor) -> Tensor:
        """``(P, R, C)`` to ``(R, C)``: those of all values together."""

    def estimate(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, their standard errors and the number of values, ``(C,)`` each, from
        ``(P, R, C)``.
        """


ESTIMATORS: dict[str, Estimator] = {}
"""By the name that ``BN.POPULATION.ESTIMATOR`` has for it."""

E = TypeVar("E", bound=type[Estimator])


def register_estimator(name: str) -> Callable[[E], E]:
    """Class decorator: make an :class:`Estimator` available under ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: E) -> E:
        if name in (*ESTIMATORS, "ema", "fvcore"):
            raise ValueError(f'The estimator "{name}" is registered already.')
        ESTIMATORS[name] = cls()
        return cls

    return register


@register_estimator("pooled")
class Pooled:
    """Mean and unbiased variance of all values together (Chan et al. 1979).

    Keeps their count, mean and sum of squared deviations.
    """

    rows = 3

    def keep(self, statistics: GroupStatistics) -> Tensor:
        count = statistics.count.expand_as(statistics.mean)
        of_groups = torch.stack([count, statistics.mean, count * statistics.var], dim=1)
        return of_groups[0] if len(of_groups) == 1 else self.merge(of_groups)

    def merge(self, parts: Tensor) -> Tensor:
        count, mean, deviations = parts.unbind(1)
        total = count.sum(0)
        pooled = (count * mean).sum(0) / total.clamp(min=1)
        deviations = (deviations + count * (mean - pooled).square()).sum(0)
        return torch.stack([total, pooled, deviations])

    def estimate(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count, mean, deviations = parts.unbind(1)
        total, pooled, all_deviations = self.merge(parts)
        var = all_deviations / (total - 1).clamp(min=1)
        spread = deviations / count.clamp(min=1) + (mean - pooled).square()
        biased = all_deviations / total.clamp(min=1)
        return (
            pooled,
            var,
            standard_error(mean, pooled, count),
            standard_error(spread, biased, count),
            total,
        )


@register_estimator("mean_of_variances")
class MeanOfVariances:
    """Averages of the groups' means and unbiased variances, each group alike.

    Keeps the count of values; and of the groups with two values or more, their count and the sums
    of their means and variances.
    """

    rows = 4

    def keep(self, statistics: GroupStatistics) -> Tensor:
        count, mean, var = statistics.count, statistics.mean, statistics.var
        usable = (count > 1).double()
        unbiased = var * count / (count - 1).clamp(min=1)
        columns = [count.expand_as(mean), usable.expand_as(mean), usable * mean, usable * unbiased]
        return torch.stack(columns).sum(1)

    def merge(self, parts: Tensor) -> Tensor:
        return parts.sum(0)

    def estimate(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        _, groups, *of_parts = parts.unbind(1)
        count, number, *of_all = self.merge(parts)
        means, variances = (values / groups.clamp(min=1) for values in of_parts)
        mean, var = (values / number.clamp(min=1) for values in of_all)
        errors = standard_error(means, mean, groups), standard_error(variances, var, groups)
        # Groups of one value have no variance, and a layer of such groups alone no estimate.
        return mean, var, *errors, torch.where(number > 0, count, 0)


def standard_error(values: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """Standard error of a weighted mean, from the parts that it is the mean of.

    Args:
        values: ``(P, C)``, of each part.
        mean: ``(C,)``, theirs.
        weight: ``(P, C)``, of each part; parts of weight 0 do not count.

    Returns:
        ``(C,)``; nan where fewer than two parts count.
    """
    number = (weight > 0).sum(0)
    share = weight / weight.sum(0).clamp(min=1)
    squares = (share * (values - mean)).square().sum(0)
    error = (squares * number / (number - 1).clamp(min=1)).sqrt()
    return torch.where(number > 1, error, torch.full_like(error, math.nan))
