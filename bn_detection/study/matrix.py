"""A study as a list of commands, each with a record of its success; what is done stays done."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from ..command_line import command_line
from ..config import ConfigError
from ..engine import check_config, load_config
from ..engine.checks import check_recalibration
from ..engine.probing import check_probing
from ..engine.rehearsal import rehearse
from ..engine.setup import check_dataset_names, evaluation_folder
from ..leakage import images_per_worker
from .study_file import Evaluation, Overrides, Study


class Cell(NamedTuple):
    """One result of a study: a run, trained with a seed, under one evaluation."""

    run: str
    evaluation: str
    seed: int


class Failure(NamedTuple):
    """A task that failed, and the file that says why."""

    title: str
    log: Path


@dataclass(eq=False)
class Task:
    """A command of a study.

    Attributes:
        title: what it does, for people.
        kind: tasks of a kind take about as long as each other.
        command: the program and its arguments.
        record: JSON file that is there once the command has succeeded, with its seconds.
        needs: the task whose output it uses.
        leftovers: files and folders of an interrupted attempt, removed before the next.
        images: of a training, that it sees; 0 of other tasks.
    """

    title: str
    kind: str
    command: list[str]
    record: Path
    needs: Task | None = None
    leftovers: tuple[Path, ...] = ()
    images: int = 0

    @property
    def log(self) -> Path:
        """The file with the command's output."""
        return self.record.with_suffix(".log")

    def seconds_before(self) -> float:
        """Of attempts with which it goes on: only what has nothing to remove does that."""
        noted = self.record.with_suffix(".seconds")
        return 0.0 if self.leftovers or not noted.exists() else json.loads(noted.read_text())


class Plan(NamedTuple):
    """What a study does.

    Attributes:
        tasks: each after the one that it needs.
        results: the task that makes each cell, with the path of its ``results.json``, or of its
            ``probe.json``.
        configs: of the training of each run, with everything but OUTPUT_DIR and SEED, which are
            those of the last seed.
    """

    tasks: list[Task]
    results: dict[Cell, tuple[Task, Path]]
    configs: dict[str, CfgNode]


def plan(
    study: Study,
    folder: Path,
    overrides: Overrides,
    imports: Sequence[str] = (),
    *,
    steps: bool = False,
) -> Plan:
    """Plan a study seed by seed, each training before its evaluations.

    Args:
        study: the study.
        folder: for everything that is made, except datasets.
        overrides: for every command, after all others.
        imports: modules that every command imports first.
        steps: whether to run a step of each run too, on images of noise; some seconds each.

    Raises:
        ConfigError: a config with its overrides cannot be used; the message names the study file,
            the run and the evaluation.
    """
    planner = _Planner(study, folder, overrides, imports, steps)
    for seed in study.seeds:
        for name in study.runs:
            planner.add_run(name, seed)
    return Plan(planner.tasks, planner.results, planner.configs)


class _Planner:
    def __init__(
        self,
        study: Study,
        folder: Path,
        overrides: Overrides,
        imports: Sequence[str],
        steps: bool,
    ) -> None:
        self._study, self._folder, self._overrides = study, folder, overrides
        self._imports, self._steps = list(imports), steps
        self.tasks: list[Task] = []
        self.results: dict[Cell, tuple[Task, Path]] = {}
        self.configs: dict[str, CfgNode] = {}

    def add_run(self, name: str, seed: int) -> None:
        output = self._folder / name / f"seed_{seed}"
        workers = self._study.workers
        options = self._options(name, seed, {}, output)
        check = partial(self._check_training, name)
        cfg = self.configs[name] = self._check(name, f"run {name}", options, check)
        training = self._add(
            f"{name}, seed {seed}: training",
            "training",
            self._command("train", name, workers, options, "--resume"),
            output / "training.json",
        )
        training.images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
        for other, evaluation in self._study.evaluations.items():
            if name in evaluation.runs:
                cell = Cell(name, other, seed)
                self.results[cell] = self._add_evaluation(cell, evaluation, output, training)

    def _add_evaluation(
        self, cell: Cell, evaluation: Evaluation, output: Path, training: Task
    ) -> tuple[Task, Path]:
        if self._study.is_of_training(evaluation):
            return training, output / "inference" / "results.json"
        title = f"{cell.run}, seed {cell.seed}: {cell.evaluation}"
        where = f"run {cell.run}, evaluation {cell.evaluation}"
        place = output / "evaluations" / cell.evaluation
        weights, needs = output / "model_final.pth", training
        if evaluation.recalibrate is not None:
            options = self._options(cell.run, cell.seed, evaluation.recalibrate, place)
            check = partial(check_recalibration, num_workers=evaluation.workers)
            self._check(cell.run, f"{where}, recalibrate", options, check)
            options["MODEL.WEIGHTS"], weights = weights, place / "recalibrated.pth"
            needs = self._add(
                f"{title}: recalibration",
                f"{cell.evaluation}: recalibration",
                self._command(
                    *("recalibrate", cell.run, evaluation.workers, options),
                    *("--output", str(weights)),
                ),
                place / "recalibration.json",
                training,
                (weights, weights.with_suffix(".json")),
            )
        own, check = evaluation.probe, self._check_probe
        if own is None:
            workers, own = evaluation.workers, evaluation.overrides
            check = partial(check_config, num_workers=workers, eval_only=True, resume=True)
        options = self._options(cell.run, cell.seed, own, place)
        cfg = self._check(cell.run, where, options, check)
        cfg.MODEL.WEIGHTS = options["MODEL.WEIGHTS"] = str(weights)
        if evaluation.probe is None:
            command = self._command("train", cell.run, evaluation.workers, options, "--eval-only")
            leftover = Path(evaluation_folder(cfg, resume=False))
            result = leftover / "results.json"
        else:
            leftover = result = place / "probe.json"
            options["BN.LEAKAGE.IMAGES_PER_WORKER"] = cfg.BN.LEAKAGE.IMAGES_PER_WORKER
            command = self._command("probe", cell.run, None, options, "--output", str(result))
        task = self._add(
            title, cell.evaluation, command, place / "evaluation.json", needs, (leftover,)
        )
        return task, result

    def _add(self, *fields: Any) -> Task:
        task = Task(*fields)
        self.tasks.append(task)
        return task

    def _options(self, run: str, seed: int, own: Overrides, output: Path) -> Overrides:
        common = {**self._study.overrides, **self._study.runs[run].overrides}
        return {**common, **own, **self._overrides, "OUTPUT_DIR": output, "SEED": seed}

    def _command(
        self, name: str, run: str, workers: int | None, options: Overrides, *flags: str
    ) -> list[str]:
        """The line of a command; one without workers takes no number of them."""
        more = [f"--import={module}" for module in self._imports]
        more += ["--num-gpus", str(workers)] if workers else []
        config = str(self._study.runs[run].config)
        return command_line(name, *more, "--config-file", config, *flags, *_pairs(options))

    def _check_training(self, name: str, cfg: CfgNode) -> None:
        check_config(cfg, num_workers=self._study.workers, eval_only=False, resume=True)
        if name not in self.configs:  # other seeds build the same
            rehearse(cfg, training=True, step=self._steps)

    def _check_probe(self, cfg: CfgNode) -> None:
        check_probing(cfg)
        # The probe is one process, which does not know those of the training.
        cfg.BN.LEAKAGE.IMAGES_PER_WORKER = images_per_worker(cfg, self._study.workers)

    def _check(
        self, run: str, where: str, options: Overrides, check: Callable[[CfgNode], None]
    ) -> CfgNode:
        config = str(self._study.runs[run].config)
        try:
            args = argparse.Namespace(
                config_file=config, opts=_pairs(options), imports=self._imports
            )
            cfg = load_config(args)
            check(cfg)
            if len(cfg.DATASETS.TEST) != 1:
                raise ConfigError(f"DATASETS.TEST {cfg.DATASETS.TEST}: a study takes one dataset.")
            check_dataset_names(cfg)
        except ConfigError as error:
            raise ConfigError(f"{self._study.path}: {where}: {error}") from error
        return cfg


def _pairs(options: Overrides) -> list[str]:
    return [str(part) for pair in options.items() for part in pair]
