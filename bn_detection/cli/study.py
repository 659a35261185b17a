"""Run studies: train their runs, evaluate each in several ways, and report.

What is done is never repeated: the same command goes on after an interruption.
With --minutes it ends by itself, with a report of what there is and status 0.
With Slurm: --executor slurm --slurm partition=gpu gpus_per_node=8 timeout_min=2880
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import takewhile
from pathlib import Path

from ..command_line import add_common_flags
from ..config import ConfigError
from ..shipped import SHIPPED, find_shipped

EXAMPLE = """\
bn-detection study studies/leakage.yaml --dry-run
  bn-detection study studies --minutes 60"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "study",
        help="a file, or a folder for all its .yaml files; also by the name of one of "
        "bn_detection's: studies/population.yaml, studies",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="default: output/studies/NAME; of several studies, the parent of a folder for each",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the study's")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="tasks at once; default: as many as there are cores, or GPUs, for the workers of "
        "each; more share the GPUs; with Slurm, all",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="end after so long: start nothing that is not expected to be done by then, and end "
        "what runs, to go on the next time",
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
        metavar="STUDY | KEY VALUE",
        help="more studies; then overrides of every config; all before --seeds and --slurm",
    )


def run(args: argparse.Namespace) -> None:
    """Run it, and watch it."""
    more = list(takewhile(_is_study, args.opts))
    studies = dict.fromkeys(path for name in (args.study, *more) for path in _find(name))
    from ..study.runner import run_studies

    try:
        run_studies(
            [*studies],
            args.output_dir,
            seeds=args.seeds,
            overrides=args.opts[len(more) :],
            jobs=args.jobs,
            executor=args.executor,
            slurm=args.slurm,
            minutes=args.minutes,
            dry_run=args.dry_run,
            imports=args.imports,
        )
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def _is_study(word: str) -> bool:
    """Whether a word is no key of an override."""
    return word.endswith((".yaml", ".yml")) or os.path.isdir(word) or _shipped_folder(word).is_dir()


def _find(name: str) -> list[Path]:
    """The study files that a word of the command line names."""
    if os.path.isfile(name):
        return [Path(name)]
    if found := find_shipped(name):
        return [found]
    folder = Path(name) if os.path.isdir(name) else _shipped_folder(name)
    if not folder.is_dir():
        raise ConfigError(f"{name}: there is no such file or folder, and none in {SHIPPED}.")
    if not (files := sorted(folder.glob("*.yaml"))):
        raise ConfigError(f"{folder} has no .yaml file; give a study, or a folder of studies.")
    return files


def _shipped_folder(name: str) -> Path:
    return SHIPPED / name.removeprefix("configs/").rstrip("/")
