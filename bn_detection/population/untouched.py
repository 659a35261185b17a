"""Running a model on the side, with nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..generators import kept_generators


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore random number generators, buffers, modes and counters of a model afterwards.

    Counters are numbers that a module keeps as attributes, such as RetinaNet's loss normalizer.
    Parameters, their gradients and what is outside the model are not looked after.

    Args:
        model: any module.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    counters = counters_of(model)
    try:
        with kept_generators(on_gpus=True):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        set_counters(counters)


def counters_of(model: nn.Module) -> dict[nn.Module, dict[str, float]]:
    """The numbers that modules keep as attributes, modes included."""
    return {
        module: {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)}
        for module in model.modules()
    }


def set_counters(counters: dict[nn.Module, dict[str, float]]) -> None:
    """Give modules back the numbers of :func:`counters_of`."""
    for module, values in counters.items():
        vars(module).update(values)
