"""The registered heads against Detectron2's own, against formulas, and over several workers."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints
from detectron2.utils.events import EventStorage
from distributed import run_workers
from reference import ghosts, relative_error
from torch import Tensor, nn

from bn_detection import PartitionedBatchNorm2d, add_bn_detection_config, configure_model
from bn_detection.heads import (
    BNConvDeconvKeypointHead,
    BNConvFCHead,
    BNConvUpsampleHead,
    BNOptions,
)
from bn_detection.norm import (
    Groups,
    RenormSchedule,
    Rows,
    set_rows_per_image,
    shuffled_groups,
)

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
CHANNELS = 64
HEADS = {
    "box": (BNConvFCHead, FastRCNNConvFCHead, {"conv_dims": [64, 64], "fc_dims": [16]}),
    "mask": (
        BNConvUpsampleHead,
        MaskRCNNConvUpsampleHead,
        {"conv_dims": [64, 64, 32], "num_classes": 3},
    ),
    "keypoint": (
        BNConvDeconvKeypointHead,
        KRCNNConvDeconvUpsampleHead,
        {"conv_dims": [64, 64], "num_keypoints": 3},
    ),
}
BN_KINDS = ("BN", "SyncBN", "ShuffleBN", "GhostBN", "ImageBN", "BatchRenorm")
KINDS = ("", *BN_KINDS, "IN", "GN", "LN", "FrozenBN")

every_head = pytest.mark.parametrize("head", HEADS)


def build(head: str, norm: str, **options: Any) -> nn.Module:
    """A head of this project; the same weights at every call."""
    torch.manual_seed(0)
    cls, _, arguments = HEADS[head]
    shape = ShapeSpec(channels=CHANNELS, height=5, width=5)
    options = BNOptions(shuffle_seed=3, **options)
    module = cls(shape, conv_norm=norm, bn_options=options, **arguments)
    for scope in (module.bn_scope, module.shuffle):
        if scope is not None:
            scope.rename("roi_heads.head")
    return with_logits(module)


def build_stock(head: str, norm: str) -> nn.Module:
    """Detectron2's head; its keypoint head gets its BN by hand, as it has none."""
    torch.manual_seed(0)
    _, cls, arguments = HEADS[head]
    shape = ShapeSpec(channels=CHANNELS, height=5, width=5)
    if head != "keypoint":
        return with_logits(cls(shape, conv_norm=norm, **arguments))
    module = cls(shape, **arguments)
    for conv in (module.conv_fcn1, module.conv_fcn2):
        if norm == "BN":
            conv.bias, conv.norm = None, nn.BatchNorm2d(64)
    return with_logits(module)


def with_logits(module: nn.Module) -> nn.Module:
    """Mask and keypoint heads return losses; here they return what the losses are computed from."""
    if hasattr(module, "layers"):
        module.forward = module.layers
    return module


def randomize(module: nn.Module) -> None:
    """Affine parameters and statistics of every norm layer, as after some training."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if ".norm." in name and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(5)


def rois(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed))


def backward(y: Tensor) -> None:
    """From a gradient that differs by output channel."""
    y.backward(torch.ones_like(y) * torch.arange(y.shape[1]).view(-1, *[1] * (y.dim() - 2)))


STOCK_NORMS = [(h, n) for h in ("box", "mask") for n in ("", "BN", "GN", "FrozenBN")]


@pytest.mark.parametrize(("head", "norm"), [*STOCK_NORMS, ("keypoint", ""), ("keypoint", "BN")])
def test_head_is_detectron2s(head: str, norm: str) -> None:
    ours, theirs = build(head, norm), build_stock(head, norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), f"{name} as initialized"
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    outputs = []
    for module in (ours, theirs):
        outputs.append(module.train()(rois(6)))
        backward(outputs[-1])
    assert torch.equal(*outputs)
    for (name, mine), parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, parameter.grad), name
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), f"{name} after a step"
    assert torch.equal(ours.eval()(rois(6, seed=1)), theirs.eval()(rois(6, seed=1)))


@every_head
@pytest.mark.parametrize("norm", KINDS[1:])
def test_every_kind_starts_from_detectron2s_initialization(head: str, norm: str) -> None:
    ours, stock = build(head, norm).state_dict(), build_stock(head, "BN").state_dict()
    for name in stock.keys() - ours.keys():
        assert ".norm." in name, f"{name} is missing"
    for name, value in ours.items():
        if name.endswith(("norm.weight", "norm.bias")):
            assert (value == float(name.endswith("weight"))).all(), name
        elif ".norm." not in name:
            assert torch.equal(value, stock[name]), name


def test_keypoint_head_with_bn_is_a_sequential_of_torch_layers() -> None:
    ours = build("keypoint", "BN")
    randomize(ours)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k in (1, 2):
        layers[f"conv_fcn{k}"] = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        layers[f"bn{k}"] = nn.BatchNorm2d(64)
        layers[f"relu{k}"] = nn.ReLU()
    layers["score_lowres"] = nn.ConvTranspose2d(64, 3, 4, stride=2, padding=1)
    layers["up"] = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    reference = nn.Sequential(layers)
    names = {
        k: k.replace("conv_fcn1.norm", "bn1").replace("conv_fcn2.norm", "bn2")
        for k in ours.state_dict()
    }
    reference.load_state_dict({names[k]: v for k, v in ours.state_dict().items()})
    reference.double()
    x = rois(6)
    for module, values in ((ours, x), (reference, x.double())):
        backward(module.train()(values))
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[names[name]]) < 1e-5, name
    for name, value in ours.state_dict().items():
        assert relative_error(value, reference.state_dict()[names[name]]) < 1e-6, name
    assert relative_error(ours.eval()(x), reference.eval()(x.double())) < 1e-5


PER_IMAGE = [4, 0, 5, 2]
OPTIONS = {
    "BN": {"virtual_workers": 2},
    "ShuffleBN": {"virtual_workers": 2},
    "GhostBN": {"ghost_size": 3},
    "BatchRenorm": {
        "renorm_partition": "image",
        "renorm": RenormSchedule(r_max=1.1, d_max=0.2, warmup=2, r_steps=4, d_steps=5),
    },
}


def groups_of(norm: str) -> list[int] | None:
    """The group of each of the 11 RoIs of PER_IMAGE, written out."""
    groups = {
        "BN": [0] * 4 + [1] * 7,
        "SyncBN": [0] * 11,
        "GhostBN": ghosts(11, 3, seed=3, name="roi_heads.head", iteration=12, call=0).tolist(),
        "ImageBN": [0] * 4 + [2] * 5 + [3] * 2,
        "ShuffleBN": shuffled_groups([11], 2, zlib.crc32(b"3/roi_heads.head/12/0"))[0].tolist(),
    }
    return groups.get("ImageBN" if norm == "BatchRenorm" else norm)


def normalize(norm: str, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """What a kind does to ``x`` before the affine map, in float64; statistics are running ones."""
    groups = groups_of(norm)
    if groups is not None:
        ids, out = torch.tensor(groups), torch.zeros_like(x)
        for group in set(groups):
            v, m = torch.var_mean(x[ids == group], (0, 2, 3), correction=0, keepdim=True)
            y = (x[ids == group] - m) / (v + 1e-5).sqrt()
            if norm == "BatchRenorm":
                r = ((v + 1e-5) / (var + 1e-5)).sqrt().clamp(1 / 1.1, 1.1).detach()
                d = ((m - mean) / (var + 1e-5).sqrt()).clamp(-0.2, 0.2).detach()
                y = y * r + d
            out = out.index_put((ids == group,), y)
        return out
    if norm == "FrozenBN":
        return (x - mean) / (var + 1e-5).sqrt()
    shape = {"IN": (11, 64, 1, 25), "GN": (11, 32, 2, 25), "LN": (11, 1, 64, 25)}[norm]
    dims, eps = ((2,), 1e-6) if norm == "LN" else ((2, 3), 1e-5)
    v, m = torch.var_mean(x.reshape(shape), dims, correction=0, keepdim=True)
    return ((x.reshape(shape) - m) / (v + eps).sqrt()).view_as(x)


@every_head
@pytest.mark.parametrize("norm", KINDS[1:])
def test_every_layer_of_every_kind_is_its_formula(head: str, norm: str) -> None:
    module = build(head, norm, **OPTIONS.get(norm, {})).train()
    randomize(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in module.named_modules():
        if name.endswith(".norm"):
            layer.register_forward_hook(
                lambda _, inputs, output, name=name: calls.update({name: (inputs[0], output)})
            )
    set_rows_per_image(PER_IMAGE)
    with EventStorage(start_iter=12):
        y = module(rois(11).requires_grad_())
    assert len(calls) == 2
    for tensors in calls.values():
        for tensor in tensors:
            tensor.retain_grad()
    backward(y)
    for name, (x, output) in calls.items():
        row = (1, -1, 1, 1)
        mean, var, weight, bias = (
            before.get(f"{name}.{key}", torch.zeros(64)).double().view(row)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        exact = x.detach().double().requires_grad_()
        expected = normalize(norm, exact, mean, var) * weight + bias
        assert relative_error(output, expected) < 1e-5, name
        expected.backward(output.grad.double())
        assert relative_error(x.grad, exact.grad) < 1e-5, name


@every_head
@pytest.mark.parametrize("norm", KINDS)
def test_no_rois(head: str, norm: str) -> None:
    module = build(head, norm)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    shape = module.eval()(rois(1)).shape[1:]
    set_rows_per_image([0, 0])
    for training in (True, False):
        module.zero_grad()
        x = rois(0).requires_grad_()
        with EventStorage():
            y = module.train(training)(x)
        assert y.shape == (0, *shape)
        y.sum().backward()
        assert x.grad.shape == x.shape
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"DDP waits for the gradient of {name}"
            assert (parameter.grad == 0).all(), name
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_head
@pytest.mark.parametrize("norm", BN_KINDS)
def test_every_kind_of_bn_loads_in_a_stock_head_and_back(head: str, norm: str) -> None:
    ours, theirs = build(head, norm), build_stock(head, "BN")
    set_rows_per_image([4, 2])
    with EventStorage():
        ours.train()(rois(6))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    expected = theirs.eval()(rois(4, seed=1))
    assert torch.equal(ours.eval()(rois(4, seed=1)), expected)
    again = build(head, norm)
    assert not torch.equal(again.eval()(rois(4, seed=1)), expected)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again.eval()(rois(4, seed=1)), expected)


@every_head
def test_unknown_norm_lists_the_choices(head: str) -> None:
    with pytest.raises(ValueError, match=r'NORM is "LayerNorm".*"ShuffleBN"'):
        build(head, "LayerNorm")


def _shuffled(
    rank: int, world_size: int, head: str, mode: str, sizes: list[int]
) -> dict[str, Tensor]:
    module = build(head, "ShuffleBN", shuffle_mode=mode)
    x = rois(sizes[rank], seed=rank).requires_grad_()
    with EventStorage(start_iter=12):
        y = module.train()(x)
    backward(y)
    result = {"y": y.detach(), "x.grad": x.grad, **module.state_dict()}
    result.update({f"{name}.grad": p.grad for name, p in module.named_parameters()})
    if rank == 0:  # alone: inference must not wait for the others
        result["inference"] = module.eval()(rois(3, seed=9)).detach()
    return result


@every_head
@pytest.mark.parametrize("mode", ["statistics", "features"])
@pytest.mark.parametrize("sizes", [[6, 4], [9, 0], [2, 0, 0], [4, 0, 5]])
@pytest.mark.timeout(120)
def test_shuffled_head_is_a_stock_head_on_each_group(
    head: str, mode: str, sizes: list[int]
) -> None:
    results = run_workers(_shuffled, len(sizes), head, mode, sizes)
    seed = zlib.crc32(b"3/roi_heads.head/12/0")
    group = torch.cat(shuffled_groups(sizes, len(sizes), seed))
    xs = [rois(n, seed=k).double().requires_grad_() for k, n in enumerate(sizes)]
    heads = {int(g): build_stock(head, "BN").double().train() for g in group.unique()}
    parts = {g: stock(torch.cat(xs)[group == g]) for g, stock in heads.items()}
    y = parts[0].new_zeros(sum(sizes), *parts[0].shape[1:])
    for g, part in parts.items():
        y = y.index_put((group == g,), part)
    backward(y)
    for result, x, expected in zip(results, xs, y.split(sizes), strict=True):
        assert relative_error(result["y"], expected) < 1e-5
        assert relative_error(result["x.grad"], x.grad) < 1e-5
    for name in dict(heads[0].named_parameters()):
        total = sum(stock.get_parameter(name).grad for stock in heads.values())
        assert relative_error(sum(r[f"{name}.grad"] for r in results), total) < 1e-5, name
    for name, _ in heads[0].named_buffers():
        mean = sum(stock.state_dict()[name] for stock in heads.values()) / len(heads)
        layer = name.rpartition(".")[0]
        seen = [r[name] for r in results if r[f"{layer}.num_batches_tracked"] > 0]
        assert relative_error(sum(seen) / len(seen), mean) < 1e-5, name
    stock = build_stock(head, "BN").eval()
    stock.load_state_dict({name: results[0][name] for name in stock.state_dict()})
    assert relative_error(results[0]["inference"], stock(rois(3, seed=9)).double()) < 1e-6


def detector(config: str, *keys: Any) -> nn.Module:
    """The detector of a quickstart config, built and configured as a training script does."""
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.merge_from_file(str(QUICKSTART / f"mask_rcnn_{config}.yaml"))
    cfg.merge_from_list(list(keys))
    torch.manual_seed(0)
    return configure_model(cfg, build_model(cfg))


KEYPOINTS = (
    *("MODEL.KEYPOINT_ON", True),
    *("MODEL.ROI_KEYPOINT_HEAD.NAME", "BNConvDeconvKeypointHead"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16, 16)),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2),
)


@pytest.mark.parametrize("roi_heads", ["StandardROIHeads", "CascadeROIHeads"])
@pytest.mark.parametrize("mode", ["statistics", "features"])
def test_models_are_built_from_yaml_and_their_parts_are_named(roi_heads: str, mode: str) -> None:
    model = detector(
        "shuffle",
        *KEYPOINTS,
        *("MODEL.ROI_KEYPOINT_HEAD.NORM", "ShuffleBN"),
        *("MODEL.ROI_HEADS.NAME", roi_heads),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        *("BN.SHUFFLE.MODE", mode),
    )
    stages = [f"roi_heads.box_head.{k}" for k in range(3)]
    boxes = stages if roi_heads == "CascadeROIHeads" else ["roi_heads.box_head"]
    attribute = "bn_scope" if mode == "statistics" else "shuffle"
    scopes = [scope for m in model.modules() if (scope := getattr(m, attribute, None))]
    assert {s.name for s in scopes} == {"roi_heads.mask_head", "roi_heads.keypoint_head", *boxes}
    assert {s.seed for s in scopes} == {1}
    for name, module in model.named_modules():
        if isinstance(module, PartitionedBatchNorm2d):
            assert module.name == name


def test_heads_of_a_model_have_permutations_of_their_own() -> None:
    model = detector("shuffle", "BN.VIRTUAL_WORKERS", 2, "SOLVER.IMS_PER_BATCH", 2).train()
    heads = {"box": model.roi_heads.box_head, "mask": with_logits(model.roi_heads.mask_head)}
    drawn: list[Tensor] = []

    def record(make: Any) -> Any:
        def made(rows: Rows) -> Groups:
            drawn.append(make(rows).ids)
            return Groups(drawn[-1], 2)

        return made

    for head in heads.values():
        head.bn_scope.make = record(head.bn_scope.make)
    x = rois(40)[:, :, :4, :4]
    box_features = nn.functional.pad(x, (0, 3, 0, 3))
    with EventStorage(start_iter=7) as storage:
        heads["box"](box_features)
        heads["mask"](x)
        heads["box"](box_features)
        storage.step()
        heads["box"](box_features)
        for head, features in (("box", box_features), ("mask", x)):
            heads[head].eval()(features)
    keys = ("box_head/7/0", "mask_head/7/0", "box_head/7/1", "box_head/8/0")
    expected = [
        shuffled_groups([40], 2, zlib.crc32(f"1/roi_heads.{key}".encode()))[0] for key in keys
    ]
    assert len(drawn) == len(expected), "one permutation a call, none in inference"
    for ids, wanted in zip(drawn, expected, strict=True):
        assert torch.equal(ids, wanted)
    assert len({tuple(ids.tolist()) for ids in drawn}) == 4


def sampled_rois(num_rois: int, foreground: int, visible: int) -> Instances:
    """RoIs of an image with labels: the first are foreground, the first of those have keypoints."""
    corner = torch.rand(num_rois, 2) * 60
    boxes = Boxes(torch.cat([corner, corner + 20 + torch.rand(num_rois, 2) * 40], dim=1))
    label = torch.full((num_rois,), 4)
    label[:foreground] = torch.arange(foreground) % 4
    points = torch.cat([boxes.get_centers(), torch.zeros(num_rois, 1)], dim=1)
    points[:visible, 2] = 2
    return Instances(
        (128, 128),
        proposal_boxes=boxes,
        objectness_logits=torch.zeros(num_rois),
        gt_boxes=boxes,
        gt_classes=label,
        gt_masks=BitMasks(torch.ones(num_rois, 128, 128, dtype=torch.bool)),
        gt_keypoints=Keypoints(points[:, None].repeat(1, 2, 1)),
    )


def test_image_bn_groups_the_rois_of_every_head_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector("image", *KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NORM", "ImageBN").train()
    counts = {"box_head": [5, 7, 4], "mask_head": [3, 1, 0], "keypoint_head": [2, 1, 0]}
    sampled = [sampled_rois(*numbers) for numbers in zip(*counts.values(), strict=True)]
    monkeypatch.setattr(model.roi_heads, "label_and_sample_proposals", lambda *_: sampled)
    calls: list[tuple[str, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, PartitionedBatchNorm2d):
            module.register_forward_hook(
                lambda layer, inputs, output: calls.append((layer.name, inputs[0], output))
            )
    images = ImageList(torch.randn(3, 3, 128, 128), [(128, 128)] * 3)
    with EventStorage():
        _, losses = model.roi_heads(
            images, model.backbone(images.tensor), sampled, [Instances((128, 128))] * 3
        )
    assert {"loss_cls", "loss_mask", "loss_keypoint"} <= losses.keys()
    assert len(calls) == 4 + 2 + 2
    for name, x, output in calls:
        expected = []
        for part in x.detach().double().split(counts[name.split(".")[1]]):
            if len(part) > 0:
                var, mean = torch.var_mean(part, (0, 2, 3), correction=0, keepdim=True)
                expected.append((part - mean) / (var + 1e-5).sqrt())
        assert relative_error(output, torch.cat(expected)) < 1e-5, name
