"""Random numbers that are a function of a seed and a place in the training, not of what ran before.

What the generators hold then never has to be in a checkpoint: at each place they are seeded anew.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *place: object) -> int:
    """A seed of 63 bits: the same for the same arguments, unrelated for others.

    Args:
        seed: of the training.
        place: such as a name, a rank and an iteration.
    """
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, on the CPU and the GPUs in use.

    ``torch.manual_seed`` does the same for torch, and takes 0.1 ms where no GPU is in use.
    """
    _seed_cpu(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU for a while; afterwards they are as they were."""
    with kept_generators():
        _seed_cpu(seed)
        yield


@contextmanager
def kept_generators(*, on_gpus: bool = False) -> Iterator[None]:
    """Afterwards the global generators of Python, numpy and torch are as they were.

    Args:
        on_gpus: whether those of the GPUs are too. A process that was forked must not ask for them.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    of_gpus = torch.cuda.get_rng_state_all() if on_gpus and torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  what Detectron2 draws from
    torch.default_generator.manual_seed(seed)
