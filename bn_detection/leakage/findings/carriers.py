"""The heads that can leak, and the layers that a leak comes through, where that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...metrics import PROBE
from ..by_layer import LayerLeakage
from ..layers import LayerReport
from .finding import Evidence, Examined, named, names_of

HEADS = (
    ("box", "accuracy", "box_ap"),
    ("mask", "mask_accuracy", "mask_ap"),
    ("keypoint", "keypoint_accuracy"),
)
"""Heads, with their accuracy, and AP if there is one."""

_HOW = {
    "removed": "are gone with the RoIs of random images in the batch of this layer",
    "alone": "are there with those of its own images in the batch of this layer alone",
}


def head_of(name: str) -> str | None:
    """The head that a layer belongs to; that of boxes has what is shared, or between the others."""
    if not name.startswith("roi_heads."):
        return None
    other = (head for head, *_ in HEADS if name.startswith(f"roi_heads.{head}_head."))
    return next(other, "box")


def carriers_of(
    examined: Examined, layers: Sequence[LayerReport], metric: str, margin: float
) -> list[LayerReport]:
    """The layers that the leak comes through; all, where that is not known."""
    leaking = {x.name for x in examined.by_layer if _leaks(x, metric, margin)}
    return [layer for layer in layers if layer.name in leaking] or list(layers)


def _leaks(layer: LayerLeakage, metric: str, margin: float) -> bool:
    """In all stages of a cascade together, or in one."""
    return any(layer.leaks(m, margin) for m in layer.removed if m.partition("_stage")[0] == metric)


def through(carriers: Sequence[LayerReport], layers: Sequence[LayerReport]) -> str:
    """Which of the layers of a head the leak comes through, in a sentence."""
    return f"It does so through {len(carriers)} of its {len(layers)} layers: {named(carriers)}."


def evidence_by_layer(
    examined: Examined, carriers: Sequence[LayerReport], metric: str
) -> Iterator[Evidence]:
    """What is gone without each of the layers, and what there is through it alone."""
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
