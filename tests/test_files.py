"""Output files are whole or not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bn_detection import ConfigError
from bn_detection.files import FolderLock, make_folder, replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as file:
        file.write_text("old")
    assert path.read_text() == "old"
    with pytest.raises(OSError, match="No space"), replacing(path) as file:
        file.write_text("ne")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", "--output-dir a/b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output-dir x: the folder .*file/x cannot be made"):
        make_folder(tmp_path / "file" / "x", "--output-dir x")


def start(folder: Path, then: str) -> subprocess.Popen[bytes]:
    """Another process, which takes the lock of a folder."""
    code = f"""
import os, sys, time
from bn_detection.files import FolderLock
lock = FolderLock(sys.argv[1])
lock.take()
{then}
print("taken", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"taken\n"
    return process


def test_a_folder_is_one_processs_until_it_is_killed(tmp_path: Path) -> None:
    # A process that it forked, such as a data loader's, does not keep the folder.
    other = start(tmp_path, "if not os.fork(): time.sleep(3); os._exit(0)")
    lock = FolderLock(tmp_path)
    try:
        owner = f"process {other.pid} on {socket.gethostname()}"
        for _ in range(2):
            with pytest.raises(ConfigError, match=rf"works in {tmp_path} \({owner}\): wait for it"):
                lock.take()
        assert not lock.holds()
    finally:
        other.kill()
        other.wait()
    lock.take()
    assert lock.holds()
    assert lock.path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    lock.path.unlink()
    assert not lock.holds()
    lock.release()


def test_a_folder_that_is_left_can_be_taken(tmp_path: Path) -> None:
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    one.take()
    with pytest.raises(ConfigError, match="Another process works"):
        other.take()
    one.release()
    other.take()
    other.release()
