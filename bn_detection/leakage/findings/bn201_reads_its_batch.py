"""BN201: a head that reads the other RoIs of its images."""

from __future__ import annotations

from collections.abc import Sequence

from ...metrics import PROBE
from ..layers import LayerReport
from .carriers import HEADS, carriers_of, evidence_by_layer, head_of, through
from .finding import Evidence, Examined
from .fixes import of_head
from .rules import Found, Rule, register_finding

_AGAIN = (
    " These are the layers that carry the leak of this checkpoint; the others can learn to: "
    "probe again after the training."
)


@register_finding(
    "BN201",
    symptom="Good in train(), bad in eval(), worst with one image a GPU.",
    measures="leakage in foreground accuracy (mask, keypoint accuracy; AP on detections)",
    threshold=1.0,
    unit="points",
)
def reads_its_batch(examined: Examined, rule: Rule) -> Found:
    for head, *metrics in HEADS:
        accuracy = metrics[0]
        layers = [layer for layer in examined.trained if head_of(layer.name) == head]
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
        yield from _judge(examined, rule, reads, layers, metrics)
    if layers := examined.probed_layers:
        reads = "The detector reads the rest of its own images"
        yield from _judge(examined, rule, reads, layers, ("box_ap", "mask_ap"))


def _judge(
    examined: Examined,
    rule: Rule,
    reads: str,
    layers: Sequence[LayerReport],
    metrics: Sequence[str],
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
    carriers = carriers_of(examined, layers, metrics[0], rule.threshold)
    title = f"{reads} in its normalization batch."
    some = carriers != list(layers)
    yield rule.finding(
        f"{title} {through(carriers, layers)}" if some else title,
        carriers,
        [*evidence, *evidence_by_layer(examined, carriers, metrics[0])],
        of_head(examined, carriers, layers),
        "Train again with batches that say nothing about an RoI's own image. That gains about the "
        "cost if the training is long enough to learn the class without its batch, else less; "
        "BN.INFERENCE batch gives this checkpoint back what it read." + (_AGAIN if some else ""),
        cost=lost_ap if lost_ap is not None and lost_ap.exceeds(0) else None,
    )
