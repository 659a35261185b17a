"""BN301: frozen layers that normalize nothing."""

from __future__ import annotations

from .finding import Evidence, Examined, count, distances
from .fixes import convert
from .rules import Found, Rule, register_finding


@register_finding(
    "BN301",
    symptom="FrozenBN trains badly or to NaN without pretrained weights.",
    measures="whether a frozen layer has mean 0, variance 1, weight 1 and bias 0",
)
def frozen_as_built(examined: Examined, rule: Rule) -> Found:
    initial = [layer for layer in examined.layers if not layer.trains and layer.is_initial]
    if initial:
        built = Evidence("mean 0, variance 1, weight 1 and bias 0 in all of them")
        yield rule.finding(
            f"{count(initial)} are frozen as they were built: they normalize nothing.",
            initial,
            [built, *distances(initial, "ema_to_precise")],
            {
                "MODEL": {"BACKBONE": {"FREEZE_AT": 0}},
                "BN": {"CONVERT": convert(examined, initial, "SyncBN")},
            },
            "Train them, or start from weights that have their statistics (MODEL.WEIGHTS).",
        )
