"""The BN layers of a model, in words."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

_SHOWN = 12


def describe_batch_norms(model: nn.Module) -> str:
    """The BN layers of a model, for a message about globs that match none of them.

    Args:
        model: any module.

    Returns:
        Sentences that name those that track statistics, and the frozen ones, a dozen of each.
    """
    tracking = _names(model, lambda m: isinstance(m, _BatchNorm) and m.track_running_stats)
    frozen = _names(
        model, lambda m: isinstance(m, FrozenBatchNorm2d | TorchvisionFrozenBatchNorm2d)
    )
    text = f"The model's BN layers are {_list(tracking)}." if tracking else ""
    if not tracking:
        text = "The model has no BN layer that tracks statistics."
    if frozen:
        text += f" FrozenBN layers ({_list(frozen)}) keep theirs, unless BN.CONVERT makes them BN."
    return text


def _names(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    return [name for name, module in model.named_modules() if wanted(module)]


def _list(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
