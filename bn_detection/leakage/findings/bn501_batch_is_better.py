"""BN501: a loss at inference that no other finding explains."""

from __future__ import annotations

from .finding import Evidence, Examined
from .rules import Found, Rule, register_finding


@register_finding(
    "BN501", measures="inconsistency in box AP", threshold=1.0, unit="points", residual=True
)
def batch_is_better(examined: Examined, rule: Rule) -> Found:
    lost = examined.probed("inconsistency", "box_ap")
    layers = [layer for layer in examined.trained if layer.name.startswith("roi_heads.")]
    if lost is not None and layers and lost.exceeds(rule.threshold):
        text = f"{examined.metrics['box_ap'].capitalized}: {lost.text(1)} points"
        yield rule.finding(
            "The second stage is better with the statistics of its batch than with population "
            "statistics, though these fit the data and it does not read its batch.",
            layers,
            [Evidence(text, "inconsistency.box_ap", lost, rule.unit)],
            {"BN": {"FREEZE": {"LAST_ITERS": 0.2}}},
            "End the training with population statistics.",
            cost=lost,
        )
