"""The command line tools, run in this process or in one of its own that begins with the imports."""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"


# Forked from a server that has imported everything, processes start in a tenth of the time.
FORK_SERVER = mp.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["torch", "bn_detection", "bn_detection.engine"])


_OUTPUTS = ("stdout", "stderr")


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


def run_script(
    path: str | Path, *arguments: object, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, path, *arguments])``, or of ``-m``, with one thread.

    Only starts differ: the process is forked where the imports are done, and so are, from it, the
    workers that it has torch's agent start.

    Raises:
        subprocess.TimeoutExpired: it, and all that it started, is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = start_script(path, *arguments, output=folder)
        process.join(timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(path), timeout)
        texts = [Path(folder, name).read_text() for name in _OUTPUTS]
    return subprocess.CompletedProcess([str(path), *arguments], process.exitcode, *texts)


def start_script(path: str | Path, *arguments: object, output: str | Path) -> ForkServerProcess:
    """Start what :func:`run_script` runs; its files ``stdout`` and ``stderr`` are in ``output``."""
    argv = [str(path), *map(str, arguments)]
    files = [Path(output, name) for name in _OUTPUTS]
    process = FORK_SERVER.Process(target=_run_script, args=(argv, os.getcwd(), files))
    process.start()
    return process


def _run_script(argv: list[str], folder: str, files: list[Path]) -> None:
    os.setsid()
    os.chdir(folder)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    subprocess_handler.Popen = _ForkedPython
    try:
        _be_python(argv)
    except KeyboardInterrupt:
        # One that nobody handles ends Python by the signal itself.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


class _ForkedPython(subprocess.Popen[bytes]):
    """``Popen`` of this Python in a session of its own, forked instead of started."""

    def _execute_child(self, args: tuple[str, ...], *others: object) -> None:
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        status: object = 1
        try:
            os.setsid()
            atexit._clear()  # as it removes the files of the parent
            for signum in signal.valid_signals():
                if callable(signal.getsignal(signum)):
                    signal.signal(signum, signal.SIG_DFL)
            os.environ.update(others[5])
            _be_python([arg for arg in args[1:] if arg != "-u"])
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status if isinstance(status, int) else status is not None)


def _be_python(argv: list[str]) -> None:
    """As Python with these arguments, of which the first is ``-c``, ``-m`` or a file."""
    kind, *arguments = argv
    if kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(arguments[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")
