"""Runs the tasks of a study, as many at once as its executor has places for."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..files import FolderLock
from .display import Display, Running
from .durations import Budget, Durations
from .executors import Executor, SubmissionError, is_done
from .matrix import Task

_TAIL_LINES = 30
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ROOM_BYTES = 1 << 26
_CHECK_SECONDS = 1.0
_RETRY_SECONDS = 60.0


class FolderError(RuntimeError):
    """Nothing more can be written into the folder of a study."""


def execute(
    tasks: Sequence[Task],
    executor: Executor,
    lock: FolderLock | None = None,
    *,
    display: Display | None = None,
    budget: Budget | None = None,
) -> list[Task]:
    """Run the tasks that have no record yet, each once what it needs is done.

    A task that fails is shown with the end of its log. Those that need it are left out, and the
    others go on. A task that cannot be submitted is tried again every minute, unless it is the
    first of all: then something is wrong for good.

    Args:
        tasks: each after the one that it needs.
        executor: runs them.
        lock: of the folder of the study, which the tasks share; looked at every second.
        display: shows them.
        budget: a task that cannot be expected to end in it does not start, and what runs at its end
            is ended as by Ctrl-C.

    Returns:
        The tasks that failed or were left out, in the order of ``tasks``; not those for which there
        was no time.

    Raises:
        FolderError: the disk is full, or the folder was removed. What ran has been ended.
        SubmissionError: nothing could be submitted.
        KeyboardInterrupt: Ctrl-C. As after any other error, jobs of Slurm go on.
    """
    scheduler = _Scheduler(tasks, executor, lock, display or Display(), budget)
    try:
        with scheduler.display:
            scheduler.run()
    except FolderError:
        executor.cancel()
        raise
    except BaseException as error:
        left = executor.leave()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print(
                f"\nInterrupted. {len(scheduler.done)} of {len(tasks)} tasks are done, and "
                f"kept; a training goes on from its last checkpoint. {left}The same command goes "
                "on from here.",
                flush=True,
            )
        elif left:
            print(f"\nEnded by an error. {left}", flush=True)
        raise
    return [task for task in tasks if task in scheduler.failed]


class _Scheduler:
    def __init__(
        self,
        tasks: Sequence[Task],
        executor: Executor,
        lock: FolderLock | None,
        display: Display,
        budget: Budget | None,
    ) -> None:
        self.display = display
        self.failed: set[Task] = set()
        self.done: set[Task] = set()
        self._durations = Durations()
        # For which there is no time.
        self._late: set[Task] = set()
        self._executor, self._lock, self._budget = executor, lock, budget
        self._titles = {
            task: f"[{number} of {len(tasks)}] {task.title}" for number, task in enumerate(tasks, 1)
        }
        self._waiting = list(tasks)
        self._running: dict[Task, Running] = {}
        self._checked = time.monotonic()
        self._any_started = False
        # When to try again what could not be submitted.
        self._next_try: float | None = None

    def run(self) -> None:
        self._look()
        while self._waiting or self._running:
            self._start()
            self._check_folder()
            for task in list(self._running):
                status = self._executor.status(task)
                if status is not None:
                    self._end(task, self._running.pop(task), status)
            if self._budget and self._budget.seconds <= 0:
                self._end_all()
            self.display.show(list(self._running.values()), self._state())
            if self._running or self._next_try:
                time.sleep(self._executor.seconds_between_polls)

    def _look(self) -> None:
        """Set aside, of the tasks that wait, those that are done or go on."""
        # A job writes its record before it leaves the queue, so records are looked at last.
        found = self._executor.find(self._waiting)
        for task in list(self._waiting):
            if is_done(task):
                self._waiting.remove(task)
                self._say_done(task, "done before")
            elif task in found:
                self._set_running(task)
                self._say(task, f"goes on as {found[task]}")

    def _start(self) -> None:
        if self._next_try and time.monotonic() < self._next_try:
            return
        try:
            if self._next_try:
                # Of a submission that failed for want of an answer, the job may be there.
                self._look()
            for task in list(self._waiting):
                if task.needs in self.failed:
                    self._waiting.remove(task)
                    self.failed.add(task)
                    self._say(task, "left out, for what it needs failed")
                elif task.needs in self._late:
                    self._put_off(task)
                elif task.needs is None or task.needs in self.done:
                    self._start_one(task)
            self._next_try = None
        except SubmissionError as error:
            if not self._any_started:
                raise
            if not self._next_try:
                print(f"{error}; tried again every {_RETRY_SECONDS:.0f} s", flush=True)
            self._next_try = time.monotonic() + _RETRY_SECONDS

    def _start_one(self, task: Task) -> None:
        if len(self._running) >= self._executor.jobs:
            return
        if self._budget and not self._budget.allows(self._durations.expected(task)):
            self._put_off(task)
            return
        left = self._time_left()
        # What an earlier attempt said is not news.
        task.log.unlink(missing_ok=True)
        self._executor.start(task, (self._lock.descriptor,) if self._lock else ())
        print(f"{self._titles[task]}{left and f' (study: {left})'}", flush=True)
        self._set_running(task)

    def _put_off(self, task: Task) -> None:
        self._waiting.remove(task)
        self._late.add(task)

    def _end_all(self) -> None:
        """The time is up."""
        if self._running:
            self._executor.cancel()
        for task, running in self._running.items():
            if is_done(task):
                self._say_done(task, f"done in {running.seconds:.0f} s")
            else:
                self._say(task, f"ended after {running.seconds:.0f} s, as the time is up")
        self._late |= {*self._waiting, *self._running} - self.done
        self._waiting.clear()
        self._running.clear()

    def _set_running(self, task: Task) -> None:
        self._waiting.remove(task)
        self._running[task] = Running(self._titles[task], task.log)
        self._any_started = True

    def _end(self, task: Task, running: Running, status: int) -> None:
        if status == 0:
            self._say_done(task, f"done in {running.seconds:.0f} s")
            return
        self._check_folder(at_once=True)
        self.failed.add(task)
        self._executor.explain(task)
        lines = task.log.read_text(errors="replace").splitlines() if task.log.exists() else []
        tail = "\n".join(lines[-_TAIL_LINES:])
        title = self._titles[task]
        print(f"error: {title} failed ({status}); the end of {task.log}:\n{tail}\n", flush=True)
        # Whatever was told: a full disk may have cut the log too.
        if _is_full(task.record.parent):
            raise FolderError(
                f"{task.record.parent}: the disk is full. What is done is whole; free some space, "
                "and the same command goes on from here."
            )

    def _check_folder(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        if self._lock and not self._lock.holds():
            raise FolderError(
                f"{self._lock.path.parent} was removed, or made anew, while it ran. What ran has "
                "been ended; the same command starts afresh."
            )

    def _say(self, task: Task, what: str) -> None:
        print(f"{self._titles[task]}: {what}", flush=True)

    def _say_done(self, task: Task, what: str) -> None:
        self.done.add(task)
        self._durations.add(task)
        self._say(task, what)

    def _state(self) -> str:
        parts = [f"{len(self.done)} of {len(self._titles)} done"]
        parts += [f"{len(self.failed)} failed or left out"] if self.failed else []
        return ", ".join([*parts, left] if (left := self._time_left()) else parts)

    def _time_left(self) -> str:
        """What all tasks that are not done will take, once one of each kind is."""
        missing = [*self._waiting, *self._running]
        passed = {task: running.seconds for task, running in self._running.items()}
        minutes, unknown = self._durations.minutes_left(
            missing, self._executor.jobs, running=passed
        )
        return f"about {max(minutes, 1):.0f} min left" if missing and not unknown else ""


def _is_full(folder: Path) -> bool:
    """Whether a checkpoint would not fit into a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # Zeros take no room where the file system compresses.
            file.write(os.urandom(_ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in _FULL
    return False
