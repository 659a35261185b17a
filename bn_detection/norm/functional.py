"""Batch normalization over the samples of all workers, as an explicit autograd function."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Statistics = tuple[int, Tensor, Tensor]


def world_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Statistics]:
    """Normalize with the mean and biased variance of all workers' values together.

    Forward sends 2C+1 float64 numbers a worker (an all-gather), backward 2C (an all-reduce). Every
    worker of the default process group must call it; a worker's N may differ or be zero.

    Args:
        x: ``(N, C, H, W)``, any floating dtype.
        weight: ``(C,)``, the affine scale.
        bias: ``(C,)``, the affine shift.
        eps: added to the variance.

    Returns:
        The output, as ``x``, and ``(count, mean, var)``: the number of values a channel, their mean
        and biased variance, ``(C,)`` float64, the same bits on every worker.
    """
    with torch.no_grad():
        count, mean, var = _world_statistics(x)
    return _WorldBatchNorm.apply(x, weight, bias, mean, var, count, eps), (count, mean, var)


def _world_statistics(x: Tensor) -> Statistics:
    channels = x.shape[1]
    local = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    count = x.numel() // channels
    if count > 0:
        mean, var = _mean_and_var(x)
        local[0] = count
        local[1 : channels + 1] = mean
        local[channels + 1 :] = var
    gathered = local.new_empty(dist.get_world_size(), local.numel())
    dist.all_gather(list(gathered.unbind(0)), local)
    counts, means, variances = gathered.split([1, channels, channels], dim=1)
    total = counts.sum()
    if total == 0:
        return 0, local.new_zeros(channels), local.new_ones(channels)
    # Chan et al. 1979: the variance of a union from the parts' counts, means and variances.
    weights = counts / total
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return int(total), mean, var


def _mean_and_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, in at least float32; the variance is biased."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.device.type == "cpu":  # the kernel of nn.BatchNorm2d, three times faster than var_mean
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


class _WorldBatchNorm(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, differentiated through mean and var."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
    ) -> Tensor:
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if x.numel() > 0:
            # With fixed statistics the parameter gradients are the two sums that grad_x needs.
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        else:
            grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_weight, grad_bias]).double()
            dist.all_reduce(sums)
            mean_grad_xhat, mean_grad = sums / max(ctx.count, 1)
            invstd = (var.double() + ctx.eps).rsqrt()
            # weight * invstd * (grad - mean_grad - xhat * mean_grad_xhat), linear in grad and x.
            scale = weight.double() * invstd
            slope = -scale * mean_grad_xhat * invstd
            shift = -scale * mean_grad - slope * mean.double()
            scale, slope, shift = (
                t.to(weight.dtype).view(1, -1, 1, 1) for t in (scale, slope, shift)
            )
            grad_x = torch.addcmul(shift, grad, scale).addcmul_(x, slope).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None
