"""The registered heads against Detectron2's own, and shuffled against gathered."""

from __future__ import annotations

import zlib

import pytest
import torch
from distributed import run_workers
from torch import Tensor, nn

BOX = {"conv_dims": [8, 8], "fc_dims": [16]}
MASK = {"num_classes": 3, "conv_dims": [8, 8, 8]}
KINDS = ["", "BN", "SyncBN", "ShuffleBN", "GN", "FrozenBN"]


def build(head: str, norm: str, channels: int = 8, **overrides) -> nn.Module:
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead

    from bn_detection.heads import BNConvFCHead, BNConvUpsampleHead

    shape = ShapeSpec(channels=channels, height=5, width=5)
    classes = {
        "stock_box": (FastRCNNConvFCHead, BOX),
        "box": (BNConvFCHead, {**BOX, "shuffle_seed": 3}),
        "stock_mask": (MaskRCNNConvUpsampleHead, MASK),
        "mask": (BNConvUpsampleHead, {**MASK, "shuffle_seed": 3}),
    }
    cls, arguments = classes[head]
    torch.manual_seed(0)
    return cls(shape, conv_norm=norm, **{**arguments, **overrides})


def features(module: nn.Module, x: Tensor) -> Tensor:
    return module.layers(x) if hasattr(module, "layers") else module(x)


@pytest.mark.parametrize("head", ["box", "mask"])
@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN"])
def test_head_is_detectron2s(head: str, norm: str) -> None:
    ours, theirs = build(head, norm), build(f"stock_{head}", norm)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 8, 5, 5)
    for module in (ours, theirs):
        module.train()
    assert torch.equal(features(ours, x), features(theirs, x))
    assert torch.equal(features(ours.eval(), x), features(theirs.eval(), x))


@pytest.mark.parametrize("head", ["box", "mask"])
def test_every_kind_of_bn_loads_in_a_stock_head_for_inference(head: str) -> None:
    theirs, x = build(f"stock_{head}", "BN").eval(), torch.randn(4, 8, 5, 5)
    for norm in ("BN", "SyncBN", "ShuffleBN"):
        ours = build(head, norm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(ours), "_plan", lambda self, x: None)  # no training loop around
            features(ours.train(), torch.randn(6, 8, 5, 5))
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(features(ours.eval(), x), features(theirs, x))


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("head", ["box", "mask"])
def test_no_rois(head: str, norm: str) -> None:
    from detectron2.utils.events import EventStorage

    channels = {"conv_dims": [32, 32] if head == "box" else [32, 32, 32]}
    module = build(head, norm, channels=32, **channels)
    with EventStorage():
        for training in (True, False):
            y = features(module.train(training), torch.zeros(0, 32, 5, 5))
            assert y.shape[0] == 0
            y.sum().backward()


@pytest.mark.parametrize("head", ["box", "mask"])
def test_unknown_norm_lists_the_choices(head: str) -> None:
    with pytest.raises(ValueError, match=r'NORM is "LayerNorm".*"ShuffleBN"'):
        build(head, "LayerNorm")


def _shuffled(rank: int, world_size: int, head: str, sizes: list[int]) -> dict[str, Tensor]:
    from detectron2.utils.events import EventStorage

    module = build(head, "ShuffleBN")
    module.shuffle.name = "roi_heads.head"
    x = _rois(sizes)[rank].requires_grad_()
    with EventStorage(start_iter=12):
        y = features(module.train(), x)
    y.backward(torch.ones_like(y) * torch.arange(y.shape[1]).view(-1, *[1] * (y.dim() - 2)))
    return {"y": y.detach(), "grad": x.grad, "weight": module[0].weight.grad}


def _rois(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(n, 8, 5, 5, generator=generator) for n in sizes]


@pytest.mark.parametrize("head", ["box", "mask"])
@pytest.mark.parametrize("sizes", [[6, 4], [9, 0], [4, 0, 5]])
@pytest.mark.timeout(120)
def test_shuffled_head_is_a_stock_head_on_each_group(head: str, sizes: list[int]) -> None:
    from bn_detection.norm import plan_exchange

    results = run_workers(_shuffled, len(sizes), head, sizes)
    stock = build(f"stock_{head}", "BN").double().train()
    groups = []
    for rank, n in enumerate(sizes):
        plan = plan_exchange(sizes, rank, zlib.crc32(b"3/roi_heads.head/12/0"))
        mine = torch.empty(n, dtype=torch.long)
        mine[plan.order] = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(plan.send)
        )
        groups.append(mine)
    group, xs = torch.cat(groups), [x.double().requires_grad_() for x in _rois(sizes)]
    everything = torch.cat(xs)
    parts = [features(stock, everything[group == g]) for g in range(len(sizes))]
    y = everything.new_zeros(len(everything), *parts[0].shape[1:])
    for g, part in enumerate(parts):
        y = y.index_put((group == g,), part)
    y.backward(torch.ones_like(y) * torch.arange(y.shape[1]).view(-1, *[1] * (y.dim() - 2)))
    for result, x, expected in zip(results, xs, y.split(sizes), strict=True):
        assert torch.allclose(result["y"].double(), expected, atol=1e-5)
        assert torch.allclose(result["grad"].double(), x.grad, atol=1e-4)
    summed = sum(r["weight"].double() for r in results)
    assert torch.allclose(summed, stock[0].weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("roi_heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_models_are_built_from_yaml_and_their_shuffles_are_named(roi_heads: str) -> None:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from bn_detection import add_bn_detection_config, configure_model

    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.merge_from_file("configs/quickstart/mask_rcnn_shuffle.yaml")
    cfg.MODEL.ROI_HEADS.NAME = roi_heads
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    model = configure_model(cfg, build_model(cfg))
    names = {m.shuffle.name for m in model.modules() if getattr(m, "shuffle", None)}
    stages = [f"roi_heads.box_head.{k}" for k in range(3)]
    boxes = stages if roi_heads == "CascadeROIHeads" else ["roi_heads.box_head"]
    assert names == {"roi_heads.mask_head", *boxes}
