"""Runs one command of a study, with its output in a file, and records its success.

A program of its own, which needs the standard library alone: it is there within milliseconds, on
every machine that sees the folder, and ends what it runs when whoever started it is gone.

    python process.py '{"command": [...], "record": "training.json", "log": "training.log", ...}'
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_NOTE_SECONDS = 30.0


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is either whole or not there.

    Args:
        path: replaced if it is there.
        content: what JSON can hold.

    Raises:
        OSError: it cannot be written, such as on a full disk; what was there before is as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def run_and_record(
    command: Sequence[str],
    log: Path,
    record: Path,
    leftovers: Sequence[Path] = (),
    *,
    keep: Sequence[int] = (),
) -> int:
    """Run a command to its end; SIGTERM is passed on to it.

    Args:
        command: the program and its arguments. It gets one thread, unless OMP_NUM_THREADS says
            otherwise: results do not depend on what else runs, nor on the number of cores.
        log: file for its output, replaced if it is there; its folder is made.
        record: JSON file that is there once it has succeeded, with the seconds that it took,
            those of earlier attempts included.
        leftovers: files and folders of an earlier attempt, removed first.
        keep: file descriptors that it keeps open.

    Returns:
        Its exit status; 128 and the number of the signal that ended it.
    """
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    noted = record.with_suffix(".seconds")
    start = time.monotonic() - (json.loads(noted.read_text()) if noted.exists() else 0.0)
    this = os.getpid()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            pass_fds=keep,
            # One thread only here, so that nothing can be locked in the child.
            preexec_fn=lambda: _end_with(this),
        )
    signal.signal(signal.SIGTERM, lambda signum, _: process.send_signal(signum))
    status = None
    while status is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(_NOTE_SECONDS)
        seconds = round(time.monotonic() - start, 1)
        # For the next attempt, also if this is killed.
        with contextlib.suppress(OSError):
            write_json(noted, seconds)
    if status == 0:
        write_json(record, {"command": list(command), "seconds": seconds})
        noted.unlink(missing_ok=True)
    return status if status >= 0 else 128 - status


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends, in any way. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _main() -> int:
    task = json.loads(sys.argv[1])
    if (parent := task.pop("parent")) is not None:
        _end_with(parent)
    task |= {name: Path(task[name]) for name in ("log", "record")}
    task["leftovers"] = [Path(path) for path in task["leftovers"]]
    try:
        return run_and_record(**task)
    except OSError as error:
        # On a full disk the exit status alone says why.
        with contextlib.suppress(OSError), task["log"].open("a") as file:
            file.write(f"error: {error}\n")
        return errno.ENOSPC if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1


if __name__ == "__main__":
    sys.exit(_main())
