"""What Detectron2 has to know of keypoints: their names, and which change places in a mirror."""

from __future__ import annotations

import re
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import ConfigError
from .coco_content import read_coco
from .coco_json import read_coco_json

_SIDES = {"left": "right", "Left": "Right", "l": "r", "L": "R"}
_MIRRORED = _SIDES | {right: left for left, right in _SIDES.items()}


def register_keypoints(cfg: CfgNode) -> None:
    """Tell Detectron2 the names of the keypoints in DATASETS.COCO_JSON, and their mirror images.

    Args:
        cfg: the config.

    Raises:
        ConfigError: the categories of a file name other keypoints, none, or other than
            MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS.
    """
    used = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    for name, json_file, _ in read_coco_json(cfg.DATASETS.COCO_JSON):
        metadata = MetadataCatalog.get(name)
        bases = {other.partition("@")[0] for other in used}
        if name not in bases or metadata.get("keypoint_names") is not None:
            continue
        where = f'DATASETS.COCO_JSON: dataset "{name}": {json_file}'
        names = _names(json_file, where)
        if names is None:  # refused where they are needed
            continue
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if len(names) != number:
            raise ConfigError(
                f"{where}: its categories name {len(names)} keypoints, and "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}; set it to {len(names)}."
            )
        pairs = cfg.DATASETS.KEYPOINT_FLIPS or mirrored(names)
        _check_pairs(pairs, names)
        metadata.set(keypoint_names=names, keypoint_flip_map=[tuple(pair) for pair in pairs])


def mirrored(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of names that differ in their side: left and right, or l and r.

    Args:
        names: such as "left_eye", "rEar" or "nose".
    """
    pairs = []
    for name in names:
        other = re.sub(
            r"left|right|Left|Right|(?<![a-zA-Z])[lrLR](?![a-z])",
            lambda match: _MIRRORED[match[0]],
            name,
            count=1,
        )
        if other in names and other != name and (other, name) not in pairs:
            pairs.append((name, other))
    return pairs


def _names(json_file: str, where: str) -> list[str] | None:
    try:
        categories = read_coco(json_file)["categories"]
    except ValueError as error:
        raise ConfigError(f"{where} cannot be used: {error}") from error
    named = [category["keypoints"] for category in categories if category.get("keypoints")]
    right = all(
        isinstance(names, list) and all(isinstance(n, str) for n in names) for names in named
    )
    if not named:
        return None
    if not right or any(names != named[0] for names in named):
        raise ConfigError(
            f'{where}: MODEL.KEYPOINT_ON needs "keypoints": ["nose", ...] in a category, the same '
            "in all that have some."
        )
    return named[0]


def _check_pairs(pairs: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    for pair in pairs:
        if len(pair) != 2 or not all(name in names for name in pair):
            raise ConfigError(
                f"DATASETS.KEYPOINT_FLIPS {pair}: each entry is [left, right], two of "
                f"{', '.join(names)}."
            )
