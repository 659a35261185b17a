"""The layer against a float64 formula: forward, both gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
from distributed import run_workers
from torch import Tensor, nn

from bn_detection.norm import PartitionedBatchNorm2d, set_inference

CHANNELS = 3


def formula(
    groups: list[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[list[Tensor], Tensor, Tensor]:
    """BatchNorm of the union of ``groups``, in float64: outputs, mean and biased variance."""
    values = torch.cat([g.transpose(0, 1).flatten(1) for g in groups], dim=1)
    mean = values.mean(1)
    var = (values - mean[:, None]).square().mean(1)
    shape = (1, -1, 1, 1)
    outputs = [
        (g - mean.view(shape)) / (var.view(shape) + eps).sqrt() * weight.view(shape)
        + bias.view(shape)
        for g in groups
    ]
    return outputs, mean, var


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest absolute value."""
    if expected.numel() == 0:
        return 0.0 if actual.shape == expected.shape else float("inf")
    scale = expected.abs().max().clamp(min=1e-12)
    return float(((actual.double() - expected).abs().max() / scale).detach())


def samples(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shift = torch.arange(CHANNELS).view(1, -1, 1, 1) * 2.0
    return [
        (torch.randn(n, CHANNELS, 4, 5, generator=generator) * (1 + k) + shift).to(dtype)
        for k, n in enumerate(sizes)
    ]


def affine() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.5, -1.5, 2.0]), torch.tensor([0.1, 0.0, -3.0])


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    weight, bias = affine()
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return {
        "output": y.detach(),
        "grad_x": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "num_batches_tracked": layer.num_batches_tracked,
    }


def _world_worker(rank: int, world_size: int, sizes: list[int]) -> dict[str, Tensor]:
    layer = PartitionedBatchNorm2d(CHANNELS, partition="world")
    return step(layer, samples(sizes)[rank], samples([n + 1 for n in sizes])[rank][1:])


@pytest.mark.parametrize("sizes", [[4, 4], [5, 0], [0, 0], [3, 1, 2], [1, 0, 6]])
@pytest.mark.timeout(120)
def test_world_is_batch_norm_of_all_workers(sizes: list[int]) -> None:
    results = run_workers(_world_worker, len(sizes), sizes)
    xs = [x.double().requires_grad_() for x in samples(sizes)]
    grads = [g[1:].double() for g in samples([n + 1 for n in sizes])]
    weight, bias = (t.double().requires_grad_() for t in affine())
    total = sum(x.numel() for x in xs) // CHANNELS
    if total:
        outputs, mean, var = formula(xs, weight, bias)
        torch.autograd.backward(outputs, grads)
        running_mean = 0.1 * mean
        running_var = 0.9 + 0.1 * var * total / (total - 1)
    else:
        outputs, running_mean, running_var = xs, torch.zeros(CHANNELS), torch.ones(CHANNELS)
    for result, x, output in zip(results, xs, outputs, strict=True):
        assert relative_error(result["output"], output) < 1e-5
        if total:
            assert relative_error(result["grad_x"], x.grad) < 1e-5
        assert relative_error(result["running_mean"], running_mean) < 1e-5
        assert relative_error(result["running_var"], running_var) < 1e-5
        assert int(result["num_batches_tracked"]) == (1 if total else 0)
        assert torch.equal(result["running_var"], results[0]["running_var"])
    for name, parameter in (("grad_weight", weight), ("grad_bias", bias)):
        summed = sum(r[name].double() for r in results)
        expected = parameter.grad if total else torch.zeros(CHANNELS)
        assert relative_error(summed, expected) < 1e-5


@pytest.mark.parametrize("partition", ["worker", "world"])
def test_one_process_is_torch_batch_norm(partition: str) -> None:
    x, grad = samples([6])[0], samples([7])[0][1:]
    ours = step(PartitionedBatchNorm2d(CHANNELS, partition=partition), x, grad)
    theirs = step(nn.BatchNorm2d(CHANNELS), x, grad)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def _low_precision(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    layer = PartitionedBatchNorm2d(CHANNELS, partition="world")
    return step(layer, samples([6, 3], dtype)[rank], samples([7, 4], dtype)[rank][1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.timeout(60)
def test_world_in_low_precision(dtype: torch.dtype) -> None:
    results = run_workers(_low_precision, 2, dtype)
    xs = [x.to(dtype).double().requires_grad_() for x in samples([6, 3])]
    outputs, mean, _ = formula(xs, *(t.double() for t in affine()))
    torch.autograd.backward(outputs, [g[1:].double() for g in samples([7, 4], dtype)])
    for result, x, output in zip(results, xs, outputs, strict=True):
        assert result["output"].dtype == result["grad_x"].dtype == dtype
        assert relative_error(result["output"], output) < 1e-2
        assert relative_error(result["grad_x"], x.grad) < 2e-2
        assert relative_error(result["running_mean"], 0.1 * mean) < 1e-5


def _offset_variance(rank: int, world_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(64, CHANNELS, 8, 8, generator=generator) + 1e4
    layer = PartitionedBatchNorm2d(CHANNELS, partition="world", momentum=1.0)
    layer(x)
    values = x.double().transpose(0, 1).flatten(1)
    return torch.stack([layer.running_var.double(), values.mean(1), values.square().mean(1)])


@pytest.mark.timeout(60)
def test_variance_is_stable_far_from_zero() -> None:
    results = run_workers(_offset_variance, 2)
    mean, square = (sum(r[k] for r in results) / 2 for k in (1, 2))
    count = 2 * 64 * 64
    expected = (square - mean.square()) * count / (count - 1)
    assert relative_error(results[0][0], expected) < 1e-3


@pytest.mark.parametrize("inference", ["population", "batch"])
def test_inference_statistics(inference: str) -> None:
    layer = PartitionedBatchNorm2d(CHANNELS, inference=inference)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([4.0, 5.0, 6.0]))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = samples([3])[0]
    y = layer.eval()(x)
    if inference == "batch":
        expected = formula([x.double()], layer.weight.double(), layer.bias.double())[0][0]
    else:
        mean, var = (s.double().view(1, -1, 1, 1) for s in (layer.running_mean, layer.running_var))
        expected = (x.double() - mean) / (var + 1e-5).sqrt()
    assert relative_error(y, expected) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("inference", ["population", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_empty_input(training: bool, inference: str) -> None:
    layer = PartitionedBatchNorm2d(CHANNELS, inference=inference).train(training)
    x = torch.zeros(0, CHANNELS, 7, 7, requires_grad=True)
    y = layer(x)
    (y.sum() * 0).backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(CHANNELS))
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))
    assert int(layer.num_batches_tracked) == 0


def test_one_value_per_channel_normalizes_to_the_bias() -> None:
    layer = PartitionedBatchNorm2d(CHANNELS)
    layer.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    y = layer(torch.full((1, CHANNELS, 1, 1), 7.0))
    assert torch.allclose(y.flatten(), layer.bias, atol=1e-3)
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))


def test_state_dict_is_that_of_batch_norm() -> None:
    ours, theirs = PartitionedBatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    ours(samples([4])[0])
    theirs.load_state_dict(ours.state_dict())
    x = samples([5])[0]
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_set_inference_replaces_plain_batch_norm_and_keeps_its_tensors() -> None:
    model = nn.Sequential()
    model.add_module("backbone", nn.Sequential(nn.BatchNorm2d(CHANNELS)))
    model.add_module("head", nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    weight = model.head[0].weight
    model.eval()
    assert set_inference(model, "batch", ["head.*"]) == ["head.0"]
    assert model.head[0].weight is weight
    assert type(model.backbone[0]) is nn.BatchNorm2d
    x = samples([4])[0]
    expected = formula([x.double()], torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double())
    assert relative_error(model.head[0](x), expected[0][0]) < 1e-5


def test_set_inference_leaves_layers_without_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, track_running_stats=False))
    assert set_inference(model, "batch", ["*"]) == []
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("argument", ["partition", "inference"])
def test_unknown_choice_lists_the_choices(argument: str) -> None:
    with pytest.raises(ValueError, match=f'{argument} is "wrold"; it can be one of "'):
        PartitionedBatchNorm2d(CHANNELS, **{argument: "wrold"})


def test_gradcheck_in_one_process_group() -> None:
    assert run_workers(_gradcheck, 1) == [True]


def _gradcheck(rank: int, world_size: int) -> bool:
    from bn_detection.norm import world_batch_norm

    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    # The statistics' own gradient is part of the explicit backward, so x is all it depends on.
    return torch.autograd.gradcheck(
        lambda *inputs: world_batch_norm(*inputs, eps=1e-5)[0], (x, weight, bias)
    )
