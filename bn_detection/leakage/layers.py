"""The BN layers of a model: what shares their batch, and how far their statistics are apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..detectors import in_roi_heads
from ..estimate import Estimate
from ..heads import FROZEN
from ..norm import (
    Groups,
    GroupStatistics,
    LevelBatchNorm2d,
    PartitionedBatchNorm2d,
    group_statistics,
    is_exact,
    partition_name,
    tracks_statistics,
)
from ..population import (
    ESTIMATORS,
    SYNC_BATCH_NORMS,
    Forward,
    PopulationStatistics,
    batch_norms_in_training,
    call,
    change_between,
    collect_statistics,
    untouched,
)

_STANDARD_NORMAL = 1.96

# A channel is dead if its input has less variance than this share of eps, so that its normalized
# values have a standard deviation below 0.1, or if its weight is below this share of the layer's.
_DEAD_VARIANCE = 0.01
_DEAD_WEIGHT = 1e-3


@dataclass
class LayerReport:
    """A BN layer, as it is in training.

    A distance is the root mean square, over the channels that are not dead, of the shift and of the
    logarithm of the scale between two statistics (docs/diagnosis.md). Its unit is a standard
    deviation of the layer's input.

    Attributes:
        name: of the layer in the model.
        kind: its class.
        channels: C.
        sharing: what shares its normalization batch: the name of a partition, with "level" beside
            it where each FPN level is a batch; "frozen" if it has none.
        spans_workers: whether its normalization batch has rows of several workers.
        rows: what a row of its input is: "RoIs" or "images".
        is_ours: whether the class is of this project.
        is_exact: whether it only normalizes, so that ``BN.CONVERT`` can replace it.
        trains: whether it normalizes with mini-batches in training.
        momentum: of its running statistics; None for frozen layers.
        affine_frozen: whether it has affine parameters that no optimizer may change.
        updates: mini-batches that its running statistics have seen; None if it does not count.
        is_initial: whether its statistics, and for a frozen one its weights, are those that it was
            built with.
        is_folded: whether it is frozen with mean 0 and variance 1, its statistics in its weights.
        rows_per_batch: mean number of rows of a normalization batch.
        values_per_batch: mean number of values a channel of a normalization batch.
        ema_to_precise: distance of the statistics that it has from those of its inputs.
        batch_to_precise: mean distance of the statistics of a normalization batch likewise.
        ema_to_batch: mean distance between the former two.
        levels: by FPN level, distance of its statistics from those of all; empty if it has one.
        levels_apart: the largest of them.
        level_batches: whether each level is a normalization batch, while the levels share
            population statistics.
        level_populations: whether each level has population statistics of its own, while the levels
            share normalization batches.
        impossible: channels whose statistics are not finite, or whose variance is negative.
        dead: channels without variance or weight.
        dead_weights: those of them without weight.
    """

    name: str
    kind: str
    channels: int
    sharing: str
    spans_workers: bool
    rows: str
    is_ours: bool
    is_exact: bool
    trains: bool
    momentum: float | None
    affine_frozen: bool
    updates: int | None
    is_initial: bool
    is_folded: bool
    rows_per_batch: float | None = None
    values_per_batch: float | None = None
    ema_to_precise: Estimate | None = None
    batch_to_precise: Estimate | None = None
    ema_to_batch: Estimate | None = None
    levels: tuple[Estimate, ...] = ()
    levels_apart: Estimate | None = None
    level_batches: bool = False
    level_populations: bool = False
    impossible: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()
    dead_weights: tuple[int, ...] = ()

    @property
    def joins_workers(self) -> bool:
        """Whether virtual workers share its batches, which are of one worker in training."""
        return self.sharing == "ghost" or (self.sharing.startswith("worker") and not self.is_ours)

    def to_json(self) -> dict[str, Any]:
        """JSON types; numbers that are not finite are null."""
        return {field.name: _json(getattr(self, field.name)) for field in fields(self)}


@torch.no_grad()
def inspect_layers(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int,
    *,
    rois: str = "training",
    forward: Forward = call,
) -> list[LayerReport]:
    """Describe the BN layers of a detector, and measure them on images.

    Nothing in the model changes. Layers that were not reached by a forward pass have no numbers.

    Args:
        model: in training mode, on one process; each batch is what a worker sees in a step, or, if
            a layer shares its batch over the workers, what all of them see.
        batches: inputs of ``model``.
        num_batches: how many of them to use.
        rois: as in :func:`bn_detection.population.collect_statistics`.
        forward: likewise.

    Returns:
        A report for each BN layer that tracks statistics or is frozen, in the order of the model.

    Raises:
        FloatingPointError: a layer saw a value that is not finite; names it.
    """
    layers = batch_norms(model)
    if not layers:
        return []
    reports = {name: _describe(model, name, layer) for name, layer in layers.items()}
    trained = batch_norms_in_training(model, ["*"])
    seen = _Inputs(layers)
    with seen.watching(model, trained):
        if trained:
            precise = collect_statistics(
                model,
                batches,
                num_batches,
                rois=rois,
                allow_fewer=True,
                forward=forward,
                whole_forwards=any(isinstance(layer, FROZEN) for layer in layers.values()),
                listener=seen.add_batch,
            )
        else:
            precise = {}
            seen.run(model, batches, rois, forward)
    precise |= seen.of_frozen()
    for name, statistics in precise.items():
        if statistics.count > 1:
            _measure(reports[name], layers[name], statistics, seen)
    return list(reports.values())


def spans_workers(model: nn.Module) -> bool:
    """Whether a layer of a model normalizes the rows of several workers together in training."""
    return any(_spans_workers(layer) for layer in model.modules())


class _Inputs:
    """What the layers see, forward by forward."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._layers = layers
        self._positions: dict[str, int] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._frozen: dict[str, list[Tensor]] = defaultdict(list)
        self._levels: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        # Layers that all levels share in one call.
        self.joined: set[str] = set()
        self.batches: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.rows: dict[str, list[float]] = defaultdict(list)
        self.values: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def watching(self, model: nn.Module, trained: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = [model.register_forward_pre_hook(lambda *_: self._calls.clear())]
        for name, layer in self._layers.items():
            hook = self._see_shape if name in trained else self._see_frozen
            if name in trained or isinstance(layer, FROZEN):
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda _, inputs, name=name, hook=hook: hook(name, inputs[0])
                    )
                )
        for name, module in model.named_modules():
            if isinstance(module, LevelBatchNorm2d) and _share_everything(module):
                self.joined.add(f"{name}.0")
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, inputs, name=f"{name}.0": self._see_levels(name, inputs[0])
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, model: nn.Module, batches: Iterable[Any], rois: str, forward: Forward) -> None:
        """Forward passes of a model whose layers are all frozen."""
        with untouched(model):
            model.train(rois == "training")
            for batch in batches:
                forward(model, batch)

    def add_batch(self, name: str, statistics: GroupStatistics) -> None:
        """The mini-batch statistics of a call of a layer in training mode."""
        level = self._calls[name]
        self._calls[name] += 1
        if name not in self.joined:
            self._levels[name][level].append(_POOLED.keep(statistics))
        positions = self._positions.get(name, 0)
        groups = zip(statistics.count[:, 0].tolist(), statistics.mean, statistics.var, strict=True)
        for count, mean, var in groups:
            if count > 1:
                self.values[name].append(count)
                if positions:
                    self.rows[name].append(count / positions)
                self.batches[name].append((mean, var * count / (count - 1)))

    def levels(self, name: str) -> list[PopulationStatistics]:
        """The statistics of each of the levels that share a layer; none if it has one."""
        levels = self._levels[name]
        if len(levels) < 2:
            return []
        return [_population(torch.stack(levels[level])) for level in sorted(levels)]

    def of_frozen(self) -> dict[str, PopulationStatistics]:
        return {name: _population(torch.stack(parts)) for name, parts in self._frozen.items()}

    def _see_shape(self, name: str, x: Tensor) -> None:
        self._positions[name] = x.shape[2:].numel()

    def _see_frozen(self, name: str, x: Tensor) -> None:
        self._frozen[name].append(_POOLED.keep(group_statistics(x, Groups(None, 1))))

    def _see_levels(self, name: str, features: list[Tensor]) -> None:
        for level, x in enumerate(features):
            statistics = group_statistics(x, Groups(None, 1))
            self._levels[name][level].append(_POOLED.keep(statistics))


_POOLED = ESTIMATORS["pooled"]


def _population(parts: Tensor) -> PopulationStatistics:
    mean, var, mean_error, var_error, count = _POOLED.estimate(parts)
    return PopulationStatistics(mean, var, mean_error, var_error, int(count[0]))


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BN layers of a model that have statistics, frozen ones too, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FROZEN) or tracks_statistics(module)
    }


def _describe(model: nn.Module, name: str, layer: Any) -> LayerReport:
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    trains = isinstance(layer, _BatchNorm) and layer.training
    mean, var = layer.running_mean, layer.running_var
    # Detectron2 builds FrozenBN with the variance 1 - eps.
    untouched_statistics = bool((mean == 0).all() and (var - 1).abs().max() <= 2 * layer.eps)
    affine = [*layer.parameters(recurse=False)] or [*owner.parameters(recurse=False)]
    frozen = isinstance(layer, FROZEN)
    own_weights = frozen and bool((layer.weight != 1).any() or (layer.bias != 0).any())
    counter = getattr(layer, "num_batches_tracked", None)
    return LayerReport(
        name=name,
        kind=type(layer).__name__,
        channels=mean.numel(),
        sharing=_sharing(layer, owner) if trains else "frozen",
        spans_workers=_spans_workers(layer),
        rows="RoIs" if in_roi_heads(model, name) else "images",
        is_ours=isinstance(layer, PartitionedBatchNorm2d),
        is_exact=frozen or is_exact(layer),
        trains=trains,
        momentum=None if frozen else layer.momentum,
        affine_frozen=trains and bool(affine) and not any(p.requires_grad for p in affine),
        updates=None if counter is None else int(counter),
        is_initial=untouched_statistics and not own_weights,
        is_folded=untouched_statistics and own_weights,
        impossible=_indices(~(torch.isfinite(mean + var) & (var >= 0))),
        level_batches=_levels_of(owner) == ("separate", "shared"),
        level_populations=_levels_of(owner) == ("shared", "separate"),
    )


def _spans_workers(layer: nn.Module) -> bool:
    of_partition = isinstance(layer, PartitionedBatchNorm2d) and layer.partition.spans_workers
    return layer.training and (isinstance(layer, SYNC_BATCH_NORMS) or of_partition)


def _sharing(layer: nn.Module, owner: nn.Module) -> str:
    name = "world" if isinstance(layer, SYNC_BATCH_NORMS) else "worker"
    if isinstance(layer, PartitionedBatchNorm2d):
        name = partition_name(layer.partition)
    each_level = isinstance(owner, CycleBatchNormList) or (
        isinstance(owner, LevelBatchNorm2d) and owner.options.train == "separate"
    )
    return f"{name}, level" if each_level else name


def _levels_of(owner: nn.Module) -> tuple[str, str] | None:
    """How levels are normalized in training, and at inference."""
    if not isinstance(owner, LevelBatchNorm2d):
        return None
    return owner.options.train, owner.options.population


def _share_everything(module: LevelBatchNorm2d) -> bool:
    return _levels_of(module) == ("shared", "shared")


def _measure(report: LayerReport, layer: Any, precise: PopulationStatistics, seen: _Inputs) -> None:
    name, eps = report.name, layer.eps
    no_variance = precise.var < _DEAD_VARIANCE * eps
    no_weight = torch.zeros_like(no_variance)
    if layer.weight is not None:
        weight = layer.weight.detach().abs().double()
        no_weight = weight <= _DEAD_WEIGHT * weight.square().mean().sqrt()
    report.dead = _indices(no_variance | no_weight)
    report.dead_weights = _indices(no_weight)
    report.rows_per_batch = _mean(seen.rows[name])
    report.values_per_batch = _mean(seen.values[name])
    alive = ~(no_variance | no_weight)
    if not alive.any():
        return

    def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        (mean, var), (other_mean, other_var) = one, other
        old, new = (mean[alive], var[alive]), (other_mean[alive], other_var[alive])
        return change_between(old, new, eps).rms

    truth = (precise.mean, precise.var)
    has = (layer.running_mean.double(), layer.running_var.double())
    error = _error(precise, alive, eps)
    if not report.is_folded:
        report.ema_to_precise = _within(distance(truth, has), error)
    batches = seen.batches[name]
    report.batch_to_precise = _average([distance(truth, batch) for batch in batches])
    report.ema_to_batch = _average([distance(has, batch) for batch in batches])
    levels = seen.levels(name)
    report.levels = tuple(
        _within(distance(truth, (level.mean, level.var)), error + _error(level, alive, eps))
        for level in levels
        if level.count > 1
    )
    report.levels_apart = max(report.levels, key=lambda level: level.value, default=None)
    if levels and name not in seen.joined and not report.level_batches:
        report.level_batches = True
        report.sharing += ", level"


def _error(statistics: PopulationStatistics, alive: Tensor, eps: float) -> float:
    """The distance that an estimate is likely to have from the truth, by its standard errors."""
    scale = (statistics.var + eps)[alive]
    of_mean = statistics.mean_error[alive].square() / scale
    of_log_std = (statistics.var_error[alive] / (2 * scale)).square()
    return float((of_mean + of_log_std).mean().sqrt())


def _within(value: float, error: float) -> Estimate:
    """By the triangle inequality: an estimate off by ``2 error`` moves a distance by no more."""
    if math.isnan(error):
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, max(value - 2 * error, 0.0), value + 2 * error)


def _average(values: list[float]) -> Estimate | None:
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _STANDARD_NORMAL * math.sqrt(variance / len(values))
    return Estimate(mean, mean - half, mean + half)


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _json(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
