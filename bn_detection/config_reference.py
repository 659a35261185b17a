"""The reference of the configuration keys, from the comments in ``config.py``.

Run as a module it prints ``docs/configuration.md``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import config

_PAGES = {
    "BN": ("normalization.md", "extending/partition.md"),
    "BN.POPULATION": ("population.md", "recalibration.md"),
    "BN.FREEZE": ("population.md#frozen-endings",),
    "BN.LEVELS": ("levels.md",),
    "BN.TRACE": ("population.md#watching-them-the-trace",),
    "BN.LEAKAGE": ("leakage.md", "diagnosis.md"),
    "BN.DIAGNOSIS": ("diagnosis.md#findings",),
    "BN.SHUFFLE": ("normalization.md#shuffling-without-moving-rois",),
    "BN.GHOST": ("normalization.md",),
    "BN.RENORM": ("normalization.md#batch-renormalization",),
    "DATASETS": ("../README.md#your-own-dataset-from-yaml-alone",),
    "SOLVER.AMP": ("gpu.md#mixed-precision",),
    "MODEL.ROI_KEYPOINT_HEAD": ("normalization.md",),
    "MODEL.TIMM": ("bccd.md#a-backbone-of-timm",),
}
"""Where the keys of a node are explained."""

_PAGE = """\
# Configuration keys

<!-- Made from bn_detection/config.py: python -m bn_detection.config_reference > docs/configuration.md -->

Every key that `bn_detection.add_bn_detection_config(cfg)` adds to a Detectron2 config, with its default.
In a YAML file the parts of a name are nested; on the command line they are joined by dots:

    BN:
      POPULATION:
        ESTIMATOR: "pooled"

    bn-detection train --config-file mask_rcnn_bn.yaml BN.POPULATION.ESTIMATOR pooled

A value that cannot be is refused before the first iteration, by a message that says what can be.

## Keys of Detectron2 that take more values

| key | more values | page |
| --- | --- | --- |
| `MODEL.ROI_BOX_HEAD.NAME` | `"BNConvFCHead"` | [normalization.md](normalization.md) |
| `MODEL.ROI_MASK_HEAD.NAME` | `"BNConvUpsampleHead"` | [normalization.md](normalization.md) |
| `MODEL.ROI_KEYPOINT_HEAD.NAME` | `"BNConvDeconvKeypointHead"` | [normalization.md](normalization.md) |
| `MODEL.META_ARCHITECTURE` | `"BNRetinaNet"` | [levels.md](levels.md) |
| `MODEL.ROI_BOX_HEAD.NORM`, `MODEL.ROI_MASK_HEAD.NORM`, `MODEL.RETINANET.NORM`, with these | the norms that `BN.CONVERT` lists below | [normalization.md](normalization.md) |
| `MODEL.BACKBONE.NAME` | `"SmallConvBackbone"`, `"SmallPyramidBackbone"`, of the quickstart | |
| `MODEL.BACKBONE.NAME` | `"build_timm_backbone"`, `"build_timm_fpn_backbone"`, `"build_retinanet_timm_fpn_backbone"` | [bccd.md](bccd.md#a-backbone-of-timm) |
| `DATASETS.TRAIN`, `DATASETS.TEST` | names of embedded datasets, also with other dials, `leaky_shapes(cast_std=10)_train`, and `name@corruption:severity` | [when_it_leaks.md](when_it_leaks.md#datasets-with-other-dials), [domains.md](domains.md) |
"""  # noqa: E501


class Key(NamedTuple):
    """A configuration key, or a node of them.

    Attributes:
        name: with dots.
        default: the value; None for a node.
        text: the default as ``config.py`` writes it.
        meaning: the comment above it; "" if there is none.
        is_node: whether it holds other keys.
    """

    name: str
    default: Any
    text: str
    meaning: str
    is_node: bool


def read_keys() -> list[Key]:
    """The keys that ``add_bn_detection_config`` adds, in its order, without the nodes."""
    return [key for key in _read() if not key.is_node]


def config_reference() -> str:
    """The text of ``docs/configuration.md``."""
    groups: dict[str, list[Key]] = {}
    for key in read_keys():
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    meanings = {key.name: key.meaning for key in _read()}
    sections = [_section(name, meanings.get(name, ""), keys) for name, keys in groups.items()]
    return _PAGE + "".join(sections)


def _section(node: str, meaning: str, keys: list[Key]) -> str:
    pages = ", ".join(f"[{Path(page.partition('#')[0]).name}]({page})" for page in _PAGES[node])
    about = f"{meaning} See {pages}.".lstrip()
    rows = [f"| `{key.name}` | `{key.text}` | {key.meaning} |" for key in keys]
    head = ["| key | default | meaning |", "| --- | --- | --- |"]
    return "\n".join(["", f"## `{node}`", "", about, "", *head, *rows, ""])


def _read() -> Iterator[Key]:
    source = Path(config.__file__).read_text()
    lines = source.splitlines()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and node.name == config.add_bn_detection_config.__name__
    )
    for node in function.body:
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).removeprefix("cfg.")
            text = ast.get_source_segment(source, node.value) or ""
            is_node = isinstance(node.value, ast.Call)
            default = None if is_node else ast.literal_eval(node.value)
            yield Key(name, default, text, _comment_above(lines, node.lineno), is_node)


def _comment_above(lines: list[str], number: int) -> str:
    """The comment that ends in the line before line ``number``, from 1."""
    first = number - 1
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[first : number - 1])


if __name__ == "__main__":
    print(config_reference(), end="")
