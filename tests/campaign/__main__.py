"""Try many inputs on the tools, and count what came of each, part by part.

make campaign
PYTHONPATH=tests python -m campaign --parts kills resume --seed 1

The exit status is 1 if a promise of docs/reliability.md was broken; each such input is named.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from . import configs, datasets, files, kills, resume
from .counting import OTHER, Tally, table
from .running import make_material, prepare_process

PARTS = ("configs", "datasets", "files", "resume", "kills")
_CONFIGS, _RANDOM_DATASETS, _KILLS = 600, 40, 20
_AT_ONCE = 2
_CHUNK = 50
_Item = TypeVar("_Item")


class Job(NamedTuple):
    """Inputs that one process tries.

    Attributes:
        part: for the table.
        run: returns a tally.
        arguments: of it.
    """

    part: str
    run: Callable[..., Tally]
    arguments: tuple[object, ...]


def jobs(part: str, seed: int, material: Path, folder: Path, seconds: float) -> Iterator[Job]:
    """The inputs of a part that one process can try.

    Args:
        part: one of :data:`PARTS`.
        seed: of the campaign.
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        seconds: that an input may take.
    """
    rest = (material, folder, seconds)
    if part == "configs":
        for numbers in _chunks(range(_CONFIGS)):
            yield Job(configs.PART, configs.run, (seed, numbers[0], numbers[-1] + 1, *rest))
    elif part == "datasets":
        names = [name for name, _ in datasets.cases(_RANDOM_DATASETS)]
        for chosen in _chunks([(tool, name) for name in names for tool in datasets.TOOLS]):
            yield Job(datasets.PART, datasets.run, (seed, chosen, _RANDOM_DATASETS, *rest))
    elif part == "files":
        for number, chosen in enumerate(_chunks([p.name for p in files.places(material)])):
            own = folder / str(number)
            own.mkdir()
            yield Job(files.PART, files.run, (chosen, material, own, seconds))
    elif part == "resume":
        for variants in _chunks(resume.ONE_WORKER, 3):
            yield Job(resume.PART, resume.run, (variants, 1, *rest))
    elif part == "kills":
        for number in range(_KILLS):
            yield Job(kills.PART, kills.run, (seed, [number], *rest))


def run_jobs(some: Sequence[Job]) -> list[Tally]:
    """Their tallies, of two processes; one that dies costs its job, and no other."""
    tallies, left = _run_in_pool(some, _AT_ONCE)
    for job in left:
        found, died = _run_in_pool([job], 1)
        tallies += found
        if died:
            tally = Tally(job.part)
            tally.add(str(job.arguments[:2]), OTHER, "the process that tried these died")
            tallies.append(tally)
    return tallies


def _run_in_pool(some: Sequence[Job], at_once: int) -> tuple[list[Tally], list[Job]]:
    """Tallies, and the jobs without one, because a process died."""
    tallies, left = [], []
    with ProcessPoolExecutor(at_once, get_context("spawn"), initializer=prepare_process) as pool:
        futures = {pool.submit(job.run, *job.arguments): job for job in some}
        for done, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            try:
                tallies.append(future.result())
            except BrokenProcessPool:
                left.append(job)
            print(f"{job.part}: {done} of {len(some)} jobs", file=sys.stderr, flush=True)
    return tallies, left


def _chunks(items: Sequence[_Item], size: int = _CHUNK) -> Iterator[list[_Item]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def run_part(part: str, seed: int, material: Path, folder: Path, seconds: float) -> list[Tally]:
    """Try all inputs of a part.

    Args:
        part: one of :data:`PARTS`.
        seed: of the campaign.
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        seconds: that an input may take; a training may take longer.
    """
    if part == "kills":
        seconds = max(120.0, 2 * seconds)
        for workers in (1, 2):
            kills.train_whole(material, folder, workers)
    tallies = run_jobs(list(jobs(part, seed, material, folder, seconds)))
    if part == "resume":
        for workers, variants in resume.SEVERAL_WORKERS.items():
            tallies.append(resume.run(list(variants), workers, material, folder, 5 * seconds))
    return tallies


def main() -> int:
    """Run the parts, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random; default: 0")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="that an input may take; default: 60"
    )
    args = parser.parse_args()
    # For the processes that are started.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    start = time.monotonic()
    tallies = []
    with tempfile.TemporaryDirectory(prefix="campaign_") as name:
        material = Path(name, "material")
        material.mkdir()
        make_material(material)
        for part in args.parts:
            folder = Path(name, part)
            folder.mkdir()
            first, *others = run_part(part, args.seed, material, folder, args.seconds)
            tallies.append(sum(others, first))
            print("\n\n".join([*tallies[-1].broken, ""]), end="", flush=True)
    broken = sum(len(tally.broken) for tally in tallies)
    minutes = (time.monotonic() - start) / 60
    print(f"Seed {args.seed}, {minutes:.1f} minutes. Inputs that broke a promise: {broken}.\n")
    print(table(tallies))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
