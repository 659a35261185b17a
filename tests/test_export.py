"""Models that leave the project: TorchScript, and ONNX by its older exporter."""

from __future__ import annotations

import io

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from torch import nn

from bn_detection import add_bn_detection_config, to_plain_batch_norm
from bn_detection.heads import (
    BNConvDeconvKeypointHead,
    BNConvFCHead,
    BNConvUpsampleHead,
    BNRetinaNetHead,
)
from bn_detection.heads.norms import ChannelLayerNorm

SHAPE = ShapeSpec(channels=8, height=7, width=7)
HEADS = {
    FastRCNNConvFCHead: lambda: BNConvFCHead(
        SHAPE, conv_dims=[8, 8], fc_dims=[16], conv_norm="ShuffleBN"
    ),
    MaskRCNNConvUpsampleHead: lambda: BNConvUpsampleHead(
        SHAPE, num_classes=2, conv_dims=[8, 8], conv_norm="ShuffleBN"
    ),
    KRCNNConvDeconvUpsampleHead: lambda: BNConvDeconvKeypointHead(
        SHAPE, num_keypoints=3, conv_dims=[8, 8], conv_norm="GhostBN"
    ),
}


@pytest.mark.parametrize("stock", HEADS, ids=lambda cls: cls.__name__)
def test_a_registered_head_is_detectron2s_after_conversion(stock: type[nn.Module]) -> None:
    torch.manual_seed(0)
    head, x = HEADS[stock]().eval(), torch.randn(6, 8, 7, 7)
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)

    def run() -> torch.Tensor:
        return head(x) if stock is FastRCNNConvFCHead else head.layers(x)

    expected = run()
    assert type(to_plain_batch_norm(head)) is stock
    assert torch.allclose(run(), expected, atol=1e-6)
    head.train()
    assert run().requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("norm", ["ShuffleBN", "SyncBN", "BatchRenorm", "GN", "LN", "IN"])
def test_a_box_head_is_scripted_after_conversion(norm: str) -> None:
    torch.manual_seed(0)
    shape = ShapeSpec(channels=32, height=7, width=7)
    head = BNConvFCHead(shape, conv_dims=[32], fc_dims=[16], conv_norm=norm).eval()
    x = torch.randn(6, 32, 7, 7)
    expected = head(x)
    scripted = torch.jit.script(to_plain_batch_norm(head))
    assert torch.allclose(scripted(x), expected, atol=1e-6)


def test_a_dense_head_is_detectron2s_after_conversion() -> None:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.MODEL.RETINANET.NORM = "SyncBN"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    head = BNRetinaNetHead(cfg, [ShapeSpec(channels=8, stride=8)] * 2).eval()
    features = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3)]
    with torch.no_grad():
        expected = head(features)
        assert type(to_plain_batch_norm(head)) is RetinaNetHead
        for ours, theirs in zip(head(features), expected, strict=True):
            assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


class MyHead(BNConvFCHead):
    """A subclass, with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_head_of_ones_own_stays_what_it_is() -> None:
    head = MyHead(SHAPE, conv_dims=[8], fc_dims=[], conv_norm="BN").eval()
    x = torch.randn(4, 8, 7, 7)
    expected = head(x)
    assert type(to_plain_batch_norm(head)) is MyHead
    assert torch.allclose(head(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("opset", [13, 17])
def test_layer_norm_by_the_older_onnx_exporter(opset: int) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ChannelLayerNorm(8)).eval()
    x = torch.randn(2, 3, 9, 9)
    file = io.BytesIO()
    torch.onnx.export(
        *(model, (x,), file),
        dynamo=False,
        opset_version=opset,
        input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
    )
    exported = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(exported, full_check=True)
    (y,) = ReferenceEvaluator(exported).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)
