"""How a study is run: order, failures, interruptions, and what is kept."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from study_tasks import appending, task
from tooling import start_script

from bn_detection.config import ConfigError
from bn_detection.engine.checkpoint import AtomicCheckpointer
from bn_detection.study import process
from bn_detection.study.display import Display, Running
from bn_detection.study.durations import Budget, Durations
from bn_detection.study.executors import LocalExecutor
from bn_detection.study.folder import claimed
from bn_detection.study.matrix import Task
from bn_detection.study.process import run_and_record, write_json
from bn_detection.study.scheduler import FolderError, execute
from bn_detection.study.study_file import Study

STUDY = Study("small", Path("small.yaml"), "", None, 1, (1,), {}, {}, "", {}, None)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failure_is_shown_and_does_not_stop_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    good = task(tmp_path, "good", appending(notes, "good "))
    bad = task(tmp_path, "bad", "print('the reason'); raise SystemExit(3)")
    after_bad = task(tmp_path, "after_bad", appending(notes, "after_bad "), bad)
    other = task(tmp_path, "other", appending(notes, "other "), good)
    tasks = [good, bad, after_bad, other]
    assert execute(tasks, LocalExecutor()) == [bad, after_bad]
    assert notes.read_text() == "good other "
    printed = capfd.readouterr().out
    for part in ("[2 of 4] bad failed (3)", "the reason", "[3 of 4] after_bad: left out"):
        assert part in printed
    # Again: only what has not been done.
    bad.command[-1] = appending(notes, "bad ")
    assert execute(tasks, LocalExecutor()) == []
    assert notes.read_text() == "good other bad after_bad "
    printed = capfd.readouterr().out
    assert printed.count("done before") == 2
    assert not bad.log.read_text()


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_run_at_once_as_asked(jobs: int, tmp_path: Path) -> None:
    """Each writes when it began and ended: as many overlap as there are jobs."""
    code = "import time; a = time.time(); time.sleep(0.5); print(a, time.time())"
    first = [task(tmp_path, f"{k}", code) for k in range(3)]
    then = [task(tmp_path, f"{k} then", code, one) for k, one in enumerate(first)]
    tasks = [one for pair in zip(first, then, strict=True) for one in pair]
    assert execute(tasks, LocalExecutor(jobs)) == []
    spans = {one: tuple(map(float, one.log.read_text().split())) for one in tasks}
    most = max(sum(a <= start < b for a, b in spans.values()) for start, _ in spans.values())
    assert most == jobs
    assert all(spans[one.needs][1] < spans[one][0] for one in then)


def test_each_process_has_a_thread_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one = task(tmp_path, "one", code)
    execute([one], LocalExecutor())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    other = task(tmp_path, "other", code)
    execute([other], LocalExecutor())
    assert (one.log.read_text(), other.log.read_text()) == ("1\n", "3\n")


def test_time_left_is_that_of_the_kinds_that_are_known(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [task(tmp_path, str(k), "pass") for k in range(4)]
    for one in tasks:
        one.kind = "same"
    tasks[0].record.write_text(json.dumps({"seconds": 200}))
    execute(tasks, LocalExecutor())
    assert "[2 of 4] 1 (study: about 10 min left)" in capfd.readouterr().out


def in_minutes(
    tasks: list[Task], minutes: float, executor: LocalExecutor | None = None
) -> tuple[list[Task], list[str]]:
    """The tasks that failed, and the names of those that are done."""
    failed = execute(tasks, executor or LocalExecutor(), budget=Budget(minutes))
    return failed, [one.title for one in tasks if one.record.exists()]


def test_in_a_budget_nothing_starts_that_is_not_expected_to_end(tmp_path: Path) -> None:
    done, long, after, quick, last = (
        task(tmp_path, name, "pass") for name in ("done", "long", "after", "quick", "last")
    )
    done.kind = long.kind = "long"
    after.needs = long
    done.record.write_text('{"seconds": 600}')
    # The first starts whatever it takes, or a budget that is too short for it would never end.
    assert in_minutes([done, quick, long, after, last], 1) == ([], ["done", "quick", "last"])
    assert in_minutes([done, long, after], 1) == ([], ["done", "long", "after"])


def test_what_a_training_took_before_is_not_expected_of_it_again(tmp_path: Path) -> None:
    first, training, evaluation = (task(tmp_path, name, "pass") for name in "abc")
    kinds = [task(tmp_path, f"{kind} done", "pass") for kind in "bc"]
    for one, kind in zip(kinds, "bc", strict=True):
        one.kind = kind
        one.record.write_text('{"seconds": 600}')
    evaluation.leftovers = (tmp_path / "half",)
    for one in (training, evaluation):
        one.record.with_suffix(".seconds").write_text("570.0")
    failed, names = in_minutes([*kinds, first, training, evaluation], 1)
    assert (failed, names) == ([], ["b done", "c done", "a", "b"])


def test_what_is_left_is_guessed_from_other_kinds_where_none_of_a_kind_is_done(
    tmp_path: Path,
) -> None:
    done, training, other, last = (task(tmp_path, name, "pass") for name in "abcd")
    done.images, training.images = 100, 300
    done.record.write_text('{"seconds": 200}')
    training.record.with_suffix(".seconds").write_text("60.0")
    durations = Durations([done])
    assert durations.expected(training) is None
    # 2 s an image, of which a minute is done; nothing is known of what is no training.
    assert durations.guess(training) == 540
    assert durations.minutes_left([training, other], 1, others=durations) == (9, 1)
    last.record.write_text('{"seconds": 30}')
    durations.add(last)
    assert durations.minutes_left([training, other], 2, others=durations) == (4.75, 0)
    assert durations.minutes_left([training, other], 2) == (0, 2)


@pytest.mark.timeout(60)
def test_at_the_end_of_a_budget_what_runs_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    short, *long = (task(tmp_path, name, code) for name in ("short", "long", "longer", "never"))
    short.command[-1] = "pass"
    start = time.monotonic()
    assert in_minutes([short, *long], 2 / 60, LocalExecutor(2)) == ([], ["short"])
    assert 2 <= time.monotonic() - start < 20
    assert not any(is_alive(int(one.log.read_text())) for one in long[:2])
    assert not long[2].log.exists()
    assert "[2 of 4] long: ended after 2 s, as the time is up" in capfd.readouterr().out


def test_leftovers_of_an_interrupted_attempt_are_removed(tmp_path: Path) -> None:
    left, folder = tmp_path / "new.pth", tmp_path / "evaluation"
    left.write_text("half")
    (folder / "inside").mkdir(parents=True)
    one = task(tmp_path, "task", f"import os; os.mkdir({str(folder)!r}); open({str(left)!r}, 'x')")
    one.leftovers = (left, folder, tmp_path / "never.json")
    assert execute([one], LocalExecutor()) == []
    assert left.read_text() == ""
    assert not any(folder.iterdir())


def test_gpus_are_divided_among_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.3)"
    tasks = [task(tmp_path, f"{k}", code) for k in range(3)]
    executor = LocalExecutor(None, workers=2, device="cuda")
    assert executor.jobs == 2
    execute(tasks, executor)
    first, second, third = (one.log.read_text().strip() for one in tasks)
    assert {first, second} == {"2,3", "5,7"}
    assert third in (first, second)
    for jobs in (None, 1):
        with pytest.raises(ConfigError, match=r"of 8 workers.* there are 4: write workers: 4"):
            LocalExecutor(jobs, workers=8, device="cuda")


@pytest.mark.timeout(60)
def test_more_jobs_than_gpus_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new one goes where the fewest run."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep({})"
    tasks = [task(tmp_path, f"{k}", code.format(60 * (k != 1))) for k in range(5)]
    executor = LocalExecutor(4, device="cuda")

    def gpu_of(one: Task) -> str:
        while not (one.log.exists() and one.log.read_text().strip()):
            time.sleep(0.02)
        return one.log.read_text().strip()

    try:
        for one in tasks[:4]:
            executor.start(one)
        found = [gpu_of(one) for one in tasks[:4]]
        assert sorted(found[:2]) == sorted(found[2:]) == ["0", "1"]
        while executor.status(tasks[1]) is None:
            time.sleep(0.02)
        executor.start(tasks[4])
        assert gpu_of(tasks[4]) == found[1]
    finally:
        executor.cancel()


RUNNER = """
from pathlib import Path
from bn_detection.study.executors import LocalExecutor
from bn_detection.study.folder import claimed
from bn_detection.study.runner import _sigterm_ends
from bn_detection.study.scheduler import execute
from study_tasks import task
from test_study_execution import STUDY
folder = Path({folder!r})
code = "import os, time; open({folder!r} + '/pid_%s', 'w').write(str(os.getpid())); time.sleep(%s)"
with _sigterm_ends(), claimed(folder, STUDY, {{}}, {{}}) as lock:
    tasks = [
        task(folder, name, code % (name, seconds))
        for name, seconds in (("short", 0), ("long", 60), ("longer", 60))
    ]
    execute(tasks, LocalExecutor(2), lock)
"""


def start_runner(folder: Path) -> tuple[ForkServerProcess, list[int]]:
    """A runner in a process of its own, once its short task is done and two others run."""
    runner = start_script("-c", RUNNER.format(folder=str(folder)), output=folder.parent)
    pids = [folder / "pid_long", folder / "pid_longer"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids), 60)
    return runner, [int(path.read_text()) for path in pids]


@pytest.mark.timeout(120)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_nothing_outlives_a_killed_runner(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    runner, pids = start_runner(folder)
    with pytest.raises(ConfigError, match=f"Another process works in .*process {runner.pid}"):
        claimed(folder, STUDY, {}, {}).__enter__()
    runner.kill()
    runner.join()
    wait_for(lambda: not any(map(is_alive, pids)), 5)
    assert (folder / "short.json").exists()
    assert not (folder / "long.json").exists()
    with claimed(folder, STUDY, {}, {}):
        pass


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_an_interrupted_runner_ends_its_tasks_and_says_what_is_kept(
    signum: signal.Signals, status: int, tmp_path: Path
) -> None:
    folder = tmp_path / "output"
    runner, pids = start_runner(folder)
    os.kill(runner.pid, signum)
    runner.join(20)
    assert runner.exitcode == status
    assert not any(map(is_alive, pids))
    printed = (tmp_path / "stdout").read_text() + (tmp_path / "stderr").read_text()
    assert "Interrupted. 1 of 3 tasks are done, and kept" in printed


@pytest.mark.timeout(60)
def test_a_folder_is_kept_by_what_a_killed_runner_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    with claimed(folder, STUDY, {}, {}) as lock:
        command = [sys.executable, "-c", "input()"]
        orphan = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.descriptor])
    try:
        with pytest.raises(ConfigError, match="Another process works in"):
            claimed(folder, STUDY, {}, {}).__enter__()
    finally:
        orphan.communicate(b"\n")
    with claimed(folder, STUDY, {}, {}):
        pass


@pytest.mark.timeout(60)
def test_a_folder_that_is_removed_ends_what_runs(tmp_path: Path) -> None:
    folder, pid = tmp_path / "output", tmp_path / "pid"
    code = (
        f"import os, shutil, time; open({str(pid)!r}, 'w').write(str(os.getpid())); "
        f"shutil.rmtree({str(folder)!r}); time.sleep(60)"
    )
    with claimed(folder, STUDY, {}, {}) as lock:
        with pytest.raises(RuntimeError, match="was removed"):
            execute([task(folder, "removes", code)], LocalExecutor(), lock)
        assert not is_alive(int(pid.read_text()))
        # Made anew by somebody else, it is not ours either.
        folder.mkdir()
        (folder / ".lock").touch()
        assert not lock.holds()


@pytest.mark.timeout(60)
def test_a_full_disk_ends_the_study_with_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    full = task(tmp_path, "full", "raise OSError(28, 'No space left on device')")
    other = task(tmp_path, "other", appending(notes, "other "))

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(FolderError, match=r"is full.*free some"):
        patch.setattr(os, "fsync", fsync)
        execute([full, other], LocalExecutor())
    full.command[-1] = appending(notes, "full ")
    assert execute([full, other], LocalExecutor()) == []
    assert notes.read_text() == "full other "


@pytest.mark.timeout(60)
@pytest.mark.parametrize("code", ["raise OSError(28, 'No space left on device')", "exit(28)"])
def test_another_full_disk_is_a_failure_of_a_task(code: str, tmp_path: Path) -> None:
    """Such as /tmp, or /dev/shm."""
    full = task(tmp_path, "full", f"import sys; exit = sys.exit; {code}")
    other = task(tmp_path, "other", "pass")
    assert execute([full, other], LocalExecutor()) == [full]
    assert other.record.exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["full.log", "full.seconds", "other.json", "other.log"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root alone (unshare -rm pytest ...)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.timeout(60)
def test_what_a_full_disk_really_does(disk: Path) -> None:
    record = disk / "study.json"
    write_json(record, {"before": 1})
    filling = task(disk, "filling", "import sys; sys.stdout.write('x' * 10**6)")
    with pytest.raises(RuntimeError, match="the disk is full"):
        execute([filling], LocalExecutor())
    with pytest.raises(OSError, match="No space left"):
        write_json(record, {"after": "y" * 10**5})
    assert json.loads(record.read_text()) == {"before": 1}
    assert sorted(path.name for path in disk.iterdir()) == ["filling.log", "study.json"]
    filling.log.unlink()
    filling.command[-1] = "print('fits')"
    assert execute([filling], LocalExecutor()) == []


def test_on_a_full_disk_the_checkpoint_before_stays_the_last(disk: Path) -> None:
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 2), str(disk))
    checkpointer.save("first")
    with pytest.raises(OSError, match="No space left"):
        (disk / "rest").write_bytes(bytes(10**6))
    with pytest.raises(OSError, match="No space left"):
        checkpointer.tag_last_checkpoint("second.pth")
    assert Path(checkpointer.get_checkpoint_file()).name == "first.pth"


def test_the_status_tells_a_full_disk_when_the_log_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = {
        "command": [sys.executable, "-S", "-c", "pass"],
        "log": "/dev/full",
        "record": str(tmp_path / "missing" / "record.json"),
        "leftovers": [],
        "parent": None,
        "keep": [],
    }

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process, "write_json", fails)
    monkeypatch.setattr(sys, "argv", ["process.py", json.dumps(specification)])
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert process._main() == errno.ENOSPC
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(7)", 7)])
def test_the_record_says_success_alone(code: str, status: int, tmp_path: Path) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    log, record = tmp_path / "a" / "task.log", tmp_path / "a" / "task.json"
    try:
        assert run_and_record([sys.executable, "-c", code], log, record) == status
        killed = "import os; os.kill(os.getpid(), 9)"
        assert run_and_record([sys.executable, "-c", killed], log, tmp_path / "none") == 137
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert record.exists() == (status == 0)
    assert not (tmp_path / "none").exists()


@pytest.mark.timeout(60)
def test_the_seconds_of_a_task_are_those_of_all_its_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "training.json"
    specification = {
        "command": [sys.executable, "-S", "-c", "import time; time.sleep(60)"],
        "log": str(tmp_path / "training.log"),
        "record": str(record),
        "leftovers": [],
        "parent": None,
        "keep": [],
    }
    code = (
        "import sys; from bn_detection.study import process; process._NOTE_SECONDS = 0.1; "
        f"sys.argv = ['', {json.dumps(specification)!r}]; process._main()"
    )
    first = subprocess.Popen([sys.executable, "-c", code])
    noted = tmp_path / "training.seconds"
    wait_for(lambda: noted.exists() and json.loads(noted.read_text()) >= 1, 60)
    first.kill()
    first.wait()
    before = json.loads(noted.read_text())
    assert before < 60
    task_of = ["-S", "-c", "import time; time.sleep(0.5); raise SystemExit({})"]
    previous = signal.getsignal(signal.SIGTERM)
    try:
        for status in (1, 0):
            command = [sys.executable, *(part.format(status) for part in task_of)]
            assert run_and_record(command, tmp_path / "training.log", record) == status
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert before + 1 <= json.loads(record.read_text())["seconds"] < before + 10
    assert not noted.exists()


def test_nothing_is_written_into_a_folder_that_was_removed(tmp_path: Path) -> None:
    """Or the study could not be started afresh there."""
    folder = tmp_path / "study"
    code = f"import shutil; shutil.rmtree({str(folder)!r})"
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(FileNotFoundError):
            command = [sys.executable, "-S", "-c", code]
            run_and_record(command, folder / "task.log", folder / "task.json")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not folder.exists()


def test_progress_is_read_from_the_log_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    running = Running("[1 of 1] BN", log)
    assert not running.read()
    line = (
        "[10/02 12:00:00 d2.utils.events]:  eta: 0:00:07  iter: {}  total_loss: {}  loss_cls: 1\n"
    )
    log.write_text("loading\n" + line.format(19, 2.5))
    assert running.read()
    assert running.progress == "iteration 19, loss 2.5, time left 0:00:07"
    with log.open("a") as file:
        file.write(line.format(39, 1.5)[:40])
    assert not running.read()
    with log.open("a") as file:
        file.write(line.format(39, 1.5)[40:])
    assert running.read()
    assert running.progress.startswith("iteration 39, loss 1.5")


def test_a_terminal_shows_what_runs_and_what_is_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Inference done 11/150. ETA=0:00:03\n")
    console = Console(file=(tmp_path / "shown").open("w"), force_terminal=True, width=100)
    with Display(console) as display:
        display.show([Running("[2 of 9] BN, seed 1: batch", log)], "1 of 9 done, about 5 min left")
        display._live.refresh()
    console.file.close()
    shown = (tmp_path / "shown").read_text()
    for part in ("[2 of 9] BN, seed 1: batch", "0:00", "evaluated 11 of 150 batches", "5 min left"):
        assert part in shown


def test_elsewhere_a_line_at_most_every_ten_seconds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    running = [Running("[2 of 9] BN", log)]
    with Display() as display:
        for done in (11, 12):
            with log.open("a") as file:
                file.write(f"Inference done {done}/150. ETA=0:00:03\n")
            display.show(running, "")
    assert capfd.readouterr().out == (
        "    [2 of 9] BN: evaluated 11 of 150 batches, time left 0:00:03\n"
    )
    assert running[0].progress.startswith("evaluated 12")


def test_is_alive_knows_this_process() -> None:
    assert is_alive(os.getpid())
