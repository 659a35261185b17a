"""The embedded datasets, known by name as Detectron2's builtin ones are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .coco_json import register_coco_json
from .leaky_shapes import make_leaky_shapes

LEAKY_SHAPES = {"leaky_shapes_train": ("train", 1000), "leaky_shapes_val": ("val", 150)}
"""Split and number of images of each embedded dataset."""


def register_builtin(names: Iterable[str]) -> None:
    """Register those of ``names`` that are embedded datasets, making them if they are not there.

    They lie in ``leaky_shapes`` under the folder that the environment variable DETECTRON2_DATASETS
    names, by default ``datasets``; ``tools/make_leaky_shapes.py`` makes the same ones.

    Args:
        names: of datasets; others are passed over.

    Raises:
        ConfigError: something else is in their place.
    """
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "leaky_shapes"
    for name in names:
        if name in LEAKY_SHAPES:
            split, num_images = LEAKY_SHAPES[name]
            if not (folder / split).exists():
                print(f"Making the embedded dataset {name} in {folder / split}", flush=True)
                make_leaky_shapes(folder / split, num_images, seed=0, split=split)
            paths = folder / split / "annotations.json", folder / split / "images"
            register_coco_json([[name, *map(str, paths)]])
