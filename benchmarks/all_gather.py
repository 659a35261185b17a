"""RoI shuffling by gathering every RoI on every worker, as the paper's reference code does.

The formulation of Detectron2's ``projects/Rethinking-BatchNorm``, written here from its
description: pad, all-gather all rows, pick this worker's share of a permutation broadcast by worker
0; the same to undo it. The backward of each all-gather is an all-reduce of all rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather_rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """All workers' rows, in order, and the number of each worker's; differentiable."""
    size = torch.tensor([x.shape[0]])
    gathered = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, size)
    sizes = [int(n) for n in gathered]
    padded = torch.cat([x, x.new_zeros(max(sizes) - x.shape[0], *x.shape[1:])])
    rows = _AllGather.apply(padded)
    return torch.cat([part[:n] for part, n in zip(rows, sizes, strict=True)]), sizes


def shuffle(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """This worker's share of all rows in random order, that order, and where its own rows start."""
    rows, sizes = gather_rows(x)
    order = torch.randperm(rows.shape[0])
    dist.broadcast(order, src=0)
    share = math.ceil(rows.shape[0] / len(sizes))
    rank = dist.get_rank()
    return rows[order[rank * share : (rank + 1) * share]], order, sum(sizes[:rank])


def unshuffle(x: Tensor, order: Tensor, start: int, number: int) -> Tensor:
    """The ``number`` rows that this worker gave to :func:`shuffle`."""
    rows, _ = gather_rows(x)
    return rows[torch.argsort(order)[start : start + number]]


class AllGatherShuffleHead(FastRCNNConvFCHead):
    """Detectron2's box head on the RoIs of a random group, one group a worker."""

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(R, C, H, W)``. Returns ``(R, *output_shape)``."""
        shuffled, order, start = shuffle(x)
        return unshuffle(super().forward(shuffled), order, start, x.shape[0])
