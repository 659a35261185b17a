"""The one normalization layer: BatchNorm whose normalization batch is a part of a partition."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional import world_batch_norm

PARTITIONS = ("worker", "world")
INFERENCE = ("population", "batch")


class PartitionedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the groups of a partition, with a choice of inference statistics.

    A ``BatchNorm2d`` in every other respect: same parameters, buffers and state_dict, so its
    weights load in a plain ``nn.BatchNorm2d`` and back. It differs from it in accepting batches
    that are empty (they change no statistic) or hold one value a channel (which normalizes to the
    bias, and changes no statistic, for its unbiased variance does not exist).

    Args:
        num_features: channels C of the input.
        partition: which samples share statistics in training. ``worker``: those of this process
            (plain BN). ``world``: those of all processes, weighted by their count (SyncBN), also on
            CPU and with unequal or empty workers; without a process group it is ``worker``.
        inference: what ``eval()`` normalizes with: ``population``, the running statistics; or
            ``batch``, those of the current forward on this process (the "mini-batch statistics"
            of *Rethinking "Batch" in BatchNorm*, Sec. 3). Inference calls no collective.
        eps: added to the variance.
        momentum: weight of the newest mini-batch in the running statistics; None for their
            cumulative average, as in ``nn.BatchNorm2d``.

    Shape: input and output ``(N, C, H, W)``, any floating dtype, N >= 0.

    Raises:
        ValueError: for an unknown partition or inference mode, or an input that is not 4D.
    """

    def __init__(
        self,
        num_features: int,
        *,
        partition: str = "worker",
        inference: str = "population",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.partition = check_choice("partition", partition, PARTITIONS)
        self.inference = check_choice("inference", inference, INFERENCE)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            use_batch = self.inference == "batch"
            mean, var = (None, None) if use_batch else (self.running_mean, self.running_var)
            return self._batch_norm(input, mean, var, use_batch, 0.0)
        if self.partition == "world" and _world_size() > 1:
            output, stats = world_batch_norm(input, self.weight, self.bias, self.eps)
            self._update_running_statistics(*stats)
            return output
        if _values_per_channel(input) < 2:
            return self._batch_norm(input, None, None, True, 0.0)
        return self._batch_norm(
            input, self.running_mean, self.running_var, True, self._next_average_factor()
        )

    def _batch_norm(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, factor: float
    ) -> Tensor:
        # Not F.batch_norm, which refuses one value per channel.
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            mean,
            var,
            training,
            factor,
            self.eps,
            torch.backends.cudnn.enabled,
        )

    def _next_average_factor(self) -> float:
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)

    @torch.no_grad()
    def _update_running_statistics(self, count: int, mean: Tensor, var: Tensor) -> None:
        if count < 2:
            return
        factor = self._next_average_factor()
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, partition={self.partition}, inference={self.inference}"


def set_inference(model: nn.Module, mode: str, modules: Sequence[str]) -> list[str]:
    """Choose the statistics that BN layers use at inference, in place.

    ``batch`` replaces a plain ``nn.BatchNorm2d`` (or ``SyncBatchNorm``) by a
    :class:`PartitionedBatchNorm2d` with the same weights and statistics, so it works on any model;
    ``population`` is what a plain one does already.

    Args:
        model: the model to change.
        mode: ``population`` or ``batch``.
        modules: globs (``fnmatch``) over the names of the layers to change.

    Returns:
        The names of the layers that the globs select.

    Raises:
        ValueError: for an unknown mode.
    """
    check_choice("inference", mode, INFERENCE)
    changed = []
    for name, module in list(model.named_modules()):
        if not any(fnmatch.fnmatchcase(name, glob) for glob in modules):
            continue
        # A layer that tracks no statistics uses those of the batch already.
        tracks = (
            isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.track_running_stats
        )
        if tracks:
            if not isinstance(module, PartitionedBatchNorm2d) and mode == "batch":
                module = _from_batch_norm(module)
                model.set_submodule(name, module)
            if isinstance(module, PartitionedBatchNorm2d):
                module.inference = mode
            changed.append(name)
    return changed


def _from_batch_norm(source: nn.BatchNorm2d | nn.SyncBatchNorm) -> PartitionedBatchNorm2d:
    layer = PartitionedBatchNorm2d(
        source.num_features,
        partition="world" if isinstance(source, nn.SyncBatchNorm) else "worker",
        eps=source.eps,
        momentum=source.momentum,
    )
    # The tensors themselves move, so optimizers and hooks that hold them stay valid.
    layer._parameters.update(source._parameters)
    layer._buffers.update(source._buffers)
    return layer.train(source.training)


def check_choice(what: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``; else raise a ValueError that lists them."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{what} is "{value}"; it can be one of {listed}.')
    return value


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _values_per_channel(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]
