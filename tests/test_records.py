"""Datasets are checked against the model before training: one line each, file, record, reason."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as masks
from test_data import edit, make_cfg, register

from bn_detection import ConfigError
from bn_detection.data import (
    SinglePassLoader,
    build_test_loader,
    build_train_loader,
    check_datasets,
    make_leaky_shapes,
    read_unreadable,
)
from bn_detection.engine import argument_parser, run
from bn_detection.leakage.rois import labelled_images

pytestmark = pytest.mark.usefixtures("own_catalogs")

Content = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "shapes"
    return make_leaky_shapes(folder, 4, 0, split="train").images.parent


@pytest.fixture
def shapes(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a small dataset, to be spoilt: (annotations, image root)."""
    shutil.copytree(made, tmp_path / "shapes")
    return tmp_path / "shapes/annotations.json", tmp_path / "shapes/images"


def config(tmp_path: Path, *more: object, mask: bool = True) -> CfgNode:
    cfg = make_cfg(tmp_path, ["a"], ["a"])
    cfg.MODEL.MASK_ON = mask
    cfg.merge_from_list(list(more))
    return cfg


def labelled(cfg: CfgNode) -> None:
    labelled_images(cfg, "a")


USES: dict[str, Callable[[CfgNode], object]] = {
    "training": build_train_loader,
    "evaluation": lambda cfg: check_datasets(cfg, []),
    "probe": labelled,
    "recalibration": lambda cfg: SinglePassLoader(cfg, labels=True, num_images=4, batch_size=2),
}


def refused(cfg: CfgNode, use: str) -> str:
    with pytest.raises(ConfigError) as info:
        USES[use](cfg)
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 600
    assert '"a"' in message
    return message


def first(**values: object) -> Callable[[Content], None]:
    return lambda content: content["annotations"][0].update(values)


def without(key: str, of: str = "annotations") -> Callable[[Content], None]:
    return lambda content: content[of][0].pop(key)


def image(**values: object) -> Callable[[Content], None]:
    return lambda content: content["images"][0].update(values)


def spoil_polygon(value: object) -> Callable[[Content], None]:
    def spoil(content: Content) -> None:
        content["annotations"][0]["segmentation"][0][1] = value

    return spoil


def rle(height: int, width: int, compressed: bool = True) -> Any:
    if not compressed:
        return {"size": [height, width], "counts": [0, height * width]}
    found = masks.encode(np.asfortranarray(np.ones((height, width), np.uint8)))
    return {"size": [height, width], "counts": found["counts"].decode()}


# What is spoilt, and words of the message.
BOTH: list[tuple[Callable[[Content], None], list[str]]] = [
    (first(bbox=[1, 2, 3]), ["annotation 1", "000000.png", "bbox is [1, 2, 3]", "four"]),
    (first(bbox=["a", 2, 3, 4]), ["bbox is ['a', 2, 3, 4]"]),
    (first(bbox=[1, math.nan, 3, 4]), ["bbox", "nan"]),
    (first(bbox=[1, math.inf, 3, 4]), ["bbox", "inf"]),
    (first(bbox=[10**400, 1, 3, 4]), ["bbox"]),
    (first(bbox=None), ["bbox is None"]),
    (first(bbox=7), ["bbox is 7"]),
    (first(bbox=[]), ["bbox is []"]),
    (without("bbox"), ["has no bbox"]),
    (spoil_polygon(math.nan), ["segmentation", "nan"]),
    (spoil_polygon("x"), ["segmentation"]),
    (first(segmentation=[1, 2, 3, 4, 5, 6]), ["segmentation", "list of polygons"]),
    (first(segmentation="x"), ["segmentation is 'x'"]),
    (first(segmentation={"size": [3, 3]}), ["segmentation", "counts"]),
    (first(segmentation=rle(5, 7)), ["segmentation", "5 x 7"]),
    (first(segmentation=rle(5, 7, compressed=False)), ["segmentation", "5 x 7"]),
    (first(category_id=99), ["category_id=99"]),
    (first(category_id="1"), ["category_id"]),
    (without("category_id"), ["category_id"]),
    (without("image_id"), ["image_id"]),
    (lambda content: content["annotations"].insert(0, 7), ["annotation"]),
    (lambda content: content["annotations"][1].update(id=1), ["annotation", "id"]),
    (image(height=0), ["000000.png", "height is 0"]),
    (image(width=-5), ["width is -5"]),
    (image(height="128"), ["height is '128'"]),
    (image(height=128.5), ["height is 128.5"]),
    (image(width=None), ["width is None"]),
    (without("height", "images"), ["no height"]),
    (without("file_name", "images"), ["no file_name"]),
    (image(file_name=3), ["file_name is 3"]),
    (image(file_name="\udcff.png"), ["file_name", "UTF-8"]),
    (without("id", "images"), ["id"]),
    (lambda content: content["images"].insert(0, 7), ["image"]),
    (lambda content: content["categories"][0].update(name=7), ["category", "name is 7"]),
    (lambda content: content["categories"][0].update(id="x"), ["category", "id is 'x'"]),
    (without("name", "categories"), ["category", "name"]),
    (
        lambda content: content["images"].append({**content["images"][1], "id": 1}),
        ["image", "id 1"],
    ),
    (image(width=130), ["130", "128", "000000.png"]),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", range(len(BOTH)))
def test_a_damaged_dataset_is_refused(
    case: int, use: str, shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    spoil, words = BOTH[case]
    edit(shapes[0], spoil)
    register("a", shapes)
    message = refused(config(tmp_path), use)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("key", ["area", "iscrowd", "id"])
def test_an_evaluation_needs_more(key: str, shapes: tuple[Path, Path], tmp_path: Path) -> None:
    edit(shapes[0], without(key))
    register("a", shapes)
    assert key in refused(config(tmp_path), "evaluation")


def test_a_mask_that_is_missing_is_named(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    edit(shapes[0], without("segmentation"))
    register("a", shapes)
    for use in ("training", "evaluation", "recalibration"):
        message = refused(config(tmp_path), use)
        assert "annotation 1: it has no segmentation" in message
        assert "MODEL.MASK_ON False" in message


def test_boxes_alone_are_enough_without_a_mask_head(
    shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(shapes[0], lambda content: [a.pop("segmentation") for a in content["annotations"]])
    register("a", shapes)
    for use in USES.values():
        use(config(tmp_path, mask=False))


def test_rle_needs_bitmasks_in_training_alone(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    edit(shapes[0], first(segmentation=rle(128, 128)))
    register("a", shapes)
    check_datasets(config(tmp_path), [])
    assert "INPUT.MASK_FORMAT bitmask" in refused(config(tmp_path), "training")
    build_train_loader(config(tmp_path, "INPUT.MASK_FORMAT", "bitmask"))


def test_a_crowd_needs_no_polygons(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    edit(shapes[0], first(segmentation=rle(128, 128, compressed=False), iscrowd=1))
    register("a", shapes)
    for use in USES.values():
        use(config(tmp_path))


def test_nothing_to_train_on_says_why(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    def crowds(content: Content) -> None:
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    edit(shapes[0], crowds)
    register("a", shapes)
    for use in ("training", "recalibration"):
        message = refused(config(tmp_path), use)
        assert "iscrowd" in message and "DATASETS.TRAIN" in message
    edit(shapes[0], lambda content: content["annotations"].clear())
    for use in ("training", "recalibration"):
        assert "no annotations" in refused(config(tmp_path), use)


KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2)


def with_keypoints(content: Content) -> None:
    content["categories"][0].update(keypoints=["left", "right"], skeleton=[])
    for annotation in content["annotations"]:
        annotation.update(keypoints=[40.0, 40.0, 2, 50.0, 50.0, 1], num_keypoints=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keypoints": [1, 2, 2]}, ["keypoints", "2", "NUM_KEYPOINTS"]),
        ({"keypoints": [1, 2, 2, math.nan, 2, 2]}, ["keypoints", "nan"]),
        ({"keypoints": "xy"}, ["keypoints"]),
        ({"keypoints": None}, ["keypoints"]),
    ],
)
def test_keypoints_are_those_of_the_model(
    values: Content, words: list[str], shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(shapes[0], with_keypoints)
    edit(shapes[0], first(**values))
    register("a", shapes)
    MetadataCatalog.get("a").set(keypoint_names=["left", "right"], keypoint_flip_map=[])
    for use in ("training", "evaluation"):
        message = refused(config(tmp_path, *KEYPOINTS), use)
        for word in words:
            assert word in message, message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, ["byte order mark"]),
        (lambda text: text.decode().encode("utf-16"), ["UTF-8", "position 0"]),
        (lambda text: b"[" * 100_000 + b"]" * 100_000, ["nested"]),
        (lambda text: text[:-5], ["not JSON"]),
    ],
)
def test_a_file_that_is_no_json_says_so(
    content: Callable[[bytes], bytes], words: list[str], shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    shapes[0].write_bytes(content(shapes[0].read_bytes()))
    register("a", shapes)
    for use in ("training", "evaluation"):
        message = refused(config(tmp_path), use)
        for word in words:
            assert word in message, message


# ---------------------------------------------------------------------------------------------
# Classes of training and evaluation
# ---------------------------------------------------------------------------------------------


def test_the_same_classes_in_another_order_are_refused(
    made: Path, shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    def rename(content: Content) -> None:
        names = [category["name"] for category in content["categories"]]
        for category, name in zip(content["categories"], [*names[1:], names[0]], strict=True):
            category["name"] = name

    edit(shapes[0], rename)
    register("a", (made / "annotations.json", made / "images"))
    register("b", shapes)
    cfg = config(tmp_path)
    build_train_loader(cfg)
    cfg.DATASETS.TEST = ("b",)
    message = refused(cfg, "training")
    for word in ('"b"', "class_0", "DATASETS.TEST", "DATASETS.TRAIN"):
        assert word in message
    # Two datasets to train on, likewise.
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("a", "b"), ()
    assert '"b"' in refused(cfg, "training")


def test_other_names_for_the_classes_are_a_warning(
    made: Path, shapes: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(shapes[0], lambda content: content["categories"][1].update(name="other"))
    register("a", (made / "annotations.json", made / "images"))
    register("b", shapes)
    cfg = config(tmp_path)
    cfg.DATASETS.TEST = ("b",)
    build_train_loader(cfg)
    assert "class_1" in caplog.text and "other" in caplog.text


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def replace_by_16_bits(path: Path) -> None:
    Image.fromarray(np.full((128, 128), 40_000, np.uint16)).save(path)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spoil", [replace_by_16_bits, replace_by_pipe])
def test_a_first_image_that_cannot_be_used_is_refused(
    spoil: Callable[[Path], None], shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    spoil(shapes[1] / "000000.png")
    register("a", shapes)
    for use in USES:
        message = refused(config(tmp_path), use)
        assert "000000.png" in message
        assert "16 bits" in message or "no regular file" in message


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spoil", [replace_by_16_bits, replace_by_pipe])
def test_a_later_one_is_left_out(
    spoil: Callable[[Path], None], shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    spoil(shapes[1] / "000002.png")
    register("a", shapes)
    cfg = config(tmp_path)
    found = [item["image_id"] for batch in build_test_loader(cfg, "a") for item in batch]
    assert found == [1, 2, 4]
    loader = iter(build_train_loader(cfg))
    trained = {item["image_id"] for _ in range(6) for item in next(loader)}
    assert trained == {1, 2, 4}
    assert read_unreadable(cfg.OUTPUT_DIR) == {str(shapes[1] / "000002.png")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_one_of_another_size_ends_it_by_name(
    workers: int, shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(shapes[1] / "000002.png")
    register("a", shapes)
    cfg = config(tmp_path, "DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(ConfigError, match=r"000002.png.*64.*128"):
        list(build_test_loader(cfg, "a"))


# ---------------------------------------------------------------------------------------------
# Ids that are text
# ---------------------------------------------------------------------------------------------


def test_image_ids_may_be_text(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    def text(content: Content) -> None:
        for record in content["images"]:
            record["id"] = f"image {record['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"

    edit(shapes[0], text)
    register("a", shapes)
    for use in USES.values():
        use(config(tmp_path))
    assert DatasetCatalog.get("a")[0]["image_id"] == "image 1"
    assert json.loads(shapes[0].read_text())["images"][0]["id"] == "image 1"


def test_the_traceback_of_a_loader_is_not_in_the_line(
    shapes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(shapes[1] / "000002.png")
    register("a", shapes)
    cfg = config(tmp_path, "DATALOADER.NUM_WORKERS", 1)
    args = argument_parser().parse_args([])
    with pytest.raises(SystemExit) as end:
        run(lambda _: list(build_test_loader(cfg, "a")), args, lambda _: "cpu")
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "000002.png" in lines[0]
