"""A checkpoint with its population statistics estimated anew."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn import update_bn_stats
from torch import Tensor, nn

from ..config import ConfigError
from ..data import (
    SinglePassLoader,
    check_dataset_files,
    register_image_folder,
    report_unreadable,
)
from ..files import make_folder, replacing
from ..population import (
    PopulationStatistics,
    apply_statistics,
    batch_norms_in_training,
    collect_statistics,
    describe_batch_norms,
    frozen_batch_norms,
    mix_statistics,
    mixing_weight,
    record_change,
    table_of_changes,
    untouched,
)
from .checkpoint import StrictCheckpointer, save_atomically
from .checks import check_recalibration
from .comparison import Comparison, check_comparison, evaluate_ap
from .rehearsal import rehearse
from .setup import begin, installed_versions, load_config, register_datasets
from .trained import workers_to_start
from .trainer import Trainer

logger = logging.getLogger(__name__)


def choose_workers(args: argparse.Namespace) -> None:
    """Without ``--num-gpus``, take the workers of the training, where this machine has room.

    ``args.num_gpus`` becomes a number, and ``args.about_workers`` says why where it was not given.

    Args:
        args: of ``bn-detection recalibrate``.

    Raises:
        ConfigError: the config cannot be read.
    """
    if args.num_gpus is not None:
        args.about_workers = getattr(args, "about_workers", "")
        return
    args.num_gpus, args.about_workers = 1, ""
    if "WORLD_SIZE" in os.environ or args.num_machines > 1:
        return
    args.num_gpus, args.about_workers = workers_to_start(_load_config(args))


def preflight_recalibration(args: argparse.Namespace) -> str:
    """Refuse a recalibration that cannot work, before a worker starts.

    Args:
        args: of ``bn-detection recalibrate``.

    Returns:
        The device to launch workers for: MODEL.DEVICE.

    Raises:
        ConfigError: names the key or flag, its value, and what would be right.
    """
    for flag in ("resume", "eval_only"):
        if getattr(args, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')} means nothing here: the checkpoint to recalibrate is "
                "MODEL.WEIGHTS."
            )
    output = Path(args.output)
    if output.suffix != ".pth":
        raise ConfigError(f"--output {output}: a checkpoint's name ends in .pth.")
    for path in (output, _record_path(output)):
        if path.exists():
            raise ConfigError(f"--output {output}: {path} exists; give another name.")
    choose_workers(args)
    cfg = _load_config(args)
    _check_mix(args.mix, cfg)
    num_workers = int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines))
    check_recalibration(cfg, num_workers)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError('MODEL.WEIGHTS is "": give the checkpoint to recalibrate.')
    register_datasets(cfg)
    for name in cfg.DATASETS.TRAIN:
        check_dataset_files("--dataset" if args.dataset else "DATASETS.TRAIN", name)
    if args.keep_if_better:
        check_comparison(cfg)
    rehearse(cfg, training=False)
    make_folder(output.parent, f"--output {output}")
    return cfg.MODEL.DEVICE


def recalibrate(args: argparse.Namespace) -> None:
    """Estimate population statistics, and write a checkpoint that has them; called in each worker.

    Beside the checkpoint are a record of what changed (``.json``) and a folder with the log and the
    config (``_recalibration``). All other tensors keep every bit.

    Args:
        args: of ``bn-detection recalibrate``, checked by :func:`preflight_recalibration`.

    Raises:
        ConfigError: no layer is selected; the weights do not fit the model; the images have no
            labels or cannot be read; or a layer saw values that are not finite. Nothing is written.
    """
    cfg = begin(_load_config(args), args, _folder(args), quiet=True)
    if args.about_workers:
        logger.info("%s", args.about_workers)
    model = Trainer.build_model(cfg).train()
    layers = batch_norms_in_training(model, cfg.BN.MODULES)
    if args.mix:
        layers |= frozen_batch_norms(model, cfg.BN.MODULES)
    if not layers:
        raise ConfigError(
            f"BN.MODULES {list(cfg.BN.MODULES)} match no BN layer with statistics to recompute. "
            f"{describe_batch_norms(model)}"
        )
    loaded = StrictCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    before = evaluate_ap(cfg, model, "before") if args.keep_if_better else {}
    node = cfg.BN.POPULATION
    batch_size = node.BATCH_SIZE or cfg.SOLVER.IMS_PER_BATCH
    loader = SinglePassLoader(
        cfg,
        labels=node.ROIS == "training",
        num_images=node.NUM_SAMPLES,
        batch_size=batch_size,
        seed=max(cfg.SEED, 0),
    )
    estimator = "pooled" if node.ESTIMATOR == "ema" else node.ESTIMATOR
    weight = _weight(args.mix, loader.num_images)
    images: list[int] = []
    counting = model.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    try:
        with EventStorage(0):
            if estimator == "fvcore":
                statistics = _collect_by_fvcore(model, loader, cfg)
            else:
                statistics = collect_statistics(
                    model,
                    loader,
                    loader.num_batches,
                    modules=cfg.BN.MODULES,
                    estimator=estimator,
                    tolerance=node.TOLERANCE,
                    rois=node.ROIS,
                    allow_fewer=True,
                    mixing=weight,
                )
    except FloatingPointError as error:
        raise ConfigError(f"{error} Nothing was written.") from error
    finally:
        counting.remove()
    num_images = sum(comm.all_gather(sum(images)))
    settings = {
        "weights": cfg.MODEL.WEIGHTS,
        "config": args.config_file,
        "datasets": list(cfg.DATASETS.TRAIN),
        "images": num_images,
        "batch_size": batch_size,
        "workers": comm.get_world_size(),
        "estimator": estimator,
        "rois": node.ROIS,
        "tolerance": node.TOLERANCE,
        "modules": list(cfg.BN.MODULES),
        "mix": weight,
        "versions": installed_versions(),
    }
    if weight is not None:
        statistics = mix_statistics(model, statistics, weight)
    by_layer = {
        name: record_change(model.get_submodule(name), new) for name, new in statistics.items()
    }
    record = {"settings": settings, "layers": by_layer}
    old = {key: value.clone() for key, value in model.state_dict().items()}
    apply_statistics(model, statistics)
    comparison = None
    if args.keep_if_better:
        comparison = Comparison(before, evaluate_ap(cfg, model, "after"))
        record["decision"] = comparison.to_json()
    if comm.is_main_process():
        report_unreadable(cfg.OUTPUT_DIR)
        output = Path(args.output)
        kept = old if comparison and not comparison.is_better else model.state_dict()
        _write(output, kept, loaded.get("thing_classes"), record)
        logger.info(
            "Statistics of %d layers from %d images. Change of the normalized values: root mean "
            "square over channels of their shift, (new mean - old) / old std, and of "
            "ln(new std / old std).\n%s",
            len(by_layer),
            num_images,
            table_of_changes(by_layer),
        )
        if comparison:
            logger.info("%s", comparison.text())
        logger.info("Wrote %s and %s", output, _record_path(output))
        logger.info("Evaluate it:\n%s", _evaluation_command(args))


def _load_config(args: argparse.Namespace) -> CfgNode:
    """The config, DATASETS.TRAIN the images to recalibrate on, and OUTPUT_DIR for the log."""
    cfg = load_config(args)
    if args.images:
        if cfg.BN.POPULATION.ROIS == "training":
            raise ConfigError(
                f'--images {args.images}: BN.POPULATION.ROIS is "training", and the RoIs that '
                "training samples need labels, which a folder of images does not have. Set "
                "BN.POPULATION.ROIS inference."
            )
        cfg.DATASETS.TRAIN = (register_image_folder(args.images),)
    elif args.dataset:
        cfg.DATASETS.TRAIN = (args.dataset,)
    if not args.keep_if_better:
        cfg.DATASETS.TEST = ()
    cfg.OUTPUT_DIR = _folder(args)
    return cfg


def _check_mix(mix: str | None, cfg: CfgNode) -> None:
    if mix is None:
        return
    try:
        is_weight = mix == "auto" or 0 < float(mix) <= 1
    except ValueError:
        is_weight = False
    if not is_weight:
        raise ConfigError(
            f"--mix {mix}: it is auto, or the weight of the new statistics, above 0 and at most 1."
        )
    for key, node, value in (
        ("BN.INFERENCE", cfg.BN, "batch"),
        ("BN.POPULATION.ESTIMATOR", cfg.BN.POPULATION, "fvcore"),
    ):
        if node[key.rpartition(".")[2]] == value:
            other = "population" if value == "batch" else "pooled"
            raise ConfigError(f"--mix {mix}: {key} is {value}; set it to {other}.")


def _weight(mix: str | None, images: int) -> float | None:
    if mix is None:
        return None
    return mixing_weight(images) if mix == "auto" else float(mix)


def _folder(args: argparse.Namespace) -> str:
    return f"{args.output.removesuffix('.pth')}_recalibration"


def _record_path(output: Path) -> Path:
    return output.with_suffix(".json")


def _collect_by_fvcore(
    model: nn.Module, loader: SinglePassLoader, cfg: CfgNode
) -> dict[str, PopulationStatistics]:
    """By fvcore's function, which knows no standard error."""
    layers = batch_norms_in_training(model, cfg.BN.MODULES)
    counts = dict.fromkeys(layers, 0)

    def count(name: str, inputs: tuple[Tensor]) -> None:
        counts[name] += inputs[0].numel() // inputs[0].shape[1]

    with untouched(model):
        if cfg.BN.POPULATION.ROIS == "inference":
            model.eval()
            for layer in layers.values():
                layer.train()
        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: count(name, inputs))
            for name, layer in layers.items()
        ]
        try:
            update_bn_stats(model, loader, loader.num_batches)
        except AssertionError as error:
            raise ConfigError(
                f"BN.POPULATION.ESTIMATOR fvcore cannot do this: {error} Set it to pooled."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, layer in layers.items():
            mean, var = layer.running_mean.double(), layer.running_var.double()
            if counts[name] > 1 and not bool(torch.isfinite(mean + var).all()):
                raise FloatingPointError(f"{name}: its input has values that are not finite.")
            unknown = torch.full_like(mean, math.nan)
            found[name] = PopulationStatistics(mean, var, unknown, unknown, counts[name])
    return found


def _write(
    output: Path,
    state: dict[str, Tensor],
    thing_classes: list[str] | None,
    record: dict[str, Any],
) -> None:
    weights: dict[str, Any] = {"model": state}
    if thing_classes is not None:
        weights["thing_classes"] = thing_classes
    with replacing(_record_path(output)) as file:
        file.write_text(json.dumps(record, indent=2) + "\n")
        save_atomically(weights, str(output))


def _evaluation_command(args: argparse.Namespace) -> str:
    pairs = zip(args.opts[::2], args.opts[1::2], strict=False)
    options = [part for pair in pairs if pair[0] != "MODEL.WEIGHTS" for part in pair]
    command = ["bn-detection", "train", "--config-file", args.config_file, "--eval-only"]
    return shlex.join([*command, "MODEL.WEIGHTS", args.output, *options])
