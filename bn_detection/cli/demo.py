"""The leak in one table and one figure, on the embedded dataset: minutes on two CPU cores.

It trains and evaluates a BN and a ShuffleBN Mask R-CNN. What is done is not done again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = "bn-detection demo --output-dir output/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--output-dir", type=Path, default=Path("output/demo"), help="default: output/demo"
    )
    parser.add_argument(
        "--num-gpus", type=int, default=2, metavar="WORKERS", help="CPU workers; default: 2"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of both configs")


def run(args: argparse.Namespace) -> None:
    """Run what is missing of it."""
    from ..study.demo import run_demo

    try:
        run_demo(args.output_dir, workers=args.num_gpus, overrides=args.opts)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
