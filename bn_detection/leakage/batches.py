"""Normalization batches of fixed RoIs: which share statistics, and the heads run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..norm import PartitionedBatchNorm2d, shuffled_groups

MODES = ("own_image", "own_worker", "shuffled", "population")
"""What the RoIs of a normalization batch have in common."""


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a head that can normalize with batch statistics, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


@contextmanager
def normalizing(module: nn.Module, mode: str) -> Iterator[None]:
    """Normalize with the batch of each forward, or with population statistics.

    Works for torch's and Detectron2's layers and for this project's, in eval mode, without any
    collective; no statistics move.

    Args:
        module: a head, in eval mode.
        mode: one of :data:`MODES`; all but "population" use the statistics of the forward.
    """
    layers = batch_norms(module).values()
    ours = {
        layer: (layer.inference, layer.inference_scope)
        for layer in layers
        if isinstance(layer, PartitionedBatchNorm2d)
    }
    stock = [] if mode == "population" else [layer for layer in layers if layer not in ours]
    buffers = {layer: dict(layer._buffers) for layer in stock}
    try:
        for own in ours:
            own.inference = "population" if mode == "population" else "batch"
            own.inference_scope = None
        for layer in stock:
            # torch's BatchNorm without running statistics uses the batch in eval mode.
            layer._buffers.update(running_mean=None, running_var=None)
        yield
    finally:
        for own, (inference, scope) in ours.items():
            own.inference, own.inference_scope = inference, scope
        for layer in stock:
            layer._buffers.update(buffers[layer])


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


def run_in_batches(
    layers: Callable[[Tensor], tuple[Tensor, ...]], features: Tensor, batches: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run a head on each batch.

    Args:
        layers: the head, of RoI features.
        features: ``(R, C, H, W)``.
        batches: their rows, each row once.

    Returns:
        The outputs, in the order of ``features``.
    """
    # With channels last, convolutions of small maps take about half the time on a CPU.
    features = features.contiguous(memory_format=torch.channels_last)
    outputs = [layers(features[rows.to(features.device)]) for rows in batches]
    place = torch.argsort(torch.cat(list(batches))).to(features.device)
    return tuple(torch.cat(parts)[place] for parts in zip(*outputs, strict=True))
