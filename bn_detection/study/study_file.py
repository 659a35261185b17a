"""A study as its YAML file says it: runs, evaluations and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import ConfigError
from ..shipped import SHIPPED, find_shipped
from ..yaml_files import reading_yaml

Overrides = dict[str, Any]
_Where = tuple[str, ...]
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"

_STUDY_KEYS = (
    *("about", "paper", "workers", "seeds", "overrides", "runs", "baseline", "evaluations"),
    "x_axis",
)
_RUN_KEYS = ("config", "overrides")
_EVALUATION_KEYS = ("runs", "overrides", "recalibrate", "probe", "workers")
_OF_RUNNER = ("figures", "slurm", "study.json", "results.json", "results.csv", "report.html")
"""What the runner makes in the folder of a study, beside the folders of the runs."""
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
        probe: if not None, the leakage is measured instead of AP alone, with these further
            overrides.
        workers: processes that recalibrate and evaluate; 1 for a probe.
    """

    runs: tuple[str, ...]
    overrides: Overrides
    recalibrate: Overrides | None
    probe: Overrides | None
    workers: int


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: stem of the file's name.
        path: the file.
        about: what it studies, in words.
        paper: the table or figure of the paper that it repeats; None if it repeats none.
        workers: processes that train.
        seeds: SEED of each repetition.
        overrides: for all runs; a run's own come after them.
        runs: by name.
        baseline: name of the run to which the others are compared.
        evaluations: by name.
        x_axis: if not None, the names of the runs are numbers above 0, a figure is drawn over
            them, and this is the label of its axis.
    """

    name: str
    path: Path
    about: str
    paper: str | None
    workers: int
    seeds: tuple[int, ...]
    overrides: Overrides
    runs: dict[str, Run]
    baseline: str
    evaluations: dict[str, Evaluation]
    x_axis: str | None

    def is_of_training(self, evaluation: Evaluation) -> bool:
        """Whether it is the evaluation that ends the training: it changes nothing."""
        has_own = evaluation.recalibrate is not None or evaluation.probe is not None
        return not (evaluation.overrides or has_own) and evaluation.workers == self.workers


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
        self._lines: dict[_Where, int] = {(): 1}
        with reading_yaml(str(path)):
            loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            root = loader.get_single_node()
            for where, key, value in _entries(root):
                _read_names_as_text(where, key, value)
                twice = where in self._lines
                self._lines[where] = key.start_mark.line + 1
                self._check(not twice, where, f"{where[-1]} is there already; give another name.")
            self._content = loader.construct_document(root) if root else None

    def study(self) -> Study:
        content = self._mapping(self._content, (), _STUDY_KEYS, ("about", "runs", "evaluations"))
        runs = {
            name: self._run(value, where) for name, value, where in self._named(content, "runs")
        }
        baseline = str(content.get("baseline", next(iter(runs))))
        problem = f'baseline is "{baseline}"; give a run, one of {", ".join(runs)}.'
        self._check(baseline in runs, ("baseline",), problem)
        workers = self._workers(content, (), 1)
        seeds = content.get("seeds", [1])
        self._check(
            isinstance(seeds, list)
            and len(set(map(str, seeds))) == len(seeds) > 0
            and all(type(seed) is int and seed >= 0 for seed in seeds),
            ("seeds",),
            f"seeds is {seeds!r}; give a list of different whole numbers from 0.",
        )
        x_axis = self._text(content, (), "x_axis")
        for name in runs if x_axis is not None else ():
            problem = f'with x_axis the names of runs are numbers above 0; "{name}" is none.'
            self._check(_is_number(name), ("runs", name), problem)
        return Study(
            name=self._path.stem,
            path=self._path,
            about=self._text(content, (), "about") or "",
            paper=self._text(content, (), "paper"),
            workers=workers,
            seeds=tuple(seeds),
            overrides=self._overrides(content, ()),
            runs=runs,
            baseline=baseline,
            evaluations={
                name: self._evaluation(value, where, list(runs), workers)
                for name, value, where in self._named(content, "evaluations")
            },
            x_axis=x_axis,
        )

    def _run(self, value: Any, where: _Where) -> Run:
        content = self._mapping(value, where, _RUN_KEYS, ("config",))
        name = self._text(content, where, "config") or ""
        config = self._path.parent / name
        if not config.is_file():
            config = find_shipped(name) or config
        problem = f"config: there is no file {config}, and no {name} in {SHIPPED}."
        self._check(config.is_file(), (*where, "config"), problem)
        return Run(config, self._overrides(content, where))

    def _evaluation(
        self, value: Any, where: _Where, all_runs: list[str], workers: int
    ) -> Evaluation:
        content = self._mapping({} if value is None else value, where, _EVALUATION_KEYS)
        runs = content.get("runs", all_runs)
        known = isinstance(runs, list) and all(name in all_runs for name in runs)
        problem = f"runs is {runs!r}; give a list of different runs, of {', '.join(all_runs)}."
        is_right = runs and known and len({*runs}) == len(runs)
        self._check(is_right, (*where, "runs"), problem)
        recalibrate, probe = (
            self._overrides(content, where, key, _OF_EVALUATION) if key in content else None
            for key in ("recalibrate", "probe")
        )
        if probe is not None:
            workers = 1
            problem = "a probe has one process; leave workers out."
            self._check("workers" not in content, (*where, "workers"), problem)
            problem = "write the overrides of a probe under probe."
            self._check("overrides" not in content, (*where, "overrides"), problem)
        return Evaluation(
            runs=tuple(runs),
            overrides=self._overrides(content, where, taken=_OF_EVALUATION),
            recalibrate=recalibrate,
            probe=probe,
            workers=self._workers(content, where, workers),
        )

    def _text(self, content: dict[str, Any], where: _Where, key: str) -> str | None:
        value = content.get(key)
        problem = f"{key} is {value!r}; it must be text."
        self._check(value is None or isinstance(value, str), (*where, key), problem)
        return value and value.strip()

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
        value = content.get(key)
        overrides = self._mapping({} if value is None else value, (*where, key))
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
            problem = f'"{name}" names a folder: not empty, without "/", and no "." first.'
            self._check(name and "/" not in name and name[0] != ".", (key, name), problem)
            problem = f'"{name}" is the name of a folder or file of the runner; give another.'
            of_runner = name.removesuffix(".partial") in _OF_RUNNER
            self._check(key != "runs" or not of_runner, (key, name), problem)
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
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _entries(
    node: yaml.Node | None, where: _Where = ()
) -> Iterator[tuple[_Where, yaml.Node, yaml.Node]]:
    """The keys that lead to each value of a document, its own key, and the value."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*where, str(key.value))
            yield inner, key, value
            yield from _entries(value, inner)


def _read_names_as_text(where: _Where, key: yaml.Node, value: yaml.Node) -> None:
    """Names are as they are written: YAML would take 0.10 for 0.1, and no for False."""
    names = [key]
    if where == ("baseline",):
        names.append(value)
    elif where[0] == "evaluations" and where[2:] == ("runs",):
        names += value.value if isinstance(value, yaml.SequenceNode) else []
    for name in names:
        if isinstance(name, yaml.ScalarNode) and name.tag != _MERGE:
            name.tag = _TEXT
