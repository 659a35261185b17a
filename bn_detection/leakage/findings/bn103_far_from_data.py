"""BN103: running statistics that are not those of the data."""

from __future__ import annotations

from ...norm import matches
from ..layers import LayerReport
from .bn202_levels_apart import levels_differ
from .finding import HARMLESS, Examined, by_distance, cost_of, count, distances, of_trial
from .fixes import of_population
from .rules import Found, Rule, configured_rules, register_finding, used


@register_finding(
    "BN103",
    symptom="Good in train(), bad in eval(); or the AP jumps from one evaluation to the next.",
    measures="EMA to precise, of layers that normalize with their batch in training",
    threshold=0.25,
    unit="standard deviations",
)
def far_from_data(examined: Examined, rule: Rule) -> Found:
    if examined.cfg.BN.FREEZE.LAST_ITERS is not None:
        frozen = _frozen_at_the_end(examined)
        yield rule.note(
            f"BN.FREEZE ends the training with {len(frozen)} layers that keep their statistics, so "
            "it is no matter how far these are from those of the data.",
            frozen,
        )
    far, notes = used(examined, stale(examined, rule), "are far from those of the data", rule)
    yield from notes
    trial = examined.trials.get(rule.id)
    title = f"The running statistics of {count(far)} are far from those of the data"
    if far and trial is not None and trial.gain.high < HARMLESS:
        yield rule.note(f"{title}, and it costs nothing. {trial.text}.", far)
    elif far:
        yield rule.finding(
            f"{title}.",
            far,
            [*of_trial(trial), *distances(far, "ema_to_precise")],
            of_population(examined, far),
            "Estimate the population statistics anew at each evaluation, and at the end of the "
            "next training. For this checkpoint, bn-detection recalibrate --keep-if-better does it "
            "without training.",
            cost=cost_of(trial),
        )


def stale(examined: Examined, rule: Rule) -> list[LayerReport]:
    """The layers whose running statistics are far from those of the data, furthest first."""
    # Precise statistics do not fix one population for levels that are normalized apart.
    levels = configured_rules(examined.cfg)["BN202"]
    frozen = _frozen_at_the_end(examined)
    far = (
        layer
        for layer in examined.trained
        if layer.ema_to_precise is not None
        and layer.ema_to_precise.exceeds(rule.threshold)
        and not layer.is_initial
        and not (layer.level_batches and levels_differ(layer, levels))
        and layer not in frozen
    )
    return by_distance(far, "ema_to_precise")


def _frozen_at_the_end(examined: Examined) -> list[LayerReport]:
    node = examined.cfg.BN
    if node.FREEZE.LAST_ITERS is None:
        return []
    globs = list(node.FREEZE.MODULES or node.MODULES)
    return [layer for layer in examined.trained if matches(layer.name, globs)]
