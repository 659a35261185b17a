"""A study as its YAML file says it: runs, evaluations and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import ConfigError

Overrides = dict[str, Any]

_STUDY_KEYS = ("about", "workers", "seeds", "overrides", "runs", "evaluations", "x_axis")
_RUN_KEYS = ("config", "overrides")
_EVALUATION_KEYS = ("runs", "overrides", "recalibrate", "workers")
# The runner gives them a value of its own.
TAKEN = ("OUTPUT_DIR", "SEED")


@dataclass(frozen=True)
class Run:
    """One variant, trained once a seed.

    Attributes:
        config: the config file.
        overrides: values by dotted key.
    """

    config: Path
    overrides: Overrides


@dataclass(frozen=True)
class Evaluation:
    """One way of evaluating the final checkpoint of runs.

    Attributes:
        runs: names of the runs.
        overrides: added to those of the run.
        recalibrate: if not None, statistics are recomputed first, with these further overrides.
        workers: processes that recalibrate and evaluate.
    """

    runs: tuple[str, ...]
    overrides: Overrides
    recalibrate: Overrides | None
    workers: int

    @property
    def is_of_training(self) -> bool:
        """Whether it is the evaluation that ends the training: it changes nothing."""
        return not self.overrides and self.recalibrate is None


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: stem of the file's name.
        path: the file.
        about: what it studies, in words.
        workers: processes that train.
        seeds: SEED of each repetition.
        overrides: for all runs; a run's own come after them.
        runs: by name.
        evaluations: by name.
        x_axis: if not None, the names of the runs are numbers, a figure is drawn over them, and
            this is the label of its axis.
    """

    name: str
    path: Path
    about: str
    workers: int
    seeds: tuple[int, ...]
    overrides: Overrides
    runs: dict[str, Run]
    evaluations: dict[str, Evaluation]
    x_axis: str | None


def read_study(path: Path) -> Study:
    """Read a study file.

    Args:
        path: a YAML file; the config files that it names are relative to its folder.

    Raises:
        ConfigError: names the file, the line, the key, and what would be right.
    """
    if not path.is_file():
        raise ConfigError(f"The study {path}: there is no such file.")
    return _Reader(path).study()


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text()
        try:
            root = yaml.compose(text, yaml.SafeLoader)
            self._content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {error}") from error
        self._lines: dict[tuple[str, ...], int] = {(): 1}
        for where, line in _lines(root):
            if where in self._lines:
                raise self._error(where, f"{where[-1]} is there already; give another name.", line)
            self._lines[where] = line

    def study(self) -> Study:
        content = self._mapping(self._content, (), _STUDY_KEYS, ("about", "runs", "evaluations"))
        workers = self._workers(content.get("workers", 1), ("workers",))
        runs = {
            name: self._run(value, ("runs", name))
            for name, value in self._named(content["runs"], ("runs",)).items()
        }
        evaluations = {
            name: self._evaluation(value, ("evaluations", name), tuple(runs), workers)
            for name, value in self._named(content["evaluations"], ("evaluations",)).items()
        }
        return Study(
            name=self._path.stem,
            path=self._path,
            about=str(content["about"]).strip(),
            workers=workers,
            seeds=self._seeds(content.get("seeds", [1])),
            overrides=self._overrides(content, ()),
            runs=runs,
            evaluations=evaluations,
            x_axis=self._x_axis(content.get("x_axis"), runs),
        )

    def _run(self, value: Any, where: tuple[str, ...]) -> Run:
        content = self._mapping(value, where, _RUN_KEYS, ("config",))
        config = self._path.parent / str(content["config"])
        if not config.is_file():
            raise self._error((*where, "config"), f"config: there is no file {config}.")
        return Run(config, self._overrides(content, where))

    def _evaluation(
        self, value: Any, where: tuple[str, ...], all_runs: tuple[str, ...], workers: int
    ) -> Evaluation:
        content = self._mapping(value or {}, where, _EVALUATION_KEYS)
        runs = content.get("runs", list(all_runs))
        if not isinstance(runs, list) or not runs:
            raise self._error((*where, "runs"), f"runs is {runs!r}; give a list of runs.")
        for name in map(str, runs):
            if name not in all_runs:
                known = ", ".join(all_runs)
                raise self._error(
                    (*where, "runs"), f'runs: there is no run "{name}"; there are {known}.'
                )
        recalibrate = None
        if "recalibrate" in content:
            recalibrate = self._overrides(content, where, "recalibrate", ("MODEL.WEIGHTS",))
        return Evaluation(
            runs=tuple(map(str, runs)),
            overrides=self._overrides(content, where, taken=("MODEL.WEIGHTS",)),
            recalibrate=recalibrate,
            workers=self._workers(content.get("workers", workers), (*where, "workers")),
        )

    def _overrides(
        self,
        content: dict[str, Any],
        where: tuple[str, ...],
        key: str = "overrides",
        taken: tuple[str, ...] = (),
    ) -> Overrides:
        where = (*where, key)
        overrides = self._mapping(content.get(key) or {}, where)
        for name, value in overrides.items():
            if name in (*TAKEN, *taken):
                raise self._error((*where, name), f"{name} is chosen by the runner; leave it out.")
            if isinstance(value, dict):
                raise self._error(
                    (*where, name), f"{name} is a mapping; write its keys with dots, as {name}.KEY."
                )
        return overrides

    def _mapping(
        self,
        value: Any,
        where: tuple[str, ...],
        keys: tuple[str, ...] | None = None,
        required: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        name = where[-1] if where else "the study"
        if not isinstance(value, dict):
            raise self._error(where, f"{name} is {value!r}; it must be a mapping.")
        value = {str(key): item for key, item in value.items()}
        for key in value:
            if keys is not None and key not in keys:
                raise self._error(
                    (*where, key), f"{name} has no key {key}; its keys are {', '.join(keys)}."
                )
        for key in required:
            if key not in value:
                raise self._error(where, f"{name} lacks the key {key}.")
        return value

    def _named(self, value: Any, where: tuple[str, ...]) -> dict[str, Any]:
        named = self._mapping(value, where)
        if not named:
            raise self._error(where, f"{where[-1]} is empty; give at least one.")
        for name in named:
            if "/" in name or name.startswith("."):
                raise self._error(
                    (*where, name), f'"{name}" names a folder: without "/", and no "." first.'
                )
        return named

    def _workers(self, value: Any, where: tuple[str, ...]) -> int:
        if not isinstance(value, int) or value < 1:
            raise self._error(where, f"workers is {value!r}; it must be a whole number from 1.")
        return value

    def _seeds(self, value: Any) -> tuple[int, ...]:
        if (
            not (isinstance(value, list) and value and all(type(seed) is int for seed in value))
            or min(value) < 0
            or len(set(value)) < len(value)
        ):
            raise self._error(
                ("seeds",), f"seeds is {value!r}; give a list of different whole numbers from 0."
            )
        return tuple(value)

    def _x_axis(self, value: Any, runs: dict[str, Run]) -> str | None:
        for name in runs if value is not None else ():
            try:
                float(name)
            except ValueError:
                raise self._error(
                    ("runs", name), f'with x_axis the names of runs are numbers; "{name}" is none.'
                ) from None
        return None if value is None else str(value)

    def _error(self, where: tuple[str, ...], problem: str, line: int | None = None) -> ConfigError:
        while line is None:
            line, where = self._lines.get(where), where[:-1]
        return ConfigError(f"{self._path}, line {line}: {problem}")


def _lines(
    node: yaml.Node | None, where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    """The keys that lead to each key of a document, and its line from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*where, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
