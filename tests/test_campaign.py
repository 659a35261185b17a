"""A sample of what ``make campaign`` tries, and that it tells a broken promise."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from campaign import configs, counting, datasets, files, kills, resume
from campaign.counting import HANG, OTHER, REFUSED, TRACEBACK, WORKS, Tally, attempt, judge
from campaign.running import make_material
from tooling import Ended

SEED, SECONDS = 0, 30.0


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the other process of a comparison, so that sums have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_kept(tally: Tally, number: int) -> None:
    assert not tally.broken, "\n".join(tally.broken)
    assert tally.counts.total() == number


def test_configs_and_flags(material: Path, tmp_path: Path) -> None:
    assert_kept(configs.run(SEED, 0, 30, material, tmp_path, SECONDS), 30)


def test_damaged_datasets(material: Path, tmp_path: Path) -> None:
    number = 10
    names = [name for name, _ in datasets.cases(number)]
    chosen = [(tool, name) for tool in datasets.TOOLS for name in names]
    chosen = random.Random(SEED).sample(chosen, 12)
    assert_kept(datasets.run(SEED, chosen, number, material, tmp_path, SECONDS), 12)


def test_malicious_files(material: Path, tmp_path: Path) -> None:
    names = files.sample(SEED, 20, material)
    tally = files.run(names, material, tmp_path, SECONDS)
    assert_kept(tally, 20)
    assert tally.counts[REFUSED] > 15


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("one_thread")
def test_a_kill(material: Path, tmp_path: Path) -> None:
    kills.train_whole(material, tmp_path, 1, here=True)
    assert_kept(kills.run(SEED, [0], material, tmp_path, 100.0, here=True), 1)


def test_a_resumed_training(material: Path, tmp_path: Path) -> None:
    assert_kept(resume.run(["bn"], 1, material, tmp_path, SECONDS), 1)


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        (Ended(0, ""), WORKS),
        (Ended(2, "error: SEED 0: it is wrong."), REFUSED),
        (Ended(2, "error: "), OTHER),
        (Ended(2, "error: one\ntwo"), OTHER),
        (Ended(2, ""), OTHER),
        (Ended(1, "error: in one line"), OTHER),
        (Ended(2, "error: Overflow Exception raised from f frame #0: g"), TRACEBACK),
        (Ended(2, "", "Traceback (most recent call last):\nValueError"), TRACEBACK),
    ],
)
def test_what_is_kept_and_what_is_broken(ended: Ended, outcome: str) -> None:
    assert judge(ended)[0] == outcome


def test_a_hang_and_a_traceback_are_told() -> None:
    def hang() -> Ended:
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue

    assert attempt(hang, 0.05)[0] == HANG
    assert attempt(lambda: Ended(1 // 0, ""), 5)[0] == TRACEBACK
    tally = Tally("part") + Tally("part")
    tally.add("one", WORKS)
    tally.add("two", HANG, "somewhere")
    assert tally.broken == ["part: two: hang\nsomewhere"]
    assert counting.table([tally]).splitlines()[-1] == "| part | 2 | 1 | 0 | 0 | 1 | 0 | 0 |"


def test_code_that_runs_and_other_bits_are_told(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["diagnose, .pkl weights, protocol 2"]
    monkeypatch.setattr(files, "attempt", lambda *_: (tmp_path / "file 0/made").mkdir() or ("", ""))
    assert files.run(names, material, tmp_path, SECONDS).counts == {counting.RAN: 1}
    for name, number in (("killed", 1.0), ("whole", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"model": {"w": torch.tensor([number])}}, tmp_path / name / "model_final.pth")
    with pytest.raises(kills.WrongError, match=r"1 values with other bits: \['.model.w'\]"):
        kills.check_end(tmp_path / "killed", tmp_path / "whole")
