import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from PIL import Image

from bn_detection import data
from bn_detection.config import ConfigError, add_bn_detection_config
from bn_detection.data import (
    LeakyShapesConfig,
    ReadableLoader,
    SkipUnreadable,
    build_test_loader,
    build_train_loader,
    check_datasets,
    check_num_classes,
    draw_image,
    find_builtin,
    make_leaky_shapes,
    read_unreadable,
    register_builtin,
    register_coco_json,
    report_unreadable,
)
from bn_detection.engine.setup import check_dataset_names
from bn_detection.leakage.limits import leaky_shapes_config

pytestmark = pytest.mark.usefixtures("own_catalogs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_leaky_shapes(tmp_path_factory.mktemp("data") / "shapes", 6, 0, split="train")


@pytest.fixture
def shapes(made, tmp_path):
    """A copy of a small dataset, to be spoilt: (annotations, image root)."""
    shutil.copytree(made.images.parent, tmp_path / "shapes")
    return tmp_path / "shapes/annotations.json", tmp_path / "shapes/images"


def make_cfg(tmp_path, train=(), test=(), num_classes=4):
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (128,), 128
    return cfg


def register(name, shapes):
    register_coco_json([[name, *map(str, shapes)]])


# ---------------------------------------------------------------------------------------------
# DATASETS.COCO_JSON
# ---------------------------------------------------------------------------------------------


def test_a_registered_dataset_loads_with_its_classes(shapes):
    register("a", shapes)
    assert MetadataCatalog.get("a").evaluator_type == "coco"
    dicts = DatasetCatalog.get("a")
    assert len(dicts) == 6
    assert MetadataCatalog.get("a").thing_classes == ["class_0", "class_1", "class_2", "class_3"]
    assert Image.open(dicts[0]["file_name"]).size == (dicts[0]["width"], dicts[0]["height"])


def test_paths_are_expanded(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("SHAPES", str(shapes[0].parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    register_coco_json(
        [
            ["env", "$SHAPES/annotations.json", "${SHAPES}/images"],
            ["home", "~/shapes/annotations.json", "~/shapes/images"],
            ["relative", "shapes/annotations.json", "shapes/images"],
        ]
    )
    monkeypatch.chdir("/")
    for name in ("env", "home", "relative"):
        assert len(DatasetCatalog.get(name)) == 6


def test_the_same_entry_again_is_fine_and_another_is_not(shapes, tmp_path):
    register("a", shapes)
    register("a", shapes)
    with pytest.raises(ConfigError, match=r'DATASETS.COCO_JSON: dataset "a" is registered already'):
        register("a", (shapes[0], tmp_path))
    with pytest.raises(ConfigError, match=r"coco_2017_val.*another name"):
        register("coco_2017_val", shapes)


@pytest.mark.parametrize("missing", [0, 1], ids=["annotations", "image root"])
def test_a_missing_path_is_named(shapes, missing):
    paths = list(shapes)
    paths[missing] = paths[missing].with_name("nowhere")
    with pytest.raises(ConfigError, match=r'DATASETS.COCO_JSON: dataset "a".*/nowhere do(es)? not'):
        register("a", paths)
    assert "a" not in DatasetCatalog


@pytest.mark.parametrize("entry", ["a.json", ["a", "b"], ["a", "b", 3], ["a", "", "c"], 7, {}])
def test_a_malformed_entry_is_shown_with_the_right_form(entry):
    with pytest.raises(ConfigError) as raised:
        register_coco_json([entry])
    assert repr(entry) in str(raised.value)
    assert "[name, annotations.json, image root]" in str(raised.value)


def test_a_string_instead_of_a_list_is_refused():
    with pytest.raises(ConfigError, match=r"DATASETS.COCO_JSON is 'a.json'"):
        register_coco_json("a.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ("{}", 'no list "images"'),
        ({"images": [], "annotations": []}, 'no list "categories"'),
        ({"images": [{"id": 1}], "categories": []}, 'no list "annotations"'),
        ({"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}, "is empty"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ],
)
def test_a_file_that_is_not_coco_says_what_is_wrong_when_loaded(shapes, content, reason):
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    shapes[0].write_bytes(data if isinstance(data, bytes) else data.encode())
    register("a", shapes)
    with pytest.raises(ConfigError, match=reason) as raised:
        DatasetCatalog.get("a")
    assert str(shapes[0]) in str(raised.value) and '"a"' in str(raised.value)


def edit(json_file, change):
    content = json.loads(json_file.read_text())
    change(content)
    json_file.write_text(json.dumps(content))


def test_an_unknown_category_is_an_error_that_names_it(shapes):
    edit(shapes[0], lambda content: content["annotations"][0].update(category_id=99))
    register("a", shapes)
    with pytest.raises(ConfigError, match="category_id=99"):
        DatasetCatalog.get("a")


def test_an_unlabelled_dataset_may_have_no_annotation(shapes):
    edit(shapes[0], lambda content: content["annotations"].clear())
    register("a", shapes)
    assert [record["annotations"] for record in DatasetCatalog.get("a")] == [[]] * 6


def test_images_elsewhere_are_an_error_and_a_missing_one_is_not(shapes, tmp_path):
    register("some", shapes)
    os.remove(shapes[1] / "000000.png")
    assert len(DatasetCatalog.get("some")) == 6
    register("none", (shapes[0], tmp_path))
    with pytest.raises(ConfigError, match=f"none of 6 sampled images.*{tmp_path}"):
        DatasetCatalog.get("none")


# ---------------------------------------------------------------------------------------------
# Checks before training
# ---------------------------------------------------------------------------------------------


def test_datasets_that_fit_pass(shapes, tmp_path):
    register("a", shapes)
    check_datasets(make_cfg(tmp_path, ["a"], ["a"]), ["a"])


def test_an_unknown_name_is_named_with_near_ones(shapes, tmp_path):
    register("leaky_shapes_val", shapes)
    with pytest.raises(ConfigError, match=r'DATASETS.TEST.*"leaky_shape_val".*leaky_shapes_val'):
        check_datasets(make_cfg(tmp_path, test=["leaky_shape_val"]), [])
    with pytest.raises(ConfigError, match=r'DATASETS.TRAIN.*"zzz"'):
        check_datasets(make_cfg(tmp_path), ["zzz"])


@pytest.mark.parametrize("name", ["coco_2017_val", "cityscapes_fine_sem_seg_val", "voc_2007_val"])
def test_missing_files_of_a_builtin_dataset_are_named(tmp_path, name):
    if name not in DatasetCatalog:
        pytest.skip("not in this Detectron2")
    expected = MetadataCatalog.get(name)
    expected = next(
        expected.get(k) for k in ("json_file", "image_dir", "dirname") if expected.get(k)
    )
    with pytest.raises(ConfigError, match="DETECTRON2_DATASETS") as raised:
        check_datasets(make_cfg(tmp_path, test=[name]), [])
    assert os.path.abspath(expected) in str(raised.value)


def test_a_wrong_number_of_classes_is_named(shapes, tmp_path):
    register("a", shapes)
    wrong = make_cfg(tmp_path, ["a"], ["a"], num_classes=80)
    for check in (
        lambda: check_datasets(wrong, []),
        lambda: check_num_classes(wrong, "a"),
        lambda: build_train_loader(wrong),
        lambda: build_test_loader(wrong, "a"),
    ):
        with pytest.raises(ConfigError) as raised:
            check()
        for part in ("MODEL.ROI_HEADS.NUM_CLASSES is 80", '"a"', "4 classes", "class_0, class_1"):
            assert part in str(raised.value)
    with pytest.raises(ConfigError, match=r"MODEL.RETINANET.NUM_CLASSES is 80"):
        check_datasets(wrong, [], "MODEL.RETINANET.NUM_CLASSES")
    wrong.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(ConfigError, match=r"MODEL.RETINANET.NUM_CLASSES is 80"):
        check_num_classes(wrong, "a")
    wrong.BN.LAZY_CONFIG = ["config.py"]
    with pytest.raises(ConfigError, match=r"Give model\.num_classes=4\.$"):
        check_num_classes(wrong, "a")
    wrong.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    check_datasets(wrong, ["a"])


def test_a_dataset_is_loaded_at_most_once_and_for_training_not_at_all(shapes, tmp_path):
    register("a", shapes)
    cfg, loads = make_cfg(tmp_path, ["a"], []), []
    load = DatasetCatalog.pop("a")
    DatasetCatalog.register("a", lambda: loads.append(1) or load())
    check_datasets(cfg, ["a"])
    assert not loads
    cfg.DATASETS.TEST = ("a",)
    check_datasets(cfg, ["a"])
    assert len(loads) == 1


# ---------------------------------------------------------------------------------------------
# Unreadable images
# ---------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


def break_png_chunk(path):
    data = bytearray(path.read_bytes())
    data[33:41] = b"\xff" * 8
    path.write_bytes(bytes(data))


SPOILT = [
    truncate,
    break_png_chunk,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("this is text"),
    lambda path: path.unlink(),
]


def mapped_ids(loader, count):
    found = []
    for batch in loader:
        found += [item["image_id"] for item in batch]
        if len(found) >= count:
            return found
    return found


@pytest.mark.parametrize("spoil", SPOILT)
def test_testing_leaves_an_unreadable_image_out(shapes, tmp_path, spoil, caplog):
    register("a", shapes)
    bad = shapes[1] / "000002.png"
    spoil(bad)
    loader = build_test_loader(make_cfg(tmp_path), "a")
    assert len(loader) == 6
    for _ in range(2):
        assert mapped_ids(loader, 99) == [1, 2, 4, 5, 6]
    assert read_unreadable(str(tmp_path / "output")) == {str(bad)}
    assert caplog.text.count(f"Cannot read the image {bad}") == 1


def test_training_takes_another_image(shapes, tmp_path, caplog):
    register("a", shapes)
    truncate(shapes[1] / "000002.png")
    cfg = make_cfg(tmp_path, ["a"])
    found = mapped_ids(build_train_loader(cfg), 24)
    assert set(found) == {1, 2, 4, 5, 6}
    caplog.clear()
    assert report_unreadable(cfg.OUTPUT_DIR) == 1
    assert "Unreadable images left out: 1 " in caplog.text and "000002.png" in caplog.text
    written = (tmp_path / "output/unreadable_images.txt").read_text()
    assert written == f"{shapes[1] / '000002.png'}\n"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_readable_image_in_training_is_an_error(shapes, tmp_path, num_workers):
    register("a", shapes)
    for path in shapes[1].iterdir():
        truncate(path)
    cfg = make_cfg(tmp_path, ["a"])
    cfg.DATALOADER.NUM_WORKERS = num_workers
    with pytest.raises(ConfigError, match='"a": none of the 6 images'):
        next(iter(build_train_loader(cfg)))
    assert report_unreadable(cfg.OUTPUT_DIR) == 6


def test_no_readable_image_in_testing_is_an_error(shapes, tmp_path):
    register("a", shapes)
    for path in shapes[1].iterdir():
        truncate(path)
    with pytest.raises(ConfigError, match='"a": none of the 6 images'):
        list(build_test_loader(make_cfg(tmp_path), "a"))


def test_training_gives_up_after_a_hundred_images(tmp_path):
    stock = DatasetMapper(make_cfg(tmp_path), True)
    mapper = SkipUnreadable(stock, str(tmp_path), dataset="a", num_images=1000)
    for index in range(99):
        for _ in range(2):  # the same image again is not another one
            assert mapper({"file_name": f"{index}.png"}) is None
    with pytest.raises(ConfigError, match='"a": none of the 100 images'):
        mapper({"file_name": "99.png"})


def test_wrong_annotations_are_not_taken_for_an_unreadable_image(shapes, tmp_path):
    edit(shapes[0], lambda content: content["images"][0].update(width=64))
    edit(shapes[0], lambda content: content["annotations"][-1].update(bbox=[1.0, 2.0]))
    register("a", shapes)
    dicts = DatasetCatalog.get("a")
    cfg = make_cfg(tmp_path, ["a"])
    mapper = SkipUnreadable(
        DatasetMapper(cfg, True), cfg.OUTPUT_DIR, dataset="a", num_images=len(dicts)
    )
    with pytest.raises(Exception, match="Mismatched image shape"):
        mapper(dicts[0])
    with pytest.raises(Exception, match=r"(?i)box|unpack"):
        mapper(dicts[-1])
    assert read_unreadable(cfg.OUTPUT_DIR) == set()


def test_the_mapper_can_be_sent_to_another_process(shapes, tmp_path):
    register("a", shapes)
    record = DatasetCatalog.get("a")[0]
    mapper = SkipUnreadable(DatasetMapper(make_cfg(tmp_path), False), str(tmp_path), dataset="a")
    copied = pickle.loads(pickle.dumps(mapper))
    assert torch.equal(copied(record)["image"], mapper(record)["image"])


class Counter(DatasetEvaluator):
    def reset(self):
        self.ids = []

    def process(self, inputs, outputs):
        self.ids += [item["image_id"] for item in inputs]

    def evaluate(self):
        return {"ids": self.ids}


def test_inference_on_dataset_sees_the_readable_images_only(shapes, tmp_path):
    register("a", shapes)
    for name in ("000000.png", "000005.png"):
        truncate(shapes[1] / name)
    loader = build_test_loader(make_cfg(tmp_path), "a")
    assert isinstance(loader, ReadableLoader)
    results = inference_on_dataset(lambda inputs: inputs, loader, Counter())
    assert results == {"ids": [2, 3, 4, 5]}


def test_nothing_unreadable_is_not_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert report_unreadable(str(tmp_path)) == 0
    assert not caplog.records


def test_the_loader_gives_the_pixels_of_the_files(shapes, tmp_path):
    register("a", shapes)
    cfg = make_cfg(tmp_path)
    for batch, path in zip(build_test_loader(cfg, "a"), sorted(shapes[1].iterdir()), strict=True):
        expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
        assert np.array_equal(batch[0]["image"].numpy(), expected)


def test_a_worker_that_loses_all_its_images_ends_by_name(shapes, tmp_path):
    register("a", shapes)
    cfg = make_cfg(tmp_path, ["a"])
    loader = iter(build_train_loader(cfg))
    assert len(next(loader)) == 2
    for path in shapes[1].iterdir():
        truncate(path)
    with pytest.raises(ConfigError, match='"a": none of the 6 images'):
        for _ in range(20):
            next(loader)


def test_an_image_that_can_be_read_again_is_not_lost(tmp_path, shapes):
    register("a", shapes)
    cfg = make_cfg(tmp_path, ["a"])
    records = DatasetCatalog.get("a")[:2]
    mapper = SkipUnreadable(DatasetMapper(cfg, True), cfg.OUTPUT_DIR, dataset="a", num_images=2)
    path = shapes[1] / "000000.png"
    content = path.read_bytes()
    for _ in range(3):
        assert mapper(records[1]) is not None
        truncate(path)
        assert mapper(records[0]) is None
        path.write_bytes(content)
        assert mapper(records[0]) is not None
    assert (tmp_path / "output/unreadable_images.txt").read_text() == f"{path}\n"


def test_an_image_of_two_records_is_one_image(shapes, tmp_path):
    register("a", shapes)
    edit(
        shapes[0],
        lambda content: content["images"].append({**content["images"][0], "id": 100}),
    )
    cfg = make_cfg(tmp_path, ["a"])
    for path in shapes[1].iterdir():
        truncate(path)
    with pytest.raises(ConfigError, match='"a": none of the 6 images'):
        next(iter(build_train_loader(cfg)))


DIALS = "leaky_shapes(cast_std=10,objects_per_image=(2, 3))"


def test_an_embedded_dataset_with_other_dials_is_made_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(data.builtin._SPLITS, "val", 3)
    name = f"{DIALS}_val"
    register_builtin([name])
    records = DatasetCatalog.get(name)
    by_hand = LeakyShapesConfig(cast_std=10, objects_per_image=(2, 3))
    expected = [len(draw_image(by_hand, 0, "val", k).objects) for k in range(3)]
    assert [len(record["annotations"]) for record in records] == expected
    assert (tmp_path / DIALS / "val" / "annotations.json").is_file()
    assert leaky_shapes_config(name) == by_hand
    assert find_builtin("leaky_shapes_no_texture(class_step=1)_train").dials == (
        LeakyShapesConfig(texture_amplitude=0.0, class_step=1)
    )
    assert find_builtin("leaky_shapes(cast_std=1)") is None


@pytest.mark.parametrize(
    ("dials", "words"),
    [
        ("(cast_sdt=10)", ['no dial "cast_sdt"', 'mean "cast_std"']),
        ("(cast_std=-1)", ["cast_std is -1", "at least 0"]),
        ("(cast_std='a')", ["cast_std is a", "a number"]),
        ("(cast_std=(1,2))", ["cast_std is (1, 2)", "a number"]),
        ("(objects_per_image=2)", ["objects_per_image is 2", "two whole numbers"]),
        ("(10)", ["(10)", "cast_std=10"]),
        ("(cast_std=10", ["there is no dataset"]),
        ("(**{})", ["no dial"]),
        ("(cast_std=print())", ["cast_std=print()", "with numbers"]),
    ],
)
def test_a_wrong_dial_in_the_name_of_a_dataset_is_named(dials, words):
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (f"leaky_shapes{dials}_train",)
    with pytest.raises(ConfigError) as info:
        check_dataset_names(cfg)
    for word in ("DATASETS", f"leaky_shapes{dials}_train", *words):
        assert word in str(info.value)
