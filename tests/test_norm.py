"""The layer against BatchNorm's formula: outputs, gradients, running statistics, inference."""

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
    reference_step,
    relative_error,
    samples,
    set_affine,
    shuffled,
    step,
)
from torch import Tensor, nn

from bn_detection.norm import (
    Groups,
    PartitionedBatchNorm2d,
    Scope,
    build_partition,
    group_statistics,
    grouped_batch_norm,
    partition_names,
    set_inference,
    set_rows_per_image,
    take_tensors,
)

PARTITIONS = ["worker", "world", "shuffle", "ghost", "image"]
SIZES = [[7], [1], [0], [5, 3], [6, 0], [0, 0], [1, 1], [3, 1, 2], [0, 0, 2], [2, 7, 0, 4]]
GHOST_SIZE = 3
SEED = 5


def build(partition: str, **options: object) -> PartitionedBatchNorm2d:
    made = build_partition(partition, ghost_size=GHOST_SIZE)
    scope = Scope(made.groups, seed=SEED)
    scope.rename("head")
    layer = PartitionedBatchNorm2d(CHANNELS, partition=made, scope=scope, **options)
    return set_affine(layer)


def images(rows: int) -> list[int]:
    """Rows of each of three images; the second has none."""
    return [rows - rows // 3, 0, rows // 3]


def groups_by_worker(partition: str, sizes: list[int], iteration: int = 0) -> list[Tensor]:
    if partition == "shuffle":
        return shuffled(sizes, len(sizes), seed=SEED, name="head", iteration=iteration, call=0)
    if partition == "image":
        return [torch.repeat_interleave(torch.tensor(images(n))) for n in sizes]
    if partition == "ghost":
        draw = {"seed": SEED, "name": "head", "iteration": iteration, "call": 0}
        return [ghosts(n, GHOST_SIZE, rank=rank, **draw) for rank, n in enumerate(sizes)]
    return [torch.zeros(n) for n in sizes]


def _train(rank: int, world_size: int, partition: str, sizes: list[int]) -> dict[str, Tensor]:
    set_rows_per_image(images(sizes[rank]))
    return step(build(partition), samples(sizes)[rank], samples(sizes, seed=1)[rank])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.timeout(120)
def test_training_is_the_formula(partition: str, sizes: list[int]) -> None:
    workers = len(sizes)
    args = (partition, sizes)
    results = run_workers(_train, workers, *args) if workers > 1 else [_train(0, 1, *args)]
    xs, grads, ids = samples(sizes), samples(sizes, seed=1), groups_by_worker(partition, sizes)
    if partition in ("world", "shuffle"):
        together = reference_step(torch.cat(xs), torch.cat(grads), torch.cat(ids))
        rows = {key: together[key].split(sizes) for key in ("y", "grad_x")}
        expected = [together | {key: rows[key][k] for key in rows} for k in range(workers)]
        totals = {key: together[key] for key in ("grad_weight", "grad_bias")}
        for key in ("running_mean", "running_var"):
            assert all(torch.equal(r[key], results[0][key]) for r in results), key
    else:
        expected = [reference_step(*of_worker) for of_worker in zip(xs, grads, ids, strict=True)]
        totals = {
            key: sum(reference[key] for reference in expected)
            for key in ("grad_weight", "grad_bias")
        }
    for result, reference in zip(results, expected, strict=True):
        assert_close(result, {k: v for k, v in reference.items() if k not in totals})
    assert_close({key: sum(result[key] for result in results) for key in totals}, totals)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ids", [[0, 2, 2, 0, 3], None])
def test_gradcheck(ids: list[int] | None, memory_format: torch.memory_format, renorm: bool) -> None:
    torch.manual_seed(0)
    groups = Groups(None, 1) if ids is None else Groups(torch.tensor(ids), 4)
    correction = (
        (torch.rand(groups.number, 2).double() + 0.5, torch.randn(groups.number, 2).double())
        if renorm
        else None
    )
    x = torch.randn(5, 2, 3, 2, dtype=torch.float64).to(memory_format=memory_format)
    inputs = (x, torch.randn(2).double(), torch.randn(2).double())

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = group_statistics(x, groups)
        return grouped_batch_norm(x, weight, bias, statistics, groups, 1e-5, correction=correction)

    assert torch.autograd.gradcheck(norm, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("partition", ["worker", "world"])
def test_one_process_is_torch_batch_norm(partition: str) -> None:
    ours, theirs = build(partition), set_affine(nn.BatchNorm2d(CHANNELS))
    for seed in (0, 2):
        x, grad = samples([6], seed)[0], samples([6], seed + 1)[0]
        actual, expected = step(ours, x, grad), step(theirs, x, grad)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key


def _train_in(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = [6, 3]
    x, grad = samples(sizes)[rank].to(dtype), samples(sizes, seed=1)[rank].to(dtype)
    return step(build("world"), x, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.timeout(60)
def test_half_precision_is_summed_in_float64_over_workers(dtype: torch.dtype) -> None:
    results = run_workers(_train_in, 2, dtype)
    x = torch.cat([x.to(dtype) for x in samples([6, 3])])
    grad = torch.cat([g.to(dtype) for g in samples([6, 3], seed=1)])
    expected = reference_step(x, grad, torch.zeros(9))
    rounding = torch.finfo(dtype).eps
    for key in ("y", "grad_x"):
        assert all(result[key].dtype == dtype for result in results)
        actual = torch.cat([result[key] for result in results])
        assert relative_error(actual, expected[key]) < rounding
    assert_close(results[1], {k: expected[k] for k in ("running_mean", "running_var")})


def _far_from_zero(rank: int) -> Tensor:
    return torch.randn(64, CHANNELS, 7, 7, generator=torch.Generator().manual_seed(rank)) + 1e4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("number", [1, 4])
def test_variance_is_stable_far_from_zero(number: int, memory_format: torch.memory_format) -> None:
    x = _far_from_zero(0).to(memory_format=memory_format)
    ids = torch.arange(len(x)) % number
    statistics = group_statistics(x, Groups(ids if number > 1 else None, number))
    _, expected = normalize(x.double(), ids)
    assert relative_error(statistics.var, torch.stack([var for _, var, _ in expected])) < 1e-3
    assert relative_error(statistics.mean, torch.stack([mean for mean, _, _ in expected])) < 1e-6


def _running_var_far_from_zero(rank: int, world_size: int, partition: str) -> Tensor:
    layer = build(partition, momentum=1.0)
    layer(_far_from_zero(rank))
    return layer.running_var


@pytest.mark.parametrize("partition", ["world", "shuffle"])
@pytest.mark.timeout(60)
def test_variance_is_stable_over_workers(partition: str) -> None:
    actual = run_workers(_running_var_far_from_zero, 2, partition)[1]
    x = torch.cat([_far_from_zero(rank) for rank in range(2)]).double()
    ids = torch.cat(groups_by_worker(partition, [64, 64]))
    _, groups = normalize(x, ids)
    expected = sum(var * count / (count - 1) for _, var, count in groups) / len(groups)
    assert relative_error(actual, expected) < 1e-3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("partition", ["worker", "ghost", "shuffle"])
def test_large_half_precision_values_stay_finite(
    partition: str, memory_format: torch.memory_format
) -> None:
    # Squares, and sums over a channel, are far above the largest float16, 65504.
    x = 6e4 * torch.rand(7, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(0))
    x = x.half().to(memory_format=memory_format)
    # In the memory format of x: for a contiguous gradient of channels-last float16 activations
    # torch's own CPU kernel, which `worker` uses, gives infinities.
    grad = samples([7], seed=1)[0].half().to(memory_format=memory_format)
    actual = step(build(partition), x, grad)
    expected = reference_step(x, grad, groups_by_worker(partition, [7])[0])
    assert_close(actual, {"y": expected["y"]}, 1e-3)
    # The gradient with respect to x is near 1 / std = 6e-5, float16's smallest normal number.
    assert torch.isfinite(actual["grad_x"]).all()
    assert relative_error(actual["grad_x"], expected["grad_x"]) < 2e-2
    keys = ("grad_weight", "grad_bias", "running_mean", "running_var")
    assert_close(actual, {key: expected[key] for key in keys}, 1e-4)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("inference", ["population", "batch"])
def test_inference_statistics(inference: str, partition: str) -> None:
    layer = build(partition, inference=inference)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([4.0, 5.0, 6.0]))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = samples([3])[0]
    y = layer.eval()(x)
    if inference == "batch":
        xhat, _ = normalize(x.double(), torch.zeros(3))
    else:
        mean, var = (s.double()[:, None, None] for s in (layer.running_mean, layer.running_var))
        xhat = (x.double() - mean) / (var + 1e-5).sqrt()
    weight, bias = (t.double()[:, None, None] for t in affine())
    assert relative_error(y, xhat * weight + bias) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def _infer_on_worker_0(rank: int, world_size: int) -> int:
    outputs = []
    for partition in partition_names():
        for inference in ("population", "batch"):
            layer = build(partition, inference=inference).eval()
            head = nn.Sequential(layer)
            layer.scope.attach(head)
            if rank == 0:
                outputs.append(head.eval()(samples([4])[0]))
    return len(outputs)


@pytest.mark.timeout(60)
def test_inference_calls_no_collective() -> None:
    assert set(PARTITIONS) <= set(partition_names())
    assert run_workers(_infer_on_worker_0, 2, timeout=20) == [2 * len(partition_names()), 0]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("training", [True, False])
def test_empty_input_changes_nothing(training: bool, partition: str) -> None:
    set_rows_per_image([])
    for inference in ("population", "batch"):
        layer = build(partition, inference=inference).train(training)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        result = step(layer, torch.zeros(0, CHANNELS, 7, 7), torch.zeros(0, CHANNELS, 7, 7))
        assert result["y"].shape == result["grad_x"].shape == (0, CHANNELS, 7, 7)
        assert not result["grad_weight"].any()
        assert not result["grad_bias"].any()
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("partition", PARTITIONS)
def test_one_value_a_channel_normalizes_to_the_bias(partition: str) -> None:
    set_rows_per_image([1])
    layer = build(partition)
    y = layer(torch.full((1, CHANNELS, 1, 1), 7.0))
    assert torch.allclose(y.flatten(), layer.bias, atol=1e-3)
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))
    assert int(layer.num_batches_tracked) == 0


def test_a_group_of_one_value_has_no_weight_in_the_running_statistics() -> None:
    set_rows_per_image([1, 4])
    x = samples([5], shape=(1, 1))[0]
    result = step(build("image"), x, torch.ones_like(x))
    expected = reference_step(x[1:], torch.ones_like(x[1:]), torch.zeros(4))
    keys = ("running_mean", "running_var", "num_batches_tracked")
    assert_close(result, {key: expected[key] for key in keys})


@pytest.mark.parametrize("partition", ["worker", "ghost"])
def test_without_momentum_running_statistics_are_the_average_of_steps(partition: str) -> None:
    layer = build(partition, momentum=None)
    sizes, means, variances = [6, 0, 4, 7], [], []
    for k, n in enumerate(sizes):
        x = samples([n], seed=k)[0]
        layer(x)
        if n:
            one = reference_step(x, x, groups_by_worker(partition, [n], k)[0], momentum=1.0)
            means.append(one["running_mean"])
            variances.append(one["running_var"])
    expected = {"running_mean": sum(means) / 3, "running_var": sum(variances) / 3}
    assert_close(layer.state_dict(), expected)
    assert int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize("partition", PARTITIONS)
def test_layer_without_affine(partition: str) -> None:
    set_rows_per_image(images(7))
    source = nn.BatchNorm2d(CHANNELS, affine=False)
    layer = take_tensors(build(partition), source)
    x, grad = samples([7])[0], samples([7], seed=1)[0]
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    copy = x.detach().double().requires_grad_()
    xhat, _ = normalize(copy, groups_by_worker(partition, [7])[0])
    xhat.backward(grad.double())
    assert relative_error(x.grad, copy.grad) < 1e-5
    assert relative_error(y, xhat) < 1e-5
    assert layer.state_dict().keys() == source.state_dict().keys()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_autocast_keeps_the_statistics_in_float32(partition: str) -> None:
    set_rows_per_image(images(7))
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(CHANNELS, CHANNELS, 3), build(partition)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(samples([7])[0])
        x.retain_grad()
        y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = reference_step(x, grad, groups_by_worker(partition, [7])[0])
    assert x.dtype == y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32
    actual = {"y": y, "grad_x": x.grad, "grad_weight": layer.weight.grad}
    assert_close(actual, {key: expected[key] for key in actual}, torch.finfo(torch.bfloat16).eps)
    assert_close(layer.state_dict(), {k: expected[k] for k in ("running_mean", "running_var")})
    assert conv.weight.grad.dtype == torch.float32


def test_state_dict_is_that_of_batch_norm() -> None:
    ours, theirs = build("ghost"), nn.BatchNorm2d(CHANNELS)
    ours(samples([4])[0])
    theirs.load_state_dict(ours.state_dict())
    x = samples([5])[0]
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    theirs.train()(x)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs.eval()(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("source", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_set_inference_replaces_batch_norm_and_keeps_its_tensors(
    source: type[nn.Module], affine: bool
) -> None:
    model = nn.Sequential()
    model.add_module("backbone", nn.Sequential(nn.BatchNorm2d(CHANNELS)))
    model.add_module("head", nn.Sequential(source(CHANNELS, affine=affine), nn.ReLU()))
    model.eval()
    weight, statistics = model.head[0].weight, model.head[0].running_var
    assert set_inference(model, "batch", ["head.*"]) == ["head.0"]
    assert model.head[0].weight is weight
    assert model.head[0].running_var is statistics
    assert type(model.backbone[0]) is nn.BatchNorm2d
    x = samples([4])[0]
    expected, _ = normalize(x.double(), torch.zeros(4))
    assert relative_error(model.head[0](x), expected) < 1e-5


def test_set_inference_knows_a_layer_by_all_its_names() -> None:
    model = nn.Sequential()
    layer = nn.BatchNorm2d(CHANNELS)
    for name in ("backbone", "head", "again"):
        model.add_module(name, nn.Sequential(layer))
    assert set_inference(model.eval(), "batch", ["head.*"]) == ["head.0"]
    assert model.backbone[0] is model.head[0] is model.again[0]
    x = samples([4])[0]
    expected, _ = normalize(x.double(), torch.zeros(4))
    assert relative_error(model.again(x), expected) < 1e-5
    assert set_inference(model, "population", ["again.*", "head.*"]) == ["head.0", "again.0"]
    assert torch.equal(model.backbone(x), layer.eval()(x))


def test_set_inference_leaves_layers_without_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, track_running_stats=False))
    assert set_inference(model, "batch", ["*"]) == []
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("argument", ["partition", "inference"])
def test_unknown_choice_lists_the_choices(argument: str) -> None:
    with pytest.raises(ValueError, match=f'{argument} is "wrold"; it can be one of "'):
        PartitionedBatchNorm2d(CHANNELS, **{argument: "wrold"})


@pytest.mark.parametrize("partition", ["worker", "ghost"])
def test_input_without_positions_is_refused(partition: str) -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        build(partition)(torch.zeros(4, CHANNELS))
