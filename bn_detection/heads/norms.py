"""The values of ``NORM`` in the registered heads."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.layers import get_norm
from torch import nn

from ..norm import PartitionedBatchNorm2d, check_choice

NORMS = ("", "BN", "SyncBN", "ShuffleBN", "GN", "FrozenBN")

# ShuffleBN is BN per worker: its head has moved each RoI to the worker of its group.
_PARTITIONS = {"BN": "worker", "SyncBN": "world", "ShuffleBN": "worker"}


def norm_factory(
    norm: str, *, eps: float = 1e-5, momentum: float = 0.1
) -> str | Callable[[int], nn.Module]:
    """What Detectron2's heads take as ``conv_norm``, for a value of ``NORM``.

    Args:
        norm: one of :data:`NORMS`.
        eps: ``BN.EPS``, of the BN kinds.
        momentum: ``BN.MOMENTUM``, of the BN kinds.

    Returns:
        ``""`` for no normalization; else a function from a number of channels to a layer.

    Raises:
        ValueError: for another norm; the message lists the choices.
    """
    check_choice("NORM", norm, NORMS)
    if norm not in _PARTITIONS:
        return norm and (lambda channels: get_norm(norm, channels))
    return lambda channels: PartitionedBatchNorm2d(
        channels, partition=_PARTITIONS[norm], eps=eps, momentum=momentum
    )
