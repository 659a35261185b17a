"""The benchmark of a GPU: on a CPU, with tiny sizes, every part of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tooling import run_script
from torch import nn

from bn_detection.norm import PartitionedBatchNorm2d

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from report import gpu_tables, markdown  # noqa: E402

QUICK = ["--quick", "--device", "cpu"]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts, as the command leaves them."""
    path = tmp_path_factory.mktemp("results") / "gpu.json"
    before = sorted(gpu.RESULTS.rglob("*"))
    process = run_script(BENCHMARKS / "gpu.py", *QUICK, "--output", path, timeout=270)
    assert process.returncode == 0, process.stderr
    assert sorted(gpu.RESULTS.rglob("*")) == before
    document = json.loads(path.read_text())
    assert process.stdout.strip() == gpu_tables(document).strip()
    return document


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif value is not None:
        yield value


@pytest.mark.timeout(300)
def test_every_part_has_results(document: dict[str, Any]) -> None:
    assert list(document["parts"]) == list(gpu.PARTS)
    results = {name: part["results"] for name, part in document["parts"].items()}
    assert not any("error" in part for part in document["parts"].values())
    assert results["a"]["passed"] > 10
    assert results["a"]["failed"] == 0
    of_variants = [
        *(case["variants"] for part in "bd" for case in results[part].values()),
        *results["c"].values(),
    ]
    assert len(of_variants) == 4 + 2 + 2
    for variants in of_variants:
        assert len(variants) >= 2
        assert all(math.isfinite(x) and x > 0 for x in numbers(variants)), variants
    for case in results["b"].values():
        assert case["bytes_per_second"] > 0 and case["floor_seconds"] > 0
        assert set(case["variants"]) >= {"worker", *(f"{name}, torch" for name in gpu.LAYERS)}
    for variants in results["c"].values():
        assert set(variants) == {gpu.BASELINE, *gpu.NORMS}
    assert list(results["e"]) == ["bn", "shuffle"]
    for result in results["e"].values():
        assert result["iterations"] > 0 and result["seconds"] > 0
        assert all(math.isfinite(x) for x in numbers(result))
        assert result["box_ap"].keys() == {"population", "batch"}


@pytest.mark.timeout(300)
def test_tables_show_every_variant(document: dict[str, Any]) -> None:
    text = gpu_tables(document)
    assert markdown(document) == text
    for name in (*gpu.LAYERS, *gpu.NORMS, "bn, float32", "shuffle, bfloat16"):
        assert f"| {name}" in text
    assert "nothing of its speed" in text


def _parse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.parse_arguments()


def test_an_existing_file_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text("{}")
    with pytest.raises(SystemExit):
        _parse(monkeypatch, *QUICK, "--output", path)
    assert f"{path} exists" in capsys.readouterr().err
    assert _parse(monkeypatch, *QUICK, "--output", path, "--overwrite").output == path
    assert _parse(monkeypatch, *QUICK).output is None


def test_the_full_sizes_need_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parse(monkeypatch, "--device", "cpu")
    assert "--quick" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert _parse(monkeypatch).output == gpu.RESULTS / "gpu_nvidia_h100_80gb_hbm3.json"


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = []

    def fails(plan: gpu.Plan, results: dict[str, Any], deadline: gpu.Deadline) -> None:
        results.update(passed=3, failed=0, skipped=1, failures={}, incomplete={})
        raise ValueError(f"no such file: {tmp_path}/secret/kernel.py")

    def measures(plan: gpu.Plan, results: dict[str, Any], deadline: gpu.Deadline) -> None:
        saved.append(json.loads(path.read_text()))
        results["bn"] = {"iterations": 2, "seconds": 0.5}

    parts = {"a": gpu.Part("First", 20, fails), "e": gpu.Part("Second", 20, measures)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *QUICK, "--output", str(path)])
    assert gpu.main() == 1
    document = json.loads(path.read_text())
    first, second = (document["parts"][name] for name in "ae")
    assert "ValueError: no such file: kernel.py" in first["error"]
    assert 'File "benchmarks/gpu.py"' in first["error"]
    assert str(tmp_path) not in path.read_text()
    assert first["results"]["passed"] == 3  # as far as it came
    assert saved[0]["parts"]["a"] == first  # before the next part began
    assert "error" not in second
    output = capsys.readouterr()
    assert "Failed: ValueError: no such file: kernel.py" in output.out
    assert "| bn | 2 | 500.0 ms | - |" in output.out
    assert "Traceback" in output.err
    monkeypatch.setattr(gpu, "PARTS", {"e": parts["e"]})
    monkeypatch.setattr(sys, "argv", ["gpu.py", *QUICK, "--parts", "e"])
    assert gpu.main() == 0


def test_tests_that_fail_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase name="good"/><testcase name="passed_over"><skipped message="no GPU"/></testcase>'
        '<testcase name="bad[triton]"><failure message="AssertionError: /a/b/c.py"/></testcase>'
        "</testsuite></testsuites>"
    )
    results: dict[str, Any] = {"passed": 1, "failed": 0, "skipped": 0, "failures": {}}
    gpu._count(report, results)
    assert results == {
        "passed": 2,
        "failed": 1,
        "skipped": 1,
        "failures": {"bad[triton]": "AssertionError: c.py"},
    }


@pytest.mark.timeout(60)
def test_processes_that_are_late_are_interrupted() -> None:
    def python(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    quick, slow = python(""), python("import time; time.sleep(100)")
    assert gpu.await_all([quick, slow], gpu.Deadline(3)) == [slow]
    assert quick.returncode == 0
    assert slow.returncode not in (None, 0)


@pytest.mark.timeout(120)
def test_correctness_is_not_what_did_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ends"
    program.write_text("#!/bin/sh\nexit 5\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    plan = replace(gpu.quick_plan("cpu"), tests=("some",))
    results: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match=r"1 of 1 processes did not finish"):
        gpu.correctness(plan, results, gpu.Deadline(100))
    assert results["incomplete"] == {"some": "ended with 5"}


@pytest.mark.timeout(120)
def test_parts_after_a_lost_gpu_run_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "synchronize", lost)
    parts = {"a": gpu.Part("Loses the GPU", 20, lambda *_: None), "b": gpu.PARTS["b"]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    plan = replace(gpu.quick_plan("cpu"), shapes=((4, 2, 7, 7),), dtypes=("float32",))
    document = gpu.run(plan, ["a", "b"])
    assert list(document["parts"]["b"]["results"]) == ["[4, 2, 7, 7] float32"]


def test_a_part_is_stopped_when_its_time_is_over() -> None:
    with pytest.raises(TimeoutError, match=r"stopped after 0.1 s"), gpu.time_limit(0.1):
        time.sleep(20)
    with gpu.time_limit(0.2):
        pass
    time.sleep(0.3)


@pytest.mark.timeout(100)
def test_processes_of_a_part_end_with_it() -> None:
    """And no others."""
    start = time.monotonic()
    other = get_context("spawn").Process(target=time.sleep, args=(90,))
    other.start()
    before = {process.pid for process in active_children()}
    try:
        with pytest.raises(TimeoutError), gpu.time_limit(5), gpu.processes(1) as pool:
            pool.submit(time.sleep, 90).result()
        assert time.monotonic() - start < 60
        assert {process.pid for process in active_children()} == before
    finally:
        other.kill()
        other.join()


class _Event:
    """A CUDA event on a clock that a step moves by 6 ms."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


def test_time_and_waits_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    launched = []

    def step() -> None:
        launched.append("step")
        _Event.now += 6
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    plan = replace(gpu.quick_plan("cuda"), steps=3)
    with pytest.warns(UserWarning, match="synchronizing"):
        found = gpu.sample(step, plan, before=lambda: launched.append("before"))
    assert launched == ["before", "step", "step", "step"]
    assert found.seconds == pytest.approx(6e-3)
    assert 0 < found.host_seconds < 1
    assert gpu.waits(step, "cuda") == 1
    assert modes == ["warn", 0]


def test_one_of_several_workers_normalizes_with_what_all_have() -> None:
    x = torch.randn(6, 4, 3, 3)
    expected = nn.BatchNorm2d(4)(x)
    with gpu.one_of(8):
        assert dist.get_world_size() == 8
        layer = PartitionedBatchNorm2d(4, partition="world")
        assert layer.spans_workers
        torch.testing.assert_close(layer(x), expected)
        # With 8 x 6 rows in eight groups, running statistics are means over groups.
        PartitionedBatchNorm2d(4, partition="shuffle")(x)
        # As nn.SyncBatchNorm gathers statistics, which a CPU cannot run.
        gathered = torch.empty(1, 8 * 3)
        for gather in (dist.all_gather_single, dist.all_gather_into_tensor):
            gather(gathered.zero_(), torch.arange(3.0), dist.group.WORLD, async_op=False)
            assert gathered.view(8, 3).tolist() == [[0.0, 1.0, 2.0]] * 8
    assert not dist.is_initialized()
