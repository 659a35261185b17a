"""Detectron2 v0.6 without a compiler, as a pure-Python wheel."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Install it; returns the exit status."""
    tool = Path(__file__).parents[2] / "tools" / "install_detectron2.py"
    return runpy.run_path(str(tool))["main"](argv)
