"""The pages of results are what docs/pages.py makes of the committed JSONs; nothing is typed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from study_outputs import make_results, make_study, write_ap, write_probe, write_training

from bn_detection.study.matrix import Cell
from bn_detection.study.report import write_report
from bn_detection.study.study_file import read_study

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import pages
from pages import MINUS, Pages, Results, signed, slim, table, take

ROOT = Path(__file__).parents[1]
PAPER = Pages().data("paper")
# By seed, under "population" and, of BN, "batch".
APS = {("BN", "population"): (50, 52, 54), ("GN", "population"): (60, 61, 65.5)}
APS["BN", "batch"] = (60, 61, 66)


def test_the_committed_pages_are_current() -> None:
    for name, text in Pages().render().items():
        assert (ROOT / "docs" / name).read_text() == text, "run: python docs/pages.py"


def test_templates_have_no_number_of_a_result() -> None:
    for path in (ROOT / "docs" / "templates").glob("*.md.j2"):
        text = path.read_text().replace("2105.07576", "")
        # Code shows values of a config.
        text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
        assert not re.findall(r"(?<![\w.>=])\d+\.\d(?!\.)", text.partition("```")[0]), path


def test_committed_results_are_small() -> None:
    for path in (ROOT / "docs" / "studies").glob("*.json"):
        assert path.stat().st_size < 80_000, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its results; "leak" of BN is 20, 18 and 22 points."""
    folder = tmp_path_factory.mktemp("small")
    study = make_study(folder, ["BN", "GN"], [1, 2, 3], probe=True)
    results = {}
    for (run, evaluation), aps in APS.items():
        for seed, ap in enumerate(aps, 1):
            cell = Cell(run, evaluation, seed)
            results[cell] = write_ap(folder, cell, bbox=ap)
            write_training(folder, run, seed, [0.1, 0.2])
    for seed, leak in enumerate((20, 18, 22), 1):
        cell = Cell("BN", "leak", seed)
        accuracy = {"own_image": 90, "own_worker": 90, "shuffled": 90 - leak, "population": 70}
        results[cell] = write_probe(folder, cell, accuracy)
    write_report(study, results, folder)
    return folder


@pytest.fixture
def small(folder: Path, tmp_path: Path) -> Pages:
    """Pages of it, with no template yet."""
    take(folder, tmp_path)
    return Pages(tmp_path, tmp_path, tmp_path, {"small": folder})


def test_values_and_differences_by_hand(small: Pages) -> None:
    study = small.study("small")
    # 4.303 * 2 / sqrt(3); over seeds and images: sqrt(4.303**2 * 4 / 3 + 1).
    assert study.value("BN", "population") == "52.0 ± 5.0"
    assert study.value("BN", "leak", "leakage in accuracy") == "20.0 ± 5.1"
    assert study.value("GN", "batch") == ""
    ttest = stats.ttest_rel(APS["BN", "batch"], APS["BN", "population"])
    half = ttest.confidence_interval(0.95).high - 31 / 3
    assert study.difference("BN", "batch", to="population") == f"+10.3 ± {half:.1f}"
    assert study.sign("BN", "batch", to="population") == 1
    # GN minus BN: 10, 9, 11.5.
    assert study.difference("GN", "population").startswith("+10.2 ± ")
    assert study.difference("BN", "population", to_run="GN").startswith(f"{MINUS}10.2 ± ")
    assert study.sign("BN", "population", to_run="GN") == -1
    scale = "3 seeds: mean ± half of the 95 % interval over the seeds, of the probe over seeds and"
    assert study.run_with.startswith(f"{scale} images. 9 minutes on a core (A processor).")
    assert [signed(x) for x in (1.25, 0.0, -0.5)] == ["+1.2", "0.0", f"{MINUS}0.5"]


def test_tables_by_hand(small: Pages) -> None:
    study = small.study("small")
    assert study.table(corner="head").splitlines() == [
        "| head | population | batch |",
        "| --- | ---: | ---: |",
        "| BN | 52.0 ± 5.0 | 62.3 ± 8.0 |",
        "| GN | 62.2 ± 7.3 |  |",  # 4.303 * sqrt(8.583 / 3)
    ]
    columns = [["population", "EMA"], ["population", "to BN", "box AP", "baseline"]]
    columns += [["batch", "gained", "box AP", "population"]]
    assert study.table(columns, transposed=True, corner="").splitlines() == [
        "|  | BN | GN |",
        "| --- | ---: | ---: |",
        "| EMA | 52.0 ± 5.0 | 62.2 ± 7.3 |",
        "| to BN |  | +10.2 ± 3.1 |",
        "| gained | +10.3 ± 3.8 |  |",
    ]
    assert table(["a", "b", "c"], [["x", 1, "y"]]) == (
        "| a | b | c |\n| --- | ---: | --- |\n| x | 1 | y |"
    )


def test_the_readings_and_figures_of_the_report(small: Pages, tmp_path: Path) -> None:
    study = small.study("small")
    assert study.reading("Leakage in accuracy") == (
        '* Leakage in accuracy under "leak" (intervals over seeds and images): BN (+20.0 ± 5.1 '
        "points) is above zero."
    )
    shown = study.figure("ap_by_inference", "AP by head")
    assert shown == "![AP by head](images/small_ap_by_inference.png)"
    assert (tmp_path / "small_ap_by_inference.png").stat().st_size > 1000
    assert study.figure("levels", "None") == ""
    # Once it is there, the folder of the study is not needed.
    assert Pages(tmp_path, tmp_path, tmp_path).study("small").figure("ap_by_inference", "A") != ""


@pytest.mark.parametrize(("run", "evaluation"), [("BM", "population"), ("BN", "EMA")])
def test_a_name_that_a_study_does_not_have_is_an_error(
    run: str, evaluation: str, small: Pages
) -> None:
    with pytest.raises(ValueError, match=r"small has no (run 'BM'; it has BN, GN|eval.*'EMA')"):
        small.study("small").value(run, evaluation)


def test_what_was_not_run_says_so_and_what_it_costs(
    small: Pages, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From trainings of 6 images a minute and evaluations of half a minute, by hand."""
    other = small.study("other")
    assert other.table() == other.not_run == "Not run."
    assert (other.value("any", "any"), other.reading(), other.figure("x", "y")) == (
        "not run",
        "",
        "",
    )
    content = json.loads((small.results / "small.json").read_text())
    content["images trained on"] = 60
    content["minutes on a core"] = {"trainings": 10, "evaluations": 3}
    content["number"] = {"trainings": 6, "evaluations": 6}
    (small.results / "small.json").write_text(json.dumps(content))
    text = (folder / "small.yaml").read_text().replace("seeds: [1, 2, 3]", "seeds: [1, 2]")
    overrides = "overrides: {SOLVER.MAX_ITER: 30, SOLVER.IMS_PER_BATCH: 2}\n"
    (small.results / "other.yaml").write_text(overrides + text)
    (small.results / "small.yaml").write_text(text)
    monkeypatch.setattr(pages, "STUDIES", small.results)
    fresh = Pages(small.templates, small.results, small.images)
    # Two runs of 60 images, three evaluations: 20 + 1.5 minutes a seed.
    assert fresh.study("other").not_run == "Not run; about 43 minutes on a core."
    assert fresh.costs().splitlines()[2:] == [
        "| `other` | 2 | 4 | 11 (not run) | 22 (not run) |",
        "| `small` | 3 | 6 | 2 | 6 |",
    ]


def test_a_page_is_made_for_every_template(small: Pages) -> None:
    for name, text in (("a", "{{ study('small').value('BN', 'batch') }}\n"), ("b", "\n\n\n\nB\n")):
        (small.templates / f"{name}.md.j2").write_text(text)
    (small.results / "mine.json").write_text("[1, 2]")
    assert small.data("mine") == [1, 2]
    rendered = small.render()
    assert rendered["a.md"].endswith("-->\n62.3 ± 8.0\n")
    assert rendered["b.md"].endswith("-->\n\nB\n")


def test_what_is_kept_is_small_and_rounded(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    kept = slim(results)
    assert "metrics by run, evaluation and seed" not in kept
    assert "accuracy, shuffled" not in kept
    entry = kept["box AP"][0]
    assert entry["by_seed"] == {"1": 50, "2": 52, "3": 54}
    assert entry["high_95"] == round(results["box AP"][0]["high_95"], 3)


def test_results_of_an_earlier_version_are_refused(folder: Path, tmp_path: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    del results["reading"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="without 'reading': run the study again"):
        take(tmp_path, tmp_path)


def places(of: dict[str, Any]) -> list[list[str]]:
    return [row["ours"] for row in of["rows"].values()]


@pytest.mark.parametrize("name", ["tables_3_and_6", "table_5"])
def test_rows_of_the_paper_have_a_result_of_a_study(name: str) -> None:
    for study_name, run, evaluation in places(PAPER[name]):
        study = read_study(ROOT / "configs" / "studies" / f"{study_name}.yaml")
        assert run in study.evaluations[evaluation].runs
    rows = PAPER[name]["rows"]
    assert {each for pair in PAPER[name]["differences"] for each in pair} <= {*rows}


def test_a_study_with_all_that_a_report_has_is_written(tmp_path: Path) -> None:
    study = make_study(tmp_path, ["BN", "GN"], [1], probe=True)
    write_report(study, make_results(tmp_path, study), tmp_path)
    take(tmp_path, tmp_path)
    found = Pages(tmp_path, tmp_path, tmp_path).study("small")
    assert isinstance(found, Results) and found.is_run
    assert "One seed" in found.run_with and "--seeds 1 2 3" in found.run_with
    # Of one seed, an interval over images in brackets.
    assert re.fullmatch(r"12\.0 \[11\.0, 13\.0\]", found.value("BN", "leak", "leakage in accuracy"))
