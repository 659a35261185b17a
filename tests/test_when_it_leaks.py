"""The figures of docs/when_it_leaks.md: drawn from what is committed, and correlated rightly."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import when_it_leaks  # noqa: E402

LEAK, LOST = when_it_leaks.MEASURED


def potential(value: float, run: str) -> dict[str, object]:
    gain = {"value": value, "low": value - 1, "high": value + 1}
    return {"study": "dials", "run": run, "potential": {"accuracy": gain}}


def outcome(run: str, mean: float) -> dict[str, object]:
    return {"run": run, "mean": mean, "low_95": None, "high_95": None, "by_seed": {"1": mean}}


def test_ranks_are_correlated_over_the_datasets_that_were_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the leakage has the ranks 1 2 4 3 of the potential, so 1 - 6 * 2 / (4 * 15)."""
    monkeypatch.setattr(when_it_leaks, "STUDIES", tmp_path)
    leaks = {"a": 0.0, "b": 5.0, "c": 40.0, "d": 20.0}
    study = {"runs": [*leaks]}
    study |= {metric: [outcome(*item) for item in leaks.items()] for metric in (LEAK, LOST)}
    (tmp_path / "dials.json").write_text(json.dumps(study))
    content = {"datasets": {run: potential(k, run) for k, run in enumerate((*leaks, "not run"))}}
    content["tried"] = {"the other way": {"points": {run: -k for k, run in enumerate(leaks)}}}
    when_it_leaks.correlate(content)
    found = content["rank correlation"][LEAK]
    assert found["value"] == pytest.approx(0.8)
    assert found["low"] <= 0.8 <= found["high"] == 1
    assert found["datasets"] == 4
    assert content["tried"]["the other way"]["rank correlation"] == pytest.approx(-0.8)


def test_what_is_committed_is_drawn() -> None:
    content = json.loads(when_it_leaks.POTENTIAL.read_text())
    again = copy.deepcopy(content)
    when_it_leaks.correlate(again)
    assert again == content, "run benchmarks/when_it_leaks.py"
    assert {run for run, _ in when_it_leaks.datasets()} <= {*content["datasets"]}
    panels = when_it_leaks.draw_dials().axes
    assert len(panels) == len(when_it_leaks.DIALS)
    for panel in panels:
        assert 3 <= len(panel.get_xticks()) <= 4
    names = {text.get_text() for text in when_it_leaks.draw_potential(content).axes[0].texts}
    assert names <= {*content["datasets"]} and len(names) >= 8
    plt.close("all")
