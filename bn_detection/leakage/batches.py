"""Normalization batches of fixed RoIs: which share statistics, and layers that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ConfigError
from ..norm import PartitionedBatchNorm2d, shuffled_groups

MODES = ("own_image", "own_worker", "shuffled", "population")
"""What the RoIs of a normalization batch have in common."""


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a head that can normalize with batch statistics, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


@dataclass(frozen=True)
class Division:
    """Rows divided into normalization batches.

    Attributes:
        sizes: rows of each batch.
        order: the rows, batch by batch; None where that is their order.
        place: its inverse.
    """

    sizes: list[int]
    order: Tensor | None
    place: Tensor | None

    @classmethod
    def of(cls, batches: Sequence[Tensor], device: torch.device | str = "cpu") -> Division:
        """From the rows of each batch, each row once."""
        order = torch.cat([torch.zeros(0, dtype=torch.long), *batches])
        sizes = [len(rows) for rows in batches]
        if torch.equal(order, torch.arange(len(order))):
            return cls(sizes, None, None)
        return cls(sizes, order.to(device), torch.argsort(order).to(device))

    def map(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function`` of each batch of the rows of ``x``, in the order of ``x``."""
        if not self.sizes:
            return x
        if self.order is not None:
            x = x[self.order]
        outputs = torch.cat([function(batch) for batch in x.split(self.sizes)])
        return outputs if self.place is None else outputs[self.place]


Divisions = Mapping[int, Division]
"""By the number of rows that a layer is given."""


@contextmanager
def normalizing(
    layers: Mapping[str, nn.Module], by: Mapping[str, Divisions | None]
) -> Iterator[None]:
    """Let each layer normalize with batches of its rows, or with population statistics.

    Works for torch's and Detectron2's layers and for this project's, in eval mode, without any
    collective; no statistics move. A layer that does more than BN is run as it is, on each batch.

    Args:
        layers: BN layers by name, in eval mode.
        by: for each name the batches of its rows; None for population statistics.

    Raises:
        ConfigError: in the forward pass: a layer is given another number of rows.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(replaced(layer, **_changes(name, layer, by[name])))
        yield


@contextmanager
def replaced(owner: nn.Module, **attributes: Any) -> Iterator[None]:
    """Let a module have other attributes, such as a method, for a while."""
    own = vars(owner)
    before = {key: own[key] for key in attributes if key in own}
    own.update(attributes)
    try:
        yield
    finally:
        for key in attributes:
            del own[key]
        own.update(before)


def _changes(name: str, layer: Any, divisions: Divisions | None) -> dict[str, Any]:
    is_ours = isinstance(layer, PartitionedBatchNorm2d)
    if divisions is None:
        return {"inference": "population"} if is_ours else {}
    forward = partial(_in_batches, name, layer.forward, divisions)
    if is_ours:
        return {"inference": "batch", "inference_scope": None, "forward": forward}
    # torch's BatchNorm without running statistics uses the batch in eval mode.
    none = {"running_mean": None, "running_var": None}
    return {"_buffers": layer._buffers | none, "forward": forward}


def _in_batches(
    name: str, forward: Callable[..., Tensor], divisions: Divisions, x: Tensor, **more: Tensor
) -> Tensor:
    division = divisions.get(len(x))
    if division is None:
        raise ConfigError(
            f"The leakage probe changes the normalization batches of RoIs: {name} was given "
            f"{len(x)} rows, where there are {' or '.join(map(str, divisions))} RoIs."
        )
    return division.map(partial(forward, **more), x)


def normalization_batches(
    mode: str, counts: Sequence[int], images_per_worker: int, seed: int
) -> list[Tensor]:
    """Divide the RoIs of consecutive images into normalization batches.

    Args:
        mode: one of :data:`MODES`. For "population" the division is that of "own_worker", and
            means nothing.
        counts: RoIs of each image; as many images as some workers have.
        images_per_worker: images of each worker.
        seed: of "shuffled": random groups, as many as there are workers, that differ by one RoI at
            most.

    Returns:
        The rows of each batch, int64; batches without RoIs are left out.
    """
    total = sum(counts)
    if mode == "shuffled":
        workers = len(counts) // images_per_worker
        ids = shuffled_groups([total], workers, seed)[0]
        batches = [torch.nonzero(ids == group).flatten() for group in range(workers)]
    else:
        size = 1 if mode == "own_image" else images_per_worker
        sizes = [sum(counts[i : i + size]) for i in range(0, len(counts), size)]
        batches = list(torch.split(torch.arange(total), sizes))
    return [rows for rows in batches if len(rows)]


def own_shares(
    batches: Sequence[Tensor], counts: Sequence[int], images_per_worker: int
) -> list[float]:
    """How much of its normalization batch is of an RoI's own worker, itself included.

    Args:
        batches: of :func:`normalization_batches`.
        counts: RoIs of each image.
        images_per_worker: images of each worker.

    Returns:
        For each RoI, from 0 to 1; in the order of the batches.
    """
    workers = torch.arange(len(counts)) // images_per_worker
    worker_of = workers.repeat_interleave(torch.tensor(counts))
    shares: list[float] = []
    for rows in batches:
        here = worker_of[rows]
        shares += (torch.bincount(here)[here] / len(rows)).tolist()
    return shares
