"""Between host and device without either waiting for the other."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; on a GPU a copy that the host does not wait for.

    Args:
        tensor: on the CPU.
        device: where to.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


class Arriving:
    """A number on its way from a GPU to the host.

    Args:
        number: one element, on the GPU.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
        self._number.copy_(number, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def has_arrived(self) -> bool:
        """Whether :meth:`item` need not wait."""
        return bool(self._event.query())

    def item(self) -> float:
        """The number; waits for it."""
        self._event.synchronize()
        return self._number.item()
