"""The report of a study: its numbers, what it says of them, and its page in a browser."""

from __future__ import annotations

import csv
import html
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import open_browser, open_page
from PIL import Image
from study_outputs import (
    make_results,
    make_study,
    write_ap,
    write_probe,
    write_trace,
    write_training,
)

from bn_detection.study.figures import draw_all
from bn_detection.study.matrix import Cell, Failure
from bn_detection.study.reading import read_results
from bn_detection.study.report import write_report
from bn_detection.study.results import collect_results
from bn_detection.study.study_file import read_study

CURVE = [0.1] * 8 + [0.9, 0.7]


def test_the_table_has_what_is_done_and_says_what_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1, 2, 3])
    aps = {("BN", "population"): (50, 52, 54), ("BN", "batch"): (60, 61)}
    results = {}
    for (run, evaluation), values in aps.items():
        for seed, value in enumerate(values, start=1):
            cell = Cell(run, evaluation, seed)
            results[cell] = write_ap(tmp_path, cell, bbox=value)
            write_training(tmp_path, run, seed, CURVE)
    written = json.loads(write_report(study, results, tmp_path).read_text())
    lines = capfd.readouterr().out.splitlines()
    assert "Box AP, 3 seeds: mean ± half of the 95 % interval" in lines
    # 4.303 * 2 / sqrt(3) and 12.706 * 0.7071 / sqrt(2), from tables of Student's t.
    assert [re.split("  +", line) for line in lines if line.startswith(("BN", "GN"))][:2] == [
        ["BN", "52.0 ± 5.0", "60.5 ± 6.4 (2 of 3 seeds)"],
        ["GN", "missing"],
    ]
    assert "4 of 9 results are missing; means are over the seeds that are there." in lines
    assert written["versions"] == [{"python": "3.11", "torch": "2.14"}]
    assert written["box AP"][1]["by_seed"] == {"1": 60, "2": 61}
    assert written["metrics by run, evaluation and seed"]["BN"]["batch"]["2"]["bbox"]["AP"] == 61


def test_undefined_ap_is_left_out_of_the_mean_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, ["BN"], [1, 2, 3])
    results = {}
    for seed, value in ((1, 40.0), (2, None), (3, 42.0)):
        for name in study.evaluations:
            cell = Cell("BN", name, seed)
            ap = value if name == "population" else None
            results[cell] = write_ap(tmp_path, cell, bbox=ap)
    path = write_report(study, results, tmp_path)
    entries = json.loads(path.read_text())["box AP"]
    assert [(entry["mean"], entry["number"]) for entry in entries] == [(41.0, 2), (None, 0)]
    assert "NaN" not in path.read_text()
    printed = capfd.readouterr().out
    assert "41.0 ± 12.7 (2 of 3 seeds)" in printed
    assert "undefined" in printed
    assert "4 numbers are undefined and left out of the means." in printed


def test_training_accuracy_is_of_two_parts_of_a_training_that_ended(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1])
    place = write_training(tmp_path, "BN", 1, CURVE)
    write_training(tmp_path, "GN", 1, CURVE, done=False)
    # A line cut short, and iterations that ran again after an interruption.
    with (place / "metrics.json").open("a") as file:
        file.write('{"iteration": 199, "fast_rcnn/fg_c\n')
        file.write('{"iteration": 199, "fast_rcnn/fg_cls_accuracy": 0.5, "total_loss": NaN}\n')
    results = collect_results(study, {}, tmp_path)
    # Iterations 179 and 199 are the two records of the last 40 of 200.
    last = "last fifth of training"
    assert results.by_seed("training accuracy", "BN", last) == {1: pytest.approx(70.0)}
    assert results.by_seed("training accuracy", "GN", last) == {}
    first = "first half of training"
    assert results.by_seed("training accuracy", "BN", first) == {1: pytest.approx(10.0)}
    assert results.trainings["GN", 1].seconds is None


def test_probes_have_a_table_and_differences_by_hand(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "ShuffleBN"], [1, 2], probe=True)
    modes = ("own_image", "own_worker", "shuffled", "population")
    accuracies = {
        ("BN", 1): (90, 90, 70, 60),
        ("BN", 2): (92, 92, 74, 60),
        ("ShuffleBN", 1): (80, 80, 80, 79),
        ("ShuffleBN", 2): (81, 81, 80, 79),
    }
    results = {}
    for (run, seed), values in accuracies.items():
        cell = Cell(run, "leak", seed)
        results[cell] = write_probe(tmp_path, cell, dict(zip(modes, values, strict=True)))
    content = json.loads(write_report(study, results, tmp_path).read_text())
    leak = {entry["run"]: entry for entry in content["leakage in accuracy"]}
    assert leak["BN"]["mean"] == pytest.approx(19)
    assert leak["BN"]["interval over"] == "seeds and images"
    # 12.706 * 1 over the seeds; 1 over the images, in each.
    assert leak["BN"]["half_width_95"] == pytest.approx((12.706**2 + 1) ** 0.5, rel=1e-3)
    # Leakages of 20, 18 and 0, 1: differences of -20 and -17, with 12.706 * 1.5 around -18.5, and
    # of the images sqrt(1 + 1) in each.
    difference = leak["ShuffleBN"]["difference to the baseline"]
    assert difference["mean"] == pytest.approx(-18.5)
    assert difference["half_width_95"] == pytest.approx((19.059**2 + 2) ** 0.5, rel=1e-3)
    assert difference["interval over"] == "seeds and images"
    assert leak["BN"]["difference to the baseline"]["half_width_95"] == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["run", "evaluation", "seed", "metric", "value"]
    assert ["BN", "leak", "2", "accuracy, shuffled", "74"] in rows
    assert ["ShuffleBN", "leak", "2", "inconsistency in accuracy", "2"] in rows


def test_the_cost_of_a_study_is_that_of_its_tasks_by_their_workers(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1, 2], head="workers: 2")
    text = study.path.read_text().replace("batch:", "batch:\n    workers: 1")
    study.path.write_text(text)
    study = read_study(study.path)
    results = {}
    for run in study.runs:
        place = write_training(tmp_path, run, 1, CURVE)
        (place / "config.yaml").write_text(
            "SOLVER: {MAX_ITER: 200, IMS_PER_BATCH: 4}\nDATASETS: {TRAIN: [a], TEST: [b]}\n"
        )
    batch = Cell("BN", "batch", 1)
    results[batch] = write_ap(tmp_path, batch, bbox=50)
    folder = tmp_path / "BN" / "seed_1" / "evaluations" / "batch"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text('{"seconds": 30}')
    (folder / "recalibration.json").write_text('{"seconds": 12}')
    content = json.loads(write_report(study, results, tmp_path).read_text())
    # Two trainings of 93.5 s on two workers, and an evaluation of 42 s on one.
    assert content["minutes on a core"] == {
        "trainings": pytest.approx(93.5 * 4 / 60),
        "evaluations": pytest.approx(42 / 60),
    }
    assert content["number"] == {"trainings": 2, "evaluations": 1}
    assert content["images trained on"] == 2 * 200 * 4
    assert content["seconds of evaluations"] == {"BN": {"batch": {"1": 42}}}
    assert content["devices"] == ["A processor"]


def test_a_table_has_the_runs_that_have_an_evaluation_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, ["BN", "none"], [1], head="baseline: BN")
    path = tmp_path / "small.yaml"
    path.write_text(f"{path.read_text()}  leak: {{runs: [BN], probe: {{}}}}\n")
    study = read_study(path)
    ap, leak = Cell("none", "population", 1), Cell("BN", "leak", 1)
    accuracy = {"own_image": 0, "own_worker": 1, "shuffled": 2, "population": 3}
    results = {ap: write_ap(tmp_path, ap, bbox=5), leak: write_probe(tmp_path, leak, accuracy)}
    write_report(study, results, tmp_path)
    of_ap, of_probe, *_ = capfd.readouterr().out.split("Probe")
    assert "none" in of_ap
    assert "BN" in of_probe and "none" not in of_probe
    page = html.unescape((tmp_path / "report.html").read_text())
    of_probe = page[page.index('Probe "leak": accuracy') : page.index('Probe "leak": box AP')]
    assert "BN" in of_probe and "none" not in of_probe
    assert "\N{MINUS SIGN}1.0" in of_probe


@pytest.mark.parametrize(("limit", "above"), [(41.2, 48.8), (100.0, None), (None, None)])
def test_accuracy_above_a_limit_that_says_something(
    limit: float | None, above: float | None, tmp_path: Path
) -> None:
    study = make_study(tmp_path, ["BN"], [1], probe=True)
    cell = Cell("BN", "leak", 1)
    accuracy = {"own_image": 90, "own_worker": 90, "shuffled": 41, "population": 40}
    path = write_probe(tmp_path, cell, accuracy, limit)
    found = collect_results(study, {cell: path}, tmp_path)
    expected = {} if above is None else {1: pytest.approx(above)}
    assert found.by_seed("accuracy above the limit", "BN", "leak") == expected


def test_the_reading_says_what_the_intervals_support(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["GN", "BN", "SyncBN"], [1, 2, 3], head="baseline: BN")
    aps = {"BN": (70, 72, 74), "GN": (80, 81.5, 84), "SyncBN": (74, 68, 76)}
    results = {}
    for run, values in aps.items():
        for seed, value in enumerate(values, start=1):
            cell = Cell(run, "population", seed)
            results[cell] = write_ap(tmp_path, cell, bbox=value)
    sentences = read_results(collect_results(study, results, tmp_path))
    # GN: 10, 9.5, 10. SyncBN: 4, -4, 2, mean 0.667 and 4.303 * 4.163 / sqrt(3).
    assert (
        'Box AP under "population": GN (+9.8 ± 0.7 points) is above BN\'s; '
        "SyncBN (+0.7 ± 10.3 points) cannot be told from BN's."
    ) in sentences
    assert any(sentence.startswith("2 differences were compared") for sentence in sentences)


@pytest.mark.parametrize(("number", "end"), [(9, "and R8 (+4.5"), (10, "and 2 others cannot")])
def test_a_long_list_ends_with_how_many_more(number: int, end: str, tmp_path: Path) -> None:
    """Of one more the name is no longer."""
    runs = ["BN", *(f"R{k}" for k in range(number))]
    study = make_study(tmp_path, runs, [1, 2], head="baseline: BN")
    results = {}
    for run in runs:
        for seed in study.seeds:
            cell = Cell(run, "population", seed)
            results[cell] = write_ap(tmp_path, cell, bbox=30 + runs.index(run) * (9 * seed - 13))
    sentences = read_results(collect_results(study, results, tmp_path))
    (named,) = [each for each in sentences if each.startswith('Box AP under "population"')]
    assert end in named, named


def test_what_is_equal_in_every_seed_could_not_be_told_by_chance(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN", "SyncBN", "none"], [1, 2])
    results = {}
    for run, offset in (("BN", 0), ("GN", 3e-14), ("SyncBN", 4), ("none", 5)):
        for seed in study.seeds:
            cell = Cell(run, "population", seed)
            results[cell] = write_ap(tmp_path, cell, bbox=70.1 + seed + offset)
    sentences = read_results(collect_results(study, results, tmp_path))
    assert any("GN (0.0 ± 0.0 points) cannot be told from BN's" in each for each in sentences)
    assert any(sentence.startswith("2 differences were compared") for sentence in sentences)


def test_a_difference_over_fewer_seeds_says_so(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN", "SyncBN"], [1, 2, 3])
    results = {}
    for run, values in (("BN", (70, 72, 74)), ("GN", (80, 81)), ("SyncBN", (75,))):
        for seed, value in enumerate(values, start=1):
            cell = Cell(run, "population", seed)
            results[cell] = write_ap(tmp_path, cell, bbox=value)
    sentences = read_results(collect_results(study, results, tmp_path))
    # GN: 10 and 9.
    assert (
        'Box AP under "population": GN (+9.5 ± 6.4 points, 2 of 3 seeds) is above BN\'s.'
    ) in sentences
    assert "Differences that are of one seed only, and so tell nothing: 1." in sentences
    write_report(study, results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "+9.5 ± 6.4 (2 of 3 seeds) above" in page
    assert "+5.0 (1 of 3 seeds)" in page


def test_the_intervals_over_images_are_those_of_the_runs_with_one_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN", "SyncBN"], [1, 2], probe=True)
    results = {}
    for run, seeds in (("BN", (1, 2)), ("GN", (1, 2)), ("SyncBN", (1,))):
        for seed in seeds:
            cell = Cell(run, "leak", seed)
            own = 90 + 0.1 * seed
            accuracy = {"own_image": own, "own_worker": own, "shuffled": 70, "population": 70}
            results[cell] = write_probe(tmp_path, cell, accuracy)
    sentences = read_results(collect_results(study, results, tmp_path))
    # 12.706 * 0.05 over the seeds, and 1 over the images.
    assert (
        'Leakage in accuracy under "leak" (intervals over seeds and images of BN and GN; over '
        "images, for the weights of one seed of SyncBN): "
        "BN (+20.1 ± 1.2 points), GN (+20.1 ± 1.2 points) and "
        "SyncBN (+20.1 [19.1, 21.1] points, 1 of 2 seeds) are above zero."
    ) in sentences


@pytest.mark.parametrize(
    ("seeds", "done", "words"),
    [
        ([1], 1, ["One seed", "--seeds 1 2 3;"]),
        ([7], 1, ["One seed", "--seeds 7 8 9;"]),
        ([1, 4], 2, ["Two seeds", "12.7", "--seeds 1 4 5;"]),
        ([1, 2], 1, ["One seed", "--seeds 1 2 3;"]),
        ([1, 2, 3], 2, ["Two seeds", "not done: the same command"]),
        ([1, 2, 3], 3, []),
        ([1, 2, 3], 0, []),
    ],
)
def test_fewer_than_three_seeds_are_warned_of_everywhere_once(
    seeds: list[int],
    done: int,
    words: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    study = make_study(tmp_path, ["BN", "GN"], seeds)
    results = {}
    for seed in seeds[:done]:
        for run in study.runs:
            cell = Cell(run, "population", seed)
            results[cell] = write_ap(tmp_path, cell, bbox=70 + seed)
    path = write_report(study, results, tmp_path)
    warnings = json.loads(path.read_text())["warnings"]
    assert len(warnings) == bool(words)
    printed = capfd.readouterr().out
    page = html.unescape((tmp_path / "report.html").read_text())
    for warning in warnings:
        assert all(word in warning for word in words)
        assert printed.count(f"Warning: {warning}") == page.count(warning) == 1
    assert "Warning" in page if words else "Warning" not in page + printed


def test_one_seed_supports_no_difference_but_a_leak_over_images(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1], probe=True)
    results = {}
    for run, shuffled in (("BN", 70), ("GN", 89.5)):
        cell = Cell(run, "leak", 1)
        accuracy = {"own_image": 90, "own_worker": 90, "shuffled": shuffled, "population": 90}
        results[cell] = write_probe(tmp_path, cell, accuracy)
        cell = Cell(run, "population", 1)
        results[cell] = write_ap(tmp_path, cell, bbox=shuffled)
    sentences = read_results(collect_results(study, results, tmp_path))
    assert not any("Box AP under" in sentence for sentence in sentences)
    assert (
        'Leakage in accuracy under "leak" (intervals over images, for the weights of one seed): '
        "BN (+20.0 [19.0, 21.0] points) is above zero; "
        "GN (+0.5 [-0.5, 1.5] points) cannot be told from zero."
    ).replace("-", "\N{MINUS SIGN}") in sentences


def test_only_figures_with_data_are_drawn_and_their_text_has_the_numbers(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1, 2], probe=True)
    assert draw_all(collect_results(study, {}, tmp_path)) == []
    results = make_results(tmp_path, study)
    write_trace(tmp_path, "BN", 1)
    for name, means in (("head.1.0", [0.0, 0.0]), ("head.1.1", [1.0, 7.0])):
        state = {f"{name}.running_mean": torch.tensor(means)}
        state[f"{name}.running_var"] = torch.tensor([1.0, 4.0])
        path = tmp_path / "GN" / "seed_1" / "model_final.pth"
        before = torch.load(path)["model"] if path.exists() else {}
        torch.save({"model": before | state}, path)
    write_report(study, results, tmp_path)
    drawn = {each.name: each for each in draw_all(collect_results(study, results, tmp_path))}
    assert [*drawn] == ["ap_by_inference", "leak_by_run", "training_curves", "traces", "levels"]
    for name in drawn:
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.width > 600
        assert (tmp_path / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    # sqrt((1 / 1 + 49 / 4) / 2) = 2.574, as eps is 1e-5.
    assert "GN, head.1: 0.00, 2.57." in drawn["levels"].alt
    assert "last means: mini-batch" in drawn["traces"].alt
    assert re.search(r"BN: population 7\d\.\d ± \d+\.\d, batch 8", drawn["ap_by_inference"].alt)
    assert "leakage 12.0" in drawn["leak_by_run"].alt


def test_the_x_axis_has_a_figure_of_its_own(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["2", "8"], [1, 2], head="x_axis: images")
    results = make_results(tmp_path, study)
    names = [each.name for each in draw_all(collect_results(study, results, tmp_path))]
    assert names == ["over_x_axis", "training_curves"]
    for run in study.runs:
        for seed in study.seeds:
            write_training(tmp_path, run, seed, [0.5])
    names = [each.name for each in draw_all(collect_results(study, results, tmp_path))]
    assert names == ["over_x_axis"]  # one point is no curve


def test_recalibrated_statistics_have_their_distance(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN"], [1])
    study.path.write_text(study.path.read_text() + "  precise: {recalibrate: {}}\n")
    study = read_study(study.path)
    write_training(tmp_path, "BN", 1, CURVE)
    path = tmp_path / "BN" / "seed_1" / "evaluations" / "precise" / "recalibrated.json"
    path.parent.mkdir(parents=True)
    layers = {"a": {"change_of_mean": 0.3}, "b": {"change_of_mean": 0.4}}
    path.write_text(json.dumps({"layers": layers}))
    (drawn,) = [
        each
        for each in draw_all(collect_results(study, {}, tmp_path))
        if each.name == "ema_against_population"
    ]
    assert "BN: precise 0.35." in drawn.alt  # sqrt((0.09 + 0.16) / 2)


def test_a_layer_without_a_change_is_left_out_of_the_distance(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1])
    study.path.write_text(study.path.read_text() + "  precise: {recalibrate: {}}\n")
    study = read_study(study.path)
    layers = {"seen": {"change_of_mean": 0.3}, "odd": {"change_of_mean": None}}
    for run, changes in (("BN", layers | {"unseen": {"values": 1}}), ("GN", {"unseen": {}})):
        write_training(tmp_path, run, 1, CURVE)
        path = tmp_path / run / "seed_1" / "evaluations" / "precise" / "recalibrated.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"layers": changes}))
    drawn = {each.name: each for each in draw_all(collect_results(study, {}, tmp_path))}
    assert drawn["ema_against_population"].alt.endswith("BN: precise 0.30.")


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    runs = ["a$_$b", "_bn", "$x$", "B" * 180]
    study = make_study(tmp_path, runs, [1, 2], probe=True)
    results = make_results(tmp_path, study)
    for run in runs:
        write_trace(tmp_path, run, 1)
    write_report(study, results, tmp_path)
    drawn = {each.name: each for each in draw_all(collect_results(study, results, tmp_path))}
    (legend,) = drawn["training_curves"].figure.legends
    shown = [text.get_text().strip().replace(r"\$", "$") for text in legend.get_texts()]
    assert shown[:3] == runs[:3]
    assert len(shown[3]) < 60
    (axes,) = drawn["ap_by_inference"].figure.axes
    axes.figure.canvas.draw()
    assert axes.get_position().width > 0.3


def test_what_a_kill_left_of_a_training_is_passed_over(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1])
    for run, text in (("BN", ""), ("GN", '{"versions": {"pyth')):
        place = write_training(tmp_path, run, 1, CURVE, done=False)
        (place / "versions.json").write_text(text)
        (place / "config.yaml").write_text("VERSION: 2\n")
    write_report(study, {}, tmp_path)
    assert "not recorded" in (tmp_path / "report.html").read_text()


def test_a_failure_without_output_says_where_it_would_be(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN"], [1, 2])
    empty = tmp_path / "empty.log"
    empty.touch()
    failures = [Failure("one", empty), Failure("two", tmp_path / "none.log")]
    write_report(study, {}, tmp_path, failures)
    page = (tmp_path / "report.html").read_text()
    for failure in failures:
        assert f"It left no output in <code>{failure.log}</code>." in page


def test_the_csv_file_is_utf_8_in_any_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def ascii_by_default(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "b" not in mode:
            options.setdefault("encoding", "ascii")
        return opened(path, mode, *args, **options)

    study = make_study(tmp_path, ["größer"], [1])
    cell = Cell("größer", "population", 1)
    results = {cell: write_ap(tmp_path, cell, bbox=50)}
    monkeypatch.setattr(Path, "open", ascii_by_default)
    write_report(study, results, tmp_path)
    assert "größer" in (tmp_path / "results.csv").read_bytes().decode()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    study = make_study(folder, ["BN", "Shuffle <BN>", "GN"], [1, 2, 3], probe=True)
    results = make_results(folder, study)
    results.pop(Cell("GN", "population", 3))
    log = folder / "failed.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)) + "RuntimeError: <no> space\n")
    write_report(study, results, folder, [Failure("GN, seed 3: population", log)])
    return folder / "report.html"


def test_the_page_has_everything_and_asks_for_nothing(chromium: Any, report: Path) -> None:
    with open_page(chromium, report) as page:
        text = page.locator("main").inner_text()
        for part in (
            *("What the normalization batch is made of.", "A processor", "torch 2.14"),
            *("RuntimeError: <no> space", "line 99", "Shuffle <BN>", "2 of 3 seeds", "open"),
            *("BN (baseline)", "9 of 9", "leakage probe", "BN.INFERENCE batch"),
        ):
            assert part in text, part
        assert "line 50" not in text
        for table in page.locator("table").all():
            assert table.locator("caption").count() == 1
            assert table.locator("th:not([scope])").count() == 0
        for figure in page.locator("figure").all():
            assert len(figure.locator("[role=img]").get_attribute("aria-label")) > 40
        ids = page.evaluate("Array.from(document.querySelectorAll('[id]'), e => e.id)")
        assert len(ids) == len({*ids})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_tables_and_not_the_page(scheme: str, chromium: Any, report: Path) -> None:
    viewport = {"width": 390, "height": 844}
    with open_page(chromium, report, viewport=viewport, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.mouse.wheel(300, 0)
        assert page.evaluate("scrollX") == 0


def test_it_prints(chromium: Any, report: Path, tmp_path: Path) -> None:
    with open_page(chromium, report) as page:
        page.emulate_media(media="print")
        assert page.locator(".filters").is_hidden()
        path = tmp_path / "report.pdf"
        page.pdf(path=path, format="A4")
    number = len(re.findall(rb"/Type\s*/Page\b", path.read_bytes()))
    assert 3 <= number <= 12


def test_a_long_name_covers_no_number(chromium: Any, tmp_path: Path) -> None:
    study = make_study(tmp_path, ["B" * 180, "GN"], [1, 2])
    write_report(study, make_results(tmp_path, study), tmp_path)
    with open_page(
        chromium, tmp_path / "report.html", viewport={"width": 1000, "height": 800}
    ) as page:
        for table in page.locator("table.sortable:has(td.number)").all():
            assert table.locator("tbody th").first.bounding_box()["width"] < 400


@pytest.mark.timeout(240)
def test_a_thousand_runs_open_and_sort(chromium: Any, tmp_path: Path, record_property: Any) -> None:
    runs = [f"run {number}" for number in range(1000)]
    study = make_study(tmp_path, runs, [1])
    results = {}
    for number, run in enumerate(runs):
        cell = Cell(run, "population", 1)
        results[cell] = write_ap(tmp_path, cell, bbox=number * 7919 % 1000 / 10, segm=number / 20)
    write_report(study, results, tmp_path)
    start = time.monotonic()
    with open_page(chromium, tmp_path / "report.html") as page:
        record_property("seconds to open", time.monotonic() - start)
        rows = page.locator("#all tbody tr")
        more = page.locator(".scroll:has(#all) + .more")
        assert (rows.count(), more.locator("output").inner_text()) == (200, "200 of 1,000 rows")
        sort = """() => {
            const start = performance.now();
            document.querySelectorAll("#all thead button")[3].click();
            document.body.getBoundingClientRect();
            return performance.now() - start;
        }"""
        record_property("milliseconds to sort", page.evaluate(sort))
        assert float(rows.nth(199).locator("td").nth(2).inner_text()) == 19.9
        more.locator("button").click()
        assert more.is_hidden()
        values = page.evaluate(
            "Array.from(document.querySelectorAll('#all tbody tr'), r => +r.cells[3].textContent)"
        )
        assert values == sorted(values) == [number / 10 for number in range(1000)]
