"""LeakyShapes: COCO-format images in which the leak between the objects of an image is a dial.

Every image has a hidden *cast*, a brightness offset that all of its objects share and its
background does not show. The class of an object is encoded twice:

* the *leaky cue*, its brightness relative to the other objects of its image: of little use to a
  classifier that sees one RoI, and plain to one that sees the RoI's batch;
* the *honest cue*, the phase of the stripes on its lower half relative to its upper half: enough by
  itself, but harder to learn.

With the honest cue off, the best possible accuracy of a classifier that sees one object has a
closed form, :func:`honest_accuracy_limit`; accuracy above it is leakage.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import ConfigError
from ..dials import LeakyShapesConfig
from .leaky_drawing import draw_image

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the same parameters would no longer give the same pixels."""


@dataclass(frozen=True)
class LeakyShapesSummary:
    """What :func:`make_leaky_shapes` left on disk.

    Attributes:
        annotations: path of the COCO-format annotations.
        images: the folder of the images.
        num_images: how many images.
        num_objects: how many objects in all of them.
        clipped_fraction: the share of object pixels that did not fit into 0 to 255.
        reused: whether an identical dataset was there already.
    """

    annotations: Path
    images: Path
    num_images: int
    num_objects: int
    clipped_fraction: float
    reused: bool


def make_leaky_shapes(
    root: str | os.PathLike[str],
    num_images: int,
    seed: int,
    config: LeakyShapesConfig | None = None,
    *,
    split: str,
    progress: bool = False,
) -> LeakyShapesSummary:
    """Write a dataset: ``root/images/*.png`` and ``root/annotations.json`` in COCO's format.

    ``root`` appears complete or not at all. A dataset made with the same parameters is used again;
    anything else at ``root`` is left alone. ``info["leaky_shapes"]`` in the annotations holds the
    parameters, and each image its ``cast``.

    Args:
        root: the folder to make; its parents are made if needed.
        num_images: how many images. The first ``n`` do not depend on it.
        seed: 0 or more.
        config: the dials; by default :class:`LeakyShapesConfig`'s.
        split: such as ``"train"``: splits of one seed have different images.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Raises:
        ConfigError: ``root`` holds something else, or an argument is out of its range.
    """
    if num_images < 1 or seed < 0:
        raise ConfigError(
            f"LeakyShapes num_images is {num_images} and seed is {seed}; they must be at least 1 "
            "and at least 0."
        )
    root = Path(os.path.abspath(root))
    config = config or LeakyShapesConfig()
    made_with = {
        "version": VERSION,
        "split": split,
        "seed": seed,
        "num_images": num_images,
        "config": _as_json(config),
    }
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        return _reuse(root, made_with)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        # A subfolder: the temporary directory itself is for its owner's eyes only.
        folder = Path(scratch, root.name)
        (folder / "images").mkdir(parents=True)
        _write(folder, made_with, config, progress)
        try:
            folder.rename(root)
        except OSError:
            if not root.is_dir():
                raise
            return _reuse(root, made_with)  # another process was faster
    return _summary(root, _load(root), reused=False)


def _write(
    folder: Path, made_with: dict[str, Any], config: LeakyShapesConfig, progress: bool
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    clipped = covered = 0
    split, seed, num_images = (made_with[key] for key in ("split", "seed", "num_images"))
    for index in tqdm(
        range(num_images), desc=split, unit="image", disable=None if progress else True
    ):
        drawn = draw_image(config, seed, split, index)
        clipped += drawn.clipped
        covered += int(np.count_nonzero(drawn.owner >= 0))
        name = f"{index:06d}.png"
        grey = Image.fromarray(drawn.pixels)
        Image.merge("RGB", (grey,) * 3).save(folder / "images" / name, compress_level=1)
        images.append(
            {
                "id": index + 1,
                "file_name": name,
                "width": config.image_size,
                "height": config.image_size,
                "cast": round(drawn.cast, 4),
            }
        )
        for thing in drawn.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": thing.label + 1,
                    "segmentation": [np.round(thing.polygon, 2).ravel().tolist()],
                    "bbox": list(thing.box),
                    "area": round(_polygon_area(thing.polygon), 2),
                    "iscrowd": 0,
                }
            )
    dataset = {
        "info": {
            "description": f"LeakyShapes, {split}",
            "leaky_shapes": made_with,
            "clipped_fraction": clipped / covered,
        },
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": c + 1, "name": f"class_{c}", "supercategory": "shape"}
            for c in range(config.num_classes)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(dataset, separators=(",", ":")))


def _polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


def _as_json(config: LeakyShapesConfig) -> dict[str, Any]:
    """The dials as JSON gives them back: lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def _load(root: Path) -> dict[str, Any]:
    try:
        dataset = json.loads((root / "annotations.json").read_text())
        dataset["info"]["leaky_shapes"]["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{root} exists and is not a LeakyShapes dataset. Give another folder, or remove it."
        ) from error
    return dataset


def _reuse(root: Path, made_with: dict[str, Any]) -> LeakyShapesSummary:
    dataset = _load(root)
    found = dataset["info"]["leaky_shapes"]
    # A dial that did not exist yet had no effect, as its default has none.
    found["config"] = {**_as_json(LeakyShapesConfig()), **found["config"]}
    if found != made_with:
        old, new = ({**block, **block["config"]} for block in (found, made_with))
        names = [name for name in {**old, **new} if name != "config"]
        differing = [
            f"{name} {old.get(name)} there, {new.get(name)} asked for"
            for name in names
            if old.get(name) != new.get(name)
        ]
        raise ConfigError(
            f"{root} holds a LeakyShapes dataset made with other parameters "
            f"({'; '.join(differing)}). Give another folder, or remove it."
        )
    there = sum(1 for _ in (root / "images").glob("*.png"))
    if there != made_with["num_images"]:
        raise ConfigError(
            f"{root} holds {there} of {made_with['num_images']} images. Remove it to make it anew."
        )
    logger.info("Using the dataset at %s, made with the same parameters.", root)
    return _summary(root, dataset, reused=True)


def _summary(root: Path, dataset: dict[str, Any], reused: bool) -> LeakyShapesSummary:
    return LeakyShapesSummary(
        annotations=root / "annotations.json",
        images=root / "images",
        num_images=len(dataset["images"]),
        num_objects=len(dataset["annotations"]),
        clipped_fraction=dataset["info"]["clipped_fraction"],
        reused=reused,
    )
