"""Output files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bn_detection import ConfigError
from bn_detection.files import make_folder, replacing


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
