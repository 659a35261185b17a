"""Configs that cannot mean anything are refused before the first iteration."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY

from ..config import ConfigError
from ..heads import (
    HEADS,
    SHUFFLE_MODES,
    BNOptions,
    BNRetinaNet,
    Head,
    NormFactory,
    level_options,
    norm_names,
)
from ..norm import (
    FORWARD,
    INFERENCE,
    KERNELS,
    LevelOptions,
    build_partition,
    check_choice,
    inference_partition_names,
    partition_names,
)
from ..population import AFFINE, ESTIMATORS, ROIS
from .amp import PRECISIONS
from .checkpoint import last_checkpoint
from .values import check_values


def check_config(cfg: CfgNode, *, num_workers: int, eval_only: bool, resume: bool) -> None:
    """Refuse a config that cannot mean anything.

    Args:
        cfg: the config.
        num_workers: of the whole job.
        eval_only: whether nothing will be trained.
        resume: whether the job goes on from the checkpoint in OUTPUT_DIR.

    Raises:
        ConfigError: names the key, its value, and what would be right.
    """
    if num_workers < 1:
        raise ConfigError(f"--num-gpus {num_workers}: at least 1 worker is needed.")
    check_values(cfg, training=not eval_only)
    _check_heads(cfg)
    _check_bn(cfg)
    resumes = resume and last_checkpoint(cfg.OUTPUT_DIR) is not None
    if not resumes:
        _check_weights(cfg.MODEL.WEIGHTS)
    if not eval_only:
        _check_synchronization(cfg)
        _check_training(cfg, num_workers, resume)
        _check_virtual_workers(cfg, num_workers)


def check_recalibration(cfg: CfgNode, num_workers: int) -> None:
    """Refuse a config whose population statistics cannot be estimated anew, whatever the weights.

    Args:
        cfg: the config.
        num_workers: of the whole job.

    Raises:
        ConfigError: names the key, its value, and what would be right.
    """
    check_config(cfg, num_workers=num_workers, eval_only=True, resume=False)
    _check_virtual_workers(cfg, num_workers)
    if num_workers > 1:
        _check_synchronization(cfg)
    node = cfg.BN.POPULATION
    key = "BN.POPULATION.BATCH_SIZE" if node.BATCH_SIZE else "SOLVER.IMS_PER_BATCH"
    batch_size = node.BATCH_SIZE or cfg.SOLVER.IMS_PER_BATCH
    if batch_size % num_workers:
        raise ConfigError(
            f"{key} {batch_size} cannot be divided among {num_workers} workers; give "
            f"BN.POPULATION.BATCH_SIZE a multiple of {num_workers}."
        )
    if node.ESTIMATOR == "fvcore" and num_workers > 1:
        raise ConfigError(
            f"BN.POPULATION.ESTIMATOR fvcore on {num_workers} workers: each would have statistics "
            "of its own images. Run it on 1 worker, or set BN.POPULATION.ESTIMATOR pooled."
        )


def _heads(cfg: CfgNode) -> Iterator[tuple[str, CfgNode, Head]]:
    """Key, config and class names of each head that the model has."""
    absent = {
        "ROI_MASK_HEAD": not cfg.MODEL.MASK_ON,
        "ROI_KEYPOINT_HEAD": not cfg.MODEL.KEYPOINT_ON,
    }
    for name, head in HEADS.items():
        if not absent.get(name):
            yield f"MODEL.{name}", cfg.MODEL[name], head


def _check_heads(cfg: CfgNode) -> None:
    for key, node, head in _heads(cfg):
        if head.ours == node.NAME:
            _check_choice(f"{key}.NORM", node.NORM, norm_names())
        elif head.stock == node.NAME and not _stock_can(head, node.NORM):
            raise ConfigError(
                f'{key}.NORM is "{node.NORM}", which {key}.NAME "{node.NAME}" does not have; '
                f'set {key}.NAME "{head.ours}".'
            )
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and (
        box_head.NORM or HEADS["ROI_BOX_HEAD"].ours == box_head.NAME
    ):
        raise ConfigError(
            'MODEL.ROI_HEADS.NAME is "Res5ROIHeads", whose second stage is a ResNet stage and has '
            f'no box head: MODEL.ROI_BOX_HEAD (NAME "{box_head.NAME}", NORM "{box_head.NORM}") '
            "would be ignored. Use StandardROIHeads or CascadeROIHeads with FPN; to change the "
            "layers of Res5ROIHeads, convert them after the model is built (BN.CONVERT)."
        )


def _check_synchronization(cfg: CfgNode) -> None:
    """Refuse what torch's SyncBatchNorm cannot do; inference with it, and one process, it can."""
    if torch.device(cfg.MODEL.DEVICE).type != "cpu":
        return
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and cfg.MODEL.RETINANET.NORM == "SyncBN":
        raise ConfigError(
            'MODEL.RETINANET.NORM is "SyncBN", and MODEL.META_ARCHITECTURE "RetinaNet" cannot do '
            'that on a CPU; set MODEL.META_ARCHITECTURE "BNRetinaNet".'
        )
    for key, node, head in _heads(cfg):
        if head.stock == node.NAME and node.NORM == "SyncBN":
            raise ConfigError(
                f'{key}.NORM is "SyncBN", and {key}.NAME "{node.NAME}" cannot do that on a CPU; '
                f'set {key}.NAME "{head.ours}".'
            )


def _stock_can(head: Head, norm: str) -> bool:
    return _stock_has(norm) if head.stock_has_norm else norm == ""


def _stock_has(norm: str) -> bool:
    try:
        get_norm(norm, 32)
    except KeyError:
        return False
    return True


def _check_bn(cfg: CfgNode) -> None:
    node = cfg.BN
    _check_choice("BN.INFERENCE", node.INFERENCE, INFERENCE)
    _check_choice("BN.KERNELS", node.KERNELS, KERNELS)
    if node.KERNELS == "triton":
        if torch.device(cfg.MODEL.DEVICE).type == "cpu":
            raise ConfigError(
                'BN.KERNELS is "triton", whose kernels run on a GPU, and this runs on the CPU; set '
                'BN.KERNELS "auto".'
            )
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                'BN.KERNELS is "triton", and the package triton is not installed; set BN.KERNELS '
                '"auto", or install it.'
            )
    if node.INFERENCE_BATCH_SIZE < 1:
        raise ConfigError(
            f"BN.INFERENCE_BATCH_SIZE {node.INFERENCE_BATCH_SIZE}: it must be at least 1."
        )
    _check_inference_partition(node)
    if not 0 < node.MOMENTUM <= 1:
        raise ConfigError(f"BN.MOMENTUM {node.MOMENTUM}: it must be above 0 and at most 1.")
    if node.EPS <= 0:
        raise ConfigError(f"BN.EPS {node.EPS}: it must be above 0.")
    _check_choice("BN.SHUFFLE.MODE", node.SHUFFLE.MODE, SHUFFLE_MODES)
    _check_choice("BN.RENORM.PARTITION", node.RENORM.PARTITION, partition_names())
    for entry in node.CONVERT:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not (is_pair and all(isinstance(part, str) for part in entry)):
            raise ConfigError(
                f"BN.CONVERT {entry}: each entry is [glob over module names, norm], such as "
                '["roi_heads.*", "ShuffleBN"].'
            )
        _check_choice(f"BN.CONVERT {entry}: the norm", entry[1], norm_names())
    _check_partitions(cfg)
    _check_population(cfg)
    _check_levels(cfg)
    _check_freeze(cfg)
    for key, minimum in (("PERIOD", 0), ("CHANNELS", 1)):
        if node.TRACE[key] < minimum:
            raise ConfigError(f"BN.TRACE.{key} {node.TRACE[key]}: it must be at least {minimum}.")
    for key, minimum in (("PERIOD", 0), ("LIVE_IMAGES", 2)):
        if node.LEAKAGE[key] < minimum:
            raise ConfigError(
                f"BN.LEAKAGE.{key} {node.LEAKAGE[key]}: it must be at least {minimum}."
            )


def _check_inference_partition(node: CfgNode) -> None:
    name = node.INFERENCE_PARTITION
    _check_choice("BN.INFERENCE_PARTITION", name, inference_partition_names())
    if name != FORWARD and node.INFERENCE != "batch":
        raise ConfigError(
            f'BN.INFERENCE_PARTITION "{name}" divides the RoIs of a batch, and BN.INFERENCE is '
            f'"{node.INFERENCE}"; set BN.INFERENCE "batch".'
        )
    if name == "shuffle" and node.INFERENCE_BATCH_SIZE < 2:
        raise ConfigError(
            'BN.INFERENCE_PARTITION "shuffle" mixes the RoIs of several images, and a forward has '
            "1; set BN.INFERENCE_BATCH_SIZE 8, or more."
        )


def _check_partitions(cfg: CfgNode) -> None:
    node = cfg.BN
    for entry in node.PARTITION_OPTIONS:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not (is_pair and isinstance(entry[0], str)):
            raise ConfigError(
                f'BN.PARTITION_OPTIONS {entry}: each entry is [option, value], such as ["size", 4].'
            )
    try:
        build_partition("ghost", ghost_size=node.GHOST.SIZE)
        options = BNOptions.from_config(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    users = set(partition_names()) & set(norm_names())
    used = {"BN.RENORM.PARTITION": node.RENORM.PARTITION}
    used |= {f"{key}.NORM": head.NORM for key, head, _ in _heads(cfg)}
    used |= {"MODEL.RETINANET.NORM": cfg.MODEL.RETINANET.NORM}
    used |= {f"BN.CONVERT {entry}": entry[1] for entry in node.CONVERT}
    used |= {"BN.INFERENCE_PARTITION": node.INFERENCE_PARTITION}
    used = {key: norm for key, norm in used.items() if norm in users}
    for key, norm in used.items():
        try:
            NormFactory(norm, options)
        except ValueError as error:
            raise ConfigError(
                f'BN.PARTITION_OPTIONS {node.PARTITION_OPTIONS}, for {key} "{norm}": {error}'
            ) from error
    if node.PARTITION_OPTIONS and not used:
        raise ConfigError(
            f"BN.PARTITION_OPTIONS {node.PARTITION_OPTIONS}: no NORM is a registered partition of "
            f"one's own. Those are: {', '.join(sorted(users)) or 'none'} (--import registers them)."
        )


def _check_population(cfg: CfgNode) -> None:
    node = cfg.BN.POPULATION
    _check_choice("BN.POPULATION.ESTIMATOR", node.ESTIMATOR, ("ema", *ESTIMATORS, "fvcore"))
    _check_choice("BN.POPULATION.ROIS", node.ROIS, ROIS)
    for key, minimum in (("NUM_SAMPLES", 1), ("BATCH_SIZE", 0), ("PERIOD", 0), ("TOLERANCE", 0)):
        if node[key] < minimum:
            raise ConfigError(f"BN.POPULATION.{key} {node[key]}: it must be at least {minimum}.")
    if node.ESTIMATOR != "ema" and cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError(
            f"BN.POPULATION.ESTIMATOR {node.ESTIMATOR} and TEST.PRECISE_BN.ENABLED True both "
            "replace the running statistics; set TEST.PRECISE_BN.ENABLED False."
        )
    precise_bn = cfg.TEST.PRECISE_BN
    if precise_bn.ENABLED and precise_bn.NUM_ITER < 1:
        raise ConfigError(f"TEST.PRECISE_BN.NUM_ITER {precise_bn.NUM_ITER}: it must be at least 1.")
    if node.ESTIMATOR == "fvcore" or precise_bn.ENABLED:
        plain = {"TOLERANCE": 0, "ROIS": "training", "RESTORE_EMA": False}
        for key, value in plain.items():
            if node[key] != value:
                raise ConfigError(
                    f"BN.POPULATION.{key} {node[key]}: Detectron2's PreciseBN (ESTIMATOR fvcore, "
                    "TEST.PRECISE_BN.ENABLED True) knows nothing of it; set "
                    'BN.POPULATION.ESTIMATOR "pooled".'
                )


def _check_levels(cfg: CfgNode) -> None:
    arch, norm = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NORM
    try:
        levels = level_options(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if arch in META_ARCH_REGISTRY and _is_ours(META_ARCH_REGISTRY.get(arch)):
        try:
            NormFactory(norm, BNOptions.from_config(cfg)).of_levels(32, 2, levels)
        except ValueError as error:
            raise ConfigError(f'MODEL.RETINANET.NORM "{norm}": {error}') from error
        by_fvcore = cfg.BN.POPULATION.ESTIMATOR == "fvcore" or cfg.TEST.PRECISE_BN.ENABLED
        if by_fvcore and levels.train != levels.population:
            raise ConfigError(
                "Detectron2's PreciseBN (BN.POPULATION.ESTIMATOR fvcore, TEST.PRECISE_BN.ENABLED "
                f'True) cannot tell the levels apart when BN.LEVELS.TRAIN is "{levels.train}" and '
                f'BN.LEVELS.POPULATION "{levels.population}"; set BN.POPULATION.ESTIMATOR "pooled".'
            )
        return
    for key, value in vars(LevelOptions()).items():
        if getattr(levels, key) != value:
            raise ConfigError(
                f'BN.LEVELS.{key.upper()} is "{getattr(levels, key)}", which '
                f'MODEL.META_ARCHITECTURE "{arch}" does not know; "BNRetinaNet" does.'
            )
    if arch == "RetinaNet" and not _stock_has(norm):
        raise ConfigError(
            f'MODEL.RETINANET.NORM is "{norm}", which MODEL.META_ARCHITECTURE "RetinaNet" does not '
            'have; set MODEL.META_ARCHITECTURE "BNRetinaNet".'
        )


def _is_ours(arch: object) -> bool:
    return isinstance(arch, type) and issubclass(arch, BNRetinaNet)


def _check_freeze(cfg: CfgNode) -> None:
    node = cfg.BN.FREEZE
    _check_choice("BN.FREEZE.STATISTICS", node.STATISTICS, ("ema", "precise"))
    _check_choice("BN.FREEZE.AFFINE", node.AFFINE, AFFINE)
    first_frozen_iteration(cfg)
    if node.STATISTICS == "precise" and cfg.BN.POPULATION.ESTIMATOR == "fvcore":
        raise ConfigError(
            "BN.FREEZE.STATISTICS precise: an estimate by BN.POPULATION.ESTIMATOR fvcore differs "
            'between workers, which would then train with different layers; set it to "pooled".'
        )


def first_frozen_iteration(cfg: CfgNode) -> int | None:
    """The iteration, from 0, at which BN.FREEZE freezes its layers; None for never.

    Args:
        cfg: the config.

    Raises:
        ConfigError: BN.FREEZE.LAST_ITERS is no part of the training.
    """
    last, max_iter = cfg.BN.FREEZE.LAST_ITERS, cfg.SOLVER.MAX_ITER
    if last is None:
        return None
    iterations = last
    if isinstance(last, float):
        # Where a config file has a fraction, a whole number can be given as 300.0 only.
        whole = last > 1 and last.is_integer()
        iterations = int(last) if whole else max(round(last * max_iter), 1) if 0 < last < 1 else 0
    is_number = isinstance(iterations, int) and not isinstance(iterations, bool)
    if not is_number or not 1 <= iterations <= max_iter:
        raise ConfigError(
            f"BN.FREEZE.LAST_ITERS {last}: it must be a whole number from 1 to SOLVER.MAX_ITER "
            f"{max_iter}, a fraction of it between 0 and 1, or None for never."
        )
    return max_iter - iterations


def _check_virtual_workers(cfg: CfgNode, num_workers: int) -> None:
    virtual = cfg.BN.VIRTUAL_WORKERS
    if virtual == 0:
        if cfg.BN.VIRTUAL_LOSSES:
            raise ConfigError(
                "BN.VIRTUAL_LOSSES True averages losses over virtual workers: set "
                "BN.VIRTUAL_WORKERS to their number."
            )
        return
    if virtual < 0 or virtual % num_workers:
        raise ConfigError(
            f"BN.VIRTUAL_WORKERS {virtual}: it must be a multiple of the number of workers, "
            f"{num_workers} here; 0 is for none."
        )
    # What Detectron2 scales it to with REFERENCE_WORLD_SIZE.
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers
    images = cfg.SOLVER.IMS_PER_BATCH * num_workers // reference
    population = cfg.BN.POPULATION.BATCH_SIZE
    batches = {"SOLVER.IMS_PER_BATCH": images, "BN.POPULATION.BATCH_SIZE": population}
    for key, number in batches.items():
        if number % virtual:
            raise ConfigError(
                f"BN.VIRTUAL_WORKERS {virtual}: {key} {number} cannot be divided among them; give "
                f"a multiple of {virtual} images."
            )
    if cfg.BN.SHUFFLE.MODE == "features" and virtual != num_workers:
        raise ConfigError(
            f"BN.SHUFFLE.MODE features moves RoIs between workers; BN.VIRTUAL_WORKERS {virtual} "
            f"are not the {num_workers} that run; set BN.SHUFFLE.MODE statistics."
        )


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    try:
        check_choice(key, value, choices)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_weights(weights: str) -> None:
    if "://" not in weights and weights and not os.path.isfile(weights):
        raise ConfigError(
            f"MODEL.WEIGHTS {weights}: there is no such file. Give a checkpoint, or "
            'MODEL.WEIGHTS "" for random initialization.'
        )


def _check_training(cfg: CfgNode, num_workers: int, resume: bool) -> None:
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name a dataset to train on.")
    solver = cfg.SOLVER
    # With REFERENCE_WORLD_SIZE Detectron2 scales the batch to the workers.
    reference = solver.REFERENCE_WORLD_SIZE or num_workers
    if reference > solver.IMS_PER_BATCH or solver.IMS_PER_BATCH % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided among {reference} "
            f"workers; give a multiple of {reference}."
        )
    if cfg.BN.POPULATION.BATCH_SIZE % reference:
        raise ConfigError(
            f"BN.POPULATION.BATCH_SIZE {cfg.BN.POPULATION.BATCH_SIZE} cannot be divided among "
            f"{reference} workers; give a multiple of {reference}, or 0 for SOLVER.IMS_PER_BATCH."
        )
    checkpoint = last_checkpoint(cfg.OUTPUT_DIR)
    if checkpoint and not resume:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a checkpoint of another run, {checkpoint}. Go on "
            "with it by --resume, or give another OUTPUT_DIR."
        )
    if solver.AMP.ENABLED:
        _check_choice("SOLVER.AMP.PRECISION", solver.AMP.PRECISION, tuple(PRECISIONS))
