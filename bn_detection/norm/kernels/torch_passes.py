"""The passes in torch's public operations: right on every device, in every memory format."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..partition import Groups

_HALF = (torch.float16, torch.bfloat16)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else the dtype of ``x``."""
    return torch.float32 if x.dtype in _HALF else x.dtype


class TorchKernels:
    """:class:`bn_detection.norm.kernels.Kernels` of torch's operations, a chunk of rows at a time.

    So a temporary tensor is no larger than a chunk or a row, and stays in the cache.

    Args:
        chunk: elements of a chunk, at most, unless one row has more.
        fused: whether contiguous rows are normalized by ``torch.batch_norm``, as one sample of
            N x C channels: the fastest on a CPU; on a GPU each of these channels would be a block
            of threads, most of which idle on maps of 7x7.
    """

    name = "torch"

    def __init__(self, chunk: int, fused: bool) -> None:
        self.chunk = chunk
        self.fused = fused

    def moments(self, x: Tensor, groups: Groups) -> Tensor:
        means, variances = [], []
        for rows in self._chunks(x):
            values = x[rows].to(accumulation_dtype(x))
            mean = values.mean((2, 3))
            means.append(mean)
            variances.append((values - mean[:, :, None, None]).square_().mean((2, 3)))
        mean, var = torch.cat(means).double(), torch.cat(variances).double()
        values = torch.cat([torch.ones_like(mean[:, :1]), mean, var.add_(mean.square())], dim=1)
        return _sum_by_group(values.mul_(x.shape[2] * x.shape[3]), groups)

    def affine(
        self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, groups: Groups
    ) -> Tensor:
        parameters = [mean, scale, shift.to(mean.dtype).expand_as(mean)]
        if self._use_batch_norm(x, groups):
            mean, scale, shift = parameters
            return _batch_norm(x, mean, scale, shift, groups)
        out = torch.empty_like(x)
        for rows in self._chunks(x):
            mean, scale, shift = (_of_rows(t, groups, rows) for t in parameters)
            out[rows] = _centred(x[rows], mean).mul_(scale).add_(shift)
        return out

    def gradient_sums(self, grad: Tensor, x: Tensor, mean: Tensor, groups: Groups) -> Tensor:
        add = _batch_norm_sums if self.fused and x.is_contiguous() else _sums
        sums = []
        for rows in self._chunks(x):
            values, gradient = x[rows].to(mean.dtype), grad[rows].to(mean.dtype)
            sums.append(add(gradient, values, _of_rows(mean, groups, rows)))
        return _sum_by_group(torch.cat(sums).double(), groups)

    def input_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        slope: Tensor,
        groups: Groups,
    ) -> Tensor:
        # Linear in grad and in x.
        parameters = [mean, scale, -scale * slope, -scale * shift]
        if x.dtype not in _HALF and self._use_batch_norm(x, groups):
            mean, scale, slope, shift = parameters
            out = _batch_norm(x, mean, slope, shift, groups)
            return out.addcmul_(grad, _of_rows(scale, groups))
        out = torch.empty_like(x)
        for rows in self._chunks(x):
            mean, scale, slope, shift = (_of_rows(t, groups, rows) for t in parameters)
            part = _centred(x[rows], mean).mul_(slope).add_(shift)
            out[rows] = part.addcmul_(grad[rows].to(mean.dtype), scale)
        return out

    def averages(
        self, count: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        usable = (count > 1) & ((mean + var).abs() < torch.inf)
        number, unusable = usable.sum(0), ~usable
        averages = (
            t.masked_fill(unusable, 0).sum(0) / number for t in (mean, var * (count / (count - 1)))
        )
        new_mean, new_var = (
            torch.where(number > 0, new.to(running.dtype), running)
            for new, running in zip(averages, (running_mean, running_var), strict=True)
        )
        return new_mean, new_var

    def _chunks(self, x: Tensor) -> Iterator[slice]:
        number = max(self.chunk // x[0].numel(), 1)
        for start in range(0, len(x), number):
            yield slice(start, start + number)

    def _use_batch_norm(self, x: Tensor, groups: Groups) -> bool:
        return self.fused and (groups.ids is None or x.is_contiguous())


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """``x - mean`` in the dtype of ``mean``, a new tensor."""
    # Converted first: a pass over mixed dtypes takes a CPU twice as long.
    return x - mean if x.dtype == mean.dtype else x.to(mean.dtype).sub_(mean)


def _batch_norm(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, groups: Groups) -> Tensor:
    """``(x - mean) * scale + shift``."""
    one_group = groups.ids is None
    mean, scale, shift = (
        t[0] if one_group else t[groups.ids].flatten() for t in (mean, scale, shift)
    )
    samples = x if one_group else x.view(1, -1, *x.shape[2:])
    y = torch.batch_norm(samples, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0, False)
    # Not a view, or an in-place ReLU after the layer would be refused.
    return y if one_group else torch.ops.aten._unsafe_view(y, x.shape)


def _sums(grad: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """``(N, 2C)``: sums over each row of ``grad`` and of ``grad * (x - mean)``."""
    return torch.cat([grad.sum((2, 3)), (x - mean).mul_(grad).sum((2, 3))], dim=1)


def _batch_norm_sums(grad: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """As :func:`_sums`, of contiguous ``x``."""
    mean = mean.expand(*x.shape[:2], 1, 1).flatten()
    ones = torch.ones_like(mean)
    # With saved statistics, without which CUDA's refuses.
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        grad.reshape(1, -1, *x.shape[2:]),
        x.view(1, -1, *x.shape[2:]),
        ones,
        None,
        None,
        mean,
        ones,
        True,
        0.0,
        [False, True, True],
    )
    return torch.cat([t.view(x.shape[:2]) for t in (sums, products)], dim=1)


def _of_rows(values: Tensor, groups: Groups, rows: slice = slice(None)) -> Tensor:
    """``(G, C)`` to what broadcasts to the rows."""
    return (values if groups.ids is None else values[groups.ids[rows]])[:, :, None, None]


def _sum_by_group(values: Tensor, groups: Groups) -> Tensor:
    """``(N, K)`` values of rows to the ``(G, K)`` of groups."""
    if groups.ids is None:
        return values.sum(0, keepdim=True)
    return values.new_zeros(groups.number, values.shape[1]).index_add_(0, groups.ids, values)
