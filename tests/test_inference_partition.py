"""BN.INFERENCE_PARTITION: which rows of a forward of inference share statistics."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_workers
from reference import CHANNELS, clock
from test_inference_batch import NUM_IMAGES, config
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from bn_detection import (
    ConfigError,
    PartitionedBatchNorm2d,
    convert_norm,
    set_inference,
    to_plain_batch_norm,
)
from bn_detection.data import build_test_loader, make_leaky_shapes
from bn_detection.engine import Trainer, argument_parser, check_config, load_config
from bn_detection.engine.setup import evaluation_folder
from bn_detection.norm import (
    Groups,
    ImagePartition,
    Partition,
    ShufflePartition,
    build_partition,
    set_rows_per_image,
)

COUNTS = [5, 0, 2, 9]
RETINANET = Path(__file__).parents[1] / "configs" / "quickstart" / "retinanet_shared.yaml"


class BNRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class BN1dOfMaps(nn.BatchNorm1d):
    """Converts like any: its forward is torch's."""


LAYERS = {
    "torch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "vectors": BN1dOfMaps,
    "ours": PartitionedBatchNorm2d,
    "own forward": BNRelu,
}


def model_of(kind: str) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    layer = LAYERS[kind](CHANNELS).double()
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.uniform_(0.5, 2, generator=generator)
    return nn.Sequential(layer).eval()


def rows_of(kind: str, number: int = sum(COUNTS)) -> Tensor:
    shape = (number, CHANNELS) if kind == "vectors" else (number, CHANNELS, 3, 4)
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(shape, dtype=torch.float64, generator=generator) + 1


def by_hand(x: Tensor, groups: list[list[int]], layer: nn.Module) -> Tensor:
    """``F.batch_norm`` of each group of rows."""
    y = torch.empty_like(x)
    for rows in filter(None, groups):
        y[rows] = batch_norm(x[rows], None, None, layer.weight, layer.bias, training=True)
    return y.relu() if isinstance(layer, BNRelu) else y


def groups_in(model: nn.Sequential, x: Tensor) -> list[list[int]]:
    """Which rows were normalized alike, from their scales alone."""
    layer, y = model[0], model(x)
    scale = (y.flatten(2).std(2) / x.flatten(2).std(2) / layer.weight).round(decimals=8)
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, key in enumerate(map(tuple, scale.tolist())):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_rows_of_an_image_are_normalized_by_themselves(kind: str) -> None:
    model, x = model_of(kind), rows_of(kind)
    by_population, before = model(x), copy.deepcopy(model.state_dict())
    assert set_inference(model, "batch", ["*"], partition="image") == ["0"]
    for _ in range(2):
        set_rows_per_image(COUNTS)
        images = [part.tolist() for part in torch.arange(16).split(COUNTS)]
        assert torch.allclose(model(x), by_hand(x, images, model[0]), rtol=0, atol=1e-12)
    pairs = [list(range(5)), list(range(5, 16))]
    set_inference(model, "batch", ["*"], partition=ImagePartition(images_per_group=2))
    assert torch.allclose(model(x), by_hand(x, pairs, model[0]), rtol=0, atol=1e-12)
    set_inference(model, "batch", ["*"])
    assert torch.allclose(model(x), by_hand(x, [list(range(16))], model[0]), rtol=0, atol=1e-12)
    set_inference(model, "population", ["*"])
    assert torch.allclose(model(x), by_population, rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["torch", "own forward"])
def test_a_shuffle_has_as_many_random_rows_as_images_have(kind: str) -> None:
    model, x = model_of(kind), rows_of(kind)
    set_rows_per_image(COUNTS)
    drawn = []
    for _ in range(2):
        set_inference(model, "batch", ["*"], partition="shuffle")
        (scope,) = scopes(model)
        with clock(7):
            y = model(x)
            ids = scope.get(model[0], x).ids
            assert torch.equal(ids, scope.get(model[0], x).ids)  # of another layer
            model(x)
            assert not torch.equal(ids, scope.get(model[0], x).ids)  # of another forward
        drawn.append(ids)
    assert torch.equal(*drawn)
    groups = [torch.nonzero(ids == group).flatten().tolist() for group in range(3)]
    assert sorted(map(len, groups)) == [5, 5, 6]  # three images have rows
    assert torch.allclose(y, by_hand(x, groups, model[0]), rtol=0, atol=1e-12)
    images = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    assert all(len(images[ids == group].unique()) > 1 for group in range(3))


def scopes(model: nn.Module) -> set[Any]:
    owners = [hook.__self__ for m in model.modules() for hook in m._forward_pre_hooks.values()]
    return {
        scope
        for owner in (*model.modules(), *owners)
        if (scope := getattr(owner, "inference_scope", None)) is not None
    }


def test_groups_are_seen_in_the_outputs_alone() -> None:
    model, x = model_of("torch"), rows_of("torch")
    set_rows_per_image(COUNTS)
    set_inference(model, "batch", ["*"], partition="shuffle")
    assert sorted(map(len, groups_in(model, x))) == [5, 5, 6]
    set_inference(model, "batch", ["*"], partition=ShufflePartition(images_per_group=2))
    assert sorted(map(len, groups_in(model, x))) == [8, 8]
    ghosts = build_partition("ghost", ghost_size=4)
    set_inference(model, "batch", ["*"], partition=ghosts)
    assert sorted(map(len, groups_in(model, x))) == [4, 4, 4, 4]


def test_feature_maps_are_rows_of_their_own() -> None:
    model, x = model_of("torch"), rows_of("torch", 4)
    set_inference(model, "batch", ["*"], partition="image", rows_are_images=True)
    expected = by_hand(x, [[0], [1], [2], [3]], model[0])
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
    set_inference(model, "batch", ["*"], partition="shuffle", rows_are_images=True)
    expected = by_hand(x, [[0, 1, 2, 3]], model[0])
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


class Halves(Partition):
    spans_workers = True

    def groups(self, rows: Any) -> Groups:
        assert (rows.world_size, rows.rank, rows.all_counts()) == (1, 0, [rows.count])
        return Groups(torch.arange(rows.count) % 2, 2)


def test_a_partition_of_ones_own_is_alone_at_inference() -> None:
    model, x = model_of("torch"), rows_of("torch")
    set_inference(model, "batch", ["*"], partition=Halves())
    halves = [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert torch.allclose(model(x), by_hand(x, halves, model[0]), rtol=0, atol=1e-12)


def test_copies_pickles_conversions_and_plain_layers() -> None:
    model, x = model_of("torch"), rows_of("torch")
    by_population = model(x)
    set_rows_per_image(COUNTS)
    set_inference(model, "batch", ["*"], partition="image")
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        assert scopes(other) and not scopes(other) & scopes(model)
    convert_norm(model, "GhostBN", "0")
    assert torch.equal(model(x), y)
    to_plain_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert torch.allclose(model(x), by_population)
    assert not model._forward_pre_hooks


def test_nothing_is_left_of_a_partition_that_was_replaced() -> None:
    model = model_of("torch")
    for partition in ("image", "shuffle", "forward"):
        set_inference(model, "batch", ["*"], partition=partition)
    assert not model._forward_pre_hooks and not scopes(model)


@pytest.mark.parametrize(
    ("mode", "partition", "message"),
    [
        ("batch", "world", 'inference partition is "world"; it can be one of "forward"'),
        ("batch", "imgae", 'inference partition is "imgae"'),
        ("population", "image", "inference is population, and a partition divides the rows"),
    ],
)
def test_what_cannot_be_is_refused(mode: str, partition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_inference(model_of("torch"), mode, ["*"], partition=partition)


def test_rows_of_unknown_images_are_refused() -> None:
    model = model_of("torch")
    set_inference(model, "batch", ["*"], partition="image")
    set_rows_per_image([3])
    with pytest.raises(ValueError, match="of its 16 rows the last RoIs that were pooled are 3"):
        model(rows_of("torch"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images_of_inference_partition")
    make_leaky_shapes(folder / "val", NUM_IMAGES, seed=5, split="val")
    return folder


def found(cfg: Any) -> list[dict[str, Any]]:
    """The instances of each image, of a model with random weights."""
    torch.manual_seed(3)
    model = Trainer.build_model(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2)
        return [
            output["instances"].get_fields()
            for batch in build_test_loader(cfg, cfg.DATASETS.TEST[0])
            for output in model(batch)
        ]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return all(
        len(a["scores"]) == len(b["scores"])
        and torch.allclose(a["scores"], b["scores"], atol=1e-5)
        and torch.allclose(a["pred_boxes"].tensor, b["pred_boxes"].tensor, atol=1e-3)
        and all(torch.allclose(a[key], b[key], atol=1e-4) for key in ("pred_masks",) if key in a)
        for a, b in zip(one, other, strict=True)
    )


def detector(folder: Path, kind: str, size: int, *more: str) -> Any:
    cfg = config(folder, size, "batch")
    if kind == "retinanet":
        options = [str(RETINANET), "DATASETS.COCO_JSON", str(cfg.DATASETS.COCO_JSON)]
        options += ["DATASETS.TEST", str(cfg.DATASETS.TEST), "OUTPUT_DIR", cfg.OUTPUT_DIR]
        options += ["BN.INFERENCE", "batch", "BN.INFERENCE_BATCH_SIZE", str(size)]
        options += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
        cfg = load_config(argument_parser().parse_args(["--config-file", *options]))
    few = {"MODEL.RPN.POST_NMS_TOPK_TEST": 40, "TEST.DETECTIONS_PER_IMAGE": 10}
    cfg.merge_from_list([part for pair in few.items() for part in pair] + list(more))
    return cfg


KINDS = {
    "mask rcnn": (),
    "cascade": (
        *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ),
    "retinanet": (),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_finds_with_own_images_what_it_finds_one_by_one(folder: Path, kind: str) -> None:
    """Also with its own proposals, those of each stage of a cascade, and masks of what it found."""
    more = KINDS[kind]
    one_by_one = found(detector(folder, kind, 1, *more))
    assert sum(len(image["scores"]) for image in one_by_one) > NUM_IMAGES
    by_image = found(detector(folder, kind, 3, "BN.INFERENCE_PARTITION", "image", *more))
    assert same(by_image, one_by_one)
    together = found(detector(folder, kind, 3, *more))
    assert not same(together, one_by_one)
    shuffled = found(detector(folder, kind, 3, "BN.INFERENCE_PARTITION", "shuffle", *more))
    assert not same(shuffled, one_by_one)
    assert same(shuffled, together) == (kind == "retinanet")  # whole maps, of all images


def counts_of_a_worker(rank: int, world_size: int, folder: str) -> int:
    cfg = detector(Path(folder), "mask rcnn", 2, "BN.INFERENCE_PARTITION", "shuffle")
    convert = ["BN.CONVERT", "[['roi_heads.*', 'ShuffleBN']]"]  # a collective, in training
    cfg.merge_from_list(convert)
    return len(found(cfg))


@pytest.mark.timeout(120)
def test_workers_with_unequal_numbers_of_batches_wait_for_none(folder: Path) -> None:
    numbers = run_workers(counts_of_a_worker, 2, str(folder))
    assert numbers == [3, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("BN.INFERENCE_PARTITION", "worker"), r'BN\.INFERENCE_PARTITION.* "worker".*"forward"'),
        (
            ("BN.INFERENCE_PARTITION", "image", "BN.INFERENCE", "population"),
            'BN.INFERENCE_PARTITION "image" divides .* set BN.INFERENCE "batch"',
        ),
        (
            ("BN.INFERENCE_PARTITION", "shuffle", "BN.INFERENCE_BATCH_SIZE", "1"),
            "BN.INFERENCE_PARTITION .*set BN.INFERENCE_BATCH_SIZE 8",
        ),
    ],
)
def test_configs_that_mean_nothing(folder: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(
            detector(folder, "mask rcnn", 2, *more), num_workers=1, eval_only=True, resume=False
        )


def test_each_partition_has_its_folder(folder: Path) -> None:
    cfg = detector(folder, "mask rcnn", 2, "BN.INFERENCE_PARTITION", "image")
    assert evaluation_folder(cfg, resume=False).endswith("eval_random_weights_batch_image")
