"""BatchNorm from its formula, in float64: what the tests of the norm package compare with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bn_detection.norm import scope, set_clock

CHANNELS = 3


@contextmanager
def clock(iteration: int | None) -> Iterator[None]:
    """The training iteration, where the layers look for it."""
    previous = scope._clock
    set_clock(lambda: iteration)
    try:
        yield
    finally:
        set_clock(previous)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest absolute value; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    scale = expected.detach().double().abs().max()
    return float(error / scale if scale > 0 else error)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Each tensor of ``expected`` is in ``actual``, up to a relative error."""
    errors = {key: relative_error(actual[key], value) for key, value in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors


def samples(sizes: Sequence[int], seed: int = 0, shape: tuple[int, ...] = (4, 5)) -> list[Tensor]:
    """By worker: rows whose mean and scale differ from those of other channels and workers."""
    generator = torch.Generator().manual_seed(seed)
    offset = 2.0 * torch.arange(CHANNELS).view(-1, 1, 1)
    return [
        torch.randn(n, CHANNELS, *shape, generator=generator) * (1 + rank) + offset - rank
        for rank, n in enumerate(sizes)
    ]


def affine() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.5, -1.5, 2.0]), torch.tensor([0.1, 0.0, -3.0])


def set_affine(layer: nn.Module) -> nn.Module:
    """Give a layer the parameters of :func:`affine`."""
    for parameter, value in zip((layer.weight, layer.bias), affine(), strict=True):
        parameter.data.copy_(value)
    return layer


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What a forward and backward of ``layer`` gives and leaves."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        **layer.state_dict(),
    }


def normalize(
    x: Tensor, ids: Tensor, *, eps: float = 1e-5
) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Each group of rows to mean 0 and variance 1; the groups' means, biased variances, counts."""
    xhat, statistics = 0 * x, []
    for group in ids.unique():
        mine = ids == group
        mean = x[mine].mean((0, 2, 3), keepdim=True)
        var = (x[mine] - mean).square().mean((0, 2, 3), keepdim=True)
        xhat = xhat.index_put((mine,), (x[mine] - mean) / (var + eps).sqrt())
        count = x[mine].numel() // x.shape[1]
        statistics.append((mean.flatten(), var.flatten(), count))
    return xhat, statistics


def reference_step(
    x: Tensor, grad: Tensor, ids: Tensor, *, eps: float = 1e-5, momentum: float = 0.1
) -> dict[str, Tensor]:
    """As :func:`step`, for a new layer with the parameters of :func:`affine`.

    Args:
        x: all rows that any group has one of.
        grad: with respect to the output.
        ids: the group of each row.
    """
    x = x.double().detach().requires_grad_()
    weight, bias = (t.double().requires_grad_() for t in affine())
    xhat, statistics = normalize(x, ids, eps=eps)
    y = xhat * weight[:, None, None] + bias[:, None, None]
    y.backward(grad.double())
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    usable = [(m, v * n / (n - 1)) for m, v, n in statistics if n > 1]
    if usable:
        new_mean, new_var = (sum(values) / len(usable) for values in zip(*usable, strict=True))
        mean, var = mean.lerp(new_mean, momentum), var.lerp(new_var, momentum)
    return {
        "y": y,
        "grad_x": x.grad,
        "grad_weight": weight.grad,
        "grad_bias": bias.grad,
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": torch.tensor(int(bool(usable))),
    }


def shuffled(
    counts: Sequence[int], number: int, *, seed: int, name: str = "", iteration: int, call: int
) -> list[Tensor]:
    """The documented draw of groups: by worker, the group of each row."""
    total = sum(counts)
    key = zlib.crc32(f"{seed}/{name}/{iteration}/{call}".encode())
    slots = torch.randperm(total, generator=torch.Generator().manual_seed(key)).tolist()
    small, large = total // number, total % number
    sizes = [small + (group < large) for group in range(number)]
    group_of_slot = [group for group, size in enumerate(sizes) for _ in range(size)]
    ids = torch.tensor([group_of_slot[slot] for slot in slots], dtype=torch.long)
    return list(ids.split(list(counts)))


def ghosts(
    count: int, size: int, *, seed: int, name: str = "", iteration: int, call: int, rank: int = 0
) -> Tensor:
    """The documented draw of ghost groups on a worker: the group of each row."""
    key = zlib.crc32(f"{seed}/{name}/{iteration}/{call}/{rank}".encode())
    slots = torch.randperm(count, generator=torch.Generator().manual_seed(key)).tolist()
    last = max(count // size - 1, 0)  # a remainder joins it
    return torch.tensor([min(slot // size, last) for slot in slots], dtype=torch.long)
