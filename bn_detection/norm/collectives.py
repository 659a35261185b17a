"""Collectives that say which layer on which worker failed, and notice workers that are not in step.

Workers that call different layers would otherwise mix their statistics (if shapes agree), or wait
for each other until the process group's timeout. Each message carries a tag of its sender's layer
and call; a worker that receives other tags than its own raises.

gloo ends the process when a message is longer than the one expected, and then nobody says where. So
messages on the CPU have a process group of their own: a worker that is in a collective of the rest
of the model is waited for, until the timeout of the default group. Where two layers of different
size meet, one worker ends so, and the others name the layer.

Activations and their statistics travel where they are (NCCL between GPUs); counts and tags, which
the host has to know, over gloo, so that no host waits for its GPU.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .transfer import Arriving

# On a GPU, one tag of so many is read: that costs the host as much as the collective, and workers
# out of step stay so.
_CHECKED_EVERY = 16
# Checks that may wait for a GPU: hosts are never that many ahead.
_MOST_UNCHECKED = 64
_POLL_SECONDS = 0.02
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))


def world_size() -> int:
    """Number of workers: of the default process group, or 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Of this worker in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# By default group: the gloo group of all workers for messages on the CPU.
_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _cpu_group() -> dist.ProcessGroup:
    """The first time, all workers must be here."""
    default = dist.group.WORLD
    assert default is not None, "a worker has a process group"
    if default not in _groups:
        backend = default._get_backend(default._device_types[0])
        group = dist.new_group(backend="gloo", timeout=backend.options._timeout)
        assert isinstance(group, dist.ProcessGroup), "every worker is in it"
        _groups[default] = group
    return _groups[default]


def _group_for(message: Tensor) -> dist.ProcessGroup | None:
    return None if message.is_cuda else _cpu_group()


def wait(work: dist.Work | None, message: Tensor) -> None:
    """Wait for a collective.

    On a CPU, poll for a while first: to wake a thread that sleeps can take ten times as long as a
    small message does.
    """
    assert work is not None, "every worker is in the group"
    if not message.is_cuda:
        end = time.perf_counter() + _POLL_SECONDS
        while not work.is_completed() and time.perf_counter() < end:
            _yield()
    work.wait()


class Collectives:
    """The collectives of one layer or head, over all workers of the default process group.

    Args:
        owner: describes the layer, for messages.

    Raises:
        RuntimeError: (by the methods) a worker is not in step, or the process group failed; the
            message names the layer and the worker.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._calls = 0
        self._unchecked: deque[tuple[Arriving, float]] = deque()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum ``values``, float64, over the workers: the same bits on each."""
        tag = float(self._next_tag())
        message = values.new_empty(values.numel() + 1)
        message[:-1] = values.flatten()
        message[-1:].fill_(tag)
        with self._named():
            wait(dist.all_reduce(message, group=_group_for(message), async_op=True), message)
        self._check(message[-1:], tag * world_size())
        return message[:-1].view_as(values)

    def all_gather(self, values: Sequence[int] = ()) -> Callable[[], list[list[int]]]:
        """Begin to gather some integers of every worker; the result waits for them, by rank."""
        tag = self._next_tag()
        mine = torch.tensor([tag, *values])
        gathered = mine.new_empty(world_size(), len(mine))
        with self._named():
            work = dist.all_gather(
                list(gathered.unbind(0)), mine, group=_cpu_group(), async_op=True
            )

        def finish() -> list[list[int]]:
            with self._named():
                wait(work, mine)
            rows = gathered.tolist()
            if any(row[0] != tag for row in rows):
                self._raise_not_in_step()
            return [row[1:] for row in rows]

        return finish

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send rows to the workers, in order of rank, and receive theirs.

        Args:
            rows: ``(sum(send), ...)``.
            send: number of rows for each worker.
            receive: number of rows from each worker.

        Returns:
            ``(sum(receive), ...)``.
        """
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        self.all_gather()()  # workers at other layers would send rows of other sizes
        with self._named():
            work = dist.all_to_all_single(
                received,
                rows.contiguous(),
                receive,
                send,
                group=_group_for(rows),
                async_op=True,
            )
            wait(work, received)
        return received

    def check_alike(self, number: int, what: str) -> None:
        """Compare a number that has to be the same on all workers, before it sizes a message.

        Raises:
            RuntimeError: it is not; the message names the layer, ``what``, and the numbers.
        """
        numbers = [of_worker for (of_worker,) in self.all_gather([number])()]
        if any(other != number for other in numbers):
            listed = ", ".join(f"{n} on worker {k}" for k, n in enumerate(numbers))
            raise RuntimeError(
                f"{self.owner}: {what} must be the same on all workers, and is {listed}."
            )

    def _next_tag(self) -> int:
        self._calls += 1
        return zlib.crc32(f"{self.owner}/{self._calls}".encode())

    def _check(self, number: Tensor, expected: float) -> None:
        """On a GPU, check calls before whose numbers have arrived, and wait for none."""
        if number.is_cuda:
            if self._calls % _CHECKED_EVERY == 1:
                self._unchecked.append((Arriving(number), expected))
        elif number.item() != expected:
            self._raise_not_in_step()
        while self._unchecked:
            arriving, expected = self._unchecked[0]
            if len(self._unchecked) <= _MOST_UNCHECKED and not arriving.has_arrived():
                break
            self._unchecked.popleft()
            if arriving.item() != expected:
                self._raise_not_in_step()

    def _raise_not_in_step(self) -> None:
        raise RuntimeError(
            f"{self.owner}: worker {rank()} of {world_size()} exchanges statistics of this layer "
            "while another worker is at another layer or step. Every worker must call every layer "
            "that shares statistics, in the same order, also with no samples (shape (0, C, H, W))."
        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.owner}: worker {rank()} of {world_size()} could not exchange statistics "
                "with the others. Either a worker ended, or it did not call this layer: every "
                "worker must, also with no samples (shape (0, C, H, W))."
            ) from error

    def __reduce__(self) -> tuple[type[Collectives], tuple[str]]:
        return Collectives, (self.owner,)
