"""BN.INFERENCE_BATCH_SIZE: images in a forward of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_workers
from torch import Tensor

from bn_detection.config import ConfigError
from bn_detection.data import build_test_loader, make_leaky_shapes
from bn_detection.engine import Trainer, argument_parser, check_config, load_config
from bn_detection.engine.setup import register_datasets

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "mask_rcnn_bn.yaml"
NUM_IMAGES = 5
LAYER = "roi_heads.box_head.conv1.norm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images_of_inference_batch")
    make_leaky_shapes(folder / "val", NUM_IMAGES, seed=5, split="val")
    return folder


def config(folder: Path, size: int, inference: str = "population"):
    name = folder.name
    entry = [name, str(folder / "val" / "annotations.json"), str(folder / "val" / "images")]
    options = ["DATASETS.COCO_JSON", str([entry]), "DATASETS.TEST", f"('{name}',)"]
    options += ["BN.INFERENCE_BATCH_SIZE", str(size), "BN.INFERENCE", inference]
    options += ["OUTPUT_DIR", str(folder / "output")]
    cfg = load_config(argument_parser().parse_args(["--config-file", str(CONFIG), *options]))
    register_datasets(cfg)
    return cfg


def batches_of_ids(cfg) -> list[list[int]]:
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    batches = [[item["image_id"] for item in batch] for batch in loader]
    assert len(loader) == len(batches)
    return batches


def test_batches_have_that_many_images_and_the_last_one_the_rest(folder: Path) -> None:
    assert batches_of_ids(config(folder, 1)) == [[1], [2], [3], [4], [5]]
    assert batches_of_ids(config(folder, 2)) == [[1, 2], [3, 4], [5]]
    assert batches_of_ids(config(folder, 9)) == [[1, 2, 3, 4, 5]]


def test_an_unreadable_image_makes_its_batch_smaller(folder: Path, tmp_path: Path) -> None:
    make_leaky_shapes(tmp_path / "val", NUM_IMAGES, seed=5, split="val")
    (tmp_path / "val" / "images" / "000001.png").write_bytes(b"not a picture")
    assert batches_of_ids(config(tmp_path, 2)) == [[1], [3, 4], [5]]


def ids_of_a_worker(rank: int, world_size: int, folder: str) -> list[list[int]]:
    return batches_of_ids(config(Path(folder), 2))


@pytest.mark.timeout(120)
def test_each_worker_batches_its_own_images(folder: Path) -> None:
    batches = run_workers(ids_of_a_worker, 2, str(folder))
    assert batches == [[[1, 2], [3]], [[4, 5]]]


def inference(folder: Path, size: int, mode: str) -> tuple[list[dict], list[tuple[Tensor, ...]]]:
    """The instances of each image; input, weight and output of a BN layer in each forward."""
    cfg = config(folder, size, mode)
    torch.manual_seed(3)
    model = Trainer.build_model(cfg).eval()
    layer, seen = model.get_submodule(LAYER), []
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.running_var.uniform_(0.5, 2)
        layer.register_forward_hook(lambda _, inputs, y: seen.append((*inputs, layer.weight, y)))
        found = [
            output["instances"].get_fields()
            for batch in build_test_loader(cfg, cfg.DATASETS.TEST[0])
            for output in model(batch)
        ]
    assert len(found) == NUM_IMAGES
    return found, seen


def test_batch_statistics_are_those_of_all_images_of_the_forward(folder: Path) -> None:
    together, seen = inference(folder, 3, "batch")
    assert len(seen) == 2
    for rows, weight, normalized in seen:
        x = rows.double().transpose(0, 1).flatten(1)
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        found = normalized.double().transpose(0, 1).flatten(1)
        assert torch.allclose(found, y * weight.double()[:, None], atol=1e-5)
    alone, _ = inference(folder, 1, "batch")
    pairs = [(a["scores"], b["scores"]) for a, b in zip(alone, together, strict=True)]
    assert any(len(a) != len(b) or (a - b).abs().max() > 1e-3 for a, b in pairs)


def test_population_statistics_give_the_same_whatever_its_size(folder: Path) -> None:
    one_by_one, _ = inference(folder, 1, "population")
    together, _ = inference(folder, 3, "population")
    for a, b in zip(one_by_one, together, strict=True):
        assert len(a["scores"]) > 0
        assert torch.allclose(a["scores"], b["scores"], atol=1e-5)
        assert torch.allclose(a["pred_boxes"].tensor, b["pred_boxes"].tensor, atol=1e-3)
        assert torch.equal(a["pred_classes"], b["pred_classes"])


@pytest.mark.parametrize("size", [0, -2])
def test_a_size_below_one_is_refused(folder: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"BN\.INFERENCE_BATCH_SIZE {size}.*at least 1"):
        check_config(config(folder, size), num_workers=1, eval_only=True, resume=False)
