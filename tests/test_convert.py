"""Converting the normalization of built models, and back to plain BN."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from distributed import run_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from bn_detection import (
    BNOptions,
    ConfigError,
    PartitionedBatchNorm2d,
    add_bn_detection_config,
    configure_model,
    convert_norm,
    to_plain_batch_norm,
)
from bn_detection.heads import norm_names
from bn_detection.norm import set_rows_per_image, shuffled_groups

BN_KINDS = ("BN", "SyncBN", "ShuffleBN", "GhostBN", "ImageBN", "BatchRenorm")


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over largest absolute value (of zeros, the error itself)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / (expected.abs().max() or 1))


def randomize(model: nn.Module) -> nn.Module:
    """Give every norm layer affine parameters and statistics that a default would not equal."""
    for name, tensor in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.copy_(noise + 0.5 if name.endswith(("weight", "var")) else noise - 0.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
    return model


def hooks(model: nn.Module) -> int:
    """Number of forward hooks on all modules."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def partitioned(model: nn.Module) -> dict[str, PartitionedBatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PartitionedBatchNorm2d)}


def normalized(x: Tensor, groups: Iterable[int], layer: nn.Module) -> Tensor:
    """Group ``groups[i]`` of row i, normalized by the formula of BN, in float64."""
    x, ids = x.detach().double(), torch.tensor(list(groups))
    y = torch.empty_like(x)
    for group in ids.unique():
        rows = x[ids == group]
        mean = rows.mean((0, 2, 3), keepdim=True)
        var = ((rows - mean) ** 2).mean((0, 2, 3), keepdim=True)
        y[ids == group] = (rows - mean) / (var + layer.eps).sqrt()
    weight, bias = (t.detach().double()[:, None, None] for t in (layer.weight, layer.bias))
    return y * weight + bias


# Plain torch models


class Towers(nn.Module):
    """One tower under two names, and in a list; a layer of every kind that can be converted."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        tower = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.first = tower
        self.second = tower
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
            for _ in range(2)
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)


@pytest.mark.parametrize("norm", BN_KINDS)
def test_bn_kinds_keep_everything_of_a_torch_model(norm: str) -> None:
    model = randomize(resnet18())
    for k, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        module.eps, module.momentum = 1e-3 + 1e-4 * k, None if k == 3 else 0.01 * k
    model.layer2.eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    old = {n: model.get_submodule(n) for n in names}
    state, x = model.state_dict(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)

    assert convert_norm(model, norm, "") == names
    for name, layer in partitioned(model).items():
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            assert getattr(layer, attribute) is getattr(old[name], attribute)
        for attribute in ("eps", "momentum", "training", "num_features"):
            assert getattr(layer, attribute) == getattr(old[name], attribute)
    assert set(partitioned(model)) == set(names)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert error(model.eval()(x), expected) < 1e-6


SOURCES: dict[str, Callable[[], nn.Module]] = {
    "BN": lambda: nn.BatchNorm2d(32, eps=1e-2, momentum=0.3),
    "SyncBN": lambda: nn.SyncBatchNorm(32, eps=1e-2, momentum=0.3),
    "naiveSyncBN": lambda: NaiveSyncBatchNorm(32, eps=1e-2, momentum=0.3),
    "FrozenBN": lambda: FrozenBatchNorm2d(32, eps=1e-2),
    "torchvision FrozenBN": lambda: TorchvisionFrozenBatchNorm2d(32, eps=1e-2),
    "GN": lambda: nn.GroupNorm(8, 32),
    "IN": lambda: nn.InstanceNorm2d(32, affine=True),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("norm", norm_names())
def test_every_norm_from_every_layer(source: str, norm: str) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 32, 1), SOURCES[source]())).double()
    old, x = model[1], torch.randn(4, 32, 5, 6, dtype=torch.float64)
    assert convert_norm(model, norm) == ["1"]
    new = model[1]
    has_statistics = isinstance(getattr(old, "running_var", None), Tensor)
    eps = 1e-2 if has_statistics else 1e-5
    mean, var = torch.zeros(32).double(), torch.ones(32).double()
    if has_statistics:
        mean, var = old.running_mean, old.running_var
    if norm == "":
        expected = x
    elif norm == "GN":
        expected = F.group_norm(x, 32, old.weight, old.bias)
    elif norm == "LN":
        rows = F.layer_norm(x.movedim(1, -1), (32,), old.weight, old.bias, 1e-6)
        expected = rows.movedim(-1, 1)
    elif norm == "IN":
        expected = F.instance_norm(x, weight=old.weight, bias=old.bias, eps=eps)
    else:
        if norm == "FrozenBN" and not has_statistics:  # whose default is the identity
            var = (torch.ones(32) - eps).double()
        expected = F.batch_norm(x, mean, var, old.weight, old.bias, eps=eps)
    new.eval()
    torch.testing.assert_close(new(x), expected, rtol=1e-9, atol=1e-9)
    if norm in BN_KINDS:
        assert new.momentum == (0.3 if "momentum" in vars(old) and has_statistics else 0.1)


def test_an_affine_parameter_that_is_not_trained_stays_so() -> None:
    for layer in (nn.GroupNorm(8, 32), nn.BatchNorm2d(32)):
        model = nn.Sequential(layer.requires_grad_(False))
        convert_norm(model, "ShuffleBN")
        assert not model[0].weight.requires_grad
    model = nn.Sequential(FrozenBatchNorm2d(32))
    convert_norm(model, "BN")
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("source", ["BN", "GN", "FrozenBN"])
def test_dtype_device_and_mode_are_kept(source: str) -> None:
    model = randomize(nn.Sequential(SOURCES[source]())).half().eval()
    weight = model[0].weight.clone()
    convert_norm(model, "ShuffleBN")
    assert model[0].running_var.dtype == torch.float16
    assert torch.equal(model[0].weight, weight)
    assert not model[0].training
    model = nn.Sequential(SOURCES[source]()).to("meta")
    convert_norm(model, "ShuffleBN")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_layers_without_affine_parameters() -> None:
    """As those of the RetinaNet head, whose lists of BN layers share one affine."""
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    y = model(x)
    (expected,) = torch.autograd.grad((y * y.sin()).sum(), x)
    convert_norm(model, "ShuffleBN", options=BNOptions(virtual_workers=1))
    assert "0.weight" not in model.state_dict()
    assert error(model(x), y) < 1e-6
    convert_norm(model, "GhostBN", options=BNOptions(ghost_size=4))
    z = model(x)
    assert error(z, y) < 1e-6
    (actual,) = torch.autograd.grad((z * z.sin()).sum(), x)
    assert error(actual, expected) < 1e-5


GLOBS: dict[str, tuple[Any, list[list[str]]]] = {
    "a literal name": ("layer1.0.bn1", [["layer1.0.bn1"]]),
    "a module": ("layer1", [["layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2"]]),
    "children": (
        "layer1.*",
        [["layer1.0.bn1", "layer1.0.bn2"], ["layer1.1.bn1", "layer1.1.bn2"]],
    ),
    "layers": ("layer1.?.bn2", [["layer1.0.bn2"], ["layer1.1.bn2"]]),
    "several": (
        ["bn1", "layer4.1"],
        [["bn1"], ["layer4.1.bn1", "layer4.1.bn2"]],
    ),
    "one within another": (
        ["layer1", "layer1.1"],
        [["layer1.0.bn1", "layer1.0.bn2"], ["layer1.1.bn1", "layer1.1.bn2"]],
    ),
    "the same twice": (["layer1.0", "layer1.0"], [["layer1.0.bn1", "layer1.0.bn2"]]),
}


@pytest.mark.parametrize("case", GLOBS)
def test_layers_below_a_match_share_groups(case: str) -> None:
    globs, parts = GLOBS[case]
    model = resnet18(num_classes=3)
    names = convert_norm(model, "ShuffleBN", globs, options=BNOptions(virtual_workers=2))
    assert sorted(names) == sorted(name for part in parts for name in part)
    assert set(partitioned(model)) == set(names)
    scopes = [{model.get_submodule(name).scope for name in part} for part in parts]
    assert [len(scope) for scope in scopes] == [1] * len(parts)
    assert len(set.union(*scopes)) == len(parts)
    # A pre-hook and a hook for each part's groups, and a pre-hook that looks for instances.
    assert hooks(model) == 3 * len(parts)
    model(torch.randn(3, 3, 32, 32)).sum().backward()
    assert all(int(layer.num_batches_tracked) == 1 for layer in partitioned(model).values())


def test_the_model_itself_and_every_part() -> None:
    whole, parts = resnet18(), resnet18()
    options = BNOptions(virtual_workers=2)
    names = [n for n, m in whole.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert convert_norm(whole, "ShuffleBN", "", options=options) == names
    assert len({layer.scope for layer in partitioned(whole).values()}) == 1
    assert convert_norm(parts, "ShuffleBN", options=options) == names
    scopes = {name: layer.scope for name, layer in partitioned(parts).items()}
    assert len(set(scopes.values())) == 5  # bn1 and four stages
    assert scopes["layer1.0.bn1"] is scopes["layer1.1.bn2"] is not scopes["bn1"]
    parts(torch.randn(3, 3, 32, 32)).sum().backward()


def test_says_what_it_converted(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bn_detection.heads.convert")
    logger.addHandler(caplog.handler)  # Detectron2's logger setup ends propagation.
    try:
        with caplog.at_level(logging.INFO, logger=logger.name):
            convert_norm(resnet18(), "SyncBN", "layer1.0")
    finally:
        logger.removeHandler(caplog.handler)
    assert "Converted 2 layers to SyncBN: layer1.0.bn1, layer1.0.bn2" in caplog.messages


@pytest.mark.parametrize("globs", ["", "*", "first", "second", ["second", "first"]])
def test_shared_modules_stay_shared(globs: Any) -> None:
    model = Towers()
    convert_norm(model, "ShuffleBN", globs, options=BNOptions(virtual_workers=2))
    assert isinstance(model.first[1], PartitionedBatchNorm2d)
    assert model.first[1] is model.second[1]
    model(torch.randn(5, 32, 4, 4)).sum().backward()
    assert int(model.first[1].num_batches_tracked) == 2
    plain = to_plain_batch_norm(model)
    assert type(plain.first[1]) is nn.BatchNorm2d
    assert plain.first[1] is plain.second[1]
    assert hooks(plain) == 0


def test_a_shared_layer_stays_shared() -> None:
    layer = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Conv2d(3, 3, 1), layer)
    assert convert_norm(model, "ShuffleBN", "", options=BNOptions(virtual_workers=2)) == ["1", "3"]
    assert model[1] is model[3]
    model(torch.randn(5, 3, 4, 4)).sum().backward()
    to_plain_batch_norm(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1] is model[3]


def test_items_of_a_list_have_groups_of_their_own() -> None:
    for glob in ("stages", "stages.*", "stage*"):
        model = Towers()
        names = convert_norm(model, "ShuffleBN", glob, options=BNOptions(virtual_workers=2))
        assert names == ["stages.0.1", "stages.1.1"]
        assert model.stages[0][1].scope is not model.stages[1][1].scope
        model(torch.randn(5, 32, 4, 4)).sum().backward()


def test_converting_again_leaves_no_hooks() -> None:
    x = torch.randn(4, 3, 32, 32)
    model, stock = (resnet18(num_classes=3) for _ in range(2))
    stock.load_state_dict(model.state_dict())
    options = BNOptions(virtual_workers=2)
    convert_norm(model, "ShuffleBN", "layer*", options=options)
    first = hooks(model)
    assert first > 0
    convert_norm(model, "ShuffleBN", "layer*", options=options)
    assert hooks(model) == first
    convert_norm(model, "GN", "layer4")
    assert hooks(model) == first * 3 / 4
    model.layer4 = copy.deepcopy(stock.layer4)
    convert_norm(model, "SyncBN", "layer*")
    assert hooks(model) == 0
    convert_norm(model, "BN", "*")
    assert error(model(x), stock(x)) < 1e-5
    assert error(model.bn1.running_var, stock.bn1.running_var) < 1e-6


def test_a_copy_has_hooks_of_its_own() -> None:
    model = resnet18(num_classes=3)
    convert_norm(model, "ShuffleBN", "", options=BNOptions(virtual_workers=2))
    twin = copy.deepcopy(model)
    to_plain_batch_norm(model)
    assert hooks(model) == 0
    assert hooks(twin) > 0
    scopes = {layer.scope for layer in partitioned(twin).values()}
    assert len(scopes) == 1
    twin(torch.randn(4, 3, 32, 32)).sum().backward()
    assert int(twin.bn1.num_batches_tracked) == 1
    assert int(model.bn1.num_batches_tracked) == 0


class NormAct(nn.BatchNorm2d):
    """As those of timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class Untracked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))


BAD: dict[str, tuple[Callable[[], nn.Module], str, Any, tuple[str, ...]]] = {
    "no module": (resnet18, "SyncBN", "layr1", ('"layr1"', "SyncBN", "20 norm", "bn1", "layer1")),
    "one of several": (resnet18, "ShuffleBN", ["layer1", "head.*"], ('"head.*"', "no module")),
    "no norm below": (
        resnet18,
        "ShuffleBN",
        "fc",
        ('"fc"', "matches fc, without a normalization layer", "MODEL.FPN.NORM"),
    ),
    "no norm at all": (lambda: nn.Sequential(nn.ReLU()), "BN", "1*", ('"1*"', "0 normalization")),
    "a layer": (lambda: nn.BatchNorm2d(3), "ShuffleBN", "", ("within a model",)),
    "unknown norm": (resnet18, "ShufleBN", "", ('"ShufleBN"', '"ShuffleBN"')),
    "groups of GN": (lambda: Towers(48), "GN", "stages", ("stages.0.1", "48 channels", '"GN"')),
    "an activation": (lambda: nn.Sequential(NormAct(3)), "BN", "*", ("0: a NormAct", "pattern")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_its_cause_and_changes_nothing(case: str) -> None:
    build, norm, globs, expected = BAD[case]
    model = build()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError) as caught:
        convert_norm(model, norm, globs, options=BNOptions(virtual_workers=2))
    for part in expected:
        assert part in str(caught.value)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert hooks(model) == 0


def test_features_mode_is_refused_by_name() -> None:
    options = BNOptions(shuffle_mode="features")
    for name in ("layer1", ""):
        model = resnet18()
        with pytest.raises(ValueError, match=r"BN\.SHUFFLE\.MODE features") as caught:
            convert_norm(model, "ShuffleBN", name, options=options)
        assert str(caught.value).startswith(f"{name or 'the model'}: ")
        assert hooks(model) == 0
    assert len(convert_norm(resnet18(), "SyncBN", "", options=options)) == 20


def test_partition_by_image_needs_to_know_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(6, 3, 5, 5)
    convert_norm(model, "ImageBN", "")
    set_rows_per_image([2, 3])
    with pytest.raises(ValueError, match="rows_are_images=True"):
        model(x)
    set_rows_per_image([2, 4])
    by_roi = model(x)
    inner = model[0](x)
    assert error(by_roi, normalized(inner, [0, 0, 1, 1, 1, 1], model[1])) < 1e-5
    convert_norm(model, "ImageBN", "", rows_are_images=True)
    assert error(model(x), normalized(inner, range(6), model[1])) < 1e-5


# Detectron2's models


def config(*options: Any) -> CfgNode:
    """A detector of few channels and few RoIs: ResNet-50-FPN, box head of two convolutions."""
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    base = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.FPN.NORM": "BN",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 2000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 12,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.5,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 2,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.NORM": "BN",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 5,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
        "MODEL.ROI_MASK_HEAD.NORM": "BN",
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 5,
        "MODEL.MASK_ON": True,
        "INPUT.MASK_FORMAT": "bitmask",
    }
    cfg.merge_from_list([part for pair in base.items() for part in pair])
    cfg.merge_from_list(list(options))
    return cfg


CASCADE = (
    "MODEL.ROI_HEADS.NAME",
    "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    True,
)
C4 = (
    "MODEL.BACKBONE.NAME",
    "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES",
    ["res4"],
    "MODEL.ANCHOR_GENERATOR.SIZES",
    [[8, 16, 32]],
    "MODEL.RPN.IN_FEATURES",
    ["res4"],
    "MODEL.ROI_HEADS.NAME",
    "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES",
    ["res4"],
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
    6,
)


def detector(*options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config(*options))


def batch(number: int = 2, side: int = 64) -> list[dict[str, Any]]:
    """Random images, the k-th with k + 1 objects."""
    generator = torch.Generator().manual_seed(5)
    images = []
    for k in range(number):
        corner = torch.rand(k + 1, 2, generator=generator) * (side - 40)
        boxes = torch.cat([corner, corner + 20 + 5 * k], dim=1)
        masks = torch.zeros(k + 1, side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        objects = Instances(
            (side, side),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.arange(k + 1) % 3,
            gt_masks=BitMasks(masks),
        )
        image = (torch.rand(3, side, side, generator=generator) * 255).byte()
        images.append({"image": image, "height": side, "width": side, "instances": objects})
    return images


class Record:
    """Inputs and outputs of modules that return a tensor, by call."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.calls: dict[str, list[tuple[tuple[Any, ...], Any]]] = {}
        for name in names:
            calls = self.calls[name] = []
            model.get_submodule(name).register_forward_hook(
                # Of a tensor a copy: a ReLU in place follows.
                lambda _, args, y, calls=calls: calls.append((args, y.clone()))
            )

    def assert_normalized(self, model: nn.Module, groups: dict[str, Callable[[int], list[int]]]):
        """``groups[prefix](call)`` are the groups of the rows of the layers below a prefix."""
        number = 0
        for name, layer in partitioned(model).items():
            prefix = max((p for p in groups if name.startswith(p)), key=len)
            assert self.calls[name]
            for call, ((x,), y) in enumerate(self.calls[name]):
                ids = groups[prefix](call)
                assert len(ids) == len(x)
                assert error(y, normalized(x, ids, layer)) < 1e-5, name
                number += 1
        assert number > 0


def images_of(box_lists: list[Any]) -> list[int]:
    """The image of each RoI, from the lists that a pooler or head was given."""
    return [image for image, boxes in enumerate(box_lists) for _ in range(len(boxes))]


def train_step(model: nn.Module, images: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(1)
    with EventStorage():
        losses = model(images)
    total = sum(losses.values())
    assert bool(total.isfinite())
    model.zero_grad()
    total.backward()
    return losses


def assert_trained(model: nn.Module) -> None:
    for name, layer in partitioned(model).items():
        assert layer.weight.grad is not None, name
        assert layer.weight.grad.abs().max() > 0, name


def test_image_partition_of_standard_roi_heads_and_fpn() -> None:
    model = detector()
    names = convert_norm(model, "ImageBN", ["roi_heads.*", "backbone"])
    assert "roi_heads.box_head.conv1.norm" in names
    assert "roi_heads.mask_head.mask_fcn1.norm" in names
    assert "backbone.fpn_output2.norm" in names
    record = Record(model, [*names, "roi_heads.box_pooler", "roi_heads.mask_pooler"])
    train_step(model, batch(3))
    poolers = {
        head: images_of(record.calls[f"roi_heads.{head}_pooler"][0][0][1])
        for head in ("box", "mask")
    }
    assert len(poolers["mask"]) < len(poolers["box"])
    counts = [poolers["mask"].count(image) for image in range(3)]
    assert len(set(counts)) > 1
    record.assert_normalized(
        model,
        {
            "roi_heads.box_head": lambda _: poolers["box"],
            "roi_heads.mask_head": lambda _: poolers["mask"],
            "backbone": lambda _: [0, 1, 2],
        },
    )
    assert_trained(model)


def test_image_partition_of_a_cascade() -> None:
    model = detector(*CASCADE, "MODEL.MASK_ON", False)
    names = convert_norm(model, "ImageBN", "roi_heads.box_head")
    assert len(names) == 6
    scopes = [model.get_submodule(f"roi_heads.box_head.{k}.conv1.norm").scope for k in range(3)]
    assert len(set(scopes)) == 3
    record = Record(model, [*names, "roi_heads.box_pooler"])
    train_step(model, batch())
    pooled = [images_of(args[1]) for args, _ in record.calls["roi_heads.box_pooler"]]
    assert len(pooled) == 3
    record.assert_normalized(
        model, {f"roi_heads.box_head.{k}": lambda _, k=k: pooled[k] for k in range(3)}
    )
    assert_trained(model)


def test_image_partition_of_res5_and_its_mask_head() -> None:
    model = detector(*C4)
    names = convert_norm(model, "ImageBN", "roi_heads.*")
    assert sum(name.startswith("roi_heads.res5.") for name in names) == 10
    assert sum(name.startswith("roi_heads.mask_head.") for name in names) == 2
    record = Record(model, [*names, "roi_heads.pooler"])
    given: list[list[Instances]] = []
    model.roi_heads.mask_head.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    train_step(model, batch(3))
    pooled = images_of(record.calls["roi_heads.pooler"][0][0][1])
    foreground = images_of(given[0])
    assert 0 < len(foreground) < len(pooled)
    record.assert_normalized(
        model,
        {
            "roi_heads.res5": lambda _: pooled,
            "roi_heads.mask_head": lambda _: foreground,
        },
    )
    assert_trained(model)


def test_image_partition_of_an_rpn_head_on_every_level() -> None:
    model = detector("MODEL.MASK_ON", False)
    conv = Conv2d(32, 32, 3, padding=1, norm=nn.BatchNorm2d(32), activation=nn.ReLU())
    model.proposal_generator.rpn_head.conv = conv
    names = convert_norm(model, "ImageBN", "proposal_generator")
    assert names == ["proposal_generator.rpn_head.conv.norm"]
    record = Record(model, names)
    train_step(model, batch(3))
    assert len(record.calls[names[0]]) == 4
    record.assert_normalized(model, {"": lambda _: [0, 1, 2]})
    assert_trained(model)


@pytest.mark.parametrize("norm", ["BN", "ShuffleBN"])
def test_virtual_workers_of_converted_modules(norm: str) -> None:
    model = detector()
    options = BNOptions(virtual_workers=2, shuffle_seed=3)
    names = convert_norm(model, norm, ["roi_heads.*", "backbone.fpn_output2"], options=options)
    record = Record(model, [*names, "roi_heads.box_pooler", "roi_heads.mask_pooler"])
    train_step(model, batch(4))
    prefixes = {
        "roi_heads.box_head": images_of(record.calls["roi_heads.box_pooler"][0][0][1]),
        "roi_heads.mask_head": images_of(record.calls["roi_heads.mask_pooler"][0][0][1]),
        "backbone.fpn_output2": [0, 1, 2, 3],
    }

    def groups(prefix: str) -> list[int]:
        images = prefixes[prefix]
        if norm == "BN":
            return [image // 2 for image in images]
        seed = zlib.crc32(f"3/{prefix}/0/0".encode())
        return shuffled_groups([len(images)], 2, seed)[0].tolist()

    record.assert_normalized(model, {p: lambda _, p=p: groups(p) for p in prefixes})
    assert_trained(model)


@pytest.mark.parametrize("norm", ["SyncBN", "ShuffleBN", "GhostBN", "BatchRenorm"])
def test_a_gn_detector_in_bn_of_every_kind(norm: str) -> None:
    """Mask R-CNN with GN everywhere: weights, and trains."""
    gn = [part for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
          for part in (f"MODEL.{key}.NORM", "GN")]  # fmt: skip
    wide = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32)
    model = randomize(detector(*gn, *wide))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    options = BNOptions(virtual_workers=2)
    assert convert_norm(model, norm, ["backbone", "roi_heads.*"], options=options) == layers
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert len(after) == len(before) + 3 * len(layers)
    train_step(model, batch())
    assert_trained(model)


def test_the_parts_of_a_mask_rcnn_have_groups_of_their_own() -> None:
    model = detector()
    options = BNOptions(virtual_workers=2)
    convert_norm(model, "ShuffleBN", options=options)
    layers = partitioned(model)
    scopes = {name: layers[name].scope for name in layers}
    box, mask = "roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn1.norm"
    assert scopes[box] is scopes["roi_heads.box_head.conv2.norm"] is not scopes[mask]
    assert len(set(scopes.values())) == 3  # and the backbone
    train_step(model, batch())
    assert_trained(model)

    convert_norm(model, "ShuffleBN", "", options=options)
    with pytest.raises(RuntimeError, match=r"rows.*roi_heads\.mask_head"):
        train_step(model, batch())


def test_a_frozen_backbone() -> None:
    model = randomize(detector("MODEL.RESNETS.NORM", "FrozenBN")).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.backbone(images)
    frozen = [n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    assert convert_norm(model, "SyncBN", "backbone.bottom_up") == frozen
    assert len(frozen) > 10
    with torch.no_grad():
        actual = model.backbone(images)
    assert all(error(actual[key], expected[key]) < 1e-5 for key in expected)
    back = convert_norm(model, "FrozenBN", "backbone.bottom_up")
    assert back == frozen
    with torch.no_grad():
        actual = model.backbone(images)
    assert all(error(actual[key], expected[key]) < 1e-5 for key in expected)


def test_a_retinanet_head() -> None:
    model = detector(
        "MODEL.META_ARCHITECTURE", "RetinaNet",
        "MODEL.RETINANET.IN_FEATURES", ["p2", "p3"],
        "MODEL.RETINANET.NUM_CLASSES", 3,
        "MODEL.RETINANET.NUM_CONVS", 2,
        "MODEL.RETINANET.NORM", "BN",
        "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]],
    )  # fmt: skip
    names = convert_norm(model, "ImageBN", "head")
    assert len(names) == 8  # two towers of two layers, each with one BN a level
    record = Record(model, names)
    train_step(model, batch(3))
    for name in names:
        for (x,), y in record.calls[name]:
            layer = nn.BatchNorm2d(x.shape[1])
            assert error(y, normalized(x, [0, 1, 2], layer)) < 1e-5


def test_convert_in_a_config() -> None:
    cfg = config("BN.VIRTUAL_WORKERS", 2, "BN.GHOST.SIZE", 5, "BN.EPS", 0.5)
    cfg.BN.CONVERT = [["roi_heads.*", "ShuffleBN"], ["roi_heads.mask_head", "GhostBN"]]
    model = configure_model(cfg, build_model(cfg))
    box, mask = model.roi_heads.box_head.conv1.norm, model.roi_heads.mask_head.mask_fcn1.norm
    assert type(box.partition).__name__ == "ShufflePartition"
    assert box.partition.virtual_workers == 2
    assert mask.partition.size == 5
    assert box.eps == 1e-5  # of the BN layer that it was
    train_step(model, batch())
    assert_trained(model)


@pytest.mark.parametrize(
    ("entry", "options", "expected"),
    [
        (["rpn.*", "SyncBN"], (), ('"rpn.*"', "proposal_generator")),
        (["proposal_generator", "SyncBN"], (), ('"proposal_generator"', "without a norm")),
        (["roi_heads.*", "ShuffleBN"], ("BN.SHUFFLE.MODE", "features"), ("BN.SHUFFLE.MODE", "box")),
    ],
)
def test_a_config_that_converts_nothing(
    entry: list[str], options: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    cfg = config(*options)
    cfg.BN.CONVERT = [entry]
    with pytest.raises(ConfigError, match=r"BN\.CONVERT") as caught:
        configure_model(cfg, build_model(cfg))
    for part in expected:
        assert part in str(caught.value)


REGISTERED = (
    "MODEL.ROI_BOX_HEAD.NAME",
    "BNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NORM",
    "ShuffleBN",
    "MODEL.ROI_MASK_HEAD.NAME",
    "BNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NORM",
    "ShuffleBN",
)


@pytest.mark.parametrize("mode", ["statistics", "features"])
@pytest.mark.parametrize("to", ["BN", "plain"])
def test_registered_heads_leave_their_groups(mode: str, to: str) -> None:
    cfg = config(*REGISTERED, "BN.SHUFFLE.MODE", mode)
    model = configure_model(cfg, build_model(cfg))
    assert hooks(model) > 0
    if to == "BN":
        assert len(convert_norm(model, "BN", "roi_heads.*")) == 4
    else:
        to_plain_batch_norm(model)
    assert hooks(model) == 0
    assert model.roi_heads.box_head.shuffle is None
    assert model.roi_heads.box_head.bn_scope is None
    assert len(partitioned(model)) == (4 if to == "BN" else 0)


# Back to plain BN


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """What a detector computes for fixed images and fixed RoIs."""
    model.eval()
    images = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().view(2, 3, 64, 64)
    boxes = torch.tensor([[4.0, 4, 30, 30], [10, 20, 50, 60], [0, 0, 64, 64]])
    with torch.no_grad():
        features = model.backbone(images)
        rois = [Boxes(boxes), Boxes(boxes[:2] + 1)]
        pooled = model.roi_heads.box_pooler([features[f] for f in ("p2", "p3")], rois)
        scores, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
        logits, _ = model.proposal_generator.rpn_head([features["p2"]])
        found = [
            Instances((64, 64), pred_boxes=b, pred_classes=torch.zeros(len(b), dtype=torch.long))
            for b in rois
        ]
        model.roi_heads.forward_with_given_boxes(features, found)
    masks = torch.cat([instances.pred_masks for instances in found])
    return {"scores": scores, "deltas": deltas, "logits": logits[0], "masks": masks}


@pytest.mark.parametrize("how", ["registered", "converted"])
def test_back_to_plain_keeps_parameters_and_outputs(how: str) -> None:
    stock = config()
    cfg = config(*REGISTERED) if how == "registered" else stock
    model = configure_model(cfg, randomize(build_model(cfg)))
    if how == "converted":
        convert_norm(model, "ShuffleBN", ["roi_heads.*", "backbone"])
    train_step(model, batch())
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = outputs(model.eval())
    layers = {name: (m.eps, m.momentum) for name, m in partitioned(model).items()}
    assert to_plain_batch_norm(model) is model
    assert partitioned(model) == {}
    for name, (eps, momentum) in layers.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.BatchNorm2d
        assert (layer.eps, layer.momentum, layer.training) == (eps, momentum, False)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in after)
    if how == "registered":
        built = build_model(stock)
        assert list(model.state_dict()) == list(built.state_dict())
    actual = outputs(model)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert hooks(model) == 0


def test_plain_bn_of_a_layer() -> None:
    layer = PartitionedBatchNorm2d(3, partition="shuffle", eps=0.1, momentum=None)
    plain = to_plain_batch_norm(layer)
    assert type(plain) is nn.BatchNorm2d
    assert plain.weight is layer.weight
    assert (plain.eps, plain.momentum) == (0.1, None)


STRANGER = """
import sys

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

{outputs}

with open("config.yaml") as file:
    model = build_model(CfgNode(yaml.safe_load(file)))
if sys.argv[1] == "load":
    model.load_state_dict(torch.load("model.pth"))
else:
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), "model.pth")
torch.save(outputs(model), "outputs.pth")
assert not any(name.startswith("bn_detection") for name in sys.modules)
"""


def stranger(folder: Path, what: str) -> dict[str, Tensor]:
    """The outputs of a stock model in a process that never sees this package."""
    (folder / "config.yaml").write_text(config().dump())
    code = STRANGER.format(outputs=inspect.getsource(outputs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, what],
        capture_output=True, text=True, timeout=120, env=environment, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return torch.load(folder / "outputs.pth")


@pytest.mark.timeout(150)
def test_a_stranger_loads_a_converted_model(tmp_path: Path) -> None:
    model = randomize(detector())
    convert_norm(model, "ShuffleBN", ["roi_heads.*", "backbone"])
    train_step(model, batch())
    expected = outputs(to_plain_batch_norm(model))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    actual = stranger(tmp_path, "load")
    assert actual.keys() == expected.keys()
    assert all(error(actual[key], expected[key]) < 1e-6 for key in expected)


@pytest.mark.timeout(150)
def test_a_strangers_checkpoint_loads_in_converted_and_registered_heads(tmp_path: Path) -> None:
    expected = stranger(tmp_path, "save")
    state = torch.load(tmp_path / "model.pth")
    converted = detector()
    convert_norm(converted, "ShuffleBN", ["roi_heads.*", "backbone"])
    cfg = config(*REGISTERED)
    for model in (converted, configure_model(cfg, build_model(cfg))):
        assert partitioned(model)
        model.load_state_dict(state)
        actual = outputs(model)
        assert all(error(actual[key], expected[key]) < 1e-6 for key in expected)


# Modes of torch


def block(
    norm: str, seed: int = 0, activation: nn.Module | None = None, **options: Any
) -> nn.Module:
    """A ResNet block (two convolutions with BN, ReLU in place), converted."""
    torch.manual_seed(seed)
    model = randomize(BasicBlock(16, 16))
    if activation is not None:
        model.relu = activation
    convert_norm(model, norm, "", options=BNOptions(ghost_size=3, shuffle_seed=5, **options))
    return model


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output and gradient of the input, for one training step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    (y.float() * torch.linspace(0, 9, y.numel()).sin().view(y.shape)).sum().backward()
    return {"y": y.detach(), "dx": x.grad}


def results(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and running statistics."""
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return gradients | dict(model.named_buffers())


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert error(actual[key], expected[key]) <= tolerance, key


KINDS = (("BN", 0), ("BN", 2), ("SyncBN", 0), ("ShuffleBN", 2), ("GhostBN", 0), ("BatchRenorm", 0))
kinds = pytest.mark.parametrize(("norm", "virtual_workers"), KINDS)


def rows(number: int = 8) -> Tensor:
    """Inputs of a block; of two images, if virtual workers ask."""
    set_rows_per_image([number // 2, number - number // 2])
    return torch.randn(number, 16, 6, 6, generator=torch.Generator().manual_seed(2))


@kinds
def test_channels_last(norm: str, virtual_workers: int) -> None:
    expected_model = block(norm, virtual_workers=virtual_workers)
    model = block(norm, virtual_workers=virtual_workers).to(memory_format=torch.channels_last)
    expected = step(expected_model, rows())
    actual = step(model, rows().contiguous(memory_format=torch.channels_last))
    for value in actual.values():
        assert value.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual, expected)
    assert_close(results(model), results(expected_model))


@kinds
def test_bfloat16_autocast(norm: str, virtual_workers: int) -> None:
    # Without a kink: rounding flips the gradient of a ReLU near zero.
    model, reference = (
        block(norm, activation=nn.SiLU(), virtual_workers=virtual_workers) for _ in range(2)
    )
    expected = step(reference, rows())
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(model, rows())
    assert actual["y"].dtype == torch.bfloat16
    assert_close(actual, expected, 0.05)
    assert_close(results(model), results(reference), 0.05)


@kinds
def test_float16(norm: str, virtual_workers: int) -> None:
    # Without a kink: rounding flips the gradient of a ReLU near zero.
    model, reference = (
        block(norm, activation=nn.SiLU(), virtual_workers=virtual_workers) for _ in range(2)
    )
    model.half()
    expected = step(reference, rows())
    actual = step(model, rows().half())
    assert {value.dtype for value in actual.values()} == {torch.float16}
    assert_close(actual, expected, 0.02)
    assert_close(results(model), results(reference), 0.02)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("norm", "virtual_workers"), [("BN", 0), ("SyncBN", 0), ("ShuffleBN", 2), ("GhostBN", 0)]
)
def test_compile(norm: str, virtual_workers: int) -> None:
    check_compile(norm, virtual_workers, rows())


def check_compile(norm: str, virtual_workers: int, x: Tensor) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model = (block(norm, virtual_workers=virtual_workers) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):  # a second step has other permutations
        assert_close(step(compiled, x), step(eager, x))
    assert_close(results(model), results(eager))
    assert int(model.bn1.num_batches_tracked) == 9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    eager.eval(), model.eval()
    with torch.no_grad():
        assert error(compiled(x), eager(x)) < 1e-6


def compile_on_a_worker(rank: int, world_size: int) -> None:
    for norm in ("SyncBN", "ShuffleBN"):
        check_compile(norm, 0, torch.randn(3 + 2 * rank, 16, 4, 4))


@pytest.mark.timeout(200)
def test_compile_over_workers() -> None:
    run_workers(compile_on_a_worker, 2, timeout=150)


def checkpoint_on_a_worker(rank: int, world_size: int, counts: list[int]) -> None:
    for norm in ("ShuffleBN", "SyncBN", "BatchRenorm"):
        for use_reentrant in (False, True):
            plain, model = (block(norm) for _ in range(2))
            x = torch.randn(counts[rank], 16, 4, 4)

            def run(
                x: Tensor, model: nn.Module = model, use_reentrant: bool = use_reentrant
            ) -> Tensor:
                return checkpoint(model, x, use_reentrant=use_reentrant)

            for _ in range(2):
                actual, expected = step(run, x), step(plain, x)
                if counts[rank] > 0:
                    assert_close(actual, expected, 1e-6)
            assert_close(results(model), results(plain), 1e-6)
            # 7 before; a worker without rows moves what it shares alone.
            moved = 0 if norm == "BatchRenorm" and counts[rank] == 0 else 2
            assert int(model.bn1.num_batches_tracked) == 7 + moved


@pytest.mark.timeout(120)
@pytest.mark.parametrize("counts", [[5, 3], [4, 0]])
def test_activation_checkpointing(counts: list[int]) -> None:
    run_workers(checkpoint_on_a_worker, 2, counts)


def ddp_on_a_worker(rank: int, world_size: int, norm: str, x: Tensor) -> dict[str, Tensor]:
    model = block(norm, seed=rank)  # DDP starts from the weights of worker 0.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    mine = x[:5] if rank == 0 else x[5:]
    y = wrapped(mine)
    gradient = torch.linspace(0, 9, 8 * y[0].numel()).sin().view(8, *y.shape[1:])
    (y * (gradient[:5] if rank == 0 else gradient[5:])).sum().backward()
    return results(model)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "ShuffleBN"])
def test_ddp_equals_virtual_workers(norm: str) -> None:
    x = rows()
    model = block(norm, virtual_workers=2)
    set_rows_per_image([5, 3])
    step(model, x)
    first, second = run_workers(ddp_on_a_worker, 2, norm, x)
    for key, expected in results(model).items():
        if key.startswith("d"):  # DDP averages
            expected = expected / 2
            assert torch.equal(first[key], second[key])
        average = (first[key].double() + second[key].double()) / 2
        assert error(average, expected) < 1e-5, key


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_export_and_trace_after_conversion_to_plain() -> None:
    model = block("ShuffleBN", virtual_workers=2)
    step(model, rows())
    x = rows(3)
    with torch.no_grad():
        expected = model.eval()(x)
        plain = to_plain_batch_norm(model)
        exported = torch.export.export(plain, (x,)).module()
        assert error(exported(x), expected) < 1e-6
        traced = torch.jit.trace(plain, (x,))
        assert error(traced(x), expected) < 1e-6
