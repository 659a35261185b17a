"""Shuffling by statistics and by features, and virtual workers, against real workers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_workers
from reference import CHANNELS, assert_close, clock, relative_error, samples, shuffled
from torch import Tensor, nn

from bn_detection.norm import (
    Groups,
    PartitionedBatchNorm2d,
    Scope,
    build_partition,
    exchange,
    plan_exchange,
    restore,
    set_rows_per_image,
)

SIZES = [[6, 6], [9, 1], [7, 0], [1, 0], [2, 8, 3], [0, 1, 0], [5, 0, 2, 4]]
SEED = 11


def make_scope(make: object, seed: int = SEED, name: str = "head") -> Scope:
    made = Scope(make, seed=seed)
    made.rename(name)
    return made


class Stack(nn.Sequential):
    """Two convolutions with BatchNorm and ReLU, of the same weights on all workers."""

    def __init__(self, partition: str | None = None, virtual_workers: int = 0) -> None:
        torch.manual_seed(0)
        made = build_partition(partition or "worker", virtual_workers=virtual_workers)
        shared = make_scope(made.groups)
        layers = []
        for _ in range(2):
            norm = nn.BatchNorm2d(CHANNELS)
            if partition:
                norm = PartitionedBatchNorm2d(CHANNELS, partition=made, scope=shared)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
            layers += [conv, norm, nn.ReLU()]
        super().__init__(*layers)
        shared.attach(self)


class ByFeatures(Stack):
    """BN per worker, of rows that go to the worker of their group and back."""

    def __init__(self) -> None:
        super().__init__("worker")
        self.shuffle = make_scope(plan_exchange)
        self.shuffle.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        plan = self.shuffle.get(self, x)
        return restore(super().forward(exchange(x, plan)), plan)


def train(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """A step: outputs, gradients and running statistics."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(grad)
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "grad_x": x.grad} | gradients | dict(model.named_buffers())


def together(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All workers' rows, parameter gradients summed, running statistics averaged.

    The average is over the workers that saw a row, as before an evaluation.
    """
    seen = [result for result in results if result["1.num_batches_tracked"] > 0]
    total = {}
    for key in results[0]:
        if key in ("y", "grad_x"):
            total[key] = torch.cat([result[key] for result in results])
        elif key.startswith("gradient"):
            total[key] = sum(result[key] for result in results)
        elif "running" in key:
            total[key] = sum(result[key] for result in seen) / len(seen)
    return total


def gather_permute_normalize_undo(xs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """What shuffling means, in float64: a model with plain BatchNorm for each group of rows."""
    counts = [len(x) for x in xs]
    ids = torch.cat(shuffled(counts, len(xs), seed=SEED, name="head", iteration=7, call=0))
    x, grad = torch.cat(xs).double(), torch.cat(grads).double()
    groups = [ids == group for group in ids.unique()]
    results = [train(Stack().double(), x[mine], grad[mine]) for mine in groups]
    total = together(results)
    for key in ("y", "grad_x"):
        total[key] = torch.zeros_like(x)
        for mine, result in zip(groups, results, strict=True):
            total[key][mine] = result[key]
    return total


def _train(rank: int, world_size: int, sizes: list[int], mode: str) -> dict[str, Tensor]:
    model = Stack("shuffle") if mode == "statistics" else ByFeatures()
    with clock(7):
        return train(model, samples(sizes)[rank], samples(sizes, seed=1)[rank])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.timeout(120)
def test_shuffling_is_gather_permute_normalize_undo(sizes: list[int]) -> None:
    expected = gather_permute_normalize_undo(samples(sizes), samples(sizes, seed=1))
    by_mode = {}
    for mode in ("statistics", "features"):
        by_mode[mode] = together(run_workers(_train, len(sizes), sizes, mode))
        assert_close(by_mode[mode], expected)
    assert_close(by_mode["statistics"], by_mode["features"])


def _exchange(rank: int, world_size: int, sizes: list[int]) -> dict[str, Tensor]:
    x = samples(sizes)[rank].requires_grad_()
    shuffle = make_scope(plan_exchange)
    with clock(7):
        plan = shuffle.get(nn.Identity(), x)
    moved = exchange(x, plan)
    # Another function on each worker shows where a row has been.
    y = restore(moved.square() * (rank + 1), plan)
    y.backward(samples(sizes, seed=1)[rank])
    sent = torch.tensor(plan.send)
    return {"moved": moved.detach(), "y": y.detach(), "grad": x.grad, "sent": sent}


@pytest.mark.parametrize("sizes", [*SIZES, [0, 0]], ids=str)
@pytest.mark.timeout(120)
def test_each_row_visits_the_worker_of_its_group(sizes: list[int]) -> None:
    results = run_workers(_exchange, len(sizes), sizes)
    ids = shuffled(sizes, len(sizes), seed=SEED, name="head", iteration=7, call=0)
    everything = torch.cat(samples(sizes))
    for rank, result in enumerate(results):
        x, grad = samples(sizes)[rank], samples(sizes, seed=1)[rank]
        assert torch.equal(result["moved"], everything[torch.cat(ids) == rank])
        factor = (ids[rank] + 1).view(-1, 1, 1, 1).float()
        assert torch.equal(result["y"], x.square() * factor)
        assert torch.allclose(result["grad"], grad * 2 * x * factor)
        assert torch.equal(result["sent"], ids[rank].bincount(minlength=len(sizes)))


def test_without_workers_there_is_nothing_to_exchange() -> None:
    assert make_scope(plan_exchange).get(nn.Identity(), torch.zeros(3, 1)) is None


# Rows of the two images of each of eight virtual workers. With the second, one has none at all.
SOME_ROWS = [3, 0, 2, 5, 0, 4, 1, 1, 6, 2, 0, 3, 3, 3, 2, 1]
NO_ROWS = [3, 0, 2, 5, 0, 4, 1, 1, 6, 2, 0, 0, 3, 3, 2, 1]


def _train_virtual(
    rank: int, world_size: int, partition: str, images: list[int]
) -> dict[str, Tensor]:
    share = len(images) // world_size
    mine = images[rank * share : (rank + 1) * share]
    start, total = sum(images[: rank * share]), sum(images)
    x, grad = (samples([total], seed)[0][start : start + sum(mine)] for seed in (0, 1))
    model = Stack(partition, virtual_workers=8 if world_size < 8 else 0)
    set_rows_per_image(mine)
    with clock(7):
        return train(model, x, grad)


@pytest.mark.parametrize("partition", ["worker", "world", "shuffle"])
@pytest.mark.parametrize("images", [SOME_ROWS, NO_ROWS], ids=["some_rows", "no_rows"])
@pytest.mark.timeout(120)
def test_virtual_workers_are_workers(images: list[int], partition: str) -> None:
    workers = together(run_workers(_train_virtual, 8, partition, images))
    assert len(workers["y"]) == sum(images)
    if partition == "worker" and images is NO_ROWS:
        # A process averages over its virtual workers that have rows; then processes count equally.
        workers = {key: value for key, value in workers.items() if "running" not in key}
    for processes in (1, 2):
        args = (processes, partition, images)
        virtual = (
            run_workers(_train_virtual, *args) if processes > 1 else [_train_virtual(0, *args)]
        )
        assert_close(together(virtual), workers)


def _groups(rank: int, world_size: int, seed: int) -> tuple[list[list[int]], list[int]]:
    made = build_partition("shuffle")
    head, same, other = (make_scope(made.groups, seed, name) for name in ("head", "head", "mask"))
    x = torch.zeros(16 + rank, 1, 1, 1)

    def draw(scope: Scope[Groups], iteration: int) -> list[int]:
        with clock(iteration):
            return scope.get(nn.Identity(), x).ids.tolist()

    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as sent:
        drawn = [draw(head, 7), draw(head, 7), draw(head, 8)]
    # The number of rows, and two more: no indices.
    assert [call.args[1].numel() for call in sent.call_args_list] == [3, 3, 3]
    other.seed = same.seed = head.seed
    return [*drawn, draw(other, 7), draw(same, 8)], [head.seed]


@pytest.mark.parametrize("seed", [5, -1])
@pytest.mark.timeout(60)
def test_draws_differ_and_are_the_same_on_all_workers_and_after_a_resume(seed: int) -> None:
    (first, seeds), (second, _) = results = run_workers(_groups, 2, seed)
    assert all(agreed == seeds for _, agreed in results)
    assert seeds[0] >= 0
    assert seed < 0 or seeds == [seed]
    draws = [a + b for a, b in zip(first, second, strict=True)]
    for k, (name, iteration, call) in enumerate(
        [("head", 7, 0), ("head", 7, 1), ("head", 8, 0), ("mask", 7, 0), ("head", 8, 0)]
    ):
        ids = shuffled([16, 17], 2, seed=seeds[0], name=name, iteration=iteration, call=call)
        assert draws[k] == torch.cat(ids).tolist()
    assert all(draws[i] != draws[j] for i in range(4) for j in range(i))
    assert draws[4] == draws[2], "a new process at the same iteration"


def test_negative_seeds_are_drawn_for_ghosts_too() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        scope = make_scope(build_partition("ghost", ghost_size=4).groups, -1)
        layer, x = nn.Identity(), torch.zeros(40, 1, 1, 1)
        return torch.cat([scope.get(layer, x).ids for _ in range(2)])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_negative_seeds_are_drawn() -> None:
    scopes = [make_scope(build_partition("shuffle", virtual_workers=2).groups, -1) for _ in "ab"]
    for made in scopes:
        made.get(nn.Identity(), torch.zeros(4, 1, 1, 1))
    assert scopes[0].seed != scopes[1].seed


class Folding(nn.Module):
    """Folds the frames of a video into rows."""

    def __init__(self) -> None:
        super().__init__()
        made = build_partition("shuffle")
        self.scope = Scope(made.groups, seed=SEED, needs_counts=made.needs_counts)
        self.norm = PartitionedBatchNorm2d(CHANNELS, partition=made, scope=self.scope)
        self.scope.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1))


def _fold(rank: int, world_size: int) -> Tensor:
    videos = samples([4, 0])[rank].unflatten(0, (-1 if rank == 0 else 0, 2))
    return Folding()(videos).detach()


@pytest.mark.timeout(60)
def test_a_module_whose_layers_have_other_rows_than_its_input() -> None:
    assert [len(y) for y in run_workers(_fold, 2)] == [4, 0]


def test_without_a_clock_a_loaded_layer_continues_the_draws() -> None:
    def stack() -> Stack:
        return Stack("shuffle", virtual_workers=2)

    x = samples([9])[0]
    with clock(None):
        trained, interrupted, resumed = stack(), stack(), stack()
        outputs = [trained(x) for _ in range(3)]
        for _ in range(2):
            interrupted(x)
        resumed.load_state_dict(interrupted.state_dict())
        assert torch.equal(resumed(x), outputs[2])
    assert relative_error(outputs[1], outputs[2]) > 1e-3
