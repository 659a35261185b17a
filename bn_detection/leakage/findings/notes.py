"""BN203, BN204, BN901 and BN902: what is worth knowing of a model and hurts nobody by itself."""

from __future__ import annotations

from .finding import Examined, count, named
from .rules import Found, Rule, register_finding


@register_finding("BN203", measures="images in a normalization batch", severity="note")
def one_image(examined: Examined, rule: Rule) -> Found:
    single = [x for x in examined.trained if x.rows == "images" and x.rows_per_batch == 1]
    if single:
        yield rule.note(
            f"{count(single)} normalize the feature map of a single image in training "
            f"({named(single)}). If BN in place of FrozenBN lost AP, this is likely why: "
            "BN.CONVERT to FrozenBN or SyncBN.",
            single,
        )


@register_finding("BN204", measures="whether BN.INFERENCE is batch", severity="note")
def other_images(examined: Examined, rule: Rule) -> Found:
    if examined.cfg.BN.INFERENCE == "batch":
        yield rule.note(
            "BN.INFERENCE is batch: what is detected in an image depends on the images that are "
            "evaluated with it."
        )


@register_finding("BN901", measures="whether distances have intervals", severity="note")
def one_batch(examined: Examined, rule: Rule) -> Found:
    measured = examined.layers
    once = [x for x in measured if x.ema_to_precise and not x.ema_to_precise.has_interval]
    if once:
        yield rule.note(
            f"{count(once)} were measured on one batch, which gives distances without intervals: "
            f"no finding can rest on them ({named(once)}).",
            once,
        )


@register_finding("BN902", measures="keys of the config that nobody here knows", severity="note")
def unknown_keys(examined: Examined, rule: Rule) -> Found:
    if examined.unknown_keys:
        yield rule.note(
            "The config has keys that neither Detectron2 nor bn_detection knows, which changed "
            f"nothing here: {', '.join(examined.unknown_keys)}."
        )
