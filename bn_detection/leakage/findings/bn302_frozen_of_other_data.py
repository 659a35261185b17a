"""BN302: frozen statistics that are not those of the data."""

from __future__ import annotations

from .finding import Examined, by_distance, count, distances
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
    measured = by_distance(
        (x for x in examined.layers if not (x.trains or x.is_initial or x.is_folded)),
        "ema_to_precise",
    )
    far = [x for x in measured if x.ema_to_precise and x.ema_to_precise.exceeds(rule.threshold)]
    if far:
        yield rule.finding(
            f"The frozen statistics of {count(far)} are of other data than they see.",
            far,
            distances(far, "ema_to_precise"),
            {"BN": {"CONVERT": convert(examined, far, "SyncBN")}},
            "Let the layers follow the data in training; or, without training, bn-detection "
            "recalibrate --mix auto --keep-if-better.",
        )
    margin = configured_rules(examined.cfg)["BN103"].threshold
    moved = [x for x in measured if x.ema_to_precise and x.ema_to_precise.exceeds(margin)]
    moved = [layer for layer in moved if layer not in far]
    if moved and (worst := moved[0].ema_to_precise):
        yield rule.note(
            f"The inputs of {count(moved)} have moved from their frozen statistics, "
            f"{moved[0].name} most, by {worst.text(2)} standard deviations. They were trained so.",
            moved,
        )
