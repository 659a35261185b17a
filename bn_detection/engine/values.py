"""Values of keys that nothing can be built from, whatever the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg

from ..config import ConfigError, add_bn_detection_config

_MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.BIAS_LR_FACTOR")
"""Keys with a default for which None has a meaning of its own."""

_TEXTS = (
    *("DATASETS.TRAIN", "DATASETS.TEST"),
    *("BN.MODULES", "BN.FREEZE.MODULES", "BN.TRACE.MODULES"),
    *("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES", "MODEL.RETINANET.IN_FEATURES"),
)
"""Keys that are lists of text."""


class _Range(NamedTuple):
    low: float
    high: float = math.inf

    def has(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"at least {self.low:g}")
        if self.high < math.inf:
            parts.append(f"at most {self.high:,.10g}")
        return " and ".join(parts)


_MOST_IMAGES = 100_000
_RANGES = {
    # numpy's seeds have 32 bits, and each worker adds its rank.
    "SEED": _Range(-math.inf, 2**31),
    "BN.POPULATION.BATCH_SIZE": _Range(0, _MOST_IMAGES),
    "BN.POPULATION.NUM_SAMPLES": _Range(1),
    # Recalibration and diagnosis use it too.
    "SOLVER.IMS_PER_BATCH": _Range(1, _MOST_IMAGES),
    "DATALOADER.NUM_WORKERS": _Range(0, 1000),
    "INPUT.MAX_SIZE_TEST": _Range(1),
    "INPUT.MIN_SIZE_TEST": _Range(0),
    "TEST.DETECTIONS_PER_IMAGE": _Range(1),
    "MODEL.ROI_HEADS.NUM_CLASSES": _Range(1),
    "MODEL.RETINANET.NUM_CLASSES": _Range(1),
    "MODEL.FPN.OUT_CHANNELS": _Range(1),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _Range(1),
    "MODEL.ROI_BOX_HEAD.FC_DIM": _Range(1),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _Range(0),
    "MODEL.ROI_BOX_HEAD.NUM_FC": _Range(0),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _Range(1),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _Range(1),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _Range(0),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _Range(1),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": _Range(1),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _Range(1, 10_000),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _Range(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _Range(0, 1),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _Range(1),
    "MODEL.RPN.POSITIVE_FRACTION": _Range(0, 1),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _Range(1),
    "MODEL.RPN.POST_NMS_TOPK_TEST": _Range(1),
    "MODEL.RETINANET.NUM_CONVS": _Range(0),
}
_TRAINING_RANGES = {
    "SOLVER.MAX_ITER": _Range(1),
    "SOLVER.CHECKPOINT_PERIOD": _Range(1),
    "SOLVER.REFERENCE_WORLD_SIZE": _Range(0),
    "SOLVER.BASE_LR": _Range(0),
    "SOLVER.MOMENTUM": _Range(0, 1),
    "SOLVER.WEIGHT_DECAY": _Range(0),
    "SOLVER.GAMMA": _Range(0),
    "SOLVER.WARMUP_ITERS": _Range(0),
    "SOLVER.WARMUP_FACTOR": _Range(0),
    "TEST.EVAL_PERIOD": _Range(0),
    "VIS_PERIOD": _Range(0),
    "INPUT.MAX_SIZE_TRAIN": _Range(1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _Range(1),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _Range(1),
}


def check_values(cfg: CfgNode, *, training: bool) -> None:
    """Refuse values that mean nothing: None, nan, infinity, wrong signs, and devices unknown.

    Args:
        cfg: the config.
        training: whether it is trained with, so that SOLVER counts.

    Raises:
        ConfigError: names the key, its value, and what would be right.
    """
    defaults = get_cfg()
    add_bn_detection_config(defaults)
    known = dict(leaves(defaults))
    for key, value in leaves(cfg):
        default = known.get(key)
        if value is None and default is not None and key not in _MAY_BE_NONE:
            raise ConfigError(
                f"{key} None: it must be a value of type {type(default).__name__}, such as "
                f"{default!r}."
            )
        try:
            finite = all(math.isfinite(number) for number in _floats(value))
        except RecursionError as error:
            raise ConfigError(f"{key}: a list in it contains itself.") from error
        if not finite:
            raise ConfigError(f"{key} {value}: it must be finite.")
    for key in _TEXTS:
        value = _get(cfg, key)
        if not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{key} {list(value)}: each of it must be text.")
    for key, allowed in (_RANGES | _TRAINING_RANGES if training else _RANGES).items():
        value = _get(cfg, key)
        if not allowed.has(value):
            raise ConfigError(f"{key} {value}: it must be {allowed}.")
    if cfg.TEST.AUG.ENABLED:
        _check_sizes("TEST.AUG.MIN_SIZES", cfg.TEST.AUG.MIN_SIZES)
    if cfg.MODEL.LOAD_PROPOSALS:
        for key in ("TRAIN", "TEST") if training else ("TEST",):
            _check_proposals(cfg, key)
    if training:
        _check_sizes("INPUT.MIN_SIZE_TRAIN", cfg.INPUT.MIN_SIZE_TRAIN)
        _check_steps(cfg)
    _check_device(cfg.MODEL.DEVICE)
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if not isinstance(expected, list | tuple) or len(expected) != 4:
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS {expected}: each entry is [task, metric, value, tolerance]."
            )


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config with dots, and their values, without those that are nodes."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(cfg: CfgNode, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)


def _check_sizes(key: str, sizes: Any) -> None:
    values = [sizes] if isinstance(sizes, int) else list(sizes)
    if not values or not all(isinstance(size, int) and size >= 0 for size in values):
        raise ConfigError(f"{key} {sizes}: give a size in pixels, or several; 0 for no resizing.")


def _check_proposals(cfg: CfgNode, key: str) -> None:
    names, files = cfg.DATASETS[key], cfg.DATASETS[f"PROPOSAL_FILES_{key}"]
    if len(names) != len(files):
        raise ConfigError(
            f"DATASETS.PROPOSAL_FILES_{key} {tuple(files)}: MODEL.LOAD_PROPOSALS needs one file "
            f"for each dataset of DATASETS.{key} {tuple(names)}."
        )


def _check_steps(cfg: CfgNode) -> None:
    steps, last = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    numbers = all(isinstance(step, int) and step > 0 for step in steps)
    if not numbers or list(steps) != sorted(set(steps)) or last in steps:
        raise ConfigError(
            f"SOLVER.STEPS {tuple(steps)}: give rising iterations between 0 and SOLVER.MAX_ITER "
            f"{last}, without these two."
        )


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f'MODEL.DEVICE "{device}": give "cuda" or "cpu".') from error
    if kind.type not in ("cuda", "cpu"):
        raise ConfigError(f'MODEL.DEVICE "{device}": give "cuda" or "cpu".')
    if kind.type == "cuda" and torch.cuda.is_available():
        number = torch.cuda.device_count()
        if (kind.index or 0) >= number:
            raise ConfigError(f'MODEL.DEVICE "{device}": this machine has {number} GPU(s).')
