"""The benchmark of population statistics: that it runs, and what its numbers are of."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bn_detection.data import make_leaky_shapes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import population  # noqa: E402
from population_report import draw, markdown  # noqa: E402
from report import replace_tables  # noqa: E402

RESULTS = BENCHMARKS / "results" / "population" / "cpu.json"
DOCS = BENCHMARKS.parent / "docs" / "benchmarks.md"


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    made = make_leaky_shapes(folder, 12, seed=3, split="train")
    datasets = [["benchmarked", str(made.annotations), str(made.images)]]
    overrides = ["DATASETS.COCO_JSON", str(datasets), "DATASETS.TRAIN", "('benchmarked',)"]
    plan = population.Plan(
        iterations=2, rounds=1, images=8, draws={4: 1, 12: 1}, passes=2, tolerance=0.5
    )
    threads = torch.get_num_threads()
    yield population.run(plan, overrides)
    torch.set_num_threads(threads)


@pytest.mark.timeout(200)
def test_what_is_measured(document):
    assert json.loads(json.dumps(document)).keys() == document.keys()
    assert document["times"].keys() == population.CASES.keys()
    for times in document["times"].values():
        assert times["images"] == 8
        assert times["ratio"] > 0 and times["memory_ratio"] > 0
    assert document["tolerance"]["standard_error"] < 0.5
    assert 0 < document["tolerance"]["images"] <= 40_000


def test_each_of_two_workers_runs_half_and_the_merge_is_one_collective(document):
    assert document["workers"]["images"] == 8
    assert document["workers"]["batches_of_each"] == 2
    assert document["workers"]["collectives"] == 1


def test_errors_are_those_of_the_same_images_and_rois(document):
    errors = document["errors"]
    assert errors["images"] == [4, 12]
    found = errors["estimators"]
    assert all(math.isfinite(value) for values in found.values() for value in values)
    # fvcore's differs by N / (N - 1) and float32 alone; the mean of variances by the batches.
    assert found["fvcore"] == pytest.approx(found["pooled"], rel=1e-2)
    assert found["mean_of_variances"] != pytest.approx(found["pooled"], rel=1e-2)
    # Two iterations leave most of the initial mean 0 and variance 1.
    assert errors["ema_of_training"] > max(found["pooled"])


def test_error_is_that_of_the_worst_layer():
    one = torch.ones(4, dtype=torch.float64)
    reference = {"a": (2 * one, 4 * one), "b": (0 * one, one)}
    estimate = {"a": (2.2 * one, 4 * one), "b": (0 * one, torch.tensor([1.0, 1, 1, 1.4]).double())}
    assert population.relative_error(estimate, reference) == pytest.approx(0.2)


def test_tables_and_figure(document, tmp_path):
    text = markdown(document)
    assert all(name in text for name in population.CASES)
    assert "Collectives of each estimate: 1." in text
    draw(document, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size == (960, 660)


def test_existing_files_are_not_overwritten(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text("{}")
    arguments = ["population.py", "--figure", str(tmp_path / "a.png"), "--output", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        population.parse_arguments()
    assert f"{path} exists" in capsys.readouterr().err


def test_tables_in_the_docs_are_those_of_the_results():
    text = DOCS.read_text()
    tables = markdown(json.loads(RESULTS.read_text()))
    assert replace_tables(text, tables, "population.py") == text


def test_results_name_no_host_and_no_folder():
    assert not re.search(r"(/home|/work|/root|/tmp|hostname)", RESULTS.read_text())
