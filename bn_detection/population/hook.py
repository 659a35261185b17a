"""Precise population statistics, estimated in the course of a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .collect import apply_statistics, collect_statistics
from .estimators import PopulationStatistics
from .observe import batch_norms_in_training
from .untouched import untouched

logger = logging.getLogger(__name__)

_STATISTICS = ("running_mean", "running_var")


class PreciseStatistics(HookBase):
    """Replaces the running statistics by precise ones, as Detectron2's ``hooks.PreciseBN`` does.

    It differs from it in that all workers share the images and hold the same statistics (fvcore
    issue 152, detectron2 issues 5398 and 5409), in the estimators, and in that random numbers,
    other buffers and counters are as if it had not run. Register it before the hooks that save
    and evaluate, on every worker; and after those that average running statistics.

    Layers that are in eval mode (frozen ones) keep their statistics.

    Args:
        model: the model, on this worker.
        build_batches: makes this worker's batches, anew at each use.
        num_batches: of each worker.
        periods: the periods, in iterations; 0 for none. The last iteration is always one.
        modules: globs over the names of the layers.
        restore_ema: whether the next step goes on from the running statistics that were replaced,
            bit for bit. Until then they are in the hook's state, and so in checkpoints; else it
            goes on from the precise ones, as upstream.
        options: ``estimator``, ``tolerance`` and ``rois`` of :func:`collect_statistics`.

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
        restore_ema: bool = False,
        **options: Any,
    ) -> None:
        # The statistics need no gradient, so nothing for DDP to do.
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._build_batches = build_batches
        self._num_batches = num_batches
        self._periods = [period for period in periods if period > 0]
        self._modules = modules
        self._restore_ema = restore_ema
        self._options = options
        self._replaced: dict[str, dict[str, Tensor]] = {}
        self._all_frozen = False
        self.listeners: list[Callable[[int, dict[str, PopulationStatistics]], None]] = []

    def before_step(self) -> None:
        for name, statistics in self._replaced.items():
            layer = self._model.get_submodule(name)
            for key, value in statistics.items():
                getattr(layer, key).copy_(value)
        self._replaced = {}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            self.update()

    def state_dict(self) -> dict[str, Any]:
        return {"replaced": self._replaced} if self._replaced else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the running statistics of a checkpoint at the next step, if asked to."""
        if self._restore_ema:
            self._replaced = state["replaced"]

    def update(self) -> None:
        """Replace the statistics now; logs a line a layer.

        Raises:
            FloatingPointError: a layer saw a value that is not finite; no layer has changed.
        """
        layers = batch_norms_in_training(self._model, self._modules)
        if not layers:
            if not self._all_frozen:
                logger.info("All layers are frozen: no population statistics are estimated.")
            self._all_frozen = True
            return
        statistics = estimate_statistics(
            self._model,
            self._build_batches,
            self._num_batches,
            modules=self._modules,
            **self._options,
        )
        if self._restore_ema:
            for name, layer in layers.items():
                # A second update before the next step replaces nothing of the training's.
                self._replaced.setdefault(
                    name, {key: getattr(layer, key).clone() for key in _STATISTICS}
                )
        apply_statistics(self._model, statistics)
        for listener in self.listeners:
            listener(self.trainer.iter, statistics)


def estimate_statistics(
    model: nn.Module,
    build_batches: Callable[[], Iterable[Any]],
    num_batches: int,
    **options: Any,
) -> dict[str, PopulationStatistics]:
    """:func:`collect_statistics` within a training, which goes on as if it had not been called.

    Args:
        model: the model, on this worker; not DDP's.
        build_batches: makes this worker's batches.
        num_batches: of each worker.
        options: of :func:`collect_statistics`.
    """
    with EventStorage(get_event_storage().iter), untouched(model):
        return collect_statistics(model, build_batches(), num_batches, **options)
