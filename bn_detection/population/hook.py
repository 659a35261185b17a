"""Precise population statistics before each evaluation and checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .collect import PopulationStatistics, apply_statistics, collect_statistics

logger = logging.getLogger(__name__)


class PreciseStatistics(HookBase):
    """Replaces the running statistics by precise ones, as Detectron2's ``hooks.PreciseBN`` does.

    It differs from it in that all workers share the images and hold the same statistics (fvcore
    issue 152, detectron2 issues 5398 and 5409), in the estimators, and in that random numbers,
    other buffers and counters are as if it had not run. Register it before the hooks that save
    and evaluate, on every worker.

    Args:
        model: the model, on this worker.
        build_batches: makes this worker's batches, anew at each use.
        num_batches: of each worker, at most.
        periods: the periods, in iterations; 0 for none. The last iteration is always one.
        modules: globs over the names of the layers.
        estimator: one of :data:`bn_detection.population.ESTIMATORS`.
        tolerance: if positive, stop when the relative error of every layer is below it.

    Attributes:
        listeners: called with the iteration and the statistics of each estimate.
    """

    def __init__(
        self,
        model: nn.Module,
        build_batches: Callable[[], Iterable[Any]],
        num_batches: int,
        *,
        periods: Sequence[int],
        modules: Sequence[str] = ("*",),
        estimator: str = "pooled",
        tolerance: float = 0.0,
    ) -> None:
        # The statistics need no gradient, so nothing for DDP to do.
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._build_batches = build_batches
        self._num_batches = num_batches
        self._periods = [period for period in periods if period > 0]
        self._options = {"modules": modules, "estimator": estimator, "tolerance": tolerance}
        self.listeners: list[Callable[[int, dict[str, PopulationStatistics]], None]] = []

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            self.update()

    def update(self) -> None:
        """Replace the statistics now; logs a line a layer."""
        with EventStorage(self.trainer.iter):
            statistics = collect_statistics(
                self._model, self._build_batches(), self._num_batches, **self._options
            )
        for name, estimate in statistics.items():
            logger.info(
                "%s: population statistics of %d values, standard error %.2f %%",
                name,
                estimate.count,
                100 * estimate.relative_error,
            )
        apply_statistics(self._model, statistics)
        for listener in self.listeners:
            listener(self.trainer.iter, statistics)
