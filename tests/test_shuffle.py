"""RoI shuffling: the exchange against gathering everything, permuting and undoing it."""

from __future__ import annotations

import zlib

import pytest
import torch
from distributed import run_workers
from torch import Tensor, nn

from bn_detection.norm import RoIShuffle, exchange, plan_exchange, restore

SIZES = [[4, 4], [7, 0], [0, 0], [5, 1, 3], [0, 1, 0]]


def rows(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 3, 3, generator=generator) for n in sizes]


def grads(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 2, 3, 3, generator=generator) for n in sizes]


@pytest.mark.parametrize("counts", [*SIZES, [512, 511, 300, 7], [1] * 8])
def test_plans_fit_together_and_are_balanced(counts: list[int]) -> None:
    plans = [plan_exchange(counts, rank, seed=3) for rank in range(len(counts))]
    for rank, plan in enumerate(plans):
        assert sorted(plan.order.tolist()) == list(range(counts[rank]))
        assert plan.send == [other.receive[rank] for other in plans]
    groups = [sum(plan.receive) for plan in plans]
    assert sum(groups) == sum(counts)
    assert max(groups) - min(groups) <= 1


def test_every_pair_of_rows_meets_as_often_as_chance_says() -> None:
    # 2 workers of 4 rows: another row is among the 3 others of a group of 4, out of 7.
    draws = 4000
    together = torch.zeros(8, 8)
    for seed in range(draws):
        group = torch.zeros(8, dtype=torch.long)
        for rank in range(2):
            plan = plan_exchange([4, 4], rank, seed)
            group[4 * rank + plan.order[plan.send[0] :]] = 1
        together += group[:, None] == group[None, :]
    frequency = together[~torch.eye(8, dtype=torch.bool)] / draws
    assert (frequency - 3 / 7).abs().max() < 5 * (3 / 7 * 4 / 7 / draws) ** 0.5


def _round_trip(rank: int, world_size: int, sizes: list[int]) -> dict[str, Tensor]:
    x = rows(sizes)[rank].requires_grad_()
    plan = plan_exchange(sizes, rank, seed=5)
    moved = exchange(x, plan)
    y = restore(moved.square() * (rank + 1), plan)
    y.backward(grads(sizes)[rank])
    return {"moved": moved.detach(), "y": y.detach(), "grad": x.grad, "order": plan.order}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.timeout(120)
def test_exchange_equals_gathering_everything(sizes: list[int]) -> None:
    results = run_workers(_round_trip, len(sizes), sizes)
    # Which group each row went to, from the senders' side; then the same thing without messages.
    xs = rows(sizes)
    group = []
    for rank, result in enumerate(results):
        plan = plan_exchange(sizes, rank, seed=5)
        mine = torch.empty(sizes[rank], dtype=torch.long)
        mine[result["order"]] = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(plan.send)
        )
        group.append(mine)
    everything, groups = torch.cat(xs), torch.cat(group)
    for rank, result in enumerate(results):
        key = [row.sum().item() for row in result["moved"]]
        assert sorted(key) == sorted(row.sum().item() for row in everything[groups == rank])
        factor = (group[rank] + 1).view(-1, 1, 1, 1).float()
        assert torch.equal(result["y"], xs[rank].square() * factor)
        assert torch.allclose(result["grad"], grads(sizes)[rank] * 2 * xs[rank] * factor)


def _shuffled_batch_norm(rank: int, world_size: int, sizes: list[int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    layer = nn.BatchNorm2d(2)
    x = rows(sizes)[rank].requires_grad_()
    shuffle = RoIShuffle(seed=11, name="head")
    plan = shuffle.plan(x, iteration=4)
    y = restore(layer(conv(exchange(x, plan))), plan)
    y.backward(grads(sizes)[rank])
    weight_grad = layer.weight.grad
    return {"y": y.detach(), "grad": x.grad, "weight": weight_grad, "conv": conv.weight.grad}


@pytest.mark.parametrize("sizes", [[6, 6], [9, 1], [2, 8, 3]])
@pytest.mark.timeout(120)
def test_shuffled_batch_norm_is_gather_permute_normalize_undo(sizes: list[int]) -> None:
    results = run_workers(_shuffled_batch_norm, len(sizes), sizes)
    xs = [x.double().requires_grad_() for x in rows(sizes)]
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    layer = nn.BatchNorm2d(2).double()
    seed = zlib.crc32(b"11/head/4/0")
    group = []
    for rank, n in enumerate(sizes):
        plan = plan_exchange(sizes, rank, seed)
        mine = torch.empty(n, dtype=torch.long)
        mine[plan.order] = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(plan.send)
        )
        group.append(mine)
    groups, everything = torch.cat(group), torch.cat(xs)
    y = torch.zeros_like(everything)
    for g in range(len(sizes)):
        y = y.index_put((groups == g,), layer(conv(everything[groups == g])))
    y.backward(torch.cat(grads(sizes)).double())
    for rank, expected in enumerate(y.split(sizes)):
        assert torch.allclose(results[rank]["y"].double(), expected, atol=1e-5)
        assert torch.allclose(results[rank]["grad"].double(), xs[rank].grad, atol=1e-5)
    summed = sum(r["weight"].double() for r in results)
    assert torch.allclose(summed, layer.weight.grad, rtol=1e-5, atol=1e-5)
    summed = sum(r["conv"].double() for r in results)
    assert torch.allclose(summed, conv.weight.grad, rtol=1e-4, atol=1e-4)


def _orders(rank: int, world_size: int, seed: int) -> list[list[int]]:
    x = torch.zeros(16, 1)
    shuffle, again = RoIShuffle(seed), RoIShuffle(seed)
    other = RoIShuffle(seed, name="mask_head")
    calls = [(shuffle, 7), (shuffle, 7), (shuffle, 8), (other, 7)]
    drawn = [s.plan(x, iteration).order.tolist() for s, iteration in calls]
    again.seed = shuffle.seed
    return [*drawn, again.plan(x, 8).order.tolist(), [shuffle.seed]]


@pytest.mark.parametrize("seed", [0, -1])
@pytest.mark.timeout(60)
def test_draws_differ_and_are_reproducible(seed: int) -> None:
    first, second = run_workers(_orders, 2, seed)
    by_step, resumed = first[:4], first[4]
    assert all(a != b for i, a in enumerate(by_step) for b in by_step[:i])
    assert resumed == first[2], "a new process at the same iteration draws the same"
    assert first[5] == second[5], "all workers agree on the seed"
    assert first[5][0] >= 0


def test_without_workers_there_is_nothing_to_exchange() -> None:
    assert RoIShuffle(0).plan(torch.zeros(3, 1), 0) is None
