"""Trainings that are resumed after half: the bits of those that were not interrupted."""

from __future__ import annotations

import traceback
from pathlib import Path

import test_resume
from distributed import run_workers
from training import different

from .counting import HANG, OTHER, TRACEBACK, WORKS, Tally, own_state
from .running import DATA

PART = "resumed after half"
OTHER_LOADERS = "other loaders"
"""A training that is resumed with another number of processes that load."""
ONE_WORKER = (*sorted(test_resume.VARIANTS.keys() - {"shuffle by features"}), OTHER_LOADERS)
SEVERAL_WORKERS = {2: tuple(sorted(test_resume.VARIANTS)), 3: ("random seed",)}


def run(variants: list[str], workers: int, material: Path, folder: Path, seconds: float) -> Tally:
    """Train each variant of ``tests/test_resume.py``, whole and in two parts.

    Args:
        variants: of :data:`ONE_WORKER` or :data:`SEVERAL_WORKERS`.
        workers: processes that train; one is this.
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        seconds: that each may take, if there are several workers.
    """
    tally = Tally(PART)
    for variant in variants:
        name, output = f"{variant}, {workers} workers", folder / f"{workers}"
        try:
            names = _compared(variant, workers, material / DATA, output, seconds)
        except TimeoutError as error:
            tally.add(name, HANG, str(error))
        except Exception:
            tally.add(name, TRACEBACK, traceback.format_exc())
        else:
            tally.add(name, OTHER if names else WORKS, f"other bits: {names[:5]}")
    return tally


def _compared(variant: str, workers: int, data: Path, output: Path, seconds: float) -> list[str]:
    if workers > 1:
        arguments = (str(data), str(output), (variant,))
        found = run_workers(test_resume._workers, workers, *arguments, timeout=seconds)
        return [name for of_worker in found for name in of_worker[0]]
    with own_state():
        if variant == OTHER_LOADERS:
            then, at_all = ("DATALOADER.NUM_WORKERS", 0), ("DATALOADER.NUM_WORKERS", 2)
            pair = test_resume.both(data, output / variant, "bn", *then, at_all=at_all)
        else:
            pair = test_resume.both(data, output / variant, variant)
    return different(*pair[::-1])
