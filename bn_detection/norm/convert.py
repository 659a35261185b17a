"""Changing the normalization layers of a model that is built, and changing them back."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from .layer import INFERENCE, PartitionedBatchNorm2d
from .partition import check_choice


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a module name matches one of the globs (``fnmatch``; ``*`` also matches dots)."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


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
    # A layer that tracks no statistics uses those of the batch already.
    selected = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if matches(name, modules)
        and isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
        and module.track_running_stats
    }
    layers = set(selected.values())

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        if module not in layers:
            return None
        if isinstance(module, PartitionedBatchNorm2d):
            module.inference = mode
        elif mode == "batch":
            partition = "world" if isinstance(module, nn.SyncBatchNorm) else "worker"
            layer = PartitionedBatchNorm2d(module.num_features, partition=partition, inference=mode)
            layer.rename(name)
            return take_tensors(layer, module)
        return None

    replace_layers(model, replacement)
    return list(selected)


def replace_layers(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Replace modules, under every name that they have.

    Args:
        model: the model to change.
        replacement: takes a name and a module; returns another module, or None to keep it. It is
            asked once for a module that has several names.

    Returns:
        The model, or its own replacement.
    """
    new: dict[nn.Module, nn.Module | None] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in new:
            new[module] = replacement(name, module)
        if new[module] is not None:
            if not name:
                return new[module]
            model.set_submodule(name, new[module])
    return model


def take_tensors(layer: nn.Module, source: nn.Module) -> nn.Module:
    """Give ``layer`` the very tensors of a BatchNorm, its eps, momentum and mode."""
    # The tensors themselves move, so optimizers and hooks that hold them stay valid.
    layer._parameters.update(source._parameters)
    layer._buffers.update(source._buffers)
    layer.affine = source.affine
    layer.eps, layer.momentum = source.eps, source.momentum
    return layer.train(source.training)
