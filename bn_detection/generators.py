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
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  what Detectron2 draws from
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU for a while; afterwards they are as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
