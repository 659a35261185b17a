"""How a checkpoint was trained, by what the training left beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode

VERSIONS_NAME = "versions.json"

_FLAGS = {"--num-gpus": 1, "--num-machines": 1}


class Workers(NamedTuple):
    """The workers of a training.

    Attributes:
        number: how many.
        source: what says it, for people.
    """

    number: int
    source: str


def workers_of_training(given: int | None, weights: str) -> Workers:
    """The number of workers that was given, or that is written beside a checkpoint, or 1.

    Args:
        given: by ``--num-gpus``; None if it was left out.
        weights: MODEL.WEIGHTS.
    """
    if given is not None:
        return Workers(given, "--num-gpus")
    found = trained_workers(weights)
    if found is None:
        return Workers(1, "assumed, as nothing beside the checkpoint says it")
    return Workers(found, str(versions_path(weights)))


def workers_to_start(cfg: CfgNode) -> tuple[int, str]:
    """As many workers as the training of MODEL.WEIGHTS had, where this machine has room; else 1.

    Args:
        cfg: of a recalibration, whose batches are divided among the workers.

    Returns:
        Their number, and why, for people; "" where nothing says how many the training had.
    """
    weights, node = cfg.MODEL.WEIGHTS, cfg.BN.POPULATION
    workers = trained_workers(weights)
    if workers is None or workers == 1:
        return 1, ""
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()
    room = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    batch_size = node.BATCH_SIZE or cfg.SOLVER.IMS_PER_BATCH
    said_by = versions_path(weights)
    if workers <= room and batch_size % workers == 0 and node.ESTIMATOR != "fvcore":
        return workers, f"{workers} workers, as the training had ({said_by})."
    return 1, (
        f"One worker, though the training had {workers} ({said_by}): its normalization batches "
        f"have {batch_size} images. BN.VIRTUAL_WORKERS {workers} normalizes as they did."
    )


def trained_workers(weights: str) -> int | None:
    """The workers of the training of a checkpoint; None if nothing beside it says it.

    Args:
        weights: MODEL.WEIGHTS; ``versions.json`` is looked for in the same folder.
    """
    if not weights:
        return None
    try:
        content = json.loads(versions_path(weights).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    workers = content.get("workers", _of_command(content.get("command")))
    return workers if isinstance(workers, int) and workers > 0 else None


def versions_path(weights: str) -> Path:
    """The file that a training of this package leaves beside its checkpoints."""
    return Path(weights).parent / VERSIONS_NAME


def _of_command(command: Any) -> int | None:
    """Of a command line of a training, from before the number of workers was written down."""
    if not isinstance(command, list) or "--eval-only" in command:
        return None
    flags = dict(_FLAGS)
    words = [str(word) for word in command]
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in flags:
            value = value or after
            if not value.isdecimal():
                return None
            flags[name] = int(value)
    return flags["--num-gpus"] * flags["--num-machines"]
