"""The leakage probe on a checkpoint, to a file."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from ..config import ConfigError
from ..data import check_dataset_files, check_trained_classes
from ..files import make_folder, replacing
from ..leakage import (
    DetectionReport,
    LeakageReport,
    check_probe,
    check_probe_config,
    images_per_worker,
    measure_leakage,
    measure_own_detections,
)
from .checkpoint import StrictCheckpointer
from .checks import check_config
from .rehearsal import rehearse
from .setup import begin, load_config, register_datasets
from .trained import workers_of_training
from .trainer import Trainer

logger = logging.getLogger(__name__)


def preflight_probe(args: argparse.Namespace) -> str:
    """Refuse a probe that cannot work, before the model is built.

    Args:
        args: of ``bn-detection probe``.

    Returns:
        The device to run on: MODEL.DEVICE.

    Raises:
        ConfigError: names the key or flag, its value, and what would be right.
    """
    if args.by_layer and args.on == "detections":
        raise ConfigError("--by-layer is of the probe on RoIs: leave out --on detections.")
    output = Path(args.output)
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: the report's name ends in .json.")
    if output.exists():
        raise ConfigError(f"--output {output} exists; give another name.")
    cfg = _load_config(args)
    check_probing(cfg)
    images_per_worker(cfg, workers_of_training(None, cfg.MODEL.WEIGHTS).number)
    register_datasets(cfg)
    check_dataset_files("DATASETS.TEST", cfg.DATASETS.TEST[0])
    rehearse(cfg, training=False)
    make_folder(output.parent, f"--output {output}")
    return cfg.MODEL.DEVICE


def check_probing(cfg: CfgNode) -> None:
    """Refuse a config that the probe cannot use, whatever the weights.

    Raises:
        ConfigError: names the key, its value, and what would be right.
    """
    check_config(cfg, num_workers=1, eval_only=True, resume=False)
    check_probe_config(cfg)


def probe(args: argparse.Namespace) -> None:
    """Measure the leakage of MODEL.WEIGHTS, write the report, and print its table.

    Beside the report is a folder with the log and the config (``_probe``), and with ``--by-layer``
    a figure of each accuracy.

    Args:
        args: of ``bn-detection probe``, checked by :func:`preflight_probe`.

    Raises:
        ConfigError: the weights do not fit the model, or what
            :func:`bn_detection.leakage.measure_leakage` or ``measure_own_detections`` refuses.
            Nothing is written.
    """
    cfg = begin(_load_config(args), args, _folder(args), quiet=True)
    workers = workers_of_training(None, cfg.MODEL.WEIGHTS)
    if not (cfg.BN.LEAKAGE.IMAGES_PER_WORKER or cfg.BN.VIRTUAL_WORKERS):
        logger.info(
            "Images a worker: %d, of %d workers (%s); BN.LEAKAGE.IMAGES_PER_WORKER says otherwise.",
            images_per_worker(cfg, workers.number),
            *workers,
        )
    model = Trainer.build_model(cfg)
    check_trained_classes(
        cfg, StrictCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    )
    if not cfg.MODEL.WEIGHTS:
        logger.warning("Probing randomly initialized weights: MODEL.WEIGHTS is empty.")
    report = _measure(cfg, model, args, workers.number)
    output = Path(args.output)
    with replacing(output) as file:
        file.write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    logger.info("%s", report.text())
    logger.info("Wrote %s", output)
    if isinstance(report, LeakageReport) and report.by_layer:
        from ..leakage.by_layer_figure import by_layer_figure, by_layer_metrics  # with matplotlib

        for metric in by_layer_metrics(report.by_layer):
            figure, _ = by_layer_figure(report.by_layer, metric)
            file = Path(cfg.OUTPUT_DIR, f"by_layer_{metric}.png")
            figure.savefig(file, dpi=150)
            logger.info("Wrote %s", file)


def _measure(
    cfg: CfgNode, model: nn.Module, args: argparse.Namespace, num_workers: int
) -> LeakageReport | DetectionReport:
    on = args.on or ("rois" if args.by_layer else None)
    if on is None:
        try:
            check_probe(cfg, model)
        except ConfigError as error:
            logger.info("On detections, by the AP of the detector itself: %s", error)
            on = "detections"
    if on == "detections":
        return measure_own_detections(cfg, model, num_workers=num_workers, by_class=args.by_class)
    return measure_leakage(
        cfg, model, num_workers=num_workers, by_layer=args.by_layer, by_class=args.by_class
    )


def _load_config(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args)
    cfg.OUTPUT_DIR = _folder(args)
    return cfg


def _folder(args: argparse.Namespace) -> str:
    return f"{args.output.removesuffix('.json')}_probe"
