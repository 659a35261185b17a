"""BN201: a head that reads the other RoIs of its images."""

from __future__ import annotations

from collections.abc import Sequence

from ...heads import HEADS
from ...metrics import PROBE
from ..layers import LayerReport
from .finding import Evidence, Examined
from .fixes import of_head
from .rules import Found, Rule, register_finding


@register_finding(
    "BN201",
    measures="leakage in foreground accuracy (mask accuracy of a mask head; AP on detections)",
    threshold=1.0,
    unit="points",
)
def reads_its_batch(examined: Examined, rule: Rule) -> Found:
    for head, accuracy, ap in (("box", "accuracy", "box_ap"), ("mask", "mask_accuracy", "mask_ap")):
        prefix = HEADS[f"ROI_{head.upper()}_HEAD"].prefix
        layers = [layer for layer in examined.trained if layer.name.startswith(prefix)]
        if examined.probe is None or examined.probed("leakage", accuracy) is None or not layers:
            continue
        images = examined.probe["images_per_worker"]
        if images > 1 and any(layer.sharing == "image" for layer in layers):
            yield rule.note(
                f"The {head} head was trained with batches of one image. Leakage and inconsistency "
                f"are those of batches of {images} images (own_worker); compare own_image with the "
                "other modes.",
                layers,
            )
        reads = f"The {head} head reads the other RoIs of its images"
        yield from _judge(examined, rule, reads, layers, (accuracy, ap))
    if layers := examined.probed_layers:
        reads = "The detector reads the rest of its own images"
        yield from _judge(examined, rule, reads, layers, ("box_ap", "mask_ap"))


def _judge(
    examined: Examined,
    rule: Rule,
    reads: str,
    layers: Sequence[LayerReport],
    metrics: tuple[str, str],
) -> Found:
    found = {
        (kind, metric): estimate
        for kind in ("leakage", "inconsistency")
        for metric in metrics
        if (estimate := examined.probed(kind, metric)) is not None
    }
    leakage = found.get(("leakage", metrics[0]))
    if leakage is None or not leakage.exceeds(rule.threshold):
        return
    others = "as many RoIs" if examined.metrics is PROBE else "the RoIs or feature maps"
    than = {
        "leakage": f"{others} of random images",
        "inconsistency": "population statistics",
    }
    evidence = [
        Evidence(
            f"{examined.metrics[metric].capitalized}: {estimate.text(1)} points better with a "
            f"batch of its own images than with {than[kind]}",
            *(f"{kind}.{metric}", estimate, examined.metrics[metric].of_difference),
        )
        for (kind, metric), estimate in found.items()
    ]
    lost = found.get(("inconsistency", metrics[0]))
    if lost is not None and lost.high < 0:
        yield rule.note(
            f"{reads} ({evidence[0].text}), but population statistics "
            f"are better still, by {lost.scaled(-1).text(1)} points: the leak costs nothing.",
            layers,
        )
        return
    lost_ap = found.get(("inconsistency", "box_ap"))
    yield rule.finding(
        f"{reads} in its normalization batch.",
        layers,
        evidence,
        of_head(examined, layers),
        "Train again with batches that say nothing about an RoI's own image.",
        cost=lost_ap if lost_ap is not None and lost_ap.exceeds(0) else None,
    )
