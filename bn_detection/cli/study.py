"""Run a study: train its runs, evaluate each in several ways, and report.

What is done is never repeated: the same command goes on after an interruption.
With Slurm: --executor slurm --slurm partition=gpu gpus_per_node=8 timeout_min=2880
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..command_line import add_common_flags
from ..config import ConfigError
from ..shipped import SHIPPED, find_shipped

EXAMPLE = "bn-detection study studies/leakage.yaml --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "study", help="a file, or the name of one of bn_detection's: studies/population.yaml"
    )
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
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="where tasks run; default: local",
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


def run(args: argparse.Namespace) -> None:
    """Run it, and watch it."""
    study = args.study if os.path.isfile(args.study) else find_shipped(args.study)
    if study is None:
        raise ConfigError(f"{args.study}: there is no such file, and none in {SHIPPED}.")
    from ..study.runner import run_study

    try:
        run_study(
            Path(study),
            args.output_dir,
            seeds=args.seeds,
            overrides=args.opts,
            jobs=args.jobs,
            executor=args.executor,
            slurm=args.slurm,
            dry_run=args.dry_run,
            imports=args.imports,
        )
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
