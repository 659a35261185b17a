#!/usr/bin/env python
"""Run a study: train its runs, evaluate each in several ways, and print the table.

What is done is never repeated: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bn_detection.config import ConfigError
from bn_detection.study.runner import run_study


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="such as configs/studies/population.yaml")
    parser.add_argument("--output-dir", type=Path, help="default: output/studies/NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the study's")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="overrides of every config; before --seeds"
    )
    args = parser.parse_intermixed_args()
    try:
        run_study(args.study, args.output_dir, seeds=args.seeds, overrides=args.opts)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
