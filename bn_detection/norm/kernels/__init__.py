"""The passes over activations that normalization by groups is made of, for any device.

Two implementations have the passes of :class:`Kernels`: ``torch``, of torch's operations and
right on every device, and ``triton``, fused, for CUDA. :func:`choose_kernels` picks one.
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from ..partition import Groups, check_choice
from .torch_passes import TorchKernels, accumulation_dtype

__all__ = ["KERNELS", "Kernels", "TorchKernels", "accumulation_dtype", "choose_kernels"]

logger = logging.getLogger(__name__)

KERNELS = ("auto", "torch", "triton")

# Elements that a CPU's cache holds, and that a GPU's launches are worth.
_CPU_CHUNK, _GPU_CHUNK = 2**19, 2**23


class Kernels(Protocol):
    """The passes over ``x``, ``(N, C, H, W)`` of any floating dtype and memory format, not empty.

    What they take by group has the shape ``(G, C)`` and the dtype that activations are summed in
    (:func:`accumulation_dtype`); what they give is float64, with as many columns as they say.
    Activations are summed in float32 at least (float64 if ``x`` is) over a row, or over a tile of
    some rows, and in float64 over a group.
    """

    name: str

    def moments(self, x: Tensor, groups: Groups) -> Tensor:
        """``(G, 2C + 1)``: the number of values a channel, their sums, and sums of squares.

        Each row (or tile of one) is centred first, so a mean of 10,000 standard deviations costs
        eight of sixteen digits.
        """
        ...

    def affine(
        self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, groups: Groups
    ) -> Tensor:
        """``(x - mean) * scale + shift``, as ``x``; ``shift`` may be ``(C,)``, of any dtype."""
        ...

    def gradient_sums(self, grad: Tensor, x: Tensor, mean: Tensor, groups: Groups) -> Tensor:
        """``(G, 2C)``: sums of ``grad`` and of ``grad * (x - mean)``."""
        ...

    def input_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        slope: Tensor,
        groups: Groups,
    ) -> Tensor:
        """``(grad - shift - (x - mean) * slope) * scale``, as ``x``."""
        ...

    def averages(
        self, count: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means and unbiased variances over groups, ``(C,)``, as the running ones.

        Of groups of at least two values, whose statistics are finite; the running statistics of a
        channel that has no such group.
        """
        ...


def choose_kernels(choice: str, device: torch.device) -> Kernels:
    """The implementation for tensors of a device.

    Args:
        choice: ``torch``; ``triton``; or ``auto``: Triton's on CUDA if a try on a small tensor
            works there, else torch's, with one line in the log.
        device: of the activations.

    Raises:
        ValueError: an unknown choice.
        ImportError: ``triton`` was asked for and is not installed.
    """
    check_choice("kernels", choice, KERNELS)
    return _choose(choice, device)


@functools.cache
def _choose(choice: str, device: torch.device) -> Kernels:
    if choice == "triton":
        return _triton_kernels()
    if choice == "auto" and device.type == "cuda":
        try:
            kernels = _triton_kernels()
            _try(kernels, device)
        except Exception as error:
            logger.warning(
                "Normalization on %s uses torch's operations, which are slower than the fused "
                "kernels: Triton does not work there (%s: %s).",
                device,
                type(error).__name__,
                str(error).strip().partition("\n")[0],
            )
        else:
            return kernels
    if device.type == "cpu":
        return TorchKernels(_CPU_CHUNK, fused=True)
    return TorchKernels(_GPU_CHUNK, fused=False)


def _triton_kernels() -> Kernels:
    from .triton_passes import TritonKernels

    return TritonKernels()


def _try(kernels: Kernels, device: torch.device) -> None:
    """Compile and run each pass once; raises what Triton or the driver does."""
    x = torch.zeros(2, 4, 3, 3, device=device)
    groups = Groups(torch.zeros(2, dtype=torch.long, device=device), 1)
    mean = torch.zeros(1, 4, device=device)
    sums = kernels.moments(x, groups)
    kernels.affine(x, mean, mean, mean, groups)
    kernels.gradient_sums(x, x, mean, groups)
    kernels.input_gradient(x, x, mean, mean, mean, mean, groups)
    kernels.averages(sums[:, :1], sums[:, 1:5], sums[:, 5:], mean[0], mean[0])
    torch.cuda.synchronize(device)
