"""Partitions: which rows share a mean and a variance, in training and in a forward of inference.

A partition answers one question: the group of every row of this worker, and whether groups span
workers. A new one is a subclass with one method, registered under a name::

    @register_partition("halves")
    class HalvesPartition(Partition):
        def groups(self, rows: Rows) -> Groups:
            return Groups(torch.arange(rows.count, device=rows.device) % 2, 2)

The name is then a value of ``partition=``, and of ``NORM`` and ``BN.CONVERT`` in configs. Arguments
of ``__init__`` are its options, which ``BN.PARTITION_OPTIONS`` sets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .collectives import world_size
from .scope import Rows


@dataclass(frozen=True)
class Groups:
    """The group of every row of this worker.

    Attributes:
        ids: ``(N,)`` int64, from 0 to ``number - 1``; a group may have no rows. None: one group.
        number: of groups: of this worker, or of all workers if groups span workers.
    """

    ids: Tensor | None
    number: int


class Partition:
    """Which rows (RoIs, or images) share a normalization batch in training."""

    #: Whether rows of several workers can be in one group; then ids are the same on all workers.
    spans_workers = False
    #: Whether :meth:`groups` asks for the row counts of all workers.
    needs_counts = False
    #: Whether the number of groups follows from the number of workers alone. Where it does not and
    #: groups span workers, they compare theirs at each call.
    number_is_known = False

    def groups(self, rows: Rows) -> Groups:
        """The groups of one call.

        Args:
            rows: how many there are, on which worker, of which images.
        """
        raise NotImplementedError

    def inference_groups(self, rows: Rows) -> Groups:
        """The groups of one call at inference, where a process is alone; those of training, unless
        they would follow from the number of workers.

        Args:
            rows: of the current forward.
        """
        return self.groups(rows)

    def checked_groups(self, rows: Rows) -> Groups:
        """:meth:`groups`, whose number is the same on all workers if groups span them.

        Raises:
            RuntimeError: it is not; the message names the module and the numbers.
        """
        groups = self.groups(rows)
        if self.spans_workers and rows.world_size > 1 and not self.number_is_known:
            what = f"the number of groups of {type(self).__name__}"
            rows.collectives.check_alike(groups.number, what)
        return groups

    @property
    def is_whole_batch(self) -> bool:
        """Whether all rows of a worker are one group, so that :meth:`groups` need not be asked."""
        return False


FORWARD = "forward"
"""The partition of inference that has one group: all rows of the current forward."""

P = TypeVar("P", bound=type[Partition])
_REGISTRY: dict[str, type[Partition]] = {}


def register_partition(name: str) -> Callable[[P], P]:
    """Class decorator: make a :class:`Partition` available under ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: P) -> P:
        if name in _REGISTRY:
            raise ValueError(f'The partition "{name}" is registered already.')
        _REGISTRY[name] = cls
        return cls

    return register


def partition_names() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_REGISTRY)


def partition_name(partition: Partition) -> str:
    """The name that its class is registered under, or that of the class."""
    names = {cls: name for name, cls in _REGISTRY.items()}
    return names.get(type(partition), type(partition).__name__)


def inference_partition_names() -> tuple[str, ...]:
    """What can divide a forward of inference: not what divides the rows of many workers."""
    others = (name for name in partition_names() if name not in ("worker", "world"))
    return (FORWARD, *others)


def build_partition(
    name: str, *, virtual_workers: int = 0, ghost_size: int = 32, **options: Any
) -> Partition:
    """The partition registered under ``name``.

    Args:
        name: one of :func:`partition_names`.
        virtual_workers: total number over all processes; passed to a class that takes it, as
            ``worker`` and ``shuffle`` do.
        ghost_size: rows in a group; passed to a class that takes it, as ``ghost`` does.
        options: further arguments of the class.

    Raises:
        ValueError: for an unknown name, options that the class does not take or misses, or a size
            that cannot be.
    """
    check_choice("partition", name, partition_names())
    cls = _REGISTRY[name]
    signature = inspect.signature(cls)
    for key, value in (("virtual_workers", virtual_workers), ("ghost_size", ghost_size)):
        if key in signature.parameters:
            options[key] = value
    try:
        signature.bind(**options)
    except TypeError as error:
        taken = ", ".join(f'"{option}"' for option in signature.parameters) or "none"
        raise ValueError(f'The partition "{name}": {error}. Its options: {taken}.') from error
    return cls(**options)


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``; else raise a ValueError that lists them."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{what} is "{value}"; it can be one of {listed}.')
    return value


@register_partition("worker")
class WorkerPartition(Partition):
    """The rows of a worker: plain BN.

    With virtual workers, the images of a process are divided among its share of them, in order and
    evenly, and each normalizes the rows of its images.

    Args:
        virtual_workers: total number over all processes, a multiple of their number; 0 for none.
    """

    def __init__(self, virtual_workers: int = 0) -> None:
        self.virtual_workers = virtual_workers

    @property
    def is_whole_batch(self) -> bool:
        return virtual_share(self.virtual_workers) == 1

    def groups(self, rows: Rows) -> Groups:
        share = virtual_share(self.virtual_workers)
        images = len(rows.per_image())
        return Groups(rows.images() // images_per_virtual_worker(images, share, rows.owner), share)


@register_partition("world")
class WorldPartition(Partition):
    """The rows of all workers: SyncBN."""

    spans_workers = True

    @property
    def is_whole_batch(self) -> bool:
        return True


@register_partition("shuffle")
class ShufflePartition(Partition):
    """Random balanced groups over the rows of all workers, as many as there are workers.

    *Rethinking "Batch" in BatchNorm*, Figure 9 and Table 6, without moving a row.

    At inference there are as many groups as images (or sets of ``images_per_group`` of them). Rows
    that are images cannot be mixed any finer: they are one group.

    Args:
        virtual_workers: number of groups, a multiple of the number of processes; 0: that number.
        images_per_group: images that have as many rows as a group at inference, on average.
    """

    spans_workers = True
    needs_counts = True
    number_is_known = True

    def __init__(self, virtual_workers: int = 0, images_per_group: int = 1) -> None:
        self.virtual_workers = virtual_workers
        self.images_per_group = images_per_group

    @property
    def is_whole_batch(self) -> bool:
        return max(self.virtual_workers, world_size()) == 1

    def inference_groups(self, rows: Rows) -> Groups:
        if rows.are_images:
            return Groups(None, 1)
        images = sum(count > 0 for count in rows.per_image())
        number = max(-(-images // self.images_per_group), 1)
        (ids,) = shuffled_groups([rows.count], number, rows.seed)
        return Groups(rows.to_device(ids), number)

    def groups(self, rows: Rows) -> Groups:
        number = virtual_share(self.virtual_workers) * rows.world_size
        ids = shuffled_groups(rows.all_counts(), number, rows.seed)[rows.rank]
        return Groups(rows.to_device(ids), number)


@register_partition("ghost")
class GhostPartition(Partition):
    """Random groups of a fixed number of a worker's rows; a remainder joins the last group.

    Ghost batch normalization, Hoffer et al. 2017 (arXiv:1705.08741), Algorithm 1. Its batches are
    random; the RoIs of Detectron2's samplers are not (an image's foreground comes first), so groups
    of neighbours would be foreground alone, or background alone.

    Args:
        ghost_size: rows in a group, at least 2.

    Raises:
        ValueError: the size is below 2.
    """

    def __init__(self, ghost_size: int) -> None:
        if ghost_size < 2:
            raise ValueError(
                f"BN.GHOST.SIZE {ghost_size}: a group needs at least 2 rows to have a variance."
            )
        self.size = ghost_size

    def groups(self, rows: Rows) -> Groups:
        number = max(rows.count // self.size, 1)
        ids = (torch.arange(rows.count) // self.size).clamp_(max=number - 1)
        order = torch.randperm(rows.count, generator=torch.Generator().manual_seed(rows.own_seed))
        return Groups(rows.to_device(ids[order]), number)


@register_partition("image")
class ImagePartition(Partition):
    """The rows of an image: all its RoIs, or its feature map.

    Args:
        images_per_group: consecutive images that share a group.
    """

    def __init__(self, images_per_group: int = 1) -> None:
        self.images_per_group = images_per_group

    def groups(self, rows: Rows) -> Groups:
        number = -(-len(rows.per_image()) // self.images_per_group)
        return Groups(rows.images() // self.images_per_group, number)


def shuffled_groups(counts: list[int], number: int, seed: int) -> list[Tensor]:
    """A random assignment of all workers' rows to balanced groups.

    All workers that pass the same arguments draw the same assignment. Groups differ by one row at
    most; with fewer rows than groups the last ones are empty.

    Args:
        counts: number of rows of each worker.
        number: of groups.
        seed: of the permutation, below 2**63.

    Returns:
        By worker: the group of each of its rows, ``(count,)`` int64, on the CPU.
    """
    total = sum(counts)
    sizes = torch.full((number,), total // number)
    sizes[: total % number] += 1
    slots = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(number).repeat_interleave(sizes, output_size=total)
    return list(groups[slots].split(counts))


def virtual_share(virtual_workers: int) -> int:
    """Virtual workers of each process.

    Raises:
        ValueError: their number is not a multiple of the number of processes.
    """
    if virtual_workers % world_size():
        raise ValueError(
            f"BN.VIRTUAL_WORKERS {virtual_workers} is not a multiple of the {world_size()} workers "
            "that run."
        )
    return max(virtual_workers // world_size(), 1)


def images_per_virtual_worker(images: int, share: int, owner: str) -> int:
    """Images of each of ``share`` virtual workers.

    Raises:
        ValueError: the images cannot be divided evenly; names ``owner``.
    """
    if images == 0 or images % share:
        raise ValueError(
            f"{owner}: {images} images of this worker cannot be divided evenly among its {share} "
            "virtual workers: SOLVER.IMS_PER_BATCH must be a multiple of BN.VIRTUAL_WORKERS."
        )
    return images // share
