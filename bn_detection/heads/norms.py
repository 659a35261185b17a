"""The values of ``NORM``: in the registered heads, and wherever layers are converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.functional import instance_norm, layer_norm
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from ..norm import (
    Groups,
    LevelBatchNorm2d,
    LevelOptions,
    Partition,
    PartitionedBatchNorm2d,
    RenormSchedule,
    Scope,
    build_partition,
    check_choice,
    partition_names,
    plan_exchange,
    set_clock,
)

FROZEN = (FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)
"""The classes of BN layers whose statistics never move."""

SHUFFLE_MODES = ("statistics", "features")

_PARTITIONS = {
    "BN": "worker",
    "SyncBN": "world",
    "ShuffleBN": "shuffle",
    "GhostBN": "ghost",
    "ImageBN": "image",
}
_OTHERS = ("BatchRenorm", "IN", "GN", "LN", "FrozenBN")

# Iterations of the training that Ioffe 2017 gives the schedule for (Sec. 4.1).
_RENORM_REFERENCE_ITERS = 130_000


def norm_names() -> tuple[str, ...]:
    """What ``NORM`` can be: the kinds, and the partitions that users registered."""
    registered = set(partition_names()) - set(_PARTITIONS.values())
    return ("", *_PARTITIONS, *_OTHERS, *sorted(registered))


@dataclass(frozen=True)
class BNOptions:
    """What the BN kinds need to know beside their name; the ``BN`` keys of a config.

    Attributes:
        eps: added to the variance.
        momentum: weight of the newest mini-batch in the running statistics.
        shuffle_mode: ``statistics`` or ``features``: what ``ShuffleBN`` sends between workers.
        shuffle_seed: of ``ShuffleBN``'s permutations, the same on all workers; negative for a
            random one that they agree on.
        virtual_workers: total number over all processes; 0 for none.
        ghost_size: RoIs in a group of ``GhostBN``.
        partition_options: of partitions that users registered.
        renorm: the schedule of ``BatchRenorm``.
        renorm_partition: the partition that ``BatchRenorm`` normalizes.
        kernels: what groups are normalized by, one of :data:`bn_detection.norm.KERNELS`.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    shuffle_mode: str = "statistics"
    shuffle_seed: int = -1
    virtual_workers: int = 0
    ghost_size: int = 32
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    renorm: RenormSchedule = field(default_factory=RenormSchedule)
    renorm_partition: str = "worker"
    kernels: str = "auto"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> BNOptions:
        """From a config with :func:`bn_detection.add_bn_detection_config`'s keys.

        Raises:
            ValueError: a value of ``BN.RENORM`` that cannot be.
        """
        node = cfg.BN.RENORM
        renorm = RenormSchedule(
            node.R_MAX, node.D_MAX, node.WARMUP_ITERS, node.R_ITERS, node.D_ITERS
        )
        if node.SCALE_TO_MAX_ITER:
            renorm = renorm.scaled(cfg.SOLVER.MAX_ITER / _RENORM_REFERENCE_ITERS)
        return cls(
            eps=cfg.BN.EPS,
            momentum=cfg.BN.MOMENTUM,
            shuffle_mode=cfg.BN.SHUFFLE.MODE,
            shuffle_seed=cfg.SEED,
            virtual_workers=cfg.BN.VIRTUAL_WORKERS,
            ghost_size=cfg.BN.GHOST.SIZE,
            partition_options=dict(cfg.BN.PARTITION_OPTIONS),
            renorm=renorm,
            renorm_partition=node.PARTITION,
            kernels=cfg.BN.KERNELS,
        )

    def partition(self, name: str) -> Partition:
        """The partition registered under ``name``, with these options.

        Raises:
            ValueError: an unknown name, or options that it does not take.
        """
        return build_partition(
            name,
            virtual_workers=self.virtual_workers,
            ghost_size=self.ghost_size,
            **({} if name in _PARTITIONS.values() else self.partition_options),
        )


class NormFactory:
    """Makes the normalization layers of one head; they share their groups.

    Detectron2's ``get_norm`` takes one in place of a name. It is false for no normalization, as the
    name ``""`` is.

    Args:
        norm: one of :func:`norm_names`.
        options: of the BN kinds.
        rows_are_images: whether each row of the head's input is an image, not an RoI.

    Attributes:
        scope: what the layers share, to be attached to the head; None if they share nothing.
        shuffle: draws how the head exchanges RoIs, in ``features`` mode; else None.

    Raises:
        ValueError: for an unknown norm (the message lists the choices), or options that cannot be.
    """

    def __init__(
        self, norm: str, options: BNOptions | None = None, *, rows_are_images: bool = False
    ) -> None:
        self.norm = check_choice("NORM", norm, norm_names())
        self.options = options = options or BNOptions()
        self.scope: Scope[Groups] | None = None
        self.shuffle: Scope[Any] | None = None
        if not norm or (norm in _OTHERS and norm != "BatchRenorm"):
            self._partition = None
            return
        name = options.renorm_partition if norm == "BatchRenorm" else _PARTITIONS.get(norm, norm)
        if norm == "ShuffleBN" and options.shuffle_mode == "features":
            # The head moves each RoI to the worker of its group, which is BN per worker then.
            name = "worker"
            self.shuffle = Scope(plan_exchange, seed=options.shuffle_seed, needs_counts=True)
        self._partition = options.partition(name)
        needs_groups = name != "world" and (name != "worker" or options.virtual_workers > 1)
        if needs_groups:
            self.scope = Scope(
                self._partition.checked_groups,
                seed=options.shuffle_seed,
                rows_are_images=rows_are_images,
                needs_counts=self._partition.needs_counts,
            )

    def __bool__(self) -> bool:
        return bool(self.norm)

    def __call__(self, channels: int) -> nn.Module:
        """A layer for ``channels`` channels."""
        if self._partition is None:
            others = {
                "": nn.Identity,
                "IN": lambda: InstanceNorm2d(channels, affine=True),
                "LN": lambda: ChannelLayerNorm(channels),
            }
            return others.get(self.norm, lambda: get_norm(self.norm, channels))()
        return PartitionedBatchNorm2d(channels, **self._layer_arguments())

    def of_levels(self, channels: int, num_levels: int, options: LevelOptions) -> nn.Module:
        """A layer for lists of feature levels; without batch statistics, one for any level.

        Args:
            channels: C of every level.
            num_levels: length of the lists.
            options: what the levels share.

        Raises:
            ValueError: a combination that cannot be.
        """
        if self.shuffle is not None:
            raise ValueError(
                "BN.SHUFFLE.MODE features moves RoIs between workers, and levels have none; "
                "set BN.SHUFFLE.MODE statistics."
            )
        if self._partition is None:
            return self(channels)
        return LevelBatchNorm2d(channels, num_levels, options, **self._layer_arguments())

    def _layer_arguments(self) -> dict[str, Any]:
        return {
            "partition": self._partition,
            "renorm": self.options.renorm if self.norm == "BatchRenorm" else None,
            "scope": self.scope,
            "eps": self.options.eps,
            "momentum": self.options.momentum,
            "kernels": self.options.kernels,
        }


class InstanceNorm2d(nn.InstanceNorm2d):
    """torch's, over the positions of each RoI and channel; also of an input without RoIs."""

    def forward(self, input: Tensor) -> Tensor:
        """Args: input: ``(N, C, H, W)``. Returns the same shape."""
        if input.shape[0] > 0:
            return instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)
        return input * self.weight[:, None, None] + self.bias[:, None, None]


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position, as ``NORM: "LN"`` of Detectron2's main branch.

    Args:
        num_channels: C of the input, ``(N, C, H, W)``.
        eps: added to the variance.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Args: input: ``(N, C, H, W)``. Returns the same shape."""
        # Not -1, of which the older ONNX exporter writes a permutation that is none.
        x = input.movedim(1, 3)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).movedim(3, 1)


def _detectron2_iteration() -> int | None:
    try:
        return get_event_storage().iter
    except AssertionError:  # outside a training loop
        return None


set_clock(_detectron2_iteration)
