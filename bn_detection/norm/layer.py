"""The one normalization layer: BatchNorm whose normalization batch is a part of a partition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_norms import (
    ANY_DIMENSIONS,
    as_maps,
    input_dimensions,
    register_exact,
    take_hooks,
    take_tensors,
)
from .collectives import Collectives, world_size
from .functional import AllReduce, GroupStatistics, group_statistics, grouped_batch_norm
from .kernels import KERNELS
from .partition import Groups, Partition, build_partition, check_choice
from .renorm import RenormSchedule
from .scope import Forwards, InferenceScope, Scope, in_backward

INFERENCE = ("population", "batch")

_ONE_GROUP = Groups(None, 1)


class PartitionedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the groups of a partition, with a choice of inference statistics.

    A ``BatchNorm2d`` in every other respect: same parameters, buffers and state_dict, so its
    weights load in a plain ``nn.BatchNorm2d`` and back. It differs from it in accepting batches
    and groups that are empty (they change no statistic) or hold one value a channel (which
    normalizes to the bias, and changes no statistic, for its unbiased variance does not exist).

    The running statistics move by ``momentum`` towards the mean, over the groups that have at least
    two values a channel, of the groups' means and unbiased variances. A forward that activation
    checkpointing repeats in the backward does not move them again. Nor does a channel whose
    statistics are not finite: loss scaling skips a step that overflowed in float16, and nothing
    could take it back here. (One exception, which is ``nn.BatchNorm2d`` to the bit: ``worker``
    on other dtypes than float16.)

    Args:
        num_features: channels C of the input.
        partition: which rows share statistics in training: the name of a registered partition
            (``worker``, ``world``, ``shuffle``, ``ghost``, ``image``), or a :class:`Partition`.
        inference: what ``eval()`` normalizes with: ``population``, the running statistics; or
            ``batch``, those of the current forward on this process (the "mini-batch statistics"
            of *Rethinking "Batch" in BatchNorm*, Table 3). Inference calls no collective.
        renorm: the schedule of Batch Renormalization (Ioffe 2017), whose steps are this layer's
            training forwards; None for BN.
        scope: shared by the layers of a head, which then have the same groups; by default the layer
            has its own.
        kernels: what groups are normalized by in training: ``torch``; ``triton``; or ``auto``,
            Triton's on CUDA where they work.
        dimensions: the numbers of dimensions that the input can have; 4 by default. Where all of
            them can be (``ANY_DIMENSIONS``), the first input decides. Groups are of rows, whatever
            the rest of the input is.
        affine: whether the layer has affine parameters.
        eps: added to the variance.
        momentum: weight of the newest mini-batch in the running statistics; None for their
            cumulative average, as in ``nn.BatchNorm2d``.

    Attributes:
        inference_scope: what divides the rows of a forward of inference ``batch`` into groups; None
            where they are one (:func:`bn_detection.set_inference`).
        observer: if set, gets the mini-batch statistics of each training forward, and whether their
            groups span workers; the running statistics then move only if it returns True.

    Shape: input and output ``(N, C, H, W)``, any floating dtype, N >= 0; ``(N, C)``, ``(N, C, L)``
        or ``(N, C, D, H, W)`` where ``dimensions`` say so.

    Raises:
        ValueError: for an unknown partition or inference mode, an input of other dimensions, or (by
            the partition) rows of unknown images.
        ImportError: kernels are ``triton``, and it is not installed.
        RuntimeError: workers are not in step, or the layer is called outside the module that it
            shares groups with.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        partition: str | Partition = "worker",
        inference: str = "population",
        renorm: RenormSchedule | None = None,
        scope: Scope[Groups] | None = None,
        kernels: str = "auto",
        dimensions: tuple[int, ...] = (4,),
        affine: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.partition = build_partition(partition) if isinstance(partition, str) else partition
        self.inference = check_choice("inference", inference, INFERENCE)
        self.inference_scope: InferenceScope[Groups] | None = None
        self.renorm = renorm
        self.kernels = check_choice("kernels", kernels, KERNELS)
        self.dimensions = dimensions
        self.scope = scope or Scope(self.partition.checked_groups)
        self.rename("")
        self.observer: Callable[[GroupStatistics, bool], bool | None] | None = None
        self._corrections: Forwards[tuple[Tensor, Tensor]] = Forwards()

    def rename(self, name: str) -> None:
        """Set the name of the layer in error messages: the one that the model has for it."""
        self.name = name
        self._collectives = Collectives(name or f"PartitionedBatchNorm2d({self.num_features})")

    def forward(
        self, input: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            input: ``(N, C, H, W)``, or of the other ``dimensions``.
            weight: ``(C,)``, the affine scale in place of the layer's own.
            bias: ``(C,)``, the affine shift likewise.

        Returns:
            The same shape and dtype.
        """
        self._check_input_dim(input)
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        if not self.training:
            use_batch = self.inference == "batch"
            if use_batch and self.inference_scope is not None:
                divided: Tensor = self._divided(input, weight, bias, self.inference_scope)
                return divided
            mean, var = (None, None) if use_batch else (self.running_mean, self.running_var)
            return self._batch_norm(input, weight, bias, mean, var, use_batch, 0.0)
        spans = self.spans_workers
        fused = self.partition.is_whole_batch and self.renorm is None and not spans
        if fused and self.observer is None:
            return self._fused(input, weight, bias)
        y: Tensor = self._grouped(input, weight, bias, fused)
        return y

    @torch.compiler.disable
    def _divided(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scope: InferenceScope[Groups],
    ) -> Tensor:
        shape, x = x.shape, as_maps(x)
        groups = scope.get(self, x)
        statistics = group_statistics(x, groups, kernels=self.kernels)
        y = grouped_batch_norm(x, weight, bias, statistics, groups, self.eps, kernels=self.kernels)
        return y.reshape(shape)

    def _fused(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        batch_norm = partial(self._batch_norm, x, weight, bias)
        if x.numel() < 2 * self.num_features:
            return batch_norm(None, None, True, 0.0)
        if in_backward():
            # Checkpointing wants as many saved tensors as the first time; these are not moved.
            return batch_norm(self.running_mean.clone(), self.running_var.clone(), True, 0.0)
        self.num_batches_tracked.add_(1)
        if self.momentum is not None and x.dtype != torch.float16:
            return batch_norm(self.running_mean, self.running_var, True, self.momentum)
        mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        y = batch_norm(mean, var, True, 1.0)
        self._move(mean, var, _finite(mean, var))
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.dimensions:
            wanted = " or ".join(f"{number}D" for number in self.dimensions)
            raise ValueError(
                f"{self.name or type(self).__name__}: expected {wanted} input (got {input.dim()}D)"
            )
        if self.dimensions == ANY_DIMENSIONS:
            self.dimensions = (input.dim(),)

    @torch.compiler.disable
    def _grouped(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, fused: bool
    ) -> Tensor:
        shape, x = x.shape, as_maps(x)
        groups, all_reduce = self.sharing(x)
        statistics = group_statistics(x, groups, all_reduce, kernels=self.kernels)
        correction = None
        if self.renorm is not None:
            correction = self._correction(x, statistics, self.renorm)
        moves = self.observe(statistics)
        if fused and moves:  # the same bits as without an observer
            return self._fused(x, weight, bias).reshape(shape)
        if moves:
            self.move_running_statistics(statistics)
        y = grouped_batch_norm(
            x,
            weight,
            bias,
            statistics,
            groups,
            self.eps,
            all_reduce=all_reduce,
            correction=correction,
            kernels=self.kernels,
        )
        return y if x.shape == shape else y.reshape(shape)

    @property
    def spans_workers(self) -> bool:
        """Whether the groups of training have rows of several workers."""
        return self.partition.spans_workers and world_size() > 1

    def sharing(self, x: Tensor) -> tuple[Groups, AllReduce | None]:
        """The groups of the rows of ``x`` in training; the sum over workers, if they span them."""
        groups = _ONE_GROUP if self.partition.is_whole_batch else self.scope.get(self, x)
        return groups, self._collectives.all_reduce if self.spans_workers else None

    def observe(self, statistics: GroupStatistics) -> bool:
        """Show mini-batch statistics to the observer; whether the running ones are to move."""
        return self.observer is None or bool(self.observer(statistics, self.spans_workers))

    @torch.no_grad()
    def _correction(
        self, x: Tensor, statistics: GroupStatistics, renorm: RenormSchedule
    ) -> tuple[Tensor, Tensor]:
        """r and d, ``(G, C)``: what takes a group's statistics to the running ones, clipped."""
        if in_backward():
            correction = self._corrections.find(x)
            if correction is None:
                raise RuntimeError(
                    f"{self.name or type(self).__name__} is computed again in the backward "
                    "(activation checkpointing), but its r and d of the forward are not known any "
                    "more. Run the backward of a step before the next steps begin."
                )
            return correction
        r_max, d_max = renorm.limits(self.num_batches_tracked)
        running_std = (self.running_var.double() + self.eps).sqrt()
        r = (statistics.var + self.eps).sqrt() / running_std
        d = (statistics.mean - self.running_mean.double()) / running_std
        correction = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        self._corrections.keep(x, correction)
        return correction

    @torch.no_grad()
    def move_running_statistics(self, statistics: GroupStatistics) -> None:
        """Move the running statistics towards those of a mini-batch, once for each forward."""
        if in_backward():
            return
        # In tensors throughout: reading a number would wait for a GPU.
        count, mean, var = statistics.count, statistics.mean, statistics.var
        counted = count > 1
        usable = counted & _finite(mean, var)
        number, unusable = usable.sum(0), ~usable
        var = var * (count / (count - 1))
        mean, var = (t.masked_fill(unusable, 0).sum(0) / number for t in (mean, var))
        self.num_batches_tracked.add_(counted.any())
        self._move(mean, var, number > 0)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, where: Tensor) -> None:
        """Move the running statistics of the channels that ``where``, ``(C,)``, is true of."""
        factor: float | Tensor | None = self.momentum
        if factor is None:
            factor = (1 / self.num_batches_tracked.clamp(min=1)).to(self.running_mean.dtype)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(torch.where(where, new.to(running.dtype), running), factor)

    def _batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        factor: float,
    ) -> Tensor:
        # Not F.batch_norm, which refuses one value per channel.
        cudnn = torch.backends.cudnn.enabled
        y: Tensor = torch.batch_norm(x, weight, bias, mean, var, training, factor, self.eps, cudnn)
        return y

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), type(self.partition).__name__, f"inference={self.inference}"]
        return ", ".join(parts + ([f"{self.renorm}"] if self.renorm else []))


register_exact(PartitionedBatchNorm2d.forward)


def partitioned(source: _BatchNorm, **options: Any) -> PartitionedBatchNorm2d:
    """A :class:`PartitionedBatchNorm2d` with the tensors, eps, momentum and hooks of a BN layer.

    Args:
        source: computes BN and nothing else (:func:`is_exact`).
        options: of the new layer.
    """
    options = {"dimensions": input_dimensions(source), **options}
    layer = PartitionedBatchNorm2d(source.num_features, **options)
    return take_hooks(take_tensors(layer, source), source)


def _finite(mean: Tensor, var: Tensor) -> Tensor:
    return (mean + var).abs() < torch.inf
