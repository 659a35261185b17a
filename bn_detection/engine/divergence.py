"""A training whose loss is no number any more: where it began, and what is still good."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from torch import Tensor, nn

from ..config import ConfigError, one_line


@contextmanager
def naming_divergence(trainer: DefaultTrainer) -> Iterator[None]:
    """Turn Detectron2's FloatingPointError into one line with what is known of it.

    Args:
        trainer: that trains meanwhile.

    Raises:
        ConfigError: the loss or the predictions were not finite. Names the iteration, the losses,
            the first layer that is not finite, and the last checkpoint that is.
    """
    try:
        yield
    except FloatingPointError as error:
        layer = first_not_finite(trainer.model)
        where = (
            f"the first layer with values that are not finite is {layer}"
            if layer
            else ("all parameters and statistics are still finite")
        )
        good = last_finite_checkpoint(trainer.cfg.OUTPUT_DIR)
        rest = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        losses = re.sub(r"loss_dict = ", "losses ", one_line(error))
        raise ConfigError(
            f"The training diverged at iteration {trainer.iter}: {losses}; {where}; {rest}. A "
            f"lower SOLVER.BASE_LR than {trainer.cfg.SOLVER.BASE_LR} or more SOLVER.WARMUP_ITERS "
            "may help."
        ) from error


def first_not_finite(model: nn.Module) -> str | None:
    """The first layer, in the order of the model, with a parameter or buffer that is not finite."""
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if not all(map(_is_finite, own)):
            return name.removeprefix("module.") or type(module).__name__
    return None


def last_finite_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a folder whose model is finite; None if there is none."""
    paths = sorted(Path(folder).glob("*.pth"), key=os.path.getmtime, reverse=True)
    for path in paths:
        try:
            content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            values = content["model"].values()
        except Exception:  # another file, or a damaged one
            continue
        if all(map(_is_finite, values)):
            return str(path)
    return None


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
