"""RoI shuffling by features: each RoI travels once, to the worker of its random group.

*Rethinking "Batch" in BatchNorm*, Figure 9 and Table 6. The reference implementation gathers every
RoI on every worker, in both directions; here one all-to-all each way moves only the RoIs that
change worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import Collectives
from .partition import shuffled_groups
from .scope import Rows


@dataclass(frozen=True)
class ExchangePlan:
    """Where each row of this worker goes, and how many rows come from each worker.

    Attributes:
        order: ``(n,)`` int64, this worker's rows sorted by destination.
        send: number of rows sent to each worker.
        receive: number of rows received from each worker.
        collectives: of the head.
    """

    order: Tensor
    send: list[int]
    receive: list[int]
    collectives: Collectives


def plan_exchange(rows: Rows) -> ExchangePlan | None:
    """Agree with the other workers on an exchange: random balanced groups, one a worker.

    Every worker must call it. None where there is nobody to exchange with.

    Args:
        rows: of this worker, in this call.
    """
    if rows.world_size == 1:
        return None
    groups = shuffled_groups(rows.all_counts(), rows.world_size, rows.seed)
    mine = groups[rows.rank]
    return ExchangePlan(
        order=rows.to_device(torch.argsort(mine, stable=True)),
        send=torch.bincount(mine, minlength=rows.world_size).tolist(),
        receive=[int((ids == rows.rank).sum()) for ids in groups],
        collectives=rows.collectives,
    )


def exchange(x: Tensor, plan: ExchangePlan) -> Tensor:
    """Send each row of ``x`` to the worker of its group; differentiable.

    Args:
        x: ``(n, ...)``, this worker's rows.
        plan: of :func:`plan_exchange`.

    Returns:
        ``(sum(plan.receive), ...)``, the rows of this worker's group, ordered by origin.
    """
    received: Tensor = _Exchange.apply(x, plan)
    return received


def restore(x: Tensor, plan: ExchangePlan) -> Tensor:
    """Send each row of a group back to its origin: the inverse of :func:`exchange`.

    Args:
        x: ``(sum(plan.receive), ...)``; rows may have another shape than those exchanged.
        plan: the one that the rows were exchanged with.

    Returns:
        ``(n, ...)``, in the order in which the rows were given to :func:`exchange`.
    """
    returned: Tensor = _Restore.apply(x, plan)
    return returned


def _send_out(x: Tensor, plan: ExchangePlan) -> Tensor:
    return plan.collectives.all_to_all(x[plan.order], plan.send, plan.receive)


def _bring_back(x: Tensor, plan: ExchangePlan) -> Tensor:
    returned = plan.collectives.all_to_all(x, plan.receive, plan.send)
    out = torch.empty_like(returned)
    out[plan.order] = returned
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        return _send_out(x, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _bring_back(grad, ctx.plan), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        return _bring_back(x, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _send_out(grad, ctx.plan), None
