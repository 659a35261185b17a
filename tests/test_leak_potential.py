"""What the others of its image tell of an object, before any training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bn_detection import cli
from bn_detection.data import LeakyShapesConfig, honest_accuracy_limit, make_leaky_shapes
from bn_detection.leakage import (
    LeakPotential,
    classifier,
    measure_leak_potential,
    sampled_accuracy_limit,
)
from bn_detection.leakage.classifier import FOLDS, CrossValidation
from bn_detection.leakage.looks import mean_of_others, number_of_others

pytestmark = pytest.mark.usefixtures("own_catalogs")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the training, which tells as much here."""
    monkeypatch.setattr(classifier, "_STEPS", 150)


def potential_of(folder: Path, images: int = 120, **dials: object) -> LeakPotential:
    config = LeakyShapesConfig(**dials)
    made = make_leaky_shapes(folder / "shapes", images, 0, config, split="train")
    return measure_leak_potential(made.annotations, made.images)


def held_out(folds: CrossValidation, features: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean bits that are missing, on images that the classifiers never saw."""
    found = folds.held_out(folds.fit(features))
    right = float((found.argmax(1) == folds.labels).float().mean())
    return right, -float(found[range(len(found)), folds.labels].mean()) / math.log(2)


def test_the_mean_of_the_others_by_hand() -> None:
    images = np.array([0, 0, 0, 1, 2, 2])
    values = np.array([[1.0], [2.0], [6.0], [5.0], [3.0], [4.0]])
    assert mean_of_others(values, images).ravel().tolist() == [4.0, 3.5, 1.5, 5.0, 4.0, 3.0]
    assert number_of_others(images).tolist() == [2, 2, 2, 0, 1, 1]


def test_a_classifier_reaches_the_best_possible_of_gaussians_on_a_line() -> None:
    """The closed form of the accuracy, and the information by integration."""
    config = LeakyShapesConfig(cast_std=20.0, object_std=15.0)  # 25 together
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=6000)
    levels = 22.0 * np.arange(4)
    folds = CrossValidation.by_image(labels, np.arange(6000) // 6, seed=0)
    accuracy, missing = held_out(folds, (levels[labels] + rng.normal(0, 25, 6000))[:, None])
    limit = honest_accuracy_limit(config)
    assert abs(accuracy - limit) < 4 * math.sqrt(limit * (1 - limit) / 6000)
    grid = np.linspace(-200, 300, 5001)[:, None]
    joint = np.exp(-((grid - levels) ** 2) / (2 * 25**2))
    best = -(joint * np.log2(joint / joint.sum(1, keepdims=True))).sum() / joint.sum()
    assert best - 0.03 < missing < best + 0.03


def test_the_class_of_one_neighbour_has_the_information_of_the_joint_table() -> None:
    """Pairs that share their class with probability 0.7."""
    rng = np.random.default_rng(0)
    first = rng.integers(4, size=4000)
    second = np.where(rng.random(4000) < 0.6, first, rng.integers(4, size=4000))
    labels = np.stack([first, second], 1).ravel()
    images = np.arange(8000) // 2
    folds = CrossValidation.by_image(labels, images, seed=0)
    accuracy, missing = held_out(folds, mean_of_others(np.eye(4)[labels], images))
    assert accuracy == pytest.approx(0.7, abs=0.02)
    assert missing == pytest.approx(-0.7 * math.log2(0.7) - 0.3 * math.log2(0.1), abs=0.03)


def test_whole_images_are_in_a_fold_and_features_of_noise_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(50, size=400))
    folds = CrossValidation.by_image(rng.integers(3, size=400), images, seed=0)
    for image in range(50):
        assert len(set(folds.folds[images == image].tolist())) <= 1
    assert len(set(folds.folds.tolist())) == FOLDS
    before = folds.frequencies()
    after = folds.fit(rng.normal(size=(400, 10)))
    missing = [-folds.held_out(of)[range(400), folds.labels].mean() for of in (before, after)]
    assert missing[1] < missing[0] + 0.02


@pytest.mark.usefixtures("few_steps")
def test_without_a_texture_brightness_is_told_to_its_limit_and_relative_brightness_above(
    tmp_path: Path,
) -> None:
    config = LeakyShapesConfig(texture_amplitude=0.0)
    found = potential_of(tmp_path, 200, texture_amplitude=0.0)
    own, relative = (found.told[name].accuracy for name in list(found.told)[1:])
    limit = 100 * honest_accuracy_limit(config)
    assert own.low < limit
    assert own.value > limit - 6
    assert relative.low > limit + 20
    best = sampled_accuracy_limit(config, cast_known=True, samples=200)
    assert relative.value < 100 * (best.value + 3 * best.error)
    assert found.potential.accuracy.sign == found.potential.information.sign == 1
    assert found.potential.accuracy.value == pytest.approx(relative.value - own.value)
    assert "leak potential" in found.text() and "points more" in found.reading()


@pytest.mark.usefixtures("few_steps")
@pytest.mark.usefixtures("few_steps")
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    "dials", [{"class_step": 0.0}, {"cast_std": 0.0}, {"objects_per_image": (1, 1)}]
)
def test_where_the_others_tell_nothing_there_is_no_potential(
    dials: dict[str, object], tmp_path: Path
) -> None:
    found = potential_of(tmp_path, **dials)
    assert abs(found.potential.accuracy.value) < 3
    assert abs(found.potential.information.value) < 0.06
    assert abs(found.of_classes.information.value) < 0.06
    if found.potential.accuracy.sign != 1:
        assert "no leak through simple looks" in found.reading()


def test_classes_that_are_the_same_in_an_image_are_told_by_the_others(tmp_path: Path) -> None:
    found = potential_of(tmp_path, class_correlation=1.0)
    assert found.told["classes of the others"].accuracy.value > 95
    assert found.of_classes.information.value == pytest.approx(found.entropy, abs=0.2)


def test_the_command_prints_the_same_json_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_leaky_shapes(tmp_path / "shapes", 14, 0, split="train")
    line = ["leak-potential", "--coco", str(made.annotations), str(made.images)]
    printed = []
    for _ in range(2):
        assert cli.main([*line, "--images", "12", "--format", "json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    found = json.loads(printed[0])
    assert found["images"] == 12
    assert found["classes"] == ["class_0", "class_1", "class_2", "class_3"]
    assert {*found["potential"]} == {"accuracy", "information"}


def one_class(content: dict, folder: Path) -> None:
    for item in content["annotations"]:
        item["category_id"] = 1


def no_objects(content: dict, folder: Path) -> None:
    content["annotations"] = []


def few_images(content: dict, folder: Path) -> None:
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] < 4]


def wrong_box(content: dict, folder: Path) -> None:
    content["annotations"][0]["bbox"] = [0, 0, math.inf, 5]


def unreadable(content: dict, folder: Path) -> None:
    (folder / "images" / "000003.png").write_text("no image")


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (one_class, ["annotations.json", "1 classes", "2 classes are needed"]),
        (no_objects, ["annotations.json", "no annotations"]),
        (few_images, ["annotations.json", "objects of 3 images", "10 images"]),
        (wrong_box, ["000000.png, annotation 1", "bbox"]),
        (unreadable, ["annotations.json", "000003.png cannot be read"]),
    ],
)
def test_what_cannot_be_measured_is_named(spoil, words: list[str], tmp_path: Path, capsys) -> None:
    made = make_leaky_shapes(tmp_path / "shapes", 12, 0, split="train")
    content = json.loads(made.annotations.read_text())
    spoil(content, made.images.parent)
    made.annotations.write_text(json.dumps(content))
    assert cli.main(["leak-potential", "--coco", str(made.annotations), str(made.images)]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert said.count("error:") == 1
