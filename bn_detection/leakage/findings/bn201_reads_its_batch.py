"""BN201: a head that reads the other RoIs of its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...metrics import PROBE
from ..by_layer import LayerLeakage
from ..layers import LayerReport
from .finding import Evidence, Examined, named, names_of
from .fixes import of_head
from .rules import Found, Rule, register_finding

_HEADS = (
    ("box", "accuracy", "box_ap"),
    ("mask", "mask_accuracy", "mask_ap"),
    ("keypoint", "keypoint_accuracy"),
)
_HOW = {
    "removed": "are gone with the RoIs of random images in the batch of this layer",
    "alone": "are there with those of its own images in the batch of this layer alone",
}
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
    for head, *metrics in _HEADS:
        accuracy = metrics[0]
        layers = [layer for layer in examined.trained if _head_of(layer.name) == head]
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


def _head_of(name: str) -> str | None:
    """The head that a layer belongs to; that of boxes has what is shared, or between the others."""
    if not name.startswith("roi_heads."):
        return None
    other = (head for head, *_ in _HEADS if name.startswith(f"roi_heads.{head}_head."))
    return next(other, "box")


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
    carriers = _carriers(examined, layers, metrics[0], rule.threshold)
    title = f"{reads} in its normalization batch."
    some = carriers != list(layers)
    yield rule.finding(
        f"{title} {_through(carriers, layers)}" if some else title,
        carriers,
        [*evidence, *_by_layer(examined, carriers, metrics[0])],
        of_head(examined, carriers, layers),
        "Train again with batches that say nothing about an RoI's own image."
        + (_AGAIN if some else ""),
        cost=lost_ap if lost_ap is not None and lost_ap.exceeds(0) else None,
    )


def _carriers(
    examined: Examined, layers: Sequence[LayerReport], metric: str, margin: float
) -> list[LayerReport]:
    """The layers that the leak comes through; all, where that is not known."""
    leaking = {x.name for x in examined.by_layer if _leaks(x, metric, margin)}
    return [layer for layer in layers if layer.name in leaking] or list(layers)


def _leaks(layer: LayerLeakage, metric: str, margin: float) -> bool:
    """In all stages of a cascade together, or in one."""
    return any(layer.leaks(m, margin) for m in layer.removed if m.partition("_stage")[0] == metric)


def _through(carriers: Sequence[LayerReport], layers: Sequence[LayerReport]) -> str:
    return f"It does so through {len(carriers)} of its {len(layers)} layers: {named(carriers)}."


def _by_layer(
    examined: Examined, carriers: Sequence[LayerReport], metric: str
) -> Iterator[Evidence]:
    names = names_of(carriers)
    for layer in (x for x in examined.by_layer if x.name in names):
        for name in (m for m in layer.removed if m.partition("_stage")[0] == metric):
            for kind, how in _HOW.items():
                estimate = getattr(layer, kind)[name]
                yield Evidence(
                    f"{layer.name}: {estimate.text(1)} points of {PROBE[name].name} {how}",
                    f"by_layer.{kind}.{name}",
                    estimate,
                    PROBE[name].of_difference,
                    layer.name,
                )
