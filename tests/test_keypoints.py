"""Keypoints of COCO files: names and mirror images from the file, and what is refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import MetadataCatalog
from test_data import edit, make_cfg, register
from test_records import KEYPOINTS, config, with_keypoints
from tooling import QUICKSTART, run_tool

import bn_detection
from bn_detection import ConfigError
from bn_detection.data import build_train_loader, check_datasets, make_leaky_shapes
from bn_detection.data.coco_json import check_evaluator
from bn_detection.data.keypoints import mirrored
from bn_detection.engine.rehearsal import rehearse

pytestmark = pytest.mark.usefixtures("own_catalogs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keypoints") / "shapes"
    made = make_leaky_shapes(folder, 4, 0, split="train")
    edit(made.annotations, with_keypoints)
    return folder


@pytest.fixture
def shapes(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(folder, tmp_path / "shapes")
    return tmp_path / "shapes/annotations.json", tmp_path / "shapes/images"


def keypoint_config(shapes: tuple[Path, Path], tmp_path: Path, *more: object) -> Any:
    cfg = config(tmp_path, *KEYPOINTS, *more)
    cfg.DATASETS.COCO_JSON = [["a", *map(str, shapes)]]
    return cfg


def test_mirror_images_differ_in_their_side() -> None:
    assert mirrored(["nose", "left_eye", "right_eye"]) == [("left_eye", "right_eye")]
    assert mirrored(["Right hand", "Left hand"]) == [("Right hand", "Left hand")]
    assert mirrored(["l_ear", "r_ear", "LFoot", "RFoot"]) == [
        ("l_ear", "r_ear"),
        ("LFoot", "RFoot"),
    ]
    assert mirrored(["tail", "ear", "bright", "blight"]) == []


def test_names_and_flips_are_those_of_the_file(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    cfg = keypoint_config(shapes, tmp_path)
    bn_detection.register_datasets(cfg)
    metadata = MetadataCatalog.get("a")
    assert metadata.keypoint_names == ["left", "right"]
    assert metadata.keypoint_flip_map == [("left", "right")]
    batch = next(iter(build_train_loader(cfg)))
    assert batch[0]["instances"].gt_keypoints.tensor.shape[1:] == (2, 3)


def test_flips_may_be_given(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["head", "tail"]
    edit(shapes[0], lambda content: content["categories"][0].update(keypoints=names))
    cfg = keypoint_config(shapes, tmp_path)
    cfg.DATASETS.KEYPOINT_FLIPS = [["head", "foot"]]
    with pytest.raises(ConfigError, match=r"KEYPOINT_FLIPS \['head', 'foot'\].*head, tail"):
        bn_detection.register_datasets(cfg)
    cfg.DATASETS.KEYPOINT_FLIPS = [names]
    bn_detection.register_datasets(cfg)
    assert MetadataCatalog.get("a").keypoint_flip_map == [("head", "tail")]


@pytest.mark.parametrize("names", ["xy", [1, 2], ["a", "b", "c"]])
def test_a_file_that_does_not_name_them_is_refused(
    names: object, shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(shapes[0], lambda content: content["categories"][0].update(keypoints=names))
    with pytest.raises(ConfigError, match=r'"a".*(KEYPOINT_ON|NUM_KEYPOINTS)'):
        bn_detection.register_datasets(keypoint_config(shapes, tmp_path))


@pytest.mark.parametrize("names", [None, []])
def test_no_names_are_refused_where_they_are_needed(
    names: object, shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(shapes[0], lambda content: content["categories"][0].update(keypoints=names))
    cfg = keypoint_config(shapes, tmp_path)
    bn_detection.register_datasets(cfg)
    with pytest.raises(ConfigError, match=r'"a": MODEL.KEYPOINT_ON needs the names'):
        check_datasets(cfg, ["a"])


def test_the_sigmas_of_an_evaluation_are_needed(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    cfg = keypoint_config(shapes, tmp_path)
    bn_detection.register_datasets(cfg)
    with pytest.raises(ConfigError, match=r"TEST.KEYPOINT_OKS_SIGMAS \[\].*NUM_KEYPOINTS 2"):
        check_datasets(cfg, [])
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05, 0.05]
    check_datasets(cfg, [])


def test_a_detector_of_keypoints_trains_and_is_evaluated(
    shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    def all_categories(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["keypoints"] = ["left", "right"]

    edit(shapes[0], all_categories)
    options: dict[str, object] = {
        "DATASETS.COCO_JSON": [["a", *map(str, shapes)]],
        "DATASETS.TRAIN": ("a",),
        "DATASETS.TEST": ("a",),
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 0,
        "INPUT.RANDOM_FLIP": "horizontal",
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
        "TEST.KEYPOINT_OKS_SIGMAS": [0.05, 0.05],
        "OUTPUT_DIR": tmp_path / "out",
    }
    values = [part for pair in options.items() for part in pair]
    config_file = QUICKSTART / "mask_rcnn_bn.yaml"
    ended = run_tool("train_net", "--config-file", config_file, *KEYPOINTS, *values)
    assert ended.status == 0, ended.error
    results = json.loads((tmp_path / "out/inference/results.json").read_text())["results"]
    assert "keypoints" in results


def test_noise_with_keypoints_is_rehearsed(tmp_path: Path) -> None:
    cfg = make_cfg(tmp_path)
    cfg.merge_from_file(str(QUICKSTART / "mask_rcnn_bn.yaml"))
    cfg.merge_from_list([*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"])
    rehearse(cfg, training=True)


def test_packages_of_an_evaluation_are_needed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    MetadataCatalog.get("panoptic").set(evaluator_type="coco_panoptic_seg")
    try:
        with pytest.raises(ConfigError, match=r'"panoptic".*panopticapi.*pip install'):
            check_evaluator(config(tmp_path), "panoptic")
    finally:
        MetadataCatalog.remove("panoptic")


def test_panoptic_training_needs_semantic_labels(shapes: tuple[Path, Path], tmp_path: Path) -> None:
    register("a", shapes)
    cfg = config(tmp_path, "MODEL.META_ARCHITECTURE", "PanopticFPN")
    with pytest.raises(ConfigError, match=r'"a".*no semantic labels.*PanopticFPN.*--import'):
        build_train_loader(cfg)
