"""The hooks of a training that average, estimate, freeze and trace statistics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer, HookBase, hooks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError
from ..data import build_train_loader
from ..leakage import check_probe_config
from ..leakage.live import MeasureLeakage, live_measurement
from ..population import (
    AverageStatistics,
    FreezeStatistics,
    PreciseStatistics,
    TraceStatistics,
    apply_statistics,
    batch_norms_in_training,
    describe_batch_norms,
    estimate_statistics,
)
from .checks import first_frozen_iteration

logger = logging.getLogger(__name__)


def add_statistics_hooks(
    trainer: DefaultTrainer, built: list[HookBase | None]
) -> list[HookBase | None]:
    """Put this project's hooks among Detectron2's, before those that use the statistics.

    Args:
        trainer: with a config that has :func:`bn_detection.add_bn_detection_config`'s keys.
        built: Detectron2's hooks; changed in place.

    Returns:
        All hooks, in the order to register them in.

    Raises:
        ConfigError: a key asks for statistics of layers, and no layer matches.
    """
    cfg = trainer.cfg
    # PreciseBN too: it replaces running statistics, and averaging its result is not upstream's.
    uses = hooks.PreciseBN | hooks.PeriodicCheckpointer | hooks.EvalHook
    first_use = next(i for i, hook in enumerate(built) if isinstance(hook, uses))
    periods = (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
    statistics = [AverageStatistics(trainer.model, periods)]
    if cfg.BN.POPULATION.ESTIMATOR != "ema":
        statistics.append(_population_hook(trainer))
    if cfg.BN.FREEZE.LAST_ITERS is not None:
        statistics.append(_freeze_hook(trainer))
    built[first_use:first_use] = statistics
    if cfg.BN.TRACE.PERIOD > 0:
        built.insert(0, _trace_hook(trainer, built))
    if cfg.BN.LEAKAGE.PERIOD > 0:
        built.insert(0, _leakage_hook(trainer))
    return built


def model_itself(trainer: DefaultTrainer) -> nn.Module:
    """The model of a trainer, without DDP."""
    is_ddp = isinstance(trainer.model, DistributedDataParallel)
    return trainer.model.module if is_ddp else trainer.model


def _trace_hook(trainer: DefaultTrainer, built: list[HookBase | None]) -> HookBase:
    cfg, node = trainer.cfg, trainer.cfg.BN.TRACE
    try:
        trace = TraceStatistics(
            trainer.model,
            cfg.OUTPUT_DIR,
            period=node.PERIOD,
            modules=node.MODULES or cfg.BN.MODULES,
            channels=node.CHANNELS,
        )
    except ValueError as error:
        key = "BN.TRACE.MODULES" if node.MODULES else "BN.TRACE.PERIOD > 0: BN.MODULES"
        raise ConfigError(f"{key} {error}") from error
    for hook in built:
        if isinstance(hook, PreciseStatistics):
            hook.listeners.append(trace.record_population)
    return trace


def _leakage_hook(trainer: DefaultTrainer) -> HookBase:
    cfg, model = trainer.cfg, model_itself(trainer)
    if not batch_norms_in_training(model, cfg.BN.MODULES):
        raise ConfigError(
            f"BN.LEAKAGE.PERIOD {cfg.BN.LEAKAGE.PERIOD}: no BN layer in training mode matches "
            f"BN.MODULES {list(cfg.BN.MODULES)}, so there is no batch that could leak. "
            f"{describe_batch_norms(model)}"
        )
    check_probe_config(cfg)
    return MeasureLeakage(live_measurement(cfg, model), cfg.BN.LEAKAGE.PERIOD)


def _population_hook(trainer: DefaultTrainer) -> HookBase:
    cfg, node = trainer.cfg, trainer.cfg.BN.POPULATION
    is_fvcore = node.ESTIMATOR == "fvcore"
    modules = ["*"] if is_fvcore else cfg.BN.MODULES
    model = model_itself(trainer)
    chosen = batch_norms_in_training(model, modules)
    if not chosen:
        raise ConfigError(
            f"BN.POPULATION.ESTIMATOR {node.ESTIMATOR}: no BN layer in training mode matches "
            f"BN.MODULES {list(modules)}, so there are no statistics to estimate. "
            f"{describe_batch_norms(model)}"
        )
    others = [name for name in batch_norms_in_training(model, ["*"]) if name not in chosen]
    if others:
        logger.info(
            "%d BN layers outside BN.MODULES %s keep their running averages, such as %s.",
            *(len(others), list(modules), others[0]),
        )
    if is_fvcore:
        source, num_batches = _population_source(cfg)
        loader = trainer.build_train_loader(source)
        period = node.PERIOD or cfg.TEST.EVAL_PERIOD
        return hooks.PreciseBN(period, trainer.model, loader, num_batches)
    uses = (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD)
    return PreciseStatistics(
        model,
        *_population_batches(cfg),
        periods=(node.PERIOD,) if node.PERIOD else uses,
        modules=modules,
        restore_ema=node.RESTORE_EMA,
        **_population_options(cfg),
    )


def _freeze_hook(trainer: DefaultTrainer) -> HookBase:
    cfg, node = trainer.cfg, trainer.cfg.BN.FREEZE
    key = "BN.FREEZE.MODULES" if node.MODULES else "BN.MODULES"
    model = model_itself(trainer)

    def estimate(layers: list[str]) -> None:
        options = _population_options(cfg)
        statistics = estimate_statistics(
            model, *_population_batches(cfg), modules=layers, **options
        )
        apply_statistics(model, statistics)

    try:
        return FreezeStatistics(
            model,
            first_frozen_iteration(cfg),
            node.MODULES or cfg.BN.MODULES,
            precise=estimate if node.STATISTICS == "precise" else None,
            fixed=trainer._trainer.optimizer if node.AFFINE == "fixed" else None,
        )
    except ValueError as error:
        raise ConfigError(
            f"BN.FREEZE.LAST_ITERS {node.LAST_ITERS}: {key} {error} {describe_batch_norms(model)}"
        ) from error


def _population_source(cfg: CfgNode) -> tuple[CfgNode, int]:
    """The config of the loader for estimates, and the number of batches of each worker."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = cfg.BN.POPULATION.BATCH_SIZE or cfg.SOLVER.IMS_PER_BATCH
    cfg.DATALOADER.NUM_WORKERS = 0  # the loader lives beside that of the training
    return cfg, math.ceil(cfg.BN.POPULATION.NUM_SAMPLES / cfg.SOLVER.IMS_PER_BATCH)


def _population_batches(
    cfg: CfgNode,
) -> tuple[Callable[[], Iterable[list[dict[str, Any]]]], int]:
    cfg, num_batches = _population_source(cfg)
    # Inference sees images as its own mapper makes them.
    at_inference = cfg.BN.POPULATION.ROIS == "inference"
    mapper = DatasetMapper(cfg, False) if at_inference else None
    # The same images each time, so that estimates differ by the model alone.
    return lambda: build_train_loader(cfg, mapper, seed=max(cfg.SEED, 0)), num_batches


def _population_options(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.BN.POPULATION
    estimator = "pooled" if node.ESTIMATOR == "ema" else node.ESTIMATOR
    return {"estimator": estimator, "tolerance": node.TOLERANCE, "rois": node.ROIS}
