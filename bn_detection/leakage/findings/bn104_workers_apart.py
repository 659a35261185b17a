"""BN104: workers that evaluate with statistics of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..layers import LayerReport
from .finding import SHOWN, Evidence, Examined, count, named, names_of
from .fixes import convert
from .rules import Found, Rule, register_finding


@register_finding(
    "BN104",
    symptom="Ranks differ: each worker detects something else in the same image.",
    measures="the expected distance between the statistics of two workers",
    threshold=0.1,
    unit="standard deviations",
)
def workers_apart(examined: Examined, rule: Rule) -> Found:
    cfg = examined.cfg
    by_fvcore = cfg.BN.POPULATION.ESTIMATOR == "fvcore" or cfg.TEST.PRECISE_BN.ENABLED
    if examined.workers == 1 or (examined.averages_workers and not by_fvcore):
        return
    layers = [x for x in examined.trained if not x.spans_workers and examined.uses_population(x)]
    layers = [x for x in layers if x.batch_to_precise and x.batch_to_precise.has_interval]
    joined = [layer for layer in layers if layer.joins_workers]
    if joined and any(layer.spans_workers for layer in examined.trained):
        yield rule.note(
            f"How far two workers are apart is unknown for {count(joined)}: they were measured "
            f"with the images of all workers together ({named(joined)}).",
            joined,
        )
        layers = [layer for layer in layers if layer not in joined]
    if by_fvcore:
        title = "Detectron2's PreciseBN gives each worker statistics of its own images"
        shares: Mapping[str, float] = dict.fromkeys(names_of(layers), 1 / _batches(examined))
    else:
        layers = [layer for layer in layers if not layer.is_ours and layer.momentum]
        title = "Each worker evaluates with its own running statistics"
        shares = {x.name: x.momentum / (2 - x.momentum) for x in layers if x.momentum}
    spreads = {
        layer.name: layer.batch_to_precise.scaled(math.sqrt(2 * shares[layer.name]))
        for layer in layers
        if layer.batch_to_precise
    }
    layers.sort(key=lambda layer: spreads[layer.name].value, reverse=True)
    apart = [layer for layer in layers if spreads[layer.name].exceeds(rule.threshold)]
    if apart:
        yield rule.finding(
            f"{title}, and the checkpoint has those of worker 0.",
            apart,
            [
                Evidence(
                    f"{name}: two workers are expected {spreads[name].text(2)} standard "
                    "deviations apart, by the scatter of their batches",
                    *("workers_apart", spreads[name], rule.unit, name),
                )
                for name in names_of(apart[:SHOWN])
            ],
            _fix(examined, layers, by_fvcore),
            "Give all workers the same statistics. tools/train_net.py of bn_detection also "
            "averages those of BN over the workers.",
        )
    elif layers:
        worst = layers[0].name
        yield rule.note(
            f"{title}; those of two workers are about {spreads[worst].value:.2f} standard "
            f"deviations apart in {worst}, and less in others.",
            layers,
        )


def _batches(examined: Examined) -> int:
    """Of PreciseBN, on each worker."""
    cfg = examined.cfg
    if cfg.BN.POPULATION.ESTIMATOR != "fvcore":
        return int(cfg.TEST.PRECISE_BN.NUM_ITER)
    return max(int(cfg.BN.POPULATION.NUM_SAMPLES // cfg.SOLVER.IMS_PER_BATCH), 1)


def _fix(examined: Examined, layers: list[LayerReport], by_fvcore: bool) -> dict[str, Any]:
    if not by_fvcore:
        return {"BN": {"CONVERT": convert(examined, layers, "SyncBN")}}
    precise = {"POPULATION": {"ESTIMATOR": "pooled"}}
    return {"TEST": {"PRECISE_BN": {"ENABLED": False}}, "BN": precise}
