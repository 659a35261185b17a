"""BN303: layers that look frozen, and normalize with their batch."""

from __future__ import annotations

from .finding import Evidence, Examined, count, named
from .fixes import convert
from .rules import Found, Rule, register_finding


@register_finding(
    "BN303",
    symptom="Frozen layers whose statistics move.",
    measures="whether requires_grad is False in a layer that normalizes with its batch",
)
def looks_frozen(examined: Examined, rule: Rule) -> Found:
    half = [layer for layer in examined.trained if layer.affine_frozen]
    if half:
        yield rule.finding(
            f"{count(half)} look frozen, but normalize with their mini-batch in training, and "
            "their running statistics move.",
            half,
            [Evidence("requires_grad is False for all their parameters")],
            {"BN": {"CONVERT": convert(examined, half, "FrozenBN")}},
            "Freeze the statistics with the parameters.",
        )
    still = [x for x in examined.trained if x.momentum == 0 and not x.is_initial]
    if still:
        yield rule.note(
            f"The momentum of {count(still)} is 0: in training their running statistics stay as "
            f"they are ({named(still)}).",
            still,
        )
