"""RoI shuffling across workers: each RoI travels once, to the worker of its random group.

*Rethinking "Batch" in BatchNorm*, Sec. 5.3 and Figure 9. The reference implementation gathers every
RoI on every worker, in both directions; here one all-to-all each way moves only the RoIs that
change worker.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class ExchangePlan:
    """Where each row of this worker goes, and how many rows come from each worker.

    Attributes:
        order: ``(n,)`` int64, this worker's rows sorted by destination.
        send: number of rows sent to each worker.
        receive: number of rows received from each worker.
    """

    order: Tensor
    send: list[int]
    receive: list[int]


def plan_exchange(counts: list[int], rank: int, seed: int) -> ExchangePlan:
    """Draw a random assignment of all workers' rows to balanced groups, one group a worker.

    All workers that pass the same ``counts`` and ``seed`` draw the same assignment. Groups differ
    by one row at most.

    Args:
        counts: number of rows on each worker.
        rank: this worker.
        seed: of the permutation, below 2**63.
    """
    world_size, total = len(counts), sum(counts)
    sizes = torch.full((world_size,), total // world_size)
    sizes[: total % world_size] += 1
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(total, generator=generator)
    group = torch.repeat_interleave(torch.arange(world_size), sizes)[slots]
    by_worker = group.split(counts)
    mine = by_worker[rank]
    return ExchangePlan(
        order=torch.argsort(mine, stable=True),
        send=torch.bincount(mine, minlength=world_size).tolist(),
        receive=[int((groups == rank).sum()) for groups in by_worker],
    )


def exchange(x: Tensor, plan: ExchangePlan) -> Tensor:
    """Send each row of ``x`` to the worker of its group; differentiable.

    Args:
        x: ``(n, ...)``, this worker's rows.
        plan: of :func:`plan_exchange`.

    Returns:
        ``(sum(plan.receive), ...)``, the rows of this worker's group, ordered by origin.
    """
    return _Exchange.apply(x, plan)


def restore(x: Tensor, plan: ExchangePlan) -> Tensor:
    """Send each row of a group back to its origin: the inverse of :func:`exchange`.

    Args:
        x: ``(sum(plan.receive), ...)``; rows may have another shape than those exchanged.
        plan: the one that the rows were exchanged with.

    Returns:
        ``(n, ...)``, in the order in which the rows were given to :func:`exchange`.
    """
    return _Restore.apply(x, plan)


class RoIShuffle:
    """Draws one exchange a call: the same on all workers, another at every step.

    The seed of a draw is made of ``seed``, ``name``, the training iteration, and the number of the
    call within it, so it is reproducible, and right after ``--resume``.

    Args:
        seed: one number that all workers share (Detectron2 adds the rank to ``SEED``: not that
            one). A negative one is replaced by a number that worker 0 draws at the first step.
        name: sets apart several heads of one model.
    """

    def __init__(self, seed: int = -1, name: str = "") -> None:
        self.seed = seed
        self.name = name
        self._iteration: int | None = None
        self._calls = 0

    def plan(self, x: Tensor, iteration: int) -> ExchangePlan | None:
        """Agree with the other workers on an exchange of the rows of ``x``.

        Every worker must call it. None where there is nobody to exchange with.

        Args:
            x: ``(n, ...)``; n may differ between workers or be zero.
            iteration: the current training iteration.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        self._calls = self._calls + 1 if iteration == self._iteration else 0
        self._iteration = iteration
        rank, world_size = dist.get_rank(), dist.get_world_size()
        proposal = self.seed
        if proposal < 0:
            proposal = int(torch.randint(2**31, (), device="cpu"))
        mine = torch.tensor([x.shape[0], proposal], device=x.device)
        gathered = mine.new_empty(world_size, 2)
        dist.all_gather(list(gathered.unbind(0)), mine)
        counts, seeds = gathered.cpu().unbind(1)
        if self.seed < 0:
            self.seed = int(seeds[0])
        key = f"{self.seed}/{self.name}/{iteration}/{self._calls}"
        plan = plan_exchange(counts.tolist(), rank, zlib.crc32(key.encode()))
        return ExchangePlan(plan.order.to(x.device), plan.send, plan.receive)


def _all_to_all(x: Tensor, send: list[int], receive: list[int]) -> Tensor:
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive, send)
    return received


def _send_out(x: Tensor, plan: ExchangePlan) -> Tensor:
    return _all_to_all(x[plan.order], plan.send, plan.receive)


def _bring_back(x: Tensor, plan: ExchangePlan) -> Tensor:
    returned = _all_to_all(x, plan.receive, plan.send)
    out = torch.empty_like(returned)
    out[plan.order] = returned
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        return _send_out(x, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _bring_back(grad, ctx.plan), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        return _bring_back(x, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _send_out(grad, ctx.plan), None
