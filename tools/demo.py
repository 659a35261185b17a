#!/usr/bin/env python
"""The leak in one table and one figure, on the embedded dataset: minutes on two CPU cores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bn_detection.study.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("output/demo"))
    parser.add_argument("--num-gpus", type=int, default=2, metavar="WORKERS", help="CPU workers")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of both configs")
    args = parser.parse_args()
    try:
        run_demo(args.output_dir, workers=args.num_gpus, overrides=args.opts)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
