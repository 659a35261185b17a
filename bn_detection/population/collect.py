"""Exact population statistics of BN layers, the same on all workers, with standard errors."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import Tensor, nn

from ..norm import (
    Collectives,
    Groups,
    GroupStatistics,
    PartitionedBatchNorm2d,
    Scope,
    as_maps,
    check_choice,
    check_initialized,
    group_statistics,
    grouped_batch_norm,
    is_exact,
    matches,
    normalizes_in_training,
    tracks_statistics,
    world_size,
)
from .estimators import ESTIMATORS, Estimator, PopulationStatistics
from .layers import SYNC_BATCH_NORMS
from .untouched import untouched

logger = logging.getLogger(__name__)

ROIS = ("training", "inference")

# The batches are merged into at most so many parts, whose spread gives the standard errors.
_MAX_PARTS = 32
# Batches of each worker after which a tolerance is first checked; then at twice as many, and so on.
_FIRST_CHECK = 16
# Relative standard error from which an estimate rests on too few samples.
_LARGE_ERROR = 0.1
_LOG_SECONDS = 10.0

# Of ROI heads whose mask and keypoint heads come last, and can be switched off.
_FORWARDS_OF_ROI_HEADS = (StandardROIHeads.forward, CascadeROIHeads.forward)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int,
    *,
    modules: Sequence[str] = ("*",),
    estimator: str = "pooled",
    tolerance: float = 0.0,
    rois: str = "training",
    allow_fewer: bool = False,
    forward: Callable[[nn.Module, Any], Any] = _call,
    whole_forwards: bool = False,
    listener: Callable[[str, GroupStatistics], None] | None = None,
) -> dict[str, PopulationStatistics]:
    """Estimate population statistics from forward passes.

    The model, and the random number generators, are afterwards as they were.

    ``pooled`` is the mean and variance of all values together, the variance with N / (N - 1):
    exact for any batch size (*Rethinking "Batch" in BatchNorm*, Sec. 3 and its appendix).
    ``mean_of_variances`` averages the groups' means and unbiased variances, each group alike
    (Ioffe & Szegedy 2015, Algorithm 2). N counts values a channel, N x H x W. fvcore's function
    differs in that its pooled variance is without N / (N - 1), and that it knows one process.

    The batches of all workers are merged exactly, in float64 (Chan et al. 1979) and one collective,
    so all hold the same bits; fvcore's leaves each worker with its own (fvcore issue 152).

    The log has a line a layer, and a warning for each that rests on too few samples.

    Args:
        model: its BN layers in training mode take part. Normalization is that of training, and the
            running statistics are not moved.
        batches: this worker's inputs of ``model``. Detectron2's are lists of images.
        num_batches: how many of them to use.
        modules: globs over the names of the layers.
        estimator: one of :data:`ESTIMATORS`.
        tolerance: if positive, stop when the relative error of every layer is below it.
        rois: ``training`` runs the model in the mode that it is in, so a detector in training
            mode samples RoIs with the labels. ``inference`` runs it in eval mode, its layers that
            take part alone in training mode: RoIs are the proposals that inference uses.
        allow_fewer: whether to use what there is where ``batches`` end early. Each worker then
            uses all of its own, unless layers share statistics over the workers: these need every
            worker, so all stop with the first.
        forward: calls the model on a batch; for batches that are not its only argument, such as
            ``lambda model, batch: model(*batch)`` for torchvision's (images, targets).
        whole_forwards: whether all of the model runs; else a ``StandardROIHeads`` leaves out the
            mask and keypoint heads without layers that take part.
        listener: called with the name of a layer and the mini-batch statistics of its groups, at
            each call of the layer.

    Returns:
        By layer name.

    Raises:
        ValueError: no layer takes part; there is no batch, or fewer than ``num_batches`` without
            ``allow_fewer``; an unknown estimator or kind of RoIs.
        FloatingPointError: a layer saw a value that is not finite; names it.
    """
    check_choice("estimator", estimator, tuple(ESTIMATORS))
    check_choice("rois", rois, ROIS)
    layers = batch_norms_in_training(model, modules)
    if not layers:
        raise ValueError(
            f"No BatchNorm layer in training mode matches {list(modules)}: there are no statistics "
            "to estimate. Frozen layers and those of a model in eval mode do not take part."
        )
    for name, layer in layers.items():
        check_initialized(name, layer)
    collector = _Collector(layers, ESTIMATORS[estimator], num_batches, forward, listener)
    with untouched(model), collector.observing(), _without_heads(model, layers, whole_forwards):
        if rois == "inference":
            model.eval()
            for layer in layers.values():
                layer.train()
        source = collector.take(iter(batches), in_step=_calls_collectives(model))
        for goal in _checks(num_batches) if tolerance > 0 else [num_batches]:
            for batch in islice(source, goal - collector.batches):
                collector.run(model, batch)
            results, used = collector.results()
            seen = [result for result in results.values() if result.count > 0]
            precise = bool(seen) and all(result.relative_error < tolerance for result in seen)
            if precise:
                break
    if not precise:
        used.check(num_batches, allow_fewer)
    for name, result in results.items():
        if not bool(torch.isfinite(result.mean).all() and torch.isfinite(result.var).all()):
            raise FloatingPointError(
                f"{name}: its input has values that are not finite, so it has no population "
                "statistics, and the model keeps the old ones. Its weights may have diverged."
            )
    _report(results, sum(used.images), tolerance)
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
        if tracks_statistics(module) and module.training and matches(name, modules)
    }


def all_reduce_of_stock(layer: nn.Module, owner: str) -> Callable[[Tensor], Tensor] | None:
    """The sum over the workers, if a layer of torch or Detectron2 normalizes their rows together.

    Args:
        layer: a BN layer.
        owner: names it in errors.
    """
    spans = isinstance(layer, SYNC_BATCH_NORMS) and world_size() > 1
    return Collectives(owner).all_reduce if spans else None


@contextmanager
def _without_heads(
    model: nn.Module, layers: dict[str, nn.Module], whole_forwards: bool
) -> Iterator[None]:
    """Leave out heads after the box head whose layers do not take part."""
    wanted = set(layers.values())
    left_out: list[tuple[nn.Module, str]] = []
    for heads in [] if whole_forwards else model.modules():
        if getattr(type(heads), "forward", None) not in _FORWARDS_OF_ROI_HEADS:
            continue
        for switch, head in (("mask_on", "mask_head"), ("keypoint_on", "keypoint_head")):
            if getattr(heads, switch) and wanted.isdisjoint(getattr(heads, head).modules()):
                left_out.append((heads, switch))
    for heads, switch in left_out:
        setattr(heads, switch, False)
    try:
        yield
    finally:
        for heads, switch in left_out:
            setattr(heads, switch, True)


class _Used(NamedTuple):
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


class _Collector:
    def __init__(
        self,
        layers: dict[str, nn.Module],
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

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Let the layers report the statistics of their groups; their own do not move."""
        previous = {
            layer: layer.observer
            for layer in self._layers.values()
            if isinstance(layer, PartitionedBatchNorm2d)
        }
        replaced: list[nn.Module] = []
        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for name, layer in self._layers.items():
                observe = partial(self._observe, name)
                if isinstance(layer, PartitionedBatchNorm2d):
                    layer.observer = observe
                    continue
                all_reduce = all_reduce_of_stock(layer, name)
                if is_exact(layer):
                    replaced.append(layer)
                    layer.forward = partial(_observed_forward, layer, observe, all_reduce)
                else:
                    hook = partial(_observe_input, observe=observe, all_reduce=all_reduce)
                    handles.append(layer.register_forward_pre_hook(hook))
            yield
        finally:
            for layer, observer in previous.items():
                layer.observer = observer
            for layer in replaced:
                del layer.forward
            for handle in handles:
                handle.remove()

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
            self.images += _num_images(batch)
            yield batch

    def run(self, model: nn.Module, batch: Any) -> None:
        """One forward pass."""
        self._batch = {}
        self._forward(model, batch)
        for name, layer in self._layers.items():
            if name not in self._batch:  # it was not called
                self._batch[name] = self._nothing(layer.num_features)
        self._add(torch.cat([self._batch[name] for name in self._layers], dim=1))
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            left = (self._logged - self._start) / self.batches * (self._num_batches - self.batches)
            logger.info(
                "Population statistics: batch %d/%d, eta %ds", self.batches, self._num_batches, left
            )

    def _observe(self, name: str, statistics: GroupStatistics, spans_workers: bool) -> None:
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
        some = next(iter(self._layers.values())).running_mean
        return some.new_zeros(*parts, self._estimator.rows, channels, dtype=torch.float64)

    def results(self) -> tuple[dict[str, PopulationStatistics], _Used]:
        """Merge the parts of all workers: one collective."""
        sizes = [layer.num_features for layer in self._layers.values()]
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
        used = _Used([*map(int, batches)], [*map(int, images)], [*map(bool, ended)])
        columns = [
            column.split(sizes) for column in self._estimator.estimate(torch.cat(of_workers))
        ]
        return {
            name: PopulationStatistics(mean, var, mean_error, var_error, int(count[0]))
            for name, mean, var, mean_error, var_error, count in zip(
                self._layers, *columns, strict=True
            )
        }, used


def _observed_forward(
    layer: nn.Module,
    observe: Callable[[GroupStatistics, bool], None],
    all_reduce: Callable[[Tensor], Tensor] | None,
    input: Tensor,
) -> Tensor:
    """That of a layer of torch in training mode, whose statistics are computed once."""
    x, groups = as_maps(input), Groups(None, 1)
    statistics = group_statistics(x, groups, all_reduce)
    observe(statistics, all_reduce is not None)
    weight = layer.weight if layer.affine else torch.ones_like(layer.running_mean)
    bias = layer.bias if layer.affine else torch.zeros_like(layer.running_mean)
    return grouped_batch_norm(x, weight, bias, statistics, groups, layer.eps).reshape(input.shape)


def _observe_input(
    layer: nn.Module,
    args: tuple[Any, ...],
    *,
    observe: Callable[[GroupStatistics, bool], None],
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> None:
    """Before a forward of a layer's own, which may do more than normalize."""
    statistics = group_statistics(as_maps(args[0]), Groups(None, 1), all_reduce)
    observe(statistics, all_reduce is not None)


def _num_images(batch: Any) -> int:
    """The length of a batch; of a tuple, such as (images, targets), that of its first item."""
    first = batch[0] if isinstance(batch, tuple) and batch else batch
    return len(first) if isinstance(first, Sized) else 1


def _checks(num_batches: int) -> Iterator[int]:
    """Numbers of batches after which to look whether they suffice."""
    goal = _FIRST_CHECK
    while goal < num_batches:
        yield goal
        goal *= 2
    yield num_batches


def _calls_collectives(model: nn.Module) -> bool:
    """Whether a forward of the model in its mode needs all workers."""
    if world_size() == 1:
        return False
    for module in model.modules():
        if not normalizes_in_training(module):
            continue
        of_partition = isinstance(module, PartitionedBatchNorm2d) and module.partition.spans_workers
        of_scope = any(isinstance(v, Scope) and v.needs_counts for v in vars(module).values())
        if of_partition or of_scope or isinstance(module, SYNC_BATCH_NORMS):
            return True
    return False


def _all_workers(one: bool) -> bool:
    flag = torch.tensor(int(one), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _report(results: dict[str, PopulationStatistics], images: int, tolerance: float) -> None:
    """A line a layer; layers of too few samples, and how many they need, as warnings."""

    def needed(error: float, wanted: float) -> int:
        return math.ceil(images * (error / wanted) ** 2)

    errors = {name: r.relative_error for name, r in results.items() if r.count > 1}
    for name, error in errors.items():
        count = results[name].count
        if math.isnan(error):
            logger.warning(
                "%s: population statistics of %d values of one batch, so their standard error is "
                "unknown.",
                name,
                count,
            )
            continue
        logger.info(
            "%s: population statistics of %d values, standard error %.2f %%",
            *(name, count, 100 * error),
        )
        if error > _LARGE_ERROR:
            logger.warning(
                "%s: its population statistics rest on too few samples: %d images give a standard "
                "error of %.1f %%, about %d would give %.0f %%.",
                *(name, images, 100 * error, needed(error, _LARGE_ERROR), 100 * _LARGE_ERROR),
            )
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]), default=None)
    if tolerance <= 0 or worst is None:
        return
    if errors[worst] < tolerance:
        logger.info(
            "Every layer has a standard error below the tolerance of %.2f %% after %d images.",
            *(100 * tolerance, images),
        )
    else:
        logger.warning(
            "All %d images do not suffice for the tolerance of %.2f %%: %s has a standard error of "
            "%.2f %%.",
            *(images, 100 * tolerance, worst, 100 * errors[worst]),
        )
