"""What a diagnosis concludes from its measurements, and the configuration that mends it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..norm import matches
from .intervals import Estimate
from .layers import LayerReport

# A finding needs an interval beyond its margin. Points of AP or accuracy:
_POINTS = 1.0
# Standard deviations, of layers that normalize with their batch in training, and of frozen ones,
# whose statistics were those of training too.
_FAR = 0.25
_FAR_FROZEN = 1.0
# Between the statistics of two workers.
_RANKS_APART = 0.1
# Share of a layer's channels.
_DEAD_SHARE = 0.25

_HEADS = {
    "roi_heads.box_head.": ("ROI_BOX_HEAD", "BNConvFCHead", "FastRCNNConvFCHead"),
    "roi_heads.mask_head.": ("ROI_MASK_HEAD", "BNConvUpsampleHead", "MaskRCNNConvUpsampleHead"),
}
# What the probe's box AP depends on.
_BOX = ("roi_heads.box_head.", "roi_heads.box_predictor.")
_GN_GROUPS = 32


@dataclass(frozen=True)
class Finding:
    """Something that hurts the model.

    Attributes:
        title: what it is, in a sentence.
        evidence: the measurements that it rests on, with 95 % intervals.
        layers: the layers concerned.
        fix: the keys of a config that mend it in the next training.
        advice: what the fix does.
        cost: points of box AP (on the sampler's RoIs) that it is likely to cost; None if that was
            not measured.
    """

    title: str
    evidence: tuple[str, ...]
    layers: tuple[str, ...]
    fix: Mapping[str, Any]
    advice: str
    cost: Estimate | None = None

    @property
    def yaml(self) -> str:
        """The fix, as lines of a config file."""
        return yaml.safe_dump(dict(self.fix), default_flow_style=None, sort_keys=False)

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "title": self.title,
            "cost": None if self.cost is None else self.cost.to_json(),
            "evidence": list(self.evidence),
            "layers": list(self.layers),
            "advice": self.advice,
            "yaml": self.yaml,
        }


@dataclass(frozen=True)
class Examined:
    """What there is to conclude from.

    Attributes:
        cfg: the model's config.
        layers: of :func:`bn_detection.leakage.layers.inspect_layers`.
        norm_layers: names of all layers that BN.CONVERT can replace, GroupNorm and others too.
        probe: the JSON of a :class:`bn_detection.leakage.LeakageReport`, or None.
        workers: of the training.
        averages_workers: whether the training averages running statistics over the workers.
    """

    cfg: CfgNode
    layers: Sequence[LayerReport]
    norm_layers: Sequence[str]
    probe: Mapping[str, Any] | None
    workers: int
    averages_workers: bool

    @property
    def trained(self) -> list[LayerReport]:
        """The layers that normalize with mini-batches in training."""
        return [layer for layer in self.layers if layer.trains]

    def uses_population(self, layer: LayerReport) -> bool:
        """Whether inference normalizes with the population statistics of a layer."""
        return self.cfg.BN.INFERENCE != "batch" or not matches(layer.name, self.cfg.BN.MODULES)

    def probed(self, kind: str, metric: str) -> Estimate | None:
        """``leakage`` or ``inconsistency`` in a metric, where it was measured and matters."""
        record = (self.probe or {}).get(kind, {}).get(metric)
        if record is None or any(record[key] is None for key in ("value", "low", "high")):
            return None
        if kind == "inconsistency" and not all(
            self.uses_population(layer) for layer in self.trained if layer.rows == "RoIs"
        ):
            return None
        return Estimate(**record)


def conclude(examined: Examined) -> tuple[list[Finding], list[str]]:
    """Findings, worst first, and notes: what is worth knowing and no finding.

    Those whose cost in AP was measured come first, by that cost.

    Args:
        examined: the measurements.
    """
    notes: list[str] = []
    found = [finding for rule in _RULES for finding in rule(examined, notes)]
    found += _inconsistency(examined, found)
    found.sort(key=lambda finding: math.inf if finding.cost is None else -finding.cost.value)
    return found, notes + _lists_together(found)


def _lists_together(found: Sequence[Finding]) -> list[str]:
    """A config has one list for a key: that of several findings, where theirs differ."""
    notes = []
    for key in ("CONVERT", "MODULES"):
        nodes = {k: finding.fix.get("BN", {}) for k, finding in enumerate(found, 1)}
        lists = {k: node[key] for k, node in nodes.items() if key in node}
        together: list[Any] = []
        for entries in reversed(lists.values()):  # a later conversion wins, so the worst is last
            together += [entry for entry in entries if entry not in together]
        if any(entries != together for entries in lists.values()):
            numbers = " and ".join(map(str, lists))
            value = yaml.safe_dump(together, default_flow_style=True, width=math.inf).strip()
            notes.append(
                f"A config has one list BN.{key}, and the findings {numbers} give one each. For "
                f"all of them it is {value}"
            )
    return notes


def _leak(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    for prefix, metric, ap, head in (
        ("roi_heads.box_head.", "accuracy", "box_ap", "box"),
        ("roi_heads.mask_head.", "mask_accuracy", "mask_ap", "mask"),
    ):
        layers = [layer for layer in examined.trained if layer.name.startswith(prefix)]
        leakage = examined.probed("leakage", metric)
        if leakage is None or not layers:
            continue
        images = examined.probe["images_per_worker"]
        if images > 1 and any(layer.sharing == "image" for layer in layers):
            notes.append(
                f"The {head} head was trained with batches of one image. Leakage and inconsistency "
                f"are those of batches of {images} images (own_worker); compare own_image with the "
                "other modes."
            )
        if not _exceeds(leakage, _POINTS):
            continue
        evidence = [
            f"{_METRICS[metric]}: {leakage.text(1)} points better with a batch of its own images "
            "than with as many RoIs of random images"
        ]
        leakage_ap = examined.probed("leakage", ap)
        if leakage_ap is not None:
            evidence.append(f"{_METRICS[ap]}: {leakage_ap.text(1)} points likewise")
        lost = examined.probed("inconsistency", metric)
        lost_ap = examined.probed("inconsistency", ap)
        if lost is not None and lost.high < 0:
            notes.append(
                f"The {head} head does read its batch ({evidence[0]}), but population statistics "
                f"are better still, by {_negative(lost).text(1)} points: the leak costs nothing."
            )
            continue
        for lost_metric, estimate in ((metric, lost), (ap, lost_ap)):
            if estimate is not None:
                evidence.append(
                    f"{_METRICS[lost_metric]}: {estimate.text(1)} points better with a batch of "
                    "its own images than with population statistics"
                )
        yield Finding(
            f"The {head} head reads the other RoIs of its images in its normalization batch.",
            tuple(evidence),
            _names(layers),
            _head_fix(examined, layers),
            "Train again with batches that say nothing about an RoI's own image.",
            cost=lost_ap if head == "box" and lost_ap is not None and lost_ap.low > 0 else None,
        )


def _stale(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    cfg = examined.cfg
    # Precise statistics do not mend one population for levels that are normalized apart.
    measured = [
        layer
        for layer in examined.trained
        if layer.ema_to_precise is not None
        and not layer.is_initial
        and not (layer.level_batches and _levels_differ(layer))
    ]
    if cfg.BN.FREEZE.LAST_ITERS is not None:
        globs = list(cfg.BN.FREEZE.MODULES or cfg.BN.MODULES)
        frozen = [layer for layer in measured if matches(layer.name, globs)]
        notes.append(
            f"BN.FREEZE ends the training with {len(frozen)} layers that keep their statistics, so "
            "it is no matter how far these are from those of the data."
        )
        measured = [layer for layer in measured if layer not in frozen]
    far = [layer for layer in measured if layer.ema_to_precise.low > _FAR]
    far = _by_distance(_used(examined, far, "are far from those of the data", notes))
    if not far:
        return
    own, shuffled = (examined.probed(k, "box_ap") for k in ("inconsistency", "leakage"))
    cost = None
    in_box_head = any(layer.name.startswith(_BOX) for layer in far)
    if in_box_head and own is not None and shuffled is not None:
        # Shuffled minus population; the interval is that of independent ones, so it is too wide.
        value = own.value - shuffled.value
        half = math.hypot(own.high - own.low, shuffled.high - shuffled.low) / 2
        cost = Estimate(value, value - half, value + half) if value - half > 0 else None
    yield Finding(
        f"The running statistics of {_count(far)} are far from those of the data.",
        _distances(far, "ema_to_precise"),
        _names(far),
        _population_fix(examined, far),
        "Estimate the population statistics anew at each evaluation, and at the end of the next "
        "training. For this checkpoint, tools/recalibrate.py does it without training.",
        cost=cost,
    )


def _impossible(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    layers = [layer for layer in examined.layers if layer.impossible]
    if layers:
        yield Finding(
            f"The statistics of {_count(layers)} are impossible: inference gives no numbers.",
            tuple(
                f"{layer.name}: {len(layer.impossible)} of {layer.channels} channels have a "
                "negative variance, or statistics that are not finite"
                for layer in layers[:_SHOWN]
            ),
            _names(layers),
            _population_fix(examined, layers),
            "Estimate them anew; tools/recalibrate.py does it without training.",
        )


def _never_updated(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    initial = [layer for layer in examined.trained if layer.is_initial]
    initial = _used(examined, initial, "were never updated", notes)
    if initial:
        still = [layer.name for layer in initial if layer.momentum == 0]
        evidence = ["all running means are 0 and all running variances 1"]
        if still:
            evidence.append(f"the momentum of {len(still)} of them is 0: they never move")
        yield Finding(
            f"The statistics of {_count(initial)} were never updated: inference normalizes with "
            "those that the layers were built with.",
            (*evidence, *_distances(_by_distance(initial), "ema_to_precise")),
            _names(initial),
            _population_fix(examined, initial),
            "Estimate the population statistics of the weights that there are.",
        )
    uncounted = [x for x in examined.trained if x.updates == 0 and not x.is_initial]
    if uncounted:
        notes.append(
            f"{_count(uncounted)} have statistics, but counted no step of training: they come "
            f"from a checkpoint without counters ({_list(uncounted)})."
        )


def _still(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    """Trained, but looking frozen."""
    half = [layer for layer in examined.trained if layer.affine_frozen]
    if half:
        yield Finding(
            f"{_count(half)} look frozen, but normalize with their mini-batch in training, and "
            "their running statistics move.",
            ("requires_grad is False for all their parameters",),
            _names(half),
            {"BN": {"CONVERT": _convert(examined, half, "FrozenBN")}},
            "Freeze the statistics with the parameters.",
        )
    still = [x for x in examined.trained if x.momentum == 0 and not x.is_initial]
    if still:
        notes.append(
            f"The momentum of {_count(still)} is 0: in training their running statistics stay as "
            f"they are ({_list(still)})."
        )


def _frozen(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    frozen = [layer for layer in examined.layers if not layer.trains]
    initial = [layer for layer in frozen if layer.is_initial]
    if initial:
        fix = {
            "MODEL": {"BACKBONE": {"FREEZE_AT": 0}},
            "BN": {"CONVERT": _convert(examined, initial, "SyncBN")},
        }
        yield Finding(
            f"{_count(initial)} are frozen as they were built: they normalize nothing.",
            (
                "mean 0, variance 1, weight 1 and bias 0 in all of them",
                *_distances(_by_distance(initial), "ema_to_precise"),
            ),
            _names(initial),
            fix,
            "Train them, or start from weights that have their statistics (MODEL.WEIGHTS).",
        )
    measured = [
        layer
        for layer in frozen
        if layer.ema_to_precise is not None and not (layer.is_initial or layer.is_folded)
    ]
    far = _by_distance(x for x in measured if x.ema_to_precise.low > _FAR_FROZEN)
    if far:
        yield Finding(
            f"The frozen statistics of {_count(far)} are of other data than they see.",
            _distances(far, "ema_to_precise"),
            _names(far),
            {"BN": {"CONVERT": _convert(examined, far, "SyncBN")}},
            "Let the layers follow the data in training.",
        )
    moved = [x for x in measured if x not in far and x.ema_to_precise.low > _FAR]
    if moved:
        worst = _by_distance(moved)[0]
        notes.append(
            f"The inputs of {_count(moved)} have moved from their frozen statistics, "
            f"{worst.name} most, by {worst.ema_to_precise.text(2)} standard deviations. They "
            "were trained so."
        )


def _used(
    examined: Examined, layers: Sequence[LayerReport], what: str, notes: list[str]
) -> list[LayerReport]:
    """The layers whose population statistics inference uses; the others become a note."""
    unused = [layer for layer in layers if not examined.uses_population(layer)]
    if unused:
        notes.append(
            f"The running statistics of {_count(unused)} {what}; with BN.INFERENCE batch they are "
            f"not used ({_list(unused)})."
        )
    return [layer for layer in layers if layer not in unused]


def _levels(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    cfg = examined.cfg
    apart = [layer for layer in examined.layers if _levels_differ(layer)]
    separate = [x for x in apart if x.level_batches and examined.uses_population(x)]
    if separate:
        norm = _without_batch(separate)
        fix: dict[str, Any] = {"BN": {"CONVERT": _convert(examined, separate, norm)}}
        if cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "BNRetinaNet"):
            fix = {
                "MODEL": {"META_ARCHITECTURE": "BNRetinaNet"},
                "BN": {"LEVELS": {"TRAIN": "separate", "POPULATION": "separate"}},
            }
        yield Finding(
            f"{_count(separate)} normalize each FPN level by itself in training, and all levels "
            "with the same statistics at inference.",
            _distances(sorted(separate, key=_levels_apart, reverse=True), "levels_apart"),
            _names(separate),
            fix,
            "Give each level the statistics at inference that it has in training.",
        )
    together = [layer for layer in apart if not layer.level_batches]
    if together:
        worst = max(together, key=_levels_apart)
        notes.append(
            f"FPN levels differ in {_count(together)}, {worst.name} most, by "
            f"{worst.levels_apart.text(2)} standard deviations. Training and inference both "
            "normalize them together."
        )


def _ranks(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    """Workers that would evaluate with statistics of their own."""
    cfg = examined.cfg
    by_fvcore = cfg.BN.POPULATION.ESTIMATOR == "fvcore" or cfg.TEST.PRECISE_BN.ENABLED
    if examined.workers == 1 or (examined.averages_workers and not by_fvcore):
        return
    layers = [
        layer
        for layer in examined.trained
        if not layer.spans_workers
        and _has_interval(layer.batch_to_precise)
        and examined.uses_population(layer)
    ]
    if any(layer.spans_workers for layer in examined.trained):
        joined = [layer for layer in layers if layer.joins_workers]
        if joined:
            notes.append(
                f"How far two workers are apart is unknown for {_count(joined)}: they were "
                f"measured with the images of all workers together ({_list(joined)})."
            )
        layers = [layer for layer in layers if layer not in joined]
    if by_fvcore:
        batches = cfg.TEST.PRECISE_BN.NUM_ITER
        if cfg.BN.POPULATION.ESTIMATOR == "fvcore":
            batches = max(cfg.BN.POPULATION.NUM_SAMPLES // cfg.SOLVER.IMS_PER_BATCH, 1)
        title = "Detectron2's PreciseBN gives each worker statistics of its own images"
        fix: dict[str, Any] = {
            "TEST": {"PRECISE_BN": {"ENABLED": False}},
            "BN": {"POPULATION": {"ESTIMATOR": "pooled"}},
        }
        shares = {layer.name: 1 / batches for layer in layers}
    else:
        layers = [layer for layer in layers if not layer.is_ours and layer.momentum]
        title = "Each worker evaluates with its own running statistics"
        fix = {"BN": {"CONVERT": _convert(examined, layers, "SyncBN")}}
        shares = {layer.name: layer.momentum / (2 - layer.momentum) for layer in layers}
    spreads = {
        layer.name: _scaled(layer.batch_to_precise, math.sqrt(2 * shares[layer.name]))
        for layer in layers
    }
    apart = [layer for layer in layers if spreads[layer.name].low > _RANKS_APART]
    if not apart:
        if layers:
            worst = max(layers, key=lambda layer: spreads[layer.name].value)
            notes.append(
                f"{title}; those of two workers are about {spreads[worst.name].value:.2f} standard "
                f"deviations apart in {worst.name}, and less in others."
            )
        return
    apart.sort(key=lambda layer: spreads[layer.name].value, reverse=True)
    yield Finding(
        f"{title}, and the checkpoint has those of worker 0.",
        tuple(
            f"{layer.name}: two workers are expected {spreads[layer.name].text(2)} standard "
            "deviations apart, by the scatter of their batches"
            for layer in apart[:_SHOWN]
        ),
        _names(apart),
        fix,
        "Give all workers the same statistics. tools/train_net.py of bn_detection also averages "
        "those of BN over the workers.",
    )


def _dead(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    dead = [layer for layer in examined.layers if layer.dead]
    many = [x for x in dead if x.trains and len(x.dead) >= _DEAD_SHARE * x.channels]
    if many:
        without_weight = sum(len(layer.dead_weights) for layer in many)
        solver = examined.cfg.SOLVER
        by_decay = solver.WEIGHT_DECAY_NORM > 0 and 2 * without_weight >= sum(
            len(layer.dead) for layer in many
        )
        yield Finding(
            f"A large part of the channels of {_count(many)} is dead.",
            tuple(
                f"{layer.name}: {len(layer.dead)} of {layer.channels} channels without variance or "
                "weight"
                for layer in many[:_SHOWN]
            ),
            _names(many),
            {"SOLVER": {"WEIGHT_DECAY_NORM": 0.0} if by_decay else {"BASE_LR": solver.BASE_LR / 2}},
            "Do not decay their weights." if by_decay else "Train with a lower learning rate.",
        )
    few = [layer for layer in dead if layer not in many]
    if few:
        channels = sum(len(layer.dead) for layer in few)
        notes.append(
            f"{channels} of {sum(layer.channels for layer in few)} channels of {_count(few)} are "
            f"dead, without variance or weight ({_list(few)})."
        )


def _small_batches(examined: Examined, notes: list[str]) -> Iterator[Finding]:
    if examined.cfg.BN.INFERENCE == "batch":
        notes.append(
            "BN.INFERENCE is batch: what is detected in an image depends on the images that are "
            "evaluated with it."
        )
    single = [x for x in examined.trained if x.rows == "images" and x.rows_per_batch == 1]
    if single:
        notes.append(
            f"{_count(single)} normalize the feature map of a single image in training "
            f"({_list(single)})."
        )
    measured = [layer for layer in examined.layers if layer.ema_to_precise is not None]
    once = [layer for layer in measured if not _has_interval(layer.ema_to_precise)]
    if once:
        notes.append(
            f"{_count(once)} were measured on one batch, which gives distances without intervals: "
            f"no finding can rest on them ({_list(once)})."
        )
    yield from ()


_RULES = (
    _impossible,
    _leak,
    _levels,
    _stale,
    _never_updated,
    _frozen,
    _still,
    _ranks,
    _dead,
    _small_batches,
)


def _inconsistency(examined: Examined, found: Sequence[Finding]) -> list[Finding]:
    """A loss at inference that no other finding explains."""
    lost = examined.probed("inconsistency", "box_ap")
    layers = [layer for layer in examined.trained if layer.name.startswith("roi_heads.")]
    if lost is None or not layers or not _exceeds(lost, _POINTS) or found:
        return []
    return [
        Finding(
            "The second stage is better with the statistics of its batch than with population "
            "statistics, though these fit the data and it does not read its batch.",
            (f"{_METRICS['box_ap']}: {lost.text(1)} points",),
            _names(layers),
            {"BN": {"FREEZE": {"LAST_ITERS": 0.2}}},
            "End the training with population statistics.",
            cost=lost,
        )
    ]


_SHOWN = 5
_METRICS = {
    "accuracy": "Foreground accuracy",
    "mask_accuracy": "Mask accuracy",
    "box_ap": "Box AP on the sampler's RoIs",
    "mask_ap": "Mask AP on the sampler's RoIs",
}


def _exceeds(estimate: Estimate, margin: float) -> bool:
    return estimate.low > 0 and estimate.value >= margin


def _has_interval(estimate: Estimate | None) -> bool:
    return estimate is not None and math.isfinite(estimate.low)


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(*(factor * number for number in vars(estimate).values()))


def _distances(layers: Sequence[LayerReport], attribute: str) -> tuple[str, ...]:
    measured = [layer for layer in layers if getattr(layer, attribute) is not None]
    return tuple(
        f"{layer.name}: {getattr(layer, attribute).text(2)} standard deviations"
        for layer in measured[:_SHOWN]
    )


def _by_distance(layers: Iterator[LayerReport] | Sequence[LayerReport]) -> list[LayerReport]:
    def distance(layer: LayerReport) -> float:
        return -1.0 if layer.ema_to_precise is None else layer.ema_to_precise.value

    return sorted(layers, key=distance, reverse=True)


def _levels_differ(layer: LayerReport) -> bool:
    return layer.levels_apart is not None and layer.levels_apart.low > _FAR


def _levels_apart(layer: LayerReport) -> float:
    return layer.levels_apart.value


def _count(layers: Sequence[LayerReport]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"


def _names(layers: Sequence[LayerReport]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _list(layers: Sequence[LayerReport]) -> str:
    more = len(layers) - _SHOWN
    return ", ".join(_names(layers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _head_fix(examined: Examined, layers: Sequence[LayerReport]) -> dict[str, Any]:
    """Another norm for a head: by its NORM where it is one that has it, else by conversion."""
    # One worker has nobody to shuffle with.
    shuffles = any(layer.spans_workers for layer in layers)
    norm = _without_batch(layers) if shuffles or examined.workers == 1 else "ShuffleBN"
    globs = [glob for glob, _ in examined.cfg.BN.CONVERT]
    converted = any(matches(name, globs) for layer in layers for name in _lineage(layer.name))
    for prefix, (key, ours, stock) in _HEADS.items():
        has_norm = examined.cfg.MODEL[key].NAME in (ours, stock) and not converted
        if has_norm and all(layer.name.startswith(prefix) for layer in layers):
            return {"MODEL": {key: {"NAME": ours, "NORM": norm}}}
    if not any(layer.is_exact for layer in layers):  # which BN.CONVERT would refuse
        modules = [*examined.cfg.BN.MODULES, *_globs(examined, layers)]
        return {"BN": {"INFERENCE": "batch", "MODULES": modules}}
    return {"BN": {"CONVERT": _convert(examined, layers, norm)}}


def _without_batch(layers: Sequence[LayerReport]) -> str:
    return "GN" if all(layer.channels % _GN_GROUPS == 0 for layer in layers) else "LN"


def _lineage(name: str) -> list[str]:
    """The names of the modules that a layer is in, from the model itself to the layer."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) + 1)]


def _convert(examined: Examined, layers: Sequence[LayerReport], norm: str) -> list[list[str]]:
    """The entries of BN.CONVERT, after those that there are, for layers that only normalize."""
    there = [list(entry) for entry in examined.cfg.BN.CONVERT]
    exact = [layer for layer in layers if layer.is_exact]
    return there + [[glob, norm] for glob in _globs(examined, exact)]


def _globs(examined: Examined, layers: Sequence[LayerReport]) -> list[str]:
    """The names of modules whose norm layers are these and no others, as short as can be."""
    names = set(_names(layers))
    others = [f"{other}." for other in examined.norm_layers if other not in names]
    found: dict[str, None] = {}
    for name in _names(layers):
        alone = (
            part
            for part in _lineage(name)[1:]
            if not any(other.startswith(f"{part}.") for other in others)
        )
        found[next(alone)] = None
    return list(found)


def _population_fix(examined: Examined, layers: Sequence[LayerReport]) -> dict[str, Any]:
    node = examined.cfg.BN
    fix: dict[str, Any] = {"POPULATION": {"ESTIMATOR": "pooled"}}
    if node.POPULATION.ESTIMATOR == "pooled":
        fix = {"POPULATION": {"NUM_SAMPLES": 4 * node.POPULATION.NUM_SAMPLES}}
    outside = [layer for layer in layers if not matches(layer.name, node.MODULES)]
    if outside:
        added = [f"{glob}*" for glob in _globs(examined, outside)]
        fix["MODULES"] = [*node.MODULES, *added]
    precise_bn = {"TEST": {"PRECISE_BN": {"ENABLED": False}}}
    return {**(precise_bn if examined.cfg.TEST.PRECISE_BN.ENABLED else {}), "BN": fix}
