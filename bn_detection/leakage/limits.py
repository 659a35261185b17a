"""The best accuracy of a classifier that sees one object of LeakyShapes: more than that leaked."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import ConfigError
from ..data import LeakyShapesConfig, draw_shape, honest_accuracy_limit
from ..estimate import Estimate

_SAMPLES = 500
# Characters of an annotation file in which LeakyShapes says what it is; COCO's may be large.
_HEAD = 10_000


class SampledAccuracy(NamedTuple):
    """A fraction, and the standard error of its Monte Carlo estimate."""

    value: float
    error: float


@dataclass(frozen=True)
class LimitComparison:
    """Accuracy on RoIs that see one object, against the best possible from one object.

    Attributes:
        cue: what shows the class of an object: "leaky cue", "honest cue" or "both cues".
        method: "closed form" or "Monte Carlo".
        limit: percent.
        limit_error: its standard error, points; 0 of the closed form.
        rois: how many foreground RoIs see one object only.
        accuracy: of these, with the statistics of the own worker's batch, percent.
        above: accuracy minus limit, in points: leakage, where positive.
    """

    cue: str
    method: str
    limit: float
    limit_error: float
    rois: int
    accuracy: Estimate
    above: Estimate

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {
            "dataset cue": self.cue,
            "method": self.method,
            "limit": self.limit,
            "limit_error": self.limit_error,
            "rois": self.rois,
            "accuracy": self.accuracy.to_json(),
            "above": self.above.to_json(),
        }


@functools.cache
def sampled_accuracy_limit(
    config: LeakyShapesConfig,
    *,
    cast_known: bool = False,
    samples: int = _SAMPLES,
    seed: int = 0,
) -> SampledAccuracy:
    """The Bayes-optimal accuracy of a classifier that sees the pixels of one object.

    It knows the generator. Pixels are p = b + A sin(w x + phi [+ 2 pi c/C on the lower half]) +
    noise, b = base + step (c - (C - 1) / 2) + cast + own. Cast and own brightness are Gaussian, and
    integrated out exactly; the phase phi is uniform, and integrated on a grid finer than its
    posterior. The estimate is the mean of the largest posterior, over objects drawn without
    rounding and clipping, which could only lower it.

    Args:
        config: the dials, with pixel noise.
        cast_known: whether the classifier is told the cast of the image, as one that reads its
            batch is.
        samples: objects to draw.
        seed: of the drawing.

    Raises:
        ConfigError: ``pixel_noise`` is 0.
    """
    if config.pixel_noise == 0:
        raise ConfigError(
            "LeakyShapes pixel_noise is 0; the Monte Carlo limit needs noise, such as 10."
        )
    rng = np.random.default_rng(seed)
    best = np.array([_largest_posterior(config, rng, cast_known) for _ in range(samples)])
    return SampledAccuracy(float(best.mean()), float(best.std(ddof=1) / math.sqrt(samples)))


def _largest_posterior(
    config: LeakyShapesConfig, rng: np.random.Generator, cast_known: bool
) -> float:
    """Of one drawn object."""
    scale = 2 ** int(rng.integers(config.object_scales))
    low, high = config.object_size
    width, height = (scale * rng.integers(low, high + 1, 2)).tolist()
    rows, columns = np.nonzero(draw_shape(rng, 0, 0, width, height)[0])
    angles = 2 * np.pi * columns / (scale * config.texture_period)
    label, phase = int(rng.integers(config.num_classes)), rng.uniform(0, 2 * np.pi)
    spread = config.object_std if cast_known else math.hypot(config.cast_std, config.object_std)

    labels = np.arange(config.num_classes)
    levels = config.class_step * (labels - (config.num_classes - 1) / 2)
    lower = rows >= height / 2
    of_class = angles + 2 * np.pi * labels[:, None] / config.num_classes * lower
    amplitude, noise, count = config.texture_amplitude, config.pixel_noise, len(rows)
    pixels = (
        levels[label]
        + rng.normal(0, spread)
        + amplitude * np.sin(of_class[label] + phase)
        + rng.normal(0, noise, count)
    )

    # The covariance of the pixels given class and phase is noise^2 I + spread^2 1 1^T.
    shared = spread**2 / (noise**2 + count * spread**2)

    def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product: np.ndarray = (a * b).sum(-1) - shared * a.sum(-1) * b.sum(-1)
        return product / noise**2

    residual = pixels - levels[:, None]
    sine, cosine = amplitude * np.sin(of_class), amplitude * np.cos(of_class)
    finest = amplitude * math.sqrt(count / 2) / noise  # 1 / standard deviation of the phase
    phases = np.linspace(0, 2 * np.pi, max(64, math.ceil(4 * np.pi * finest)), endpoint=False)
    c, s = np.cos(phases), np.sin(phases)

    def column(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return inner(a, b)[:, None]

    distance = (
        column(residual, residual)
        - 2 * (c * column(residual, sine) + s * column(residual, cosine))
        + c**2 * column(sine, sine)
        + 2 * c * s * column(sine, cosine)
        + s**2 * column(cosine, cosine)
    )
    likelihood = np.exp(-(distance - distance.min()) / 2).sum(1)
    return float(likelihood.max() / likelihood.sum())


def leaky_shapes_config(dataset_name: str) -> LeakyShapesConfig | None:
    """The dials that a registered dataset was made with, or None if it is not LeakyShapes.

    A corrupted dataset is none: what corrupts an image can mix its objects. Nor is one whose
    annotation file, which not every loader of a dataset reads, cannot be opened.
    """
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None or "@" in dataset_name:
        return None
    try:
        with open(PathManager.get_local_path(json_file), encoding="utf-8") as file:
            if '"leaky_shapes"' not in file.read(_HEAD):
                return None
            file.seek(0)
            dials: dict[str, Any] = json.load(file)["info"]["leaky_shapes"]["config"]
    except OSError:
        return None
    for key, value in dials.items():
        dials[key] = tuple(value) if isinstance(value, list) else value
    return LeakyShapesConfig(**dials)


def compare_with_limit(
    config: LeakyShapesConfig, accuracy: np.ndarray, rois: int, units: int
) -> LimitComparison:
    """Compare an accuracy with the best possible from one object.

    Args:
        config: the dials of the dataset.
        accuracy: percent, of the images and of their resamples, as for :meth:`Estimate.of`.
        rois: how many it is the accuracy of.
        units: that were resampled.

    Raises:
        ConfigError: a texture without pixel noise.
    """
    textured = config.texture_amplitude > 0
    cue = "leaky cue" if not textured else "both cues" if config.class_step > 0 else "honest cue"
    if textured:
        limit, error = sampled_accuracy_limit(config)
    else:
        limit, error = honest_accuracy_limit(config), 0.0
    return LimitComparison(
        cue=cue,
        method="Monte Carlo" if textured else "closed form",
        limit=100 * limit,
        limit_error=100 * error,
        rois=rois,
        accuracy=Estimate.of(accuracy, units),
        above=Estimate.of(accuracy - 100 * limit, units),
    )
