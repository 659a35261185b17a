"""Output files are whole or not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tooling import QUICKSTART, run_tool

from bn_detection import ConfigError
from bn_detection.files import FolderLock, make_folder, naming_full_disks, replacing


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


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_is_named_with_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    path = tmp_path / "model.pth"
    with pytest.raises(ConfigError) as raised, naming_full_disks(), replacing(path):
        raise error
    message = str(raised.value)
    for words in (str(tmp_path / "model.pth"), "No space left", "whole"):
        assert words in message
    assert "\n" not in message


def test_the_file_is_that_which_failed_first(tmp_path: Path) -> None:
    def close() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"model.pth cannot be written"), naming_full_disks():
        try:
            raise OSError(28, "No space left on device", "model.pth")
        finally:
            close()


def test_a_log_without_a_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(free=0)
    room = SimpleNamespace(free=1 << 30)
    in_tmp = lambda folder: full if str(folder) == str(tmp_path) else room  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", in_tmp)
    with (
        open(tmp_path / "metrics.json", "w"),
        pytest.raises(ConfigError, match=rf"{tmp_path}/metrics.json cannot be written: No space"),
        naming_full_disks(),
    ):
        raise OSError(28, "No space left on device")


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("other"), PermissionError(13, "denied"), ValueError("other")):
        raised = pytest.raises(type(error), match=r"other|denied")
        with raised, naming_full_disks(), replacing(tmp_path / "file"):
            raise error


@pytest.mark.parametrize("name", ["\udcff", "a\0b", "x" * 300])
def test_a_name_that_no_folder_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make_folder(tmp_path / name, "OUTPUT_DIR")


def test_an_output_folder_that_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = ("--config-file", QUICKSTART / "mask_rcnn_bn.yaml")
    for folder in ("", tmp_path / "file", tmp_path / "file" / "below", tmp_path / "\udcff"):
        for flags in ((), ("--eval-only",)):
            ended = run_tool("train_net", *config, *flags, "OUTPUT_DIR", folder)
            assert ended.status == 2
            assert "OUTPUT_DIR" in ended.error and "\n" not in ended.error


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
    forks = "if not os.fork(): os.write(end, b'x'); time.sleep(3); os._exit(0)"
    other = start(tmp_path, f"begin, end = os.pipe()\n{forks}\nos.read(begin, 1)")
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
