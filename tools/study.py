#!/usr/bin/env python
"""Run a study: train its runs, evaluate each in several ways, and report.

python tools/study.py configs/studies/leakage.yaml
python tools/study.py configs/studies/leakage.yaml --dry-run
python tools/study.py configs/studies/coco/leakage.yaml --executor slurm \\
    --slurm partition=gpu gpus_per_node=8 timeout_min=2880

What is done is never repeated: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from bn_detection.config import ConfigError
from bn_detection.engine import add_common_flags
from bn_detection.study.executors import EXECUTORS
from bn_detection.study.runner import run_study


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="such as configs/studies/population.yaml")
    parser.add_argument("--output-dir", type=Path, help="default: output/studies/NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the study's")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="tasks at once; default: as many as there are cores, or GPUs, for the workers of "
        "each; with Slurm, all",
    )
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="local", help="where tasks run; default: local"
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit, such as partition=gpu gpus_per_node=8 timeout_min=2880",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list the tasks, no more"
    )
    add_common_flags(parser)
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="overrides of every config; before --seeds and --slurm",
    )
    args = parser.parse_intermixed_args()
    try:
        run_study(
            args.study,
            args.output_dir,
            seeds=args.seeds,
            overrides=args.opts,
            jobs=args.jobs,
            executor=args.executor,
            slurm=args.slurm,
            dry_run=args.dry_run,
            imports=args.imports,
        )
    except ConfigError as error:
        if args.traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
