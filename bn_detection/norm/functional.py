"""Batch normalization over groups of rows, as an explicit autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import accumulation_dtype, choose_kernels
from .partition import Groups

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GroupStatistics:
    """Mini-batch statistics of every group.

    Attributes:
        count: ``(G, 1)`` float64, number of values a channel (N x H x W); 0 for an empty group.
        mean: ``(G, C)`` float64.
        var: ``(G, C)`` float64, biased.
    """

    count: Tensor
    mean: Tensor
    var: Tensor


@torch.no_grad()
def group_statistics(
    x: Tensor, groups: Groups, all_reduce: AllReduce | None = None, *, kernels: str = "auto"
) -> GroupStatistics:
    """The statistics of each group, in one pass over ``x`` and at most one collective.

    Each row's mean and variance are computed stably, and only then summed, in float64: a mean of
    10,000 standard deviations costs eight of its sixteen digits.

    Args:
        x: ``(N, C, H, W)``, any floating dtype; N may be zero.
        groups: the group of each row.
        all_reduce: sums a float64 tensor over the workers, if groups span them: 2C + 1 numbers a
            group.
        kernels: one of :data:`bn_detection.norm.KERNELS`.
    """
    channels = x.shape[1]
    if x.numel() > 0:
        sums = choose_kernels(kernels, x.device).moments(x, groups)
    else:
        sums = x.new_zeros(groups.number, 2 * channels + 1, dtype=torch.float64)
    if all_reduce is not None:
        sums = all_reduce(sums)
    count = sums[:, :1]
    mean, square = (sums[:, 1:] / count.clamp(min=1)).chunk(2, dim=1)
    return GroupStatistics(count, mean, square.addcmul(mean, mean, value=-1).clamp_(min=0))


def merge_statistics(parts: Sequence[GroupStatistics]) -> GroupStatistics:
    """The statistics of each group from those of all its parts (Chan et al. 1979)."""
    count, mean, var = (
        torch.stack([getattr(part, name) for part in parts]) for name in ("count", "mean", "var")
    )
    total = count.sum(0)
    share = count / total.clamp(min=1)
    merged = (share * mean).sum(0)
    return GroupStatistics(total, merged, (share * (var + (mean - merged).square())).sum(0))


def grouped_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: GroupStatistics,
    groups: Groups,
    eps: float,
    *,
    all_reduce: AllReduce | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Normalize each row with the statistics of its group, differentiated through them.

    ``y = ((x - mean_g) / sqrt(var_g + eps) * r_g + d_g) * weight + bias``, with r = 1 and d = 0
    unless given. The gradients of weight and bias are this worker's share (DDP averages them).

    Args:
        x: ``(N, C, H, W)``, any floating dtype; N may be zero.
        weight: ``(C,)``, the affine scale; None for 1.
        bias: ``(C,)``, the affine shift; None for 0.
        statistics: of :func:`group_statistics` for the same ``x``.
        groups: the group of each row.
        eps: added to the variance.
        all_reduce: as there, called once in the backward: 2C numbers a group.
        correction: r and d of Batch Renormalization, ``(G, C)``; no gradient flows through them.
        kernels: as there.

    Returns:
        The output, in the shape and dtype of ``x``.
    """
    if weight is None:
        weight, bias = torch.ones_like(statistics.mean[0]), torch.zeros_like(statistics.mean[0])
    y: Tensor = _GroupedBatchNorm.apply(
        x, weight, bias, statistics, groups, eps, all_reduce, correction or (None, None), kernels
    )
    return y


class _GroupedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: GroupStatistics,
        groups: Groups,
        eps: float,
        all_reduce: AllReduce | None,
        correction: tuple[Tensor | None, Tensor | None],
        kernels: str,
    ) -> Tensor:
        r, d = correction
        acc = accumulation_dtype(x)
        invstd = (statistics.var + eps).rsqrt()
        if r is None or d is None:
            scale, shift = weight * invstd, bias
        else:
            scale, shift = weight * r * invstd, (bias + weight * d).to(acc)
        mean, scale = statistics.mean.to(acc), scale.to(acc)
        ctx.save_for_backward(x, scale, mean, invstd, statistics.count, r, d)
        ctx.groups, ctx.all_reduce, ctx.kernels = groups, all_reduce, kernels
        ctx.parameter_dtype = weight.dtype
        if x.numel() == 0:
            return torch.empty_like(x)
        return choose_kernels(kernels, x.device).affine(x, mean, scale, shift, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _gradients(
            grad,
            *ctx.saved_tensors,
            groups=ctx.groups,
            all_reduce=ctx.all_reduce,
            kernels=ctx.kernels,
            parameter_dtype=ctx.parameter_dtype,
            needs_input_grad=ctx.needs_input_grad[0],
        )
        return (*gradients, *(None,) * 6)


def _gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    r: Tensor | None,
    d: Tensor | None,
    *,
    groups: Groups,
    all_reduce: AllReduce | None,
    kernels: str,
    parameter_dtype: torch.dtype,
    needs_input_grad: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of x, and this worker's of weight and bias, from the saved tensors."""
    # Sums over each group of grad and of grad * xhat, side by side.
    channels = x.shape[1]
    if x.numel() > 0:
        passes = choose_kernels(kernels, x.device)
        sums = passes.gradient_sums(grad, x, mean, groups)
    else:
        sums = invstd.new_zeros(groups.number, 2 * channels)
    sums[:, channels:].mul_(invstd)
    of_worker = sums
    if r is not None and d is not None:
        grad_sum, product_sum = sums.chunk(2, dim=1)
        of_worker = torch.cat([grad_sum, r * product_sum + d * grad_sum], dim=1)
    grad_bias, grad_weight = of_worker.sum(0).to(parameter_dtype).chunk(2)
    if not needs_input_grad:
        return None, grad_weight, grad_bias
    if all_reduce is not None:
        sums = all_reduce(sums)
    if x.numel() == 0:
        return torch.empty_like(x), grad_weight, grad_bias
    sums = sums / count.clamp(min=1)
    sums[:, channels:].mul_(invstd)
    shift, slope = sums.to(mean.dtype).chunk(2, dim=1)
    grad_x = passes.input_gradient(grad, x, mean, scale, shift, slope, groups)
    return grad_x, grad_weight, grad_bias
