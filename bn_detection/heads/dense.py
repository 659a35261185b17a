"""Dense heads, which are applied to every feature level, with every kind of normalization."""

from __future__ import annotations

from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..norm import LevelBatchNorm2d, LevelOptions
from .norms import BNOptions, NormFactory
from .roi_heads import PartitionedHead


def level_options(cfg: CfgNode) -> LevelOptions:
    """``BN.LEVELS``.

    Raises:
        ValueError: a value that cannot be.
    """
    return LevelOptions(**{key.lower(): value for key, value in cfg.BN.LEVELS.items()})


class LevelHead(PartitionedHead):
    """A head that takes all feature levels through its layers together, one layer after another.

    To be mixed into a dense head of Detectron2, before it in the list of bases.
    """

    _num_features: int

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        norm: str = "",
        levels: LevelOptions | None = None,
        bn_options: BNOptions | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of each level.
            norm: one of :func:`bn_detection.heads.norm_names`, of all convolutions but the last.
            levels: what the levels share, for the BN kinds.
            bn_options: of the BN kinds.
            kwargs: of Detectron2's head.

        Raises:
            ValueError: for an unknown ``norm``, or options that cannot be.
        """
        factory = NormFactory(norm, bn_options, rows_are_images=True)
        options = levels or LevelOptions()
        of_levels = partial(factory.of_levels, num_levels=len(input_shape), options=options)
        super().__init__(input_shape=input_shape, norm=of_levels if factory else "", **kwargs)
        self.share(factory)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "levels": level_options(cfg),
            "bn_options": BNOptions.from_config(cfg),
        }

    def _through(self, subnet: nn.Sequential, features: list[Tensor]) -> list[Tensor]:
        if len(features) != self._num_features:
            raise ValueError(
                f"{type(self).__name__}: {len(features)} feature levels were given, and it was "
                f"built for {self._num_features} levels (its input_shape)."
            )
        for layer in subnet:
            if isinstance(layer, LevelBatchNorm2d):
                features = layer(features)
            else:
                features = [layer(x) for x in features]
        return features


class BNRetinaNetHead(LevelHead, RetinaNetHead):
    """Detectron2's ``RetinaNetHead`` with any of this project's ``NORM``, and a choice of what the
    feature levels share.

    Same layers and names. With ``norm`` "BN" and the default ``levels`` the state_dict and what is
    computed are those of Detectron2's with "BN".
    """

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Args: features: by level, ``(N, C, H_l, W_l)``. Returns logits and box deltas by level.

        Raises:
            ValueError: another number of levels than the head was built for.
        """
        logits = [self.cls_score(x) for x in self._through(self.cls_subnet, features)]
        return logits, [self.bbox_pred(x) for x in self._through(self.bbox_subnet, features)]


@META_ARCH_REGISTRY.register()
class BNRetinaNet(RetinaNet):
    """Detectron2's ``RetinaNet`` with :class:`BNRetinaNetHead`.

    ``MODEL.RETINANET.NORM`` can be any of this project's norms, and ``BN.LEVELS`` says what the
    feature levels share (*Rethinking "Batch" in BatchNorm*, Sec. 5.2 and Table 5).
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        # Detectron2's head, which is built here and dropped, does not know all norms.
        without_norm = cfg.clone()
        without_norm.defrost()
        without_norm.MODEL.RETINANET.NORM = ""
        arguments = super().from_config(without_norm)
        shapes = arguments["backbone"].output_shape()
        in_features = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        return {**arguments, "head": BNRetinaNetHead(cfg, in_features)}


class BNFCOSHead(LevelHead, FCOSHead):
    """Detectron2's ``FCOSHead``, for LazyConfig, with any of this project's ``NORM``, and a choice
    of what the feature levels share. As :class:`BNRetinaNetHead`.
    """

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Args: features: by level, ``(N, C, H_l, W_l)``. Returns logits, box deltas and centerness
        by level.

        Raises:
            ValueError: another number of levels than the head was built for.
        """
        logits = [self.cls_score(x) for x in self._through(self.cls_subnet, features)]
        boxes = self._through(self.bbox_subnet, features)
        return logits, [self.bbox_pred(x) for x in boxes], [self.ctrness(x) for x in boxes]
