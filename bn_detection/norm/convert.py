"""Changing the normalization layers of a model that is built, and changing them back."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .batch_norms import check_initialized, is_exact, tracks_statistics
from .layer import INFERENCE, PartitionedBatchNorm2d, partitioned
from .partition import check_choice


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a module name matches one of the globs (``fnmatch``; ``*`` also matches dots)."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def lineage(name: str) -> list[str]:
    """The names of the modules that a module is in: from the model's, which is "", to its own."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) + 1)]


def set_inference(model: nn.Module, mode: str, modules: Sequence[str]) -> list[str]:
    """Choose the statistics that BN layers use at inference, in place.

    ``batch`` replaces a layer of torch by a :class:`PartitionedBatchNorm2d` with the same weights,
    statistics and hooks; one with a forward of its own (an activation, say) stays, and is given no
    running statistics while it runs in eval mode. So it works on any model. ``population`` is what
    they do already.

    Args:
        model: the model to change.
        mode: ``population`` or ``batch``.
        modules: globs (``fnmatch``) over the names of the layers to change.

    Returns:
        The names of the layers that the globs select.

    Raises:
        ValueError: for an unknown mode, or a lazy layer that has not been run.
    """
    check_choice("inference", mode, INFERENCE)
    # A layer that tracks no statistics uses those of the batch already.
    selected = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if matches(name, modules) and tracks_statistics(module)
    }
    layers = set(selected.values())

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        if module not in layers:
            return None
        check_initialized(name, module)
        if isinstance(module, PartitionedBatchNorm2d):
            module.inference = mode
        elif not is_exact(module):
            _without_statistics(module, mode == "batch")
        elif mode == "batch":
            partition = "world" if isinstance(module, nn.SyncBatchNorm) else "worker"
            layer = partitioned(module, partition=partition, inference=mode)
            layer.rename(name)
            return layer
        return None

    replace_layers(model, replacement)
    return list(selected)


class _Without:
    """Takes the running statistics of a BN layer away while it runs in eval mode.

    torch's BatchNorm, and what is derived from it, then normalizes with the batch.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._taken: dict[str, Tensor | None] = {}

    def take(self, layer: nn.Module, args: Any) -> None:
        if self.enabled and not layer.training:
            self._taken = {key: layer._buffers[key] for key in ("running_mean", "running_var")}
            layer._buffers.update(dict.fromkeys(self._taken))

    def give_back(self, layer: nn.Module, args: Any, output: Any) -> None:
        layer._buffers.update(self._taken)
        self._taken = {}


def _without_statistics(layer: nn.Module, without: bool) -> None:
    owners = [getattr(hook, "__self__", None) for hook in layer._forward_pre_hooks.values()]
    known = [owner for owner in owners if isinstance(owner, _Without)]
    for owner in known:
        owner.enabled = without
    if without and not known:
        owner = _Without()
        layer.register_forward_pre_hook(owner.take)
        layer.register_forward_hook(owner.give_back, always_call=True)


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
        other = new[module]
        if other is not None:
            if not name:
                return other
            model.set_submodule(name, other)
    return model
