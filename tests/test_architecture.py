"""No room of the package imports from one above it, and none imports what it has no use for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import rooms
from rooms import PACKAGE, imported, room, rooms_imported

BELOW = {
    "": set(),  # the modules beside the rooms
    "install_detectron2": set(),
    "page": {""},
    "workers": {""},
    "norm": set(),
    "detectors": {"", "norm"},
    "heads": {"", "norm", "detectors"},
    "population": {"", "norm", "detectors", "heads"},
    "data": {""},
}
BELOW["leakage"] = {*BELOW} - {"install_detectron2", "workers"}
BELOW["instrument"] = {*BELOW["leakage"], "leakage"}
BELOW["engine"] = {*BELOW["instrument"], "instrument", "workers"}
BELOW["study"] = {*BELOW["engine"], "engine"}
BELOW["cli"] = {*BELOW}
"""What each room may import from."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - {"configs", "cli"} == set(BELOW) - {"", "cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_from_above(path: Path) -> None:
    if path.parent == PACKAGE and path.name in ("__init__.py", "__main__.py"):
        return  # the public surface, and the command
    assert rooms_imported(path) <= BELOW[room(path)]


def test_norm_knows_torch_alone() -> None:
    known = {*sys.stdlib_module_names, "torch", "triton", "bn_detection"}
    for path in (PACKAGE / "norm").rglob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= known, path


def test_what_runs_uses_no_library_of_tests() -> None:
    for path in MODULES:
        tests = {"unittest", "pytest", "hypothesis"}
        assert tests.isdisjoint(name.partition(".")[0] for name in imported(path)), path


def test_the_check_sees_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "norm"
    folder.mkdir()
    (tmp_path / "study").mkdir()
    file = folder / "wrong.py"
    file.write_text(
        "from ..study import report\nfrom ..config import x\nfrom .. import study\n"
        "def f():\n    import bn_detection.study.report\n    from . import layer\n"
    )
    monkeypatch.setattr(rooms, "PACKAGE", tmp_path)
    assert rooms_imported(file) == {"study", ""}


@pytest.mark.timeout(120)
def test_a_training_imports_no_library_of_figures_and_pages() -> None:
    code = "import sys, bn_detection.engine; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=110
    )
    assert {"matplotlib", "jinja2", "scipy.stats"}.isdisjoint(done.stdout.split())
