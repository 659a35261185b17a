"""Box, mask and keypoint heads with every kind of normalization, RoI shuffling included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from torch import Tensor, nn

from ..norm import ExchangePlan, Scope, exchange, normalizes_in_training, restore
from .norms import BNOptions, NormFactory


class Head(NamedTuple):
    """The classes that a head can be of, to have a ``NORM``.

    Attributes:
        prefix: of the names of its layers.
        ours: the class of this project.
        stock: Detectron2's.
        stock_has_norm: whether that has a ``NORM`` too.
    """

    prefix: str
    ours: str
    stock: str
    stock_has_norm: bool = True


HEADS = {
    "ROI_BOX_HEAD": Head("roi_heads.box_head.", "BNConvFCHead", "FastRCNNConvFCHead"),
    "ROI_MASK_HEAD": Head("roi_heads.mask_head.", "BNConvUpsampleHead", "MaskRCNNConvUpsampleHead"),
    "ROI_KEYPOINT_HEAD": Head(
        "roi_heads.keypoint_head.", "BNConvDeconvKeypointHead", "KRCNNConvDeconvUpsampleHead", False
    ),
}
"""By the node of ``MODEL`` that builds it."""


class PartitionedHead(nn.Module):
    """A head on RoIs whose layers share groups, or that exchanges its RoIs with other workers.

    A head of one's own calls :meth:`share` at the end of ``__init__``, and runs its layers through
    :meth:`on_groups`.

    Attributes:
        bn_scope: what its normalization layers share in a call; None if nothing.
        shuffle: draws the exchange of a call, in ``features`` mode; else None.
    """

    bn_scope: Scope[Any] | None
    shuffle: Scope[ExchangePlan | None] | None

    def share(self, factory: NormFactory) -> None:
        """Give the layers that ``factory`` made the groups of each forward of this head."""
        self.bn_scope, self.shuffle = factory.scope, factory.shuffle
        for scope in (factory.scope, factory.shuffle):
            if scope is not None:
                scope.attach(self)

    def on_groups(self, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``layers(x)``, on the workers of the RoIs' groups where RoIs are what is shuffled.

        Args:
            layers: those with the norms, and any others that act on each RoI alone.
            x: ``(R, ...)``, the RoIs of this worker.
        """
        if self.shuffle is None or not normalizes_in_training(self):
            return layers(x)
        plan = self.shuffle.get(self, x)
        return layers(x) if plan is None else restore(layers(exchange(x, plan)), plan)


@ROI_BOX_HEAD_REGISTRY.register()
class BNConvFCHead(FastRCNNConvFCHead, PartitionedHead):
    """Detectron2's ``FastRCNNConvFCHead`` (N conv + M fc) with any of this project's ``NORM``.

    Same layers, names and state_dict. With a norm whose groups span workers (``SyncBN``,
    ``ShuffleBN``; *Rethinking "Batch" in BatchNorm*, Table 6) every worker must call the head in
    training, with any number of RoIs.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: list[int],
        fc_dims: list[int],
        conv_norm: str = "",
        bn_options: BNOptions | None = None,
    ) -> None:
        """
        Args:
            input_shape: shape of the RoI features.
            conv_dims: output channels of each conv layer.
            fc_dims: output channels of each fc layer.
            conv_norm: one of :func:`bn_detection.heads.norm_names`.
            bn_options: of the BN kinds.

        Raises:
            ValueError: for an unknown ``conv_norm``.
        """
        norm = NormFactory(conv_norm, bn_options)
        super().__init__(input_shape, conv_dims=conv_dims, fc_dims=fc_dims, conv_norm=norm or "")
        self.share(norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "bn_options": BNOptions.from_config(cfg)}

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(R, C, H, W)``. Returns ``(R, *output_shape)``."""
        return self.on_groups(super().forward, x)


@ROI_MASK_HEAD_REGISTRY.register()
class BNConvUpsampleHead(MaskRCNNConvUpsampleHead, PartitionedHead):
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
        bn_options: BNOptions | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the RoI features.
            num_classes: foreground classes; 1 for class-agnostic masks.
            conv_dims: output channels of each conv layer, and last of the upsampling layer.
            conv_norm: one of :func:`bn_detection.heads.norm_names`.
            bn_options: of the BN kinds.
            kwargs: of ``BaseMaskRCNNHead``.

        Raises:
            ValueError: for an unknown ``conv_norm``.
        """
        norm = NormFactory(conv_norm, bn_options)
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=norm or "",
            **kwargs,
        )
        self.share(norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "bn_options": BNOptions.from_config(cfg)}

    def layers(self, x: Tensor) -> Tensor:
        """Args: x: ``(R, C, H, W)``. Returns mask logits ``(R, num_classes, 2H, 2W)``."""
        return self.on_groups(super().layers, x)


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class BNConvDeconvKeypointHead(KRCNNConvDeconvUpsampleHead, PartitionedHead):
    """Detectron2's ``KRCNNConvDeconvUpsampleHead`` with a norm after each convolution.

    Detectron2's has none: with ``conv_norm`` "" the layers and the state_dict are the same; with
    another, the convolutions ``conv_fcn<k>`` have no bias and a layer ``conv_fcn<k>.norm``.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_keypoints: int,
        conv_dims: list[int],
        conv_norm: str = "",
        bn_options: BNOptions | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the RoI features.
            num_keypoints: K, of the dataset.
            conv_dims: output channels of each conv layer.
            conv_norm: one of :func:`bn_detection.heads.norm_names`.
            bn_options: of the BN kinds.
            kwargs: of ``BaseKeypointRCNNHead``.

        Raises:
            ValueError: for an unknown ``conv_norm``.
        """
        norm = NormFactory(conv_norm, bn_options)
        super().__init__(input_shape, num_keypoints=num_keypoints, conv_dims=conv_dims, **kwargs)
        for index, channels in enumerate(conv_dims, start=1):
            conv: Conv2d = self.get_submodule(f"conv_fcn{index}")
            conv.norm = get_norm(norm or "", channels)
            if conv.norm is not None:
                conv.bias = None
        self.share(norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        norm = cfg.MODEL.ROI_KEYPOINT_HEAD.NORM
        return {**arguments, "conv_norm": norm, "bn_options": BNOptions.from_config(cfg)}

    def layers(self, x: Tensor) -> Tensor:
        """Args: x: ``(R, C, H, W)``. Returns heatmap logits ``(R, K, 4H, 4W)``."""
        return self.on_groups(super().layers, x)
