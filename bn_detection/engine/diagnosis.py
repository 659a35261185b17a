"""From a config and a checkpoint to a diagnosis of the BN layers, in files."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import ConfigError
from ..data import SinglePassLoader, check_dataset_files, report_unreadable
from ..files import make_folder, replacing
from ..heads import norm_layers
from ..leakage import LeakageReport, check_probe, images_per_worker, measure_leakage
from ..leakage.diagnosis import Diagnosis
from ..leakage.findings import Examined, conclude
from ..leakage.layers import LayerReport, inspect_layers, spans_workers
from .checkpoint import StrictCheckpointer
from .checks import check_config
from .setup import begin, installed_versions, load_config, register_datasets
from .trainer import Trainer

logger = logging.getLogger(__name__)

JSON_NAME, PAGE_NAME = "diagnosis.json", "diagnosis.html"

# For the statistics, and for the probe.
_IMAGES = 512
_QUICK_IMAGES = 64


def preflight_diagnosis(args: argparse.Namespace) -> str:
    """Refuse a diagnosis that cannot work, before the model is built.

    Args:
        args: of ``tools/diagnose.py``.

    Returns:
        The device to run on: MODEL.DEVICE.

    Raises:
        ConfigError: names the key or flag, its value, and what would be right.
    """
    if args.workers < 1:
        raise ConfigError(f"--num-gpus {args.workers}: the training had at least 1 worker.")
    if args.images is not None and args.images < 2:
        raise ConfigError(f"--images {args.images}: at least 2 are needed.")
    cfg = _load_config(args)
    check_config(cfg, num_workers=1, eval_only=True, resume=False)
    per_worker = images_per_worker(cfg, args.workers)
    if _num_images(args, _IMAGES) < per_worker:
        raise ConfigError(
            f"--images {args.images}: a worker has {per_worker} images (SOLVER.IMS_PER_BATCH over "
            "--num-gpus); give as many at least."
        )
    folder = Path(cfg.OUTPUT_DIR)
    for name in (JSON_NAME, PAGE_NAME):
        if (folder / name).exists() and not args.overwrite:
            raise ConfigError(
                f"{folder / name} exists. Give another --output-dir, or --overwrite to replace it."
            )
    register_datasets(cfg)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            check_dataset_files(f"DATASETS.{key}", name)
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: the statistics are measured on its images.")
    make_folder(folder, f"--output-dir {folder}")
    return cfg.MODEL.DEVICE


def diagnose(args: argparse.Namespace) -> int:
    """Diagnose the BN layers of MODEL.WEIGHTS; write the JSON and the page, and print the findings.

    Args:
        args: of ``tools/diagnose.py``, checked by :func:`preflight_diagnosis`.

    Returns:
        The exit status: 1 if there are findings, else 0.

    Raises:
        ConfigError: the weights do not fit the model, or a layer saw values that are not finite.
            Nothing is written.
    """
    start = time.monotonic()
    cfg = begin(_load_config(args), args, args.folder)
    workers = cfg.BN.VIRTUAL_WORKERS or args.workers
    per_worker = images_per_worker(cfg, args.workers)
    left_out: list[str] = []
    model, batch_size, measured = _build_model(cfg, workers, per_worker)
    StrictCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    labels = _has_labels(cfg.DATASETS.TRAIN)
    if not labels:
        left_out.append(
            f"The RoIs of the training sampler: {', '.join(cfg.DATASETS.TRAIN)} has no labels. The "
            "statistics are those of the proposals that inference uses."
        )
    number = max(_num_images(args, _IMAGES) // batch_size, 1) * batch_size
    loader = SinglePassLoader(
        measured, labels=labels, num_images=number, batch_size=batch_size, seed=max(cfg.SEED, 0)
    )
    layers = _inspect(model, loader, labels)
    alone = [x.name for x in layers if x.trains and _is_of_worker(x)]
    if alone and batch_size > per_worker:
        left_out.append(
            f"The batches of one worker in {', '.join(alone)}: other layers share theirs over the "
            f"workers, so all were measured with the {batch_size} images of a step."
        )
    report = _probe(measured, model, args, layers, left_out) if layers else None
    examined = Examined(
        cfg,
        layers,
        [name for name, _ in norm_layers(model)],
        None if report is None else report.to_json(),
        workers,
        _uses_project(args.config_file) or any(layer.is_ours for layer in layers),
    )
    findings, notes = conclude(examined)
    known = _keys(load_config(argparse.Namespace(config_file="", opts=[])))
    if unknown := sorted(_keys(cfg) - known):
        notes.append(
            f"{args.config} has keys that neither Detectron2 nor bn_detection knows, which changed "
            f"nothing here: {', '.join(unknown)}."
        )
    settings: dict[str, Any] = {
        "config": args.config,
        "weights": cfg.MODEL.WEIGHTS,
        "workers": workers,
        "images_per_worker": per_worker,
        "statistics_from": f"{loader.num_images} images of {', '.join(cfg.DATASETS.TRAIN)}",
        "seconds": round(time.monotonic() - start),
        "versions": installed_versions(),
    }
    diagnosis = Diagnosis(settings, layers, report, findings, notes, left_out)
    report_unreadable(cfg.OUTPUT_DIR)
    folder = Path(args.folder)
    content = json.dumps(diagnosis.to_json(), indent=2, allow_nan=False) + "\n"
    for name, text in ((JSON_NAME, content), (PAGE_NAME, diagnosis.html())):
        with replacing(folder / name) as file:
            file.write_text(text, encoding="utf-8")
    logger.info("Diagnosis of %s\n\n%s\n", cfg.MODEL.WEIGHTS or "random weights", diagnosis.text())
    logger.info("Wrote %s and %s", folder / JSON_NAME, folder / PAGE_NAME)
    return 1 if findings else 0


def _load_config(args: argparse.Namespace) -> CfgNode:
    """The config; args.config_file becomes its path, and args.folder that of the output."""
    args.config_file = _config_path(args.config)
    cfg = load_config(args, unknown_keys=True)
    stem = Path(cfg.MODEL.WEIGHTS or "random_weights").stem
    args.folder = args.output_dir or os.path.join(cfg.OUTPUT_DIR, f"diagnosis_{stem}")
    cfg.OUTPUT_DIR = args.folder
    return cfg


def _keys(node: CfgNode, prefix: str = "") -> set[str]:
    """The dotted keys of a config; a node that is a key of its own too."""
    keys = {f"{prefix}{key}" for key in node}
    nodes = ((key, value) for key, value in node.items() if isinstance(value, CfgNode))
    return keys.union(*(_keys(value, f"{prefix}{key}.") for key, value in nodes))


def _config_path(config: str) -> str:
    """A file, or one of the model zoo; load_config says where it is neither."""
    if not os.path.isfile(config):
        with suppress(RuntimeError):
            return model_zoo.get_config_file(config)
    return config


def _build_model(cfg: CfgNode, workers: int, per_worker: int) -> tuple[nn.Module, int, CfgNode]:
    """The model in training mode, the images that one forward of it has, and its config.

    A forward is that of a worker; or that of all workers, if layers share batches over them.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.BN.VIRTUAL_WORKERS, cfg.BN.VIRTUAL_LOSSES = 0, False
    cfg.BN.SHUFFLE.MODE = "statistics"
    cfg.BN.LEAKAGE.IMAGES_PER_WORKER = per_worker
    model = Trainer.build_model(cfg).train()
    batch_size = per_worker
    if workers > 1 and spans_workers(model):
        batch_size, cfg.BN.VIRTUAL_WORKERS = per_worker * workers, workers
        model = Trainer.build_model(cfg).train()
    return model, batch_size, cfg


def _is_of_worker(layer: LayerReport) -> bool:
    """Whether the layer cannot tell the virtual workers of a process apart."""
    return layer.sharing == "ghost" or (layer.sharing.startswith("worker") and not layer.is_ours)


def _num_images(args: argparse.Namespace, default: int) -> int:
    return args.images or (_QUICK_IMAGES if args.quick else default)


def _inspect(model: nn.Module, loader: SinglePassLoader, labels: bool) -> list[LayerReport]:
    logger.info("Statistics of %d images in %d batches", loader.num_images, loader.num_batches)
    try:
        with EventStorage(0):
            return inspect_layers(
                model, loader, loader.num_batches, rois="training" if labels else "inference"
            )
    except FloatingPointError as error:
        raise ConfigError(f"MODEL.WEIGHTS: {error}") from error


def _probe(
    cfg: CfgNode,
    model: nn.Module,
    args: argparse.Namespace,
    layers: list[LayerReport],
    left_out: list[str],
) -> LeakageReport | None:
    reason = _no_probe(cfg, model, layers)
    if reason:
        left_out.append(f"The leakage probe: {reason}")
        return None
    cfg = cfg.clone()
    cfg.defrost()
    if args.quick or args.images:
        cfg.BN.LEAKAGE.NUM_IMAGES = _num_images(args, _IMAGES)
    logger.info("Leakage probe on images of %s", cfg.DATASETS.TEST[0])
    return measure_leakage(cfg, model)


def _no_probe(cfg: CfgNode, model: nn.Module, layers: list[LayerReport]) -> str | None:
    """Why there is nothing to probe, or None."""
    if not cfg.MODEL.WEIGHTS:
        return 'MODEL.WEIGHTS is "": the accuracy of random weights says nothing.'
    if not any(layer.trains and layer.rows == "RoIs" for layer in layers):
        return "no layer of the model normalizes RoIs with a batch in training."
    try:
        check_probe(cfg, model)
    except ConfigError as error:
        return str(error)
    if not _has_labels(cfg.DATASETS.TEST[:1]):
        return f"{cfg.DATASETS.TEST[0]} has no labels (DATASETS.TEST)."
    return None


def _has_labels(names: tuple[str, ...]) -> bool:
    return any(record.get("annotations") for name in names for record in DatasetCatalog.get(name))


def _uses_project(config_file: str) -> bool:
    """Whether the config is of this project's trainer, which averages running statistics."""
    return "BN" in CfgNode.load_yaml_with_base(config_file)
