"""What a BN layer is: one answer for conversion, inference, populations, freezing and diagnosis.

A BN layer is an instance of torch's ``_BatchNorm``: ``BatchNorm1d``, ``2d``, ``3d``,
``SyncBatchNorm``, their lazy forms, and whatever users derive from them. One whose forward is
torch's computes BN and nothing else, and can be replaced by a layer of this package; one with a
forward of its own (an activation, say) is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

_HOOKS = tuple(key for key in vars(nn.Identity()) if "_hook" in key)

M = TypeVar("M", bound=nn.Module)

#: The dimensions of the input of each class; any, where it is not here.
_DIMENSIONS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
ANY_DIMENSIONS = (2, 3, 4, 5)

_EXACT_FORWARDS: set[Callable[..., Any]] = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


def register_exact(forward: Callable[..., Any]) -> None:
    """Say of a class's ``forward`` that it computes BN and nothing else, as torch's does."""
    _EXACT_FORWARDS.add(forward)


class TrackingBatchNorm(_BatchNorm):
    """For annotations: a BN layer with running statistics, whatever its class."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


def tracks_statistics(layer: nn.Module) -> TypeGuard[TrackingBatchNorm]:
    """Whether a layer is a BN layer with running statistics."""
    return isinstance(layer, _BatchNorm) and layer.track_running_stats


def is_exact(layer: nn.Module) -> bool:
    """Whether a BN layer computes BN and nothing else."""
    return type(layer).forward in _EXACT_FORWARDS and "forward" not in vars(layer)


def check_initialized(name: str, layer: nn.Module) -> None:
    """Refuse a lazy layer that has no tensors yet.

    Raises:
        ValueError: names the layer.
    """
    if isinstance(layer, _LazyNormBase) and layer.has_uninitialized_params():
        raise ValueError(
            f"{name}: a {type(layer).__name__} has no channels before its first forward. Run the "
            "model once first."
        )


def input_dimensions(layer: nn.Module) -> tuple[int, ...]:
    """The numbers of dimensions that the input of a BN layer can have."""
    own: tuple[int, ...] | None = getattr(layer, "dimensions", None)
    if own is not None:
        return own
    for cls, dimensions in _DIMENSIONS.items():
        if isinstance(layer, cls):
            return dimensions
    return ANY_DIMENSIONS


def as_maps(x: Tensor) -> Tensor:
    """``(N, C, *)``, of any dimensions, as ``(N, C, H, W)``."""
    if x.dim() == 4:
        return x
    return x.flatten(2).unsqueeze(3) if x.dim() > 2 else x[:, :, None, None]


def take_tensors(layer: M, source: nn.Module) -> M:
    """Give ``layer`` the very tensors of a BatchNorm, its eps, momentum and mode."""
    # The tensors themselves move, so optimizers and hooks that hold them stay valid.
    layer._parameters.update(source._parameters)
    layer._buffers.update(source._buffers)
    layer.affine = source.affine
    layer.eps, layer.momentum = source.eps, source.momentum
    return layer.train(source.training)


def take_hooks(layer: M, source: nn.Module) -> M:
    """Give ``layer`` the hooks of the module that it replaces; their handles remove them still."""
    for key in _HOOKS:
        setattr(layer, key, getattr(source, key))
    return layer
