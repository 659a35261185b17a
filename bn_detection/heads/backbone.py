"""Small backbones without normalization, for the embedded dataset."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from fvcore.nn import weight_init
from torch import Tensor, nn


@BACKBONE_REGISTRY.register()
class SmallConvBackbone(Backbone):
    """Three 3x3 convolutions of stride 2, 2 and 1, with ReLU and no normalization.

    Its receptive field of 15 pixels is smaller than an object of LeakyShapes, so no feature sees
    two objects at once, and whatever one RoI knows of the others it knows through its head.
    Output: ``p2``, of stride 4.
    """

    @configurable
    def __init__(self, *, in_channels: int, channels: int) -> None:
        """
        Args:
            in_channels: channels of the image.
            channels: channels of every layer.
        """
        super().__init__()
        self.convs = nn.Sequential()
        for index, stride in enumerate((2, 2, 1), start=1):
            conv = _conv(in_channels if index == 1 else channels, channels, stride)
            self.convs.add_module(f"conv{index}", conv)
        self._out_features = ["p2"]
        self._out_feature_channels = {"p2": channels}
        self._out_feature_strides = {"p2": 4}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, int]:
        return {"in_channels": input_shape.channels, "channels": cfg.MODEL.FPN.OUT_CHANNELS}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Args: x: ``(N, in_channels, H, W)``. Returns ``{"p2": (N, channels, H/4, W/4)}``."""
        return {"p2": self.convs(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(
                self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }


@BACKBONE_REGISTRY.register()
class SmallPyramidBackbone(SmallConvBackbone):
    """:class:`SmallConvBackbone` with a 3x3 convolution of stride 2 for each further level.

    Output: ``p2``, ``p3`` and ``p4``, of stride 4, 8 and 16.
    """

    @configurable
    def __init__(self, *, in_channels: int, channels: int) -> None:
        """Args: as :class:`SmallConvBackbone`."""
        super().__init__(in_channels=in_channels, channels=channels)
        for name, stride in (("p3", 8), ("p4", 16)):
            self.add_module(name, _conv(channels, channels, 2))
            self._out_features.append(name)
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Args: x: ``(N, in_channels, H, W)``. Returns the levels by name."""
        outputs = super().forward(x)
        outputs["p3"] = self.p3(outputs["p2"])
        outputs["p4"] = self.p4(outputs["p3"])
        return outputs


def _conv(in_channels: int, channels: int, stride: int) -> Conv2d:
    conv = Conv2d(
        in_channels,
        channels,
        kernel_size=3,
        stride=stride,
        padding=1,
        activation=nn.ReLU(inplace=True),
    )
    weight_init.c2_msra_fill(conv)
    return conv
