"""What the layers of a module share in a call, also when checkpointing repeats it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from distributed import run_workers
from reference import (
    CHANNELS,
    assert_close,
    clock,
    reference_step,
    relative_error,
    samples,
    set_affine,
    shuffled,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bn_detection import convert_norm, to_plain_batch_norm
from bn_detection.heads import BNOptions
from bn_detection.norm import (
    PartitionedBatchNorm2d,
    RenormSchedule,
    Scope,
    build_partition,
    scope,
    set_clock,
    set_rows_per_image,
)


@pytest.fixture(autouse=True)
def restored_clock() -> Iterator[None]:
    clock = scope._clock
    yield
    set_clock(clock)


class Head(nn.Module):
    """Two convolutions with a norm; layers, halves or all of it can be checkpointed."""

    def __init__(self, partition: str = "shuffle", renorm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = build_partition(partition, virtual_workers=4, ghost_size=3)
        if partition == "worker":
            made = build_partition(partition)
        self.scope = Scope(made.groups, seed=3)
        self.scope.rename("head")
        # From the second step on, far from BN.
        schedule = RenormSchedule(2.0, 1.0, warmup=0, r_steps=1, d_steps=1) if renorm else None
        self.blocks = nn.ModuleList()
        for k in range(2):
            norm = PartitionedBatchNorm2d(
                CHANNELS, partition=made, scope=self.scope, renorm=schedule
            )
            norm.rename(f"head.norm{k}")
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
            self.blocks.append(nn.Sequential(conv, norm, nn.ReLU()))
        self.scope.attach(self)
        self.checkpoint_block: Callable[[nn.Module, Tensor], Tensor] | None = None

    @property
    def norms(self) -> list[PartitionedBatchNorm2d]:
        return [block[1] for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.checkpoint_block(block, x) if self.checkpoint_block else block(x)
        return x


def _train(
    where: str, reentrant: bool, rank: int, partition: str, renorm: bool
) -> dict[str, Tensor]:
    """Two steps, each with two calls of the head."""

    def repeated(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    def around_norm(block: nn.Sequential, x: Tensor) -> Tensor:
        return block[2](repeated(block[1], block[0](x)))

    head = Head(partition, renorm)
    head.checkpoint_block = {"layer": around_norm, "part": repeated}.get(where)
    sizes = [7, 4]
    results = {}
    for step in range(2):
        xs = [samples(sizes, seed=2 * step + k)[rank].requires_grad_() for k in range(2)]
        ys = []
        with clock(step):
            for x in xs:
                set_rows_per_image([3, sizes[rank] - 3])
                ys.append(repeated(head, x) if where == "head" else head(x))
            sum((y * y.detach().cos()).sum() for y in ys).backward()
        results |= {f"y{step}{k}": y.detach() for k, y in enumerate(ys)}
        results |= {f"grad_x{step}{k}": x.grad for k, x in enumerate(xs)}
    gradients = {f"gradient of {name}": p.grad for name, p in head.named_parameters()}
    return results | gradients | dict(head.named_buffers())


def _compare(rank: int, world_size: int, partition: str, renorm: bool) -> None:
    expected = _train("nowhere", False, rank, partition, renorm)
    for where in ("layer", "part", "head"):
        for reentrant in (True, False):
            assert_close(_train(where, reentrant, rank, partition, renorm), expected, 1e-6)
    assert int(expected["blocks.0.1.num_batches_tracked"]) == 4


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("partition", ["worker", "ghost", "image", "shuffle"])
def test_checkpointing_changes_nothing(partition: str, renorm: bool) -> None:
    _compare(0, 1, partition, renorm)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("partition", ["world", "shuffle"])
@pytest.mark.timeout(120)
def test_checkpointing_changes_nothing_over_workers(partition: str, renorm: bool) -> None:
    run_workers(_compare, 2, partition, renorm)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["first call only", "unused call", "nested", "same input"])
@pytest.mark.parametrize(("partition", "renorm"), [("shuffle", False), ("ghost", True)])
def test_a_repeated_forward_is_known_by_its_input(
    partition: str, renorm: bool, where: str, reentrant: bool
) -> None:
    set_clock(lambda: 7)

    def repeated(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        head = Head(partition, renorm)
        head.checkpoint_block = repeated if checkpointed and where == "nested" else None
        seeds = (0, 0) if where == "same input" else (0, 1)
        xs = [samples([7], seed)[0].requires_grad_() for seed in seeds]
        first = repeated if checkpointed else nn.Module.__call__
        second = nn.Module.__call__ if where == "first call only" else first
        ys = [first(head, xs[0]), second(head, xs[1])]
        losses = [(y * y.detach().cos()).sum() for y in ys]
        (losses[0] if where == "unused call" else sum(losses)).backward()
        grads = {name: p.grad for name, p in head.named_parameters()}
        return grads | {"x": xs[0].grad} | dict(head.named_buffers())

    assert_close(gradients(True), gradients(False), 1e-6)


@pytest.mark.parametrize("clock", [7, None])
def test_recomputation_after_the_next_step_has_begun(clock: int | None) -> None:
    head = Head()
    set_clock(lambda: clock)
    y = checkpoint(head, samples([7])[0].requires_grad_(), use_reentrant=False)
    set_clock(lambda: 8)
    with pytest.raises(RuntimeError, match=r"head.norm0 .*Run the backward of a step before the"):
        y.sum().backward()


def test_layers_share_a_call_and_calls_and_names_differ() -> None:
    head, other = Head(), Head()
    other.scope.rename("other")
    seen: list[list[int]] = []
    for module in (head, other):
        for norm in module.norms:
            norm.register_forward_hook(
                lambda layer, args, y: seen.append(layer.scope._open.value.ids.tolist())
            )
    x = samples([16])[0]
    set_clock(lambda: 7)
    head(x)
    head(x)
    other(x)
    set_clock(lambda: 8)
    head(x)
    firsts, seconds = seen[::2], seen[1::2]
    assert firsts == seconds
    assert all(firsts[i] != firsts[j] for i in range(4) for j in range(i))


def test_a_layer_called_outside_its_module() -> None:
    head = Head()
    x = samples([7])[0]
    with pytest.raises(
        RuntimeError, match=r"head.norm1 was called in training outside a forward of head"
    ):
        head.norms[1](x)
    with pytest.raises(RuntimeError, match="size of tensor"):
        head(x[:, :2] + x[:, :, :3])
    with pytest.raises(RuntimeError, match="outside a forward of head"):
        head.norms[1](x)
    head.eval()
    assert head.norms[1](x).shape == x.shape


def test_rows_that_differ_within_a_call() -> None:
    head = Head()
    head.checkpoint_block = lambda block, x: block(x[1:])
    message = r"head.norm1 has 5 rows, and head or its layers before it 6: .* by names of their own"
    with pytest.raises(RuntimeError, match=message):
        head(samples([7])[0])


@pytest.mark.parametrize("partition", ["worker", "world"])
def test_partitions_of_whole_batches_share_nothing(partition: str) -> None:
    head = Head(partition)
    assert head.norms[1](samples([7])[0]).shape == (7, CHANNELS, 4, 5)


def _copies(rank: int, world_size: int) -> None:
    head = Head()
    x = samples([5, 2])[rank]
    with clock(None):
        head(x)
        for clone in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert clone.norms[0].scope is clone.norms[1].scope is clone.scope is not head.scope
            original = copy.deepcopy(head)
            # The same groups follow, from a scope of the copy's own.
            assert torch.equal(clone(x), original(x))
            with pytest.raises(RuntimeError, match="outside a forward of head"):
                clone.norms[0](x)
            clone.scope.detach()
            clone.norms[0](x)
        head(x)


@pytest.mark.timeout(60)
def test_copies_have_a_scope_of_their_own_and_stay_in_step() -> None:
    run_workers(_copies, 2)


def test_to_plain_batch_norm_removes_the_scope() -> None:
    head = Head()
    x = samples([7])[0]
    head(x)
    expected = head.eval()(x)
    to_plain_batch_norm(head)
    assert head.scope is None
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
    assert torch.equal(head(x), expected)
    head.train()(x)


class Parts(nn.Module):
    """One norm, called once for each part of the rows."""

    def __init__(self, sizes: list[int] | None = None) -> None:
        super().__init__()
        self.norm = set_affine(nn.BatchNorm2d(CHANNELS))
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(rows) for rows in x.split(self.sizes or [len(x)])])


IMAGES = [[4, 0, 3], [2, 5, 1]]  # rows of each image, by worker


def _in_a_loop(rank: int, world_size: int, where: str) -> dict[str, Tensor]:
    """A step of a model that loops over its images, or of a head that loops over its rows."""
    model = nn.Sequential(Parts(IMAGES[rank] if where == "0.*" else None))
    convert_norm(model, "ShuffleBN", where, options=BNOptions(shuffle_seed=3))
    x, grad = (samples([7, 8], seed)[rank].requires_grad_() for seed in (0, 1))
    calls = [x] if where == "0.*" else x.split(IMAGES[rank])
    with clock(7):
        y = torch.cat([model(rows) for rows in calls])
        y.backward(grad)
    return {"y": y.detach(), "grad_x": x.grad, "weight": model[0].norm.weight.grad}


@pytest.mark.parametrize(("where", "name"), [("0", "0"), ("0.*", "0.norm")])
@pytest.mark.timeout(60)
def test_a_loop_over_images_shuffles_each_call(where: str, name: str) -> None:
    results = run_workers(_in_a_loop, 2, where)
    xs, grads = ([samples([7, 8], seed)[r].split(IMAGES[r]) for r in (0, 1)] for seed in (0, 1))
    expected: dict[str, list[list[Tensor]]] = {"y": [[], []], "grad_x": [[], []]}
    weight = torch.zeros(CHANNELS).double()
    for k, counts in enumerate(zip(*IMAGES, strict=True)):
        ids = torch.cat(shuffled(counts, 2, seed=3, name=name, iteration=7, call=k))
        x, grad = (torch.cat([part[rank][k] for rank in (0, 1)]) for part in (xs, grads))
        step = reference_step(x, grad, ids)
        for key, by_rank in expected.items():
            for rank, rows in enumerate(step[key].split(counts)):
                by_rank[rank].append(rows.detach())
        weight += step["grad_weight"]
    for rank, result in enumerate(results):
        assert_close(result, {key: torch.cat(by_rank[rank]) for key, by_rank in expected.items()})
    assert relative_error(results[0]["weight"] + results[1]["weight"], weight) < 1e-5


@pytest.mark.parametrize("sizes", [[4, 4], [5, 3]], ids=str)
def test_a_loop_within_a_head_is_refused_with_the_pattern_that_works(sizes: list[int]) -> None:
    model = nn.Sequential(Parts(sizes))
    convert_norm(model, "ShuffleBN", "0", options=BNOptions(virtual_workers=2))
    with pytest.raises(RuntimeError, match=r'0 works on parts .* pattern "0\.\*" in place of "0"'):
        model(samples([8])[0])
