"""Mini-batch, EMA and population statistics of a few channels, recorded over training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..files import replacing
from ..norm import GroupStatistics, PartitionedBatchNorm2d, TrackingBatchNorm
from .estimators import PopulationStatistics
from .layers import describe_batch_norms
from .observe import all_reduce_of_stock, batch_norms_in_training, observe_input

FILE_NAME = "bn_trace.jsonl"
"""In OUTPUT_DIR: one JSON object a line, of one layer, channel and iteration."""

_OBSERVED = ("batch_mean", "batch_var", "ema_mean", "ema_var")


class TraceStatistics(HookBase):
    """Records the statistics that BN layers train with, and those that they will infer with.

    *Rethinking "Batch" in BatchNorm*, Sec. 3, compares them over training: those of the mini-batch
    scatter, and their EMA lags behind the population. Worker 0 writes a line a channel to
    :data:`FILE_NAME`, with ``iteration`` (from 0, as in metrics.json), ``layer``, ``channel``, and

    * ``batch_mean`` and ``batch_var``, of the first group of the first forward of the iteration,
      the variance unbiased, as the EMA takes it; null where it has fewer than two values;
    * ``ema_mean`` and ``ema_var``, the running statistics of worker 0 after the step, before they
      are averaged over the workers;

    or ``population_mean`` and ``population_var``, where :meth:`record_population` was told of an
    estimate. The same numbers go to the event storage, as ``bn_trace/<layer>/<channel>/<name>``.
    Training is the same with and without the hook, bit for bit. After a resume the records from the
    first iteration that runs again are replaced.

    Register it on every worker, before the hooks that change running statistics.

    Args:
        model: the model, on this worker, in training mode.
        output_dir: the folder of the file.
        period: iterations between records, at least 1.
        modules: globs over the names of the layers.
        channels: of each layer, evenly spaced; at most all.

    Raises:
        ValueError: no BN layer in training mode matches.
    """

    def __init__(
        self,
        model: nn.Module,
        output_dir: str,
        *,
        period: int,
        modules: Sequence[str] = ("*",),
        channels: int = 2,
    ) -> None:
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers = batch_norms_in_training(model, modules)
        if not self._layers:
            raise ValueError(
                f"{list(modules)} match no BN layer in training mode. {describe_batch_norms(model)}"
            )
        self._channels = {
            name: _evenly_spaced(layer.num_features, channels)
            for name, layer in self._layers.items()
        }
        self._path = Path(output_dir, FILE_NAME)
        self._period = period
        self._batch: dict[str, GroupStatistics] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def before_train(self) -> None:
        if comm.is_main_process() and self._path.exists():
            _drop_from(self._path, self.trainer.start_iter)

    def before_step(self) -> None:
        if self._is_due():
            self._batch = {}
            for name, layer in self._layers.items():
                observe = partial(self._observe, name)
                if isinstance(layer, PartitionedBatchNorm2d):
                    layer.observer = observe
                else:
                    all_reduce = all_reduce_of_stock(layer, f"trace of {name}")
                    hook = partial(observe_input, observe=observe, all_reduce=all_reduce)
                    self._handles.append(layer.register_forward_pre_hook(hook))

    def after_step(self) -> None:
        if not self._is_due():
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self._layers.values():
            if isinstance(layer, PartitionedBatchNorm2d):
                layer.observer = None
        # One transfer from a GPU.
        columns = [self._observed(name, layer) for name, layer in self._layers.items()]
        self._record(self.trainer.iter, self._layers, _OBSERVED, torch.cat(columns, dim=1).tolist())

    def record_population(
        self, iteration: int, statistics: dict[str, PopulationStatistics]
    ) -> None:
        """Record an estimate of the population statistics.

        Args:
            iteration: after which it was made.
            statistics: by layer name; layers that are not traced are passed over.
        """
        traced = [name for name in self._layers if name in statistics]
        if traced:
            columns = [
                torch.stack([statistics[name].mean, statistics[name].var])[:, self._channels[name]]
                for name in traced
            ]
            names = ("population_mean", "population_var")
            self._record(iteration, traced, names, torch.cat(columns, dim=1).tolist())

    def _is_due(self) -> bool:
        return bool((self.trainer.iter + 1) % self._period == 0)

    def _observe(self, name: str, statistics: GroupStatistics, spans_workers: bool) -> bool:
        self._batch.setdefault(name, statistics)
        return True

    @torch.no_grad()
    def _observed(self, name: str, layer: TrackingBatchNorm) -> Tensor:
        """``(4, channels)`` float64: the statistics of :data:`_OBSERVED`."""
        channels = self._channels[name]
        ema = torch.stack([layer.running_mean, layer.running_var]).double()[:, channels]
        batch = torch.full_like(ema, math.nan)
        if name in self._batch and self._batch[name].count.numel() > 0:
            first = self._batch[name]
            count = first.count[0]
            unbiased = first.var[0] * count / (count - 1)
            found = torch.stack([first.mean[0], unbiased])[:, channels]
            batch = torch.where(count > 1, found, batch)
        return torch.cat([batch, ema])

    def _record(
        self,
        iteration: int,
        layers: Iterable[str],
        names: Sequence[str],
        rows: list[list[float]],
    ) -> None:
        """Write the numbers of ``rows``, by name and then by layer and channel."""
        if not comm.is_main_process():
            return
        places = [(layer, channel) for layer in layers for channel in self._channels[layer]]
        lines = []
        for (layer, channel), *values in zip(places, *rows, strict=True):
            record: dict[str, Any] = {"iteration": iteration, "layer": layer, "channel": channel}
            for name, value in zip(names, values, strict=True):
                record[name] = value if math.isfinite(value) else None
                if math.isfinite(value):
                    self.trainer.storage.put_scalar(
                        f"bn_trace/{layer}/{channel}/{name}", value, smoothing_hint=False
                    )
            lines.append(json.dumps(record) + "\n")
        with self._path.open("a") as file:
            file.write("".join(lines))


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The records of a trace; a last line that was not written to its end is left out."""
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def _drop_from(path: Path, iteration: int) -> None:
    """Keep the records of earlier iterations, in place."""
    kept = [record for record in read_trace(path) if record["iteration"] < iteration]
    with replacing(path) as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in kept))


def _evenly_spaced(size: int, number: int) -> list[int]:
    number = min(number, size)
    return [(2 * k + 1) * size // (2 * number) for k in range(number)]
