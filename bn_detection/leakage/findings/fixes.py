"""The configuration that fixes a finding, or several together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...heads import HEADS
from ...norm import lineage, matches
from ..layers import LayerReport
from .finding import Examined, Finding, names_of
from .globs import fewest_globs

_GN_GROUPS = 32


def combined(findings: Sequence[Finding]) -> dict[str, Any]:
    """The keys of several findings in one config.

    Of a list, such as BN.CONVERT, it has the entries of all, those of the worst finding last: a
    later conversion wins. Of any other value it has that of the worst.

    Args:
        findings: worst first.
    """
    together: dict[str, Any] = {}
    for finding in reversed(findings):
        _merge(together, finding.fix or {})
    return together


def _merge(into: dict[str, Any], fix: Mapping[str, Any]) -> None:
    for key, value in fix.items():
        there = into.get(key)
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        elif isinstance(value, list) and isinstance(there, list):
            into[key] = [*there, *(entry for entry in value if entry not in there)]
        else:
            into[key] = list(value) if isinstance(value, list) else value


def without_batch(layers: Sequence[LayerReport]) -> str:
    """The norm without a batch that fits the channels of all layers."""
    return "GN" if all(layer.channels % _GN_GROUPS == 0 for layer in layers) else "LN"


def convert(examined: Examined, layers: Sequence[LayerReport], norm: str) -> list[list[str]]:
    """The entries of BN.CONVERT, after those that there are, for layers that only normalize."""
    there = [list(entry) for entry in examined.cfg.BN.CONVERT]
    exact = [layer for layer in layers if layer.is_exact]
    return there + [[glob, norm] for glob in _globs(examined, exact)]


def of_head(
    examined: Examined, layers: Sequence[LayerReport], of: Sequence[LayerReport]
) -> dict[str, Any]:
    """Another norm for layers of a head.

    By its NORM where these are all that it has, and it is one that has a NORM; else by conversion.

    Args:
        examined: the measurements.
        layers: those to change.
        of: the layers of the head.
    """
    # One worker has nobody to shuffle with.
    shuffles = any(layer.spans_workers for layer in layers)
    norm = without_batch(layers) if shuffles or examined.workers == 1 else "ShuffleBN"
    if any(layer.rows == "images" for layer in layers):
        # A feature map cannot be divided, and is a random group of its own with one image a worker.
        norm = norm.replace("ShuffleBN", "SyncBN")
    is_dense = examined.cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "BNRetinaNet")
    if is_dense and all(layer.name.startswith("head.") for layer in layers):
        return {"MODEL": {"META_ARCHITECTURE": "BNRetinaNet", "RETINANET": {"NORM": norm}}}
    globs = [glob for glob, _ in examined.cfg.BN.CONVERT]
    converted = any(matches(name, globs) for layer in layers for name in lineage(layer.name))
    for key, head in HEADS.items():
        has_norm = examined.cfg.MODEL[key].NAME in (head.ours, head.stock)
        is_whole = len(layers) == len(of) and all(x.name.startswith(head.prefix) for x in of)
        if has_norm and not converted and is_whole:
            return {"MODEL": {key: {"NAME": head.ours, "NORM": norm}}}
    if not any(layer.is_exact for layer in layers):  # which BN.CONVERT would refuse
        return {"BN": {"INFERENCE": "batch", "MODULES": _modules(examined, layers)}}
    return {"BN": {"CONVERT": convert(examined, layers, norm)}}


def of_population(examined: Examined, layers: Sequence[LayerReport]) -> dict[str, Any]:
    """Precise statistics for layers; more images for them, where they have them already."""
    node = examined.cfg.BN
    fix: dict[str, Any] = {"POPULATION": {"ESTIMATOR": "pooled"}}
    if node.POPULATION.ESTIMATOR == "pooled":
        fix = {"POPULATION": {"NUM_SAMPLES": 4 * node.POPULATION.NUM_SAMPLES}}
    outside = [layer for layer in layers if not matches(layer.name, node.MODULES)]
    if outside:
        fix["MODULES"] = _modules(examined, outside)
    precise_bn = {"TEST": {"PRECISE_BN": {"ENABLED": False}}}
    return {**(precise_bn if examined.cfg.TEST.PRECISE_BN.ENABLED else {}), "BN": fix}


def _modules(examined: Examined, layers: Sequence[LayerReport]) -> list[str]:
    """BN.MODULES, whose globs match names of layers, with these too."""
    names = names_of(layers)
    added = [of for glob in _globs(examined, layers) for of in (glob, f"{glob}.*")]
    return [*examined.cfg.BN.MODULES, *(g for g in added if any(matches(n, [g]) for n in names))]


def _globs(examined: Examined, layers: Sequence[LayerReport]) -> list[str]:
    names = names_of(layers)
    return fewest_globs(names, [name for name in examined.norm_layers if name not in names])
