"""The tools, up to where an error would be late: what they check first, and a first iteration."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from test_train_net import overrides
from tooling import QUICKSTART, Ended, run_tool
from training import make_images

from bn_detection import engine
from bn_detection.engine import Trainer, argument_parser, load_config
from bn_detection.engine.setup import register_datasets

CONFIG = QUICKSTART / "mask_rcnn_bn.yaml"
DATA, WEIGHTS = "shapes", "weights.pth"
_FEW_IMAGES, _FEW_PROCESSES = 16, 2


def make_material(folder: Path) -> None:
    """What all parts need: a few images, and weights of a model that has seen none."""
    (folder / DATA).mkdir()
    make_images(folder / DATA)
    options = map(str, ("OUTPUT_DIR", folder, "SEED", 1))
    cfg = load_config(argument_parser().parse_args(["--config-file", str(CONFIG), *options]))
    torch.manual_seed(0)
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, folder / WEIGHTS)


def prepare_process() -> None:
    """One thread, and as many open files as there may be."""
    torch.set_num_threads(1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config of a tool, without a log in OUTPUT_DIR; in place of ``setup``."""
    cfg = load_config(args)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    register_datasets(cfg)
    return cfg


def begin_training(cfg: CfgNode, resume: bool = False) -> None:
    """What a training does before its first iteration, and that iteration; for ``train``.

    A batch of very many images, which is no error, is not loaded.
    """
    if cfg.SOLVER.IMS_PER_BATCH > _FEW_IMAGES or cfg.DATALOADER.NUM_WORKERS > _FEW_PROCESSES:
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer._resume.use_seed()
    with EventStorage(trainer.start_iter) as trainer.storage:
        trainer.iter = trainer.start_iter
        try:
            trainer.run_step()
        finally:
            trainer._resume.close_loaders()


def nothing(*_: object) -> None:
    """In place of what a tool does after its checks."""


@contextlib.contextmanager
def beginning(*whole: str) -> Iterator[None]:
    """While it lasts, tools do their checks, and of what comes then the beginning.

    Args:
        whole: functions of ``bn_detection.engine`` that do all that they do.
    """
    parts = {"setup": read_config, "train": begin_training, "evaluate": nothing}
    parts.update(dict.fromkeys(("recalibrate", "probe", "diagnose"), nothing))
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            if name not in whole:
                stack.enter_context(mock.patch.object(engine, name, part))
        stack.enter_context(mock.patch("bn_detection.workers.agent.run_workers", nothing))
        yield


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Relative paths that a tool writes to lead below ``folder``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def arguments(
    tool: str, material: Path, output: Path, *more: object, config: Path = CONFIG
) -> tuple[str, list[str]]:
    """A tool and a command line of it that works; "evaluate" is ``train_net --eval-only``.

    Args:
        tool: or "evaluate".
        material: of :func:`make_material`.
        output: to write to, with the suffix that the tool needs.
        more: keys and values.
        config: of the model.
    """
    files: dict[str, list[str]] = {
        "recalibrate": ["--output", f"{output}.pth"],
        "probe": ["--output", f"{output}.json"],
        "diagnose": ["--output-dir", str(output)],
        "evaluate": ["--eval-only"],
    }
    weights = () if tool == "train_net" else ("MODEL.WEIGHTS", material / WEIGHTS)
    options = overrides(material / DATA, output, *weights, *more)
    name = "train_net" if tool == "evaluate" else tool
    return name, ["--config-file", str(config), *files.get(tool, []), *options]


def running(tool: str, line: list[str]) -> functools.partial[Ended]:
    """For :func:`campaign.counting.attempt`."""
    return functools.partial(run_tool, tool, *line)
