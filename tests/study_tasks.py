"""Tasks of a study whose command is a line of Python."""

from __future__ import annotations

import sys
from pathlib import Path

from bn_detection.study.matrix import Task


def task(folder: Path, name: str, code: str, needs: Task | None = None) -> Task:
    """A task that runs ``code``, with its record and its log in ``folder``."""
    command = [sys.executable, "-S", "-c", code]
    return Task(name, name, command, folder / f"{name}.json", needs)


def appending(path: Path, text: str) -> str:
    """Code that adds a text to a file."""
    return f"open({str(path)!r}, 'a').write({text!r})"
