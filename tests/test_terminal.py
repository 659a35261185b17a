"""What diagnose, probe and recalibrate print, and what they know without being told."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_diagnose import IMAGES, data, estimate, layer, result, tool
from test_train_net import QUICKSTART, overrides

from bn_detection import ConfigError, cli
from bn_detection.engine import choose_workers, load_config, preflight_probe, probe
from bn_detection.engine.diagnosis import _Batches
from bn_detection.engine.setup import register_datasets
from bn_detection.engine.trained import trained_workers, workers_of_training
from bn_detection.leakage.diagnosis import Diagnosis
from bn_detection.leakage.diagnosis_page import page

__all__ = ["data"]

CONFIG = QUICKSTART / "mask_rcnn_bn.yaml"


def versions(folder: Path, **content: Any) -> Path:
    """A checkpoint's path, and what its training left beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "versions.json").write_text(json.dumps(content))
    return folder / "model.pth"


# --- the terminal ---


@pytest.mark.timeout(120)
def test_the_terminal_gets_the_answer_and_the_file_the_rest(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool(data, tmp_path / "out", "MODEL.MASK_ON", False, "MODEL.WEIGHTS", "")
    printed = capsys.readouterr().out
    log = (tmp_path / "out" / "log.txt").read_text()
    for part in ("Diagnosis of random weights", "Wrote", "BN102", "Workers of the training: 1"):
        assert part in printed
        assert part in log
    for part in (
        "Running with full config",
        "Environment info",
        "ANCHOR_GENERATOR",
    ):
        assert part not in printed
        assert part in log
    assert len(printed.splitlines()) < 60 < 300 < len(log.splitlines())


def test_layers_with_a_batch_come_before_frozen_ones() -> None:
    frozen = [
        layer(f"backbone.{k}", trains=False, sharing="frozen", ema_to_precise=estimate(9 - k / 10))
        for k in range(20)
    ]
    trained = [layer("head.a", ema_to_precise=estimate(0.1)), layer("head.b")]
    diagnosis = Diagnosis({}, [*frozen, *trained], None, [], [], [])
    lines = diagnosis.table().splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("head.", "backbone."))]
    assert names == ["head.a", "head.b", *(x.name for x in frozen[:13])]
    assert lines[-1] == "... and 7 more layers (7 frozen), in the JSON and the page"
    drawn = page(
        Diagnosis({"weights": "", "versions": {}}, [*frozen * 3, *trained], None, [], [], [])
    )
    assert "head.a: EMA 0.10" in drawn


@pytest.mark.parametrize(
    ("size", "grouped", "number"), [(1, False, 6), (4, False, 2), (4, True, 1), (8, True, 1)]
)
def test_there_are_no_more_batches_than_images(
    data: Path, tmp_path: Path, size: int, grouped: bool, number: int
) -> None:
    opts = overrides(data, tmp_path, "DATALOADER.ASPECT_RATIO_GROUPING", grouped)
    cfg = load_config(argparse.Namespace(config_file=str(CONFIG), opts=opts))
    register_datasets(cfg)
    assert _Batches(cfg, "training", size, 512).number == number
    assert _Batches(cfg, "training", 1, 5).number == 5
    assert IMAGES == 6


# --- the workers of the training ---


@pytest.mark.parametrize(
    ("content", "workers"),
    [
        ({"workers": 4, "command": ["train", "--num-gpus", "2"]}, 4),
        ({"command": ["bn-detection", "train", "--num-gpus", "2", "SEED", "3"]}, 2),
        ({"command": ["tools/train_net.py", "--num-gpus=2", "--num-machines", "3"]}, 6),
        ({"command": ["bn-detection", "train"]}, 1),
        ({"command": ["bn-detection", "train", "--eval-only"]}, None),
        ({"command": ["train", "--num-gpus"]}, None),
        ({"command": "train"}, None),
        ({"workers": 0}, None),
    ],
)
def test_workers_beside_a_checkpoint(
    content: dict[str, Any], workers: int | None, tmp_path: Path
) -> None:
    weights = str(versions(tmp_path / "run", **content))
    assert trained_workers(weights) == workers
    assert workers_of_training(7, weights) == (7, "--num-gpus")
    assert workers_of_training(None, weights).number == (workers or 1)


def test_nothing_beside_a_checkpoint_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained_workers(str(tmp_path / "nowhere" / "model.pth")) is None
    (tmp_path / "versions.json").write_text("{")
    assert trained_workers(str(tmp_path / "model.pth")) is None
    monkeypatch.chdir(tmp_path)
    versions(tmp_path, workers=4)
    assert trained_workers("") is None
    assert trained_workers("model.pth") == 4


@pytest.mark.timeout(120)
def test_tools_take_the_workers_of_the_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = versions(tmp_path / "run", workers=2)
    weights.write_bytes((data / "weights.pth").read_bytes())
    tool(data, tmp_path / "out", "MODEL.MASK_ON", True, "MODEL.WEIGHTS", weights)
    settings = result(tmp_path / "out")["settings"]
    assert (settings["workers"], settings["images_per_worker"]) == (2, 1)
    assert f"Workers of the training: 2 ({tmp_path}/run/versions.json;" in capsys.readouterr().out

    opts = overrides(data, tmp_path, "MODEL.WEIGHTS", weights)
    output = tmp_path / "probe.json"
    flags = ["--config-file", str(CONFIG), "--output", str(output)]
    args = cli.parse(["probe", *flags, *opts])
    preflight_probe(args)
    probe(args)
    assert json.loads(output.read_text())["images_per_worker"] == 1
    assert f"Images a worker: 1, of 2 workers ({tmp_path}/run/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "cores", "number", "words"),
    [
        ([], 2, 2, "2 workers, as the training had ("),
        ([], 1, 1, "One worker, though the training had 2 ("),
        (["BN.POPULATION.BATCH_SIZE", 3], 2, 1, "batches have 3 images. BN.VIRTUAL_WORKERS 2"),
        (["BN.POPULATION.ESTIMATOR", "fvcore"], 2, 1, "One worker"),
    ],
)
def test_recalibration_has_the_workers_of_the_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[object],
    cores: int,
    number: int,
    words: str,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = versions(tmp_path / "run", workers=2)
    opts = map(str, ["MODEL.WEIGHTS", weights, *more])
    flags = ["recalibrate", "--config-file", str(CONFIG), "--output", str(tmp_path / "new.pth")]
    args = cli.parse([*flags, *opts])
    for _ in range(2):  # again in the preflight
        choose_workers(args)
        assert args.num_gpus == number
        assert words in args.about_workers
    args = cli.parse([*flags, "--num-gpus", "1", "MODEL.WEIGHTS", str(weights)])
    choose_workers(args)
    assert (args.num_gpus, args.about_workers) == (1, "")


# --- paths of DATASETS.COCO_JSON ---


def paths_of(config: Path, *opts: str) -> list[str]:
    cfg = load_config(argparse.Namespace(config_file=str(config), opts=list(opts)))
    return list(cfg.DATASETS.COCO_JSON[0][1:])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and its data beside it; the working directory is another."""
    for name in ("here", "project/images"):
        (tmp_path / name).mkdir(parents=True)
    project = tmp_path / "project"
    (project / "train.json").write_text("{}")
    entry = '[["mine", train.json, images]]'
    (project / "config.yaml").write_text(f"_BASE_: {CONFIG}\nDATASETS: {{COCO_JSON: {entry}}}\n")
    monkeypatch.chdir(tmp_path / "here")
    return project


def test_relative_paths_are_those_of_the_config_file(project: Path) -> None:
    found = [str(project / name) for name in ("train.json", "images")]
    assert paths_of(project / "config.yaml") == found
    # A file based on it, elsewhere.
    Path("other.yaml").write_text(f"_BASE_: {project / 'config.yaml'}\nSEED: 3\n")
    assert paths_of(Path("other.yaml")) == found
    assert paths_of(project / "config.yaml", "DATASETS.COCO_JSON", "[['x', 'a', 'b']]") == [
        "a",
        "b",
    ]


def test_paths_of_the_working_directory_stay_as_they_are(project: Path) -> None:
    for name in ("train.json", "images"):
        (project / name).rename(name)
    assert paths_of(project / "config.yaml") == ["train.json", "images"]


def test_a_path_that_is_in_both_folders_is_refused(project: Path) -> None:
    Path("train.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"train\.json is there twice.*absolute path") as info:
        paths_of(project / "config.yaml")
    for folder in (project, Path.cwd()):
        assert str(folder / "train.json") in str(info.value)
    Path("train.json").unlink()
    Path("train.json").symlink_to(project / "train.json")
    assert paths_of(project / "config.yaml")[0] == "train.json"


def test_what_is_nowhere_says_where_it_was_looked_for(project: Path) -> None:
    (project / "train.json").unlink()
    args = argparse.Namespace(config_file=str(project / "config.yaml"), opts=[])
    with pytest.raises(ConfigError) as info:
        register_datasets(load_config(args))
    for part in (project / "train.json", "beside it", Path.cwd()):
        assert str(part) in str(info.value)


def test_home_and_variables_are_no_relative_paths(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(project))
    text = (project / "config.yaml").read_text().replace("train.json, images", "$PLACE/x, ~/y")
    (project / "config.yaml").write_text(text)
    assert paths_of(project / "config.yaml") == ["$PLACE/x", "~/y"]
