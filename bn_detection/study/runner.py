"""Runs a study from its file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from ..config import ConfigError
from .folder import claimed
from .matrix import execute, plan
from .study_file import TAKEN, read_study
from .summary import summarize


def run_study(
    path: Path,
    folder: Path | None = None,
    *,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> Path:
    """Run what is missing of a study; print its table, and write its results and its figure.

    Args:
        path: the study file.
        folder: for everything that is made, except datasets; by default
            ``output/studies/<stem of the file>``.
        seeds: instead of those of the file.
        overrides: ``KEY VALUE`` pairs for every command, after those of the file.

    Returns:
        The path of ``results.json``.

    Raises:
        ConfigError: the study cannot be run as it is, or the folder is of another one.
        RuntimeError: commands failed; raised at the end, after everything else has been done.
    """
    start = time.monotonic()
    study = read_study(path)
    if seeds:
        study = dataclasses.replace(study, seeds=tuple(dict.fromkeys(seeds)))
    folder = folder or Path("output", "studies", study.name)
    if len(overrides) % 2:
        raise ConfigError(f"KEY VALUE overrides: {overrides[-1]} has no value.")
    options = dict(zip(overrides[::2], overrides[1::2], strict=True))
    for key in options.keys() & {*TAKEN, "MODEL.WEIGHTS"}:
        raise ConfigError(f"KEY VALUE overrides: {key} is chosen by the runner; leave it out.")
    tasks, results = plan(study, folder, options)
    with claimed(folder, study, options) as descriptor:
        print(f"{study.name}: {study.about}\n", flush=True)
        failed = execute(tasks, pass_fds=(descriptor,))
        done = {cell: path for cell, (task, path) in results.items() if task not in failed}
        numbers = summarize(study, done, folder)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Numbers: {numbers}")
    if failed:
        logs = [f"\n  {task.title}: see {task.log}" for task in failed if task.log.exists()]
        raise RuntimeError(f"{len(failed)} of {len(tasks)} tasks are not done.{''.join(logs)}")
    return numbers
