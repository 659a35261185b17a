"""Runs studies from their files."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import ConfigError
from ..files import FolderLock
from .durations import Budget, Durations
from .executors import EXECUTORS, Executor, LocalExecutor, SlurmExecutor, is_done, parse_slurm
from .folder import check_folder, claimed
from .matrix import Failure, Plan, Task, plan
from .report import write_report
from .scheduler import execute
from .study_file import TAKEN, Overrides, Study, read_study


class _Planned(NamedTuple):
    """A study, its folder, its tasks, and what runs them."""

    study: Study
    folder: Path
    plan: Plan
    executor: Executor


def run_studies(
    paths: Sequence[Path],
    folder: Path | None = None,
    *,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    executor: str = "local",
    slurm: Sequence[str] = (),
    minutes: float | None = None,
    dry_run: bool = False,
    imports: Sequence[str] = (),
) -> list[Path]:
    """Run what is missing of studies, one after another, and write the report of each.

    Args:
        paths: the study files.
        folder: for everything that is made, except datasets; of several studies, the parent of a
            folder for each. By default ``output/studies/<stem of the file>``.
        seeds: instead of those of the files.
        overrides: ``KEY VALUE`` pairs for every command, after those of the file.
        jobs: tasks at once; by default as many as there are cores (GPUs, where the study uses
            them) for the workers of each, and with Slurm all that can run.
        executor: "local": processes of this machine; or "slurm": jobs of Slurm.
        slurm: ``KEY=VALUE`` parameters of the jobs.
        minutes: after which what runs is ended, to go on the next time; nothing starts that cannot
            be expected to end before. None for as long as it takes.
        dry_run: only check everything, a step of each run included, and list the tasks.
        imports: modules that every command imports first.

    Returns:
        The paths of ``results.json``, of studies with a result; none for a dry run.

    Raises:
        ConfigError: a study cannot be run as it is, or a folder is of another one.
        RuntimeError: commands failed; raised at the end, after everything else has been done. The
            disk is full, or a folder was removed: raised at once.
    """
    start = time.monotonic()
    budget = _budget(minutes, executor)
    options = _options(overrides)
    studies = [_with_seeds(read_study(path), seeds) for path in paths]
    all_planned = []
    for study, place in zip(studies, _folders(studies, folder), strict=True):
        planned = plan(study, place, options, imports, steps=dry_run)
        runs_tasks = _executor(study, planned, place, jobs, executor, slurm)
        all_planned.append(_Planned(study, place, planned, runs_tasks))
    if dry_run:
        for study, place, planned, runs_tasks in all_planned:
            check_folder(place, study, options, planned.configs)
            if len(studies) > 1:
                print(f"{study.name}:")
            _list_tasks(planned.tasks, runs_tasks)
        return []
    outcomes = []
    with _sigterm_ends(), ExitStack() as stack:
        # All at once: nobody else may take a folder whose turn comes in an hour.
        locks = [
            stack.enter_context(claimed(place, study, options, planned.configs))
            for study, place, planned, _ in all_planned
        ]
        for each, lock in zip(all_planned, locks, strict=True):
            outcomes.append(_run(each, lock, budget))
    numbers = [outcome.numbers for outcome in outcomes if outcome.numbers]
    if minutes is not None and any(map(_left, all_planned)):
        _say_left(all_planned, minutes)
    if failed := [task for outcome in outcomes for task in outcome.failed]:
        failures = [failure for outcome in outcomes for failure in outcome.failures]
        logs = "".join(f"\n  {failure.title}: see {failure.log}" for failure in failures)
        number = sum(len(each.plan.tasks) for each in all_planned)
        raise RuntimeError(f"{len(failed)} of {number} tasks are not done.{logs}")
    if not any(map(_left, all_planned)):
        where = numbers[0] if len(numbers) == 1 else "".join(f"\n  {path}" for path in numbers)
        print(f"\nDone in {time.monotonic() - start:.0f} s. Numbers: {where}")
    return numbers


class _Outcome(NamedTuple):
    """What of a study failed or was left out, what of it has a log, and the results.json."""

    failed: list[Task]
    failures: list[Failure]
    numbers: Path | None


def _run(planned: _Planned, lock: FolderLock, budget: Budget | None) -> _Outcome:
    study, folder, (tasks, results, _), executor = planned
    print(f"{study.name}: {study.about}\n", flush=True)
    failed = execute(tasks, executor, lock, budget=budget)
    done = {cell: path for cell, (task, path) in results.items() if is_done(task)}
    # Those that were left out for what they need have no log.
    failures = [Failure(task.title, task.log) for task in failed if task.needs not in failed]
    numbers = write_report(study, done, folder, failures) if done else None
    return _Outcome(failed, failures, numbers)


def _left(planned: _Planned) -> list[Task]:
    return [task for task in planned.plan.tasks if not is_done(task)]


def _say_left(all_planned: Sequence[_Planned], minutes: float) -> None:
    """Say what there was no time for: study by study, and on the last line in all."""
    states = []
    all_done = [task for each in all_planned for task in each.plan.tasks if is_done(task)]
    number = number_left = unknown = 0
    minutes_left = 0.0
    for each in all_planned:
        tasks, left = each.plan.tasks, _left(each)
        durations = Durations(task for task in tasks if task not in left)
        of_study, unknown_of_study = durations.minutes_left(
            left, each.executor.jobs, others=Durations(all_done)
        )
        minutes_left, unknown = minutes_left + of_study, unknown + unknown_of_study
        number, number_left = number + len(tasks), number_left + len(left)
        nothing = ", nothing yet" if len(left) == len(tasks) else ""
        states.append(f"{each.study.name} {len(tasks) - len(left)} of {len(tasks)}{nothing}")
    print(f"\nStopped by --minutes {minutes:g}. Tasks done: {'; '.join(states)}.")
    parts = [f"about {max(minutes_left, 1):.0f} min"] if unknown < number_left else []
    parts += [f"{unknown:,} tasks whose time is not known yet"] if unknown else []
    print(
        f"{number - number_left:,} of {number:,} tasks are done; {' and '.join(parts)} are left to "
        "do. The same command goes on.",
        flush=True,
    )


def _budget(minutes: float | None, executor: str) -> Budget | None:
    if minutes is None:
        return None
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: give a number above 0.")
    if executor != "local":
        raise ConfigError(
            f"--minutes {minutes:g} with --executor {executor}: jobs wait in a queue, and go on "
            "without this command. Leave --minutes out, and give the time of a job: --slurm "
            "timeout_min=MINUTES."
        )
    return Budget(minutes)


def _with_seeds(study: Study, seeds: Sequence[int]) -> Study:
    if not seeds:
        return study
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {min(seeds)}: a seed is a whole number from 0.")
    return dataclasses.replace(study, seeds=tuple(dict.fromkeys(seeds)))


def _folders(studies: Sequence[Study], folder: Path | None) -> list[Path]:
    if folder and len(studies) == 1:
        return [folder]
    by_name: dict[str, Study] = {}
    for study in studies:
        if study.name in by_name:
            raise ConfigError(
                f"{by_name[study.name].path} and {study.path} have one name, and so one folder. "
                "Run them by two commands, each with an --output-dir."
            )
        by_name[study.name] = study
    return [(folder or Path("output", "studies")) / study.name for study in studies]


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
