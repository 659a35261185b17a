"""A reading of a study's table that says only what its intervals support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .estimates import Estimate, paired_difference
from .figures import fewer_seeds, in_words
from .results import BOX_AP, HEADLINES, LEAKAGES, PHASES, StudyResults, unit

_MOST_NAMED = 8
_ENOUGH_SEEDS = 3


def warnings(results: StudyResults) -> list[str]:
    """What must be known before any of the intervals is read, and what to do about it."""
    seeds = results.study.seeds
    done = {seed for of in results.metrics.values() for each in of.values() for seed in each}
    if not done or min(len(done), len(seeds)) >= _ENOUGH_SEEDS:
        return []
    if len(done) == 1:
        what = (
            "One seed supports no statement about a difference between runs or evaluations: each "
            "may be chance."
        )
    else:
        what = (
            "Two seeds support next to no statement: an interval over two is 12.7 standard errors "
            "to each side, over three 4.3."
        )
    if len(seeds) >= _ENOUGH_SEEDS:
        return [f"{what} The other seeds are not done: the same command goes on."]
    more = [*seeds, *range(max(seeds) + 1, max(seeds) + 3)][:_ENOUGH_SEEDS]
    return [f"{what} Add seeds: --seeds {' '.join(map(str, more))}; what is done is kept."]


def read_results(results: StudyResults) -> list[str]:
    """Say in sentences what can be told from chance, and what cannot.

    Runs are compared with the baseline under the same evaluation; box AP of a run under other
    evaluations with that under the first; leakage and inconsistency with zero. A difference is
    told where its 95 % interval excludes zero, and no correction is made for their number, which
    is stated.

    Args:
        results: of the study.

    Returns:
        The sentences, one or more a comparison.
    """
    sentences = [*_missing(results)]
    comparisons = _Comparisons()
    if len(results.study.seeds) > 1:
        sentences += _runs(results, comparisons)
        sentences += _evaluations(results, comparisons)
        if comparisons.of_one_seed:
            sentences.append(
                "Differences that are of one seed only, and so tell nothing: "
                f"{comparisons.of_one_seed:,}."
            )
    sentences += _leakages(results, comparisons)
    if comparisons.number > 1:
        sentences.append(
            f"{comparisons.number:,} differences were compared with zero, each by its own 95 % "
            f"interval: if none were real, about {comparisons.number * 0.05:.1f} would be told by "
            "chance."
        )
    return sentences


class _Comparisons:
    """Counts what was compared, and sorts it by what its interval says.

    Attributes:
        number: of what chance could have told from zero: not what is zero in every seed.
        of_one_seed: number of what has no interval.
    """

    def __init__(self) -> None:
        self.number = self.of_one_seed = 0

    def sort(self, found: dict[str, Estimate]) -> dict[int, list[str]]:
        """The names whose estimates are above zero (1), below (-1), or open (0)."""
        told: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for name, estimate in found.items():
            if estimate.sign is not None:
                self.number += (estimate.low, estimate.high) != (0, 0)
                told[estimate.sign].append(name)
            elif estimate.number == 1:
                self.of_one_seed += 1
        return told


def _missing(results: StudyResults) -> Iterator[str]:
    study = results.study
    expected = [
        (run, name, seed)
        for name, evaluation in study.evaluations.items()
        for run in evaluation.runs
        for seed in study.seeds
    ]
    missing = [
        place
        for place in expected
        if place[2] not in results.metrics.get(place[0], {}).get(place[1], {})
    ]
    if missing:
        yield (
            f"{len(missing):,} of {len(expected):,} results are missing; means are over the seeds "
            "that are there."
        )
    undefined = sum(
        not measured.is_known
        for metric in HEADLINES
        for place in results.values.get(metric, {}).values()
        for measured in place.values()
    )
    if undefined:
        yield f"{undefined:,} numbers are undefined and left out of the means."


def _runs(results: StudyResults, comparisons: _Comparisons) -> Iterator[str]:
    """Each run against the baseline."""
    study = results.study
    others = [run for run in study.runs if run != study.baseline]
    for metric in HEADLINES:
        if metric in LEAKAGES:
            continue
        for name in results.evaluations(metric):
            found = {run: results.difference(metric, run, name) for run in others}
            told = comparisons.sort(found)
            where = f"{metric} in the {name}" if name in PHASES else f'{metric} under "{name}"'
            signed = {run: _signed(results, found[run], metric) for run in others}
            parts = _parts(told, signed, f"{study.baseline}'s")
            if parts:
                yield f"{where[0].upper()}{where[1:]}: {'; '.join(parts)}."


def _evaluations(results: StudyResults, comparisons: _Comparisons) -> Iterator[str]:
    """Box AP of each run under its evaluations, against the first of them."""
    study, names = results.study, results.evaluations(BOX_AP)
    runs = [*study.runs] if len(study.runs) <= _MOST_NAMED else [study.baseline]
    for run in runs:
        own = [name for name in names if results.by_seed(BOX_AP, run, name)]
        if len(own) < 2:
            continue
        reference = results.by_seed(BOX_AP, run, own[0])
        found = {
            f'"{name}"': paired_difference(results.by_seed(BOX_AP, run, name), reference)
            for name in own[1:]
        }
        told = comparisons.sort(found)
        signed = {name: _signed(results, found[name], BOX_AP) for name in found}
        parts = _parts(told, signed, f'that under "{own[0]}"')
        if parts:
            yield f"Box AP of {run}: {'; '.join(parts)}."
    if len(names) > 1 and len(runs) < len(study.runs):
        others = len(study.runs) - len(runs)
        yield f"The evaluations of the {others:,} other runs are not compared with each other here."


def _leakages(results: StudyResults, comparisons: _Comparisons) -> Iterator[str]:
    """Leakage and inconsistency of each run, against zero."""
    for metric in LEAKAGES:
        for name in results.evaluations(metric):
            found = {run: results.estimate(metric, run, name) for run in results.study.runs}
            told = comparisons.sort(found)
            signed = {run: _signed(results, found[run], metric) for run in found}
            parts = _parts(told, signed, "zero")
            if parts:
                where = f'{metric[0].upper()}{metric[1:]} under "{name}"'
                yield f"{where} ({_scope(found)}): {'; '.join(parts)}."


def _scope(found: dict[str, Estimate]) -> str:
    """What the intervals are over; by name, where it is not the same for all."""
    names: dict[str, list[str]] = {}
    for name, estimate in found.items():
        if estimate.has_interval:
            names.setdefault(estimate.over, []).append(name)
    words = {"images": "images, for the weights of one seed"}
    parts = [
        f"{words.get(over, over)}{f' of {_named(of)}' if len(names) > 1 else ''}"
        for over, of in names.items()
    ]
    return f"intervals over {'; over '.join(parts)}"


def _parts(told: dict[int, list[str]], signed: dict[str, str], reference: str) -> list[str]:
    parts = []
    for sign, verb in ((1, "above"), (-1, "below")):
        if told[sign]:
            number = "is" if len(told[sign]) == 1 else "are"
            named = _named([f"{name} ({signed[name]})" for name in told[sign]])
            parts.append(f"{named} {number} {verb} {reference}")
    if told[0]:
        named = _named([f"{name} ({signed[name]})" for name in told[0]])
        parts.append(f"{named} cannot be told from {reference}")
    return parts


def _named(names: Sequence[str]) -> str:
    shown = list(names[:_MOST_NAMED])
    if (more := len(names) - _MOST_NAMED) > 0:
        shown.append(names[-1] if more == 1 else f"{more:,} others")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _signed(results: StudyResults, found: Estimate, metric: str) -> str:
    """A difference with its sign and interval, such as "+15.0 ± 1.9 points, 2 of 3 seeds"."""
    if not found.is_known:
        return "undefined"
    points = "points" if unit(metric) == "%" else unit(metric)
    text = f"{'+' if found.value > 0 else ''}{in_words(found)} {points}"
    fewer = fewer_seeds(results, found)
    return f"{text}{fewer and ', '}{fewer}".replace("-", "\N{MINUS SIGN}")
