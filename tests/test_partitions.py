"""Which rows share a normalization batch, for any counts, groups, dtypes and memory formats."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from distributed import run_workers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CHANNELS, affine, normalize, reference_step, samples, set_affine, step
from torch import Tensor

from bn_detection.norm import (
    Groups,
    Partition,
    PartitionedBatchNorm2d,
    Rows,
    Scope,
    build_partition,
    partition,
    register_partition,
    set_rows_per_image,
    shuffled_groups,
)

any_example = settings(max_examples=150, deadline=None, derandomize=True, database=None)


class GivenGroups(Partition):
    def __init__(self, groups: Groups) -> None:
        self.given = groups

    def groups(self, rows: Rows) -> Groups:
        return self.given


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Groups]:
    """Activations, the gradient of the output, and groups of which some may be empty."""
    rows, height, width = (draw(st.integers(low, 6)) for low in (0, 1, 1))
    number = draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(0, number - 1), min_size=rows, max_size=rows))
    seed = draw(st.integers(0, 999))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    x, grad = (samples([rows], seed + k, (height, width))[0].to(dtype) for k in range(2))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, x], dim=-1)[..., 0].transpose(2, 3).contiguous().transpose(2, 3)
    one_group = number == 1 and draw(st.booleans())
    return x, grad, Groups(None if one_group else torch.tensor(ids, dtype=torch.long), number)


@any_example
@given(inputs())
def test_any_groups_are_normalized_by_the_formula(example: tuple[Tensor, Tensor, Groups]) -> None:
    x, grad, groups = example
    layer = PartitionedBatchNorm2d(CHANNELS, partition=GivenGroups(groups))
    layer = set_affine(layer).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    ids = torch.zeros(len(x)) if groups.ids is None else groups.ids
    actual, expected = step(layer, x, grad), reference_step(x, grad, ids)
    assert int(actual.pop("num_batches_tracked")) == int(expected.pop("num_batches_tracked"))
    assert actual["y"].dtype == actual["grad_x"].dtype == x.dtype
    if len(x) == 0:
        assert actual["y"].shape == actual["grad_x"].shape == x.shape
        return
    # The rounding of x - mean is multiplied by 1 / std, so the errors are measured against that.
    xhat, statistics = normalize(x.double(), ids)
    means, variances = (torch.stack(t) for t in list(zip(*statistics, strict=True))[:2])
    invstd = (variances + 1e-5).rsqrt()
    condition = float(1 + (means.abs() * invstd).max())
    gain = float((affine()[0].abs() * invstd).max())
    grad = grad.double()
    size = {
        "y": expected["y"].abs().max(),
        "grad_x": gain * grad.abs().max(),
        "grad_weight": (grad * xhat).abs().sum((0, 2, 3)).max() + grad.abs().sum(),
        "grad_bias": grad.abs().sum((0, 2, 3)).max(),
        "running_mean": x.abs().max(),
        "running_var": expected["running_var"].max(),
    }
    precision = torch.finfo(layer.weight.dtype).eps
    for key, value in expected.items():
        error = (actual[key].double() - value).abs().max()
        allowed = 10 * precision * condition
        if key in ("y", "grad_x"):
            allowed += torch.finfo(x.dtype).eps
        assert error <= allowed * size[key], (key, float(error / size[key]), allowed)


@any_example
@given(inputs())
def test_output_keeps_the_memory_format(example: tuple[Tensor, Tensor, Groups]) -> None:
    x, _, groups = example
    y = PartitionedBatchNorm2d(CHANNELS, partition=GivenGroups(groups)).to(
        torch.float64 if x.dtype == torch.float64 else torch.float32
    )(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.numel() and x.is_contiguous(memory_format=memory_format):
            assert y.is_contiguous(memory_format=memory_format)


@any_example
@given(rows=st.integers(0, 200), size=st.integers(2, 40))
def test_ghost_groups_have_their_size_and_one_up_to_twice(rows: int, size: int) -> None:
    groups = _groups(build_partition("ghost", ghost_size=size), rows)
    ids = groups.ids.tolist()
    counts = [ids.count(group) for group in range(groups.number)]
    assert sum(counts) == rows
    assert counts[:-1] == [size] * (groups.number - 1)
    assert counts[-1] == rows if rows < size else size <= counts[-1] < 2 * size


@any_example
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    share=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_shuffled_groups_are_balanced(counts: list[int], share: int, seed: int) -> None:
    number = share * len(counts)
    by_worker = shuffled_groups(counts, number, seed)
    assert [len(ids) for ids in by_worker] == counts
    sizes = torch.cat(by_worker).bincount(minlength=number).tolist()
    assert len(sizes) == number
    assert sum(sizes) == sum(counts)
    # A remainder is spread over the first groups; with too few rows, the last are empty.
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_every_pair_of_rows_meets_as_often_as_chance_says() -> None:
    # 2 groups of 4: another row is among the 3 others of a group, out of 7.
    draws = 4000
    together = torch.zeros(8, 8)
    for seed in range(draws):
        ids = torch.cat(shuffled_groups([5, 3], 2, seed))
        together += ids[:, None] == ids
    frequency = together[~torch.eye(8, dtype=torch.bool)] / draws
    assert (frequency - 3 / 7).abs().max() < 5 * (3 / 7 * 4 / 7 / draws) ** 0.5


def _groups(made: Partition, rows: int, **options: bool) -> Groups:
    scope = Scope(made.groups, seed=0, **options)
    scope.rename("roi_heads.box_head")
    return scope.get(torch.nn.Identity(), torch.zeros(rows, 1, 1, 1))


def test_image_groups_are_the_images_also_those_without_rows() -> None:
    set_rows_per_image([2, 0, 3])
    groups = _groups(build_partition("image"), 5)
    assert groups.ids.tolist() == [0, 0, 2, 2, 2]
    assert groups.number == 3


def test_rows_can_be_images() -> None:
    groups = _groups(build_partition("image"), 3, rows_are_images=True)
    assert groups.ids.tolist() == [0, 1, 2]
    groups = _groups(build_partition("worker", virtual_workers=2), 4, rows_are_images=True)
    assert groups.ids.tolist() == [0, 0, 1, 1]


def test_virtual_workers_have_whole_images() -> None:
    set_rows_per_image([3, 0, 1, 2])
    assert (
        _groups(build_partition("worker", virtual_workers=2), 6).ids.tolist() == [0] * 3 + [1] * 3
    )
    groups = _groups(build_partition("worker", virtual_workers=4), 6)
    assert groups.ids.tolist() == [0, 0, 0, 2, 3, 3]
    assert groups.number == 4


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "_REGISTRY", dict(partition._REGISTRY))


@pytest.mark.usefixtures("registry")
def test_the_documented_partition_of_a_user() -> None:
    code = inspect.getdoc(partition).split("::\n\n")[1].split("\n\nThe name")[0]
    exec(textwrap.dedent(code), vars(partition) | {"torch": torch})
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition="halves"))
    x, grad = (samples([5], seed)[0] for seed in range(2))
    expected = reference_step(x, grad, torch.tensor([0, 1, 0, 1, 0]))
    actual = step(layer, x, grad)
    for key, value in expected.items():
        assert torch.allclose(actual[key].double(), value.double(), rtol=1e-4, atol=1e-5), key


@pytest.mark.usefixtures("registry")
def test_a_registered_name_is_taken() -> None:
    register_partition("mine")(GivenGroups)
    for name in ("mine", "worker"):
        with pytest.raises(ValueError, match=f'partition "{name}" is registered already'):
            register_partition(name)(GivenGroups)


@pytest.mark.parametrize("size", [1, 0, -4])
def test_ghost_size_below_two(size: int) -> None:
    with pytest.raises(ValueError, match=f"BN.GHOST.SIZE {size}: a group needs at least 2 rows"):
        build_partition("ghost", ghost_size=size)


def test_images_that_virtual_workers_do_not_divide() -> None:
    set_rows_per_image([2, 2, 2])
    message = (
        "roi_heads.box_head: 3 images .* its 2 virtual workers: SOLVER.IMS_PER_BATCH must be a "
        "multiple of BN.VIRTUAL_WORKERS"
    )
    with pytest.raises(ValueError, match=message):
        _groups(build_partition("worker", virtual_workers=2), 6)


@pytest.mark.parametrize("counts", [[2, 2], []])
def test_rows_of_unknown_images(counts: list[int]) -> None:
    set_rows_per_image(counts)
    message = (
        r"roi_heads.box_head: .* 5 rows the last RoIs that were pooled are \d\. Call "
        r"bn_detection.norm.set_rows_per_image\("
    )
    with pytest.raises(ValueError, match=message):
        _groups(build_partition("image"), 5)


def _three_virtual_workers(rank: int, world_size: int, name: str) -> str:
    layer = PartitionedBatchNorm2d(CHANNELS, partition=build_partition(name, virtual_workers=3))
    with pytest.raises(ValueError) as error:
        layer(samples([4])[0])
    return str(error.value)


@pytest.mark.parametrize("name", ["worker", "shuffle"])
@pytest.mark.timeout(60)
def test_virtual_workers_that_processes_do_not_divide(name: str) -> None:
    for message in run_workers(_three_virtual_workers, 2, name):
        assert message == "BN.VIRTUAL_WORKERS 3 is not a multiple of the 2 workers that run."
