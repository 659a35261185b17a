"""How long the tasks of a study take, and the time that a command may take."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping

from .matrix import Task


class Durations:
    """What tasks take, by those of their kind that are done.

    Args:
        done: tasks that have a record.
    """

    def __init__(self, done: Iterable[Task] = ()) -> None:
        self._of_kind: dict[str, tuple[int, float]] = {}  # how many, and their seconds
        # Of all kinds: the images of trainings, or the number of other tasks, and their seconds.
        self._in_all = {True: (0, 0.0), False: (0, 0.0)}
        for task in done:
            self.add(task)

    def add(self, task: Task) -> None:
        """Know of a task that has a record."""
        number, seconds = self._of_kind.get(task.kind, (0, 0.0))
        own = json.loads(task.record.read_text())["seconds"]
        self._of_kind[task.kind] = number + 1, seconds + own
        number, seconds = self._in_all[task.images > 0]
        self._in_all[task.images > 0] = number + (task.images or 1), seconds + own

    def expected(self, task: Task, running: float = 0.0) -> float | None:
        """The seconds that a task still takes.

        Args:
            task: one that is not done.
            running: for how many seconds it has been running. What a training took before it was
                interrupted counts too: it goes on from there.

        Returns:
            None where no task of its kind is done.
        """
        if task.kind not in self._of_kind:
            return None
        number, seconds = self._of_kind[task.kind]
        # What is noted of one that runs is up to half a minute old.
        return max(seconds / number - max(task.seconds_before(), running), 0.0)

    def guess(self, task: Task) -> float | None:
        """The seconds of a task by those of all kinds: a training by the images that it sees.

        Args:
            task: one that is not done.

        Returns:
            None where no training is done, or, for another task, no other task.
        """
        number, seconds = self._in_all[task.images > 0]
        if not number:
            return None
        return max(seconds / number * (task.images or 1) - task.seconds_before(), 0.0)

    def minutes_left(
        self,
        tasks: Collection[Task],
        jobs: int,
        *,
        running: Mapping[Task, float] | None = None,
        others: Durations | None = None,
    ) -> tuple[float, int]:
        """What tasks that are not done still take, and how many are of a kind that is not known.

        Args:
            tasks: those.
            jobs: that run at once.
            running: seconds for which those that run have been running.
            others: for a guess, where no task of a kind is done.
        """
        running = running or {}
        expected = [self.expected(task, running.get(task, 0.0)) for task in tasks]
        if others:
            expected = [
                others.guess(task) if seconds is None else seconds
                for task, seconds in zip(tasks, expected, strict=True)
            ]
        known = [seconds for seconds in expected if seconds is not None]
        return sum(known) / min(jobs, max(len(tasks), 1)) / 60, len(expected) - len(known)


class Budget:
    """The time in which a command starts tasks, and after which it ends those that run.

    Args:
        minutes: from now.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._is_used = False

    @property
    def seconds(self) -> float:
        """That are left; below 0 once it is over."""
        return self._end - time.monotonic()

    def allows(self, expected: float | None) -> bool:
        """Whether a task may start; the first may that does not end in time, or none ever would.

        Args:
            expected: the seconds that it takes; None where they are not known.
        """
        fits = expected is None or expected <= self.seconds or not self._is_used
        self._is_used |= (allowed := self.seconds > 0 and fits)
        return allowed
