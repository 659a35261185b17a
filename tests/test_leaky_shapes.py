import dataclasses
import hashlib
import json
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from tooling import run_tool

from bn_detection.config import ConfigError
from bn_detection.data import (
    LeakyShapesConfig,
    draw_image,
    honest_accuracy_limit,
    make_leaky_shapes,
)

QUIET = dict(pixel_noise=0.0, background_std=0.0, object_std=0.0)


def draw_many(config, count=150, seed=0):
    return [draw_image(config, seed, "test", index) for index in range(count)]


# ---------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------


def test_pixels_are_those_of_every_machine():
    pixels = draw_image(LeakyShapesConfig(), 7, "train", 3).pixels
    assert pixels.shape == (128, 128) and pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "88f8f52d4b78cf45"


def test_seed_split_and_index_each_give_another_image():
    config = LeakyShapesConfig()
    arguments = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    images = {draw_image(config, *a).pixels.tobytes() for a in arguments}
    assert len(images) == 4


def test_objects_respect_number_size_and_gap():
    config = LeakyShapesConfig()
    counts, sides = [], []
    for image in draw_many(config):
        counts.append(len(image.objects))
        boxes = np.array([thing.box for thing in image.objects])
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        assert low.min() >= 0 and high.max() <= 128
        sides.extend(boxes[:, 2:].ravel())
        apart = np.maximum(low[:, None] - high, low - high[:, None]).max(axis=2)
        np.fill_diagonal(apart, 99)
        assert apart.min() >= config.gap
    assert set(counts) == {6, 7, 8, 9}
    assert (min(sides), max(sides)) == (22, 33)


def test_scales_make_octaves_of_sizes_and_stripes():
    config = LeakyShapesConfig(object_size=(12, 16), object_scales=3, objects_per_image=(3, 5))
    sides = [side for i in draw_many(config) for thing in i.objects for side in thing.box[2:]]
    for low, high in ((12, 16), (24, 32), (48, 64)):
        share = np.mean([low <= side <= high for side in sides])
        assert share > 0.2  # the largest find room least often
    assert sum(12 <= s <= 16 or 24 <= s <= 32 or 48 <= s <= 64 for s in sides) == len(sides)

    # The frequency of the stripes of the upper half, in periods per width.
    quiet = dataclasses.replace(config, **QUIET, texture_period=6.0)
    for image in draw_many(quiet, count=20):
        for thing in image.objects:
            x, y, width, height = thing.box
            row = image.pixels[y + height // 2 - 1, x : x + width].astype(float)
            crossings = np.count_nonzero(np.diff(row > thing.brightness))
            scale = 1 if width <= 16 else 2 if width <= 32 else 4
            assert abs(crossings - 2 * width / (6 * scale)) <= 1.5


def test_boxes_and_polygons_are_those_of_the_pixels():
    ious = []
    for image in draw_many(LeakyShapesConfig(), 60):
        for index, thing in enumerate(image.objects):
            mask = image.owner == index
            rows, columns = np.nonzero(mask)
            x, y, width, height = thing.box
            extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert extent == (x, y, x + width, y + height)
            polygon = thing.polygon.ravel().tolist()
            drawn = mask_util.decode(mask_util.frPyObjects([polygon], *mask.shape))[..., 0] > 0
            ious.append(np.sum(mask & drawn) / np.sum(mask | drawn))
    assert min(ious) > 0.97
    assert np.mean(ious) > 0.99


def test_brightness_is_the_formula_and_the_background_does_not_show_the_cast():
    config = LeakyShapesConfig(texture_amplitude=0.0, cast_std=10.0, **QUIET)
    casts = []
    for image in draw_many(config, 40):
        casts.append(image.cast)
        assert np.all(image.pixels[image.owner == -1] == 110)
        for index, thing in enumerate(image.objects):
            expected = 128 + 22 * (thing.label - 1.5) + image.cast
            assert np.all(np.abs(image.pixels[image.owner == index] - expected) <= 0.5)
    assert 6 < np.std(casts) < 14


def test_class_can_be_told_from_the_texture_alone():
    """The phase between an object's halves, by demodulation at the stripes' frequency."""
    config = LeakyShapesConfig(class_step=0.0)
    right = []
    for image in draw_many(config, 60):
        wave = np.exp(-2j * np.pi * np.arange(128) / 8)[None]
        for index, thing in enumerate(image.objects):
            mask = image.owner == index
            _, y, _, height = thing.box
            halves = np.arange(128)[:, None] * 2 + 1 < 2 * y + height
            signal = (image.pixels - image.pixels[mask].mean()) * wave
            turn = np.angle(signal[mask & ~halves].sum() / signal[mask & halves].sum())
            right.append(round(turn / (np.pi / 2)) % 4 == thing.label)
    assert np.mean(right) > 0.97


@pytest.mark.parametrize("amplitude", [0.0, 16.0])
def test_without_the_leaky_cue_brightness_says_nothing_of_the_class(amplitude):
    config = LeakyShapesConfig(class_step=0.0, texture_amplitude=amplitude)
    things = [thing for image in draw_many(config, 200) for thing in image.objects]
    labels = np.array([thing.label for thing in things])
    brightness = np.array([thing.brightness for thing in things])
    assert abs(np.corrcoef(labels, brightness)[0, 1]) < 0.1


def test_relative_to_the_cast_brightness_tells_the_class():
    right = []
    for image in draw_many(LeakyShapesConfig(), 60):
        for index, thing in enumerate(image.objects):
            level = image.pixels[image.owner == index].mean() - image.cast - 128
            right.append(np.clip(np.rint(level / 22 + 1.5), 0, 3) == thing.label)
    assert np.mean(right) > 0.97


@pytest.mark.parametrize(("correlation", "same"), [(0.0, 0.25), (0.6, 0.25 + 0.75 * 0.36), (1, 1)])
def test_class_correlation_is_how_often_objects_share_their_class(correlation, same):
    """Two objects agree with probability 1/C + (1 - 1/C) rho^2; classes stay equally frequent."""
    config = LeakyShapesConfig(class_correlation=correlation)
    pairs, labels = [], []
    for image in draw_many(config, 400):
        found = [thing.label for thing in image.objects]
        pairs.append(found[0] == found[1])
        labels += found
    assert abs(np.mean(pairs) - same) < 0.08
    assert np.abs(np.bincount(labels) / len(labels) - 0.25).max() < 0.08


def test_few_object_pixels_are_clipped():
    images = draw_many(LeakyShapesConfig())
    share = sum(i.clipped for i in images) / sum(np.sum(i.owner >= 0) for i in images)
    assert 0 < share < 0.03


# ---------------------------------------------------------------------------------------------
# The closed form
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 4, 7])
def test_honest_limit_is_that_of_a_bayes_classifier(num_classes):
    config = LeakyShapesConfig(num_classes=num_classes)
    rng = np.random.default_rng(0)
    labels = rng.integers(num_classes, size=400_000)
    means = 22.0 * np.arange(num_classes)
    seen = means[labels] + rng.normal(0, 40, labels.shape) + rng.normal(0, 4, labels.shape)
    log_likelihood = -((seen[:, None] - means) ** 2)
    accuracy = np.mean(log_likelihood.argmax(axis=1) == labels)
    assert honest_accuracy_limit(config) == pytest.approx(accuracy, abs=4e-3)


def test_honest_limit_at_the_default_numbers_and_at_the_extremes():
    assert honest_accuracy_limit(LeakyShapesConfig()) == pytest.approx(0.412, abs=5e-4)
    assert honest_accuracy_limit(LeakyShapesConfig(class_step=0.0)) == 0.25
    assert honest_accuracy_limit(LeakyShapesConfig(cast_std=0.0, object_std=0.0)) == 1


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dial",
    [
        {"num_classes": 1},
        {"num_classes": 2.5},
        {"objects_per_image": (3, 2)},
        {"objects_per_image": (0, 2)},
        {"objects_per_image": [1, 2]},
        {"object_size": (4, 30)},
        {"object_size": (22, 300)},
        {"gap": -1},
        {"object_scales": 0},
        {"object_scales": 3},
        {"cast_std": -1.0},
        {"class_step": float("nan")},
        {"texture_period": 1.0},
        {"class_correlation": 1.5},
        {"base_brightness": 300.0},
    ],
)
def test_a_dial_out_of_range_is_named(dial):
    (name,) = dial
    with pytest.raises(ConfigError, match=name):
        LeakyShapesConfig(**dial)


def test_objects_that_find_no_room_are_refused():
    with pytest.raises(ConfigError, match="found no room on 128 px"):
        draw_image(LeakyShapesConfig(objects_per_image=(40, 40)), 0, "train", 0)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def make(root, num_images=4, seed=0, split="train", **dials):
    return make_leaky_shapes(root, num_images, seed, LeakyShapesConfig(**dials), split=split)


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_files_are_coco_and_hold_what_was_drawn(tmp_path):
    made = make(tmp_path / "data")
    coco = COCO(made.annotations)
    assert coco.dataset["info"]["leaky_shapes"]["config"]["class_step"] == 22
    assert [c["id"] for c in coco.dataset["categories"]] == [1, 2, 3, 4]
    assert made.num_objects == len(coco.anns) and made.num_images == 4 and not made.reused
    for index, image in enumerate(coco.dataset["images"]):
        drawn = draw_image(LeakyShapesConfig(), 0, "train", index)
        pixels = np.asarray(Image.open(made.images / image["file_name"]))
        assert np.array_equal(pixels, np.repeat(drawn.pixels[..., None], 3, axis=2))
        assert image["cast"] == pytest.approx(drawn.cast, abs=1e-4)
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        for thing, annotation in zip(drawn.objects, annotations, strict=True):
            assert annotation["category_id"] == thing.label + 1
            assert tuple(annotation["bbox"]) == thing.box
            area = mask_util.area(coco.annToRLE(annotation))
            assert annotation["area"] == pytest.approx(area, rel=0.03)


def test_images_do_not_depend_on_how_many_are_made(tmp_path):
    few, many = make(tmp_path / "few", 2), make(tmp_path / "many", 5)
    for path in few.images.iterdir():
        assert path.read_bytes() == (many.images / path.name).read_bytes()


def test_the_same_dataset_is_used_again_and_another_is_refused(tmp_path, caplog):
    root = tmp_path / "data"
    make(root)
    before = contents(root)
    with caplog.at_level("INFO"):
        assert make(root).reused
    assert "same parameters" in caplog.text
    for other in ({"class_step": 0.0}, {"seed": 1}, {"num_images": 3}, {"split": "val"}):
        with pytest.raises(ConfigError, match=f"{next(iter(other))} .* there, .* asked for"):
            make(root, **other)
    assert contents(root) == before


def test_a_dataset_made_before_a_dial_existed_is_used_again(tmp_path):
    made = make(tmp_path / "d")
    content = json.loads(made.annotations.read_text())
    del content["info"]["leaky_shapes"]["config"]["object_scales"]
    made.annotations.write_text(json.dumps(content))
    assert make(tmp_path / "d").reused
    with pytest.raises(ConfigError, match="object_scales 1 there, 2 asked for"):
        make(tmp_path / "d", object_scales=2)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a LeakyShapes dataset"):
        make(tmp_path)
    assert list(contents(tmp_path).values()) == [b"mine"]


def test_a_dataset_that_lost_images_is_refused(tmp_path):
    made = make(tmp_path / "data")
    next(made.images.iterdir()).unlink()
    with pytest.raises(ConfigError, match="3 of 4 images"):
        make(tmp_path / "data")


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="no room"):
        make(tmp_path / "data", objects_per_image=(40, 40))
    assert os.listdir(tmp_path) == []


def test_several_processes_can_make_the_same_dataset(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        made = pool.map(make, [tmp_path / "data"] * 3)
    assert sum(not m.reused for m in made) == 1
    assert os.listdir(tmp_path) == ["data"]
    assert len(list(made[0].images.iterdir())) == 4


def test_the_tool_makes_both_splits_and_names_what_is_wrong(tmp_path, capsys):
    arguments = ("make_leaky_shapes", tmp_path / "data", "--num-images", "3", "2")
    assert run_tool(*arguments, "--object-size", "20", "30", "--class-step", "11").status == 0
    assert "at most 33.2%" in capsys.readouterr().out  # (1 + 3 erf(11 / (2 sqrt(2) 40.2))) / 4
    info = json.loads((tmp_path / "data/val/annotations.json").read_text())["info"]
    expected = LeakyShapesConfig(object_size=(20, 30), class_step=11.0)
    assert info["leaky_shapes"]["config"] == json.loads(json.dumps(dataclasses.asdict(expected)))
    ended = run_tool(*arguments, "--gap", "-1")
    assert ended.status == 2 and "gap is -1" in ended.error
