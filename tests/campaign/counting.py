"""What came of the inputs of a part: counted, and told where a promise was broken."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn
from unittest import mock

from detectron2.data import DatasetCatalog, MetadataCatalog
from tooling import Ended

WORKS, REFUSED = "works", "refused in one line"
TRACEBACK, HANG, RAN, OTHER = "raw traceback", "hang", "code ran", "other failure"
OUTCOMES = (WORKS, REFUSED, TRACEBACK, HANG, RAN, OTHER)


@dataclass
class Tally:
    """The counts of a part.

    Attributes:
        part: its name.
        counts: of inputs by outcome.
        broken: each input with which a promise was broken, with what happened.
    """

    part: str
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: str, detail: str = "") -> None:
        """Count an input; ``detail`` is told if a promise was broken."""
        self.counts[outcome] += 1
        if outcome not in (WORKS, REFUSED):
            self.broken.append(f"{self.part}: {name}: {outcome}\n{detail}".rstrip())

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.part, self.counts + other.counts, self.broken + other.broken)


def table(tallies: list[Tally]) -> str:
    """All counts, in Markdown."""
    lines = [("part", "inputs", *OUTCOMES), ("---",) * (2 + len(OUTCOMES))]
    for tally in tallies:
        counts = [tally.counts[outcome] for outcome in OUTCOMES]
        lines.append((tally.part, *(f"{count:,}" for count in (tally.counts.total(), *counts))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class TimeUp(BaseException):
    """An input took longer than it may; no ``except Exception`` takes it for something else."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeUp` after so many seconds; a limit that runs already goes on after it."""

    def end(*_: object) -> NoReturn:
        raise TimeUp

    handler = signal.signal(signal.SIGALRM, end)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def memory_limit(most: int = 8 * 2**30) -> Iterator[None]:
    """Allocations beyond so many bytes fail, before the machine is out of memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Datasets, loggers and module paths are then as they were; what is printed is dropped."""
    names, paths = set(DatasetCatalog), sys.path[:]
    loggers = [logging.getLogger(name) for name in ("bn_detection", "detectron2", "fvcore")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.path[:] = paths
        for name in set(DatasetCatalog) - names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


def attempt(run: Callable[[], Ended], seconds: float) -> tuple[str, str]:
    """Run a tool, and tell what came of it: the outcome, and what it said.

    Args:
        run: calls :func:`tooling.run_tool`.
        seconds: that it may take.
    """
    flags = mock.patch.object(argparse.ArgumentParser, "error", _refuse_flags)
    try:
        with own_state(), flags, memory_limit(), time_limit(seconds):
            ended = run()
    except TimeUp:
        return HANG, traceback.format_exc()
    except Exception:
        return TRACEBACK, traceback.format_exc()
    return judge(ended)


def judge(ended: Ended) -> tuple[str, str]:
    """The outcome of a tool that ended, and what it said."""
    said = "\n".join(part for part in (ended.trace, ended.error) if part)
    native = "\nframe #0" in ended.error or " frame #0: " in ended.error  # of torch's C++
    if ended.trace or native or "Traceback (most recent call last)" in ended.error:
        return TRACEBACK, said
    if ended.status == 0:
        return WORKS, said
    line = ended.error
    in_one_line = line.startswith("error: ") and "\n" not in line
    if ended.status == 2 and in_one_line and len(line) > len("error: "):
        return REFUSED, said
    return OTHER, f"status {ended.status}: {said}"


def _refuse_flags(self: argparse.ArgumentParser, message: str) -> NoReturn:
    """As argparse does, without the lines on usage before the error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
