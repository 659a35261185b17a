"""The best accuracy from one object: closed form, brute force, and classifiers of drawn images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from scipy.special import logsumexp
from scipy.stats import norm

from bn_detection import ConfigError
from bn_detection.data import (
    LeakyShapesConfig,
    draw_image,
    draw_shape,
    honest_accuracy_limit,
    make_leaky_shapes,
    register_coco_json,
    register_corrupted,
)
from bn_detection.leakage import sampled_accuracy_limit
from bn_detection.leakage.limits import compare_with_limit, leaky_shapes_config

NO_TEXTURE = LeakyShapesConfig(texture_amplitude=0.0)
IMAGES = 300


@pytest.mark.parametrize("class_step", [22.0, 60.0])
def test_monte_carlo_agrees_with_the_closed_form(class_step: float) -> None:
    config = LeakyShapesConfig(texture_amplitude=0.0, class_step=class_step)
    limit = sampled_accuracy_limit(config, samples=1000)
    assert 0 < limit.error < 0.01
    assert limit.value == pytest.approx(honest_accuracy_limit(config), abs=4 * limit.error)


def test_both_cues_against_brute_force() -> None:
    config = LeakyShapesConfig(
        object_size=(8, 9), texture_amplitude=6.0, cast_std=20.0, num_classes=3
    )
    limit = sampled_accuracy_limit(config, samples=600)
    rng = np.random.default_rng(1)
    right = [brute_force_is_right(config, rng) for _ in range(250)]
    error = math.hypot(limit.error, np.std(right) / math.sqrt(len(right)))
    assert limit.value == pytest.approx(np.mean(right), abs=3.5 * error)
    assert limit.value > honest_accuracy_limit(config) + 0.1


def brute_force_is_right(config: LeakyShapesConfig, rng: np.random.Generator) -> bool:
    """Whether the most probable class is right, by sums over a grid of brightness and phase."""
    width, height = rng.integers(8, 10, 2)
    rows, columns = np.nonzero(draw_shape(rng, 0, 0, width, height)[0])
    label, phase = rng.integers(config.num_classes), rng.uniform(0, 2 * math.pi)
    spread = math.sqrt(config.cast_std**2 + config.object_std**2)

    def texture(c: int, phi: float) -> np.ndarray:
        shift = np.where(rows >= height / 2, 2 * math.pi * c / config.num_classes, 0)
        wave = np.sin(2 * math.pi * columns / config.texture_period + phi + shift)
        return config.texture_amplitude * wave

    def level(c: int) -> float:
        return config.base_brightness + config.class_step * (c - (config.num_classes - 1) / 2)

    pixels = rng.normal(level(label) + rng.normal(0, spread) + texture(label, phase), 10.0)
    offsets = np.linspace(-4.5 * spread, 4.5 * spread, 150)
    phases = np.linspace(0, 2 * math.pi, 30, endpoint=False)
    evidence = []
    for c in range(config.num_classes):
        waves = np.stack([texture(c, phi) for phi in phases])
        errors = pixels - level(c) - waves  # (phases, pixels)
        squares = (errors**2).sum(1)[:, None] - 2 * errors.sum(1)[:, None] * offsets
        squares = squares + len(pixels) * offsets**2
        evidence.append(logsumexp(-squares / 200 + norm.logpdf(offsets, scale=spread)))
    return int(np.argmax(evidence)) == label


def test_an_honest_classifier_stays_below_and_one_told_the_cast_exceeds() -> None:
    limit = honest_accuracy_limit(NO_TEXTURE)
    levels = 128 + 22 * (np.arange(4) - 1.5)
    honest, told = [], []
    for index in range(IMAGES):
        image = draw_image(NO_TEXTURE, 3, "test", index)
        labels = np.array([thing.label for thing in image.objects])
        seen = np.array([image.pixels[image.owner == i].mean() for i in range(len(image.objects))])
        for right, brightness in ((honest, seen), (told, seen - image.cast)):
            nearest = np.abs(brightness[:, None] - levels).argmin(1)
            right.append([(nearest == labels).sum(), len(labels)])
    accuracy, error = ratio_and_error(honest)
    assert accuracy - 2 * error < limit
    assert error < 0.02
    accuracy, error = ratio_and_error(told)
    assert accuracy - 5 * error > limit
    best = sampled_accuracy_limit(NO_TEXTURE, cast_known=True, samples=300)
    assert accuracy - 2 * error < best.value
    assert best.value > limit + 0.3


def ratio_and_error(of_images: list[list[int]]) -> tuple[float, float]:
    """An accuracy, and its standard error with the images as samples."""
    right, count = np.array(of_images, float).T
    accuracy = right.sum() / count.sum()
    return accuracy, np.sqrt(((right - accuracy * count) ** 2).sum()) / count.sum()


def test_no_pixel_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match="pixel_noise is 0"):
        sampled_accuracy_limit(LeakyShapesConfig(pixel_noise=0.0))


def test_dials_of_a_registered_dataset(tmp_path: Path) -> None:
    make_leaky_shapes(tmp_path / "shapes", 1, seed=0, config=NO_TEXTURE, split="val")
    (tmp_path / "other.json").write_text('{"images": [], "annotations": [], "categories": []}')
    images = str(tmp_path / "shapes" / "images")
    names = ["limits_shapes", "limits_other"]
    files = [str(tmp_path / "shapes" / "annotations.json"), str(tmp_path / "other.json")]
    register_coco_json([[n, file, images] for n, file in zip(names, files, strict=True)])
    register_corrupted("limits_shapes@contrast:3")
    try:
        assert leaky_shapes_config(names[0]) == NO_TEXTURE
        assert leaky_shapes_config(names[1]) is None
        assert leaky_shapes_config("limits_shapes@contrast:3") is None
    finally:
        for name in (*names, "limits_shapes@contrast:3"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("file", ["nowhere.json", "http://127.0.0.1:9/nowhere.json"])
def test_no_dials_of_an_annotation_file_that_cannot_be_opened(file: str) -> None:
    MetadataCatalog.get("limits_nowhere").json_file = file
    try:
        assert leaky_shapes_config("limits_nowhere") is None
    finally:
        MetadataCatalog.remove("limits_nowhere")


def test_comparison_is_in_points() -> None:
    compared = compare_with_limit(NO_TEXTURE, np.array([60.0, *np.linspace(50, 70, 201)]), 9, 10**9)
    assert (compared.cue, compared.method) == ("leaky cue", "closed form")
    assert compared.limit == pytest.approx(41.17, abs=0.01)
    assert compared.above.value == pytest.approx(60 - compared.limit)
    assert compared.above.low == pytest.approx(50.5 - compared.limit)
    assert compare_with_limit(LeakyShapesConfig(), np.full(3, 99.0), 9, 2).method == "Monte Carlo"
