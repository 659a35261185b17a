"""LazyConfig files: the model as the file builds it, the rest as keys of a config.

A LazyConfig is Python, and reading it runs it. So it is read when a user names it by
``--config-file`` alone, never because another file says so.
"""

from __future__ import annotations

import builtins
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import ConfigError, one_line
from ..words import listed

logger = logging.getLogger(__name__)

_OF_A_CONFIG = "detectron2._cfg_loader"
_OVERRIDE = re.compile(r"[a-z_][\w.]*=")
_warned: set[str] = set()
_MODEL_KEYS = ("MODEL.WEIGHTS", "MODEL.DEVICE")
"""The keys of the model that are not the file's to say."""


def is_lazy(path: str) -> bool:
    """Whether a config file is Python."""
    return path.endswith(".py")


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """``key=value`` of a LazyConfig, and ``KEY VALUE`` of a config.

    Raises:
        ConfigError: a key of the model, which the file builds.
    """
    lazy, keys = [], []
    rest = list(overrides)
    while rest:
        if _OVERRIDE.match(rest[0]):
            lazy.append(rest.pop(0))
            continue
        if rest[0].startswith("MODEL.") and rest[0] not in _MODEL_KEYS:
            raise ConfigError(
                f"KEY VALUE overrides: {rest[0]}: the model is what the LazyConfig says; give "
                "model.path.in.the.file=value, or BN.CONVERT."
            )
        keys += rest[:2]
        rest = rest[2:]
    return lazy, keys


def merge_lazy_config(cfg: CfgNode, path: str, overrides: Sequence[str], *, training: bool) -> None:
    """Read a LazyConfig into ``cfg``, in place; :func:`build` then builds its model.

    Args:
        cfg: with all keys.
        path: of the file, in the layout of Detectron2's ``tools/lazyconfig_train_net.py``:
            ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier``, ``train``.
        overrides: ``key=value`` each.
        training: whether it will be trained, so that all that it says must have a key.

    Raises:
        ConfigError: the file cannot be run; names the line. It has no model; or, in training, it
            says what no key can.
    """
    cfg.BN.LAZY_CONFIG = [path, *overrides]
    lazy = _load(cfg)
    if "model" not in lazy or "_target_" not in lazy.model:
        raise ConfigError(
            f"--config-file {path}: it has no model = LazyCall(...)(...). It has "
            f"{', '.join(map(str, lazy)) or 'nothing'}."
        )
    untold: list[str] = []
    try:
        _tell_model(cfg, lazy.model)
        _tell_data(cfg, lazy.get("dataloader") or {}, untold)
        _tell_training(cfg, lazy, untold)
    except Exception as error:
        raise ConfigError(
            f"--config-file {path}: {type(error).__name__}: {one_line(error)}"
        ) from error
    if untold and training:
        raise ConfigError(
            f"--config-file {path}: this trainer has no key for {listed(untold, 5)}. Train with "
            "Detectron2's tools/lazyconfig_train_net.py, and import bn_detection in the file."
        )
    images = [what for what in untold if what.startswith("the augmentation")]
    if images and path not in _warned:
        _warned.add(path)
        logger.warning(
            "%s: images to measure on are resized to the size of %s, without it.",
            *(path, " and ".join(images)),
        )


def build(cfg: CfgNode) -> nn.Module:
    """The model of a config, or of the LazyConfig that it is from, on MODEL.DEVICE."""
    if not cfg.BN.LAZY_CONFIG:
        return build_model(cfg)
    model: nn.Module = instantiate(_load(cfg).model)
    return model.to(cfg.MODEL.DEVICE)


def _load(cfg: CfgNode) -> DictConfig:
    path, *overrides = cfg.BN.LAZY_CONFIG
    what = f"--config-file {path}"
    before: Callable[..., Any] = builtins.__import__
    try:
        lazy = LazyConfig.load(path)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}{_where(error, path)}") from error
    finally:
        builtins.__import__ = before  # which Detectron2 leaves replaced after an error
    for override in overrides:
        try:
            lazy = LazyConfig.apply_overrides(lazy, [override])
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"{what}: the override {override} failed: {reason}") from error
    return lazy


def _where(error: BaseException, path: str) -> str:
    """File and line of an error in a LazyConfig, or in one that it imports, and what it is."""
    syntax = error.__cause__ if isinstance(error.__cause__, SyntaxError) else None
    if isinstance(error, SyntaxError) and syntax is not None:
        named = re.match(r"Config file (.*) has syntax error!", str(error))
        file = f" {named[1]}" if named and named[1] != path else ""
        return f"{':' * bool(file)}{file}, line {syntax.lineno}: SyntaxError: {syntax.msg}"
    place, trace = "", error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__package__") or "").startswith(_OF_A_CONFIG):
            file = trace.tb_frame.f_code.co_filename
            place = f"{'' if file == path else f': {file}'}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return f"{place}: {type(error).__name__}: {one_line(error)}"


def _name(node: Any) -> str:
    """The name of the class that a node builds."""
    target = node.get("_target_", "") if isinstance(node, Mapping | DictConfig) else ""
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", "")


def _tell_model(cfg: CfgNode, model: DictConfig) -> None:
    cfg.MODEL.META_ARCHITECTURE = _name(model)
    # What is in them is the file's: they are changed by BN.CONVERT.
    for key in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        cfg.MODEL[key].NAME = ""
    heads = model.get("roi_heads") or {}
    cfg.MODEL.ROI_HEADS.NAME = _name(heads) or cfg.MODEL.ROI_HEADS.NAME
    if "num_classes" in heads:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes
    if "num_classes" in model:
        cfg.MODEL.RETINANET.NUM_CLASSES = model.num_classes
    cfg.MODEL.MASK_ON = heads.get("mask_head") is not None
    cfg.MODEL.KEYPOINT_ON = heads.get("keypoint_head") is not None
    if cfg.MODEL.KEYPOINT_ON and "num_keypoints" in heads.keypoint_head:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = heads.keypoint_head.num_keypoints
    for key in ("pixel_mean", "pixel_std"):
        if key in model:
            cfg.MODEL[key.upper()] = [float(x) for x in model[key]]
    cfg.INPUT.FORMAT = model.get("input_format") or cfg.INPUT.FORMAT


def _tell_data(cfg: CfgNode, loaders: Any, untold: list[str]) -> None:
    for split, key in (("train", "TRAIN"), ("test", "TEST")):
        loader = loaders.get(split) or {}
        names = (loader.get("dataset") or {}).get("names", ())
        cfg.DATASETS[key] = (names,) if isinstance(names, str) else tuple(names)
        mapper = loader.get("mapper") or {}
        cfg.INPUT.FORMAT = mapper.get("image_format") or cfg.INPUT.FORMAT
        for augmentation in mapper.get("augmentations") or ():
            _tell_augmentation(cfg, augmentation, key, untold)
        if split == "train":
            cfg.SOLVER.IMS_PER_BATCH = loader.get("total_batch_size", cfg.SOLVER.IMS_PER_BATCH)
            cfg.DATALOADER.NUM_WORKERS = loader.get("num_workers", cfg.DATALOADER.NUM_WORKERS)
            mask_format = mapper.get("instance_mask_format")
            cfg.INPUT.MASK_FORMAT = mask_format or cfg.INPUT.MASK_FORMAT
            flips = [a for a in mapper.get("augmentations") or () if _name(a) == "RandomFlip"]
            cfg.INPUT.RANDOM_FLIP = "horizontal" if flips else "none"
            if mapper.get("recompute_boxes"):
                untold.append("recompute_boxes")


def _tell_augmentation(cfg: CfgNode, node: Any, key: str, untold: list[str]) -> None:
    name = _name(node)
    if name == "ResizeShortestEdge":
        edges = node.short_edge_length
        edges = [edges] if isinstance(edges, int) else list(edges)
        cfg.INPUT[f"MIN_SIZE_{key}"] = tuple(edges) if key == "TRAIN" else int(edges[0])
        cfg.INPUT[f"MAX_SIZE_{key}"] = int(node.get("max_size", cfg.INPUT[f"MAX_SIZE_{key}"]))
        if key == "TRAIN":
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = node.get("sample_style", "range")
    elif name == "RandomFlip" and node.get("horizontal", True) and not node.get("vertical"):
        pass
    elif name == "FixedSizeCrop":  # of a size that images are scaled to
        height, width = node.crop_size
        cfg.INPUT[f"MIN_SIZE_{key}"] = (min(height, width),) if key == "TRAIN" else height
        cfg.INPUT[f"MAX_SIZE_{key}"] = max(height, width)
        untold.append(f"the augmentation {name}")
    else:
        untold.append(f"the augmentation {name}")


def _tell_training(cfg: CfgNode, lazy: DictConfig, untold: list[str]) -> None:
    train = lazy.get("train") or OmegaConf.create({})
    cfg.OUTPUT_DIR = train.get("output_dir", cfg.OUTPUT_DIR)
    cfg.MODEL.WEIGHTS = train.get("init_checkpoint", "")
    cfg.MODEL.DEVICE = train.get("device", cfg.MODEL.DEVICE)
    cfg.SEED = train.get("seed", cfg.SEED)
    solver = cfg.SOLVER
    solver.MAX_ITER = int(train.get("max_iter", solver.MAX_ITER))
    solver.AMP.ENABLED = bool(OmegaConf.select(train, "amp.enabled", default=False))
    solver.CHECKPOINT_PERIOD = OmegaConf.select(train, "checkpointer.period", default=5000)
    cfg.TEST.EVAL_PERIOD = train.get("eval_period", 0)
    optimizer = lazy.get("optimizer") or OmegaConf.create({})
    if _name(optimizer) == "SGD":
        solver.BASE_LR = float(optimizer.lr)
        solver.MOMENTUM = float(optimizer.get("momentum", 0.0))
        solver.NESTEROV = bool(optimizer.get("nesterov", False))
        solver.WEIGHT_DECAY = float(optimizer.get("weight_decay", 0.0))
        norm = OmegaConf.select(optimizer, "params.weight_decay_norm", default=None)
        solver.WEIGHT_DECAY_NORM = solver.WEIGHT_DECAY if norm is None else float(norm)
    else:
        untold.append(f"the optimizer {_name(optimizer) or '(none)'}")
    _tell_schedule(cfg, lazy.get("lr_multiplier") or OmegaConf.create({}), untold)


def _tell_schedule(cfg: CfgNode, node: Any, untold: list[str]) -> None:
    solver = cfg.SOLVER
    solver.WARMUP_ITERS, solver.STEPS = 0, ()
    if _name(node) == "WarmupParamScheduler":
        solver.WARMUP_ITERS = round(node.warmup_length * solver.MAX_ITER)
        solver.WARMUP_FACTOR = float(node.warmup_factor)
        solver.WARMUP_METHOD = node.get("warmup_method", "linear")
        node = node.scheduler
    name = _name(node)
    if name == "CosineParamScheduler" and (node.start_value, node.end_value) == (1.0, 0.0):
        solver.LR_SCHEDULER_NAME = "WarmupCosineLR"
        return
    values = list(node.get("values") or ())
    factors = {round(b / a, 6) for a, b in pairwise(values)}
    if name != "MultiStepParamScheduler" or values[:1] != [1.0] or len(factors) > 1:
        untold.append(f"the schedule {name or '(none)'}")
        return
    milestones = list(node.milestones)
    updates = node.get("num_updates") or milestones[-1]
    inner = milestones[: len(values) - 1]
    steps = {round(step * solver.MAX_ITER / updates) for step in inner}
    solver.STEPS = tuple(sorted(step for step in steps if 0 < step < solver.MAX_ITER))
    solver.GAMMA = factors.pop() if factors else solver.GAMMA
