"""The embedded datasets, known by name as Detectron2's builtin ones are."""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from ..config import ConfigError
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


class BuiltinDataset(NamedTuple):
    """An embedded dataset.

    Attributes:
        folder: that holds its splits, under the folder of all datasets.
        split: "train" or "val".
        dials: that it is made with.
    """

    folder: str
    split: str
    dials: LeakyShapesConfig


def find_builtin(name: str) -> BuiltinDataset | None:
    """The embedded dataset of a name, made or not.

    Args:
        name: one of :data:`LEAKY_SHAPES`, such as ``leaky_shapes_train``, or the same with other
            dials of :class:`LeakyShapesConfig`, written as the arguments of a call:
            ``leaky_shapes(cast_std=10, objects_per_image=(2, 3))_train``.

    Returns:
        None for any other name.

    Raises:
        ConfigError: a dial does not exist, or cannot have its value.
    """
    written = re.fullmatch(r"(\w+)(\(.*\))(_\w+)", name)
    base, dials, suffix = written.groups() if written else (name, "()", "")
    if base + suffix not in LEAKY_SHAPES:
        return None
    folder, split = LEAKY_SHAPES[base + suffix]
    try:
        changed = replace(_DIALS[folder], **_read_dials(dials))
    except ConfigError as error:
        raise ConfigError(f'DATASETS: "{name}": {error}') from error
    return BuiltinDataset(name.removesuffix(suffix or f"_{split}"), split, changed)


def _read_dials(text: str) -> dict[str, object]:
    """The arguments of a call, ``(name=value, ...)``."""
    try:
        call = ast.parse(f"dials{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(text)
        dials = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{text} has to be dials with numbers, such as (cast_std=10,objects_per_image=(2,3))."
        ) from error
    known = [dial.name for dial in fields(LeakyShapesConfig)]
    for name in dials:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ConfigError(
                f'LeakyShapes has no dial "{name}".{hint} Its dials are {", ".join(known)}.'
            )
    return dials


def register_builtin(names: Iterable[str]) -> None:
    """Register those of ``names`` that are embedded datasets, making them if they are not there.

    Each lies in a folder of its name, without the split, under the folder that the environment
    variable DETECTRON2_DATASETS names, by default ``datasets``; ``bn-detection
    make-leaky-shapes`` makes the same ones.

    Args:
        names: of datasets, as :func:`find_builtin` takes them; others are passed over.

    Raises:
        ConfigError: something else is in their place, or a dial is wrong.
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for name in names:
        found = find_builtin(name)
        if found is not None:
            path = root / found.folder / found.split
            if not path.exists():
                print(f"Making the embedded dataset {name} in {path}", flush=True)
                number = _SPLITS[found.split]
                make_leaky_shapes(path, number, seed=0, config=found.dials, split=found.split)
            register_coco_json([[name, str(path / "annotations.json"), str(path / "images")]])
