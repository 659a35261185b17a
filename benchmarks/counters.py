"""What a step sends and what it holds, counted where it happens."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Group = dist.ProcessGroup | None


def _all_reduce(tensor: Tensor, *, group: Group = None) -> float:
    """A ring: each worker passes on (W - 1) / W of the message, once to sum, once to tell."""
    return 2 * tensor.nbytes * (1 - 1 / dist.get_world_size(group))


def _all_gather(gathered: list[Tensor], tensor: Tensor, *, group: Group = None) -> float:
    """Each worker's own message, to each of the others."""
    return tensor.nbytes * (dist.get_world_size(group) - 1)


def _all_to_all_single(
    received: Tensor, tensor: Tensor, receive: list[int], send: list[int], *, group: Group = None
) -> float:
    """The rows that leave."""
    return tensor[:1].nbytes * (sum(send) - send[dist.get_rank(group)])


def _broadcast(tensor: Tensor, *, src: int, group: Group = None) -> float:
    """A chain, in which all but the last pass the message on: the average of the workers."""
    return tensor.nbytes * (1 - 1 / dist.get_world_size(group))


_COSTS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _broadcast,
}


@contextmanager
def bytes_sent() -> Iterator[Counter[str]]:
    """Count the bytes that this worker sends while the context is open, by collective."""
    sent: Counter[str] = Counter()

    def counted(name: str, cost: Callable[..., float]) -> Callable[..., Any]:
        collective = getattr(dist, name)

        @functools.wraps(collective)
        def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            sent[name] += cost(*args, **kwargs)
            return collective(*args, async_op=async_op, **kwargs)

        return call

    with ExitStack() as stack:
        for name, cost in _COSTS.items():
            stack.enter_context(mock.patch.object(dist, name, counted(name, cost)))
        yield sent


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that are alive on the CPU while it is active.

    Memory that an operator takes and gives back while it runs is not seen.

    Args:
        known: tensors that exist before.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._number = itertools.count()
        self._numbers = WeakIdKeyDictionary()
        self._log: list[tuple[int, int]] = []
        for tensor in known:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def peak(self, without: Iterable[Tensor]) -> int:
        """The most bytes that were alive at a time, those of the tensors ``without`` left out."""
        left_out = {self._numbers.get(tensor.untyped_storage()) for tensor in without}
        sizes = (size for number, size in self._log if number not in left_out)
        return max(itertools.accumulate(sizes), default=0)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            number, size = next(self._number), storage.nbytes()
            self._numbers[storage] = number
            self._log.append((number, size))
            weakref.finalize(storage, self._log.append, (number, -size)).atexit = False


def peak_of_activations(
    step: Callable[[], None], module: torch.nn.Module, given: list[Tensor]
) -> int:
    """Peak bytes of one step: what it is given, its activations and their gradients.

    The parameters and buffers of ``module`` and their gradients are left out: they are the same for
    every kind of normalization, and would hide the difference.

    Args:
        step: forward and backward of ``module``.
        module: the step's.
        given: the inputs, and the gradient of the output.
    """
    parameters = list(module.parameters())
    for tensor in (*given, *parameters):
        tensor.grad = None
    if given[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        gradients = sum(p.grad.nbytes for p in parameters)
        peak = torch.cuda.max_memory_allocated() - before - gradients
        return peak + sum(tensor.nbytes for tensor in given)
    persistent = [*parameters, *module.buffers()]
    with LiveBytes([*given, *persistent]) as live:
        step()
    return live.peak(without=[*persistent, *(p.grad for p in parameters)])
