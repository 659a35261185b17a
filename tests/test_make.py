"""What the Makefile does about an environment that is half made; nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP_IS_MISSING = """\
#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in "-m pip"*) exit 1;; esac
"""
# As Debian's python3 without python3-venv: it leaves an environment without pip.
PYTHON = """\
#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in
"-m venv"*)
    mkdir -p "$3/bin"
    cp "{new}" "$3/bin/python"
    cp "{new}" "$3/bin/bn-detection"
    [ -e "{whole}" ] ;;
*) exec {python} "$@" ;;
esac
"""
WHOLE = '#!/bin/sh\necho "$0 $*" >> "{log}"\n'


@pytest.fixture
def script(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        values = {name: tmp_path / name for name in ("log", "new", "whole")}
        path = tmp_path / name
        path.write_text(text.format(python=sys.executable, **values))
        path.chmod(0o755)
        return path

    return write


def install(folder: Path) -> tuple[int, str, list[str]]:
    """The status, the errors, and what was started."""
    log = folder / "log"
    log.write_text("")
    command = ["make", "-C", str(ROOT), "install", f"PYTHON={folder}/python", f"VENV={folder}/venv"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    started = log.read_text().replace(f"{folder}/", "").splitlines()
    return done.returncode, done.stderr, started


def test_a_half_made_environment_is_named_and_made_anew(tmp_path: Path, script) -> None:
    script("python", PYTHON)
    script("new", PIP_IS_MISSING)
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    for _ in range(2):
        status, error, started = install(tmp_path)
        assert status != 0
        assert f"apt install {package}" in error
        assert not any("pip install" in line for line in started)
        assert (tmp_path / "venv/bin/python").exists()
        assert not (tmp_path / "venv/.bn_detection").exists()

    # Once python3-venv is there.
    script("new", WHOLE)
    script("whole", "")
    status, error, started = install(tmp_path)
    assert status == 0, error
    assert "python -m venv venv" in [line.replace(f"{tmp_path}/", "") for line in started]
    assert sum("venv/bin/python -m pip install" in line for line in started) == 2
    assert "venv/bin/bn-detection install-detectron2" in started
    assert install(tmp_path) == (0, "", [])  # all is there


def test_an_environment_that_has_pip_is_kept(tmp_path: Path, script) -> None:
    script("python", PYTHON)
    (tmp_path / "venv/bin").mkdir(parents=True)
    for name in ("python", "bn-detection"):
        script("venv/bin/" + name, WHOLE)
    status, error, started = install(tmp_path)
    assert status == 0, error
    assert not any("-m venv" in line for line in started)
