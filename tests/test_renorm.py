"""Batch Renormalization against the formulas of Ioffe 2017, in float64."""

from __future__ import annotations

import pytest
import torch
from distributed import run_workers
from reference import (
    CHANNELS,
    affine,
    assert_close,
    ghosts,
    normalize,
    samples,
    set_affine,
    shuffled,
    step,
)
from torch import Tensor, nn

from bn_detection.norm import (
    PartitionedBatchNorm2d,
    RenormSchedule,
    Scope,
    build_partition,
)

# BN, then r to 3 over four steps and d to 5 over two.
SCHEDULE = RenormSchedule(r_max=3.0, d_max=5.0, warmup=2, r_steps=6, d_steps=4)
R_MAX = [1, 1, 1, 1.5, 2, 2.5, 3, 3]
D_MAX = [0, 0, 0, 2.5, 5, 5, 5, 5]
# Rows of two workers at each step. The EMA moves fast, and rows are far from where it starts.
STEPS = [[7, 4], [3, 6], [5, 5], [6, 1], [0, 0], [7, 4], [2, 6], [8, 3], [4, 4]]
MOMENTUM = 0.3
EPS = 1e-5


def test_schedule_rises_linearly_after_the_warm_up() -> None:
    limits = [SCHEDULE.limits(torch.tensor(k)) for k in range(8)]
    assert [float(r) for r, _ in limits] == R_MAX
    assert [float(d) for _, d in limits] == D_MAX


@pytest.mark.parametrize(
    ("steps", "r_max", "d_max"),
    [(0, 1, 0), (5_000, 1, 0), (15_000, 1 + 4 / 7, 2.5), (25_000, 1 + 8 / 7, 5), (40_000, 3, 5)],
)
def test_default_schedule_is_that_of_the_paper(steps: int, r_max: float, d_max: float) -> None:
    for scale in (1, 0.01):
        schedule = RenormSchedule().scaled(scale)
        limits = schedule.limits(torch.tensor(steps * scale))
        assert [float(limit) for limit in limits] == pytest.approx([r_max, d_max])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"r_max": 0.5}, "R_MAX 0.5 must be at least 1."),
        ({"d_max": -1.0}, "D_MAX -1.0 must be at least 0."),
        ({"warmup": 30_000}, r"D_ITERS 25000 must be at least 30000 \(BN.RENORM.WARMUP_ITERS\)"),
        ({"warmup": -1}, "WARMUP_ITERS -1 must be at least 0"),
    ],
)
def test_schedules_that_cannot_be(arguments: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=f"BN.RENORM.{key}"):
        RenormSchedule(**arguments)


def build(partition: str, schedule: RenormSchedule | None = SCHEDULE) -> PartitionedBatchNorm2d:
    made = build_partition(partition, ghost_size=3)
    scope = Scope(made.groups, seed=5)
    return PartitionedBatchNorm2d(
        CHANNELS, partition=made, scope=scope, renorm=schedule, momentum=MOMENTUM, eps=EPS
    )


def _train(rank: int, world_size: int, partition: str) -> list[dict[str, Tensor]]:
    layer = set_affine(build(partition))
    results = []
    for k, sizes in enumerate(STEPS):
        layer.zero_grad()
        result = step(layer, samples(sizes, k)[rank], samples(sizes, k + 100)[rank])
        results.append({key: value.clone() for key, value in result.items()})
    return results


def renormalize(
    batches: list[tuple[Tensor, Tensor, Tensor]],
) -> list[dict[str, Tensor]]:
    """Algorithm 1 over steps of (rows, output gradients, groups), and the gradients of autograd."""
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    tracked, results = 0, []
    for x, grad, ids in batches:
        x = x.double().requires_grad_()
        weight, bias = (t.double().requires_grad_() for t in affine())
        xhat, statistics = normalize(x, ids, eps=EPS)
        r_max, d_max = R_MAX[min(tracked, 7)], D_MAX[min(tracked, 7)]
        y = bias[:, None, None] + 0 * x * weight[:, None, None]
        sigma = (var + EPS).sqrt()
        for group, (group_mean, group_var, _) in zip(ids.unique(), statistics, strict=True):
            mine = (ids == group).double()[:, None, None, None]
            r = ((group_var + EPS).sqrt() / sigma).detach().clamp(1 / r_max, r_max)
            d = ((group_mean - mean) / sigma).detach().clamp(-d_max, d_max)
            r, d, scale = (t[:, None, None] for t in (r, d, weight))
            y = y + mine * (xhat * r + d) * scale
        y.backward(grad.double())
        if statistics:
            means, variances, counts = zip(*statistics, strict=True)
            unbiased = [v * n / (n - 1) for v, n in zip(variances, counts, strict=True)]
            mean = mean.lerp(sum(means).detach() / len(means), MOMENTUM)
            var = var.lerp(sum(unbiased).detach() / len(unbiased), MOMENTUM)
            tracked += 1
        results.append(
            {
                "y": y,
                "grad_x": x.grad,
                "grad_weight": weight.grad,
                "grad_bias": bias.grad,
                "running_mean": mean,
                "running_var": var,
                "num_batches_tracked": torch.tensor(tracked),
            }
        )
    return results


def _batch(partition: str, k: int, ranks: list[int], tracked: int) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = ([samples(STEPS[k], seed)[rank] for rank in ranks] for seed in (k, k + 100))
    count = sum(len(rows) for rows in x)
    if partition == "shuffle":
        ids = torch.cat(shuffled(STEPS[k], 2, seed=5, iteration=tracked, call=0))
    elif partition == "ghost":
        ids = ghosts(count, 3, seed=5, iteration=tracked, call=0)
    else:
        ids = torch.zeros(count)
    return torch.cat(x), torch.cat(grad), ids


@pytest.mark.parametrize("partition", ["worker", "ghost"])
def test_steps_are_those_of_the_formula(partition: str) -> None:
    expected = renormalize([_batch(partition, k, [0], k) for k in range(len(STEPS))])
    for actual, reference in zip(_train(0, 1, partition), expected, strict=True):
        assert_close(actual, reference)


@pytest.mark.parametrize("partition", ["world", "shuffle"])
@pytest.mark.timeout(60)
def test_steps_over_workers_are_those_of_the_formula(partition: str) -> None:
    results = run_workers(_train, 2, partition)
    # Without a clock, draws are numbered by the calls of the layer.
    expected = renormalize([_batch(partition, k, [0, 1], k) for k in range(len(STEPS))])
    for *workers, reference in zip(*results, expected, strict=True):
        actual = {key: torch.cat([w[key] for w in workers]) for key in ("y", "grad_x")}
        for key in ("grad_weight", "grad_bias"):
            actual[key] = sum(worker[key] for worker in workers)
        assert_close(workers[1] | actual, reference)


def test_with_the_limits_of_bn_it_is_bn() -> None:
    never = RenormSchedule(r_max=1.0, d_max=0.0, warmup=0, r_steps=0, d_steps=0)
    ours = set_affine(build("worker", never))
    theirs = set_affine(nn.BatchNorm2d(CHANNELS, momentum=MOMENTUM, eps=EPS))
    for k in range(3):
        x, grad = (samples([7], seed)[0] for seed in (k, k + 100))
        assert_close(step(ours, x, grad), step(theirs, x, grad))
    x = samples([5])[0]
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)
