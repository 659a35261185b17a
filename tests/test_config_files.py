"""What is wrong with a config file is said in one line: file, line, reason."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from detectron2.modeling import BACKBONE_REGISTRY
from tooling import QUICKSTART, run_tool

from bn_detection import ConfigError
from bn_detection.engine import argument_parser, load_config
from bn_detection.study.matrix import plan
from bn_detection.study.study_file import read_study

BASE = f"_BASE_: {QUICKSTART / 'mask_rcnn_bn.yaml'}\n"


def refused(path: Path | str, *opts: str) -> str:
    with pytest.raises(ConfigError) as info:
        load_config(argparse.Namespace(config_file=str(path), opts=list(opts)))
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("_BASE_: nowhere.yaml\n", ["line 1", "_BASE_ 'nowhere.yaml'", "no file", "/nowhere.yaml"]),
        (f"SEED: 1\n_BASE_: [{QUICKSTART / 'mask_rcnn_bn.yaml'}, x.yaml]\n", ["line 2", "x.yaml"]),
        ("_BASE_: 3\n", ["line 1", "_BASE_ 3", "path"]),
        ("_BASE_: config.yaml\n", ["_BASE_", "circle"]),
        ("SEED: 1\nMODEL:\n\tMASK_ON: True\n", ["line 3", "\\t"]),
        ("SEED: [1\nMODEL: 3\n", ["line 2", "flow sequence"]),
        ("SEED: 1: 2\n", ["line 1", "mapping values"]),
        ("", ["is empty", "mapping"]),
        ("# nothing\n", ["is empty"]),
        ("- SEED\n- 1\n", ["holds a list", "mapping"]),
        ("SEED\n", ["holds a str"]),
        ("3: 4\n", ["line 1", "key 3"]),
        ("SEED: 2020-13-01\n", ["SEED"]),
        (BASE + "SEED: 2020-01-01\n", ["date"]),
        (BASE + "SEED: one\n", ["line 2", "SEED", "one"]),
        (BASE + "MODEL:\n  MASK_ONN: True\n", ["line 3", "MODEL.MASK_ONN"]),
        (BASE + "MODEL: 3\n", ["line 2", "MODEL takes a group of keys"]),
        ("SEED: 1\nMODEL: 3\n", ["line 2", "MODEL takes a group of keys"]),
        ("MODEL:\n", ["line 1", "MODEL takes a group of keys"]),
        (BASE + "MODEL: {ROI_HEADS: 3}\n", ["line 2", "MODEL.ROI_HEADS takes a group"]),
        (BASE + "SEED: {A: 3}\n", ["SEED"]),
        ("SEED: 1\n---\nSEED: 2\n", ["line 2", "another document"]),
        ("SEED: &a [*a]\n", ["SEED"]),
        (b"SEED: \xff\n", ["UTF-8", "byte 6"]),
        (b"SEED: 1\x00\n", ["character"]),
    ],
)
def test_a_file_that_is_wrong(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(path)
    for word in (str(path), *words):
        assert word in message, message


def test_a_base_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("SEED: 1\nMODEL:\n  MASK_ONN: True\n")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    message = refused(tmp_path / "config.yaml")
    for word in (f"{tmp_path / 'base.yaml'}, line 3", "MODEL.MASK_ONN", "config.yaml"):
        assert word in message


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere.yaml")
    assert "no such file" in refused(tmp_path)
    python = tmp_path / "config.py"
    python.write_text("raise SystemExit\n")
    assert f"{python}, line 1: SystemExit" in refused(python)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["SEED"], ["SEED", "value"]),
        (["SEED", "1", "MODEL"], ["MODEL", "value"]),
        (["SEED", "one"], ["SEED", "one"]),
        (["SEEED", "1"], ["SEEED"]),
        (["MODEL.FOO.BAR", "1"], ["MODEL.FOO.BAR"]),
        (["MODEL", "3"], ["MODEL"]),
        (["SEED.A", "3"], ["SEED.A"]),
        ([".", "3"], ["."]),
        (["SEED", "(" * 300], ["SEED"]),
    ],
)
def test_an_override_that_is_wrong(opts: list[str], words: list[str]) -> None:
    message = refused("", *opts)
    for word in ("KEY VALUE", *words):
        assert word in message, message


MODULE = """
from detectron2.modeling import BACKBONE_REGISTRY
from bn_detection.heads.backbone import SmallConvBackbone

if "OwnBackbone" not in BACKBONE_REGISTRY:
    class OwnBackbone(SmallConvBackbone):
        pass

    BACKBONE_REGISTRY.register(OwnBackbone)
"""


def test_a_module_of_ones_own_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_project").mkdir()
    (tmp_path / "own_project" / "heads.py").write_text(MODULE)
    (tmp_path / "broken_project.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    load_config(argument_parser().parse_args(["--import", "own_project.heads", "SEED", "1"]))
    assert "OwnBackbone" in BACKBONE_REGISTRY
    BACKBONE_REGISTRY._obj_map.pop("OwnBackbone")
    for module, word in (("nowhere", "'nowhere'"), ("broken_project", "nothing_of_that_name")):
        with pytest.raises(ConfigError, match=f"--import {module} failed: .*{word}"):
            load_config(argument_parser().parse_args(["--import", module, "SEED", "1"]))


def test_a_study_imports_it_in_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_datasets.py").write_text("seen = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    study = tmp_path / "study.yaml"
    config = QUICKSTART / "mask_rcnn_bn.yaml"
    study.write_text(
        f"about: x\nruns: {{a: {{config: {config}}}}}\n"
        "evaluations: {a: , b: {recalibrate: }, c: {probe: }}\n"
    )
    tasks = plan(read_study(study), tmp_path / "out", {}, ["own_datasets"]).tasks
    assert len(tasks) == 4
    assert all("--import=own_datasets" in task.command for task in tasks)
    assert sys.modules["own_datasets"].seen


def test_traceback_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    ended = run_tool("train_net", "SEED", "one")
    assert (ended.status, ended.trace) == (2, "")
    ended = run_tool("train_net", "--traceback", "SEED", "one")
    assert ended.status == 2 and "Type mismatch" in ended.trace and "yacs" in ended.trace
    assert ended.error.startswith("error: ")
