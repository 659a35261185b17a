"""Studies: those that ship can be planned; one that cannot work is refused before it runs."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from bn_detection.config import ConfigError
from bn_detection.data import LeakyShapesConfig, find_builtin
from bn_detection.engine import check_config, load_config
from bn_detection.leakage import images_per_worker
from bn_detection.study.matrix import plan
from bn_detection.study.study_file import read_study

CONFIGS = Path(__file__).parents[1] / "configs"
STUDIES = CONFIGS / "studies"
NAMES = (
    "domain",
    "frozen",
    "images",
    "inference",
    "leakage",
    "levels",
    "levels_row2",
    "momentum",
    "population",
    "renorm",
)
RUN = f"{{config: {CONFIGS / 'quickstart' / 'mask_rcnn_bn.yaml'}}}"


def write_study(folder: Path, text: str) -> Path:
    """A study of two workers, with the runs and evaluations of ``text``."""
    path = folder / "small.yaml"
    path.write_text(f"about: A small one.\nworkers: 2\n{text}")
    return path


def test_every_study_has_a_quickstart_and_a_coco_form() -> None:
    for folder, own in ((STUDIES, {"dials.yaml"}), (STUDIES / "coco", set())):
        assert {path.name for path in folder.iterdir() if path.is_file()} - own == {
            f"{name}.yaml" for name in NAMES
        }


def test_a_run_of_dials_turns_the_dial_of_its_name_alone() -> None:
    """Those of LeakyShapes, in both splits: COCO has none, so this study has one form."""
    study = read_study(STUDIES / "dials.yaml")
    turned = set()
    for name, run in study.runs.items():
        dial, _, value = name.partition("=")
        if "DATASETS.TRAIN" in run.overrides:
            (train,), (test,) = (run.overrides[f"DATASETS.{key}"] for key in ("TRAIN", "TEST"))
            assert train.removesuffix("train") == test.removesuffix("val")
            found = find_builtin(train).dials
            number = float(value)
            pair = isinstance(getattr(found, dial), tuple)
            wanted = {dial: (int(number),) * 2 if pair else number}
            assert found == dataclasses.replace(LeakyShapesConfig(), **wanted)
            turned.add(dial)
    assert len(turned) == 5


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_a_study_ask_the_same(name: str) -> None:
    small, large = (read_study(path / f"{name}.yaml") for path in (STUDIES, STUDIES / "coco"))
    assert small.paper == large.paper
    assert (small.paper is None) == (name == "renorm")
    # With an image a worker ImageBN is BN.
    only_large = {"ImageBN"} if name == "leakage" else set()
    # Only sizes are others, or where it begins.
    if name not in ("inference", "levels_row2"):
        assert list(small.runs) == [run for run in large.runs if run not in only_large]
        assert small.baseline == large.baseline
    if name != "population":
        assert list(small.evaluations) == list(large.evaluations)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("head", "norm"), [("bn", "BN"), ("shuffle", "ShuffleBN")])
def test_configs_of_tables_3_and_6(head: str, norm: str, images: int) -> None:
    """Each has the batch of the paper, on any number of processes that divides its workers."""
    name = f"mask_rcnn_{head}_{images}_image{'s' if images > 1 else ''}.yaml"
    for folder, total in ((CONFIGS, 16), (CONFIGS / "quickstart", 4)):
        args = argparse.Namespace(config_file=str(folder / name), opts=[])
        cfg = load_config(args)
        assert total == cfg.SOLVER.IMS_PER_BATCH
        assert cfg.BN.VIRTUAL_WORKERS * images == total
        assert cfg.MODEL.ROI_BOX_HEAD.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM == norm
        for processes in (1, 2, total // images):
            check_config(cfg, num_workers=processes, eval_only=False, resume=False)
            assert images_per_worker(cfg, processes) == images
        plain = argparse.Namespace(config_file=str(folder / f"mask_rcnn_{head}.yaml"), opts=[])
        other = load_config(plain)
        other.SOLVER.IMS_PER_BATCH = total
        other.BN.VIRTUAL_WORKERS, other.BN.VIRTUAL_LOSSES = total // images, True
        assert cfg == other


def test_the_page_of_the_papers_tables() -> None:
    """Its configs are there in both forms."""
    text = (CONFIGS.parent / "docs" / "paper.md").read_text()
    names = set(re.findall(r"`((?:mask_rcnn|retinanet)_\w+\.yaml)`", text))
    assert len(names) == 15
    for name in names:
        assert (CONFIGS / name).exists()
        assert (CONFIGS / "quickstart" / name).exists()


@pytest.mark.parametrize("path", sorted(STUDIES.rglob("*.yaml")))
def test_every_study_can_be_planned_without_its_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    study = read_study(path)
    planned = plan(study, tmp_path, {})
    assert planned.results.keys() == {
        (run, name, seed)
        for name, evaluation in study.evaluations.items()
        for run in evaluation.runs
        for seed in study.seeds
    }
    assert len({task.record for task in planned.tasks}) == len(planned.tasks)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ("recalibrate: {BN.POPULATION.ESTIMATOR: fvcore}", ["recalibrate", "fvcore on 2 workers"]),
        ("recalibrate: {BN.POPULATION.BATCH_SIZE: 3}", ["BN.POPULATION.BATCH_SIZE 3", "2 workers"]),
        ("recalibrate: {DATASETS.TRAIN: [leaky_shape_train]}", ["TRAIN", '"leaky_shape_train"']),
        ("overrides: {DATASETS.TEST: [leaky_shape_val]}", ["TEST", "leaky_shapes_val"]),
        ('overrides: {DATASETS.TEST: ["leaky_shapes_val@fogg:3"]}', ['"fogg"', '"fog"']),
        ('overrides: {DATASETS.TEST: ["leaky_val@fog:3"]}', ['no dataset "leaky_val"']),
        ("overrides: {DATASETS.COCO_JSON: [[a, none.json, .]]}", ["COCO_JSON", "none.json"]),
        ("probe: {BN.LEAKAGE.SHUFFLED_IMAGES: 0}", ["BN.LEAKAGE.SHUFFLED_IMAGES 0"]),
        ("probe: {SOLVER.IMS_PER_BATCH: 3}", ["SOLVER.IMS_PER_BATCH 3", "2 workers"]),
        ("probe: {DATASETS.TEST: [none]}", ['no dataset "none"']),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_the_training(
    evaluation: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    runs = f"runs:\n  BN: {RUN}\n"
    study = read_study(write_study(tmp_path, f"{runs}evaluations:\n  odd: {{{evaluation}}}\n"))
    with pytest.raises(ConfigError) as info:
        plan(study, tmp_path, {})
    for word in (str(study.path), "run BN, evaluation odd", *words):
        assert word in str(info.value)
    assert not (tmp_path / "none").exists()


def test_runs_may_have_datasets_of_one_name(tmp_path: Path) -> None:
    runs = ""
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").touch()
        coco_json = [["mine", str(tmp_path / f"{name}.json"), str(tmp_path)]]
        overrides = f"{{DATASETS.COCO_JSON: {coco_json}, DATASETS.TEST: [mine]}}"
        runs += f"  {name}: {{config: {RUN[9:-1]}, overrides: {overrides}}}\n"
    study = read_study(write_study(tmp_path, f"runs:\n{runs}evaluations: {{EMA: }}\n"))
    assert len(plan(study, tmp_path, {}).tasks) == 2


def test_with_other_workers_an_evaluation_is_not_that_of_the_training(tmp_path: Path) -> None:
    evaluations = "  same: {workers: 2}\n  one process: {workers: 1}\n"
    text = f"runs:\n  BN: {RUN}\nevaluations:\n{evaluations}"
    planned = plan(read_study(write_study(tmp_path, text)), tmp_path, {})
    assert [task.title for task in planned.tasks] == [
        "BN, seed 1: training",
        "BN, seed 1: one process",
    ]
    command = planned.tasks[1].command
    assert command[command.index("--num-gpus") + 1] == "1"


def test_names_are_read_as_they_are_written(tmp_path: Path) -> None:
    text = f"baseline: no\nruns:\n  0.1: {RUN}\n  0.10: {RUN}\n  no: {RUN}\n"
    evaluations = "evaluations:\n  off: {runs: [0.10, no]}\n  1e3:\n"
    study = read_study(write_study(tmp_path, text + evaluations))
    assert list(study.runs) == ["0.1", "0.10", "no"]
    assert study.baseline == "no"
    assert study.evaluations["off"].runs == ("0.10", "no")
    assert list(study.evaluations) == ["off", "1e3"]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["''"], ["line 4", "not empty"]),
        (["results.json"], ["line 4", '"results.json"', "of the runner"]),
        (["results.csv"], ["line 4", "of the runner"]),
        (["report.html"], ["line 4", "of the runner"]),
        (["study.json"], ["line 4", "of the runner"]),
        (["study.json.partial"], ["line 4", "of the runner"]),
        (["slurm"], ["line 4", "of the runner"]),
        (["BN", "0.1", "0.1"], ["line 6", "0.1 is there already"]),
        (["BN", "'BN'"], ["line 5", "BN is there already"]),
    ],
)
def test_names_that_cannot_be_folders_are_refused(
    runs: list[str], words: list[str], tmp_path: Path
) -> None:
    text = "".join(f"  {name}: {RUN}\n" for name in runs)
    path = write_study(tmp_path, f"runs:\n{text}evaluations: {{EMA: }}\n")
    with pytest.raises(ConfigError) as info:
        read_study(path)
    for word in (str(path), *words):
        assert word in str(info.value)


@pytest.mark.parametrize("runs", ["[BN, BN]", "[]", "[BN, [BN]]"])
def test_runs_of_an_evaluation_are_different_runs(runs: str, tmp_path: Path) -> None:
    text = f"runs:\n  BN: {RUN}\nevaluations:\n  EMA: {{runs: {runs}}}\n"
    with pytest.raises(ConfigError, match=r"line 6: runs is .* different runs, of BN"):
        read_study(write_study(tmp_path, text))


def test_infinity_is_no_place_on_an_axis(tmp_path: Path) -> None:
    text = f"x_axis: n\nruns:\n  1: {RUN}\n  inf: {RUN}\nevaluations: {{EMA: }}\n"
    with pytest.raises(ConfigError, match=r'line 6: .*"inf" is none'):
        read_study(write_study(tmp_path, text))
