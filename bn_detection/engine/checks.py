"""Configs that cannot mean anything are refused before the first iteration."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..config import ConfigError
from ..heads import NORMS
from ..norm import INFERENCE, check_choice

_OUR_HEADS = {"ROI_BOX_HEAD": "BNConvFCHead", "ROI_MASK_HEAD": "BNConvUpsampleHead"}
_STOCK_HEADS = {"ROI_BOX_HEAD": "FastRCNNConvFCHead", "ROI_MASK_HEAD": "MaskRCNNConvUpsampleHead"}


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
    _check_heads(cfg)
    _check_bn(cfg.BN)
    resumes = resume and last_checkpoint(cfg.OUTPUT_DIR) is not None
    if not resumes:
        _check_weights(cfg.MODEL.WEIGHTS)
    if not eval_only:
        _check_training(cfg, num_workers, resume)


def last_checkpoint(folder: str) -> str | None:
    """The path of the last checkpoint written to ``folder``, or None."""
    tag = Path(folder, "last_checkpoint")
    return os.path.join(folder, tag.read_text().strip()) if tag.is_file() else None


def _check_heads(cfg: CfgNode) -> None:
    for head, ours in _OUR_HEADS.items():
        if head == "ROI_MASK_HEAD" and not cfg.MODEL.MASK_ON:
            continue
        key, node = f"MODEL.{head}", cfg.MODEL[head]
        if ours == node.NAME:
            _check_choice(f"{key}.NORM", node.NORM, NORMS)
        elif node.NORM == "ShuffleBN" or (
            _STOCK_HEADS[head] == node.NAME
            and node.NORM == "SyncBN"
            and torch.device(cfg.MODEL.DEVICE).type == "cpu"
        ):
            reason = "does not shuffle" if node.NORM == "ShuffleBN" else "cannot do that on a CPU"
            raise ConfigError(
                f'{key}.NORM is "{node.NORM}", and {key}.NAME "{node.NAME}" {reason}; '
                f'set {key}.NAME "{ours}".'
            )
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and (
        box_head.NORM or _OUR_HEADS["ROI_BOX_HEAD"] == box_head.NAME
    ):
        raise ConfigError(
            'MODEL.ROI_HEADS.NAME is "Res5ROIHeads", whose second stage is a ResNet stage and has '
            f'no box head: MODEL.ROI_BOX_HEAD (NAME "{box_head.NAME}", NORM "{box_head.NORM}") '
            "would be ignored. Use StandardROIHeads or CascadeROIHeads with FPN; to change the "
            "layers of Res5ROIHeads, convert them after the model is built (BN.CONVERT)."
        )


def _check_bn(node: CfgNode) -> None:
    _check_choice("BN.INFERENCE", node.INFERENCE, INFERENCE)
    if not 0 < node.MOMENTUM <= 1:
        raise ConfigError(f"BN.MOMENTUM {node.MOMENTUM}: it must be above 0 and at most 1.")
    if node.EPS <= 0:
        raise ConfigError(f"BN.EPS {node.EPS}: it must be above 0.")


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
    solver = cfg.SOLVER
    # With REFERENCE_WORLD_SIZE Detectron2 scales the batch to the workers.
    reference = solver.REFERENCE_WORLD_SIZE or num_workers
    if reference > solver.IMS_PER_BATCH or solver.IMS_PER_BATCH % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided among {reference} "
            f"workers; give a multiple of {reference}."
        )
    checkpoint = last_checkpoint(cfg.OUTPUT_DIR)
    if checkpoint and not resume:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a checkpoint of another run, {checkpoint}. Go on "
            "with it by --resume, or give another OUTPUT_DIR."
        )
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu" or not torch.cuda.is_available()
    if solver.AMP.ENABLED and on_cpu:
        raise ConfigError(
            "SOLVER.AMP.ENABLED True: mixed precision needs a GPU, and this runs on the CPU. "
            "Set SOLVER.AMP.ENABLED False."
        )
