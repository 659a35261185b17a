"""From a config and a checkpoint to a diagnosis of the BN layers, in files."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import ConfigError
from ..data import (
    SinglePassLoader,
    check_dataset_files,
    check_trained_classes,
    report_unreadable,
)
from ..files import make_folder, replacing
from ..heads import norm_layers
from ..leakage import (
    DetectionReport,
    LeakageReport,
    check_probe,
    images_per_worker,
    measure_layers,
    measure_leakage,
    measure_own_detections,
)
from ..leakage.diagnosis import Diagnosis
from ..leakage.diagnosis_formats import render_diagnosis
from ..leakage.findings import Examined, Rule, conclude, configured_rules
from ..leakage.layers import LayerReport, inspect_layers, spans_workers
from ..shipped import find_config
from .checkpoint import StrictCheckpointer
from .checks import check_config
from .config_files import read_config_file
from .lazy_files import is_lazy
from .rehearsal import rehearse
from .setup import begin, installed_versions, load_config, register_datasets
from .trained import workers_of_training
from .trainer import Trainer
from .trials import Source, run_trials

logger = logging.getLogger(__name__)

JSON_NAME, PAGE_NAME = "diagnosis.json", "diagnosis.html"

# For the statistics, and for the probe.
_IMAGES = 512
_QUICK_IMAGES = 64
# Fewer have no interval worth the name.
_LEAST_BATCHES = 4
_LEAST_PROBED_WORKERS = 2


def preflight_diagnosis(args: argparse.Namespace) -> str:
    """Refuse a diagnosis that cannot work, before the model is built.

    Args:
        args: of ``bn-detection diagnose``.

    Returns:
        The device to run on: MODEL.DEVICE.

    Raises:
        ConfigError: names the key or flag, its value, and what would be right.
    """
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--num-gpus {args.workers}: the training had at least 1 worker.")
    if args.images is not None and args.images < 1:
        raise ConfigError(f"--images {args.images}: at least 1 is needed.")
    cfg = _load_config(args)
    check_config(cfg, num_workers=1, eval_only=True, resume=False)
    images_per_worker(cfg, workers_of_training(args.workers, cfg.MODEL.WEIGHTS).number)
    configured_rules(cfg)
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
    rehearse(cfg, training=False)
    make_folder(folder, f"--output-dir {folder}")
    return cfg.MODEL.DEVICE


def diagnose(args: argparse.Namespace) -> int:
    """Diagnose the BN layers of MODEL.WEIGHTS; write the JSON and the page, and print the findings.

    Args:
        args: of ``bn-detection diagnose``, checked by :func:`preflight_diagnosis`.

    Returns:
        The exit status: 1 if there is what ``--fail-on`` names, else 0.

    Raises:
        ConfigError: the weights do not fit the model, DATASETS.TRAIN has too few images, or a
            layer saw values that are not finite. Nothing is written.
    """
    in_text = args.format == "text"
    with nullcontext() if in_text else redirect_stdout(sys.stderr):  # the log too
        diagnosis, rules = _diagnose(args)
    shown = render_diagnosis(diagnosis, args.format, rules)
    if in_text:
        weights = diagnosis.settings["weights"] or "random weights"
        logger.info("Diagnosis of %s\n\n%s\n", weights, shown)
    else:
        print(shown)
    logger.info("Wrote %s and %s", *(Path(args.folder, name) for name in (JSON_NAME, PAGE_NAME)))
    found = {"finding": diagnosis.findings, "note": [*diagnosis.findings, *diagnosis.notes]}
    return 1 if found.get(args.fail_on) else 0


def _diagnose(args: argparse.Namespace) -> tuple[Diagnosis, dict[str, Rule]]:
    """Measure, conclude, and write both files."""
    start = time.monotonic()
    cfg = begin(_load_config(args), args, args.folder, quiet=True)
    of_this_project = _uses_project(find_config(args.config_file))
    trained = workers_of_training(args.workers, cfg.MODEL.WEIGHTS)
    workers = cfg.BN.VIRTUAL_WORKERS or trained.number
    per_worker = images_per_worker(cfg, trained.number)
    source = "BN.VIRTUAL_WORKERS" if cfg.BN.VIRTUAL_WORKERS else trained.source
    otherwise = "; --num-gpus says otherwise" if args.workers is None else ""
    logger.info(
        "Workers of the training: %d (%s%s), images a worker: %d.",
        *(workers, source, otherwise, per_worker),
    )
    left_out: list[str] = []
    model, batch_size, measured = _build_model(cfg, workers, per_worker)
    check_trained_classes(
        cfg, StrictCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    )
    rois = _rois(cfg, left_out)
    make_batches = partial(_Batches, measured, rois, batch_size, _num_images(args, _IMAGES))
    batches = make_batches()
    layers = _inspect(model, batches, rois)
    alone = [x.name for x in layers if x.joins_workers]
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
        of_this_project or any(layer.is_ours for layer in layers),
        sorted(_keys(cfg) - _keys(load_config(argparse.Namespace(config_file="", opts=[])))),
    )
    if layers:
        source = Source(make_batches, batches.number, batches.images, rois)
        trials = run_trials(_probed(measured, args), model, examined, source, left_out)
        examined = replace(examined, trials=trials)
    findings, notes = conclude(examined)
    settings: dict[str, Any] = {
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "workers": workers,
        "images_per_worker": per_worker,
        "statistics_from": f"{batches.images} images of {', '.join(cfg.DATASETS.TRAIN)}",
        "seconds": round(time.monotonic() - start),
        "versions": installed_versions(),
    }
    diagnosis = Diagnosis(settings, layers, report, findings, notes, left_out)
    report_unreadable(cfg.OUTPUT_DIR)
    folder = Path(args.folder)
    rules = configured_rules(cfg)
    from ..leakage.diagnosis_page import page  # with matplotlib, which a training does not need

    for name, text in (
        (JSON_NAME, render_diagnosis(diagnosis, "json", rules) + "\n"),
        (PAGE_NAME, page(diagnosis)),
    ):
        with replacing(folder / name) as file:
            file.write_text(text, encoding="utf-8")
    return diagnosis, rules


def _load_config(args: argparse.Namespace) -> CfgNode:
    """The config; args.folder becomes that of the output."""
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


def _num_images(args: argparse.Namespace, default: int) -> int:
    return args.images or (_QUICK_IMAGES if args.quick else default)


def _rois(cfg: CfgNode, left_out: list[str]) -> str:
    """Which RoIs the statistics are of: the training sampler's, unless nothing is known of them."""
    names, node = cfg.DATASETS.TRAIN, cfg.BN.POPULATION
    if node.ESTIMATOR != "ema" and node.ROIS == "inference":
        reason = 'BN.POPULATION.ROIS is "inference", so the running statistics are not of them.'
    elif not _has_labels(names):
        reason = f"{', '.join(names)} has no labels, or images without."
    else:
        return "training"
    left_out.append(
        f"The RoIs of the training sampler: {reason} The statistics are those of the proposals "
        "that inference uses."
    )
    return "inference"


def _has_labels(names: tuple[str, ...]) -> bool:
    records = [record for name in names for record in DatasetCatalog.get(name)]
    return all("annotations" in record for record in records) and any(
        not item.get("iscrowd", 0) for record in records for item in record["annotations"]
    )


class _Batches:
    """Batches of the images of DATASETS.TRAIN, of one orientation where training has them so.

    Attributes:
        number: of batches, at most; of two orientations the images may fill one less.
        images: used so far.
    """

    def __init__(self, cfg: CfgNode, rois: str, size: int, num_images: int) -> None:
        self.number = max(num_images // size, _LEAST_BATCHES)
        self.images = 0
        self._cfg, self._size = cfg, size
        self._grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
        self._loader = SinglePassLoader(
            cfg,
            labels=rois == "training",
            # The last images of each orientation may fill no batch.
            num_images=self.number * size + (size - 1 if self._grouped else 0),
            batch_size=1 if self._grouped else size,
            seed=max(cfg.SEED, 0),
        )
        there = self._loader.num_images
        self.number = min(
            self.number, max(there // size if self._grouped else -(-there // size), 1)
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        batches: Iterable[list[dict[str, Any]]] = self._loader
        if self._grouped:
            batches = AspectRatioGroupedDataset(chain.from_iterable(self._loader), self._size)
        for batch in islice(batches, self.number):
            self.images += len(batch)
            yield batch
        if self.images == 0:
            names, orientation = ", ".join(self._cfg.DATASETS.TRAIN), ""
            if self._grouped:
                orientation = " of one orientation (DATALOADER.ASPECT_RATIO_GROUPING)"
            raise ConfigError(
                f"DATASETS.TRAIN {names}: its {self._loader.num_images} images do not fill a batch "
                f"of {self._size}{orientation}, which follows from SOLVER.IMS_PER_BATCH "
                f"{self._cfg.SOLVER.IMS_PER_BATCH}. Give more images, or a smaller batch."
            )


def _inspect(model: nn.Module, batches: _Batches, rois: str) -> list[LayerReport]:
    try:
        with EventStorage(0):
            return inspect_layers(model, batches, batches.number, rois=rois)
    except FloatingPointError as error:
        raise ConfigError(f"MODEL.WEIGHTS: {error}") from error


def _probed(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """The config with the number of images to probe."""
    cfg = cfg.clone()
    cfg.defrost()
    if args.quick or args.images:
        least = _LEAST_PROBED_WORKERS * cfg.BN.LEAKAGE.IMAGES_PER_WORKER
        cfg.BN.LEAKAGE.NUM_IMAGES = max(_num_images(args, _IMAGES), least)
    return cfg


def _probe(
    cfg: CfgNode,
    model: nn.Module,
    args: argparse.Namespace,
    layers: list[LayerReport],
    left_out: list[str],
) -> LeakageReport | DetectionReport | None:
    cfg = _probed(cfg, args)
    try:
        if not cfg.MODEL.WEIGHTS:
            raise ConfigError('MODEL.WEIGHTS is "": the accuracy of random weights says nothing.')
        trained = [layer for layer in layers if layer.trains]
        if not trained:
            raise ConfigError("no layer of the model normalizes with a batch in training.")
        logger.info("Leakage probe")
        try:
            check_probe(cfg, model)
            on_rois = any(layer.rows == "RoIs" for layer in trained)
        except ConfigError as error:
            left_out.append(f"The probe on fixed RoIs, so it is on detections: {error}")
            on_rois = False
        if not on_rois:
            return measure_own_detections(cfg, model, modules=[layer.name for layer in trained])
        report = measure_leakage(cfg, model)
        margin = configured_rules(cfg)["BN201"].threshold
        leaking = [m for m, x in report.leakage.items() if "accuracy" in m and x.exceeds(margin)]
        if leaking:
            logger.info("Leakage by layer")
            report = replace(report, by_layer=measure_layers(cfg, model, leaking))
    except ConfigError as error:
        left_out.append(f"The leakage probe: {error}")
        return None
    left_out += [f"The leakage probe of {head}: {why}" for head, why in report.left_out.items()]
    return report


def _uses_project(config_file: str) -> bool:
    """Whether the config is of this project's trainer, which averages running statistics."""
    return not is_lazy(config_file) and "BN" in read_config_file(config_file)
