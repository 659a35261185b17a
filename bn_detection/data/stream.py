"""The endless stream of training samples, which can be entered at any position."""

from __future__ import annotations

import atexit
import logging
import os
import random
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset

from ..config import ConfigError
from ..generators import derive_seed, seeded

logger = logging.getLogger(__name__)

_FAILURES_TO_WARN = 3
_iterators: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()


class TrainLoader:
    """Batches of this worker, without end, that go on where another training stopped.

    The samples of all workers are one stream. A sample is a function of the loader's seed and its
    position in the stream: the sampler says which image, and the generators that augmentations draw
    from (Python's, numpy's, torch's) are seeded for each. So the state is the number of samples
    that were used and, with grouping, the positions of those that still wait for a batch; what the
    processes of the loader have prepared ahead does not matter, nor how many they are.

    Iterating goes on from the state, also in a second iterator.

    Args:
        dataset: of what the mapper takes, with a length.
        mapper: makes a sample; None for one that cannot be made, in whose place is another.
        make_sampler: makes Detectron2's sampler, which yields the indices of this worker, from a
            seed that is the same on all workers.
        seed: of the stream, the same on all workers.
        batch_size: of this worker.
        group: whether a batch has only wide images or only others, by "width" and "height".
        num_workers: processes that prepare samples ahead; 0 for none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        mapper: Callable[[Any], Any],
        make_sampler: Callable[[int], Iterable[int]],
        *,
        seed: int,
        batch_size: int,
        group: bool,
        num_workers: int,
    ) -> None:
        self._dataset = dataset
        self._mapper = mapper
        self._make_sampler = make_sampler
        self._sampler = make_sampler(seed)
        self.seed = seed
        self._batch_size = batch_size
        self._group = group
        self._num_workers = num_workers
        self._used = 0
        self._waiting: list[int] = []
        self._begun = False
        # Weak: a forgotten iterator ends on its own.
        self._iterator: weakref.ref[Generator[list[Any]]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where this worker is; positions are those of its own part of the stream."""
        return {
            "seed": self.seed,
            "images": len(self._dataset),
            "used": self._used,
            "waiting": list(self._waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the worker of a :meth:`state_dict` stopped.

        Raises:
            RuntimeError: batches were taken already.
        """
        if self._begun:
            raise RuntimeError("The state of a data loader can be loaded before its first batch.")
        if state["images"] != len(self._dataset):
            logger.warning(
                "The training data has %d images, and had %d when the checkpoint was written: "
                "their order is another one.",
                *(len(self._dataset), state["images"]),
            )
        if state["seed"] != self.seed:
            self.seed = state["seed"]
            self._sampler = self._make_sampler(self.seed)
        self._used = state["used"]
        self._waiting = list(state["waiting"])

    def __iter__(self) -> Iterator[list[Any]]:
        iterator = self._iterate()
        self._iterator = weakref.ref(iterator)
        return iterator

    def close(self) -> None:
        """End the last iterator, and its processes."""
        iterator = self._iterator and self._iterator()
        if iterator is not None:
            iterator.close()

    def _iterate(self) -> Generator[list[Any]]:
        self._begun = True
        groups: dict[bool, list[tuple[int, Any]]] = {False: [], True: []}
        # A generator of its own, for the draw that DataLoader makes and nothing here uses.
        loader = DataLoader(
            _Samples(self._dataset, self._mapper, self.seed),
            sampler=self._places(),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),
            # Two batches of each process, as with a loader of batches.
            prefetch_factor=2 * self._batch_size if self._num_workers else None,
        )
        for position, sample in iterate(loader):
            is_wide = self._group and sample["width"] > sample["height"]
            group = groups[is_wide]
            group.append((position, sample))
            self._used = max(self._used, position + 1)
            if len(group) == self._batch_size:
                batch = [sample for _, sample in group]
                group.clear()
                self._waiting = sorted(p for waiting in groups.values() for p, _ in waiting)
                yield batch

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Position in this worker's part of the stream, in the whole stream, and index."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        waiting, used = set(self._waiting), self._used
        indices = enumerate(self._sampler)
        for position, index in islice(indices, used):
            if position in waiting:
                yield position, position * world_size + rank, index
        for position, index in indices:
            yield position, position * world_size + rank, index


def continued_by(states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The state of a worker that goes on where another number of workers stopped.

    It begins after all that were used; those that waited for a batch are left out.

    Args:
        states: :meth:`TrainLoader.state_dict` of each of those workers, by rank.
        rank: of the worker.
        world_size: number of workers now.
    """
    used = max(state["used"] for state in states) * len(states)
    return {**states[0], "used": -(-max(used - rank, 0) // world_size), "waiting": []}


class _Samples(Dataset):
    def __init__(self, dataset: Dataset[Any], mapper: Callable[[Any], Any], seed: int) -> None:
        self._dataset = dataset
        self._mapper = PicklableWrapper(mapper)  # also a lambda
        self._seed = seed
        self._failed: set[int] = set()

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, Any]:
        position, position_of_all, index = place
        seed = derive_seed(self._seed, "sample", position_of_all)
        with seeded(seed):
            sample = self._mapper(self._dataset[index])
        if sample is None:
            sample = self._another(index, seed)
        return position, sample

    def _another(self, index: int, seed: int) -> Any:
        """A random image instead of one that cannot be read; which does not depend on the past.

        That some have failed before saves reading them again, and changes nothing.
        """
        draw, failures = random.Random(seed), 0
        self._failed.add(index)
        while len(self._failed) < len(self._dataset):
            other = draw.randrange(len(self._dataset))
            if other in self._failed:
                continue
            with seeded(derive_seed(seed, other)):
                sample = self._mapper(self._dataset[other])
            if sample is not None:
                return sample
            self._failed.add(other)
            failures += 1
            if failures == _FAILURES_TO_WARN:
                logger.warning("%d images in a row cannot be read.", failures + 1)
        raise ConfigError(
            f"None of the {len(self._dataset)} training images can be read any more: see the log "
            "for their names."
        )


def _as_it_is(sample: Any) -> Any:
    return sample


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a loader, whose processes end with the iterator, at the latest before this."""
    iterator = _iterate(loader)
    _iterators.add(iterator)
    return iterator


def _iterate(loader: DataLoader[Any]) -> Generator[Any]:
    items = iter(loader)
    try:
        yield from items
    finally:
        # Not left to the garbage collector: an exception may keep a reference.
        if getattr(loader, "num_workers", 0):
            items._shutdown_workers()


@atexit.register
def _close_iterators() -> None:
    """Before multiprocessing ends all processes by SIGTERM, and waits for them."""
    for iterator in list(_iterators):
        iterator.close()


def outlive_signals(_worker: int = 0) -> None:
    """Have a process of a data loader go on after SIGTERM, but for its owner's, and SIGUSR1.

    A batch system sends them to all processes of a job, and the iteration that is to be finished
    needs its data. It is a ``worker_init_fn``.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_owner, args=(os.getppid(),), daemon=True).start()


def _end_by_owner(owner: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(128 + signal.SIGTERM)
