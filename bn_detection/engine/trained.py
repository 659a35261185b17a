"""How a checkpoint was trained, by what the training left beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

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
