"""A finding, what it rests on, and the measurements that there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from detectron2.config import CfgNode

from ...estimate import Estimate
from ...metrics import DETECTIONS, DISTANCES, PROBE, Metric
from ...norm import matches
from ...words import listed
from ..by_layer import LayerLeakage
from ..layers import LayerReport
from ..trial import Trial

SHOWN = 5
"""Layers that a finding names in its evidence."""

HARMLESS = 1.0
"""Points of box AP: what certainly gains no more is no finding."""


@dataclass(frozen=True)
class Evidence:
    """One thing that a finding rests on, in words and in numbers.

    Attributes:
        text: a sentence, with the number and its interval.
        metric: what was measured, such as ``leakage.accuracy``; "" where it is no measurement.
        value: the number.
        unit: of it.
        layer: that it is of; "" for more than one.
    """

    text: str
    metric: str = ""
    value: Estimate | float | None = None
    unit: str = ""
    layer: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON types; without what there is none of."""
        known = {key: value for key, value in vars(self).items() if value not in ("", None)}
        if isinstance(self.value, Estimate):
            known |= self.value.to_json()
        return known


@dataclass(frozen=True)
class Finding:
    """Something that hurts the model (severity "finding"), or is worth knowing ("note").

    Attributes:
        id: of the rule, such as ``BN201``.
        severity: "finding" or "note".
        docs: the section of the documentation that explains it.
        title: what it is, in a sentence or a few.
        layers: names of the layers concerned.
        evidence: what it rests on.
        fix: the keys of a config that fix it in the next training; empty for a note.
        advice: what the fix does.
        cost: points of box AP that it is likely to cost: what the batch gives back on the sampler's
            RoIs, or what other statistics were seen to give; None if that was not measured.
        symptom: what users see, in their words; "" where that is the title.
        in_python: whether the model has no config, so that what fixes it is Python.
    """

    id: str
    severity: str
    docs: str
    title: str
    layers: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    fix: Mapping[str, Any] | None = None
    advice: str = ""
    cost: Estimate | None = None
    symptom: str = ""

    @property
    def headline(self) -> str:
        """What comes first: the symptom, before its cause, the title."""
        return self.symptom or self.title

    in_python: bool = False

    @property
    def cure(self) -> str:
        """The fix, as lines of a config file, or of Python."""
        return as_python(self.fix or {}) if self.in_python else self.yaml

    @property
    def yaml(self) -> str:
        """The fix, as lines of a config file."""
        return as_yaml(self.fix or {})

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        known = {key: value for key, value in vars(self).items() if key != "in_python"}
        known |= {"python": self.cure} if self.fix and self.in_python else {}
        return {
            **known,
            "layers": list(self.layers),
            "evidence": [item.to_json() for item in self.evidence],
            "fix": self.fix,
            "cost": None if self.cost is None else self.cost.to_json(),
            "yaml": self.yaml if self.fix else "",
        }


def as_yaml(fix: Mapping[str, Any]) -> str:
    """Keys of a config as lines of its file."""
    return str(yaml.safe_dump(dict(fix), default_flow_style=None, sort_keys=False))


def as_python(fix: Mapping[str, Any]) -> str:
    """Keys of a config as lines of Python, for a model that has no config; some remain words."""
    node = fix.get("BN", {})
    lines = [
        f'bn_detection.convert_norm(model, "{norm}", "{glob}")'
        for glob, norm in node.get("CONVERT", ())
    ]
    modules = [glob for glob in node.get("MODULES", ())]
    if "POPULATION" in node:
        lines.append(
            f"bn_detection.recalibrate(model, data{f', modules={modules}' * bool(modules)})"
        )
    if node.get("INFERENCE") == "batch":
        lines.append(f'bn_detection.set_inference(model, "batch", {modules})')
    if "FREEZE" in node:
        lines.append("# in the last fifth of the training, after model.train():")
        lines.append("for layer in batch_norms:")
        lines.append("    layer.eval()")
    if "LEVELS" in node:
        lines.append("# one BN layer for each level, as in detectron2.layers.CycleBatchNormList")
    solver = fix.get("SOLVER", {})
    if "WEIGHT_DECAY_NORM" in solver:
        lines.append("# a parameter group of the optimizer for BN layers, with weight_decay=0")
    if "BASE_LR" in solver:
        lines.append("# a learning rate half as large")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Examined:
    """What there is to conclude from.

    Attributes:
        cfg: the model's config.
        layers: of :func:`bn_detection.leakage.layers.inspect_layers`.
        norm_layers: names of all layers that BN.CONVERT can replace, GroupNorm and others too.
        probe: the JSON of a :class:`bn_detection.leakage.LeakageReport`, or of a
            :class:`bn_detection.leakage.DetectionReport`, or None.
        workers: of the training.
        averages_workers: whether the training averages running statistics over the workers.
        unknown_keys: of the config, that nobody here knows.
        trials: by id of a finding, what its cure by other statistics was seen to give.
    """

    cfg: CfgNode
    layers: Sequence[LayerReport]
    norm_layers: Sequence[str]
    probe: Mapping[str, Any] | None
    workers: int
    averages_workers: bool
    unknown_keys: Sequence[str] = ()
    trials: Mapping[str, Trial] = field(default_factory=dict)

    @property
    def probed_layers(self) -> list[LayerReport]:
        """The layers whose batch the probe on detections changed; none of the probe on RoIs."""
        probe = self.probe or {}
        names = probe["batch_norms"] if probe.get("on") == "detections" else ()
        return [layer for layer in self.trained if layer.name in names]

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """How the metrics of the probe are named and shown."""
        return DETECTIONS if (self.probe or {}).get("on") == "detections" else PROBE

    @property
    def trained(self) -> list[LayerReport]:
        """The layers that normalize with mini-batches in training."""
        return [layer for layer in self.layers if layer.trains]

    def uses_population(self, layer: LayerReport) -> bool:
        """Whether inference normalizes with the population statistics of a layer."""
        return self.cfg.BN.INFERENCE != "batch" or not matches(layer.name, self.cfg.BN.MODULES)

    @property
    def by_layer(self) -> list[LayerLeakage]:
        """What leaks through each layer, where that was measured."""
        return [LayerLeakage.from_json(x) for x in (self.probe or {}).get("by_layer", ())]

    def probed(self, kind: str, metric: str) -> Estimate | None:
        """A difference of modes in a metric, where it was measured and matters.

        Args:
            kind: ``leakage`` or ``inconsistency``.
            metric: of :data:`bn_detection.metrics.PROBE`.
        """
        record = (self.probe or {}).get(kind, {}).get(metric)
        if record is None or any(record[key] is None for key in ("value", "low", "high")):
            return None
        if kind != "leakage" and not all(
            self.uses_population(layer) for layer in self.trained if layer.rows == "RoIs"
        ):
            return None
        return Estimate(**record)


def of_trial(trial: Trial | None) -> list[Evidence]:
    """What a cure was seen to give, where it was tried."""
    return [] if trial is None else [Evidence(trial.text, "trial.box_ap", trial.gain, "points")]


def cost_of(trial: Trial | None) -> Estimate | None:
    """What a cure was seen to give, where that is more than chance."""
    return trial.gain if trial is not None and trial.gain.exceeds(0) else None


def names_of(layers: Iterable[LayerReport]) -> tuple[str, ...]:
    """Their names in the model."""
    return tuple(layer.name for layer in layers)


def named(layers: Iterable[LayerReport]) -> str:
    """The names of the first layers, and how many more there are."""
    return listed(names_of(layers), SHOWN)


def count(layers: Sequence[LayerReport]) -> str:
    """Such as "3 layers"."""
    return f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"


def by_distance(layers: Iterable[LayerReport], distance: str) -> list[LayerReport]:
    """The layers by one of their distances, largest first; those without it last."""

    def size(layer: LayerReport) -> float:
        estimate: Estimate | None = getattr(layer, distance)
        return -1.0 if estimate is None else estimate.value

    return sorted(layers, key=size, reverse=True)


def distances(layers: Iterable[LayerReport], distance: str) -> list[Evidence]:
    """One of the distances of the layers in which it is largest."""
    metric = DISTANCES[distance]
    return [
        Evidence(
            f"{layer.name}: {estimate.text(metric.decimals)} {metric.unit}",
            *(distance, estimate, metric.unit, layer.name),
        )
        for layer in by_distance(layers, distance)[:SHOWN]
        if (estimate := getattr(layer, distance)) is not None
    ]
