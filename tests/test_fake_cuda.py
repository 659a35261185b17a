"""What a GPU would be asked to do, on tensors that only claim to be on one.

Under torch's ``FakeTensorMode`` the layers run on CUDA tensors without memory, no driver needed. A
dispatch mode looks at each operator for what makes the host wait for a GPU, or what CUDA refuses.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from reference import CHANNELS, clock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bn_detection.heads import BNConvFCHead, BNConvUpsampleHead, BNOptions
from bn_detection.norm import (
    Groups,
    LevelBatchNorm2d,
    LevelOptions,
    PartitionedBatchNorm2d,
    RenormSchedule,
    Rows,
    Scope,
    build_partition,
    collectives,
    functional,
    kernels,
    set_rows_per_image,
    transfer,
)
from bn_detection.norm.kernels import TorchKernels

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

_READS = {
    aten._local_scalar_dense.default: "reads a number",
    aten.nonzero.default: "asks how many there are",
    aten.masked_select.default: "asks how many there are",
    aten.repeat_interleave.Tensor: "asks how many there are",
    aten.bincount.default: "asks for the largest",
    aten._unique2.default: "asks how many there are",
    aten.unique_dim.default: "asks how many there are",
    aten.equal.default: "reads a number",
}


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class Watch(TorchDispatchMode):
    """Collects what would make a host wait for a GPU, and calls that CUDA refuses.

    Attributes:
        problems: operator and problem, in order.
        number: of the operators with a tensor on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        problem = self._problem(func, args, kwargs)
        if problem:
            self.problems.append(f"{func}: {problem}")
        result = func(*args, **kwargs)
        self.number += any(map(_on_gpu, tree_leaves((args, kwargs, result))))
        return result

    def _problem(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        gpu, cpu = any(map(_on_gpu, tensors)), not all(map(_on_gpu, tensors))
        if func is aten._to_copy.default:
            target = kwargs.get("device")
            crosses = target is not None and (target.type == "cuda") != gpu
            if crosses and not kwargs.get("non_blocking"):
                return f"a blocking copy to {target}"
            return None
        if not gpu:
            return None
        if func is aten.copy_.default:
            blocking = not (args[2:] and args[2]) and not kwargs.get("non_blocking")
            return "a blocking copy" if cpu and blocking else None
        if func in (aten.index.Tensor, aten.index_put_.default):
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            return "asks how many there are" if masks else None
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            return None
        if func is aten.native_batch_norm_backward.default and args[5] is None:
            return "save_mean should always be defined"
        return _READS.get(func)


@pytest.fixture
def fake() -> Iterator[None]:
    """The tensors of a test are fake, and need no gradients."""
    with FakeTensorMode(), torch.no_grad():
        yield


@contextmanager
def no_problems() -> Iterator[None]:
    """Fails if there is a problem, or nothing runs on the GPU."""
    with Watch() as watch:
        yield
    assert watch.problems == []
    assert watch.number > 0


OFFENCES: dict[str, Callable[[Tensor], Any]] = {
    "a number read": lambda x: x.sum().item(),
    "a list read": lambda x: x[0, 0, 0].cpu().tolist(),
    "a tensor made of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "a copy of the CPU": lambda x: torch.arange(4).to(x.device),
    "copied into": lambda x: x[0, 0, 0].copy_(torch.zeros(x.shape[3])),
    "a mask": lambda x: x[x > 0],
    "repeats": lambda x: torch.repeat_interleave(x.new_ones(3, dtype=torch.long)),
    "a backward without saved statistics": lambda x: aten.native_batch_norm_backward(
        x, x, x[0, :, 0, 0], x[0, :, 0, 0], x[0, :, 0, 0], None, None, False, 0.0, [True] * 3
    ),
}


@pytest.mark.parametrize("offence", OFFENCES.values(), ids=OFFENCES)
@pytest.mark.usefixtures("fake")
def test_the_watch_sees(offence: Callable[[Tensor], Any]) -> None:
    x = torch.empty(4, 3, 7, 7, device=CUDA)
    with Watch() as watch:
        try:
            offence(x)
        except Exception:
            assert watch.problems  # a fake tensor has no numbers to read
    assert watch.problems


@pytest.fixture(params=["torch", "triton"])
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels; Triton's are prepared, and not launched."""
    if request.param == "triton":
        triton_passes = pytest.importorskip("bn_detection.norm.kernels.triton_passes")
        monkeypatch.setattr(triton_passes, "_launch", lambda *args, **constants: None)
        monkeypatch.setattr(kernels, "_try", lambda *args: None)
    return request.param


PARTITIONS = {
    "worker": {},
    "workers": {"virtual_workers": 2},
    "world": {},
    "shuffle": {"virtual_workers": 3},
    "ghost": {"ghost_size": 2},
    "image": {},
}


def build(name: str, made_by: str, renorm: bool) -> PartitionedBatchNorm2d:
    partition = build_partition(name.rstrip("s"), **PARTITIONS[name])
    schedule = RenormSchedule() if renorm else None
    scope = Scope(partition.checked_groups, seed=0)
    with CUDA:
        return PartitionedBatchNorm2d(
            CHANNELS, partition=partition, scope=scope, kernels=made_by, renorm=schedule
        )


def gradients(x: Tensor, groups: Groups, made_by: str, correction: Any = (None, None)) -> None:
    """The backward, as the plain function that it is: autograd's own does not run on fake CUDA."""
    statistics = functional.group_statistics(x, groups, kernels=made_by)
    invstd = (statistics.var + 1e-5).rsqrt()
    acc = functional.accumulation_dtype(x)
    of_input, of_weight, of_bias = functional._gradients(
        torch.empty_like(x),
        x,
        invstd.to(acc),
        statistics.mean.to(acc),
        invstd,
        statistics.count,
        *correction,
        groups=groups,
        all_reduce=None,
        kernels=made_by,
        parameter_dtype=torch.float32,
    )
    assert of_input.shape == x.shape and of_input.device == of_weight.device == CUDA
    assert of_weight.shape == of_bias.shape == (CHANNELS,)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [6, 0])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.usefixtures("fake")
def test_layer_waits_for_nothing(
    name: str,
    renorm: bool,
    rows: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    made_by: str,
) -> None:
    set_rows_per_image([rows - rows // 3, rows // 3])
    layer = build(name, made_by, renorm)
    x = torch.empty(rows, CHANNELS, 7, 7, device=CUDA, dtype=dtype, memory_format=memory_format)
    with clock(3), no_problems():
        y = layer(x)
        assert y.shape == x.shape and y.dtype == dtype and y.device == CUDA
        for inference in ("population", "batch"):
            layer.inference = inference
            assert layer.eval()(x).device == CUDA
        if layer.partition.is_whole_batch:
            groups = Groups(None, 1)
        else:
            groups = layer.partition.groups(Rows(x, layer.scope, 3, 0))
        made = torch.empty(2, groups.number, CHANNELS, dtype=torch.float64, device=CUDA)
        gradients(x, groups, made_by, tuple(made) if renorm else (None, None))


@pytest.mark.usefixtures("fake")
def test_passes_of_a_cpu_keep_the_contract_of_cuda() -> None:
    passes = TorchKernels(2**19, fused=True)
    x = torch.empty(6, CHANNELS, 7, 7, device=CUDA)
    for groups in (Groups(None, 1), Groups(torch.empty(6, dtype=torch.long, device=CUDA), 2)):
        values = torch.empty(groups.number, CHANNELS, device=CUDA)
        with no_problems():
            sums = passes.moments(x, groups)
            passes.affine(x, values, values, values[0], groups)
            passes.gradient_sums(x, x, values, groups)
            passes.input_gradient(x, x, values, values, values, values, groups)
            count, mean, var = sums.split([1, CHANNELS, CHANNELS], dim=1)
            passes.averages(count, mean, var, values[0], values[0])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", ["shared", "separate"])
@pytest.mark.parametrize("population", ["shared", "separate"])
@pytest.mark.usefixtures("fake")
def test_levels_wait_for_nothing(
    train: str, population: str, momentum: float | None, made_by: str
) -> None:
    with CUDA:
        options = LevelOptions(train, population)
        layer = LevelBatchNorm2d(CHANNELS, 2, options, momentum=momentum, kernels=made_by)
    levels = [torch.empty(2, CHANNELS, side, side, device=CUDA) for side in (8, 4)]
    with no_problems():
        assert [y.shape for y in layer(levels)] == [x.shape for x in levels]


NORMS = ("BN", "SyncBN", "ShuffleBN", "GhostBN", "ImageBN", "BatchRenorm", "IN", "GN", "LN")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head", ["box", "mask"])
@pytest.mark.usefixtures("fake")
def test_heads_wait_for_nothing(head: str, norm: str, made_by: str) -> None:
    set_rows_per_image([4, 2])
    shape = ShapeSpec(channels=32, height=7, width=7)
    bn = BNOptions(shuffle_seed=0, virtual_workers=2, ghost_size=2, kernels=made_by)
    options = {"conv_norm": norm, "bn_options": bn}
    with CUDA:
        model = (
            BNConvFCHead(shape, conv_dims=[32], fc_dims=[8], **options)
            if head == "box"
            else MaskLayers(shape, num_classes=2, conv_dims=[32, 32], **options)
        )
    x = torch.empty(6, 32, 7, 7, device=CUDA)
    with clock(3), no_problems():
        y = model(x)
    assert y.device == CUDA and len(y) == 6


class MaskLayers(BNConvUpsampleHead):
    """A mask head without its losses."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Done:
    """A collective that is over."""

    def wait(self) -> None:
        pass


class Event:
    """A CUDA event that is over when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def synchronize(self) -> None:
        assert self.asked > 2, "the host waits for a GPU"


@pytest.mark.parametrize("difference", [0.0, 1.0])
@pytest.mark.usefixtures("fake")
def test_collectives_wait_for_nothing(difference: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is out of step is noticed when its number has arrived."""
    messages = []
    calls = itertools.count(1)

    def all_reduce(message: Tensor, group: Any, async_op: bool) -> Done:
        messages.append((message.shape, message.device, group, async_op))
        return Done()

    def item(arriving: transfer.Arriving) -> float:
        arriving._event.synchronize()
        return zlib.crc32(f"head.norm0/{next(calls)}".encode()) + difference

    monkeypatch.setattr(collectives.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(transfer.Arriving, "item", item)
    of_layer = collectives.Collectives("head.norm0")
    expected = (
        pytest.raises(RuntimeError, match=r"head\.norm0: worker 0 of 1 exchanges statistics")
        if difference
        else nullcontext()
    )
    values = torch.empty(2, 5, device=CUDA, dtype=torch.float64)
    with no_problems(), expected:
        for _ in range(8):
            assert of_layer.all_reduce(values).shape == (2, 5)
    assert messages == [((11,), CUDA, None, True)] * (3 if difference else 8)
    assert len(of_layer._unchecked) < 8
