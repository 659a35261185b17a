"""BN302: frozen statistics that are not those of the data."""

from __future__ import annotations

from ..layers import LayerReport
from .finding import Examined, by_distance, cost_of, count, distances, of_trial
from .fixes import convert
from .rules import Found, Rule, configured_rules, register_finding


@register_finding(
    "BN302",
    symptom="Low AP on images unlike those of the pretraining.",
    measures="EMA to precise, of frozen layers, where their cure was not tried",
    threshold=1.0,
    unit="standard deviations",
)
def frozen_of_other_data(examined: Examined, rule: Rule) -> Found:
    moved, trial = frozen_far(examined, rule), examined.trials.get(rule.id)
    far = [x for x in moved if x.ema_to_precise and x.ema_to_precise.exceeds(rule.threshold)]
    layers = far if trial is None else moved
    title = f"The frozen statistics of {count(layers)} are of other data than they see"
    if trial is not None and not trial.gain.exceeds(0):
        yield rule.note(
            f"{title}, and it costs nothing that is certain: the layers after them were trained "
            f"so. {trial.text}.",
            layers,
        )
    elif layers:
        yield rule.finding(
            f"{title}.",
            layers,
            [*of_trial(trial), *distances(layers, "ema_to_precise")],
            {"BN": {"CONVERT": convert(examined, layers, "SyncBN")}},
            "Without training, bn-detection recalibrate --mix auto --keep-if-better, with these "
            "layers in BN.MODULES, gives them statistics of these images; in the next training, "
            "let them follow the data.",
            cost=cost_of(trial),
        )
    near = [layer for layer in moved if layer not in layers]
    if near and (worst := near[0].ema_to_precise):
        yield rule.note(
            f"The inputs of {count(near)} have moved from their frozen statistics, "
            f"{near[0].name} most, by {worst.text(2)} standard deviations. That is no loss where "
            "they were trained so.",
            near,
        )


def frozen_far(examined: Examined, rule: Rule) -> list[LayerReport]:
    """The frozen layers whose inputs have moved from their statistics, furthest first."""
    margin = configured_rules(examined.cfg)["BN103"].threshold
    layers = (x for x in examined.layers if not (x.trains or x.is_initial or x.is_folded))
    measured = by_distance(layers, "ema_to_precise")
    return [x for x in measured if x.ema_to_precise and x.ema_to_precise.exceeds(margin)]
