"""BN302: frozen statistics that are not those of the data."""

from __future__ import annotations

from ..layers import LayerReport
from .finding import Examined, by_distance, cost_of, count, distances, of_trial
from .fixes import convert
from .rules import Found, Rule, configured_rules, register_finding


@register_finding(
    "BN302",
    symptom="Low AP on images unlike those of the pretraining.",
    measures="EMA to precise, of frozen layers, whose statistics were those of training too",
    threshold=1.0,
    unit="standard deviations",
)
def frozen_of_other_data(examined: Examined, rule: Rule) -> Found:
    far, trial = frozen_far(examined, rule), examined.trials.get(rule.id)
    title = f"The frozen statistics of {count(far)} are of other data than they see"
    if far and trial is not None and not trial.gain.exceeds(0):
        yield rule.note(
            f"{title}, and it costs nothing that is certain: the layers after them were trained "
            f"so. {trial.text}.",
            far,
        )
    elif far:
        yield rule.finding(
            f"{title}.",
            far,
            [*of_trial(trial), *distances(far, "ema_to_precise")],
            {"BN": {"CONVERT": convert(examined, far, "SyncBN")}},
            "Without training, bn-detection recalibrate --mix auto --keep-if-better, with these "
            "layers in BN.MODULES, gives them statistics of these images; in the next training, "
            "let them follow the data.",
            cost=cost_of(trial),
        )
    margin = configured_rules(examined.cfg)["BN103"].threshold
    moved = [
        x for x in _measured(examined) if x.ema_to_precise and x.ema_to_precise.exceeds(margin)
    ]
    moved = [layer for layer in moved if layer not in far]
    if moved and (worst := moved[0].ema_to_precise):
        yield rule.note(
            f"The inputs of {count(moved)} have moved from their frozen statistics, "
            f"{moved[0].name} most, by {worst.text(2)} standard deviations. They were trained so.",
            moved,
        )


def frozen_far(examined: Examined, rule: Rule) -> list[LayerReport]:
    """The frozen layers whose inputs are far from their statistics, furthest first."""
    measured = _measured(examined)
    return [x for x in measured if x.ema_to_precise and x.ema_to_precise.exceeds(rule.threshold)]


def _measured(examined: Examined) -> list[LayerReport]:
    layers = (x for x in examined.layers if not (x.trains or x.is_initial or x.is_folded))
    return by_distance(layers, "ema_to_precise")
