"""BN401: layers with many channels that carry nothing."""

from __future__ import annotations

from .finding import SHOWN, Evidence, Examined, count, named
from .rules import Found, Rule, register_finding


@register_finding(
    "BN401",
    symptom="The loss stops falling early, and many features are zero.",
    measures="the share of a layer's channels without variance or weight",
    threshold=0.25,
    unit="of the channels",
)
def dead_channels(examined: Examined, rule: Rule) -> Found:
    dead = [layer for layer in examined.layers if layer.dead]
    many = [x for x in dead if x.trains and len(x.dead) >= rule.threshold * x.channels]
    if many:
        solver = examined.cfg.SOLVER
        without_weight = sum(len(layer.dead_weights) for layer in many)
        is_most = 2 * without_weight >= sum(len(layer.dead) for layer in many)
        by_decay = solver.WEIGHT_DECAY_NORM > 0 and is_most
        yield rule.finding(
            f"A large part of the channels of {count(many)} is dead.",
            many,
            [
                Evidence(
                    f"{layer.name}: {len(layer.dead)} of {layer.channels} channels without "
                    "variance or weight",
                    *("dead", len(layer.dead) / layer.channels, rule.unit, layer.name),
                )
                for layer in many[:SHOWN]
            ],
            {"SOLVER": {"WEIGHT_DECAY_NORM": 0.0} if by_decay else {"BASE_LR": solver.BASE_LR / 2}},
            "Do not decay their weights." if by_decay else "Train with a lower learning rate.",
        )
    few = [layer for layer in dead if layer not in many]
    if few:
        channels = sum(len(layer.dead) for layer in few)
        yield rule.note(
            f"{channels} of {sum(layer.channels for layer in few)} channels of {count(few)} are "
            f"dead, without variance or weight ({named(few)}).",
            few,
        )
