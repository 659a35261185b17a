"""Runs a study from its file."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..config import ConfigError
from .executors import EXECUTORS, Executor, LocalExecutor, SlurmExecutor, is_done, parse_slurm
from .folder import check_folder, claimed
from .matrix import Failure, Plan, Task, plan
from .report import write_report
from .scheduler import execute
from .study_file import TAKEN, Overrides, Study, read_study


def run_study(
    path: Path,
    folder: Path | None = None,
    *,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    executor: str = "local",
    slurm: Sequence[str] = (),
    dry_run: bool = False,
    imports: Sequence[str] = (),
) -> Path | None:
    """Run what is missing of a study, and write its report.

    Args:
        path: the study file.
        folder: for everything that is made, except datasets; by default
            ``output/studies/<stem of the file>``.
        seeds: instead of those of the file.
        overrides: ``KEY VALUE`` pairs for every command, after those of the file.
        jobs: tasks at once; by default as many as there are cores (GPUs, where the study uses
            them) for the workers of each, and with Slurm all that can run.
        executor: "local": processes of this machine; or "slurm": jobs of Slurm.
        slurm: ``KEY=VALUE`` parameters of the jobs.
        dry_run: only check everything, a step of each run included, and list the tasks.
        imports: modules that every command imports first.

    Returns:
        The path of ``results.json``; None for a dry run.

    Raises:
        ConfigError: the study cannot be run as it is, or the folder is of another one.
        RuntimeError: commands failed; raised at the end, after everything else has been done. The
            disk is full, or the folder was removed: raised at once.
    """
    start = time.monotonic()
    study = read_study(path)
    if seeds:
        if min(seeds) < 0:
            raise ConfigError(f"--seeds {min(seeds)}: a seed is a whole number from 0.")
        study = dataclasses.replace(study, seeds=tuple(dict.fromkeys(seeds)))
    folder = folder or Path("output", "studies", study.name)
    options = _options(overrides)
    planned = plan(study, folder, options, imports, steps=dry_run)
    runs_tasks = _executor(study, planned, folder, jobs, executor, slurm)
    if dry_run:
        check_folder(folder, study, options, planned.configs)
        _list_tasks(planned.tasks, runs_tasks)
        return None
    with _sigterm_ends(), claimed(folder, study, options, planned.configs) as lock:
        print(f"{study.name}: {study.about}\n", flush=True)
        failed = execute(planned.tasks, runs_tasks, lock)
        done = {cell: path for cell, (task, path) in planned.results.items() if task not in failed}
        # Those that were left out for what they need have no log.
        failures = [Failure(task.title, task.log) for task in failed if task.needs not in failed]
        numbers = write_report(study, done, folder, failures) if done else None
    if failed:
        logs = [f"\n  {failure.title}: see {failure.log}" for failure in failures]
        number = len(planned.tasks)
        raise RuntimeError(f"{len(failed)} of {number} tasks are not done.{''.join(logs)}")
    print(f"\nDone in {time.monotonic() - start:.0f} s. Numbers: {numbers}")
    return numbers


def _options(overrides: Sequence[str]) -> Overrides:
    if len(overrides) % 2:
        raise ConfigError(f"KEY VALUE overrides: {overrides[-1]} has no value.")
    options = dict(zip(overrides[::2], overrides[1::2], strict=True))
    for key in options.keys() & {*TAKEN, "MODEL.WEIGHTS"}:
        raise ConfigError(f"KEY VALUE overrides: {key} is chosen by the runner; leave it out.")
    return options


def _executor(
    study: Study,
    planned: Plan,
    folder: Path,
    jobs: int | None,
    name: str,
    slurm: Sequence[str],
) -> Executor:
    if name not in EXECUTORS:
        raise ConfigError(f"--executor {name}: there are {', '.join(EXECUTORS)}.")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1 is needed.")
    if slurm and name != "slurm":
        raise ConfigError(f"--slurm {' '.join(slurm)}: give --executor slurm too.")
    workers = max(study.workers, *(e.workers for e in study.evaluations.values()))
    devices = {torch.device(cfg.MODEL.DEVICE).type for cfg in planned.configs.values()}
    device = "cuda" if "cuda" in devices else "cpu"
    if name == "slurm":
        parameters = parse_slurm(slurm)
        return SlurmExecutor(folder, jobs, workers=workers, device=device, parameters=parameters)
    return LocalExecutor(jobs, workers=workers, device=device, folder=folder)


def _list_tasks(tasks: Sequence[Task], executor: Executor) -> None:
    """What is done, what runs, and what is missing."""
    # In this order: a job that ends meanwhile is done.
    states = executor.find(tasks)
    done = {task: "done" for task in tasks if is_done(task)}
    states |= done
    for number, task in enumerate(tasks, 1):
        print(f"[{number} of {len(tasks)}] {task.title}: {states.get(task, 'missing')}")
    print(f"\n{len(done)} of {len(tasks)} tasks are done. Nothing was run.")


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """SIGTERM is an exception, so that what runs is ended as it is by Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
