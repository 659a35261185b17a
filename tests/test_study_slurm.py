"""Studies on Slurm: with submitit's local executor, and on a real Slurm where there is one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_tasks import appending, task
from test_study_execution import wait_for

from bn_detection.config import ConfigError
from bn_detection.study import executors
from bn_detection.study.executors import SlurmExecutor
from bn_detection.study.scheduler import execute

pytest.importorskip("submitit", reason="needs submitit: pip install 'submitit>=1.5'")
HERE = Path(__file__).parent


def slurm_answers() -> bool:
    try:
        asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


needs_slurm = pytest.mark.skipif(
    not slurm_answers(),
    reason="needs Slurm, as root on Debian: apt-get install --no-install-recommends slurm-wlm "
    "munge && tests/slurm/single_node.sh start",
)


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_SQUEUE_SECONDS", 0.5)


class InProcesses(SlurmExecutor):
    """Of submitit's local executor, whose queue is asked of its jobs."""

    seconds_between_polls = 0.05

    def __init__(self, folder: Path, **parameters: object) -> None:
        super().__init__(folder, cluster="local", **parameters)
        self.jobs_by_name = {}
        submit = self._submitit.submit

        def remember(*args: object) -> object:
            job = submit(*args)
            self.jobs_by_name[f"job {len(self.jobs_by_name)}"] = job
            return job

        self._submitit.submit = remember

    def _ask(self) -> dict[str, str]:
        running = {job.job_id for job in self.jobs_by_name.values() if not job.done()}
        self._asked = time.monotonic()
        return {name: number for name, number in self._queue.items() if number in running}


@pytest.mark.timeout(120)
def test_tasks_run_in_jobs_of_submitit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes"
    good = task(tmp_path, "good", appending(notes, "good "))
    bad = task(tmp_path, "bad", "print('the reason'); raise SystemExit(3)")
    after_bad = task(tmp_path, "after_bad", appending(notes, "after_bad "), bad)
    other = task(tmp_path, "other", appending(notes, "other "), good)
    executor = InProcesses(tmp_path)
    assert execute([good, bad, after_bad, other], executor) == [bad, after_bad]
    assert notes.read_text() == "good other "
    assert good.record.exists()
    printed = capfd.readouterr().out
    for part in ("[2 of 4] bad failed (1)", "the reason", "[3 of 4] after_bad: left out"):
        assert part in printed
    assert executor.log(bad) == bad.log
    assert executor.leave() == ""


@pytest.mark.timeout(120)
def test_a_job_that_cannot_start_its_task_is_shown_by_its_own_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(executors.process, "__file__", "/nowhere/process.py")
    assert len(execute([task(tmp_path, "lost", "pass")], InProcesses(tmp_path))) == 1
    assert "/nowhere/process.py" in capfd.readouterr().out


def test_parameters_go_to_slurm_or_are_refused(tmp_path: Path) -> None:
    InProcesses(tmp_path, parameters={"partition": "gpu", "gpus_per_node": 8, "mem_gb": 64})
    with pytest.raises(ConfigError, match="partitoin"):
        InProcesses(tmp_path, parameters={"partitoin": "gpu"})


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--executor slurm: .*srun"):
        SlurmExecutor(tmp_path)


@needs_slurm
@pytest.mark.timeout(120)
def test_tasks_run_on_a_real_slurm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print(os.environ['SLURM_JOB_ID'], os.environ['SLURM_CPUS_ON_NODE'])"
    good = task(tmp_path, "test-good", code)
    bad = task(tmp_path, "test-bad", "print('the reason'); raise SystemExit(3)")
    then = task(tmp_path, "test-then", code, good)
    executor = SlurmExecutor(tmp_path, parameters={"timeout_min": 10})
    assert execute([good, bad, then], executor) == [bad]
    ids = [int(one.log.read_text().split()[0]) for one in (good, then)]
    assert ids[0] < ids[1]
    assert good.record.exists()
    assert "the reason" in capfd.readouterr().out


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from bn_detection.study.executors import SlurmExecutor
from bn_detection.study.scheduler import execute
from study_tasks import appending, task
folder = Path({folder!r})
code = "import time; time.sleep(8); " + appending(folder / "notes", "once ")
execute([task(folder, "test-slow", code)], SlurmExecutor(folder, parameters={{"timeout_min": 10}}))
"""


@needs_slurm
@pytest.mark.timeout(120)
def test_a_job_whose_runner_was_killed_is_found_and_not_submitted_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = task(tmp_path, "test-slow", "raise SystemExit(1)")
    code = RUNNER.format(here=str(HERE), folder=str(tmp_path))
    runner = subprocess.Popen([sys.executable, "-c", code])
    wait_for(slow.log.exists, 60)
    runner.kill()
    runner.wait()
    executor = SlurmExecutor(tmp_path, parameters={"timeout_min": 10})
    found = executor.find([slow])
    assert list(found) == [slow]
    # The job of a task of another folder is not taken for its own.
    assert executor.find([task(tmp_path / "other", "test-slow", "pass")]) == {}
    assert executor.leave().startswith(f"Slurm jobs {found[slow].split()[-1]} go on")
    assert execute([slow], SlurmExecutor(tmp_path)) == []
    assert (tmp_path / "notes").read_text() == "once "
    assert f"test-slow: goes on as {found[slow]}" in capfd.readouterr().out


@needs_slurm
@pytest.mark.timeout(120)
def test_a_cancelled_job_is_a_failed_task(tmp_path: Path) -> None:
    slow = task(tmp_path, "test-cancelled", "import time; time.sleep(60)")

    class Cancels(SlurmExecutor):
        def status(self, task: object) -> int | None:
            if slow.log.exists():
                self.cancel()
            return super().status(task)

    start = time.monotonic()
    assert execute([slow], Cancels(tmp_path, parameters={"timeout_min": 10})) == [slow]
    assert time.monotonic() - start < 50
    assert not slow.record.exists()
