"""docs/configuration.md is what config.py says, and config.py says something of every key."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from bn_detection.config import add_bn_detection_config
from bn_detection.config_reference import config_reference, read_keys

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"


def keys_of(node: CfgNode, prefix: str) -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in node.items():
        path = f"{prefix}.{name}" if prefix else name
        leaves.update(keys_of(value, path) if isinstance(value, CfgNode) else {path: value})
    return leaves


def test_every_key_that_the_package_adds_has_a_comment() -> None:
    stock = keys_of(get_cfg(), "")
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    ours = {key: value for key, value in keys_of(cfg, "").items() if key not in stock}
    read = {key.name: key for key in read_keys()}
    assert {name: key.default for name, key in read.items()} == ours
    assert [name for name, key in read.items() if not key.meaning] == []


def test_the_meaning_of_a_key_is_the_comment_above_it() -> None:
    meanings = {key.name: key.meaning for key in read_keys()}
    assert meanings["BN.EPS"] == "Added to the variance before its square root."
    assert meanings["BN.POPULATION.BATCH_SIZE"] == (
        "Images a batch over all workers; 0 for SOLVER.IMS_PER_BATCH."
    )


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text() == config_reference(), (
        "run: python -m bn_detection.config_reference > docs/configuration.md"
    )
