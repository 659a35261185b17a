"""How far new statistics of a layer are from its old ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    def largest_channel(self) -> int:
        """The channel in which the larger of the two is largest."""
        return int(torch.maximum(self.mean.abs(), self.std.abs()).argmax())


@torch.no_grad()
def statistics_change(layer: nn.Module, new: PopulationStatistics) -> StatisticsChange:
    """Compare new statistics with those that a layer has.

    Args:
        layer: a BN layer with running statistics of C channels.
        new: of the layer.
    """
    old_mean, old_var = layer.running_mean.double(), layer.running_var.double()
    old_std, new_std = (old_var + layer.eps).sqrt(), (new.var + layer.eps).sqrt()
    return StatisticsChange((new.mean - old_mean) / old_std, (new_std / old_std).log())
