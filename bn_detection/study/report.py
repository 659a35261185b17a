"""The report of a study: a page, figures, numbers as CSV and JSON, and a table for the terminal."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from ..files import replacing
from ..page import figure, render
from .estimates import Estimate
from .figures import Drawn, draw_all, fewer_seeds, in_words
from .folder import write_json
from .matrix import Cell, Failure
from .reading import read_results, warnings
from .results import (
    HEADLINES,
    LEAKAGES,
    PHASES,
    StudyResults,
    collect_results,
    decimals,
    unit,
)
from .study_file import Evaluation, Overrides, Study

_MODES = ("own image", "own worker", "shuffled", "population")
_SIGNS = {1: "above", -1: "below", 0: "open", None: ""}
_LOG_LINES = 15
_COLUMNS = 6


def write_report(
    study: Study, results: Mapping[Cell, Path], folder: Path, failures: Sequence[Failure] = ()
) -> Path:
    """Print the table of a study, and write its report.

    Written are ``report.html`` (the whole report, without the network), ``results.json``,
    ``results.csv`` (run, evaluation, seed, metric, value), and ``figures/*.png`` and ``*.svg``.

    Args:
        study: the study.
        results: by cell that is done, its ``results.json``, or ``probe.json`` of a probe.
        folder: of the study, with its trainings in ``<run>/seed_<n>``.
        failures: what did not succeed, with the log of each.

    Returns:
        The path of ``results.json``.
    """
    collected = collect_results(study, results, folder)
    reading = read_results(collected)
    figures = draw_all(collected)
    for drawn in figures:
        _save(drawn, folder / "figures")
    _write_csv(folder / "results.csv", collected)
    path = folder / "results.json"
    write_json(path, _as_json(collected, reading, failures))
    with replacing(folder / "report.html") as page:
        page.write_text(_page(collected, reading, figures, failures), encoding="utf-8")
    _print(collected, reading)
    print(f"\nReport: {folder / 'report.html'}")
    return path


@dataclass(frozen=True)
class _Table:
    """Runs by columns, each of a metric and an evaluation.

    Attributes:
        title: of the section.
        unit: of its numbers.
        columns: header, metric and evaluation.
        of_probe: whether its numbers have intervals over images of their own.
    """

    title: str
    unit: str
    columns: list[tuple[str, str, str]]
    of_probe: bool = False


class _Entry(NamedTuple):
    """A cell of a table: its text, what it sorts by, and what its interval says of zero."""

    text: str
    value: float | None
    sign: str = ""


def _tables(results: StudyResults) -> Iterator[_Table]:
    for metric in HEADLINES:
        names = results.evaluations(metric)
        if names and metric not in LEAKAGES:
            yield _Table(metric, unit(metric), [(name, metric, name) for name in names])
    for quantity in ("accuracy", "box AP"):
        for name in results.evaluations(f"leakage in {quantity}"):
            metrics = {mode: f"{quantity}, {mode}" for mode in _MODES}
            metrics |= {kind: f"{kind} in {quantity}" for kind in ("leakage", "inconsistency")}
            if quantity == "accuracy":
                metrics["above the limit"] = "accuracy above the limit"
            columns = [
                (header, metric, name)
                for header, metric in metrics.items()
                if name in results.evaluations(metric)
            ]
            yield _Table(f'probe "{name}": {quantity}', "% and points", columns, of_probe=True)


def _entry(results: StudyResults, run: str, metric: str, evaluation: str) -> str:
    """What a table shows of a run; empty where the study does not have it."""
    by_seed = results.by_seed(metric, run, evaluation)
    if not by_seed:
        runs = results.study.runs if evaluation in PHASES else _of(results, evaluation).runs
        done = results.metrics.get(run, {}).get(evaluation)
        return "" if run not in runs or done or evaluation in PHASES else "missing"
    return _in_words(results, results.estimate(metric, run, evaluation), metric)


def _in_words(results: StudyResults, found: Estimate, metric: str) -> str:
    text, fewer = in_words(found, decimals(metric)), fewer_seeds(results, found)
    text = text.replace("-", "\N{MINUS SIGN}")
    return f"{text} ({fewer})" if fewer else text


def _of(results: StudyResults, evaluation: str) -> Evaluation:
    return results.study.evaluations[evaluation]


def _page(
    results: StudyResults,
    reading: Sequence[str],
    figures: Sequence[Drawn],
    failures: Sequence[Failure],
) -> str:
    study = results.study
    metrics = [metric for metric in HEADLINES if results.evaluations(metric)]
    return render(
        "report.html.j2",
        study=study,
        warnings=warnings(results),
        reading=reading,
        tables=[_as_rows(results, table) for table in _tables(results)],
        figures=[figure(drawn.figure, drawn.alt, drawn.caption) for drawn in figures],
        failures=[(failure.title, failure.log, _tail(failure.log)) for failure in failures],
        facts=_facts(results),
        runs=list(_describe_runs(results)),
        evaluations=list(_describe_evaluations(study)),
        metrics=[(metric, unit(metric)) for metric in metrics],
        cells=_cells(results, metrics),
    )


def _scale(results: StudyResults, table: _Table) -> str:
    number = len(results.study.seeds)
    of_one = "in brackets, of one seed, the 95 % interval over images"
    if number == 1:
        return f"one seed; {of_one}" if table.of_probe else "one seed"
    scale = f"mean ± half of the 95 % interval over {number} seeds (Student's t)"
    return f"{scale} and the images; {of_one}" if table.of_probe else scale


def _scale_of_differences(results: StudyResults, table: _Table) -> str:
    if len(results.study.seeds) == 1:
        return "points; one seed"
    images = " and the images" if table.of_probe else ""
    return (
        f"points, paired over the seeds, with the 95 % interval over the seeds{images}; "
        "above, below: it excludes zero; open: it does not"
    )


def _as_rows(results: StudyResults, table: _Table) -> dict[str, Any]:
    """A table for the page: values, and differences to the baseline."""
    study = results.study
    values = {
        (run, column): _Entry(
            _entry(results, run, metric, evaluation),
            results.estimate(metric, run, evaluation).to_json()["value"],
        )
        for run in study.runs
        for column, metric, evaluation in table.columns
    }
    differences = {}
    compared = [c for c in table.columns if not table.of_probe or c[1] in LEAKAGES]
    for run in study.runs:
        for column, metric, evaluation in compared:
            found = results.difference(metric, run, evaluation)
            if run != study.baseline and found.number:
                text = _with_sign(results, found, metric)
                differences[run, column] = _Entry(
                    text, found.to_json()["value"], _SIGNS[found.sign]
                )
    names = {
        run: f"{run} (baseline)" if run == study.baseline and len(study.runs) > 1 else run
        for run in study.runs
    }
    columns = [column for column, _, _ in table.columns]
    others = [run for run in study.runs if run != study.baseline]
    return {
        "title": table.title[0].upper() + table.title[1:],
        "unit": table.unit,
        "scale": _scale(results, table),
        "scale of differences": _scale_of_differences(results, table),
        "values": _grid(values, names, columns),
        "differences": _grid(
            differences,
            {run: run for run in others},
            [column for column in columns if any(column == place[1] for place in differences)],
        )
        if differences
        else None,
    }


def _grid(
    entries: Mapping[tuple[str, str], _Entry], runs: dict[str, str], columns: list[str]
) -> dict[str, Any]:
    """A table's head and rows: runs with an entry downwards, or columns if they are many more."""
    nothing = _Entry("", None)
    rows = {name: [entries.get((run, c), nothing) for c in columns] for run, name in runs.items()}
    rows = {name: row for name, row in rows.items() if any(entry.text for entry in row)}
    if len(columns) > max(_COLUMNS, len(runs)):
        by_column = zip(*rows.values(), strict=True)
        named = dict(zip(columns, map(list, by_column), strict=True))
        return {"corner": "Evaluation", "head": list(rows), "rows": named}
    return {"corner": "Run", "head": columns, "rows": rows}


def _with_sign(results: StudyResults, found: Estimate, metric: str) -> str:
    text = _in_words(results, found, metric)
    return f"{'+' if found.value > 0 else ''}{text}"


def _facts(results: StudyResults) -> list[tuple[str, str]]:
    """What the study ran with, as name and value."""
    study = results.study
    trainings = list(results.trainings.values())
    # What a training that was killed left of its config may be cut short.
    done = {run: each for (run, _), each in results.trainings.items() if each.seconds is not None}
    configs = [config for training in done.values() if (config := training.read_config())]
    seconds = [training.seconds for training in trainings if training.seconds is not None]
    facts = [
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Workers of a training", str(study.workers)),
        ("Trained on", _distinct(", ".join(c["DATASETS"]["TRAIN"]) for c in configs)),
        ("Evaluated on", _distinct(", ".join(c["DATASETS"]["TEST"]) for c in configs)),
        ("Iterations", _distinct(f"{c['SOLVER']['MAX_ITER']:,}" for c in configs)),
        ("Device", _distinct(training.device or "" for training in trainings)),
        ("Trainings done", f"{len(seconds):,} of {len(study.runs) * len(study.seeds):,}"),
    ]
    if seconds:
        facts.append(("Seconds a training", f"{min(seconds):,.0f} to {max(seconds):,.0f}"))
    versions = _distinct(
        ", ".join(f"{name} {version}" for name, version in training.versions.items())
        for training in trainings
    )
    facts.append(("Versions", versions))
    if study.overrides:
        facts.append(("Overrides of all runs", _overrides(study.overrides)))
    return facts


def _distinct(values: Any) -> str:
    """The different values, with how often each comes if there are several."""
    counts = Counter(value or "not recorded" for value in values)
    if len(counts) <= 1:
        return next(iter(counts), "not recorded")
    return "; ".join(f"{value} ({number} times)" for value, number in counts.items())


def _describe_runs(results: StudyResults) -> Iterator[dict[str, Any]]:
    study = results.study
    for name, run in study.runs.items():
        seconds = [
            training.seconds
            for seed in study.seeds
            if (training := results.trainings.get((name, seed))) and training.seconds is not None
        ]
        yield {
            "name": name,
            "config": os.path.normpath(run.config),
            "overrides": _overrides(run.overrides),
            "done": f"{len(seconds)} of {len(study.seeds)}",
            "seconds": sum(seconds) / len(seconds) if seconds else None,
        }


def _describe_evaluations(study: Study) -> Iterator[dict[str, str]]:
    for name, evaluation in study.evaluations.items():
        parts = ["as the training ends" if study.is_of_training(evaluation) else ""]
        if evaluation.recalibrate is not None:
            own = _overrides(evaluation.recalibrate)
            parts.append(f"statistics recomputed first{f' with {own}' if own else ''}")
        if evaluation.probe is not None:
            own = _overrides(evaluation.probe)
            parts.append(f"leakage probe{f' with {own}' if own else ''}")
        parts.append(_overrides(evaluation.overrides))
        of_all = len(evaluation.runs) == len(study.runs)
        yield {
            "name": name,
            "what": "; ".join(part for part in parts if part),
            "runs": "all" if of_all else ", ".join(evaluation.runs),
            "workers": str(evaluation.workers),
        }


def _overrides(overrides: Overrides) -> str:
    return ", ".join(f"{key} {value}" for key, value in overrides.items())


def _cells(results: StudyResults, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """A row a result, with each of the metrics."""
    rows = []
    for run in results.study.runs:
        for name in (*results.study.evaluations, *PHASES):
            for seed in results.study.seeds:
                found = [results.by_seed(metric, run, name) for metric in metrics]
                if any(seed in by_seed for by_seed in found):
                    numbers = [by_seed.get(seed) for by_seed in found]
                    rows.append({"run": run, "evaluation": name, "seed": seed, "values": numbers})
    return rows


def _tail(log: Path) -> str:
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def _save(drawn: Drawn, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        with replacing(folder / f"{drawn.name}.{suffix}") as path:
            drawn.figure.savefig(path, format=suffix, dpi=150)


def _write_csv(path: Path, results: StudyResults) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "evaluation", "seed", "metric", "value"))
        for metric, places in results.values.items():
            for (run, evaluation), by_seed in places.items():
                for seed, measured in by_seed.items():
                    writer.writerow((run, evaluation, seed, metric, measured.to_json()["value"]))


def _as_json(
    results: StudyResults, reading: Sequence[str], failures: Sequence[Failure]
) -> dict[str, Any]:
    study = results.study
    content: dict[str, Any] = {"study": study.name, "about": study.about, "paper": study.paper}
    content |= {"baseline": study.baseline, "seeds": study.seeds, "warnings": warnings(results)}
    content |= {"reading": reading, "runs": [*study.runs], "evaluations": [*study.evaluations]}
    content["devices"] = sorted({t.device for t in results.trainings.values() if t.device})
    content["versions"] = []
    for training in results.trainings.values():
        if training.versions and training.versions not in content["versions"]:
            content["versions"].append(training.versions)
    content["seconds of trainings"] = {
        run: {
            seed: training.seconds
            for seed in study.seeds
            if (training := results.trainings.get((run, seed)))
        }
        for run in study.runs
    }
    content["seconds of evaluations"] = _seconds_of_evaluations(results)
    content |= _cost(results)
    content["failed"] = [{"title": title, "log": str(log)} for title, log in failures]
    for metric, places in results.values.items():
        content[metric] = [
            {
                "run": run,
                "evaluation": name,
                **_estimate_as_json(results.estimate(metric, run, name)),
                "by_seed": results.by_seed(metric, run, name),
                "difference to the baseline": _estimate_as_json(
                    results.difference(metric, run, name)
                ),
            }
            for run, name in places
        ]
    content["metrics by run, evaluation and seed"] = results.metrics
    return content


def _seconds_of_evaluations(results: StudyResults) -> dict[str, dict[str, dict[int, float]]]:
    by_run: dict[str, dict[str, dict[int, float]]] = {}
    for cell, seconds in results.seconds.items():
        by_run.setdefault(cell.run, {}).setdefault(cell.evaluation, {})[cell.seed] = seconds
    return by_run


def _cost(results: StudyResults) -> dict[str, Any]:
    """What the tasks took, with a core for each of their workers, and what they did in it."""
    study = results.study
    done = [each for each in results.trainings.values() if each.seconds is not None]
    solvers = [config["SOLVER"] for each in done if (config := each.read_config())]
    of_trainings = study.workers * sum(each.seconds for each in done)
    of_evaluations = sum(
        seconds * study.evaluations[cell.evaluation].workers
        for cell, seconds in results.seconds.items()
    )
    return {
        "minutes on a core": {"trainings": of_trainings / 60, "evaluations": of_evaluations / 60},
        "number": {"trainings": len(done), "evaluations": len(results.seconds)},
        "images trained on": sum(each["MAX_ITER"] * each["IMS_PER_BATCH"] for each in solvers),
    }


def _estimate_as_json(found: Estimate) -> dict[str, Any]:
    ends = found.to_json()
    return {
        "mean": ends["value"],
        "half_width_95": found.half_width if found.has_interval else None,
        "low_95": ends["low"],
        "high_95": ends["high"],
        "number": found.number,
        "interval over": found.over if found.has_interval else None,
    }


def _print(results: StudyResults, reading: Sequence[str]) -> None:
    """Each table, runs by columns, the longer of the two downwards; then the reading."""
    number = len(results.study.seeds)
    meaning = "one seed" if number == 1 else f"{number} seeds: mean ± half of the 95 % interval"
    over_images = "" if number == 1 else " over seeds and images"
    for table in _tables(results):
        # The modes of a probe, with an interval each, are too wide for a terminal.
        columns = [c for c in table.columns if not table.of_probe or not c[1].endswith(_MODES)]
        rows = [
            [run, *(_entry(results, run, metric, name) for _, metric, name in columns)]
            for run in results.study.runs
        ]
        rows = [row for row in rows if any(row[1:])]
        rows.insert(0, ["", *(header for header, _, _ in columns)])
        if len(columns) > len(results.study.runs):
            rows = list(zip(*rows, strict=True))
        over = over_images if table.of_probe else ""
        print(f"\n{table.title[0].upper()}{table.title[1:]}, {meaning}{over}\n")
        print(tabulate(rows, "firstrow", tablefmt="simple", disable_numparse=True))
    for sentence in (*(f"Warning: {each}" for each in warnings(results)), *reading):
        print(f"\n{sentence}")
