"""The embedded datasets, known by name as Detectron2's builtin ones are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..dials import LeakyShapesConfig
from .coco_json import register_coco_json
from .leaky_shapes import make_leaky_shapes

_SPLITS = {"train": 1000, "val": 150}
"""Number of images of each split."""

_DIALS = {
    "leaky_shapes": LeakyShapesConfig(),
    # For feature levels: objects of three octaves. Without a cast, all of them show their class.
    "leaky_shapes_sizes": LeakyShapesConfig(
        objects_per_image=(4, 6), object_size=(12, 17), object_scales=3, cast_std=0.0
    ),
    # Without the honest cue the best accuracy from one object has a closed form.
    "leaky_shapes_no_texture": LeakyShapesConfig(texture_amplitude=0.0),
}

LEAKY_SHAPES = {f"{folder}_{split}": (folder, split) for folder in _DIALS for split in _SPLITS}
"""Folder and split of each embedded dataset."""


def register_builtin(names: Iterable[str]) -> None:
    """Register those of ``names`` that are embedded datasets, making them if they are not there.

    Each lies in a folder of its name, without the split, under the folder that the environment
    variable DETECTRON2_DATASETS names, by default ``datasets``; ``bn-detection
    make-leaky-shapes`` makes the same ones.

    Args:
        names: of datasets; others are passed over.

    Raises:
        ConfigError: something else is in their place.
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for name in names:
        if name in LEAKY_SHAPES:
            folder, split = LEAKY_SHAPES[name]
            path = root / folder / split
            if not path.exists():
                print(f"Making the embedded dataset {name} in {path}", flush=True)
                make_leaky_shapes(path, _SPLITS[split], seed=0, config=_DIALS[folder], split=split)
            register_coco_json([[name, str(path / "annotations.json"), str(path / "images")]])
