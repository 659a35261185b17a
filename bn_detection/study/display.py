"""What a study is doing: a table that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_READ_BYTES = 1 << 16
_LINE_SECONDS = 10

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


@dataclass
class Running:
    """A command that runs, as it is shown.

    Attributes:
        title: what it does, for people.
        log: the file with its output.
        start: when it was started, or found; of ``time.monotonic``.
        progress: the last that its output said, for people.
    """

    title: str
    log: Path
    start: float = field(default_factory=time.monotonic)
    progress: str = ""
    _read: int = 0
    _shown: float = -math.inf

    @property
    def seconds(self) -> float:
        """For how long it has been running."""
        return time.monotonic() - self.start

    def read(self) -> bool:
        """Read what is new of its output; whether that says how far it is."""
        try:
            size = self.log.stat().st_size
            with self.log.open("rb") as file:
                file.seek(max(self._read, size - _READ_BYTES))
                text = file.read()
        except OSError:  # not there yet, or removed
            return False
        # The last line may not be whole yet.
        whole = text.rfind(b"\n") + 1
        self._read = max(self._read, size - _READ_BYTES) + whole
        for line in reversed(text[:whole].decode(errors="replace").splitlines()):
            for pattern, shown in _PROGRESS:
                if match := re.search(pattern, line):
                    self.progress = shown.format(**match.groupdict())
                    return True
        return False

    def is_due(self) -> bool:
        """Whether a line about it should be printed; at most every 10 seconds."""
        if time.monotonic() - self._shown < _LINE_SECONDS:
            return False
        self._shown = time.monotonic()
        return True


class Display:
    """Shows a study while it runs; a context.

    Args:
        console: where; by default the standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console()
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=2, transient=True) if live else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, running: Sequence[Running], state: str) -> None:
        """Show how far commands are.

        Args:
            running: those that run.
            state: of the whole study, on one line.
        """
        for one in running:
            if one.read() and not self._live and one.is_due():
                print(f"    {one.title}: {one.progress}", flush=True)
        if self._live:
            table = Table.grid(padding=(0, 2))
            for one in running:
                minutes, seconds = divmod(int(one.seconds), 60)
                table.add_row(Text(one.title), f"{minutes}:{seconds:02}", Text(one.progress))
            self._live.update(Group(table, Text(state, style="bold")))
