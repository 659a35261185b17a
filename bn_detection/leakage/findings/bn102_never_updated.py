"""BN102: running statistics that are those that the layer was built with."""

from __future__ import annotations

from .finding import Evidence, Examined, count, distances, named
from .fixes import of_population
from .rules import Found, Rule, register_finding, used


@register_finding(
    "BN102",
    symptom="Good in train(), as bad as random weights in eval().",
    measures="whether all running means are 0 and all running variances 1",
)
def never_updated(examined: Examined, rule: Rule) -> Found:
    built = [layer for layer in examined.trained if layer.is_initial]
    initial, notes = used(examined, built, "were never updated", rule)
    yield from notes
    if initial:
        evidence = [Evidence("all running means are 0 and all running variances 1")]
        still = sum(layer.momentum == 0 for layer in initial)
        if still:
            text = f"the momentum of {still} of them is 0: they never move"
            evidence.append(Evidence(text, "momentum_0", still, "layers"))
        yield rule.finding(
            f"The statistics of {count(initial)} were never updated: inference normalizes with "
            "those that the layers were built with.",
            initial,
            [*evidence, *distances(initial, "ema_to_precise")],
            of_population(examined, initial),
            "Estimate the population statistics of the weights that there are.",
        )
    uncounted = [x for x in examined.trained if x.updates == 0 and not x.is_initial]
    if uncounted:
        yield rule.note(
            f"{count(uncounted)} have statistics, but counted no step of training: they come "
            f"from a checkpoint without counters ({named(uncounted)}).",
            uncounted,
        )
