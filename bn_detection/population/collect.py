"""Exact population statistics of BN layers, the same on all workers, with standard errors."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..norm import (
    Collectives,
    Groups,
    GroupStatistics,
    PartitionedBatchNorm2d,
    group_statistics,
    grouped_batch_norm,
    matches,
    world_size,
)
from .untouched import untouched

logger = logging.getLogger(__name__)

ESTIMATORS = ("pooled", "mean_of_variances")

# The batches are merged into at most so many parts, whose spread gives the standard errors.
_MAX_PARTS = 32
_LOG_SECONDS = 10.0


@dataclass(frozen=True)
class PopulationStatistics:
    """An estimate of the population statistics of a layer.

    Attributes:
        mean: ``(C,)`` float64.
        var: ``(C,)`` float64, unbiased.
        mean_error: ``(C,)`` float64, standard error of ``mean`` by batch means; nan from one batch.
        var_error: ``(C,)`` float64, that of ``var``.
        count: values a channel (N x H x W) of all workers.
    """

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor
    count: int

    @property
    def relative_error(self) -> float:
        """One number, free of scale: the larger of two root mean squares over the channels, of the
        error of the mean over the standard deviation, and of the error of the variance over it.
        """
        var = self.var.clamp(min=torch.finfo(torch.float32).tiny)
        errors = (self.mean_error / var.sqrt(), self.var_error / var)
        return max(float(error.square().mean().sqrt()) for error in errors)


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int,
    *,
    modules: Sequence[str] = ("*",),
    estimator: str = "pooled",
    tolerance: float = 0.0,
) -> dict[str, PopulationStatistics]:
    """Estimate population statistics from forward passes.

    The model, and the random number generators, are afterwards as they were.

    ``pooled`` is the mean and variance of all values together, the variance with N / (N - 1):
    exact for any batch size (*Rethinking "Batch" in BatchNorm*, Sec. 3.1 and its appendix).
    ``mean_of_variances`` averages the groups' means and unbiased variances, each group alike
    (Ioffe & Szegedy 2015, Algorithm 2). N counts values a channel, N x H x W. fvcore's function
    differs in that its pooled variance is without N / (N - 1), and that it knows one process.

    The batches of all workers are merged exactly, in float64 (Chan et al. 1979) and one collective,
    so all hold the same bits; fvcore's leaves each worker with its own (fvcore issue 152).

    Args:
        model: in the mode that the population is wanted of; its BN layers in training mode take
            part. Normalization is that of training, and the running statistics are not moved.
        batches: this worker's inputs of ``model``.
        num_batches: how many to use at most. All workers use as many as the one with the fewest.
        modules: globs over the names of the layers.
        estimator: one of :data:`ESTIMATORS`.
        tolerance: if positive, stop when the relative error of every layer is below it.

    Returns:
        By layer name.

    Raises:
        ValueError: no layer takes part, or there is no batch.
        FloatingPointError: a layer saw a value that is not finite; names it.
    """
    layers = batch_norms_in_training(model, modules)
    if not layers:
        raise ValueError(
            f"No BatchNorm layer in training mode matches {list(modules)}: there are no statistics "
            "to estimate. Frozen layers and those of a model in eval mode do not take part."
        )
    estimate = {"pooled": _pooled, "mean_of_variances": _mean_of_variances}[estimator]
    collector = _Collector(layers)
    iterator = iter(batches)
    done, check_at, results = 0, 16, None
    start = logged = time.monotonic()
    with untouched(model), collector.observing():
        while done < num_batches and _all_workers_have((batch := next(iterator, None)) is not None):
            collector.run(model, batch)
            done += 1
            if tolerance > 0 and done == check_at:
                check_at *= 2
                results = collector.results(estimate)
                if all(result.relative_error < tolerance for result in results.values()):
                    break
                results = None
            if time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                left = (logged - start) / done * (num_batches - done)
                logger.info("Population statistics: batch %d/%d, eta %ds", done, num_batches, left)
    if done == 0:
        raise ValueError("There is no batch to estimate population statistics from.")
    results = results or collector.results(estimate)
    for name, result in results.items():
        if not bool(torch.isfinite(result.mean).all() and torch.isfinite(result.var).all()):
            raise FloatingPointError(
                f"{name}: its input has values that are not finite, so it has no population "
                "statistics. The model keeps the old ones."
            )
    return results


@torch.no_grad()
def apply_statistics(model: nn.Module, statistics: dict[str, PopulationStatistics]) -> None:
    """Make estimates the running statistics of a model, in place.

    A layer that saw fewer than two values keeps its own, with a warning that names it.
    """
    for name, estimate in statistics.items():
        if estimate.count < 2:
            logger.warning("%s saw %d values and keeps its statistics.", name, estimate.count)
            continue
        layer = model.get_submodule(name)
        layer.running_mean.copy_(estimate.mean)
        layer.running_var.copy_(estimate.var)


def batch_norms_in_training(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    """The BN layers that are in training mode and track statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
        and module.training
        and module.track_running_stats
        and matches(name, modules)
    }


class _Enough(Exception):
    """Ends a forward pass after the last layer whose input is wanted."""


class _Collector:
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._layers = layers
        self._batch: dict[str, Tensor] = {}
        self._calls: list[str] = []
        self._first_calls: list[str] | None = None
        self._parts: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._batches_a_part = 1
        self._batches_pending = 0

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Let the layers report the statistics of their groups; their own do not move."""
        try:
            for name, layer in self._layers.items():
                observe = partial(self._observe, name)
                if isinstance(layer, PartitionedBatchNorm2d):
                    layer.observer = observe
                else:
                    spans = isinstance(layer, nn.SyncBatchNorm) and world_size() > 1
                    all_reduce = Collectives(name).all_reduce if spans else None
                    layer.forward = partial(_observed_forward, layer, observe, all_reduce)
            yield
        finally:
            for layer in self._layers.values():
                if isinstance(layer, PartitionedBatchNorm2d):
                    layer.observer = None
                else:
                    vars(layer).pop("forward", None)

    def run(self, model: nn.Module, batch: Any) -> None:
        """One forward pass; after the first, no further than the last layer that takes part."""
        self._batch, self._calls = {}, []
        with suppress(_Enough):
            model(batch)
        if self._first_calls is None:
            self._first_calls = self._calls
        for name, layer in self._layers.items():
            if name not in self._batch:  # it was not called
                self._batch[name] = layer.running_mean.double().new_zeros(6, layer.num_features)
        self._add(torch.cat([self._batch[name] for name in self._layers], dim=1))

    def _observe(self, name: str, statistics: GroupStatistics, spans_workers: bool) -> None:
        moments = _moments(statistics)
        if spans_workers and dist.get_rank() > 0:
            moments.zero_()  # all workers have them; they count once
        if name in self._batch:
            moments = _merge(torch.stack([self._batch[name], moments]))
        self._batch[name] = moments
        self._calls.append(name)
        if self._calls == self._first_calls:
            raise _Enough

    def _add(self, batch: Tensor) -> None:
        self._pending.append(batch)
        if len(self._pending) > 1:
            self._pending = [_merge(torch.stack(self._pending))]
        self._batches_pending += 1
        if self._batches_pending < self._batches_a_part:
            return
        self._parts += self._pending
        self._pending, self._batches_pending = [], 0
        if len(self._parts) == _MAX_PARTS:
            pairs = zip(self._parts[::2], self._parts[1::2], strict=True)
            self._parts = [_merge(torch.stack(pair)) for pair in pairs]
            self._batches_a_part *= 2

    def results(
        self, estimate: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> dict[str, PopulationStatistics]:
        """Merge the parts of all workers: one collective."""
        mine = torch.stack([*self._parts, *self._pending])
        parts = torch.zeros(_MAX_PARTS, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        parts[: len(mine)] = mine
        if world_size() > 1:
            gathered = [torch.empty_like(parts) for _ in range(world_size())]
            dist.all_gather(gathered, parts)
            parts = torch.cat(gathered)
        columns = (*estimate(parts), parts[:, 0].sum(0))
        sizes = [layer.num_features for layer in self._layers.values()]
        by_layer = zip(self._layers, *(column.split(sizes) for column in columns), strict=True)
        return {
            name: PopulationStatistics(mean, var, mean_error, var_error, int(count[0]))
            for name, mean, var, mean_error, var_error, count in by_layer
        }


def _observed_forward(
    layer: nn.Module,
    observe: Callable[[GroupStatistics, bool], None],
    all_reduce: Callable[[Tensor], Tensor] | None,
    x: Tensor,
) -> Tensor:
    """That of ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` in training mode."""
    groups = Groups(None, 1)
    statistics = group_statistics(x, groups, all_reduce)
    observe(statistics, all_reduce is not None)
    weight = layer.weight if layer.affine else torch.ones_like(layer.running_mean)
    bias = layer.bias if layer.affine else torch.zeros_like(layer.running_mean)
    return grouped_batch_norm(x, weight, bias, statistics, groups, layer.eps)


# Moments of some values, (6, C) float64: their count, mean and sum of squared deviations; and of
# the groups with two values or more, their count and the sums of means and of unbiased variances.


def _moments(statistics: GroupStatistics) -> Tensor:
    count, mean, var = statistics.count, statistics.mean, statistics.var
    total = count.sum()
    pooled = (count * mean).sum(0) / total.clamp(min=1)
    deviations = (count * (var + (mean - pooled).square())).sum(0)
    usable = (count > 1).double()
    unbiased = usable * var * count / (count - 1).clamp(min=1)
    return torch.stack(
        [
            total.expand_as(pooled),
            pooled,
            deviations,
            usable.sum().expand_as(pooled),
            (usable * mean).sum(0),
            unbiased.sum(0),
        ]
    )


def _merge(parts: Tensor) -> Tensor:
    """``(P, 6, C)`` to ``(6, C)``: the moments of all values (Chan et al. 1979)."""
    count, mean, deviations = parts[:, :3].unbind(1)
    total = count.sum(0)
    pooled = (count * mean).sum(0) / total.clamp(min=1)
    deviations = (deviations + count * (mean - pooled).square()).sum(0)
    return torch.cat([torch.stack([total, pooled, deviations]), parts[:, 3:].sum(0)])


def _pooled(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, mean, deviations, *_ = parts.unbind(1)
    total, pooled, all_deviations, *_ = _merge(parts)
    var = all_deviations / (total - 1).clamp(min=1)
    spread = deviations / count.clamp(min=1) + (mean - pooled).square()
    biased = all_deviations / total.clamp(min=1)
    return pooled, var, _error(mean, pooled, count), _error(spread, biased, count)


def _mean_of_variances(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, groups, means, variances = parts.unbind(1)
    number, mean, var = (t.sum(0) for t in (groups, means, variances))
    mean, var = mean / number.clamp(min=1), var / number.clamp(min=1)
    of_parts = (t / groups.clamp(min=1) for t in (means, variances))
    mean_error, var_error = (
        _error(part, total, groups) for part, total in zip(of_parts, (mean, var), strict=True)
    )
    return mean, var, mean_error, var_error


def _error(values: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """Standard error of the weighted mean of the parts' values."""
    number = (weight > 0).sum(0)
    share = weight / weight.sum(0).clamp(min=1)
    squares = (share * (values - mean)).square().sum(0)
    error = (squares * number / (number - 1).clamp(min=1)).sqrt()
    return torch.where(number > 1, error, torch.full_like(error, math.nan))


def _all_workers_have(one: bool) -> bool:
    if world_size() == 1:
        return one
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(one), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
