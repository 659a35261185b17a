"""Batch normalization over groups of rows, as an explicit autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .partition import Groups
from .rows import accumulation_dtype, row_affine, row_gradient_sums, row_statistics, use_rows

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
    x: Tensor, groups: Groups, all_reduce: AllReduce | None = None
) -> GroupStatistics:
    """The statistics of each group, in one pass over ``x`` and at most one collective.

    Each row's mean and variance are computed stably, and only then summed, in float64: a mean of
    10,000 standard deviations costs eight of its sixteen digits.

    Args:
        x: ``(N, C, H, W)``, any floating dtype; N may be zero.
        groups: the group of each row.
        all_reduce: sums a float64 tensor over the workers, if groups span them: 2C + 1 numbers a
            group.
    """
    channels = x.shape[1]
    sums = torch.zeros(groups.number, 2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel() > 0:
        shared = not use_rows(x, groups.ids is None)
        mean, var = (t.double() for t in row_statistics(x, shared=shared))
        # Values a row; shared statistics count as those of one row.
        weight = x.numel() / mean.numel()
        rows = torch.cat([torch.ones_like(mean[:, :1]), mean, var + mean.square()], dim=1)
        sums = _sum_by_group(rows.mul_(weight), groups)
    if all_reduce is not None:
        sums = all_reduce(sums)
    count, total, squares = sums.split([1, channels, channels], dim=1)
    safe = count.clamp(min=1)
    mean = total / safe
    return GroupStatistics(count, mean, (squares / safe - mean.square()).clamp_(min=0))


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

    Returns:
        The output, in the shape and dtype of ``x``.
    """
    if weight is None:
        weight, bias = torch.ones_like(statistics.mean[0]), torch.zeros_like(statistics.mean[0])
    return _GroupedBatchNorm.apply(
        x, weight, bias, statistics, groups, eps, all_reduce, correction or (None, None)
    )


class _GroupedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: GroupStatistics,
        groups: Groups,
        eps: float,
        all_reduce: AllReduce | None,
        correction: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        r, d = correction
        invstd = (statistics.var + eps).rsqrt()
        scale = weight.double() * invstd if r is None else weight.double() * r * invstd
        shift = bias.double().expand_as(scale) if d is None else bias.double() + weight.double() * d
        ctx.save_for_backward(x, scale, statistics.mean, invstd, statistics.count, r, d)
        ctx.groups, ctx.all_reduce = groups, all_reduce
        ctx.parameter_dtype = weight.dtype
        if x.numel() == 0:
            return torch.empty_like(x)
        parameters = statistics.mean, scale, shift
        if groups.ids is None:  # by channels, which is faster here than by rows, and holds less
            return row_affine(x, *(t.to(accumulation_dtype(x)) for t in parameters))
        return row_affine(x, *(_to_rows(t, x, groups) for t in parameters))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, invstd, count, r, d = ctx.saved_tensors
        groups: Groups = ctx.groups
        # Sums over each group of grad and of grad * xhat, side by side.
        sums = scale.new_zeros(groups.number, 2 * x.shape[1])
        if x.numel() > 0:
            rows = row_gradient_sums(grad, x, _to_rows(mean, x, groups))
            sums = _sum_by_group(torch.cat(rows, dim=1).double(), groups)
        grad_sum, product_sum = sums.chunk(2, dim=1)
        product_sum.mul_(invstd)
        grad_weight = product_sum if r is None else r * product_sum + d * grad_sum
        grad_weight, grad_bias = (t.sum(0).to(ctx.parameter_dtype) for t in (grad_weight, grad_sum))
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.all_reduce is not None:
                sums = ctx.all_reduce(sums)
            mean_grad, mean_product = (sums / count.clamp(min=1)).chunk(2, dim=1)
            # scale * (grad - mean_grad - xhat * mean_product), linear in grad and x.
            slope = -scale * mean_product * invstd
            shift = -scale * mean_grad - slope * mean
            grad_x = _combine(grad, x, *(_to_rows(t, x, groups) for t in (scale, slope, shift)))
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _combine(grad: Tensor, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """``grad * scale + x * slope + shift``, as ``x``."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if grad.dtype == scale.dtype:
        out = row_affine(grad, torch.zeros_like(shift), scale, shift)
    else:  # half precision, summed in float32
        out = torch.addcmul(shift[:, :, None, None], grad, scale[:, :, None, None])
    return out.addcmul_(x, slope[:, :, None, None]).to(x.dtype)


def _sum_by_group(rows: Tensor, groups: Groups) -> Tensor:
    """``(N, K)`` to ``(G, K)``."""
    if groups.ids is None:
        return rows.sum(0, keepdim=True)
    return rows.new_zeros(groups.number, rows.shape[1]).index_add_(0, groups.ids, rows)


def _to_rows(values: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """``(G, C)`` to the parameters of each row, in the dtype that ``x`` is computed in."""
    values = values.to(accumulation_dtype(x))
    if groups.ids is not None:
        return values[groups.ids]
    return values.expand(x.shape[0], -1) if use_rows(x, True) else values
