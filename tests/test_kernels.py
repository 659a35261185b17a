"""The passes over activations, torch's and Triton's, against their formulas in float64.

Where there is no GPU, Triton's kernels run in its interpreter (conftest.py), and are compiled for
one all the same.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import (
    CHANNELS,
    assert_close,
    normalize,
    reference_step,
    relative_error,
    samples,
    set_affine,
    step,
)
from torch import Tensor

from bn_detection.norm import (
    Groups,
    PartitionedBatchNorm2d,
    RenormSchedule,
    Scope,
    build_partition,
    group_statistics,
    kernels,
    set_rows_per_image,
)
from bn_detection.norm.kernels import (
    Kernels,
    TorchKernels,
    accumulation_dtype,
    choose_kernels,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
TRITON = pytest.param("triton", marks=has_triton)
#: A CPU's, a GPU's, and chunks of less than a row and of a few.
TORCH = {
    "fused": TorchKernels(2**19, fused=True),
    "chunks of rows": TorchKernels(2 * 3 * 4 * 5, fused=True),
    "plain": TorchKernels(2**23, fused=False),
    "plain chunks": TorchKernels(1, fused=False),
}
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)


def implementation(name: str) -> Kernels:
    return TORCH[name] if name in TORCH else choose_kernels(name, torch.device(DEVICE))


def sums_by_group(values: Tensor, ids: Tensor, number: int) -> Tensor:
    """``(N, C, H, W)`` to ``(G, C)``."""
    of_rows = values.double().sum((2, 3))
    return of_rows.new_zeros(number, values.shape[1]).index_add_(0, ids, of_rows)


def check_passes(passes: Kernels, x: Tensor, grad: Tensor, groups: Groups) -> None:
    generator = torch.Generator().manual_seed(3)
    mean, scale, shift, slope = torch.randn(
        4, groups.number, x.shape[1], dtype=accumulation_dtype(x), generator=generator
    ).to(x.device)
    ids = torch.zeros(len(x), dtype=torch.long) if groups.ids is None else groups.ids
    ids = ids.to(x.device)

    def of_rows(values: Tensor) -> Tensor:
        return values.double().expand(mean.shape)[ids][:, :, None, None]

    exact, gradient = x.double(), grad.double()
    centred = exact - of_rows(mean)
    count = sums_by_group(torch.ones_like(x), ids, groups.number)[:, :1]
    sums = [count, *(sums_by_group(t, ids, groups.number) for t in (exact, exact.square()))]
    products = [sums_by_group(t, ids, groups.number) for t in (gradient, gradient * centred)]
    # (Triton's interpreter cuts bfloat16 off, and does not round it.)
    rounding = torch.finfo(x.dtype).eps
    precision = 1e-14 if x.dtype == torch.float64 else 1e-6
    moments = passes.moments(x, groups)
    assert moments.dtype == torch.float64
    assert relative_error(moments, torch.cat(sums, 1)) < precision
    found = passes.gradient_sums(grad, x, mean, groups)
    assert found.dtype == torch.float64
    assert relative_error(found, torch.cat(products, 1)) < precision
    for added in (shift, shift[0].double()):  # by group, and a bias
        y = passes.affine(x, mean, scale, added, groups)
        assert relative_error(y, centred * of_rows(scale) + of_rows(added)) < rounding + precision
    grad_x = passes.input_gradient(grad, x, mean, scale, shift, slope, groups)
    expected = (gradient - of_rows(shift) - centred * of_rows(slope)) * of_rows(scale)
    assert relative_error(grad_x, expected) < rounding + precision
    assert y.dtype == grad_x.dtype == x.dtype
    for memory_format in (CONTIGUOUS, CHANNELS_LAST):
        if x.is_contiguous(memory_format=memory_format):
            assert y.is_contiguous(memory_format=memory_format)


#: Groups and channels whose statistics are not finite.
BROKEN = {(5, 0), (6, 1), (7, 2)}


@pytest.mark.parametrize("name", ["plain", TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_averages_are_over_groups_that_have_a_variance(name: str, dtype: torch.dtype) -> None:
    number, channels = 37, 70
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(2, 9, (number, 1), generator=generator).double()
    count[3], count[4] = 0, 1
    mean, var = torch.rand(2, number, channels, dtype=torch.float64, generator=generator)
    mean[5, 0], mean[6, 1], var[7, 2], mean[:, 3] = torch.inf, torch.nan, torch.inf, torch.nan
    running = torch.rand(2, channels, generator=generator).to(DEVICE, dtype)
    wide = torch.cat([count, mean], 1).to(DEVICE)  # both are views in a layer
    found = implementation(name).averages(wide[:, :1], wide[:, 1:], var.to(DEVICE), *running)
    for channel in range(channels):
        usable = [g for g in range(number) if g not in (3, 4) and (g, channel) not in BROKEN]
        if channel == 3:
            expected = running[:, channel].tolist()
        else:
            of_groups = [(mean[g, channel], var[g, channel], count[g, 0]) for g in usable]
            expected = [
                sum(float(m) for m, _, _ in of_groups) / len(usable),
                sum(float(v * n / (n - 1)) for _, v, n in of_groups) / len(usable),
            ]
        assert [float(t[channel]) for t in found] == pytest.approx(expected, rel=1e-6)
    assert all(t.dtype == dtype for t in found)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    return (2 * x + 1).to(DEVICE, dtype), grad.to(DEVICE, dtype)


GROUPS = {
    "one": Groups(None, 1),
    "one of ids": Groups(torch.zeros(5, dtype=torch.long, device=DEVICE), 1),
    "some empty": Groups(torch.tensor([3, 0, 3, 3, 1], device=DEVICE), 5),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@FORMATS
@DTYPES
@pytest.mark.parametrize("name", [*TORCH, TRITON])
def test_passes_are_their_formulas(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, groups: Groups
) -> None:
    x, grad = tensors((5, 3, 4, 5), dtype)
    check_passes(implementation(name), x.to(memory_format=memory_format), grad, groups)


SHAPES = {
    "RoIs of 7x7": (5, 70, 7, 7),
    "more positions than a tile": (5, 3, 41, 50),
    "one position": (5, 70, 1, 1),
    "one column": (5, 3, 6, 1),
    "one channel": (5, 1, 4, 5),
}


@FORMATS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["fused", "plain", TRITON])
def test_passes_of_any_shape(
    name: str, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    x, grad = tensors(shape, torch.float32)
    x = x.to(memory_format=memory_format)
    check_passes(implementation(name), x, grad, GROUPS["some empty"])


@pytest.mark.parametrize("name", [*TORCH, TRITON])
def test_passes_of_views(name: str) -> None:
    x, grad = tensors((5, 3, 4, 5), torch.float32)
    stretched = torch.stack([x, x], dim=-1)[..., 0]
    for view in (stretched, x.transpose(2, 3).contiguous().transpose(2, 3), x[:, :, :, 1:]):
        width = view.shape[3]
        for gradient in (grad[..., :width], torch.ones(1, device=DEVICE).expand(view.shape)):
            check_passes(implementation(name), view, gradient, GROUPS["some empty"])


@has_triton
def test_many_rows_and_parts_of_maps_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With programs for more than a row, and maps for more than a program."""
    from bn_detection.norm.kernels import triton_passes

    ids = torch.tensor([0, 2, 2, 0, 2, 2, 2, 0, 3], device=DEVICE)
    monkeypatch.setattr(triton_passes, "_PROGRAMS", 2)
    check_passes(implementation("triton"), *tensors((9, 3, 2, 2), torch.float32), Groups(ids, 4))
    monkeypatch.setattr(triton_passes, "_PROGRAMS", 64)
    monkeypatch.setattr(triton_passes, "_POSITIONS", 8)
    check_passes(implementation("triton"), *tensors((9, 3, 5, 7), torch.float32), Groups(ids, 4))


@has_triton
def test_a_row_beyond_32_bits_is_refused() -> None:
    x = torch.zeros(1, device=DEVICE).expand(1, 2**16, 2**15, 1)
    with pytest.raises(ValueError, match=r"BN\.KERNELS triton .* 2147483648; torch takes any\.$"):
        choose_kernels("triton", x.device).moments(x, GROUPS["one"])


PARTITIONS = ("worker", "shuffle", "ghost", "image", "renorm")


@pytest.mark.parametrize("name", ["torch", TRITON])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_layer_is_the_formula(partition: str, name: str) -> None:
    ids, options = {
        "worker": ([0] * 4 + [1] * 3, {"virtual_workers": 2}),
        "shuffle": (None, {"virtual_workers": 3}),
        "ghost": (None, {"ghost_size": 2}),
        "image": ([0] * 4 + [2] * 3, {}),
        "renorm": ([0] * 7, {}),
    }[partition]
    set_rows_per_image([4, 3] if partition == "worker" else [4, 0, 3])
    made = build_partition("worker" if partition == "renorm" else partition, **options)
    drawn: list[Groups] = []

    def draw(rows: object) -> Groups:
        drawn.append(made.groups(rows))
        return drawn[-1]

    renorm = RenormSchedule(warmup=1) if partition == "renorm" else None
    layer = PartitionedBatchNorm2d(
        CHANNELS, partition=made, scope=Scope(draw, seed=0), kernels=name, renorm=renorm
    )
    layer = set_affine(layer).to(DEVICE)
    x, grad = (t.to(DEVICE) for t in (samples([7])[0], samples([7], seed=1)[0]))
    actual = step(layer, x, grad)
    if drawn:
        found = drawn[0].ids.tolist()
        assert ids is None or found == ids
        ids = found
    assert_close(
        {key: value.cpu() for key, value in actual.items()},
        reference_step(x.cpu(), grad.cpu(), torch.tensor(ids)),
    )


@FORMATS
@pytest.mark.parametrize("number", [1, 4])
@has_triton
def test_variance_is_stable_far_from_zero(number: int, memory_format: torch.memory_format) -> None:
    x = torch.randn(16, CHANNELS, 7, 7, generator=torch.Generator().manual_seed(0)) + 1e4
    x = x.to(DEVICE, memory_format=memory_format)
    ids = torch.arange(len(x), device=DEVICE) % number
    groups = Groups(ids if number > 1 else None, number)
    statistics = group_statistics(x, groups, kernels="triton")
    _, expected = normalize(x.double(), ids)
    variances = torch.stack([var.flatten() for _, var, _ in expected])
    assert relative_error(statistics.var, variances) < 1e-3


def test_without_triton_torch_is_used_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses() -> Kernels:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(kernels, "_triton_kernels", refuses)
    kernels._choose.cache_clear()
    caplog.set_level(logging.WARNING)
    try:
        for _ in range(2):
            assert choose_kernels("auto", torch.device("cuda", 0)).name == "torch"
        with pytest.raises(RuntimeError, match="C compiler"):
            choose_kernels("triton", torch.device("cuda", 0))
    finally:
        kernels._choose.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "cuda:0" in line and "Triton does not work there" in line
    assert line.endswith("(RuntimeError: Failed to find C compiler.).")


def test_a_cpu_uses_torch() -> None:
    assert choose_kernels("auto", torch.device("cpu")).name == "torch"


@has_triton
@pytest.mark.timeout(120)
def test_kernels_compile_for_a_gpu() -> None:
    """To machine code of the H100 and of the T4, without one: what the interpreter accepts, but
    the compiler does not, is found here."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, script, "90", "75"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert process.returncode == 0, process.stderr
    compiled = re.findall(r"^(_\w+_kernel) sm_(\d+) (\d+) bytes$", process.stdout, re.MULTILINE)
    names = {"_sums_kernel", "_add_chunks_kernel", "_affine_kernel", "_averages_kernel"}
    assert {(name, gpu) for name, gpu, _ in compiled} == {
        (n, g) for n in names for g in ("90", "75")
    }
    assert all(int(size) > 0 for *_, size in compiled)
