"""Running statistics averaged over the workers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..norm import tracks_statistics


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give all workers the mean of their running statistics, in place and in one collective.

    The weight of a worker's EMA is the number of mini-batches in it: a worker that had no rows in
    some steps (with ``ShuffleBN`` by features: whose group was empty) counts for less. Every worker
    of the default process group must call it. With one process nothing changes.

    Args:
        model: its BatchNorm layers (any subclass of torch's) that track statistics take part.
    """
    if comm.get_world_size() == 1:
        return
    layers = [module for module in model.modules() if tracks_statistics(module)]
    if not layers:
        return
    parts = []
    for layer in layers:
        seen = layer.num_batches_tracked.double().reshape(1)
        statistics = torch.cat([layer.running_mean.double(), layer.running_var.double()])
        parts += [(seen > 0).double(), seen, statistics * seen]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    sizes = [size for layer in layers for size in (1, 1, layer.num_features, layer.num_features)]
    pieces = iter(flat.split(sizes))
    for layer in layers:
        workers, seen, mean, var = (next(pieces) for _ in range(4))
        if seen > 0:
            layer.num_batches_tracked.copy_((seen / workers).round().long().squeeze())
            layer.running_mean.copy_(mean / seen)
            layer.running_var.copy_(var / seen)


class AverageStatistics(HookBase):
    """Averages the running statistics over the workers before each evaluation and checkpoint.

    Stock Detectron2 saves those of worker 0 and evaluates each worker's images with its own.
    Register it before the hooks that save and evaluate, on every worker.

    Args:
        model: the model, on this worker.
        periods: the periods, in iterations, of evaluation and checkpoints; 0 for none. The last
            iteration is always one.
    """

    def __init__(self, model: nn.Module, periods: tuple[int, ...]) -> None:
        self._model = model
        self._periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            average_running_statistics(self._model)
