"""Exact population statistics of BN layers, the same on all workers, with standard errors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..norm import GroupStatistics, check_choice, check_initialized
from .collector import Collector
from .estimators import ESTIMATORS, PopulationStatistics
from .mixing import Choose, choosing_statistics, frozen_batch_norms
from .observe import batch_norms_in_training, calls_collectives, observing, without_heads
from .untouched import untouched

logger = logging.getLogger(__name__)

ROIS = ("training", "inference")

# Batches of each worker after which a tolerance is first checked; then at twice as many, and so on.
_FIRST_CHECK = 16
# Relative standard error from which an estimate rests on too few samples.
_LARGE_ERROR = 0.1


Forward = Callable[[nn.Module, Any], Any]
"""Calls a model on a batch."""


def call(model: nn.Module, batch: Any) -> Any:
    """Of batches that are a model's only argument."""
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
    forward: Forward = call,
    whole_forwards: bool = False,
    mixing: float | None = None,
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

    The log has a line a layer, and a warning if some rest on too few samples.

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
        mixing: if given, FrozenBN layers take part too, and a layer is normalized with (1 - mixing)
            times its own statistics and mixing times those of its input on this worker, whatever
            its partition. For :func:`bn_detection.population.mix_statistics`, which gives the layer
            such a mixture: the layers after it then see what they will see.
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
    if mixing is not None:
        layers |= frozen_batch_norms(model, modules)
    if not layers:
        raise ValueError(
            f"No BatchNorm layer in training mode matches {list(modules)}: there are no statistics "
            "to estimate. Frozen layers and those of a model in eval mode do not take part."
        )
    for name, layer in layers.items():
        check_initialized(name, layer)
    collector = Collector(layers, ESTIMATORS[estimator], num_batches, forward, listener)
    some_heads = without_heads(model, layers, whole_forwards)
    watching = (
        observing(layers, collector.observe)
        if mixing is None
        else choosing_statistics(model, layers, _mixture(layers, collector, mixing))
    )
    with untouched(model), watching, some_heads:
        if rois == "inference":
            model.eval()
        for layer in layers.values():
            layer.train(mixing is None)
        source = collector.take(iter(batches), in_step=calls_collectives(model))
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


@contextmanager
def quiet_collection() -> Iterator[None]:
    """Let :func:`collect_statistics` say nothing of each layer, nor warn of few samples."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@torch.no_grad()
def apply_statistics(model: nn.Module, statistics: dict[str, PopulationStatistics]) -> None:
    """Make estimates the running statistics of a model, in place.

    A layer that saw fewer than two values keeps its own, with a warning that names it.
    """
    for name, estimate in statistics.items():
        if estimate.count < 2:
            logger.warning("%s saw %d values and keeps its statistics.", name, estimate.count)
            continue
        layer: Any = model.get_submodule(name)
        layer.running_mean.copy_(estimate.mean)
        layer.running_var.copy_(estimate.var)


def _mixture(layers: Mapping[str, Any], collector: Collector, weight: float) -> Choose:
    """What layers are normalized with, while the collector is shown their inputs."""
    own = {
        name: (layer.running_mean.double().clone(), layer.running_var.double().clone())
        for name, layer in layers.items()
    }

    def choose(name: str, statistics: GroupStatistics) -> tuple[Tensor, Tensor]:
        collector.observe(name, statistics, False)
        share = weight * (statistics.count[0] > 0).double()
        mean, var = own[name]
        return mean.lerp(statistics.mean[0], share), var.lerp(statistics.var[0], share)

    return choose


def _checks(num_batches: int) -> Iterator[int]:
    """Numbers of batches after which to look whether they suffice."""
    goal = _FIRST_CHECK
    while goal < num_batches:
        yield goal
        goal *= 2
    yield num_batches


def _report(results: dict[str, PopulationStatistics], images: int, tolerance: float) -> None:
    """A line a layer; warnings name the least certain layer, and what it needs."""

    def more(layers: list[str]) -> str:
        number = len(layers) - 1
        return f" So it is with {number} more layer{'s' if number > 1 else ''}." if number else ""

    def needed(error: float, wanted: float) -> int:
        return math.ceil(images * (error / wanted) ** 2)

    errors = {name: r.relative_error for name, r in results.items() if r.count > 1}
    unknown = [name for name, error in errors.items() if math.isnan(error)]
    few = sorted((n for n, e in errors.items() if e > _LARGE_ERROR), key=lambda n: -errors[n])
    for name, error in errors.items():
        if name not in unknown:
            logger.info(
                "%s: population statistics of %d values, standard error %.2f %%",
                *(name, results[name].count, 100 * error),
            )
    if unknown:
        logger.warning(
            "%s: population statistics of %d values of one batch, so their standard error is "
            "unknown.%s",
            *(unknown[0], results[unknown[0]].count, more(unknown)),
        )
    if few:
        error = errors[few[0]]
        logger.warning(
            "%s: its population statistics rest on too few samples: %d images give a standard "
            "error of %.1f %%, about %d would give %.0f %%.%s",
            *(few[0], images, 100 * error, needed(error, _LARGE_ERROR), 100 * _LARGE_ERROR),
            more(few),
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
