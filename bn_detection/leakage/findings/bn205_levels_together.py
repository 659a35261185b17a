"""BN205: FPN levels that are normalized together in training, and apart at inference."""

from __future__ import annotations

from typing import Any

from ..layers import LayerReport
from .finding import HARMLESS, Evidence, Examined, cost_of, count, of_trial
from .rules import Found, Rule, register_finding


@register_finding(
    "BN205",
    symptom="Good in train(), far worse in eval(), in a head on several FPN levels.",
    measures="whether levels share batches in training and have a population each at inference",
)
def levels_together(examined: Examined, rule: Rule) -> Found:
    layers, trial = together_in_training(examined), examined.trials.get(rule.id)
    title = (
        f"{count(layers)} normalize all FPN levels together in training, and each level with "
        "statistics of its own at inference"
    )
    if layers and trial is not None and trial.gain.high < HARMLESS:
        yield rule.note(f"{title}, and it costs nothing. {trial.text}.", layers)
    elif layers:
        keys = Evidence("BN.LEVELS.TRAIN is shared, BN.LEVELS.POPULATION separate")
        fix: dict[str, Any] = {"BN": {"LEVELS": {"TRAIN": "shared", "POPULATION": "shared"}}}
        if examined.cfg.MODEL.META_ARCHITECTURE == "BNRetinaNet":
            fix = {"MODEL": {"META_ARCHITECTURE": "BNRetinaNet"}, **fix}
        yield rule.finding(
            f"{title}.",
            layers,
            [*of_trial(trial), keys],
            fix,
            "Give inference the levels that training has (row 1 of Table 5; this is row 2). For "
            "this checkpoint, bn-detection recalibrate with BN.LEVELS.POPULATION shared does it "
            "without training.",
            cost=cost_of(trial),
        )


def together_in_training(examined: Examined) -> list[LayerReport]:
    """The layers whose levels are together in training and apart at inference."""
    return [x for x in examined.trained if x.level_populations and examined.uses_population(x)]
