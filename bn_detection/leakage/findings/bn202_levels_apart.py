"""BN202: FPN levels that are normalized apart in training, and together at inference."""

from __future__ import annotations

from typing import Any

from ..layers import LayerReport
from .finding import HARMLESS, Examined, by_distance, cost_of, count, distances, of_trial
from .fixes import convert, without_batch
from .rules import Found, Rule, register_finding


@register_finding(
    "BN202",
    symptom="AP was lost when GN became BN in a head on several FPN levels.",
    measures="levels apart, of layers for which each level is a batch in training",
    threshold=0.25,
    unit="standard deviations",
)
def levels_apart(examined: Examined, rule: Rule) -> Found:
    separate, trial = apart_in_training(examined, rule), examined.trials.get(rule.id)
    title = (
        f"{count(separate)} normalize each FPN level by itself in training, and all levels "
        "with the same statistics at inference"
    )
    if separate and trial is not None and trial.gain.high < HARMLESS:
        yield rule.note(f"{title}, and it costs nothing. {trial.text}.", separate)
    elif separate:
        norm = without_batch(separate)
        fix: dict[str, Any] = {"BN": {"CONVERT": convert(examined, separate, norm)}}
        if examined.cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "BNRetinaNet"):
            fix = {
                "MODEL": {"META_ARCHITECTURE": "BNRetinaNet"},
                "BN": {"LEVELS": {"TRAIN": "separate", "POPULATION": "separate"}},
            }
        yield rule.finding(
            f"{title}.",
            separate,
            [*of_trial(trial), *distances(separate, "levels_apart")],
            fix,
            "Give each level the statistics at inference that it has in training.",
            cost=cost_of(trial),
        )
    together = [x for x in _apart(examined, rule) if not x.level_batches]
    if together and (worst := together[0].levels_apart):
        yield rule.note(
            f"FPN levels differ in {count(together)}, {together[0].name} most, by {worst.text(2)} "
            "standard deviations. Training and inference both normalize them together.",
            together,
        )


def apart_in_training(examined: Examined, rule: Rule) -> list[LayerReport]:
    """The layers whose levels are apart in training and together at inference, worst first."""
    apart = _apart(examined, rule)
    return [x for x in apart if x.level_batches and examined.uses_population(x)]


def _apart(examined: Examined, rule: Rule) -> list[LayerReport]:
    apart = (layer for layer in examined.layers if levels_differ(layer, rule))
    return by_distance(apart, "levels_apart")


def levels_differ(layer: LayerReport, rule: Rule) -> bool:
    """Whether the levels of a layer are further apart than this rule allows."""
    return layer.levels_apart is not None and layer.levels_apart.exceeds(rule.threshold)
