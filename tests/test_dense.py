"""Dense heads: equal to Detectron2's where that has them, and what only they can do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from distributed import run_workers
from reference import relative_error
from torch import Tensor, nn

import bn_detection
from bn_detection import ConfigError, configure_model, convert_norm, to_plain_batch_norm
from bn_detection.engine import check_config
from bn_detection.heads import BNFCOSHead, BNOptions, norm_names
from bn_detection.norm import LevelBatchNorm2d, LevelOptions, PartitionedBatchNorm2d
from bn_detection.population import (
    apply_statistics,
    average_running_statistics,
    collect_statistics,
)

LEVELS = ["p2", "p3", "p4"]
COMBINATIONS = list(itertools.product(("shared", "separate"), repeat=3))


def config(*options: object, arch: str = "BNRetinaNet") -> CfgNode:
    cfg = get_cfg()
    bn_detection.add_bn_detection_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = "SmallPyramidBackbone"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    cfg.MODEL.RETINANET.IN_FEATURES = LEVELS
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    cfg.MODEL.RETINANET.NUM_CONVS = 2
    cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    cfg.OUTPUT_DIR = "/nonexistent"
    cfg.SEED = 3
    cfg.merge_from_list(list(options))
    return cfg


def choices(train: str, population: str, affine: str) -> list[str]:
    return [
        *("BN.LEVELS.TRAIN", train),
        *("BN.LEVELS.POPULATION", population),
        *("BN.LEVELS.AFFINE", affine),
    ]


def build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "BNRetinaNet":
        configure_model(cfg, model)
    with torch.no_grad():  # anchors of an untrained head would all have the same score
        for parameter in model.head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(number: int = 2, side: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(number):
        corner = torch.randint(0, side // 2, (3, 2), generator=generator)
        size = torch.tensor([[16, 16], [24, 32], [32, 20]])
        boxes = Boxes(torch.cat([corner, corner + size], dim=1).float())
        objects = Instances((side, side), gt_boxes=boxes, gt_classes=torch.tensor([0, 1, 3]))
        image = torch.randint(0, 255, (3, side, side), generator=generator)
        batch.append({"image": image, "height": side, "width": side, "instances": objects})
    return batch


def train_step(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Losses, gradients and buffers."""
    model.train().zero_grad()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return {
        **{key: loss.detach() for key, loss in losses.items()},
        **{key: parameter.grad for key, parameter in model.named_parameters()},
        **{key: value.clone() for key, value in model.named_buffers()},
    }


@torch.no_grad()
def detections(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    found = [output["instances"] for output in model.eval()(batch)]
    return {
        "boxes": torch.cat([f.pred_boxes.tensor for f in found]),
        "scores": torch.cat([f.scores for f in found]),
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {
        # The bias of a convolution before BN has no gradient but rounding errors.
        key: relative_error(actual[key], value) if value.abs().max() > 1e-7 else 0.0
        for key, value in expected.items()
    }
    assert max(errors.values()) < tolerance, errors


def test_the_default_is_detectron2s_retinanet() -> None:
    stock, ours = build(config(arch="RetinaNet")), build(config())
    assert any(isinstance(m, CycleBatchNormList) for m in stock.modules())
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    for seed in range(2):
        batch = images(seed=seed)
        assert_equal(train_step(ours, batch), train_step(stock, batch), 1e-4)
    assert_equal(detections(ours, images()), detections(stock, images()), 1e-4)


@pytest.mark.parametrize("norm", ["", "GN", "FrozenBN"])
def test_norms_that_detectron2_has(norm: str) -> None:
    stock = build(config("MODEL.RETINANET.NORM", norm, arch="RetinaNet"))
    ours = build(config("MODEL.RETINANET.NORM", norm))
    ours.load_state_dict(stock.state_dict())
    assert_equal(train_step(ours, images()), train_step(stock, images()), 1e-6)
    assert_equal(detections(ours, images()), detections(stock, images()), 1e-6)


@pytest.mark.parametrize("norm", norm_names())
@pytest.mark.parametrize("train", ["shared", "separate"])
def test_every_norm_trains_and_infers(norm: str, train: str) -> None:
    levels = choices(train, train, "shared")
    model = build(config("MODEL.RETINANET.NORM", norm, "BN.VIRTUAL_WORKERS", 2, *levels))
    result = train_step(model, images())
    assert all(torch.isfinite(value).all() for value in result.values())
    layers = [m for m in model.modules() if isinstance(m, PartitionedBatchNorm2d)]
    has_batches = norm not in ("", "IN", "GN", "LN", "FrozenBN")
    assert len(layers) == has_batches * 4 * (1 if train == "shared" else len(LEVELS))
    assert all(layer.num_batches_tracked == 1 for layer in layers)
    assert all(layer.name.startswith("head.") for layer in layers)
    assert len(detections(model, images())["scores"]) > 0


@pytest.mark.parametrize("levels", COMBINATIONS)
def test_every_combination_trains_recalibrates_and_infers(levels: tuple[str, ...]) -> None:
    model = build(config(*choices(*levels)))
    train_step(model, images())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [images(1, seed=seed) for seed in range(3)]
    with EventStorage():
        statistics = collect_statistics(model, batches, 3, modules=["head.*"])
    number = len(LEVELS) if levels[1] == "separate" else 1
    assert len(statistics) == 4 * number
    positions = [images(1)[0]["image"].shape[1] ** 2 // stride**2 for stride in (4, 8, 16)]
    seen = [statistics[f"head.cls_subnet.1.{k}"].count for k in range(number)]
    assert seen == [3 * p for p in positions] if number > 1 else seen == [3 * sum(positions)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    apply_statistics(model, statistics)
    assert len(detections(model, images())["scores"]) > 0


def test_recalibrating_rows_1_and_2_differs_in_the_normalization() -> None:
    """Row 2 is row 1's training; its population is collected level by level."""
    row1 = build(config(*choices("shared", "shared", "shared")))
    row2 = build(config(*choices("shared", "separate", "shared")))
    row2.load_state_dict(row1.state_dict())
    first, second = train_step(row1, images()), train_step(row2, images())
    same = {key: value for key, value in first.items() if "running" not in key and "num" not in key}
    assert_equal({key: second[key] for key in same}, same, 1e-4)

    batches = [images(2, seed=seed) for seed in range(2)]
    with EventStorage():
        separate = collect_statistics(row2, batches, 2, modules=["head.cls_subnet.*"])
    # Stock RetinaNet in training normalizes each level with its own statistics.
    stock = build(config(arch="RetinaNet"))
    stock.load_state_dict(row2.state_dict())
    with EventStorage():
        expected = collect_statistics(stock.train(), batches, 2, modules=["head.cls_subnet.*"])
    assert separate.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(separate[key].mean, value.mean) < 1e-4, key
        assert relative_error(separate[key].var, value.var) < 1e-4, key


@pytest.mark.parametrize("affine", ["shared", "separate"])
@pytest.mark.parametrize("population", ["shared", "separate"])
@pytest.mark.parametrize("train", ["shared", "separate"])
def test_export_to_stock_detectron2(train: str, population: str, affine: str) -> None:
    model = build(config(*choices(train, population, affine)))
    for seed in range(2):
        train_step(model, images(seed=seed))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if affine == "separate":
        with pytest.raises(ValueError, match=r'head\.cls_subnet\.1.*BN\.LEVELS\.AFFINE "separate"'):
            to_plain_batch_norm(model)
        assert list(model.state_dict()) == list(before)
        assert any(isinstance(m, PartitionedBatchNorm2d) for m in model.modules())
        return
    expected = detections(model, images())
    weight = model.head.cls_subnet[1].weight
    assert to_plain_batch_norm(model) is model
    assert model.head.cls_subnet[1].weight is weight
    assert not any(isinstance(m, PartitionedBatchNorm2d) for m in model.modules())
    assert_equal(detections(model, images()), expected, 1e-4)
    stock = build(config(arch="RetinaNet"))
    stock.load_state_dict(model.state_dict())
    assert_equal(detections(stock, images()), expected, 1e-4)
    # Its levels have statistics of their own to move.
    train_step(model, images())
    first, second = (model.head.cls_subnet[1][k].running_mean for k in (0, 1))
    assert not torch.equal(first, second)


def test_a_list_by_itself_is_exported() -> None:
    plain = to_plain_batch_norm(LevelBatchNorm2d(3, 2, LevelOptions("shared", "shared")))
    assert isinstance(plain, CycleBatchNormList)
    assert len(plain) == 2


def two_workers(rank: int, world_size: int, norm: str, levels: tuple[str, ...]) -> dict[str, Any]:
    model = build(config("MODEL.RETINANET.NORM", norm, *choices(*levels)))
    result = train_step(model, images(1 + rank, 64 + 32 * rank, seed=rank))
    average_running_statistics(model)
    return {
        "buffers": {key: value for key, value in model.named_buffers() if "head" in key},
        "finite": all(torch.isfinite(value).all() for value in result.values()),
    }


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "ShuffleBN"])
@pytest.mark.timeout(120)
def test_workers_with_unequal_images_end_with_the_same_statistics(norm: str) -> None:
    for levels in COMBINATIONS[::2]:
        first, second = run_workers(two_workers, 2, norm, levels)
        assert first["finite"] and second["finite"]
        for key, value in first["buffers"].items():
            assert torch.equal(value, second["buffers"][key]), key


def test_another_number_of_levels_is_an_error() -> None:
    model = build(config())
    for head in (model.head, fcos_head("BN"), fcos_head("")):
        channels = 32
        features = [torch.zeros(1, channels, 8, 8)] * 2
        with pytest.raises(ValueError, match=r"Head: 2 feature levels.*for 3 levels"):
            head(features)


def fcos_head(norm: str, levels: LevelOptions | None = None) -> BNFCOSHead:
    torch.manual_seed(0)
    return BNFCOSHead(
        input_shape=[ShapeSpec(channels=32)] * 3,
        num_classes=4,
        conv_dims=[32, 32],
        norm=norm,
        levels=levels,
    )


def test_fcos_head_is_detectron2s() -> None:
    ours = fcos_head("BN")
    stock = FCOSHead(
        input_shape=[ShapeSpec(channels=32)] * 3, num_classes=4, conv_dims=[32, 32], norm="BN"
    )
    stock.load_state_dict(ours.state_dict())
    features = [torch.randn(2, 32, 16 >> k, 16 >> k) for k in range(3)]
    for mode in (True, False):
        pairs = zip(ours.train(mode)(features), stock.train(mode)(features), strict=True)
        for mine, theirs in pairs:
            for y, expected in zip(mine, theirs, strict=True):
                assert relative_error(y, expected) < 1e-4
    shared = fcos_head("SyncBN", LevelOptions("shared", "shared"))
    outputs = shared(features)
    assert [len(part) for part in outputs] == [3, 3, 3]
    (layer,) = shared.bbox_subnet[1]
    assert layer.num_batches_tracked == 1


def refusal(*options: object, arch: str = "BNRetinaNet") -> str:
    with pytest.raises(ConfigError) as info:
        cfg = config("SOLVER.IMS_PER_BATCH", 2, *options, arch=arch)
        check_config(cfg, num_workers=2, eval_only=False, resume=False)
    return str(info.value)


def test_inference_of_the_stock_head_with_syncbn_needs_no_gpu() -> None:
    cfg = config("MODEL.RETINANET.NORM", "SyncBN", arch="RetinaNet")
    check_config(cfg, num_workers=2, eval_only=True, resume=False)


ROW2 = ["BN.LEVELS.TRAIN", "shared"]
ROW3 = ["BN.LEVELS.POPULATION", "shared"]


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("BNRetinaNet", ["BN.LEVELS.TRAIN", "all"], ["BN.LEVELS.TRAIN", '"all"', '"separate"']),
        ("BNRetinaNet", ["MODEL.RETINANET.NORM", "Shuffle"], ["RETINANET.NORM", '"ShuffleBN"']),
        (
            "RetinaNet",
            ["MODEL.RETINANET.NORM", "ShuffleBN"],
            ['MODEL.RETINANET.NORM is "ShuffleBN"', '"BNRetinaNet"'],
        ),
        (
            "RetinaNet",
            ["MODEL.RETINANET.NORM", "SyncBN"],
            ['MODEL.RETINANET.NORM is "SyncBN"', "CPU", '"BNRetinaNet"'],
        ),
        ("RetinaNet", ROW2, ['BN.LEVELS.TRAIN is "shared"', '"RetinaNet"', '"BNRetinaNet"']),
        (
            "GeneralizedRCNN",
            ["BN.LEVELS.AFFINE", "separate"],
            ['BN.LEVELS.AFFINE is "separate"', '"GeneralizedRCNN"', '"BNRetinaNet"'],
        ),
        (
            "BNRetinaNet",
            ["MODEL.RETINANET.NORM", "BatchRenorm", *ROW2],
            ["BatchRenorm", "BN.LEVELS.TRAIN", "BN.LEVELS.POPULATION"],
        ),
        (
            "BNRetinaNet",
            ["MODEL.RETINANET.NORM", "ShuffleBN", "BN.SHUFFLE.MODE", "features"],
            ["BN.SHUFFLE.MODE features", "BN.SHUFFLE.MODE statistics"],
        ),
        (
            "BNRetinaNet",
            ["BN.POPULATION.ESTIMATOR", "fvcore", *ROW2],
            ["fvcore", "BN.LEVELS.TRAIN", '"pooled"'],
        ),
        (
            "BNRetinaNet",
            ["TEST.PRECISE_BN.ENABLED", "True", *ROW3],
            ["TEST.PRECISE_BN", "BN.LEVELS.TRAIN", '"pooled"'],
        ),
    ],
)
def test_bad_config_is_refused_by_name(arch: str, options: list[str], words: list[str]) -> None:
    message = refusal(*options, arch=arch)
    for word in words:
        assert word in message, message


def test_conversion_of_levels() -> None:
    model = build(config(*choices("shared", "separate", "shared")))
    converted = convert_norm(model, "ImageBN", "head", options=BNOptions())
    assert len(converted) == 4 * len(LEVELS)
    assert all(torch.isfinite(v).all() for v in train_step(model, images()).values())
    for norm in ("GN", "FrozenBN", "", "BatchRenorm"):
        before = str(model)
        with pytest.raises(ValueError, match=r"head\.\w+_subnet\.\d: .*BN\.LEVELS"):
            convert_norm(model, norm, "head")
        assert str(model) == before


@pytest.mark.parametrize("make", [lambda: build(config()).head, lambda: fcos_head("BN")])
def test_heads_are_copied_and_printed(make: Callable[[], nn.Module]) -> None:
    import copy

    head = copy.deepcopy(make())
    assert "LevelBatchNorm2d" in str(head)
