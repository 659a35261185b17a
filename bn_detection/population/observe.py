"""Which BN layers take part in an estimate, and what is seen of them in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import Tensor, nn

from ..norm import (
    Collectives,
    Groups,
    GroupStatistics,
    PartitionedBatchNorm2d,
    Scope,
    TrackingBatchNorm,
    as_maps,
    group_statistics,
    grouped_batch_norm,
    is_exact,
    matches,
    normalizes_in_training,
    tracks_statistics,
    world_size,
)
from .layers import SYNC_BATCH_NORMS

# Of ROI heads whose mask and keypoint heads come last, and can be switched off.
_FORWARDS_OF_ROI_HEADS = (StandardROIHeads.forward, CascadeROIHeads.forward)

Observe = Callable[[GroupStatistics, bool], Any]
"""Takes the mini-batch statistics of a forward, and whether they are of several workers."""


def batch_norms_in_training(
    model: nn.Module, modules: Sequence[str]
) -> dict[str, TrackingBatchNorm]:
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
def observing(
    layers: Mapping[str, TrackingBatchNorm],
    observe_layer: Callable[[str, GroupStatistics, bool], Any],
) -> Iterator[None]:
    """Let layers in training mode report the statistics of their groups; their own do not move.

    Args:
        layers: by name.
        observe_layer: takes the name of a layer, and what an :data:`Observe` does.
    """
    ours = [layer for layer in layers.values() if isinstance(layer, PartitionedBatchNorm2d)]
    previous = {layer: layer.observer for layer in ours}
    replaced: list[nn.Module] = []
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name, layer in layers.items():
            observe = partial(observe_layer, name)
            if isinstance(layer, PartitionedBatchNorm2d):
                layer.observer = observe
                continue
            all_reduce = all_reduce_of_stock(layer, name)
            if is_exact(layer):
                replaced.append(layer)
                forward = partial(_observed_forward, layer, observe, all_reduce)
                vars(layer)["forward"] = forward
            else:
                hook = partial(observe_input, observe=observe, all_reduce=all_reduce)
                handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for own, observer in previous.items():
            own.observer = observer
        for stock in replaced:
            del vars(stock)["forward"]
        for handle in handles:
            handle.remove()


def _observed_forward(
    layer: Any,
    observe: Observe,
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


def observe_input(
    layer: nn.Module,
    args: tuple[Any, ...],
    *,
    observe: Observe,
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> None:
    """Before a forward of a layer's own, which may do more than normalize."""
    statistics = group_statistics(as_maps(args[0]), Groups(None, 1), all_reduce)
    observe(statistics, all_reduce is not None)


def calls_collectives(model: nn.Module) -> bool:
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


@contextmanager
def without_heads(
    model: nn.Module, layers: Mapping[str, nn.Module], whole_forwards: bool
) -> Iterator[None]:
    """Leave out heads after the box head whose layers do not take part."""
    wanted = set(layers.values())
    left_out = [
        (heads, switch)
        for heads in ([] if whole_forwards else model.modules())
        if getattr(type(heads), "forward", None) in _FORWARDS_OF_ROI_HEADS
        for switch, head in (("mask_on", "mask_head"), ("keypoint_on", "keypoint_head"))
        if getattr(heads, switch) and wanted.isdisjoint(getattr(heads, head).modules())
    ]
    for heads, switch in left_out:
        setattr(heads, switch, False)
    try:
        yield
    finally:
        for heads, switch in left_out:
            setattr(heads, switch, True)
