"""How far new statistics of a layer are from its old ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norm import TrackingBatchNorm
from .estimators import PopulationStatistics


@dataclass(frozen=True)
class StatisticsChange:
    """What new statistics change in a layer's output before its affine parameters.

    With s = sqrt(var + eps), the normalized values are shifted by ``mean`` and divided by
    ``exp(std)``. Both are free of scale.

    Attributes:
        mean: ``(C,)`` float64, (mean_new - mean_old) / s_old.
        std: ``(C,)`` float64, ln(s_new / s_old).
    """

    mean: Tensor
    std: Tensor

    @property
    def rms_mean(self) -> float:
        """Root mean square of ``mean`` over the channels."""
        return float(self.mean.square().mean().sqrt())

    @property
    def rms_std(self) -> float:
        """Root mean square of ``std`` over the channels."""
        return float(self.std.square().mean().sqrt())

    @property
    def rms(self) -> float:
        """Both together: the root of the sum of the squares of ``rms_mean`` and ``rms_std``."""
        return math.hypot(self.rms_mean, self.rms_std)

    @property
    def largest_channel(self) -> int:
        """The channel in which the larger of the two is largest."""
        return int(torch.maximum(self.mean.abs(), self.std.abs()).argmax())


@torch.no_grad()
def statistics_change(layer: TrackingBatchNorm, new: PopulationStatistics) -> StatisticsChange:
    """Compare new statistics with those that a layer has.

    Args:
        layer: a BN layer with running statistics of C channels.
        new: of the layer.
    """
    old = layer.running_mean.double(), layer.running_var.double()
    return change_between(old, (new.mean, new.var), layer.eps)


def change_between(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float
) -> StatisticsChange:
    """Compare two means and variances of the same channels.

    Args:
        old: mean and variance, ``(C,)`` float64 each.
        new: likewise.
        eps: that the layer adds to the variance.
    """
    old_std, new_std = (old[1] + eps).sqrt(), (new[1] + eps).sqrt()
    return StatisticsChange((new[0] - old[0]) / old_std, (new_std / old_std).log())
