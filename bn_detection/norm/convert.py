"""Changing the normalization layers of a model that is built, and changing them back."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_norms import check_initialized, is_exact, tracks_statistics
from .layer import INFERENCE, PartitionedBatchNorm2d, partitioned
from .partition import (
    FORWARD,
    Groups,
    Partition,
    build_partition,
    check_choice,
    inference_partition_names,
)
from .scope import InferenceScope, announce_rows


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a module name matches one of the globs (``fnmatch``; ``*`` also matches dots)."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def lineage(name: str) -> list[str]:
    """The names of the modules that a module is in: from the model's, which is "", to its own."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) + 1)]


def set_inference(
    model: nn.Module,
    mode: str,
    modules: Sequence[str],
    *,
    partition: str | Partition = FORWARD,
    rows_are_images: bool | None = None,
    seed: int = 0,
) -> list[str]:
    """Choose the statistics that BN layers use at inference, in place.

    ``batch`` replaces a layer of torch by a :class:`PartitionedBatchNorm2d` with the same weights,
    statistics and hooks; one with a forward of its own (an activation, say) stays, and is given no
    running statistics while it runs in eval mode. So it works on any model. ``population`` is what
    they do already.

    Args:
        model: the model to change, the one that is called: a forward of it is a batch.
        mode: ``population`` or ``batch``.
        modules: globs (``fnmatch``) over the names of the layers to change.
        partition: which rows of a forward share the statistics of ``batch``: ``forward``, all of
            them; ``image``, those of an image; ``shuffle``, as many random ones of all images; or
            another of :func:`inference_partition_names`, or a :class:`Partition`.
        rows_are_images: whether each row of the layers' input is an image, where a partition asks.
            By default it is known of Detectron2's models; in others :func:`set_rows_per_image`
            says which images the rows are of.
        seed: of random groups.

    Returns:
        The names of the layers that the globs select.

    Raises:
        ValueError: for an unknown mode or partition, a partition of ``population``, or a lazy layer
            that has not been run. A forward raises it where a partition asks for the images of
            rows and nothing says them.
    """
    check_choice("inference", mode, INFERENCE)
    if isinstance(partition, str):
        check_choice("inference partition", partition, inference_partition_names())
        if partition != FORWARD:
            partition = build_partition(partition)
    if mode == "population" and partition != FORWARD:
        raise ValueError("inference is population, and a partition divides the rows of a batch.")
    # A layer that tracks no statistics uses those of the batch already.
    selected = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if matches(name, modules) and tracks_statistics(module)
    }
    scopes = {} if isinstance(partition, str) else _scopes(model, selected, partition, seed)
    if rows_are_images is not None:
        for layer_scope in scopes.values():
            layer_scope.rows_are_images = rows_are_images
    layers: dict[nn.Module, InferenceScope[Groups] | None] = {
        module: scopes.get(name) for name, module in selected.items()
    }
    previous = _inference_scopes(model)

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        if module not in layers:
            return None
        check_initialized(name, module)
        layer = module
        if not isinstance(layer, PartitionedBatchNorm2d):
            if not is_exact(layer):
                _without_statistics(layer, mode == "batch", layers[module])
                return None
            if mode == "population":
                return None
            of_training = "world" if isinstance(layer, nn.SyncBatchNorm) else "worker"
            layer = partitioned(cast(_BatchNorm, module), partition=of_training)
            layer.rename(name)
        layer.inference, layer.inference_scope = mode, layers[module]
        return layer

    replace_layers(model, replacement)
    for scope in previous - _inference_scopes(model):
        scope.detach()
    return list(selected)


@contextmanager
def kept_inference(model: nn.Module) -> Iterator[None]:
    """Afterwards a model has the layers that it had, with their statistics at inference.

    Args:
        model: what :func:`set_inference` may change meanwhile.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    ours = {m: m.inference for m in modules.values() if isinstance(m, PartitionedBatchNorm2d)}
    scopes = {layer: layer.inference_scope for layer in ours}
    without = {m: taker.inference_scope for m in modules.values() for taker in _takers(m)}
    for layer in ours:  # or the hooks of the scopes would be removed
        layer.inference_scope = None
    for taker in (taker for module in without for taker in _takers(module)):
        taker.inference_scope = None
    try:
        yield
    finally:
        set_inference(model, "population", ["*"])
        replace_layers(model, lambda name, m: None if modules[name] is m else modules[name])
        for layer, inference in ours.items():
            layer.inference, layer.inference_scope = inference, scopes[layer]
        for module, scope in without.items():
            _without_statistics(module, True, scope)


def _scopes(
    model: nn.Module, names: Iterable[str], partition: Partition, seed: int
) -> dict[str, InferenceScope[Groups]]:
    """By the name of a layer, what divides its rows: one for all RoIs, one for all images."""
    rois, images = (
        InferenceScope(partition.inference_groups, seed=seed, rows_are_images=flag)
        for flag in (False, True)
    )
    of_images = announce_rows(model, list(names), rois)
    scopes = {name: images if name in of_images else rois for name in names}
    for scope in set(scopes.values()):
        scope.attach(model)
    return scopes


def _inference_scopes(model: nn.Module) -> set[InferenceScope[Groups]]:
    owners = [owner for layer in model.modules() for owner in (layer, *_takers(layer))]
    found = (getattr(owner, "inference_scope", None) for owner in owners)
    return {scope for scope in found if isinstance(scope, InferenceScope)}


class _Without:
    """Takes the running statistics of a BN layer away while it runs in eval mode.

    torch's BatchNorm, and what is derived from it, then normalizes with the batch; with each group
    of the ``inference_scope``, if there is one.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.inference_scope: InferenceScope[Groups] | None = None
        self._taken: dict[str, Tensor | None] = {}
        self._handles = [
            layer.register_forward_pre_hook(self.take),
            layer.register_forward_hook(self.give_back, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, layer: nn.Module, args: Any) -> None:
        if not layer.training:
            self._taken = {key: layer._buffers[key] for key in ("running_mean", "running_var")}
            layer._buffers.update(dict.fromkeys(self._taken))

    def give_back(self, layer: nn.Module, args: Any, output: Any) -> Any:
        try:
            if self._taken and self.inference_scope is not None and isinstance(output, Tensor):
                return _by_group(layer, args[0], self.inference_scope.get(layer, args[0]))
            return output
        finally:
            layer._buffers.update(self._taken)
            self._taken = {}


def _by_group(layer: nn.Module, x: Tensor, groups: Groups) -> Tensor:
    """A layer's forward on each group of rows by itself."""
    ids = x.new_zeros(len(x)) if groups.ids is None else groups.ids
    rows = [torch.nonzero(ids == group).flatten() for group in range(groups.number)]
    outputs = [layer.forward(x[of_group]) for of_group in rows if len(of_group)]
    return torch.cat(outputs)[torch.argsort(torch.cat(rows))] if outputs else x


def _takers(layer: nn.Module) -> list[_Without]:
    owners = [getattr(hook, "__self__", None) for hook in layer._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, _Without)]


def _without_statistics(
    layer: nn.Module, without: bool, scope: InferenceScope[Groups] | None
) -> None:
    known = _takers(layer)
    if not without:
        for taker in known:
            taker.remove()
    elif known:
        known[0].inference_scope = scope
    else:
        _Without(layer).inference_scope = scope


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
