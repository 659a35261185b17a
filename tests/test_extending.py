"""The code of docs/extending runs, as it stands there, and does what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, build_box_head
from distributed import run_workers
from PIL import Image
from reference import CHANNELS, assert_close, reference_step, samples, set_affine, step
from test_diagnose import examined, layer
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from bn_detection import (
    ConfigError,
    PartitionedBatchNorm2d,
    add_bn_detection_config,
    convert_norm,
    diagnose,
    measure_leakage,
)
from bn_detection.data import CORRUPTIONS, read_corrupted_name, register_corruption
from bn_detection.detectors import detector, detector_of
from bn_detection.engine import check_config
from bn_detection.heads import PartitionedHead, norm_names
from bn_detection.leakage.findings import conclude, rules
from bn_detection.norm import build_partition, partition, partition_name, set_rows_per_image
from bn_detection.population import ESTIMATORS, register_estimator

PAGES = Path(__file__).parents[1] / "docs" / "extending"
SHAPE = ShapeSpec(channels=CHANNELS, height=7, width=7)


def run_page(name: str) -> dict[str, Any]:
    """What the Python blocks of a page define, run one after the other."""
    text = (PAGES / f"{name}.md").read_text()
    names: dict[str, Any] = {"__name__": f"docs.extending.{name}"}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, f"{name}.md", "exec"), names)
    return names


REGISTRIES = (
    *(partition._REGISTRY, ESTIMATORS, CORRUPTIONS, detector._REGISTRY),
    *(rules._REGISTRY, ROI_BOX_HEAD_REGISTRY._obj_map),
)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)


# ----------------------------------------------------------------------------------------------
# A partition
# ----------------------------------------------------------------------------------------------


def test_partition_of_image_pairs() -> None:
    run_page("partition")
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition="ImagePairs"))
    x, grad = (samples([9], seed)[0] for seed in range(2))
    set_rows_per_image([3, 0, 1, 2, 3])
    actual = step(layer, x, grad)
    expected = reference_step(x, grad, torch.tensor([0] * 3 + [1] * 3 + [2] * 3))
    assert_close(actual, expected)
    assert "ImagePairs" in norm_names()


def _step_of_worker_pairs(rank: int, world_size: int, sizes: list[int]) -> dict[str, Tensor]:
    if "WorkerPairs" not in partition.partition_names():
        run_page("partition")
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition="WorkerPairs"))
    return step(layer, samples(sizes)[rank], samples(sizes, seed=1)[rank])


@pytest.mark.timeout(120)
def test_partition_of_worker_pairs() -> None:
    sizes = [4, 2, 3]
    results = run_workers(_step_of_worker_pairs, 3, sizes)
    x, grad = (torch.cat(samples(sizes, seed)) for seed in range(2))
    expected = reference_step(x, grad, torch.tensor([0] * 6 + [1] * 3))
    for key in ("y", "grad_x"):
        actual = torch.cat([result[key] for result in results])
        assert_close({key: actual}, {key: expected[key]})
    for result in results:
        assert_close(result, {k: expected[k] for k in ("running_mean", "running_var")})


@pytest.mark.parametrize(
    ("options", "ids"),
    [({}, [0] * 9), ({"size": 4}, [0] * 4 + [1] * 5), ({"size": 3}, [0] * 3 + [1] * 3 + [2] * 3)],
)
def test_partition_with_an_option(options: dict[str, int], ids: list[int]) -> None:
    page = run_page("partition")
    assert (page["layer"].partition.size, page["model"][1].partition.size) == (16, 16)
    made = build_partition("RowGroups", **options)
    assert partition_name(made) == "RowGroups"
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition=made))
    x, grad = (samples([9], seed)[0] for seed in range(2))
    assert_close(step(layer, x, grad), reference_step(x, grad, torch.tensor(ids)))


def config(*options: object) -> CfgNode:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "BNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = CHANNELS
    cfg.merge_from_list(list(options))
    return cfg


ROW_GROUPS = ("MODEL.ROI_BOX_HEAD.NORM", "RowGroups")


def test_option_of_a_partition_from_a_config() -> None:
    run_page("partition")
    cfg = config(*ROW_GROUPS, "BN.PARTITION_OPTIONS", [["size", 5]])
    check_config(cfg, num_workers=1, eval_only=True, resume=False)
    assert build_box_head(cfg, SHAPE).conv1.norm.partition.size == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*ROW_GROUPS, "BN.PARTITION_OPTIONS", [["sze", 5]]], r"'sze'.* options: \"size\""),
        ([*ROW_GROUPS, "BN.PARTITION_OPTIONS", [["size", 1]]], r"size is 1: .* at least 2 rows"),
        ([*ROW_GROUPS, "BN.PARTITION_OPTIONS", ["size", 5]], r"each entry is \[option, value\]"),
        (["BN.PARTITION_OPTIONS", [["size", 5]]], r"no NORM is .* Those are: .*RowGroups"),
        (
            ["BN.CONVERT", [["roi_heads.*", "RowGroups"]], "BN.PARTITION_OPTIONS", [["x", 5]]],
            r"\[\['x', 5\]\], for BN.CONVERT \['roi_heads.\*', 'RowGroups'\]",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[Any], message: str) -> None:
    run_page("partition")
    with pytest.raises(ConfigError, match=rf"BN\.PARTITION_OPTIONS .*{message}"):
        check_config(config(*options), num_workers=1, eval_only=True, resume=False)


def test_partition_that_misses_an_option() -> None:
    @partition.register_partition("Needy")
    class Needy(partition.Partition):
        def __init__(self, size: int, virtual_workers: int) -> None:
            self.sizes = size, virtual_workers

    with pytest.raises(ValueError, match="\"Needy\": missing a required argument: 'size'"):
        build_partition("Needy")
    assert build_partition("Needy", size=1, virtual_workers=2).sizes == (1, 2)


# ----------------------------------------------------------------------------------------------
# A head
# ----------------------------------------------------------------------------------------------


def head(norm: str, *options: object) -> PartitionedHead:
    """The head of the page, with the same parameters at each call."""
    node = "MODEL.ROI_BOX_HEAD"
    cfg = config(f"{node}.NAME", "PooledBoxHead", f"{node}.NUM_CONV", 2, *options)
    cfg.merge_from_list([f"{node}.NORM", norm, "SEED", 3])
    torch.manual_seed(0)
    return build_box_head(cfg, SHAPE)


# 32 groups need more channels.
@pytest.mark.parametrize("norm", [name for name in norm_names() if name != "GN"])
def test_head_with_any_norm(norm: str) -> None:
    run_page("head")
    made = head(norm)
    for sizes in ([4, 3], [0, 0]):
        set_rows_per_image(sizes)
        x = samples([sum(sizes)], shape=(7, 7))[0].requires_grad_()
        y = made(x)
        y.sum().backward()
        assert y.shape == (sum(sizes), *made.output_shape[:1]) and x.grad.shape == x.shape


def test_head_with_image_batches_is_bn_on_each_image() -> None:
    run_page("head")
    x = samples([9], shape=(7, 7))[0]
    set_rows_per_image([4, 5])
    together, of_image = head("ImageBN")(x), head("BN")
    apart = torch.cat([of_image(part) for part in x.split([4, 5])])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def _head_on_worker(rank: int, world_size: int, norm: str, *options: object) -> Tensor:
    if "PooledBoxHead" not in ROI_BOX_HEAD_REGISTRY:
        run_page("head")
    return head(norm, *options)(samples([4, 5], shape=(7, 7))[rank]).detach()


@pytest.mark.timeout(120)
def test_head_over_workers() -> None:
    """SyncBN is BN of all RoIs; shuffled features are shuffled statistics."""
    run_page("head")
    x = torch.cat(samples([4, 5], shape=(7, 7)))
    found = torch.cat(run_workers(_head_on_worker, 2, "SyncBN"))
    torch.testing.assert_close(found, head("BN")(x).detach(), rtol=1e-4, atol=1e-5)
    modes = [
        torch.cat(run_workers(_head_on_worker, 2, "ShuffleBN", "BN.SHUFFLE.MODE", mode))
        for mode in ("statistics", "features")
    ]
    torch.testing.assert_close(*modes, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(modes[0], found, atol=1e-3)


# ----------------------------------------------------------------------------------------------
# An estimator
# ----------------------------------------------------------------------------------------------


def test_estimator() -> None:
    page = run_page("estimator")
    conv, layer = page["model"]
    outputs = torch.stack([conv(batch).double() for batch in page["batches"]]).detach()
    means, variances = outputs.mean((1, 3, 4)), outputs.transpose(1, 2).flatten(2).var(2)
    found = page["statistics"]["1"]
    torch.testing.assert_close(found.mean, means.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.var, variances.log().mean(0).exp(), rtol=1e-5, atol=0)
    error = means.std(0) / len(means) ** 0.5
    torch.testing.assert_close(found.mean_error, error, rtol=1e-4, atol=0)
    assert found.count == outputs[:, :, 0].numel()
    torch.testing.assert_close(layer.running_var.double(), found.var, rtol=1e-6, atol=0)
    cfg = config("BN.POPULATION.ESTIMATOR", "geometric")
    check_config(cfg, num_workers=1, eval_only=True, resume=False)


@pytest.mark.parametrize("name", ["pooled", "ema", "fvcore"])
def test_name_of_an_estimator_is_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f'estimator "{name}" is registered already'):
        register_estimator(name)(nn.Identity)


# ----------------------------------------------------------------------------------------------
# A finding
# ----------------------------------------------------------------------------------------------


def test_finding() -> None:
    run_page("finding")
    small = [layer(values_per_batch=number) for number in (9.0, 100.0)]
    (found,), _ = conclude(examined(layers=small))
    assert (found.id, found.severity, len(found.layers)) == ("MY101", "finding", 1)
    assert found.evidence[0].value == 9
    assert found.fix == {"BN": {"CONVERT": [["*", "SyncBN"]]}}
    more = ("BN.DIAGNOSIS.THRESHOLDS", [["MY101", 5]])
    assert conclude(examined(layers=small, more=more))[0] == []


# ----------------------------------------------------------------------------------------------
# A family of detectors
# ----------------------------------------------------------------------------------------------


def test_family_of_detectors() -> None:
    """Measured, and its batches by image are those of each image's RoIs."""
    page = run_page("detector")
    torch.manual_seed(0)
    model = page["RowDetector"]()
    assert type(detector_of(model)) is page["Adapter"]
    items = [(torch.rand(3, 40, 40), {"boxes": [[0, 0, 16, 16]], "labels": [1]}) for _ in range(8)]
    report = measure_leakage(model, items)
    assert report.batch_norms == ["head.layers.0"] and report.modes["image"]["box_ap"].is_known
    found = {layer.name: layer.rows for layer in diagnose(model, items).layers}
    assert found == {"backbone.1": "images", "head.layers.0": "RoIs"}
    convert_norm(model, "ImageBN", "head.layers")
    x = torch.stack([image for image, _ in items])
    boxes = torch.tensor([[0.0, 0, 16, 16], [16, 16, 32, 32]])
    rois = model.head.pooler(model.backbone(x), boxes)
    expected = [batch_norm(part, None, None, training=True).relu() for part in rois.split(2)]
    actual = model.head.layers(model.head.pooler(model.backbone(x), boxes))
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------
# A corruption
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [1, 5])
def test_corruption(tmp_path: Path, severity: int) -> None:
    run_page("corruption")
    image = np.random.default_rng(0).integers(1, 256, (50, 20, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    _, prefix = read_corrupted_name(f"some_dataset@dead_lines:{severity}")
    found = [read_image(f"{prefix}{tmp_path}/a.png", format="RGB") for _ in range(2)]
    np.testing.assert_array_equal(*found)
    dead = (found[0] == 0).all((1, 2))
    assert dead.sum() == severity
    np.testing.assert_array_equal(found[0][~dead], image[~dead])


def test_corruption_that_gives_another_shape(tmp_path: Path) -> None:
    register_corruption("halved")(lambda image, severity, seed: image[::2])
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"halved made uint8 of shape \(4, 8, 3\)"):
        read_image(f"corrupted://halved:1/{tmp_path}/a.png", format="RGB")


@pytest.mark.parametrize(
    ("name", "message"), [("fog", "registered already"), ("a:b", "letters, digits")]
)
def test_name_of_a_corruption_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f'The corruption "{name}".*{message}'):
        register_corruption(name)(lambda image, severity, seed: image)
