"""Studies on Slurm: submitit's local executor, programs like Slurm's, and a real one if any."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from study_tasks import appending, task
from test_study import STUDY, write
from test_study_execution import wait_for

from bn_detection.config import ConfigError
from bn_detection.files import FolderLock
from bn_detection.study import executors, scheduler
from bn_detection.study.display import Display
from bn_detection.study.executors import LocalExecutor, SlurmExecutor, SubmissionError, parse_slurm
from bn_detection.study.matrix import Task, plan
from bn_detection.study.runner import run_studies
from bn_detection.study.scheduler import FolderError, execute
from bn_detection.study.study_file import read_study

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
    monkeypatch.setattr(executors, "_RECORD_SECONDS", 0.5)
    monkeypatch.setattr(scheduler, "_RETRY_SECONDS", 0.1)


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

    def _ask(self) -> None:
        running = {job.job_id for job in self.jobs_by_name.values() if not job.done()}
        self._asked = time.monotonic()
        self._queue = {name: job for name, job in self._queue.items() if job in running}


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
    assert executor.leave() == ""


@pytest.mark.timeout(120)
def test_a_job_that_cannot_start_its_task_is_shown_by_its_own_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(executors.process, "__file__", "/nowhere/process.py")
    assert len(execute([task(tmp_path, "lost", "pass")], InProcesses(tmp_path))) == 1
    assert "/nowhere/process.py" in capfd.readouterr().out


class FakeSlurm:
    """Programs with the names of Slurm's, in which no job runs.

    ``sbatch`` answers as the lines of ``answers`` say, and ``ok`` after the last: ``ok``;
    ``refuse``; or ``lose``, where the job is in the queue and the answer is an error all the same.
    """

    PROGRAMS: ClassVar = {
        "srun": "",
        "sbatch": """
            answer=$(head -n 1 answers); sed -i 1d answers
            if [ "$answer" = refuse ]; then echo "controller busy" >&2; exit 1; fi
            number=$((100 + $(wc -l < submitted)))
            sed -n "s/^#SBATCH --job-name=/$number /p" "$1" | tee -a submitted >> queue
            if [ "$answer" = lose ]; then echo "Socket timed out" >&2; exit 1; fi
            echo "Submitted batch job $number"
        """,
        "squeue": 'if [ -e away ]; then echo "cannot contact" >&2; exit 1; fi; cat queue',
        "scancel": 'echo "$*" >> cancelled',
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("answers", "submitted", "queue", "cancelled"):
            (folder / name).touch()
        for name, code in self.PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/sh\ncd {folder}\n{code}\n")
            (folder / name).chmod(0o755)

    def submitted(self) -> list[str]:
        return [line.split("-")[0] for line in (self.folder / "submitted").open()]

    def answer(self, *answers: str) -> None:
        (self.folder / "answers").write_text("".join(f"{answer}\n" for answer in answers))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(fake.folder), prepend=os.pathsep)
    return fake


class EndsAtOnce(SlurmExecutor):
    """As if jobs had ended when they were submitted, or found."""

    seconds_between_polls = 0.01

    def find(self, tasks: Collection[Task]) -> dict[Task, str]:
        found = super().find(tasks)
        for one in found:
            one.record.write_text('{"seconds": 1}')
        return found

    def start(self, task: Task, keep: Sequence[int] = ()) -> None:
        super().start(task, keep)
        task.record.write_text('{"seconds": 1}')


@pytest.mark.timeout(60)
def test_a_task_that_slurm_does_not_take_is_submitted_later(
    slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [task(tmp_path, name, "pass") for name in ("first", "second", "third")]
    slurm.answer("ok", "refuse", "refuse")
    assert execute(tasks, EndsAtOnce(tmp_path)) == []
    assert slurm.submitted() == ["100 first", "101 second", "102 third"]
    assert not (slurm.folder / "cancelled").read_text()
    printed, errors = capfd.readouterr()
    assert printed.count("sbatch failed: controller busy; tried again") == 1
    assert not errors


@pytest.mark.timeout(60)
def test_a_job_whose_submission_had_no_answer_is_not_submitted_again(
    slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [task(tmp_path, name, "pass") for name in ("first", "second")]
    slurm.answer("ok", "lose")
    assert execute(tasks, EndsAtOnce(tmp_path)) == []
    assert slurm.submitted() == ["100 first", "101 second"]
    assert "second: done before" in capfd.readouterr().out


@pytest.mark.timeout(60)
def test_a_first_task_that_slurm_does_not_take_ends_the_study(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.answer("refuse")
    with pytest.raises(SubmissionError, match="sbatch failed: controller busy"):
        execute([task(tmp_path, "first", "pass")], SlurmExecutor(tmp_path))
    assert not slurm.submitted()


@pytest.mark.timeout(60)
def test_an_error_of_the_runner_leaves_the_jobs_and_a_removed_folder_cancels_them(
    slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Fails(Display):
        def show(self, *_: object) -> None:
            raise ValueError("of the display")

    one = task(tmp_path, "one", "pass")
    with pytest.raises(ValueError, match="of the display"):
        execute([one], SlurmExecutor(tmp_path), display=Fails())
    assert "Ended by an error. Slurm jobs 100 go on" in capfd.readouterr().out
    assert not (slurm.folder / "cancelled").read_text()
    lock = FolderLock(tmp_path)
    lock.take()
    (tmp_path / ".lock").unlink()
    with pytest.raises(FolderError, match="was removed"):
        execute([one], SlurmExecutor(tmp_path), lock)
    lock.release()
    assert (slurm.folder / "cancelled").read_text() == "100\n"


@pytest.mark.timeout(60)
def test_a_job_that_ends_while_the_runner_looks_is_done(slurm: FakeSlurm, tmp_path: Path) -> None:
    """It writes its record, and leaves the queue, just before the runner asks for the queue."""

    class Ends(SlurmExecutor):
        def find(self, tasks: Collection[Task]) -> dict[Task, str]:
            ending.record.write_text('{"seconds": 1}')
            return super().find(tasks)

    ending = task(tmp_path, "ending", "pass")
    assert execute([ending], Ends(tmp_path)) == []
    assert not slurm.submitted()


@pytest.mark.timeout(60)
def test_the_record_of_a_job_that_is_gone_is_waited_for(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(slurm.folder), prepend=os.pathsep)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one = task(tmp_path, "one", "pass")
    executor = SlurmExecutor(tmp_path)
    executor.start(one)
    (slurm.folder / "queue").write_text("")
    assert executor.status(one) is None
    now += 80
    assert executor.status(one) is None
    # NFS: a file that was missing is there once its folder has been listed.
    listdir = os.listdir

    def lists(path: Path) -> list[str]:
        if path == one.record.parent:
            one.record.write_text('{"seconds": 1}')
        return listdir(path)

    monkeypatch.setattr(os, "listdir", lists)
    assert executor.status(one) == 0
    monkeypatch.setattr(os, "listdir", listdir)
    one.record.unlink()
    now += 20
    assert executor.status(one) == 1


@pytest.mark.timeout(60)
def test_the_end_of_a_jobs_own_log_is_told(
    slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = task(tmp_path, "one", "pass")

    class MeetsItsLimit(SlurmExecutor):
        def start(self, task: Task, keep: Sequence[int] = ()) -> None:
            super().start(task, keep)
            task.log.write_text("iteration 19\n")
            (tmp_path / "slurm" / "100_0_log.err").write_text("CANCELLED DUE TO TIME LIMIT\n")
            (slurm.folder / "queue").write_text("")

    assert execute([one], MeetsItsLimit(tmp_path)) == [one]
    told = capfd.readouterr().out
    assert "iteration 19\n" in told
    assert "100_0_log.err:\nCANCELLED DUE TO TIME LIMIT\n" in told
    # The report shows the end of the task's log.
    assert one.log.read_text().endswith("CANCELLED DUE TO TIME LIMIT\n")


def test_a_local_start_is_refused_where_jobs_go_on(slurm: FakeSlurm, tmp_path: Path) -> None:
    path, folder = write(tmp_path, STUDY), tmp_path / "output"
    training = plan(read_study(path), folder, {}).tasks[0]
    training.record.parent.mkdir(parents=True)
    SlurmExecutor(folder).start(training)
    (folder / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"100 go on: give --executor slurm, or.* scancel 100"):
        run_studies([path], folder, dry_run=True)
    (slurm.folder / "away").touch()
    with pytest.raises(ConfigError, match=r"cannot contact.*if none goes on, remove .*slurm"):
        run_studies([path], folder, dry_run=True)
    training.record.write_text('{"seconds": 1}')
    assert LocalExecutor(folder=folder).find([training]) == {}
    training.record.unlink()
    (slurm.folder / "away").unlink()
    (slurm.folder / "queue").write_text("")
    run_studies([path], folder, dry_run=True)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("timeout_min=2880", 2880),
        ("account=012345", "012345"),
        ("account=2024_01", "2024_01"),
        ("constraint=[a|b]", "[a|b]"),
        ("constraint=*x", "*x"),
        ("qos=no", "no"),
        ("comment=a=b: c", "a=b: c"),
        ("exclusive=true", True),
        ("use_srun=false", False),
        ("mem_gb=1.5", 1.5),
        ('setup=["module load cuda"]', ["module load cuda"]),
        ('additional_parameters={"gpus": 8}', {"gpus": 8}),
    ],
)
def test_the_value_of_a_parameter_is_what_was_written(parameter: str, value: object) -> None:
    (parsed,) = parse_slurm([parameter]).values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("parameter", "words"),
    [("time=24:00:00", "timeout_min=MINUTES"), ("setup=module load cuda", "setup takes JSON")],
)
def test_a_parameter_with_a_value_of_another_kind_is_refused(parameter: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--slurm {parameter}: .*{words}"):
        parse_slurm([parameter])


def test_jobs_of_cuda_ask_for_gpus(slurm: FakeSlurm, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {"gpus_per_node": 8},
        {"gres": "gpu:8"},
        {"additional_parameters": {"gpus": 8}},
    ]
    for parameters in given:
        SlurmExecutor(tmp_path, device="cuda", parameters=parameters)
    with pytest.raises(ConfigError, match="no GPU: add --slurm gpus_per_node=8, or MODEL"):
        SlurmExecutor(tmp_path, workers=8, device="cuda", parameters={"mem_per_gpu": "8GB"})
    text = STUDY.replace("seeds", "overrides: {MODEL.DEVICE: cuda}\nseeds")
    with pytest.raises(ConfigError, match="no GPU"):
        run_studies([write(tmp_path, text)], tmp_path / "output", executor="slurm", dry_run=True)


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
