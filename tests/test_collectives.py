"""Workers that are not in step get an error that names layer and worker, and do not hang."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
import torch.distributed as dist
from distributed import run_workers
from tooling import FORK_SERVER
from torch import nn

from bn_detection.norm import (
    Groups,
    Partition,
    PartitionedBatchNorm2d,
    Rows,
    Scope,
    build_partition,
)
from bn_detection.norm.collectives import Collectives

GROUP_TIMEOUT = 4.0
CHANNELS = (2, 2, 5)


def _head(partition: str) -> list[nn.Module]:
    made = build_partition(partition)
    scope = Scope(made.groups, seed=0)
    scope.rename("head")
    layers = [PartitionedBatchNorm2d(c, partition=made, scope=scope) for c in CHANNELS]
    for k, layer in enumerate(layers):
        layer.rename(f"head.norm{k}")
    return layers


def _call(layer: nn.Module) -> torch.Tensor:
    return layer(torch.randn(4, layer.num_features, 2, 2, requires_grad=True)).square().sum()


def _rest_of_the_model() -> None:
    dist.all_reduce(torch.ones(1000))


def skips_a_layer(head: list[nn.Module], rank: int) -> None:
    for layer in head[rank:]:
        _call(layer)


def skips_a_layer_of_another_shape(head: list[nn.Module], rank: int) -> None:
    _call(head[1 + rank])


def skips_the_head(head: list[nn.Module], rank: int) -> None:
    if rank == 0:
        _call(head[0])
    _rest_of_the_model()


def skips_the_backward(head: list[nn.Module], rank: int) -> None:
    loss = _call(head[0])
    if rank == 0:
        loss.backward()
    _rest_of_the_model()


def goes_on_before_the_backward(head: list[nn.Module], rank: int) -> None:
    loss = _call(head[0])
    if rank == 0:
        loss.backward()
    else:
        _call(head[0])


def leaves(head: list[nn.Module], rank: int) -> None:
    if rank == 0:
        _call(head[0])


Scenario = Callable[[list[nn.Module], int], None]
SCENARIOS = [
    skips_a_layer,
    skips_a_layer_of_another_shape,
    skips_the_head,
    skips_the_backward,
    goes_on_before_the_backward,
    leaves,
]
# After a good step; and in the first one, when process groups are still to be made.
CASES = [(scenario, "world", 1) for scenario in SCENARIOS]
CASES += [(skips_a_layer_of_another_shape, "world", 0), (skips_the_head, "world", 0)]
CASES += [(skips_a_layer, "shuffle", 1), (skips_the_head, "shuffle", 1)]


def _work(rank: int, port: int, case: tuple[Scenario, str, int], pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    timeout = timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    scenario, partition, good_steps = case
    head = _head(partition)
    message = ""
    try:
        for _ in range(good_steps):
            sum(_call(layer) for layer in head).backward()
        scenario(head, rank)
    except RuntimeError as error:
        message = str(error)
    pipe.send(message)


def _message(pipe: Connection) -> str:
    try:
        return pipe.recv()
    except EOFError:
        return "the process was ended"


@pytest.fixture(scope="module")
def errors() -> Iterator[dict[tuple[Scenario, str, int], list[str]]]:
    """The messages of both workers in each case; all cases run at once, as most of it is waiting.

    In processes of their own, since the process group cannot be used again.
    """
    stores: list[dist.TCPStore] = []
    processes: list[BaseProcess] = []
    pipes = {}
    try:
        for case in CASES:
            stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            for rank in range(2):
                pipes[case, rank], theirs = FORK_SERVER.Pipe()
                args = (rank, stores[-1].port, case, theirs)
                processes.append(FORK_SERVER.Process(target=_work, args=args, daemon=True))
                processes[-1].start()
        assert all(pipe.poll(60) for pipe in pipes.values()), "a worker hangs"
        yield {case: [_message(pipes[case, rank]) for rank in range(2)] for case in CASES}
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}-steps"
)
@pytest.mark.timeout(120)
def test_mismatch_names_layer_and_worker(
    errors: dict[tuple[Scenario, str, int], list[str]], case: tuple[Scenario, str, int]
) -> None:
    scenario, partition, _ = case
    first, second = errors[case]
    if scenario in (skips_a_layer_of_another_shape, goes_on_before_the_backward):
        # gloo ends the worker that gets the longer message, and the other one says where.
        layer = "head.norm2" if scenario is skips_a_layer_of_another_shape else "head.norm0"
        assert first == "the process was ended"
        assert second.startswith(f"{layer}: worker 1 of 2 ")
        return
    # `shuffle` asks for the rows of all workers first, once for the whole head.
    owner = "head" if (scenario, partition) == (skips_the_head, "shuffle") else "head.norm0"
    assert first.startswith(f"{owner}: worker 0 of 2 ")
    assert "every worker must" in first.lower()
    if scenario is skips_a_layer:
        assert second.startswith("head.norm1: worker 1 of 2 ")
    else:
        # The other worker is in a collective that is not of this package, or has ended.
        assert "head" not in second


def _exchange(rank: int, world_size: int, owners: list[str]) -> str:
    collectives = Collectives(owners[rank])
    rows = torch.arange(3.0).view(3, 1) + 10 * rank
    try:
        # Rank 0 sends a row to itself and two to rank 1, which sends three to rank 0.
        plan = [([1, 2], [1, 3]), ([3, 0], [2, 0])][rank]
        return str(collectives.all_to_all(rows, *plan).flatten().tolist())
    except RuntimeError as error:
        return str(error)


@pytest.mark.timeout(60)
def test_rows_are_exchanged_by_layers_of_one_name_alone() -> None:
    assert run_workers(_exchange, 2, ["head", "head"]) == [
        "[0.0, 10.0, 11.0, 12.0]",
        "[1.0, 2.0]",
    ]
    for rank, message in enumerate(run_workers(_exchange, 2, ["box_head", "mask_head"])):
        owner = ["box_head", "mask_head"][rank]
        assert message.startswith(f"{owner}: worker {rank} of 2 exchanges statistics")


class _OwnNumber(Partition):
    """A mistake: another number of groups on each worker."""

    spans_workers = True

    def groups(self, rows: Rows) -> Groups:
        return Groups(torch.zeros(rows.count, dtype=torch.long), rows.rank + 2)


def _own_numbers(rank: int, world_size: int) -> str:
    layer = PartitionedBatchNorm2d(3, partition=_OwnNumber())
    layer.scope.rename("roi_heads.box_head")
    with pytest.raises(RuntimeError) as error:
        layer(torch.randn(4, 3, 2, 2))
    return str(error.value)


@pytest.mark.timeout(60)
def test_a_number_of_groups_that_differs_is_refused_before_it_is_sent() -> None:
    for message in run_workers(_own_numbers, 2):
        assert message == (
            "roi_heads.box_head: the number of groups of _OwnNumber must be the same on all "
            "workers, and is 2 on worker 0, 3 on worker 1."
        )


def _sums(rank: int, world_size: int) -> list[torch.Tensor]:
    collectives = Collectives("layer")
    values = torch.arange(3, dtype=torch.float64).view(3, 1) + rank / 3
    sums = [collectives.all_reduce(values)]
    # A copy of a model, or one that is loaded, is used by all workers from its first call on.
    for other in (copy.deepcopy(collectives), pickle.loads(pickle.dumps(collectives))):
        sums.append(other.all_reduce(values * 2) / 2)
    gathered = collectives.all_gather((rank, 2**31 - rank))()
    assert gathered == [[k, 2**31 - k] for k in range(world_size)]
    return sums


@pytest.mark.timeout(60)
def test_sums_are_float64_and_the_same_bits_on_all_workers() -> None:
    results = run_workers(_sums, 3)
    expected = torch.arange(3, dtype=torch.float64).view(3, 1) * 3 + 1
    for sums in results:
        for total in sums:
            assert torch.equal(total, results[0][0])
            assert torch.allclose(total, expected, rtol=1e-15)
