"""The benchmark of the normalization layer: what it counts, and that it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_workers
from tooling import run_script
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import all_gather  # noqa: E402
import norm  # noqa: E402
from counters import LiveBytes, bytes_sent  # noqa: E402
from report import markdown, replace_tables  # noqa: E402

RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
OF_GPUS = [path for path in RESULTS if path.name.startswith("gpu_")]
DOCS = BENCHMARKS.parent / "docs" / "benchmarks.md"


def run_norm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script(BENCHMARKS / "norm.py", *arguments, timeout=120)


@pytest.mark.timeout(150)
def test_head_of_two_workers_sends_what_the_formulas_say(tmp_path: Path) -> None:
    path = tmp_path / "results" / "small.json"
    size = ["--workers", "2", "--channels", "8", "--rois", "6", "--rounds", "1"]
    arguments = ["--cases", "head", *size, "--output", path]
    process = run_norm(*arguments)
    assert process.returncode == 0, process.stderr
    document = json.loads(path.read_text())
    assert process.stdout.strip() == markdown(document).strip()
    (case,) = document["cases"]
    sent = {name: result["bytes_sent"] for name, result in case["results"].items()}
    layers, channels, rois, workers = 4, 8, 6, 2
    ring = 2 * (workers - 1) / workers
    gathered_counts = (workers - 1) * 3 * 8
    # Forward: the statistics of every group and a tag; backward: two sums a channel and a tag.
    for name, groups, once in (
        ("world", 1, 0),
        ("shuffle (statistics)", workers, gathered_counts),
    ):
        forward, backward = groups * (2 * channels + 1) + 1, groups * 2 * channels + 1
        assert sent[name] == layers * ring * 8 * (forward + backward) + once
    row = 4 * (channels * 7 * 7 + 1024)
    gathers = (workers - 1) * rois * row + 2 * (workers - 1) * 8
    gradients = ring * workers * rois * row
    permutation = (workers - 1) / workers * workers * rois * 8
    assert sent["all-gather shuffle"] == gathers + gradients + permutation
    # In a random balanced division of 12 rows, k of each worker's 6 move; forward and backward.
    gathered_tags = 4 * (workers - 1) * 8  # there and back, forward and backward
    moved = (sent["shuffle (features)"] - gathered_counts - gathered_tags) / (2 * row)
    assert moved == int(moved) and 0 <= moved <= rois
    alone = ("nn.BatchNorm2d per worker", "worker", "ghost", "image", "batch renorm")
    assert all(sent[name] == 0 for name in alone)
    assert all(result["memory_ratio"] > 0.9 for result in case["results"].values())


def test_an_existing_file_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["norm.py", "--output", str(path)])
    with pytest.raises(SystemExit):
        norm.parse_arguments()
    assert f"{path} exists" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["norm.py", "--output", str(path), "--overwrite"])
    assert norm.parse_arguments().output == path


def _gather(rank: int, world_size: int) -> dict[str, Tensor]:
    sizes = [3, 0, 2][:world_size]
    values = torch.arange(sum(sizes) * 4, dtype=torch.float32).view(-1, 1, 2, 2)
    x = values.split(sizes)[rank].clone().requires_grad_()
    shuffled, order, start = all_gather.shuffle(x)
    y = all_gather.unshuffle(shuffled.square(), order, start, sizes[rank])
    y.sum().backward()
    return {"x": x.detach(), "y": y.detach(), "grad": x.grad, "shuffled": shuffled.detach()}


@pytest.mark.timeout(120)
def test_all_gather_shuffle_moves_rows_and_their_gradients_there_and_back() -> None:
    results = run_workers(_gather, 3)
    for result in results:
        torch.testing.assert_close(result["y"], result["x"].square(), rtol=0, atol=0)
        torch.testing.assert_close(result["grad"], 2 * result["x"], rtol=0, atol=0)
    together = torch.cat([result["shuffled"] for result in results]).flatten()
    assert sorted(together.tolist()) == list(range(20))
    assert [len(result["shuffled"]) for result in results] == [2, 2, 1]


def _collectives(rank: int, world_size: int) -> dict[str, float]:
    numbers = torch.zeros(6)
    with bytes_sent() as sent:
        dist.all_reduce(numbers)
        dist.all_gather([torch.empty(6) for _ in range(world_size)], numbers)
        dist.broadcast(numbers, src=0)
        send = [[1, 2, 0], [0, 0, 3], [0, 1, 1]]
        receive = [row[rank] for row in send]
        rows = torch.zeros(sum(send[rank]), 5)
        dist.all_to_all_single(torch.empty(sum(receive), 5), rows, receive, send[rank])
    dist.all_reduce(numbers)  # not counted
    return dict(sent)


@pytest.mark.timeout(120)
def test_bytes_of_each_collective() -> None:
    results = run_workers(_collectives, 3)
    assert [result["all_to_all_single"] for result in results] == [2 * 20, 3 * 20, 1 * 20]
    for result in results:
        assert result["all_reduce"] == pytest.approx(2 * 2 / 3 * 24)
        assert result["all_gather"] == 2 * 24
        assert result["broadcast"] == pytest.approx(2 / 3 * 24)


def test_peak_counts_what_is_alive_at_once() -> None:
    given = torch.zeros(100)  # 400 bytes
    with LiveBytes([given]) as live:
        a = torch.ones(1000)  # 4,400 together
        b = a + 1  # 8,400
        a.add_(b)[:10].view(2, 5)
        del a, b  # 400
        c = torch.ones(500)  # 2,400
        d = c.sum()
    assert live.peak(without=[]) == 8_400
    assert live.peak(without=[given]) == 8_000
    assert d == 500


def test_tables_in_the_docs_are_those_of_the_results() -> None:
    of_cpus = [path for path in RESULTS if path not in OF_GPUS]
    for paths, docs, benchmark in (
        (of_cpus, DOCS, "norm.py"),
        (OF_GPUS, DOCS.with_name("gpu.md"), "gpu.py"),
    ):
        tables = "\n".join(markdown(json.loads(path.read_text())) for path in paths)
        text = docs.read_text()
        assert paths and replace_tables(text, tables, benchmark) == text


def test_results_name_no_host_and_no_folder() -> None:
    for path in RESULTS:
        assert not re.search(r"(/home|/work|/root|/tmp|hostname)", path.read_text())
