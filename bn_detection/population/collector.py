"""What the layers see, batch by batch, merged over batches and workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..norm import GroupStatistics, world_size
from .estimators import Estimator, PopulationStatistics

logger = logging.getLogger(__name__)

# The batches are merged into at most so many parts, whose spread gives the standard errors.
_MAX_PARTS = 32
_LOG_SECONDS = 10.0


class Used(NamedTuple):
    """What each worker used, by rank."""

    batches: list[int]
    images: list[int]
    ended: list[bool]

    def check(self, num_batches: int, allow_fewer: bool) -> None:
        if sum(self.batches) == 0:
            raise ValueError("There is no batch to estimate population statistics from.")
        ended = [
            f"worker {rank}'s after {self.batches[rank]}" for rank, e in enumerate(self.ended) if e
        ]
        if not ended:
            return
        text = (
            f"The batches for population statistics ended early: {', '.join(ended)} of "
            f"{num_batches}. There were {sum(self.images)} images."
        )
        if not allow_fewer:
            raise ValueError(f"{text} Ask for fewer batches, or allow fewer (allow_fewer=True).")
        cut = [rank for rank, n in enumerate(self.batches) if n < num_batches]
        cut = [rank for rank in cut if not self.ended[rank]]
        if cut:
            logger.warning(
                "%s Layers share statistics over the workers, so workers %s stopped there too, and "
                "the rest of their images is not used.",
                text,
                cut,
            )
        else:
            logger.info("%s All of them are used.", text)


class Collector:
    def __init__(
        self,
        layers: Mapping[str, Any],
        estimator: Estimator,
        num_batches: int,
        forward: Callable[[nn.Module, Any], Any],
        listener: Callable[[str, GroupStatistics], None] | None,
    ) -> None:
        self.batches = self.images = 0
        self._estimator = estimator
        self._num_batches = num_batches
        self._forward = forward
        self._listener = listener
        self._ended = False
        self._start = self._logged = time.monotonic()
        self._layers = layers
        self._batch: dict[str, Tensor] = {}
        self._parts: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._batches_a_part = 1
        self._batches_pending = 0

    def take(self, batches: Iterator[Any], *, in_step: bool) -> Iterator[Any]:
        """The batches; workers in step all end with the first that has no more."""
        while True:
            batch = next(batches, None)
            self._ended = batch is None
            if in_step and not _all_workers(not self._ended):
                return
            if self._ended:
                return
            self.batches += 1
            self.images += num_images(batch)
            yield batch

    def run(self, model: nn.Module, batch: Any) -> None:
        """One forward pass."""
        self._batch = {}
        self._forward(model, batch)
        for name, layer in self._layers.items():
            if name not in self._batch:  # it was not called
                self._batch[name] = self._nothing(layer.running_mean.numel())
        self._add(torch.cat([self._batch[name] for name in self._layers], dim=1))
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            left = (self._logged - self._start) / self.batches * (self._num_batches - self.batches)
            logger.info(
                "Population statistics: batch %d/%d, eta %ds", self.batches, self._num_batches, left
            )

    def observe(self, name: str, statistics: GroupStatistics, spans_workers: bool) -> None:
        if self._listener is not None:
            self._listener(name, statistics)
        kept = self._estimator.keep(statistics)
        if spans_workers and dist.get_rank() > 0:
            kept.zero_()  # all workers have them; they count once
        if name in self._batch:
            kept = self._merge([self._batch[name], kept])
        self._batch[name] = kept

    def _add(self, batch: Tensor) -> None:
        self._pending.append(batch)
        if len(self._pending) > 1:
            self._pending = [self._merge(self._pending)]
        self._batches_pending += 1
        if self._batches_pending < self._batches_a_part:
            return
        self._parts += self._pending
        self._pending, self._batches_pending = [], 0
        if len(self._parts) == _MAX_PARTS:
            pairs = zip(self._parts[::2], self._parts[1::2], strict=True)
            self._parts = [self._merge(pair) for pair in pairs]
            self._batches_a_part *= 2

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        return self._estimator.merge(torch.stack(tuple(parts)))

    def _nothing(self, channels: int, *parts: int) -> Tensor:
        """What the estimator keeps of no values, ``(*parts, R, channels)``."""
        some: Tensor = next(iter(self._layers.values())).running_mean
        return some.new_zeros(*parts, self._estimator.rows, channels, dtype=torch.float64)

    def results(self) -> tuple[dict[str, PopulationStatistics], Used]:
        """Merge the parts of all workers: one collective."""
        sizes = [layer.running_mean.numel() for layer in self._layers.values()]
        parts = self._nothing(sum(sizes), _MAX_PARTS)
        for part, values in zip(parts, [*self._parts, *self._pending], strict=False):
            part.copy_(values)
        progress = [self.batches, self.images, self._ended]
        message = torch.cat([parts.flatten(), parts.new_tensor(progress)])
        gathered = [message]
        if world_size() > 1:
            gathered = [torch.empty_like(message) for _ in range(world_size())]
            dist.all_gather(gathered, message)
        of_workers = [message[: -len(progress)].view_as(parts) for message in gathered]
        batches, images, ended = zip(
            *(message[-len(progress) :].tolist() for message in gathered), strict=True
        )
        used = Used([*map(int, batches)], [*map(int, images)], [*map(bool, ended)])
        columns = [
            torch.split(column, sizes) for column in self._estimator.estimate(torch.cat(of_workers))
        ]
        return {
            name: PopulationStatistics(mean, var, mean_error, var_error, int(count[0]))
            for name, mean, var, mean_error, var_error, count in zip(
                self._layers, *columns, strict=True
            )
        }, used


def num_images(batch: Any) -> int:
    """The length of a batch; of a tuple, such as (images, targets), that of its first item."""
    first = batch[0] if isinstance(batch, tuple) and batch else batch
    return len(first) if isinstance(first, Sized) else 1


def _all_workers(one: bool) -> bool:
    flag = torch.tensor(int(one), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
