"""BN101: running statistics that no data have."""

from __future__ import annotations

from .finding import SHOWN, Evidence, Examined, count
from .fixes import of_population
from .rules import Found, Rule, register_finding


@register_finding(
    "BN101",
    symptom="NaN, or no detections, in eval() alone.",
    measures="channels whose variance is negative, or whose statistics are not finite",
)
def impossible(examined: Examined, rule: Rule) -> Found:
    layers = [layer for layer in examined.layers if layer.impossible]
    if layers:
        yield rule.finding(
            f"The statistics of {count(layers)} are impossible: inference gives no numbers.",
            layers,
            [
                Evidence(
                    f"{layer.name}: {len(layer.impossible)} of {layer.channels} channels have a "
                    "negative variance, or statistics that are not finite",
                    *("impossible", len(layer.impossible), "channels", layer.name),
                )
                for layer in layers[:SHOWN]
            ],
            of_population(examined, layers),
            "Estimate them anew; bn-detection recalibrate does it without training.",
        )
