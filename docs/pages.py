#!/usr/bin/env python
"""Make the pages that have results, docs/*.md, from docs/templates/*.md.j2 and docs/studies/*.json.

python docs/pages.py                                # the pages, from the results that are committed
python docs/pages.py output/studies/leakage ...     # first take the results of these studies
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jinja2
import yaml

from bn_detection.engine import load_config
from bn_detection.estimate import Estimate
from bn_detection.study.estimates import paired_difference
from bn_detection.study.figures import in_words
from bn_detection.study.results import BOX_AP, HEADLINES, decimals
from bn_detection.study.study_file import read_study

DOCS = Path(__file__).parent
STUDIES = DOCS.parent / "configs" / "studies"
MINUS = "\N{MINUS SIGN}"
_FACTS = (
    *("study", "paper", "baseline", "seeds", "runs", "evaluations", "warnings", "reading"),
    *("devices", "versions", "seconds of trainings", "seconds of evaluations"),
    *("minutes on a core", "number", "images trained on"),
)
_METRICS = (*HEADLINES, "accuracy above the limit")
_NOT_RUN = "not run"
_NUMBER = re.compile(rf"[+{MINUS}]?\d[\d,.]*(?! *\w{{2}})")


def slim(results: Mapping[str, Any]) -> dict[str, Any]:
    """What pages need of a study's ``results.json``: tens of KB.

    Args:
        results: its content.
    """
    kept = {key: results[key] for key in (*_FACTS, *_METRICS) if key in results}
    return json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 3))


def write_slim(content: Mapping[str, Any], path: Path) -> None:
    """Write it with a line a result."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], (dict, str)):
            rows = (json.dumps(row, ensure_ascii=False) for row in value)
            text = "[\n  " + ",\n  ".join(rows) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def take(folder: Path, results: Path) -> str:
    """Keep the results of a study, or of the demo, for the pages.

    Args:
        folder: of the study, with its ``results.json``.
        results: the folder for the JSON.

    Returns:
        The name of the study.
    """
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if missing := [key for key in _FACTS if key not in content and "study" in content]:
        sys.exit(
            f"{folder / 'results.json'} is of an earlier version, without {missing[0]!r}: run the "
            "study again, which writes its report anew."
        )
    name = content.get("study", folder.resolve().name)
    write_slim(slim(content) if "study" in content else content, results / f"{name}.json")
    return name


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, with columns of numbers to the right.

    Args:
        head: of each column.
        rows: of cells.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    is_number = [any(_NUMBER.match(cell) for cell in column) for column in zip(*rows, strict=True)]
    sides = ["---", *("---:" if number else "---" for number in is_number[1:])]
    lines = [head, sides, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(difference: float) -> str:
    """A difference of percents, such as "+10.8"."""
    return f"{'+' if difference > 0 else ''}{difference:.1f}".replace("-", MINUS)


def number(value: float, places: int) -> str:
    """A number with so many decimals and a minus sign, never "-0.0"."""
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", MINUS)


def interval(found: Mapping[str, float], places: int) -> str:
    """A value with its interval: "74.2 [72.0, 76.1]"."""
    value, low, high = (number(found[key], places) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


class Results:
    """The results of one study, as templates write them.

    Where there is no result, each method gives what the page then says; a name that the study does
    not have is an error.

    Args:
        name: of the study.
        content: of its JSON; None where it was not run.
        pages: that it is for.
    """

    def __init__(self, name: str, content: Mapping[str, Any] | None, pages: Pages) -> None:
        self._name, self._content, self._pages = name, content, pages

    @property
    def is_run(self) -> bool:
        """Whether there is a result."""
        return self._content is not None

    @property
    def evaluations(self) -> list[str]:
        """The names of the evaluations; none where it was not run."""
        return self._content["evaluations"] if self._content else []

    @property
    def cost(self) -> str:
        """Such as "40 minutes on a core": measured, or with an "about" expected; or empty."""
        if self._content is None:
            minutes = self._pages.minutes_expected(self._name)
            return "" if minutes is None else f"about {minutes:,.0f} minutes on a core"
        minutes = sum(self._content["minutes on a core"].values())
        return f"{minutes:,.0f} minutes on a core" if minutes >= 1 else "less than a minute"

    @property
    def not_run(self) -> str:
        """What a page says in place of results."""
        return f"Not run; {self.cost}." if self.cost else "Not run."

    @property
    def run_with(self) -> str:
        """Seeds, what ± is, and what it cost: a sentence below a table."""
        if self._content is None:
            return ""
        seeds = self._content["seeds"]
        intervals = ": mean ± half of the 95 % interval over the seeds" if seeds[1:] else ""
        probe = any(
            entry["interval over"] in ("images", "seeds and images")
            for metric in _METRICS
            for entry in self._content.get(metric, ())
        )
        images = ", of the probe over seeds and images" if probe and seeds[1:] else ""
        number = f"{len(seeds)} seeds" if seeds[1:] else "One seed"
        devices = ", ".join(self._content["devices"]) or "a device that is not recorded"
        text = f"{number}{intervals}{images}. {self.cost.capitalize()} ({devices})."
        return " ".join([text, *self._content["warnings"]])

    def value(self, run: str, evaluation: str, metric: str = BOX_AP) -> str:
        """A mean with its interval, such as "74.2 ± 2.0"; empty where the study has none.

        Args:
            run: of the study.
            evaluation: or phase of the training.
            metric: of :mod:`bn_detection.study.results`.
        """
        if self._content is None:
            return _NOT_RUN
        entry = self._entry(run, evaluation, metric)
        return "" if entry is None else self._in_words(_estimate(entry), metric)

    def difference(
        self,
        run: str,
        evaluation: str,
        *,
        to_run: str | None = None,
        to: str | None = None,
        metric: str = BOX_AP,
    ) -> str:
        """A difference with its sign and interval, paired over the seeds: "+15.0 ± 12.7".

        Args:
            run: of the study.
            evaluation: likewise.
            to_run: the run that is subtracted; the same by default.
            to: the evaluation that is subtracted; the same by default. With both the same, the
                baseline is subtracted.
            metric: likewise.
        """
        if self._content is None:
            return _NOT_RUN
        found = self._difference(run, evaluation, to_run, to, metric)
        if found is None or not found.is_known:
            return ""
        return f"{'+' if found.value > 0 else ''}{self._in_words(found, metric)}"

    def sign(
        self,
        run: str,
        evaluation: str,
        *,
        to_run: str | None = None,
        to: str | None = None,
        metric: str = BOX_AP,
    ) -> int | None:
        """What the interval of a difference says: 1 above zero, -1 below, 0 open, None nothing."""
        if self._content is None:
            return None
        found = self._difference(run, evaluation, to_run, to, metric)
        return None if found is None else found.sign

    def table(
        self,
        columns: Sequence[Sequence[str]] | None = None,
        *,
        corner: str = "run",
        runs: Sequence[str] | None = None,
        metric: str = BOX_AP,
        transposed: bool = False,
    ) -> str:
        """A table, a row a run and a column an evaluation.

        Args:
            columns: of each the evaluation, and as far as they are given its header, its metric,
                and what is subtracted: "baseline", or another evaluation of the run. By default
                all evaluations of ``metric``.
            corner: header of the first column.
            runs: the rows; by default all that have a number.
            metric: of columns that name none.
            transposed: runs are the columns.
        """
        if self._content is None:
            return self.not_run
        if columns is None:
            found = {entry["evaluation"] for entry in self._content.get(metric, ())}
            columns = [[name] for name in self._content["evaluations"] if name in found]
        rows = []
        for run in runs or self._content["runs"]:
            cells = []
            for name, *given in columns:
                _, of, minus = [*given, *(None, metric, None)[len(given) :]]
                if minus is None:
                    cells.append(self.value(run, name, of))
                elif minus != "baseline":
                    cells.append(self.difference(run, name, to=minus, metric=of))
                elif run == self._content["baseline"]:
                    cells.append("")
                else:
                    cells.append(self.difference(run, name, metric=of))
            if any(cells):
                rows.append([run, *cells])
        head = [corner, *(given[0] if given else name for name, *given in columns)]
        if transposed:
            turned = list(zip(head, *rows, strict=True))
            return table([corner, *(row[0] for row in rows)], turned[1:])
        return table(head, rows)

    def reading(self, *starts: str) -> str:
        """The sentences of the report that begin so, as a list: they say what intervals support.

        Args:
            starts: beginnings of sentences; none for all.
        """
        sentences = self._content["reading"] if self._content else ()
        chosen = [each for each in sentences if not starts or each.startswith(starts)]
        return "\n".join(f"* {each}" for each in chosen)

    def figure(self, name: str, alt: str, file: str = "") -> str:
        """A figure of the report, once there is one.

        Args:
            name: of the report.
            alt: what it shows, for those who do not see it.
            file: stem of the file in ``docs/images``; by default study and name.
        """
        file = f"{file or f'{self._name}_{name}'}.png"
        self._pages.take_figure(self._name, name, file)
        return f"![{alt}](images/{file})" if (self._pages.images / file).is_file() else ""

    def _entry(self, run: str, evaluation: str, metric: str) -> dict[str, Any] | None:
        assert self._content is not None
        entries = self._content.get(metric, ())
        known = {"run": self._content["runs"], "evaluation": self._content["evaluations"]}
        known["evaluation"] = [*known["evaluation"], *(e["evaluation"] for e in entries)]
        for kind, given in (("run", run), ("evaluation", evaluation)):
            if given not in known[kind]:
                names = ", ".join(dict.fromkeys(known[kind]))
                raise ValueError(f"{self._name} has no {kind} {given!r}; it has {names}.")
        places = [e for e in entries if (e["run"], e["evaluation"]) == (run, evaluation)]
        return places[0] if places else None

    def _difference(
        self, run: str, evaluation: str, to_run: str | None, to: str | None, metric: str
    ) -> Estimate | None:
        assert self._content is not None
        entry = self._entry(run, evaluation, metric)
        if entry is None:
            return None
        if to_run is None and to is None:
            return _estimate(entry["difference to the baseline"])
        other = self._entry(to_run or run, to or evaluation, metric)
        return other and paired_difference(entry["by_seed"], other["by_seed"])

    def _in_words(self, found: Estimate, metric: str) -> str:
        assert self._content is not None
        number = len(self._content["seeds"])
        fewer = f" ({found.number} of {number} seeds)" if 0 < found.number < number else ""
        return f"{in_words(found, decimals(metric))}{fewer}".replace("-", MINUS)


def _estimate(entry: Mapping[str, Any]) -> Estimate:
    value, low, high = (
        float("nan") if entry[key] is None else entry[key] for key in ("mean", "low_95", "high_95")
    )
    return Estimate(value, low, high, entry["number"], entry["interval over"] or "seeds")


class Pages:
    """The pages, and what they are made from.

    Args:
        templates: folder of ``<page>.md.j2`` and of the YAML files that ``data`` reads.
        results: folder of ``<study>.json``.
        images: folder of the figures.
        sources: by study that was just taken, its folder with ``figures``.
    """

    def __init__(
        self,
        templates: Path = DOCS / "templates",
        results: Path = DOCS / "studies",
        images: Path = DOCS / "images",
        sources: Mapping[str, Path] | None = None,
    ) -> None:
        self.templates, self.results, self.images = templates, results, images
        self._sources = sources or {}
        # Reading the configs of a study takes a second.
        self.minutes_expected = cache(self._minutes_expected)

    def render(self) -> dict[str, str]:
        """The text of each page, by its file name; one a template."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(self.templates),
            extensions=["jinja2.ext.do"],
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.globals |= {
            "study": self.study,
            "data": self.data,
            "table": table,
            "signed": signed,
            "number": number,
            "interval": interval,
            "costs": self.costs,
        }
        pages = {}
        for path in sorted(self.templates.glob("*.md.j2")):
            about = f"<!-- Made by docs/pages.py from docs/templates/{path.name}. -->\n"
            text = environment.get_template(path.name).render()
            pages[path.stem] = re.sub(r"\n{3,}", "\n\n", about + text)
        return pages

    def study(self, name: str) -> Results:
        """The results of a study.

        Args:
            name: of its JSON.
        """
        return Results(name, self._contents.get(name), self)

    def data(self, name: str) -> Any:
        """The content of a JSON of results, or of a YAML beside the templates; None without one.

        Args:
            name: without ``.json`` or ``.yaml``.
        """
        path = self.templates / f"{name}.yaml"
        return yaml.safe_load(path.read_text()) if path.is_file() else self._contents.get(name)

    def costs(self) -> str:
        """What each study of ``configs/studies`` takes on two cores."""
        rows = []
        for path in sorted(STUDIES.glob("*.yaml")):
            content = self._contents.get(path.stem)
            if content is None:
                study = read_study(path)
                seeds, trainings = len(study.seeds), len(study.runs) * len(study.seeds)
                minutes = self.minutes_expected(path.stem)
                note = " (not run)"
            else:
                seeds, trainings = len(content["seeds"]), content["number"]["trainings"]
                minutes, note = sum(content["minutes on a core"].values()), ""
            cost = ("",) * 2
            if minutes is not None:
                cost = (f"{minutes / 2 / seeds:,.0f}{note}", f"{minutes / 2:,.0f}{note}")
            rows.append([f"`{path.stem}`", seeds, trainings, *cost])
        return table(["study", "seeds", "trainings", "minutes a seed", "minutes in all"], rows)

    def _minutes_expected(self, name: str) -> float | None:
        """What a study of ``configs/studies`` takes on a core, by those that were run.

        Trainings by the images that they see, evaluations by their number. None where no study was
        run, or there is none of the name.
        """
        path = STUDIES / f"{name}.yaml"
        run = [self._contents[p.stem] for p in STUDIES.glob("*.yaml") if p.stem in self._contents]
        if not run or not path.is_file():
            return None
        study = read_study(path)
        images = 0
        for each in study.runs.values():
            overrides = {**study.overrides, **each.overrides}
            opts = [str(part) for pair in overrides.items() for part in pair]
            cfg = load_config(argparse.Namespace(config_file=str(each.config), opts=opts))
            images += cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
        evaluations = [e for e in study.evaluations.values() if not study.is_of_training(e)]
        number = {"trainings": images, "evaluations": sum(len(e.runs) for e in evaluations)}
        of_run = {
            "trainings": sum(c["images trained on"] for c in run),
            "evaluations": sum(c["number"]["evaluations"] for c in run),
        }
        minutes = sum(
            number[kind] * sum(c["minutes on a core"][kind] for c in run) / max(of_run[kind], 1)
            for kind in number
        )
        return len(study.seeds) * minutes

    def take_figure(self, study: str, name: str, file: str) -> None:
        """Copy a figure of a study that was just taken, if its report has it."""
        if study in self._sources:
            path = self._sources[study] / "figures" / f"{name}.png"
            if path.is_file():
                shutil.copyfile(path, self.images / file)

    @cached_property
    def _contents(self) -> dict[str, Any]:
        return {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(self.results.glob("*.json"))
        }


def main(folders: Sequence[Path]) -> None:
    """Take the results of studies, and write every page."""
    (DOCS / "studies").mkdir(exist_ok=True)
    pages = Pages(sources={take(folder, DOCS / "studies"): folder for folder in folders})
    for name, text in pages.render().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
