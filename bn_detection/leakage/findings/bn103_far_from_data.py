"""BN103: running statistics that are not those of the data."""

from __future__ import annotations

from collections.abc import Sequence

from ...estimate import Estimate
from ...norm import matches
from ..layers import LayerReport
from .bn202_levels_apart import levels_differ
from .finding import Examined, by_distance, count, distances
from .fixes import of_population
from .rules import Found, Rule, configured_rules, register_finding, used

# What the probe's box AP depends on.
_BOX = ("roi_heads.box_head.", "roi_heads.box_predictor.")


@register_finding(
    "BN103",
    symptom="Good in train(), bad in eval(); or the AP jumps from one evaluation to the next.",
    measures="EMA to precise, of layers that normalize with their batch in training",
    threshold=0.25,
    unit="standard deviations",
)
def far_from_data(examined: Examined, rule: Rule) -> Found:
    cfg = examined.cfg
    # Precise statistics do not fix one population for levels that are normalized apart.
    levels = configured_rules(cfg)["BN202"]
    far = [
        layer
        for layer in examined.trained
        if layer.ema_to_precise is not None
        and layer.ema_to_precise.exceeds(rule.threshold)
        and not layer.is_initial
        and not (layer.level_batches and levels_differ(layer, levels))
    ]
    if cfg.BN.FREEZE.LAST_ITERS is not None:
        globs = list(cfg.BN.FREEZE.MODULES or cfg.BN.MODULES)
        frozen = [x for x in examined.trained if matches(x.name, globs)]
        yield rule.note(
            f"BN.FREEZE ends the training with {len(frozen)} layers that keep their statistics, so "
            "it is no matter how far these are from those of the data.",
            frozen,
        )
        far = [layer for layer in far if layer not in frozen]
    far, notes = used(
        examined, by_distance(far, "ema_to_precise"), "are far from those of the data", rule
    )
    yield from notes
    if far:
        yield rule.finding(
            f"The running statistics of {count(far)} are far from those of the data.",
            far,
            distances(far, "ema_to_precise"),
            of_population(examined, far),
            "Estimate the population statistics anew at each evaluation, and at the end of the "
            "next training. For this checkpoint, bn-detection recalibrate --keep-if-better does it "
            "without training.",
            cost=_cost(examined, far),
        )


def _cost(examined: Examined, far: Sequence[LayerReport]) -> Estimate | None:
    cost = examined.probed("staleness", "box_ap")
    if cost is None or not any(x.name.startswith(_BOX) for x in far):
        return None
    return cost if cost.exceeds(0) else None
