"""The package on a GPU: against float64 on the CPU, in mixed precision, compiled, over NCCL.

The device is the one that BN_DETECTION_TEST_DEVICE names, by default a GPU if there is one::

    BN_DETECTION_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py

runs on a CPU all but what means something on CUDA alone, such as Triton's kernels (whose
interpreter test_kernels.py runs).
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from reference import clock, ghosts, normalize, relative_error, shuffled, step
from test_pretend_cuda import TRAININGS
from test_pretend_cuda import train as train_by_name
from test_recalibrate import load as load_checkpoint
from test_recalibrate import run as recalibrate_checkpoint
from tiny_detectors import items, tiny_rcnn
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from training import build_trainer, make_images, train

import bn_detection
from bn_detection.cli import main
from bn_detection.heads import BNConvFCHead, BNConvUpsampleHead, BNOptions, TimmBackbone
from bn_detection.leakage import measure_leakage
from bn_detection.norm import (
    INFERENCE,
    Collectives,
    ExchangePlan,
    Groups,
    PartitionedBatchNorm2d,
    RenormSchedule,
    Scope,
    build_partition,
    exchange,
    group_statistics,
    restore,
    set_rows_per_image,
)
from bn_detection.norm.kernels import choose_kernels
from bn_detection.population import collect_statistics

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from counters import peak_of_activations

_VARIABLE = "BN_DETECTION_TEST_DEVICE"
_NAME = os.environ.get(_VARIABLE) or ("cuda" if torch.cuda.is_available() else "")
if not _NAME:
    pytest.skip(f"there is no GPU, and {_VARIABLE} names no device", allow_module_level=True)

CPU, DEVICE = torch.device("cpu"), torch.device(_NAME)
ON_CUDA = DEVICE.type == "cuda"
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="means something on CUDA alone")
every_kernel = pytest.mark.parametrize(
    "kernels", ["torch", pytest.param("triton", marks=cuda_only)]
)
every_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"]
)

SEED, ITERATION = 3, 12
SCHEDULE = RenormSchedule(r_max=1.5, d_max=0.3, warmup=0, r_steps=2, d_steps=2)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Without TF32, which rounds the inputs of products to 11 bits."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def on_cpu(tensors: Any) -> Any:
    return tree_map_only(Tensor, Tensor.cpu, tensors)


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the error over the norm: a ReLU that rounding cuts off changes it little."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {key: rms_error(actual[key].cpu(), value) for key, value in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors


# ---------------------------------------------------------------------------------------------
# A layer, against the formula
# ---------------------------------------------------------------------------------------------

#: Arguments of the partition; Batch Renormalization where the kind says so.
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "worker": ("worker", {}),
    "virtual_workers": ("worker", {"virtual_workers": 2}),
    "world": ("world", {}),
    "shuffle": ("shuffle", {"virtual_workers": 3}),
    "ghost": ("ghost", {"ghost_size": 5}),
    "image": ("image", {}),
    "renorm": ("worker", {}),
    "renorm_of_images": ("image", {}),
}
SHAPES = {
    "rois": (24, 64, 7, 7),
    "odd": (13, 37, 14, 14),
    "map": (2, 64, 100, 152),
    "empty": (0, 5, 7, 7),
}
ALL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SAMPLES = [
    *itertools.product(["rois"], ALL),
    *itertools.product(["odd", "empty"], ALL[:3]),
    *itertools.product(["map"], (torch.float32, torch.bfloat16)),
]
#: Of outputs and input gradients; and of what is summed, over a map in float32 at least.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 5e-5),
    torch.float16: (1e-3, 5e-5),
    torch.bfloat16: (8e-3, 5e-5),
}
#: ``worker`` is torch's BatchNorm, which adds up a channel in float32, or cuDNN's.
OF_TORCH = (1e-4, 1e-2)
TRACKED = 5

every_kind = pytest.mark.parametrize("kind", KINDS)


class WorldOfSeveral(PartitionedBatchNorm2d):
    """``world`` as one worker of several computes it, whose others have no rows."""

    spans_workers = True

    def sharing(self, x: Tensor) -> tuple[Groups, Callable[[Tensor], Tensor]]:
        return Groups(None, 1), torch.clone


def images(rows: int) -> list[int]:
    """Rows of each of four images, of which the second has none."""
    return [rows // 2, 0, rows // 3, rows - rows // 2 - rows // 3]


def groups_of(kind: str, rows: int) -> Tensor:
    """The group of each row, as documented."""
    draw = {"seed": SEED, "name": "head", "iteration": ITERATION, "call": 0}
    image = torch.arange(4).repeat_interleave(torch.tensor(images(rows)))
    if kind == "shuffle":
        return shuffled([rows], 3, **draw)[0]
    if kind == "ghost":
        return ghosts(rows, 5, **draw)
    if kind == "virtual_workers":
        return image // 2
    return image if KINDS[kind][0] == "image" else torch.zeros(rows)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of another mean and scale in each channel."""
    channel = torch.arange(shape[1]).view(-1, 1, 1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * (0.5 + channel % 3) + channel % 5 - 2).to(dtype)


def initial_state(channels: int) -> dict[str, Tensor]:
    """Of a layer, as after some training."""
    return {
        "weight": torch.linspace(-1.5, 2, channels),
        "bias": torch.linspace(1, -1, channels),
        "running_mean": torch.full((channels,), 0.3),
        "running_var": torch.full((channels,), 2.0),
        "num_batches_tracked": torch.tensor(TRACKED),
    }


def build_layer(
    kind: str, channels: int, *, kernels: str = "auto", dtype: torch.dtype = torch.float32
) -> PartitionedBatchNorm2d:
    name, arguments = KINDS[kind]
    partition = build_partition(name, **arguments)
    scope = Scope(partition.checked_groups, seed=SEED, needs_counts=partition.needs_counts)
    scope.rename("head")
    cls = WorldOfSeveral if kind == "world" else PartitionedBatchNorm2d
    renorm = SCHEDULE if kind.startswith("renorm") else None
    layer = cls(channels, partition=partition, scope=scope, renorm=renorm, kernels=kernels)
    layer.load_state_dict(initial_state(channels))
    return layer.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)


@functools.cache
def formula(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a forward and backward of :func:`build_layer` gives and leaves, in float64."""
    x = values(shape, dtype).double().requires_grad_()
    state = {key: value.double() for key, value in initial_state(shape[1]).items()}
    mean, var = state["running_mean"], state["running_var"]
    parameters = [state[key].requires_grad_() for key in ("weight", "bias")]
    weight, bias = (parameter[:, None, None] for parameter in parameters)
    ids = groups_of(kind, shape[0])
    y, groups = normalize(x, ids)
    if kind.startswith("renorm"):
        r, d = (torch.zeros(shape[:2], dtype=torch.float64) for _ in range(2))
        for group, (of_mean, of_var, _) in zip(ids.unique(), groups, strict=True):
            ratio = ((of_var + 1e-5) / (var + 1e-5)).sqrt().detach()
            shift = ((of_mean - mean) / (var + 1e-5).sqrt()).detach()
            r[ids == group] = ratio.clamp(1 / SCHEDULE.r_max, SCHEDULE.r_max)
            d[ids == group] = shift.clamp(-SCHEDULE.d_max, SCHEDULE.d_max)
        y = y * r[:, :, None, None] + d[:, :, None, None]
    y = y * weight + bias
    y.backward(values(shape, dtype, seed=1).double())
    usable = [(m.detach(), (v * n / (n - 1)).detach()) for m, v, n in groups if n > 1]
    if usable:
        new_mean, new_var = (sum(of) / len(usable) for of in zip(*usable, strict=True))
        mean, var = mean.lerp(new_mean, 0.1), var.lerp(new_var, 0.1)
    return {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_weight": parameters[0].grad,
        "grad_bias": parameters[1].grad,
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": torch.tensor(TRACKED + bool(usable)),
    }


def train_layer(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    set_rows_per_image(images(len(x)))
    with clock(ITERATION):
        return step(layer, x, grad)


def assert_is_formula(
    result: dict[str, Tensor], expected: dict[str, Tensor], tolerances: tuple[float, float]
) -> None:
    errors = {key: relative_error(result[key].cpu(), value) for key, value in expected.items()}
    for key, error in errors.items():
        assert error <= tolerances[key not in ("y", "grad_x")], (key, errors)


@every_format
@every_kernel
@pytest.mark.parametrize(("shape", "dtype"), SAMPLES, ids=lambda v: str(v).removeprefix("torch."))
@every_kind
def test_partition(
    kind: str, shape: str, dtype: torch.dtype, kernels: str, memory_format: torch.memory_format
) -> None:
    shape = SHAPES[shape]
    x, grad = (
        values(shape, dtype, seed).to(DEVICE).contiguous(memory_format=memory_format)
        for seed in (0, 1)
    )
    layer = build_layer(kind, shape[1], kernels=kernels, dtype=dtype)
    result = train_layer(layer, x, grad)
    assert all(value.device.type == DEVICE.type for value in result.values())
    assert result["y"].dtype == result["grad_x"].dtype == dtype
    assert result["y"].is_contiguous(memory_format=memory_format)
    tolerances = TOLERANCES[dtype]
    if kind == "worker":
        tolerances = tuple(map(max, tolerances, OF_TORCH))
    assert_is_formula(result, formula(kind, shape, dtype), tolerances)


@every_kernel
@pytest.mark.parametrize("kind", ["world", "shuffle", "renorm"])
def test_strided_input_and_a_gradient_of_another_layout(kind: str, kernels: str) -> None:
    shape = SHAPES["odd"]
    x, grad = (values(shape, torch.float32, seed).to(DEVICE) for seed in (0, 1))
    every_second = torch.stack([x, x], 4).flatten(3)[..., ::2]
    assert every_second.stride(3) == 2
    layer = build_layer(kind, shape[1], kernels=kernels)
    result = train_layer(layer, every_second, grad.contiguous(memory_format=torch.channels_last))
    assert_is_formula(result, formula(kind, shape, torch.float32), TOLERANCES[torch.float32])
    # The gradient of a sum over each row has one value a row, and strides of 0.
    of_sums = torch.linspace(-1, 1, len(x), device=DEVICE).view(-1, 1, 1, 1).expand(shape)
    expanded, copied = (
        train_layer(build_layer(kind, shape[1], kernels=kernels), x, grad)
        for grad in (of_sums, of_sums.contiguous())
    )
    assert_is_formula(expanded, on_cpu(copied), (1e-5, 1e-5))


@every_format
@every_kernel
@pytest.mark.parametrize("shape", [(64, 5, 7, 7), (2, 5, 100, 152)], ids=str)
def test_variance_far_from_zero(
    shape: tuple[int, ...], kernels: str, memory_format: torch.memory_format
) -> None:
    x = 1e4 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for number in (1, 2):
        ids = torch.arange(len(x)) % number
        groups = Groups(ids.to(DEVICE) if number > 1 else None, number)
        on_device = x.to(DEVICE).contiguous(memory_format=memory_format)
        found = on_cpu(vars(group_statistics(on_device, groups, kernels=kernels)))
        expected = normalize(x.double(), ids)[1]
        assert relative_error(found["var"], torch.stack([v for _, v, _ in expected])) < 1e-3
        assert relative_error(found["mean"], torch.stack([m for m, _, _ in expected])) < 1e-6


@every_kind
def test_a_channel_that_overflows_moves_no_statistic_of_its_own(kind: str) -> None:
    x = values(SHAPES["rois"], torch.float16)
    expected = formula(kind, SHAPES["rois"], torch.float16)
    x[:, 1, 0, 0] = torch.inf  # in each group
    layer = build_layer(kind, x.shape[1])
    state = on_cpu(train_layer(layer, x.to(DEVICE), torch.ones_like(x, device=DEVICE)))
    others = torch.arange(x.shape[1]) != 1
    for name in ("running_mean", "running_var"):
        assert state[name][1] == initial_state(2)[name][1]
        assert relative_error(state[name][others], expected[name][others]) < 5e-5


@cuda_only
def test_auto_takes_triton() -> None:
    assert choose_kernels("auto", torch.empty(0, device=DEVICE).device).name == "triton"


# ---------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------

#: NORM and options.
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "BN": ("BN", {}),
    "BN_virtual": ("BN", {"virtual_workers": 2}),
    "SyncBN": ("SyncBN", {}),
    "ShuffleBN": ("ShuffleBN", {"virtual_workers": 2}),
    "ShuffleBN_features": ("ShuffleBN", {"shuffle_mode": "features"}),
    "GhostBN": ("GhostBN", {"ghost_size": 5}),
    "ImageBN": ("ImageBN", {}),
    "BatchRenorm": ("BatchRenorm", {"renorm": SCHEDULE, "renorm_partition": "image"}),
    "IN": ("IN", {}),
    "GN": ("GN", {}),
    "LN": ("LN", {}),
    "FrozenBN": ("FrozenBN", {}),
}
HEADS: dict[str, tuple[type[nn.Module], dict[str, Any], int]] = {
    "box": (BNConvFCHead, {"conv_dims": [32, 32], "fc_dims": [16]}, 7),
    "mask": (BNConvUpsampleHead, {"conv_dims": [32, 32, 32], "num_classes": 3}, 14),
}
ROIS = 14

every_head = pytest.mark.parametrize("kind", HEADS)
every_norm = pytest.mark.parametrize("norm", NORMS)


def build_head(kind: str, norm: str, device: torch.device = DEVICE) -> nn.Module:
    """The same weights at every call. A mask head returns logits, not losses."""
    torch.manual_seed(0)
    cls, arguments, side = HEADS[kind]
    name, options = NORMS[norm]
    head = cls(
        ShapeSpec(channels=32, height=side, width=side),
        conv_norm=name,
        bn_options=BNOptions(shuffle_seed=SEED, **options),
        **arguments,
    )
    head.forward = getattr(head, "layers", head.forward)
    return head.to(device)


def rois(kind: str, seed: int = 0) -> Tensor:
    side = HEADS[kind][2]
    return torch.randn(ROIS, 32, side, side, generator=torch.Generator().manual_seed(seed))


def train_head(
    head: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = lambda y: y.square().mean()
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    set_rows_per_image(images(len(x)))
    with clock(ITERATION):
        y = head(x)
        loss(y).backward()
    gradients = {f"{name}.grad": p.grad for name, p in head.named_parameters()}
    buffers = {name: b.clone() for name, b in head.named_buffers()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **buffers}


@every_norm
@every_head
def test_head_is_that_of_the_cpu(kind: str, norm: str) -> None:
    # In float32 rounding moves a few values across zero, where a ReLU cuts them off.
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
        on_device, expected = (
            train_head(build_head(kind, norm, device).to(dtype), rois(kind).to(device, dtype))
            for device in (DEVICE, CPU)
        )
        assert_alike(on_device, expected, tolerance)


@cuda_only
@every_norm
@every_head
def test_head_waits_for_no_gpu(kind: str, norm: str) -> None:
    head, x = build_head(kind, norm), rois(kind).to(DEVICE)
    grad = torch.ones_like(train_head(head, x)["y"])  # compiles kernels and fills the allocators
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(3):
            set_rows_per_image(images(len(x)))
            with clock(iteration):
                head(x).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "ShuffleBN", "GhostBN", "ImageBN", "BatchRenorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_with_loss_scaling(dtype: torch.dtype, norm: str) -> None:
    scale = 2.0**10
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale, enabled=dtype == torch.float16)
    head = build_head("box", norm)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)

    def loss(y: Tensor) -> Tensor:
        assert y.dtype == dtype
        return scaler.scale(y.float().square().mean())

    with torch.autocast(DEVICE.type, dtype):
        result = train_head(head, rois("box").to(DEVICE), loss)
    if scaler.is_enabled():
        result |= {key: value / scale for key, value in result.items() if key.endswith(".grad")}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in head.parameters())
    expected = train_head(build_head("box", norm, CPU), rois("box"))
    assert_alike(result, expected, 0.08 if dtype == torch.float16 else 0.15)
    before = [p.detach().clone() for p in head.parameters()]
    scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(p, b) for p, b in zip(head.parameters(), before, strict=True)]
    assert all(moved)
    if not scaler.is_enabled():
        return
    # The activations of this step are beyond float16: it is skipped, and leaves no trace.
    state = {name: value.clone() for name, value in head.state_dict().items()}
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype):
        train_head(head, 1e6 * rois("box").to(DEVICE), loss)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    for name, value in head.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, state[name]), name


def test_memory_of_shuffling_by_statistics() -> None:
    number, channels = (1024, 256) if ON_CUDA else (64, 64)
    shape = ShapeSpec(channels=channels, height=7, width=7)
    x = torch.randn(number, channels, 7, 7, device=DEVICE, requires_grad=True)
    peaks = {}
    for norm, workers in (("BN", 0), ("ShuffleBN", 8)):
        options = BNOptions(shuffle_seed=SEED, virtual_workers=workers)
        arguments = {"conv_dims": [channels] * 4, "fc_dims": [64], "conv_norm": norm}
        head = BNConvFCHead(shape, bn_options=options, **arguments).to(DEVICE)
        grad = torch.randn_like(head(x))
        peaks[norm] = peak_of_activations(
            lambda head=head, grad=grad: head(x).backward(grad), head, [x, grad]
        )
    assert peaks["ShuffleBN"] <= 1.1 * peaks["BN"]


# ---------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------

BACKEND = "inductor" if ON_CUDA else "aot_eager"


def assert_compiled_is_eager(model: nn.Module, *, fullgraph: bool) -> None:
    torch._dynamo.reset()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=fullgraph)
    for seed in (0, 1):
        x = values(SHAPES["rois"], next(model.parameters()).dtype, seed).to(DEVICE)
        results = []
        for module, called in ((model, compiled), (eager, eager)):
            set_rows_per_image(images(len(x)))
            module.zero_grad()
            mine = x.clone().requires_grad_()
            with clock(ITERATION + seed):
                y = called(mine)
            y.square().mean().backward()
            gradients = {name: p.grad for name, p in module.named_parameters()}
            results.append({"y": y, "x": mine.grad, **gradients, **dict(module.named_buffers())})
        assert_alike(results[0], on_cpu(results[1]), 1e-5)


@pytest.mark.timeout(200)
def test_compiled_plain_batch_norm_in_one_graph() -> None:
    assert_compiled_is_eager(nn.Sequential(build_layer("worker", 64), nn.Sigmoid()), fullgraph=True)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("inference", INFERENCE)
def test_compiled_inference_of_every_kind_in_one_graph(inference: str) -> None:
    # Another BN would undo the scale that a BN gives, and its gradient would be rounding alone. In
    # float64, for rounding grows from layer to layer.
    layers = [build_layer(kind, 64, dtype=torch.float64) for kind in KINDS]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Sigmoid()))).eval()
    for layer in layers:
        layer.inference = inference
    assert_compiled_is_eager(model, fullgraph=True)


@pytest.mark.timeout(200)
def test_compiled_shuffling() -> None:
    model = nn.Sequential(nn.Sigmoid(), build_layer("shuffle", 64), nn.Sigmoid())
    assert_compiled_is_eager(model, fullgraph=False)


# ---------------------------------------------------------------------------------------------
# A process group of one: NCCL, and gloo for what the host has to know
# ---------------------------------------------------------------------------------------------

GROUP_NORMS = ("SyncBN", "ShuffleBN", "ShuffleBN_features")


def heads_in_float64() -> dict[str, dict[str, Tensor]]:
    return {
        norm: on_cpu(train_head(build_head("box", norm).double(), rois("box").to(DEVICE).double()))
        for norm in GROUP_NORMS
    }


def exchanged() -> dict[str, Tensor]:
    """Rows sent to this worker, changed and sent back, and their gradient."""
    order = torch.randperm(ROIS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plan = ExchangePlan(order, [ROIS], [ROIS], Collectives("head"))
    x = rois("box").to(DEVICE).requires_grad_()
    received = exchange(x, plan)
    y = restore(received * torch.arange(ROIS, device=DEVICE).view(-1, 1, 1, 1), plan)
    y.square().sum().backward()
    return on_cpu({"order": order, "received": received.detach(), "y": y.detach(), "grad": x.grad})


def _in_a_group_of_one(folder: str) -> None:
    if ON_CUDA:
        torch.cuda.set_device(DEVICE.index or 0)
    backend, store = "nccl" if ON_CUDA else "gloo", f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, world_size=1, rank=0)
    collectives, numbers = Collectives("layer"), torch.arange(6.0, device=DEVICE).double()
    found = {
        "heads": heads_in_float64(),
        "all_reduce": [collectives.all_reduce(numbers.view(2, 3)).cpu() for _ in range(3)],
        "all_gather": collectives.all_gather([3, 2**40])(),
        "exchanged": exchanged(),
    }
    collectives.check_alike(7, "a number")
    if ON_CUDA:
        torch.cuda.synchronize()
        collectives.all_reduce(numbers)  # checks the tags of those before
    torch.save(found, f"{folder}/found.pth")
    dist.destroy_process_group()


@pytest.mark.timeout(180)
def test_process_group_of_one(tmp_path: Path) -> None:
    process = mp.get_context("spawn").Process(target=_in_a_group_of_one, args=(str(tmp_path),))
    process.start()
    process.join(150)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("the process of a group of one did not end in 150 s")
    assert process.exitcode == 0
    found = torch.load(tmp_path / "found.pth")
    for norm, expected in heads_in_float64().items():
        assert_alike(found["heads"][norm], expected, 1e-9)
    for total in found["all_reduce"]:
        assert torch.equal(total, torch.arange(6.0).double().view(2, 3))
    assert found["all_gather"] == [[3, 2**40]]
    moved, x = found["exchanged"], rois("box")
    assert torch.equal(moved["received"], x[moved["order"]])
    factors = torch.empty(ROIS)
    factors[moved["order"]] = torch.arange(float(ROIS))
    factors = factors.view(-1, 1, 1, 1)
    assert relative_error(moved["y"], x * factors) < 1e-6
    assert relative_error(moved["grad"], 2 * x * factors.square()) < 1e-6


# ---------------------------------------------------------------------------------------------
# The detector
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_device")
    make_images(folder)
    return folder


@pytest.fixture(autouse=True)
def forget_datasets(own_catalogs: None) -> None:
    pass


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["bn", "shuffle"])
def test_detector_trains_in_mixed_precision(
    data: Path, tmp_path: Path, norm: str, precision: str
) -> None:
    trainer = build_trainer(
        data,
        tmp_path,
        *("MODEL.DEVICE", str(DEVICE), "DATASETS.TEST", (), "BN.VIRTUAL_WORKERS", 2),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision),
        *("SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_FACTOR", 1.0),
        # A CPU without instructions for float16 takes seconds an iteration of the quickstart.
        *("INPUT.MIN_SIZE_TRAIN", (64,), "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
        config=norm,
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    after = train(trainer)
    for name, value in before.items():
        assert after[name].device.type == DEVICE.type
        assert torch.isfinite(after[name]).all(), name
        assert after[name].dtype == value.dtype
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    layers = {name.rpartition(".")[0] for name in before if name.endswith("running_mean")}
    assert {f"{layer}.{key}" for layer in layers for key in ("weight", "running_var")} <= moved
    assert "roi_heads.box_predictor.cls_score.weight" in moved


def _drawn_on_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.randperm`` with the numbers of the CPU on any device: then RoIs are the same."""
    return lambda n, *, device=None, **kwargs: draw(n, **kwargs).to(device)


def detectors(data: Path, tmp_path: Path) -> Iterator[tuple[Any, nn.Module, list]]:
    """On the CPU and the device: the model of a config, and images; scores differ among RoIs."""
    for name, device in (("on_the_cpu", CPU), ("on_device", DEVICE)):
        overrides = ("MODEL.DEVICE", str(device), "BN.LEAKAGE.RESAMPLES", 20)
        overrides += ("BN.LEAKAGE.IMAGES_PER_WORKER", 1)
        trainer = build_trainer(data, tmp_path / name, *overrides, config="shuffle")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, p in trainer.model.named_parameters():
                if any(part in key for part in ("cls_score", "objectness", "predictor.weight")):
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        batches = list(itertools.islice(iter(trainer._trainer.data_loader), 3))
        with mock.patch.object(torch, "randperm", _drawn_on_the_cpu(torch.randperm)):
            torch.manual_seed(0)
            yield trainer.cfg, trainer.model, batches


@pytest.mark.parametrize("rois", ["training", "inference"])
def test_population_statistics_are_those_of_the_cpu(data: Path, tmp_path: Path, rois: str) -> None:
    found, images = [], []
    for _, model, batches in detectors(data, tmp_path):
        images.append([item["file_name"] for batch in batches for item in batch])
        with EventStorage(ITERATION):
            found.append(collect_statistics(model, batches, len(batches), rois=rois))
    assert images[0] == images[1]
    on_the_cpu, on_device = found
    assert on_device.keys() == on_the_cpu.keys() and len(on_device) == 6
    for name, expected in on_the_cpu.items():
        assert on_device[name].count == expected.count, name
        for key in ("mean", "var"):
            value = getattr(on_device[name], key)
            assert relative_error(value.cpu(), getattr(expected, key)) < 1e-3, name


def test_leakage_is_that_of_the_cpu(data: Path, tmp_path: Path) -> None:
    on_the_cpu, on_device = (
        measure_leakage(cfg, model) for cfg, model, _ in detectors(data, tmp_path)
    )
    for key in ("images", "rois", "foreground_rois", "batch_norms", "batch_sizes"):
        assert getattr(on_device, key) == getattr(on_the_cpu, key)
    for mode, metrics in on_the_cpu.modes.items():
        for name, expected in metrics.items():
            tolerance = {"rel": 1e-3} if "loss" in name else {"abs": 1.0}
            value = on_device.modes[mode][name].value
            assert value == pytest.approx(expected.value, **tolerance), (mode, name)


def test_recalibration_is_that_of_the_cpu(data: Path, tmp_path: Path) -> None:
    saved = []
    for cfg, model, _ in detectors(data, tmp_path):
        folder = Path(f"{cfg.OUTPUT_DIR}_recalibrated")
        folder.mkdir()
        for split in ("train", "val"):
            (folder / split).symlink_to(data / split)
        torch.save({"model": on_cpu(model.state_dict())}, folder / "weights.pth")
        options = ["BN.POPULATION.ROIS", "inference", "MODEL.DEVICE", cfg.MODEL.DEVICE]
        for key in ("CONV_DIM", "FC_DIM"):
            options += [f"MODEL.ROI_BOX_HEAD.{key}", cfg.MODEL.ROI_BOX_HEAD[key]]
        recalibrate_checkpoint(folder, folder / "precise.pth", *options)
        saved.append(load_checkpoint(folder / "precise.pth"))
    on_the_cpu, on_device = saved
    assert on_device.keys() == on_the_cpu.keys()
    for name, expected in on_the_cpu.items():
        tolerance = 1e-3 if "running_" in name else 0
        assert relative_error(on_device[name].cpu(), expected) <= tolerance, name


def test_trials_of_a_diagnosis_are_those_of_the_cpu(data: Path, tmp_path: Path) -> None:
    """Far statistics of a box head are found, and AP with others is measured."""
    found = []
    for cfg, model, _ in detectors(data, tmp_path):
        model.roi_heads.box_head.conv1.norm.running_mean.fill_(5.0)
        folder = Path(cfg.OUTPUT_DIR)
        torch.save({"model": on_cpu(model.state_dict())}, folder / "weights.pth")
        (folder / "config.yaml").write_text(cfg.dump())
        options = ("--config-file", folder / "config.yaml", "--output-dir", folder / "diagnosis")
        weights = ("MODEL.WEIGHTS", folder / "weights.pth")
        main(["diagnose", *map(str, (*options, "--quick", *weights))])
        found.append(json.loads((folder / "diagnosis" / "diagnosis.json").read_text()))
    on_the_cpu, on_device = found
    for kind in ("findings", "notes"):
        assert [x["id"] for x in on_device[kind]] == [x["id"] for x in on_the_cpu[kind]]
    assert "BN103" in {x["id"] for kind in ("findings", "notes") for x in on_device[kind]}
    assert not on_device["left_out"]


@pytest.mark.parametrize("name", TRAININGS)
def test_every_kind_of_training_ends(name: str, data: Path, tmp_path: Path) -> None:
    """With its population statistics, frozen ending, trace, evaluation and checkpoint."""
    trainer = train_by_name(data, tmp_path, name, str(DEVICE))
    state = trainer.model.state_dict()
    assert {value.device.type for value in state.values()} == {DEVICE.type}
    assert all(torch.isfinite(value).all() for value in state.values())
    assert (Path(trainer.cfg.OUTPUT_DIR) / "model_final.pth").exists()


# ---------------------------------------------------------------------------------------------
# Detectors of any kind
# ---------------------------------------------------------------------------------------------


def of_torchvision() -> Iterator[nn.Module]:
    """The same on the CPU and the device, with the same random RoIs."""
    for device in (CPU, DEVICE):
        with mock.patch.object(torch, "randperm", _drawn_on_the_cpu(torch.randperm)):
            yield tiny_rcnn().to(device)


def test_any_detector_is_measured_as_on_the_cpu() -> None:
    on_the_cpu, on_device = (
        bn_detection.measure_leakage(model, items(), images_per_worker=2)
        for model in of_torchvision()
    )
    assert on_device.modes.keys() == on_the_cpu.modes.keys()
    for mode, metrics in on_the_cpu.modes.items():
        assert on_device.modes[mode]["box_ap"].value == pytest.approx(
            metrics["box_ap"].value, abs=1.0
        )


def test_any_detector_is_recalibrated_as_on_the_cpu() -> None:
    states = []
    for model in of_torchvision():
        bn_detection.recalibrate(model, items(labels=False))
        states.append(model.state_dict())
    assert_alike(states[1], states[0], 1e-3)
    assert all(value.device.type == DEVICE.type for value in states[1].values())


def test_any_detector_is_diagnosed_as_on_the_cpu() -> None:
    found = []
    for model in of_torchvision():
        model.roi_heads.box_head[0][1].running_mean.fill_(5.0)
        diagnosis = bn_detection.diagnose(model, items(), images_per_worker=1)
        found.append([one.id for one in (*diagnosis.findings, *diagnosis.notes)])
        assert "BN103" in found[-1] and not diagnosis.left_out
    assert found[0] == found[1]


def test_converted_detector_of_torchvision_trains() -> None:
    _, model = of_torchvision()
    options = BNOptions(virtual_workers=2)
    bn_detection.convert_norm(model, "ShuffleBN", "roi_heads.*", options=options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for number in range(2):
        images, targets = zip(*items()[2 * number : 2 * number + 2], strict=True)
        on_device = [{key: value.to(DEVICE) for key, value in t.items()} for t in targets]
        with EventStorage(number):
            sum(model([image.to(DEVICE) for image in images], on_device).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_backbone_of_timm_is_that_of_the_cpu() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = TimmBackbone(name="efficientnet_lite0", norm="FrozenBN").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(images)
        found = backbone.to(DEVICE)(images.to(DEVICE))
    assert_alike(found, expected, 1e-4)
