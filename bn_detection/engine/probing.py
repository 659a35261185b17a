"""The leakage probe on a checkpoint, to a file."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from detectron2.config import CfgNode

from ..config import ConfigError
from ..data import check_dataset_files, check_trained_classes
from ..files import make_folder, replacing
from ..leakage import check_probe_config, measure_leakage
from .checkpoint import StrictCheckpointer
from .checks import check_config
from .rehearsal import rehearse
from .setup import begin, load_config, register_datasets
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
    output = Path(args.output)
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: the report's name ends in .json.")
    if output.exists():
        raise ConfigError(f"--output {output} exists; give another name.")
    cfg = _load_config(args)
    check_probing(cfg)
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
            :func:`bn_detection.leakage.measure_leakage` refuses. Nothing is written.
    """
    cfg = begin(_load_config(args), args, _folder(args))
    model = Trainer.build_model(cfg)
    check_trained_classes(
        cfg, StrictCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    )
    if not cfg.MODEL.WEIGHTS:
        logger.warning("Probing randomly initialized weights: MODEL.WEIGHTS is empty.")
    report = measure_leakage(cfg, model, by_layer=args.by_layer)
    output = Path(args.output)
    with replacing(output) as file:
        file.write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    logger.info("%s", report.text())
    logger.info("Wrote %s", output)
    if report.by_layer:
        from ..leakage.by_layer_figure import by_layer_figure, by_layer_metrics  # with matplotlib

        for metric in by_layer_metrics(report.by_layer):
            figure, _ = by_layer_figure(report.by_layer, metric)
            file = Path(cfg.OUTPUT_DIR, f"by_layer_{metric}.png")
            figure.savefig(file, dpi=150)
            logger.info("Wrote %s", file)


def _load_config(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args)
    cfg.OUTPUT_DIR = _folder(args)
    return cfg


def _folder(args: argparse.Namespace) -> str:
    return f"{args.output.removesuffix('.json')}_probe"
