"""The passes over activations: statistics, normalization and gradient sums of every row.

A row of ``x`` is ``x[i]``, ``(C, H, W)``. A contiguous ``(N, C, H, W)`` tensor is also one of
shape ``(1, N * C, H, W)``, so torch's fused batch-norm kernels give the statistics of every row and
channel in one pass. ``shared`` means those of all rows together, ``(1, C)`` instead of ``(N, C)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else the dtype of ``x``."""
    return torch.float32 if x.dtype in _HALF else x.dtype


def use_rows(x: Tensor, one_group: bool) -> bool:
    """Whether to work row by row: where rows have groups, and on CPUs, where it is faster."""
    return not one_group or (x.device.type == "cpu" and x.is_contiguous())


def row_statistics(x: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over H and W (and rows, if ``shared``) of a non-empty ``x``."""
    on_cpu = x.device.type == "cpu"
    if shared or (x.is_contiguous() and not on_cpu):
        if on_cpu:  # whose kernel returns the statistics in the dtype of x
            x = x.to(accumulation_dtype(x))
        mean, var = torch.batch_norm_update_stats(_as_channels(x, shared), None, None, 0.0)
        return mean.view(-1, x.shape[1]), var.view(-1, x.shape[1])
    # On a CPU, simple passes are twice as fast as the kernel, which reads x twice as well.
    mean = x.mean((2, 3), dtype=accumulation_dtype(x))
    deviation = x - mean[:, :, None, None]
    return mean, deviation.square_().mean((2, 3))


def row_affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - mean) * scale + shift``, with parameters ``(N, C)`` or ``(1, C)``; as ``x``."""
    shared = mean.shape[0] == 1
    if shared or x.is_contiguous():
        mean, scale, shift = (t.flatten() for t in (mean, scale, shift))
        y = torch.batch_norm(
            _as_channels(x, shared), scale, shift, mean, torch.ones_like(mean), False, 0, 0, False
        )
        # Not a view, or an in-place ReLU after the layer would be refused.
        return y if shared else torch.ops.aten._unsafe_view(y, x.shape)
    mean, scale, shift = (t[:, :, None, None] for t in (mean, scale, shift))
    return torch.addcmul(shift, x - mean, scale).to(x.dtype)


def row_gradient_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over H and W of ``grad`` and of ``grad * (x - mean)``, both of the shape of ``mean``."""
    shared = mean.shape[0] == 1
    if x.device.type == "cpu":  # whose kernel rounds half-precision sums if memory formats differ
        x, grad = x.to(mean.dtype), grad.to(mean.dtype)
    if shared or x.is_contiguous():
        ones, grad = torch.ones_like(mean).flatten(), grad if shared else grad.contiguous()
        _, products, sums = torch.ops.aten.native_batch_norm_backward(
            _as_channels(grad, shared),
            _as_channels(x, shared),
            ones,
            mean.flatten(),
            ones,
            None,
            None,
            False,
            0.0,
            [False, True, True],
        )
        return sums.view_as(mean), products.view_as(mean)
    grad = grad.to(mean.dtype)
    deviation = x - mean[:, :, None, None]
    return grad.sum((2, 3)), deviation.mul_(grad).sum((2, 3))


def _as_channels(x: Tensor, shared: bool) -> Tensor:
    return x if shared else x.view(1, x.shape[0] * x.shape[1], *x.shape[2:])
