"""Output files that are whole or not there, in folders that can be written to."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from .config import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LITTLE = 1 << 20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Args:
        path: of the file; replaced if it is there, once the context ends without an exception.

    Yields:
        The path to write to.

    Raises:
        OSError: with ``path`` as its file name, where the disk is full, whatever the writer raised.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except Exception as error:
        # torch says "unexpected pos". What is written of the file still takes its place.
        if is_full(error, path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def is_full(error: BaseException, folder: str | os.PathLike[str]) -> bool:
    """Whether an error of writing to a folder is that of a full disk or of a quota.

    Args:
        error: what the writer raised; of an OSError its number tells, of another the disk itself.
        folder: written to.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno in _FULL
    try:
        return shutil.disk_usage(folder).free < _LITTLE
    except OSError:
        return False


@contextmanager
def naming_full_disks() -> Iterator[None]:
    """Turn the error of a full disk into one line.

    Raises:
        ConfigError: names the file, where it is known, and what is whole.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ConfigError(
            f"{_written(error) or _open_file() or 'a file'} cannot be written: "
            f"{error.strerror}. What was saved "
            "before is whole; make room and go on with --resume, or run the same command again."
        ) from error


def _written(error: BaseException | None) -> str | None:
    """The file of the first error that led to this one: closing files fails after it."""
    names = []
    while error is not None:
        names += [error.filename] if isinstance(error, OSError) and error.filename else []
        error = error.__context__
    return names[-1] if names else None


def _open_file() -> str | None:
    """A file open for writing on a disk that is full: a log's writer does not name its own."""
    for file in psutil.Process().open_files():
        if file.mode != "r" and is_full(RuntimeError(), os.path.dirname(file.path)):
            return str(file.path)
    return None


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder for outputs, with its parents, if it is not there.

    Args:
        folder: its path.
        flag: that asks for it, with its value, for errors.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{flag!a}: the name of the folder is no text in UTF-8.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag}: the folder {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{flag}: the folder {folder} cannot be written to.")


class FolderLock:
    """Keeps a folder for this process; others are refused by :meth:`take`.

    The system frees it when the process ends, in whatever way. Processes that this one forks do not
    keep it.

    Args:
        folder: that is there.

    Attributes:
        path: of the lock's file, which stays.
    """

    FILE_NAME = ".lock"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder, self.FILE_NAME)
        self._file: IO[str] | None = None

    @property
    def descriptor(self) -> int:
        """Of the open file; a program that keeps it open keeps the folder too."""
        return self._file.fileno()

    def take(self) -> None:
        """Take the folder.

        Raises:
            ConfigError: another process has it; the message has its host and number.
        """
        # Not emptied when it is opened: it says who works there.
        file = self.path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "one that has just begun"
            file.close()
            raise ConfigError(
                f"Another process works in {self.path.parent} ({owner}): wait for it, or end it "
                "first."
            ) from None
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        self._file = file
        _locks.add(self)

    def holds(self) -> bool:
        """Whether the folder is still this process's, and was not removed, or made anew."""
        try:
            return self._file is not None and os.path.samestat(
                os.stat(self.path), os.fstat(self.descriptor)
            )
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Leave the folder to others."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _locks.discard(self)


_locks: set[FolderLock] = set()


def _close_in_child() -> None:
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
