"""The study runner: what it refuses, what it repeats, and what it reports."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from study_tasks import task
from tooling import run_script, run_tool, start_script

from bn_detection.config import ConfigError
from bn_detection.data import make_leaky_shapes
from bn_detection.study import runner
from bn_detection.study.durations import Budget
from bn_detection.study.folder import claimed
from bn_detection.study.matrix import Cell, Plan, plan
from bn_detection.study.process import write_json
from bn_detection.study.runner import run_studies
from bn_detection.study.study_file import Study, read_study

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart" / "mask_rcnn_bn.yaml"
STUDY = f"""\
about: A small one.
seeds: [1, 2]
runs:
  BN:
    config: {CONFIG}
    overrides: {{SOLVER.MAX_ITER: 1}}
  GN:
    config: {CONFIG}
    overrides: {{SOLVER.MAX_ITER: 1, MODEL.ROI_BOX_HEAD.NORM: GN}}
evaluations:
  population:
  batch:
    runs: [BN]
    overrides: {{BN.INFERENCE: batch}}
"""


def write(folder: Path, text: str, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_study_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, STUDY))
    assert (study.name, study.about, study.workers, study.seeds) == (
        "small",
        "A small one.",
        1,
        (1, 2),
    )
    assert study.runs["GN"].overrides == {"SOLVER.MAX_ITER": 1, "MODEL.ROI_BOX_HEAD.NORM": "GN"}
    assert study.evaluations["population"].runs == ("BN", "GN")
    assert study.is_of_training(study.evaluations["population"])
    assert study.evaluations["batch"].runs == ("BN",)
    assert not study.is_of_training(study.evaluations["batch"])
    assert (study.baseline, study.paper) == ("BN", None)


def test_baseline_paper_and_probe(tmp_path: Path) -> None:
    text = STUDY.replace("runs:\n  BN", "baseline: GN\npaper: Table 9\nworkers: 2\nruns:\n  BN")
    probes = "  leak: {probe: }\n  leak of 3 images: {probe: {BN.LEAKAGE.NUM_IMAGES: 3}}\n"
    study = read_study(write(tmp_path, text + probes))
    assert (study.baseline, study.paper) == ("GN", "Table 9")
    leak, of_three = study.evaluations["leak"], study.evaluations["leak of 3 images"]
    assert (leak.probe, leak.workers, study.is_of_training(leak)) == ({}, 1, False)
    assert of_three.probe == {"BN.LEAKAGE.NUM_IMAGES": 3}
    assert study.evaluations["batch"].probe is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: [1, 2]", "seed: [1, 2]", ["line 2", "key seed", "seeds"]),
        ("seeds: [1, 2]", "seeds: [1, 1]", ["line 2", "[1, 1]", "different"]),
        ("seeds: [1, 2]", "workers: 0", ["line 2", "workers is 0"]),
        ("runs: [BN]", "runs: [BM]", ["line 13", "'BM'", "BN, GN"]),
        ("    overrides: {BN", "    override: {BN", ["line 14", "batch has no key override"]),
        (f"  GN:\n    config: {CONFIG}\n", "  GN:\n", ["line 7", "GN lacks the key config"]),
        ("mask_rcnn_bn.yaml", "mask_rcnn_b.yaml", ["line 5", "mask_rcnn_b.yaml", "no file"]),
        ("  GN:\n", "  BN:\n", ["line 7", "BN is there already"]),
        ("  GN:\n", "  figures:\n", ["line 7", '"figures" is the name of a folder']),
        ("about: A small one.\n", "", ["line 1", "lacks the key about"]),
        ("SOLVER.MAX_ITER: 1}", "SEED: 4}", ["line 6", "SEED is chosen by the runner"]),
        ("BN.INFERENCE: batch", "MODEL.WEIGHTS: a.pth", ["line 14", "MODEL.WEIGHTS is chosen"]),
        ("BN.INFERENCE: batch", "BN: {INFERENCE: batch}", ["line 14", "BN.KEY"]),
        ("runs:\n  BN:", "x_axis: size\nruns:\n  BN:", ["line 5", "numbers", '"BN"']),
        ("about: A small", "about: [A small", ["small.yaml", "expected"]),
        ("about: A small one.", "about: 3", ["line 1", "about is 3", "text"]),
        ("seeds: [1, 2]", "baseline: BM", ["line 2", 'baseline is "BM"', "BN, GN"]),
        ("seeds: [1, 2]", "seeds: 3", ["line 2", "seeds is 3", "list"]),
        ("seeds: [1, 2]", "seeds: [1, '2']", ["line 2", "[1, '2']", "whole numbers"]),
        ("{BN.INFERENCE: batch}", "3", ["line 14", "overrides is 3", "mapping"]),
        ("overrides: {BN.INFERENCE: batch}", "probe: 0", ["line 14", "probe is 0", "mapping"]),
        ("batch}", "batch}\n    probe:", ["line 14", "under probe"]),
        ("overrides: {BN.INFERENCE", "workers: 2\n    probe: {A", ["line 14", "one process"]),
        ("overrides: {BN.INFERENCE", "probe: {MODEL.WEIGHTS", ["line 14", "MODEL.WEIGHTS is"]),
    ],
)
def test_a_wrong_study_file_is_refused_by_line_and_key(
    old: str, new: str, words: list[str], tmp_path: Path
) -> None:
    assert old in STUDY
    path = write(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(ConfigError) as info:
        read_study(path)
    for word in (str(path), *words):
        assert word in str(info.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("MODEL.ROI_BOX_HEAD.NORM: GN", "BN.MOMENTO: 1", ["run GN", "BN.MOMENTO"]),
        ("BN.INFERENCE: batch", "BN.INFERENCE: bach", ["run BN, evaluation batch", '"bach"']),
        ("BN.INFERENCE: batch", "DATASETS.TEST: [a, b]", ["evaluation batch", "one dataset"]),
    ],
)
def test_overrides_are_checked_before_anything_runs(
    old: str, new: str, words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, STUDY.replace(old, new))
    with pytest.raises(ConfigError) as info:
        run_studies([path], tmp_path / "output")
    for word in (str(path), *words):
        assert word in str(info.value)
    assert not (tmp_path / "output").exists()


def option(command: list[str], key: str) -> str:
    """The value that counts: the last one."""
    return [value for name, value in itertools.pairwise(command) if name == key][-1]


def test_the_command_line_wins_over_the_file_and_a_run_over_all_runs(tmp_path: Path) -> None:
    shared = "overrides: {SOLVER.MAX_ITER: 9, SOLVER.BASE_LR: 0.5}\n"
    text = STUDY.replace("runs:\n  BN", f"{shared}runs:\n  BN")
    study = read_study(write(tmp_path, text))
    tasks, *_ = plan(study, tmp_path, {"SOLVER.BASE_LR": "0.25"})
    titles = [task.title for task in tasks]
    assert titles[:3] == ["BN, seed 1: training", "BN, seed 1: batch", "GN, seed 1: training"]
    training, batch = tasks[0].command, tasks[1].command
    assert option(training, "SOLVER.MAX_ITER") == "1"
    assert option(training, "SOLVER.BASE_LR") == "0.25"
    assert option(tasks[3].command, "SEED") == "2"
    assert option(batch, "BN.INFERENCE") == "batch"
    assert option(batch, "MODEL.WEIGHTS") == f"{option(training, 'OUTPUT_DIR')}/model_final.pth"


def test_recalibration_comes_between_training_and_evaluation(tmp_path: Path) -> None:
    recalibrate = "recalibrate: {BN.POPULATION.ESTIMATOR: pooled}\n    workers: 2"
    text = STUDY.replace("overrides: {BN.INFERENCE: batch}", recalibrate)
    tasks, results, _ = plan(read_study(write(tmp_path, text)), tmp_path, {})
    training, recalibration, evaluation = tasks[:3]
    assert (recalibration.needs, evaluation.needs) == (training, recalibration)
    assert option(recalibration.command, "MODEL.WEIGHTS").endswith("model_final.pth")
    assert option(recalibration.command, "--num-gpus") == "2"
    assert "BN.POPULATION.ESTIMATOR" not in evaluation.command
    made = option(recalibration.command, "--output")
    assert option(evaluation.command, "MODEL.WEIGHTS") == made
    folder = option(evaluation.command, "OUTPUT_DIR")
    path = Path(folder, "eval_recalibrated_population", "results.json")
    assert results["BN", "batch", 1] == (evaluation, path)


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, STUDY))
    folder = tmp_path / "output"
    with claimed(folder, study, {}, {}):
        pass
    done = folder / "BN" / "seed_1" / "evaluations" / "batch" / "evaluation.json"
    done.parent.mkdir(parents=True)
    write_json(done, {})
    write_json(folder / "BN" / "seed_1" / "training.json", {})
    more = STUDY.replace("seeds: [1, 2]", "seeds: [3]").replace("  batch:", "  more:\n  batch:")
    with claimed(folder, read_study(write(tmp_path, more)), {}, {}):
        pass
    for text, name, overrides, words in (
        (STUDY, "other.yaml", {}, ["another study", "small", "other"]),
        (STUDY.replace("MAX_ITER: 1", "MAX_ITER: 2"), "small.yaml", {}, ["another run BN"]),
        (STUDY.replace("BN.INFERENCE: batch", ""), "small.yaml", {}, ["evaluation batch"]),
        (STUDY, "small.yaml", {"SOLVER.BASE_LR": "1"}, ["command line", "SOLVER.BASE_LR"]),
    ):
        changed = read_study(write(tmp_path, text, name))
        with pytest.raises(ConfigError) as info, claimed(folder, changed, overrides, {}):
            pass
        for word in (str(folder), *words):
            assert word in str(info.value)
    with pytest.raises(ConfigError, match="none of a study"), claimed(tmp_path, study, {}, {}):
        pass
    assert not (tmp_path / ".lock").exists()


def test_what_has_no_result_yet_can_be_corrected(tmp_path: Path) -> None:
    """A study that was stopped at once, or a run that failed, has none."""
    folder = tmp_path / "output"

    def claim(text: str, **overrides: str) -> None:
        study = read_study(write(tmp_path, text))
        with claimed(folder, study, overrides, plan(study, folder, overrides).configs):
            pass

    claim(STUDY)
    claim(STUDY, **{"SOLVER.BASE_LR": "1.0"})
    claim(STUDY)
    of_gn, of_bn = "MAX_ITER: 1, MODEL", "MAX_ITER: 1}"
    training, evaluation = folder / "BN" / "seed_2", folder / "BN" / "seed_2/evaluations/batch"
    evaluation.mkdir(parents=True)
    write_json(training / "training.json", {})
    with pytest.raises(ConfigError, match=r"training\.json is of another command line"):
        claim(STUDY, **{"SOLVER.BASE_LR": "1.0"})
    with pytest.raises(ConfigError, match=r"training\.json is of another run BN"):
        claim(STUDY.replace(of_bn, "MAX_ITER: 2}"))
    changed = STUDY.replace(of_gn, "MAX_ITER: 2, MODEL").replace("E: batch", "E: population")
    claim(changed)
    write_json(evaluation / "evaluation.json", {})
    (folder / "GN" / "seed_1").mkdir(parents=True)
    (folder / "GN" / "seed_1" / "model_0000001.pth").touch()
    with pytest.raises(ConfigError, match=r"model_0000001\.pth is of another run GN"):
        claim(STUDY)
    with pytest.raises(ConfigError, match=r"evaluation\.json is of another evaluation batch"):
        claim(changed.replace("E: population", "E: batch"))
    claim(changed)


def test_what_jobs_of_slurm_may_be_making_cannot_be_changed(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    with claimed(folder, read_study(write(tmp_path, STUDY)), {}, {}):
        pass
    (folder / "slurm").mkdir()
    changed = read_study(write(tmp_path, STUDY.replace("MAX_ITER: 1", "MAX_ITER: 2")))
    with pytest.raises(ConfigError, match=r"slurm is of another run BN.*once squeue shows none"):
        claimed(folder, changed, {}, {}).__enter__()


def test_a_start_that_was_killed_at_once_is_no_other_folder(tmp_path: Path) -> None:
    for name in (".lock", "study.json.partial"):
        (tmp_path / "output" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "output" / name).touch()
    with claimed(tmp_path / "output", read_study(write(tmp_path, STUDY)), {}, {}):
        pass


def test_settings_are_compared_by_the_one_process_that_works_there(tmp_path: Path) -> None:
    """Another process adds a run, and ends, after this one has looked for the first time."""
    folder = tmp_path / "output"
    study = read_study(write(tmp_path, STUDY))
    other = STUDY.replace("  GN:", "  more:").replace("NORM: GN", "NORM: SyncBN")

    class Configs(dict):
        begun = False

        def items(self) -> object:
            if not self.begun:
                Configs.begun = True
                with claimed(folder, read_study(write(tmp_path, other)), {}, {}):
                    pass
            return super().items()

    with claimed(folder, study, {}, Configs()):
        pass
    assert {"run GN", "run more"} < json.loads((folder / "study.json").read_text()).keys()


def test_a_config_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, f"_BASE_: {CONFIG}\nSOLVER: {{BASE_LR: 0.02}}\n", "mine.yaml")
    path, folder = write(tmp_path, STUDY.replace(str(CONFIG), "mine.yaml", 1)), tmp_path / "out"

    def claim() -> None:
        study = read_study(path)
        with claimed(folder, study, {}, plan(study, folder, {}).configs):
            pass

    claim()
    (folder / "BN" / "seed_1").mkdir(parents=True)
    write_json(folder / "BN" / "seed_1" / "training.json", {})
    settings = json.loads((folder / "study.json").read_text())
    config.write_text(config.read_text() + "# The same.\n")
    claim()
    config.write_text(config.read_text().replace("0.02", "0.05"))
    with pytest.raises(ConfigError) as info:
        claim()
    for word in ("run BN", str(config), "SOLVER.BASE_LR was 0.02, and is 0.05", "--output-dir"):
        assert word in str(info.value)
    # What an earlier version left: no configs, the name of the file, every key of an evaluation.
    for name in ("config of run BN", "config of run GN"):
        del settings[name]
    settings["run BN"]["config"] = "elsewhere/mine.yaml"
    settings["evaluation batch"]["recalibrate"] = None
    (folder / "study.json").write_text(json.dumps(settings))
    claim()


def test_a_probe_has_the_images_of_a_worker_of_the_training(tmp_path: Path) -> None:
    text = STUDY.replace("seeds", "workers: 2\noverrides: {SOLVER.IMS_PER_BATCH: 6}\nseeds")
    probe = (
        "    recalibrate: {BN.POPULATION.ESTIMATOR: pooled}\n    probe: {BN.LEAKAGE.RESAMPLES: 9}"
    )
    text = text.replace("    overrides: {BN.INFERENCE: batch}", probe)
    tasks, results, _ = plan(read_study(write(tmp_path, text)), tmp_path, {})
    _, recalibration, measured = tasks[:3]
    assert measured.needs == recalibration
    assert "--num-gpus" not in measured.command
    assert option(measured.command, "BN.LEAKAGE.IMAGES_PER_WORKER") == "3"
    assert option(measured.command, "BN.LEAKAGE.RESAMPLES") == "9"
    assert option(measured.command, "MODEL.WEIGHTS").endswith("recalibrated.pth")
    path = tmp_path / "BN" / "seed_1" / "evaluations" / "batch" / "probe.json"
    assert option(measured.command, "--output") == str(path)
    assert measured.leftovers == (path,)
    assert results["BN", "batch", 1] == (measured, path)
    virtual = text.replace("{SOLVER", "{BN.VIRTUAL_WORKERS: 2, BN.VIRTUAL_LOSSES: True, SOLVER", 1)
    tasks = plan(read_study(write(tmp_path, virtual)), tmp_path, {}).tasks
    assert option(tasks[2].command, "BN.LEAKAGE.IMAGES_PER_WORKER") == "3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"jobs": 0}, ["--jobs 0", "at least 1"]),
        ({"seeds": [-1]}, ["--seeds -1"]),
        ({"overrides": ["SEED", "1"]}, ["SEED is chosen by the runner"]),
        ({"overrides": ["SOLVER.MAX_ITER"]}, ["SOLVER.MAX_ITER has no value"]),
        ({"slurm": ["partition=gpu"]}, ["--slurm partition=gpu", "--executor slurm"]),
        ({"executor": "slurm", "slurm": ["gpu"]}, ["--slurm gpu", "KEY=VALUE"]),
        ({"executor": "slurm", "slurm": ["nodes=2"]}, ["--slurm nodes=2", "one node"]),
        ({"executor": "pbs"}, ["--executor pbs", "local, slurm"]),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    arguments: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as info:
        run_studies([write(tmp_path, STUDY)], tmp_path / "output", **arguments)
    for word in words:
        assert word in str(info.value)
    assert not (tmp_path / "output").exists()


def test_slurm_without_submitit_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'submitit>=1\.5'"):
        run_studies([write(tmp_path, STUDY)], tmp_path / "output", executor="slurm")
    assert not (tmp_path / "output").exists()


def test_a_study_whose_every_task_fails_says_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "execute", lambda tasks, *_, **__: list(tasks))
    with pytest.raises(RuntimeError, match=r"6 of 6 tasks are not done\.\n  BN, seed 1: training"):
        run_studies([write(tmp_path, STUDY)], tmp_path / "output")
    assert capfd.readouterr().out == "small: A small one.\n\n"
    assert not (tmp_path / "output" / "report.html").exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is 0.1 s of Python; one named "slow" is a minute, one named "bad" fails."""

    def quickly(study: Study, folder: Path, *_: object, **__: object) -> Plan:
        tasks, results = [], {}
        for seed in study.seeds:
            for run in study.runs:
                cell = Cell(run, "population", seed)
                path = folder / run / f"seed_{seed}" / "inference" / "results.json"
                content = json.dumps({"results": {"bbox": {"AP": 50 + seed}}})
                code = "raise SystemExit(3); " if run == "bad" else ""
                code += f"import os; os.makedirs({str(path.parent)!r}, exist_ok=True); "
                code += f"open({str(path)!r}, 'w').write({content!r}); "
                code += f"import time; time.sleep({60 if run == 'slow' else 0.1})"
                made = task(path.parents[1], "training", code)
                made.title = f"{run}, seed {seed}: training"
                tasks.append(made)
                results[cell] = made, path
        return Plan(tasks, results, {})

    monkeypatch.setattr(runner, "plan", quickly)


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(120)
def test_several_studies_in_one_command_with_a_budget(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over once the slow training runs, however fast the machine is."""
    (tmp_path / "studies").mkdir()
    write(tmp_path / "studies", STUDY, "a.yaml")
    second = write(tmp_path / "studies", STUDY.replace("GN:", "slow:"), "b.yaml")
    third = write(tmp_path, STUDY, "c.yaml")
    command = ["study", tmp_path / "studies", third, "SOLVER.MAX_ITER", "1", "--jobs", "1"]
    command += ["--output-dir", tmp_path / "out", "--minutes"]
    slow = tmp_path / "out" / "b" / "slow" / "seed_1" / "training.log"
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "seconds", property(lambda _: 0.0 if slow.exists() else 1000.0))
        ended = run_tool(*command, "4")
    assert ended.status == 0, ended
    printed = capfd.readouterr().out
    assert printed.endswith(
        "Stopped by --minutes 4. Tasks done: a 4 of 4; b 1 of 4; c 0 of 4, nothing yet.\n"
        "5 of 12 tasks are done; about 1 min are left to do. The same command goes on.\n"
    )
    assert "[2 of 4] slow, seed 1: training: ended after" in printed
    for name, number in (("a", 4), ("b", 1)):
        results = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert sum(len(entry["by_seed"]) for entry in results["box AP"]) == number
        page = (tmp_path / "out" / name / "report.html").read_text()
        assert "failed" not in page
    assert not (tmp_path / "out" / "c" / "results.json").exists()

    second.write_text(second.read_text().replace("slow:", "fast:"))
    assert run_tool(*command, "1").status == 0
    printed = capfd.readouterr().out
    assert printed.count("done before") == 5
    assert printed.splitlines()[-3:] == [
        f"  {tmp_path / 'out' / name / 'results.json'}" for name in "abc"
    ]


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(120)
def test_the_folder_of_one_study_with_a_budget_is_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY)
    assert run_studies([path], tmp_path / "out", minutes=1) == [tmp_path / "out" / "results.json"]
    with pytest.raises(ConfigError, match=r"--minutes 5 with --executor slurm.*timeout_min"):
        run_studies([path], tmp_path / "new", minutes=5, executor="slurm")
    with pytest.raises(ConfigError, match=r"--minutes 0: give a number above 0"):
        run_studies([path], tmp_path / "new", minutes=0)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", STUDY)
    with pytest.raises(ConfigError, match=rf"{path} and {other} have one name"):
        run_studies([path, other], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(120)
def test_what_fails_in_one_study_does_not_stop_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = STUDY.replace("BN:", "bad:", 1).replace("[BN]", "[bad]").replace("[1, 2]", "[1]")
    paths = [write(tmp_path, bad, "a.yaml"), write(tmp_path, STUDY, "b.yaml")]
    for minutes in ([], ["--minutes", "1"]):
        ended = run_tool("study", *paths, "--output-dir", tmp_path / "out", *minutes)
        assert ended.status == 1
        assert "1 of 6 tasks are not done.\n  bad, seed 1: training: see" in ended.error
        last = capfd.readouterr().out.splitlines()[-1]
        assert ("5 of 6 tasks are done" in last) == bool(minutes)
    assert (tmp_path / "out" / "b" / "results.json").exists()


def test_a_word_that_names_no_study_is_refused(tmp_path: Path) -> None:
    ended = run_tool("study", tmp_path)
    assert (ended.status, ended.error) == (
        2,
        f"error: {tmp_path} has no .yaml file; give a study, or a folder of studies.",
    )


def test_a_dry_run_lists_the_tasks_and_makes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, folder = write(tmp_path, STUDY), tmp_path / "output"
    assert run_studies([path], folder, dry_run=True) == []
    assert not folder.exists()
    study = read_study(path)
    planned = plan(study, folder, {})
    with claimed(folder, study, {}, planned.configs):
        planned.tasks[0].record.parent.mkdir(parents=True)
        write_json(planned.tasks[0].record, {"seconds": 1})
        run_studies([path], folder, dry_run=True)
    printed = capfd.readouterr().out
    for part in (
        "[1 of 6] BN, seed 1: training: done",
        "[2 of 6] BN, seed 1: batch: missing",
        "1 of 6 tasks are done",
    ):
        assert part in printed
    with pytest.raises(ConfigError, match="another run BN"):
        changed = write(tmp_path, STUDY.replace("MAX_ITER: 1", "MAX_ITER: 2"))
        run_studies([changed], folder, dry_run=True)


@pytest.mark.timeout(280)
def test_a_study_that_is_killed_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    datasets = []
    for split, num_images in (("train", 4), ("val", 2)):
        made = make_leaky_shapes(tmp_path / split, num_images, seed=1, split=split)
        datasets.append([f"study_{split}", str(made.annotations), str(made.images)])
    text = STUDY.replace("[1, 2]", "[5]")
    overrides = ["DATASETS.COCO_JSON", str(datasets), "SOLVER.IMS_PER_BATCH", "1"]
    overrides += ["DATASETS.TRAIN", "('study_train',)", "DATASETS.TEST", "('study_val',)"]
    path, folder = write(tmp_path, text), tmp_path / "output"
    command = [ROOT / "tools" / "study.py", path, "--jobs", "1", "--output-dir", folder, *overrides]
    first = start_script(*command, output=tmp_path)
    record = folder / "BN" / "seed_5" / "training.json"
    while not record.exists():
        assert first.is_alive()
        time.sleep(0.02)
    first.kill()
    first.join()
    before = record.stat().st_mtime_ns

    second = run_script(*command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before") == 1
    assert "[1 of 3] BN, seed 5: training: done before" in second.stdout
    assert "[3 of 3] GN, seed 5: training" in second.stdout
    assert record.stat().st_mtime_ns == before
    results = json.loads((folder / "results.json").read_text())
    assert [(entry["run"], entry["evaluation"]) for entry in results["box AP"]] == [
        ("BN", "population"),
        ("BN", "batch"),
        ("GN", "population"),
    ]
    evaluated = folder / "BN" / "seed_5" / "evaluations" / "batch" / "eval_model_final_batch"
    assert json.loads((evaluated / "results.json").read_text())["BN.INFERENCE"] == "batch"
    third = run_studies([path], folder, overrides=overrides)
    assert third == [folder / "results.json"]
    assert record.stat().st_mtime_ns == before
