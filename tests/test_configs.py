"""The studies that ship: two forms of each, and each can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from bn_detection.study.matrix import plan
from bn_detection.study.study_file import read_study

STUDIES = Path(__file__).parents[1] / "configs" / "studies"
NAMES = ("domain", "frozen", "inference", "leakage", "levels", "momentum", "population", "renorm")


def test_every_study_has_a_quickstart_and_a_coco_form() -> None:
    for folder in (STUDIES, STUDIES / "coco"):
        assert {path.name for path in folder.iterdir() if path.is_file()} == {
            f"{name}.yaml" for name in NAMES
        }


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_a_study_ask_the_same(name: str) -> None:
    small, large = (read_study(path / f"{name}.yaml") for path in (STUDIES, STUDIES / "coco"))
    assert small.paper == large.paper
    assert (small.paper is None) == (name == "renorm")
    # With an image a worker ImageBN is BN.
    only_large = {"ImageBN"} if name == "leakage" else set()
    # Only the sizes of batches are others.
    if name != "inference":
        assert list(small.runs) == [run for run in large.runs if run not in only_large]
        assert small.baseline == large.baseline
    if name != "population":
        assert list(small.evaluations) == list(large.evaluations)


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
