"""Box and mask heads with every kind of normalization, RoI shuffling included."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..norm import ExchangePlan, RoIShuffle, exchange, restore
from .norms import norm_factory


class ShuffledHead:
    """Moves RoIs into their groups before a head's layers, and their features back after them."""

    shuffle: RoIShuffle | None

    def _plan(self, x: Tensor) -> ExchangePlan | None:
        if self.shuffle is None or not self.training:
            return None
        return self.shuffle.plan(x, get_event_storage().iter)


@ROI_BOX_HEAD_REGISTRY.register()
class BNConvFCHead(ShuffledHead, FastRCNNConvFCHead):
    """Detectron2's ``FastRCNNConvFCHead`` (N conv + M fc) with any of this project's ``NORM``.

    Same layers, names and state_dict. With ``ShuffleBN``, RoIs are shuffled across workers during
    training (*Rethinking "Batch" in BatchNorm*, Sec. 5.3): every worker must call the head, with
    any number of RoIs, inside a Detectron2 training loop (its event storage gives the iteration).
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: list[int],
        fc_dims: list[int],
        conv_norm: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        shuffle_seed: int = -1,
    ) -> None:
        """
        Args:
            input_shape: shape of the RoI features.
            conv_dims: output channels of each conv layer.
            fc_dims: output channels of each fc layer.
            conv_norm: one of :data:`bn_detection.heads.NORMS`.
            bn_eps: added to the variance, by the BN kinds.
            bn_momentum: weight of the newest mini-batch in the running statistics.
            shuffle_seed: of ``ShuffleBN``'s permutations, the same on all workers; negative for a
                random one that they agree on.

        Raises:
            ValueError: for an unknown ``conv_norm``.
        """
        super().__init__(
            input_shape,
            conv_dims=conv_dims,
            fc_dims=fc_dims,
            conv_norm=norm_factory(conv_norm, eps=bn_eps, momentum=bn_momentum),
        )
        self.shuffle = RoIShuffle(shuffle_seed) if conv_norm == "ShuffleBN" else None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), **_bn_arguments(cfg)}

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(R, C, H, W)``. Returns ``(R, *output_shape)``."""
        plan = self._plan(x)
        if plan is None:
            return super().forward(x)
        return restore(super().forward(exchange(x, plan)), plan)


@ROI_MASK_HEAD_REGISTRY.register()
class BNConvUpsampleHead(ShuffledHead, MaskRCNNConvUpsampleHead):
    """Detectron2's ``MaskRCNNConvUpsampleHead`` with any of this project's ``NORM``.

    As :class:`BNConvFCHead` is to ``FastRCNNConvFCHead``.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: list[int],
        conv_norm: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        shuffle_seed: int = -1,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the RoI features.
            num_classes: foreground classes; 1 for class-agnostic masks.
            conv_dims: output channels of each conv layer, and last of the upsampling layer.
            conv_norm: one of :data:`bn_detection.heads.NORMS`.
            bn_eps: added to the variance, by the BN kinds.
            bn_momentum: weight of the newest mini-batch in the running statistics.
            shuffle_seed: as in :class:`BNConvFCHead`.
            kwargs: of ``BaseMaskRCNNHead``.

        Raises:
            ValueError: for an unknown ``conv_norm``.
        """
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=norm_factory(conv_norm, eps=bn_eps, momentum=bn_momentum),
            **kwargs,
        )
        self.shuffle = RoIShuffle(shuffle_seed) if conv_norm == "ShuffleBN" else None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), **_bn_arguments(cfg)}

    def layers(self, x: Tensor) -> Tensor:
        """Args: x: ``(R, C, H, W)``. Returns mask logits ``(R, num_classes, 2H, 2W)``."""
        plan = self._plan(x)
        if plan is None:
            return super().layers(x)
        return restore(super().layers(exchange(x, plan)), plan)


def _bn_arguments(cfg: CfgNode) -> dict[str, Any]:
    return {"bn_eps": cfg.BN.EPS, "bn_momentum": cfg.BN.MOMENTUM, "shuffle_seed": cfg.SEED}
