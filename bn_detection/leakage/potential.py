"""How much a head could leak, before any training: what the others of its image tell of an object.

A head that normalizes over the RoIs of an image sees each object relative to the others. Where this
tells the class better than the look of the object itself, training can take it for a shortcut.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..config import ConfigError
from ..data import register_coco_json
from ..data.records import Needs, check_objects, check_records
from ..estimate import Estimate, Ratio, resample
from .classifier import FOLDS, CrossValidation
from .looks import Looks, mean_of_others, number_of_others, read_looks

CLASSES, LOOK, RELATIVE = "classes of the others", "own look", "own look, and relative to others"


@dataclass(frozen=True)
class Told:
    """How well the class of an object is told, on images that the classifier never saw.

    Attributes:
        accuracy: percent of objects.
        information: bits an object, over the frequencies of the classes.
    """

    accuracy: Estimate
    information: Estimate

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {key: value.to_json() for key, value in vars(self).items()}


@dataclass(frozen=True)
class LeakPotential:
    """What the objects of an image tell of each other; intervals are over images.

    Attributes:
        dataset: the annotations.
        images: with objects, that were used.
        objects: in them.
        classes: names of those that these objects have.
        entropy: of the class, bits.
        most_frequent: percent of objects that have the most frequent class.
        told: by what is looked at.
        of_classes: what the classes of the others add to the frequencies of the classes.
        potential: what an object's look relative to the others' adds to its own look: the leak
            potential.
    """

    dataset: str
    images: int
    objects: int
    classes: list[str]
    entropy: float
    most_frequent: float
    told: dict[str, Told]
    of_classes: Told
    potential: Told

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers; null for what there is none of."""
        told = {name: of.to_json() for name, of in self.told.items()}
        gains = {name: getattr(self, name).to_json() for name in ("of_classes", "potential")}
        return vars(self) | {"told": told} | gains

    def text(self) -> str:
        """For a terminal: the table, and how to read it."""
        return (
            f"{self.dataset}: {self.objects} objects of {len(self.classes)} classes in "
            f"{self.images} images. The entropy of the class is {self.entropy:.2f} bits.\n"
            f"{self.table()}\n{self.reading()}"
        )

    def table(self, style: str = "simple") -> str:
        """A row each thing that is looked at, and each gain.

        Args:
            style: of the package ``tabulate``.
        """
        rows = [("nothing: the most frequent class", f"{self.most_frequent:.1f}", "0")]
        gains = {"classes of the others add": self.of_classes, "leak potential": self.potential}
        for name, of in (self.told | gains).items():
            rows.append((name, of.accuracy.text(1), of.information.text(2)))
        return str(tabulate(rows, ("told by", "accuracy, %", "bits"), style, disable_numparse=True))

    def reading(self) -> str:
        """What it says of a head that normalizes over the RoIs of an image."""
        gain = self.potential.accuracy
        if gain.sign != 1:
            return (
                "Its look relative to the others tells no more of an object than its own look: "
                "no leak through simple looks is to be expected."
            )
        return (
            f"Its look relative to the others tells {gain.text(1)} points more of an object than "
            "its own look. A head with BN over the RoIs of one image can learn to read this, and "
            "loses it at inference. How much AP that costs also depends on how soon training "
            "finds what an object shows by itself: bn-detection probe measures it. SyncBN or "
            "ShuffleBN over several workers, GN, or no normalization have nothing to read."
        )


def measure_leak_potential(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    num_images: int = 500,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> LeakPotential:
    """Measure how well the class of an object is told by the others of its image.

    A small classifier is trained and judged by cross-validation over images (5 folds), on the
    classes of the others; on simple features of each object's crop; and on these relative to their
    mean over the other objects of the image, in addition.

    Args:
        json_file: annotations in COCO's format.
        image_root: the folder of the images.
        num_images: that are used, random ones; 0 for all.
        resamples: of images, for the 95 % bootstrap intervals.
        seed: of the choice of images, the folds and the resamples.
        progress: whether to show progress on stderr, if that is a terminal.

    Raises:
        ConfigError: names the file; the annotations or an image cannot be read, or there are fewer
            than two classes or ten images with objects.
    """
    for key, value, least in (("num_images", num_images, 0), ("resamples", resamples, 1)):
        if value < least:
            raise ConfigError(f"{key} is {value}; it must be at least {least}.")
    name = os.path.abspath(json_file)
    register_coco_json([[name, name, str(image_root)]])
    records = DatasetCatalog.get(name)
    check_records(records, name, Needs())
    check_objects(records, name)
    order = np.random.default_rng(seed).permutation(len(records))
    chosen = [records[k] for k in order[: num_images or None]]
    looks = read_looks(chosen, name, progress=progress)
    present, labels = np.unique(looks.labels, return_inverse=True)
    images = int(looks.images.max(initial=-1)) + 1
    if len(present) < 2 or images < 2 * FOLDS:
        raise ConfigError(
            f"{name}: the objects of {images} images, of {len(chosen)} that were looked at, have "
            f"{len(present)} classes; {2 * FOLDS} images with objects of 2 classes are needed."
        )
    names = MetadataCatalog.get(name).thing_classes
    return _measure(
        looks._replace(labels=labels),
        dataset=name,
        classes=[names[k] for k in present],
        resamples=resamples,
        seed=seed,
        progress=progress,
    )


def _measure(
    looks: Looks, *, dataset: str, classes: list[str], resamples: int, seed: int, progress: bool
) -> LeakPotential:
    features, labels, images = looks
    folds = CrossValidation.by_image(labels, images, seed)
    one_hot = np.eye(len(classes))[labels]
    others = number_of_others(images)[:, None]
    shares = mean_of_others(one_hot, images) * (others > 0)
    with tqdm(total=3, desc="classifiers", disable=None if progress else True) as bar:
        of_classes = folds.fit(np.concatenate([shares, np.log1p(others)], 1))
        bar.update()
        of_look = folds.fit(features)
        bar.update()
        relative = folds.fit(features - mean_of_others(features, images), base=of_look)
        bar.update()
    fitted = {CLASSES: of_classes, LOOK: of_look, RELATIVE: relative}
    judge = _Judge(folds, images, resamples, seed)
    nothing = judge.values(folds.frequencies())
    values = {name: judge.values(of) for name, of in fitted.items()}
    frequencies = one_hot.mean(0)
    return LeakPotential(
        dataset=dataset,
        images=judge.images,
        objects=len(labels),
        classes=classes,
        entropy=float(-(frequencies * np.log2(frequencies)).sum()),
        most_frequent=float(100 * frequencies.max()),
        told={
            name: judge.told(accuracy, bits - nothing[1])
            for name, (accuracy, bits) in values.items()
        },
        of_classes=judge.told(*(values[CLASSES] - nothing)),
        potential=judge.told(*(values[RELATIVE] - values[LOOK])),
    )


class _Judge:
    """Accuracy and bits on held-out images, and on resamples of these."""

    def __init__(
        self, folds: CrossValidation, images: NDArray[np.int64], resamples: int, seed: int
    ) -> None:
        self._folds, self._image_of = folds, images
        self._objects = np.bincount(images)
        self.images = len(self._objects)
        self._weights = resample(self.images, resamples, seed)

    def values(self, fitted: Tensor) -> NDArray[np.float64]:
        """Percent of objects and mean log2-probability of their classes, float ``(2, 1 + B)``."""
        held_out, labels = self._folds.held_out(fitted), self._folds.labels
        right = 100.0 * (held_out.argmax(1) == labels).numpy()
        bits = held_out.gather(1, labels[:, None])[:, 0].double().numpy() / math.log(2)
        sums = (np.bincount(self._image_of, of) for of in (right, bits))
        return np.stack([Ratio(of, self._objects)(self._weights) for of in sums])

    def told(self, accuracy: NDArray[np.float64], bits: NDArray[np.float64]) -> Told:
        """With intervals."""
        return Told(Estimate.of(accuracy, self.images), Estimate.of(bits, self.images))
