"""The BN layers of a model, in words."""

from __future__ import annotations

from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from ..heads import FROZEN
from ..norm import tracks_statistics
from ..words import listed

SYNC_BATCH_NORMS = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
"""Layers of torch and Detectron2 that normalize the rows of all workers together."""

_SHOWN = 12


def describe_batch_norms(model: nn.Module) -> str:
    """The BN layers of a model, for a message about globs that match none of them.

    Args:
        model: any module.

    Returns:
        Sentences that name those that track statistics, and the frozen ones, a dozen of each.
    """
    tracking = [name for name, module in model.named_modules() if tracks_statistics(module)]
    frozen = [name for name, module in model.named_modules() if isinstance(module, FROZEN)]
    text = f"The model's BN layers are {listed(tracking, _SHOWN)}." if tracking else ""
    if not tracking:
        text = "The model has no BN layer that tracks statistics."
    if frozen:
        names = listed(frozen, _SHOWN)
        text += f" FrozenBN layers ({names}) keep theirs, unless BN.CONVERT makes them BN."
    return text
