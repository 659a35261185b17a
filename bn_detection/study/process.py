"""Running a command line tool, with its progress on one line and its output in a file."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"

_TAIL_LINES = 30

# What of a tool's output is shown while it runs.
_PROGRESS = (
    (
        r"eta: (?P<left>\S+) +iter: (?P<done>\d+) .*total_loss: (?P<loss>\S+)",
        "iteration {done}, loss {loss}, time left {left}",
    ),
    (
        r"Inference done (?P<done>\d+)/(?P<all>\d+).*ETA=(?P<left>\S+)",
        "evaluated {done} of {all} batches, time left {left}",
    ),
    (
        r"Population statistics: batch (?P<done>\d+)/(?P<all>\d+), eta (?P<left>\S+)",
        "population statistics, batch {done} of {all}, time left {left}",
    ),
)


def run_command(
    title: str, command: Sequence[str], log: Path, *, pass_fds: Sequence[int] = ()
) -> None:
    """Run a command; show its title, its progress and its time left, and log its output.

    Args:
        title: what it does, for people.
        command: the program and its arguments.
        log: file for its output, replaced if it is there; its folder is made.
        pass_fds: open files that the command keeps open.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    print(title, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    show = _Progress()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=pass_fds,
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            for pattern, shown in _PROGRESS:
                if match := re.search(pattern, line):
                    show(shown.format(**match.groupdict()))
    show.end()
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-_TAIL_LINES:])
        raise RuntimeError(f"{title} failed ({process.returncode}); the end of {log}:\n{tail}")


class _Progress:
    """One line that changes on a terminal; elsewhere a line at most every 10 seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = -math.inf

    def __call__(self, text: str) -> None:
        if self._terminal:
            print(f"\r    {text}\033[K", end="", flush=True)
        elif time.monotonic() - self._last >= 10:
            print(f"    {text}", flush=True)
            self._last = time.monotonic()

    def end(self) -> None:
        if self._terminal:
            print()
