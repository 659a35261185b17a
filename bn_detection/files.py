"""Output files that are whole or not there, in folders that can be written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import ConfigError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Args:
        path: of the file; replaced if it is there, once the context ends without an exception.

    Yields:
        The path to write to.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder for outputs, with its parents, if it is not there.

    Args:
        folder: its path.
        flag: that asks for it, with its value, for errors.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag}: the folder {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{flag}: the folder {folder} cannot be written to.")
