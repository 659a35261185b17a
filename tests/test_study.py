"""The study runner: what it refuses, what it repeats, and what it reports."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bn_detection.config import ConfigError
from bn_detection.data import make_leaky_shapes
from bn_detection.study.folder import claimed
from bn_detection.study.matrix import Cell, Task, execute, plan
from bn_detection.study.runner import run_study
from bn_detection.study.study_file import read_study
from bn_detection.study.summary import mean_and_half_width, summarize

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
    assert study.evaluations["population"].is_of_training
    assert study.evaluations["batch"].runs == ("BN",)
    assert not study.evaluations["batch"].is_of_training
    assert (study.baseline, study.paper) == ("BN", None)


def test_baseline_paper_and_probe(tmp_path: Path) -> None:
    text = STUDY.replace("runs:\n  BN", "baseline: GN\npaper: Table 9\nworkers: 2\nruns:\n  BN")
    probes = "  leak: {probe: }\n  leak of 3 images: {probe: {BN.LEAKAGE.NUM_IMAGES: 3}}\n"
    study = read_study(write(tmp_path, text + probes))
    assert (study.baseline, study.paper) == ("GN", "Table 9")
    leak, of_three = study.evaluations["leak"], study.evaluations["leak of 3 images"]
    assert (leak.probe, leak.workers, leak.is_of_training) == ({}, 1, False)
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
        run_study(path, tmp_path / "output")
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
    tasks, _ = plan(study, tmp_path, {"SOLVER.BASE_LR": "0.25"})
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
    tasks, results = plan(read_study(write(tmp_path, text)), tmp_path, {})
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


def shell(folder: Path, name: str, code: str, needs: Task | None = None) -> Task:
    return Task(name, name, [sys.executable, "-c", code], folder / f"{name}.json", needs)


def test_a_failure_is_shown_and_does_not_stop_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    note = f"open({str(tmp_path / 'notes')!r}, 'a').write"
    good = shell(tmp_path, "good", f"{note}('good ')")
    bad = shell(tmp_path, "bad", "print('the reason'); raise SystemExit(3)")
    after_bad = shell(tmp_path, "after_bad", f"{note}('after_bad ')", bad)
    other = shell(tmp_path, "other", f"{note}('other ')", good)
    assert execute([good, bad, after_bad, other]) == {bad, after_bad}
    assert (tmp_path / "notes").read_text() == "good other "
    printed = capfd.readouterr().out
    for part in ("[2 of 4] bad failed (3)", "the reason", "[3 of 4] after_bad: left out"):
        assert part in printed
    # Again: only what has not been done.
    bad.command[-1] = f"{note}('bad ')"
    assert execute([good, bad, after_bad, other]) == set()
    assert (tmp_path / "notes").read_text() == "good other bad after_bad "


def test_time_left_is_that_of_the_kinds_that_are_known(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [shell(tmp_path, str(k), "pass") for k in range(4)]
    for task in tasks:
        task.kind = "same"
    tasks[0].record.write_text(json.dumps({"seconds": 200}))
    execute(tasks[:1] + tasks[1:])
    assert "[2 of 4] 1 (study: about 10 min left)" in capfd.readouterr().out


def test_leftovers_of_an_interrupted_attempt_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "new.pth"
    left.write_text("half")
    task = shell(tmp_path, "task", f"open({str(left)!r}, 'x')")
    task.leftovers = (left, tmp_path / "never.json")
    assert execute([task]) == set()
    assert left.read_text() == ""


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, STUDY))
    folder = tmp_path / "output"
    with claimed(folder, study, {}):
        pass
    more = STUDY.replace("seeds: [1, 2]", "seeds: [3]").replace("  batch:", "  more:\n  batch:")
    with claimed(folder, read_study(write(tmp_path, more)), {}):
        pass
    for text, name, overrides, words in (
        (STUDY, "other.yaml", {}, ["another study", "small", "other"]),
        (STUDY.replace("MAX_ITER: 1", "MAX_ITER: 2"), "small.yaml", {}, ["another run BN"]),
        (STUDY.replace("BN.INFERENCE: batch", ""), "small.yaml", {}, ["evaluation batch"]),
        (STUDY, "small.yaml", {"SOLVER.BASE_LR": "1"}, ["command line", "SOLVER.BASE_LR"]),
    ):
        changed = read_study(write(tmp_path, text, name))
        with pytest.raises(ConfigError) as info, claimed(folder, changed, overrides):
            pass
        for word in (str(folder), *words):
            assert word in str(info.value)
    with pytest.raises(ConfigError, match="none of a study"), claimed(tmp_path, study, {}):
        pass


@pytest.mark.timeout(60)
def test_a_folder_is_kept_by_what_a_killed_runner_left_behind(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, STUDY))
    folder = tmp_path / "output"
    with claimed(folder, study, {}) as descriptor:
        command = [sys.executable, "-c", "input()"]
        orphan = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[descriptor])
    try:
        with pytest.raises(ConfigError, match="Another process works in"):
            claimed(folder, study, {}).__enter__()
    finally:
        orphan.communicate(b"\n")
    with claimed(folder, study, {}):
        pass


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([50.0], 50.0, None),
        # Two-sided 95 % points of Student's t from tables: 12.706, 4.303, 2.776, 2.262.
        ([1.0, 3.0], 2.0, 12.706),
        ([1.0, 2.0, 3.0], 2.0, 4.303 / 3**0.5),
        ([-2.0, -1.0, 0.0, 1.0, 2.0], 0.0, 2.776 * 2.5**0.5 / 5**0.5),
        ([0.0] * 5 + [2.0] * 5, 1.0, 2.262 * (10 / 9) ** 0.5 / 10**0.5),
    ],
)
def test_mean_and_interval(values: list[float], mean: float, half_width: float | None) -> None:
    found = mean_and_half_width(values)
    assert found[0] == pytest.approx(mean)
    assert found[1] == (None if half_width is None else pytest.approx(half_width, rel=3e-4))


def test_the_table_has_what_is_done_and_says_what_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = read_study(write(tmp_path, STUDY.replace("[1, 2]", "[1, 2, 3]")))
    aps = {("BN", "population"): (50, 52, 54), ("BN", "batch"): (60, 61)}
    results = {}
    for (run, evaluation), values in aps.items():
        for seed, value in enumerate(values, start=1):
            folder = tmp_path / run / f"seed_{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "versions.json").write_text('{"versions": {"torch": "2"}}')
            path = folder / f"{evaluation}.json"
            path.write_text(json.dumps({"results": {"bbox": {"AP": value}}}))
            results[Cell(run, evaluation, seed)] = path
    written = json.loads(summarize(study, results, tmp_path).read_text())
    lines = capfd.readouterr().out.splitlines()
    assert "Box AP, 3 seeds: mean ± half of the 95 % interval" in lines
    # 4.303 * 2 / sqrt(3) and 12.706 * 0.7071 / sqrt(2), from tables of Student's t.
    assert [re.split("  +", line) for line in lines if line.startswith(("BN", "GN"))] == [
        ["BN", "52.0 ± 5.0", "60.5 ± 6.4 (2 seeds)"],
        ["GN", "failed"],
    ]
    assert written["versions"] == [{"torch": "2"}]
    assert written["box AP"][1]["by_seed"] == {"1": 60, "2": 61}
    assert written["metrics by run, evaluation and seed"]["BN"]["batch"]["2"]["bbox"]["AP"] == 61


@pytest.mark.timeout(280)
def test_a_study_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets = []
    for split, num_images in (("train", 4), ("val", 2)):
        made = make_leaky_shapes(tmp_path / split, num_images, seed=1, split=split)
        datasets.append([f"study_{split}", str(made.annotations), str(made.images)])
    text = STUDY.replace("BN:\n", "1:\n", 1).replace("GN:\n", "2:\n", 1)
    text = text.replace("[BN]", "[1]").replace("[1, 2]", "[5]").replace("about", "x_axis: n\nabout")
    overrides = ["DATASETS.COCO_JSON", str(datasets), "SOLVER.IMS_PER_BATCH", "1"]
    overrides += ["DATASETS.TRAIN", "('study_train',)", "DATASETS.TEST", "('study_val',)"]
    path, folder = write(tmp_path, text), tmp_path / "output"
    command = [sys.executable, str(ROOT / "tools" / "study.py"), str(path)]
    command += ["--output-dir", str(folder), *overrides]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[3 of 3] 2, seed 5: training" in first.stdout
    results = json.loads((folder / "results.json").read_text())
    assert [(entry["run"], entry["evaluation"]) for entry in results["box AP"]] == [
        ("1", "population"),
        ("1", "batch"),
        ("2", "population"),
    ]
    metrics = results["metrics by run, evaluation and seed"]
    assert metrics["1"]["batch"]["5"].keys() == {"bbox", "segm"}
    assert results["versions"][0].keys() >= {"torch", "detectron2"}
    evaluated = folder / "1" / "seed_5" / "evaluations" / "batch" / "eval_model_final_batch"
    assert json.loads((evaluated / "results.json").read_text())["BN.INFERENCE"] == "batch"
    with Image.open(folder / "small.png") as figure:
        assert figure.width > 600
    before = (folder / "results.json").stat().st_mtime_ns
    assert run_study(path, folder, overrides=overrides) == folder / "results.json"
    assert (folder / "results.json").stat().st_mtime_ns > before
    assert capfd.readouterr().out.count("done before") == 3
