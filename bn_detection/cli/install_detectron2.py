"""Install Detectron2 v0.6 without a compiler, as a pure-Python wheel.

A Detectron2 that is already installed, of whatever version, is kept as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = "bn-detection install-detectron2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="keep the wheel in DIR; it is built even if a detectron2 is installed",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="use this source archive, pb1-detectron2-0.6.tar.gz, instead of fetching it",
    )


def run(args: argparse.Namespace) -> int:
    """Install it, or keep what is there."""
    from ..install_detectron2.install import InstallError, install

    try:
        install(args.archive, args.wheel_dir)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
