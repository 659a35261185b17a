"""A study as its YAML file says it: runs, evaluations and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import ConfigError

Overrides = dict[str, Any]
_Where = tuple[str, ...]

_STUDY_KEYS = ("about", "workers", "seeds", "overrides", "runs", "evaluations", "x_axis")
_RUN_KEYS = ("config", "overrides")
_EVALUATION_KEYS = ("runs", "overrides", "recalibrate", "workers")
TAKEN = ("OUTPUT_DIR", "SEED")
"""Keys to which the runner gives a value of its own."""
_OF_EVALUATION = (*TAKEN, "MODEL.WEIGHTS")


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
        x_axis: if not None, the names of the runs are numbers above 0, a figure is drawn over
            them, and this is the label of its axis.
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
        self._lines: dict[_Where, int] = {(): 1}
        for where, line in _lines(root):
            twice = where in self._lines
            self._lines[where] = line
            self._check(not twice, where, f"{where[-1]} is there already; give another name.")

    def study(self) -> Study:
        content = self._mapping(self._content, (), _STUDY_KEYS, ("about", "runs", "evaluations"))
        runs = {
            name: self._run(value, where) for name, value, where in self._named(content, "runs")
        }
        workers = self._workers(content, (), 1)
        seeds = content.get("seeds", [1])
        self._check(
            isinstance(seeds, list)
            and len(set(map(str, seeds))) == len(seeds) > 0
            and all(type(seed) is int and seed >= 0 for seed in seeds),
            ("seeds",),
            f"seeds is {seeds!r}; give a list of different whole numbers from 0.",
        )
        x_axis = content.get("x_axis")
        for name in runs if x_axis is not None else ():
            problem = f'with x_axis the names of runs are numbers above 0; "{name}" is none.'
            self._check(_is_number(name), ("runs", name), problem)
        return Study(
            name=self._path.stem,
            path=self._path,
            about=str(content["about"]).strip(),
            workers=workers,
            seeds=tuple(seeds),
            overrides=self._overrides(content, ()),
            runs=runs,
            evaluations={
                name: self._evaluation(value, where, list(runs), workers)
                for name, value, where in self._named(content, "evaluations")
            },
            x_axis=x_axis,
        )

    def _run(self, value: Any, where: _Where) -> Run:
        content = self._mapping(value, where, _RUN_KEYS, ("config",))
        config = self._path.parent / str(content["config"])
        self._check(config.is_file(), (*where, "config"), f"config: there is no file {config}.")
        return Run(config, self._overrides(content, where))

    def _evaluation(
        self, value: Any, where: _Where, all_runs: list[str], workers: int
    ) -> Evaluation:
        content = self._mapping(value or {}, where, _EVALUATION_KEYS)
        runs = content.get("runs", all_runs)
        known = isinstance(runs, list) and {str(name) for name in runs} <= {*all_runs}
        problem = f"runs is {runs!r}; give a list of runs, of {', '.join(all_runs)}."
        self._check(runs and known, (*where, "runs"), problem)
        recalibrate = None
        if "recalibrate" in content:
            recalibrate = self._overrides(content, where, "recalibrate", _OF_EVALUATION)
        return Evaluation(
            runs=tuple(map(str, runs)),
            overrides=self._overrides(content, where, taken=_OF_EVALUATION),
            recalibrate=recalibrate,
            workers=self._workers(content, where, workers),
        )

    def _workers(self, content: dict[str, Any], where: _Where, default: int) -> int:
        value = content.get("workers", default)
        problem = f"workers is {value!r}; it must be a whole number from 1."
        self._check(type(value) is int and value >= 1, (*where, "workers"), problem)
        return value

    def _overrides(
        self,
        content: dict[str, Any],
        where: _Where,
        key: str = "overrides",
        taken: tuple[str, ...] = TAKEN,
    ) -> Overrides:
        overrides = self._mapping(content.get(key) or {}, (*where, key))
        for name, value in overrides.items():
            place = (*where, key, name)
            self._check(name not in taken, place, f"{name} is chosen by the runner; leave it out.")
            problem = f"{name} is a mapping; write its keys with dots, as {name}.KEY."
            self._check(not isinstance(value, dict), place, problem)
        return overrides

    def _named(self, content: dict[str, Any], key: str) -> Iterator[tuple[str, Any, _Where]]:
        """Name, value and place of the entries of ``runs`` or ``evaluations``."""
        named = self._mapping(content[key], (key,))
        self._check(named, (key,), f"{key} is empty; give at least one.")
        for name, value in named.items():
            problem = f'"{name}" names a folder: without "/", and no "." first.'
            self._check("/" not in name and name[:1] != ".", (key, name), problem)
            yield name, value, (key, name)

    def _mapping(
        self,
        value: Any,
        where: _Where,
        keys: tuple[str, ...] | None = None,
        required: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        name = where[-1] if where else "the study"
        self._check(isinstance(value, dict), where, f"{name} is {value!r}; it must be a mapping.")
        value = {str(key): item for key, item in value.items()}
        for key in value:
            problem = f"{name} has no key {key}; its keys are {', '.join(keys or ())}."
            self._check(keys is None or key in keys, (*where, key), problem)
        for key in required:
            self._check(key in value, where, f"{name} lacks the key {key}.")
        return value

    def _check(self, is_right: Any, where: _Where, problem: str) -> None:
        if not is_right:
            while where not in self._lines:
                where = where[:-1]
            raise ConfigError(f"{self._path}, line {self._lines[where]}: {problem}")


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _lines(node: yaml.Node | None, where: _Where = ()) -> Iterator[tuple[_Where, int]]:
    """The keys that lead to each key of a document, and its line from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*where, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
