"""A study as a list of commands, each with a record of its success; what is done stays done."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from ..config import ConfigError
from ..engine import check_config, load_config
from ..engine.setup import evaluation_folder
from .folder import write_json
from .process import ROOT, TRAIN_NET, run_command
from .study_file import Evaluation, Overrides, Study

RECALIBRATE = ROOT / "tools" / "recalibrate.py"


class Cell(NamedTuple):
    """One result of a study: a run, trained with a seed, under one evaluation."""

    run: str
    evaluation: str
    seed: int


@dataclass(eq=False)
class Task:
    """A command of a study.

    Attributes:
        title: what it does, for people.
        kind: tasks of a kind take about as long as each other.
        command: the program and its arguments.
        record: JSON file that is there once the command has succeeded, with its seconds.
        needs: the task whose output it uses.
        leftovers: files of an interrupted attempt, which the command would not replace.
    """

    title: str
    kind: str
    command: list[str]
    record: Path
    needs: Task | None = None
    leftovers: tuple[Path, ...] = ()

    @property
    def log(self) -> Path:
        """The file with the command's output."""
        return self.record.with_suffix(".log")


def plan(
    study: Study, folder: Path, overrides: Overrides
) -> tuple[list[Task], dict[Cell, tuple[Task, Path]]]:
    """Plan a study seed by seed, each training before its evaluations.

    Args:
        study: the study.
        folder: for everything that is made, except datasets.
        overrides: for every command, after all others.

    Returns:
        The tasks, in the order in which they run; and the task that makes each cell, with the path
        of its ``results.json``.

    Raises:
        ConfigError: a config with its overrides cannot be used; the message names the study file,
            the run and the evaluation.
    """
    planner = _Planner(study, folder, overrides)
    for seed in study.seeds:
        for name in study.runs:
            planner.add_run(name, seed)
    return planner.tasks, planner.results


class _Planner:
    def __init__(self, study: Study, folder: Path, overrides: Overrides) -> None:
        self._study, self._folder, self._overrides = study, folder, overrides
        self.tasks: list[Task] = []
        self.results: dict[Cell, tuple[Task, Path]] = {}

    def add_run(self, name: str, seed: int) -> None:
        output = self._folder / name / f"seed_{seed}"
        workers = self._study.workers
        options = self._options(name, seed, {}, output)
        self._check(name, f"run {name}", options, workers, eval_only=False)
        training = self._add(
            f"{name}, seed {seed}: training",
            "training",
            self._command(TRAIN_NET, name, workers, options, "--resume"),
            output / "training.json",
        )
        for other, evaluation in self._study.evaluations.items():
            if name in evaluation.runs:
                cell = Cell(name, other, seed)
                self.results[cell] = self._add_evaluation(cell, evaluation, output, training)

    def _add_evaluation(
        self, cell: Cell, evaluation: Evaluation, output: Path, training: Task
    ) -> tuple[Task, Path]:
        if evaluation.is_of_training:
            return training, output / "inference" / "results.json"
        title = f"{cell.run}, seed {cell.seed}: {cell.evaluation}"
        where = f"run {cell.run}, evaluation {cell.evaluation}"
        place = output / "evaluations" / cell.evaluation
        weights, needs = output / "model_final.pth", training
        if evaluation.recalibrate is not None:
            options = self._options(cell.run, cell.seed, evaluation.recalibrate, place)
            self._check(cell.run, f"{where}, recalibrate", options, evaluation.workers)
            options["MODEL.WEIGHTS"], weights = weights, place / "recalibrated.pth"
            needs = self._add(
                f"{title}: recalibration",
                f"{cell.evaluation}: recalibration",
                self._command(
                    *(RECALIBRATE, cell.run, evaluation.workers, options),
                    *("--output", str(weights)),
                ),
                place / "recalibration.json",
                training,
                (weights, weights.with_suffix(".json")),
            )
        options = self._options(cell.run, cell.seed, evaluation.overrides, place)
        cfg = self._check(cell.run, where, options, evaluation.workers)
        cfg.MODEL.WEIGHTS = options["MODEL.WEIGHTS"] = str(weights)
        task = self._add(
            title,
            cell.evaluation,
            self._command(TRAIN_NET, cell.run, evaluation.workers, options, "--eval-only"),
            place / "evaluation.json",
            needs,
        )
        return task, Path(evaluation_folder(cfg, resume=False), "results.json")

    def _add(self, *fields: Any) -> Task:
        task = Task(*fields)
        self.tasks.append(task)
        return task

    def _options(self, run: str, seed: int, own: Overrides, output: Path) -> Overrides:
        common = {**self._study.overrides, **self._study.runs[run].overrides}
        return {**common, **own, **self._overrides, "OUTPUT_DIR": output, "SEED": seed}

    def _command(
        self, tool: Path, run: str, workers: int, options: Overrides, *flags: str
    ) -> list[str]:
        command = [sys.executable, str(tool), "--num-gpus", str(workers)]
        command += ["--config-file", str(self._study.runs[run].config), *flags]
        return [*command, *_pairs(options)]

    def _check(
        self, run: str, where: str, options: Overrides, workers: int, eval_only: bool = True
    ) -> CfgNode:
        config = str(self._study.runs[run].config)
        try:
            cfg = load_config(argparse.Namespace(config_file=config, opts=_pairs(options)))
            check_config(cfg, num_workers=workers, eval_only=eval_only, resume=True)
            if len(cfg.DATASETS.TEST) != 1:
                raise ConfigError(f"DATASETS.TEST {cfg.DATASETS.TEST}: a study takes one dataset.")
        except ConfigError as error:
            raise ConfigError(f"{self._study.path}: {where}: {error}") from error
        return cfg


def _pairs(options: Overrides) -> list[str]:
    return [str(part) for pair in options.items() for part in pair]


def execute(tasks: Sequence[Task], *, pass_fds: Sequence[int] = ()) -> set[Task]:
    """Run the tasks that have no record yet, one after the other.

    A task that fails is shown with the end of its log. Those that need it are left out, and the
    others go on.

    Args:
        tasks: each after the one that it needs.
        pass_fds: open files that the commands keep open.

    Returns:
        The tasks that failed or were left out.
    """
    failed: set[Task] = set()
    for number, task in enumerate(tasks):
        title = f"[{number + 1} of {len(tasks)}] {task.title}"
        if task.record.is_file():
            print(f"{title}: done before", flush=True)
            continue
        if task.needs in failed:
            print(f"{title}: left out, for what it needs failed", flush=True)
            failed.add(task)
            continue
        for path in task.leftovers:
            path.unlink(missing_ok=True)
        start = time.monotonic()
        try:
            left = _time_left(tasks, failed)
            run_command(f"{title}{left}", task.command, task.log, pass_fds=pass_fds)
        except RuntimeError as error:
            print(f"error: {error}", flush=True)
            failed.add(task)
            continue
        record = {"command": task.command, "seconds": round(time.monotonic() - start, 1)}
        write_json(task.record, record)
    return failed


def _time_left(tasks: Sequence[Task], failed: set[Task]) -> str:
    """What all tasks without a record will take, once one of each kind has one."""
    seconds: dict[str, list[float]] = {}
    missing = []
    for task in tasks:
        if task.record.is_file():
            taken = json.loads(task.record.read_text())["seconds"]
            seconds.setdefault(task.kind, []).append(taken)
        elif task not in failed:
            missing.append(task.kind)
    if not all(kind in seconds for kind in missing):
        return ""
    left = sum(statistics.mean(seconds[kind]) for kind in missing)
    return f" (study: about {max(left / 60, 1):.0f} min left)"
