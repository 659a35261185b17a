"""From a command line to a configuration that makes sense."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import ConfigError, add_bn_detection_config
from ..data import (
    LEAKY_SHAPES,
    check_datasets,
    find_builtin,
    near_names,
    read_coco_json,
    read_corrupted_name,
    register_datasets,
)
from ..files import FolderLock, make_folder, replacing
from ..imports import import_module_of_user
from ..norm import FORWARD
from ..shipped import find_config
from ..workers import restarted
from .checkpoint import last_checkpoint
from .checks import check_config
from .config_files import merge_config_file, merge_overrides
from .lazy_files import is_lazy, merge_lazy_config, split_overrides
from .rehearsal import rehearse
from .terminal import print_answers_only
from .trained import VERSIONS_NAME

_VERSIONED = ("bn_detection", "detectron2", "torch", "torchvision", "fvcore", "numpy")


def load_config(args: argparse.Namespace, *, unknown_keys: bool = False) -> CfgNode:
    """The config of ``--config-file`` and the ``KEY VALUE`` overrides.

    Args:
        args: of :func:`bn_detection.engine.argument_parser`.
        unknown_keys: whether the file may have keys that Detectron2 and this project do not know,
            those of somebody's own project.

    Raises:
        ConfigError: the file or a module of ``--import`` cannot be read, or a key or the type of a
            value is wrong.

    A file that ends in ``.py`` is a LazyConfig, and is run.
    """
    for module in getattr(args, "imports", ()):
        import_module_of_user(module, f"--import {module}")
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    overrides = args.opts
    lazy: list[str] = []
    path = find_config(args.config_file) if args.config_file else ""
    if is_lazy(path):
        model_overrides, overrides = split_overrides(args.opts)
        training = getattr(args, "eval_only", None) is False and not hasattr(args, "output")
        merge_lazy_config(cfg, path, model_overrides, training=training)
        lazy = cfg.BN.LAZY_CONFIG
    elif path:
        cfg.set_new_allowed(unknown_keys)
        merge_config_file(cfg, path)
        cfg.set_new_allowed(False)
    merge_overrides(cfg, overrides)
    if lazy != cfg.BN.LAZY_CONFIG:
        raise ConfigError(
            f"BN.LAZY_CONFIG {cfg.BN.LAZY_CONFIG}: a LazyConfig is code, which runs where "
            f"--config-file names it alone: --config-file {' '.join(cfg.BN.LAZY_CONFIG[:1])}"
        )
    return cfg


def preflight(args: argparse.Namespace) -> str:
    """Refuse a job that cannot work, before a worker starts.

    Args:
        args: of :func:`bn_detection.engine.argument_parser`.

    Returns:
        The device to launch workers for: MODEL.DEVICE.

    Raises:
        ConfigError: names the key or flag, its value, and what would be right.
    """
    cfg = load_config(args)
    writes = not args.eval_only and args.machine_rank == 0 and os.environ.get("RANK", "0") == "0"
    if writes and os.path.exists(os.path.join(cfg.OUTPUT_DIR, FolderLock.FILE_NAME)):
        keep_folder(cfg.OUTPUT_DIR)
    num_workers = int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines))
    resume = args.resume or restarted()
    check_config(cfg, num_workers=num_workers, eval_only=args.eval_only, resume=resume)
    if not cfg.OUTPUT_DIR:
        raise ConfigError('OUTPUT_DIR is "": give the folder to write to.')
    register_datasets(cfg)
    check_datasets(cfg, [] if args.eval_only else cfg.DATASETS.TRAIN)
    rehearse(cfg, training=not args.eval_only)
    make_folder(Path(cfg.OUTPUT_DIR), f"OUTPUT_DIR {cfg.OUTPUT_DIR}")
    if writes:
        keep_folder(cfg.OUTPUT_DIR)
    return cfg.MODEL.DEVICE


_kept: dict[str, FolderLock] = {}


def keep_folder(folder: str) -> None:
    """Keep OUTPUT_DIR for the training of this process and its workers, until it ends.

    Args:
        folder: OUTPUT_DIR, made if it is not there.

    Raises:
        ConfigError: another training works there; the message has its host and process.
    """
    path = os.path.realpath(folder)
    if path in _kept and _kept[path].holds():
        return
    make_folder(Path(folder), f"OUTPUT_DIR {folder}")
    lock = FolderLock(folder)
    try:
        lock.take()
    except ConfigError as error:
        raise ConfigError(f"OUTPUT_DIR {folder}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        print(
            f"warning: OUTPUT_DIR {folder}: its file system has no locks ({error.strerror}), so "
            "nothing keeps a second training from writing there.",
            file=sys.stderr,
        )
    _kept[path] = lock


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a job, in a worker, with loggers, seeds and datasets set up.

    The config, the versions and the log are left in the output folder: ``OUTPUT_DIR``, or that of
    :func:`evaluation_folder` for an evaluation, whose config would replace that of the training.
    """
    cfg = load_config(args)
    folder = evaluation_folder(cfg, args.resume) if args.eval_only else cfg.OUTPUT_DIR
    return begin(cfg, args, folder)


def begin(cfg: CfgNode, args: argparse.Namespace, folder: str, *, quiet: bool = False) -> CfgNode:
    """Set up the loggers, seeds and datasets of a job, in a worker.

    Args:
        cfg: the config; it is frozen.
        args: of :func:`bn_detection.engine.argument_parser`.
        folder: for the config, the versions and the log.
        quiet: whether the terminal gets no more than progress and answers.

    Returns:
        ``cfg``, with MODEL.DEVICE "cpu" where there is no GPU.
    """
    device = cfg.MODEL.DEVICE
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    shown = cfg.clone()
    shown.defrost()
    shown.OUTPUT_DIR = folder
    shown.freeze()
    setup_logger(shown.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bn_detection")
    if quiet:
        print_answers_only(shown.OUTPUT_DIR)
    file = find_config(args.config_file) if args.config_file else ""
    default_setup(shown, argparse.Namespace(**{**vars(args), "config_file": file}))
    logger = logging.getLogger(__name__)
    if device != cfg.MODEL.DEVICE:
        logger.warning("MODEL.DEVICE %s: there is no GPU here, so this runs on the CPU.", device)
    if comm.is_main_process():
        _write_versions(Path(shown.OUTPUT_DIR, VERSIONS_NAME), cfg.MODEL.DEVICE)
    register_datasets(cfg)
    return cfg


def check_dataset_names(cfg: CfgNode) -> None:
    """Refuse names that :func:`bn_detection.register_datasets` would, and register nothing.

    Raises:
        ConfigError: as there, or no dataset has a name.
    """
    own = (name for name, _, _ in read_coco_json(cfg.DATASETS.COCO_JSON))
    known = {*own, *LEAKY_SHAPES, *DatasetCatalog}
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            is_corrupted = "@" in name and name not in known
            base = read_corrupted_name(name)[0] if is_corrupted else name
            if base not in known and find_builtin(base) is None:
                raise ConfigError(
                    f'DATASETS.{key} "{name}": there is no dataset "{base}". '
                    f"{near_names(base, known)}"
                )


def evaluation_folder(cfg: CfgNode, resume: bool) -> str:
    """Where ``--eval-only`` leaves its results: a folder a checkpoint and kind of statistics.

    ``OUTPUT_DIR/eval_<checkpoint>_<BN.INFERENCE>``, and ``_<BN.INFERENCE_PARTITION>`` if it is not
    "forward".
    """
    checkpoint = last_checkpoint(cfg.OUTPUT_DIR) if resume else None
    stem = Path(checkpoint or cfg.MODEL.WEIGHTS or "random_weights").stem
    partition = cfg.BN.INFERENCE_PARTITION
    kind = cfg.BN.INFERENCE + ("" if partition == FORWARD else f"_{partition}")
    return os.path.join(cfg.OUTPUT_DIR, f"eval_{stem}_{kind}")


def installed_versions() -> dict[str, str]:
    """The versions of Python, this package and those that it computes with."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
            module = sys.modules.get(name)
            versions[name] = str(getattr(module, "__version__", "not installed"))
    return versions


def device_name(device: str) -> str:
    """The model of a GPU, or of the CPU, that a MODEL.DEVICE stands for."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", cpus.read_text(), re.M) if cpus.exists() else []
    return next(iter(models), platform.processor() or platform.machine())


def _write_versions(path: Path, device: str) -> None:
    content = {
        "command": sys.argv,
        "workers": comm.get_world_size(),
        "versions": installed_versions(),
        "device": device_name(device),
    }
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")
