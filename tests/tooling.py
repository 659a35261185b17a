"""The command line tools, run in this process."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"


class Ended(NamedTuple):
    """How a tool ended.

    Attributes:
        status: its exit status.
        error: what it wrote to stderr without log lines and warnings, which is one line for an
            error that has a name.
        trace: the traceback before it.
    """

    status: int
    error: str
    trace: str = ""


def run_tool(name: str, *arguments: object) -> Ended:
    """Run ``tools/NAME.py`` as its command line would.

    Raises:
        Exception: what would be a traceback of the tool.
    """
    argv, stderr = [name, *map(str, arguments)], io.StringIO()
    status: object = 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
    lines = stderr.getvalue().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    if isinstance(status, str):
        return Ended(1, status)
    start = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), first)
    return Ended(int(status or 0), "\n".join(lines[first:]), "\n".join(lines[start:first]))
