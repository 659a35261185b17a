"""Training and evaluation from a config."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import (
    build_test_loader,
    build_train_loader,
    check_trained_classes,
    report_unreadable,
)
from ..generators import derive_seed, seed_generators
from ..heads import configure_model
from ..population.untouched import untouched
from ..workers import restarted
from .amp import AMPTrainer
from .checkpoint import AtomicCheckpointer
from .divergence import naming_divergence
from .evaluation import build_evaluator
from .hooks import add_statistics_hooks, model_itself
from .lazy_files import build
from .preemption import StopOnSignal, noting_signals
from .resume import GatherResumeState, ResumeState
from .setup import evaluation_folder

logger = logging.getLogger(__name__)

# Each worker keeps its own running statistics while it trains; torch 2.14 renames how to say so.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in _DDP_ARGUMENTS
    else "broadcast_buffers": False
}

_SAVE_OR_EVALUATE = hooks.PeriodicCheckpointer | hooks.EvalHook


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with this project's layers, datasets and statistics.

    Differs from it in that it trains on CPU workers too, also in mixed precision, averages running
    statistics over the workers before they are used, never leaves a partial checkpoint, and writes
    ``results.json`` beside the evaluation's other files.

    A training that goes on from a checkpoint ends with the bits of one that was not interrupted:
    before each iteration the generators of a worker are seeded by the seed of the training, the
    worker and the iteration, and the checkpoint has the rest (:class:`ResumeState`).
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: with :func:`bn_detection.add_bn_detection_config`'s keys.
        """
        # DefaultTrainer's own __init__, except that it passes device_ids for DDP on a CPU.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        if comm.get_world_size() > 1:
            on_gpu = next(model.parameters()).is_cuda
            devices = [comm.get_local_rank()] if on_gpu else None
            model = DistributedDataParallel(model, device_ids=devices, **_KEEP_BUFFERS)
        amp = cfg.SOLVER.AMP
        self._trainer = (
            AMPTrainer(model, data_loader, optimizer, precision=amp.PRECISION)
            if amp.ENABLED
            else SimpleTrainer(model, data_loader, optimizer)
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        trained_on = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        self.checkpointer.thing_classes = trained_on.get("thing_classes")
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        # That of PreciseBN goes on from one estimate to the next.
        loaders = [data_loader, *(getattr(hook, "_data_loader", None) for hook in self._hooks)]
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._resume = ResumeState(
            model_itself(self), [loader for loader in loaders if loader is not None], seed
        )

    def state_dict(self) -> dict[str, Any]:
        state = {**TrainerBase.state_dict(self), "_trainer": self._trainer.state_dict()}
        resume = self._resume.state_dict(state.get("hooks", {}))
        return {**state, "resume": resume} if resume else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        if "resume" not in state_dict:
            logger.warning(
                "The checkpoint does not say where the data and random numbers were: they begin "
                "anew, so that the training goes on with other bits than if it had not stopped."
            )
            return
        hooks = self._resume.load_state_dict(state_dict["resume"])
        TrainerBase.load_state_dict(self, {"iteration": self.iter, "hooks": hooks})
        if self.cfg.SEED >= 0 and self._resume.seed != self.cfg.SEED:
            logger.warning(
                "SEED %d is not that of the checkpoint, %d, which data and random numbers go on "
                "with.",
                *(self.cfg.SEED, self._resume.seed),
            )

    def gather_resume_state(self) -> None:
        """Gather the states of all workers for a checkpoint of now; all workers must call it."""
        self._resume.gather(TrainerBase.state_dict(self).get("hooks", {}))

    def train(self) -> OrderedDict[str, Any] | None:
        """Train from :attr:`start_iter` on; returns the metrics of the last evaluation."""
        self._resume.use_seed()
        try:
            return super().train()
        finally:
            self._resume.close_loaders()

    def before_train(self) -> None:
        super().before_train()
        # The sum of two is the same in any order.
        if self.start_iter > 0 and comm.get_world_size() > 2:
            self._order_gradients()

    def _order_gradients(self) -> None:
        """Have DDP add gradients in the order in which an uninterrupted training does.

        It orders them by its first backward, once the second forward begins. So there is a step
        that counts for nothing, with the images of the first.
        """
        inner = self._trainer
        batch = next(inner._data_loader_iter)
        rest = chain([copy.deepcopy(batch)], inner._data_loader_iter)
        # Later versions of Detectron2 than v0.6 have a property before it.
        lazy = hasattr(inner, "_data_loader_iter_obj")
        setattr(inner, "_data_loader_iter_obj" if lazy else "_data_loader_iter", rest)
        precision = inner.precision if isinstance(inner, AMPTrainer) else None
        device = next(self.model.parameters()).device.type
        # At an iteration of its own, for the groups of layers that count calls in one.
        with (
            EventStorage(self.start_iter - 1),
            untouched(model_itself(self)),
            torch.jit.optimized_execution(False),
            torch.autocast(device, precision, enabled=precision is not None),
        ):
            sum(self.model(batch).values()).backward()
        inner.optimizer.zero_grad()

    def before_step(self) -> None:
        seed_generators(derive_seed(self._resume.seed, "step", comm.get_rank(), self.iter))
        super().before_step()

    def run_step(self) -> None:
        # What torch.jit makes of a function depends on the calls before, in its last bits.
        with torch.jit.optimized_execution(False):
            super().run_step()

    def build_hooks(self) -> list[HookBase | None]:
        built = add_statistics_hooks(self, super().build_hooks())
        saves = next(i for i, hook in enumerate(built) if isinstance(hook, _SAVE_OR_EVALUATE))
        built.insert(saves, GatherResumeState(self.cfg.SOLVER.CHECKPOINT_PERIOD))
        evaluates = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        built.insert(evaluates, StopOnSignal(self.cfg.SOLVER.CHECKPOINT_PERIOD))
        return built

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        # Detectron2's own logs the model.
        model = build(cfg) if cfg.BN.LAZY_CONFIG else super().build_model(cfg)
        return configure_model(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
        folder: str | None = None,
    ) -> OrderedDict[str, Any]:
        """Evaluate on DATASETS.TEST; worker 0 also writes ``results.json``.

        Args:
            cfg: the config.
            model: with the weights to evaluate.
            evaluators: one a dataset; by default those of its type.
            folder: for the results; by default ``OUTPUT_DIR/inference``.

        Returns:
            Metrics by task, in percent; by dataset and task if there are several datasets. Empty on
            workers other than 0.
        """
        folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if evaluators is None:
            evaluators = [
                build_evaluator(cfg, name, os.path.join(folder, name)) for name in cfg.DATASETS.TEST
            ]
        results = super().test(cfg, model, evaluators)
        if results and comm.is_main_process():
            os.makedirs(folder, exist_ok=True)
            keys = ("INFERENCE", "INFERENCE_PARTITION")
            summary = {f"BN.{key}": cfg.BN[key] for key in keys}
            summary["results"] = _without_nan(results)
            Path(folder, "results.json").write_text(json.dumps(summary, indent=2) + "\n")
            report_unreadable(cfg.OUTPUT_DIR)
        return results


def evaluate(cfg: CfgNode, resume: bool) -> OrderedDict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint in OUTPUT_DIR.

    Args:
        cfg: the config.
        resume: whether to prefer the checkpoint in OUTPUT_DIR.

    Returns:
        As :meth:`Trainer.test`; with TEST.AUG.ENABLED also the metrics with test-time augmentation,
        under names that end in ``_TTA``.
    """
    model = Trainer.build_model(cfg)
    checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    check_trained_classes(cfg, loaded)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        logger.warning(
            "Evaluating randomly initialized weights: MODEL.WEIGHTS is empty%s.",
            "" if resume else ", and without --resume the checkpoints in OUTPUT_DIR are not used",
        )
    folder = evaluation_folder(cfg, resume)
    results = Trainer.test(cfg, model, folder=folder)
    if cfg.TEST.AUG.ENABLED:
        results.update(_test_with_tta(cfg, model, folder))
    return results


def _without_nan(value: Any) -> Any:
    """JSON has no nan: what cannot be computed (AP of large objects without any) is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if value != value else value


def _test_with_tta(cfg: CfgNode, model: nn.Module, folder: str | None = None) -> dict[str, Any]:
    folder = os.path.join(folder or cfg.OUTPUT_DIR, "inference_TTA")
    results = Trainer.test(cfg, GeneralizedRCNNWithTTA(cfg, model), folder=folder)
    return {f"{task}_TTA": metrics for task, metrics in results.items()}


def train(cfg: CfgNode, resume: bool) -> OrderedDict[str, Any] | None:
    """Train, with evaluations and checkpoints as the config says.

    Args:
        cfg: the config.
        resume: whether to go on from the last checkpoint in OUTPUT_DIR, if there is one. Workers
            that replace failed ones do so in any case.

    Returns:
        The metrics of the last evaluation.

    Raises:
        ConfigError: the loss is not finite; names where, and the last good checkpoint.
        Stopped: SIGTERM or SIGUSR1 asked to stop. The iteration was finished, and there is a
            checkpoint of it.
    """
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume or restarted())
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks([hooks.EvalHook(0, lambda: _test_with_tta(cfg, trainer.model))])
    with naming_divergence(trainer), noting_signals():
        return trainer.train()
