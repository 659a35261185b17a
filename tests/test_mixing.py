"""Mixtures of old and new population statistics, against the closed forms of their definition."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from test_diagnose import Toy
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from bn_detection import set_inference
from bn_detection.heads import convert_norm
from bn_detection.norm import LevelBatchNorm2d, LevelOptions
from bn_detection.population import (
    PRIOR,
    OnlineStatistics,
    PopulationStatistics,
    apply_statistics,
    collect_statistics,
    mix_statistics,
    mixing_weight,
)

C = 3


class Stack(nn.Module):
    """Two layers, the second of which sees what the first makes of its statistics."""

    def __init__(self, kind: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first, self.second = kind(C), kind(C)
        generator = torch.Generator().manual_seed(1)
        for layer in (self.first, self.second):
            layer.running_mean.copy_(torch.randn(C, generator=generator))
            layer.running_var.copy_(torch.rand(C, generator=generator) + 0.5)
            with torch.no_grad():
                layer.weight.copy_(torch.rand(C, generator=generator) + 0.5)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.second(self.first(torch.stack(images)).relu())


KINDS = (nn.BatchNorm2d, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)


def stream(number: int, size: int = 1, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [3 * torch.randn(C, 4, 5, generator=generator) + 2 for _ in range(size)]
        for _ in range(number)
    ]


def flat(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1)


def normalized(x: Tensor, layer: nn.Module, mean: Tensor, var: Tensor) -> Tensor:
    """By the formula, in float64."""
    shape = (1, C, 1, 1)
    scale = layer.weight.detach().double() / (var + layer.eps).sqrt()
    return (x.double() - mean.view(shape)) * scale.view(shape) + layer.bias.detach().double().view(
        shape
    )


def source(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.running_mean.double().clone(), layer.running_var.double().clone()


def mixture(old: tuple[Tensor, Tensor], x: Tensor, weight: float, unbiased: bool) -> list[Tensor]:
    new = flat(x).mean(1), flat(x).var(1, unbiased=unbiased)
    return [(1 - weight) * a + weight * b for a, b in zip(old, new, strict=True)]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def test_the_weight_is_that_of_schneider_et_al() -> None:
    assert mixing_weight(8, 24) == 0.25
    assert mixing_weight(16) == 16 / (16 + PRIOR)
    assert mixing_weight(0, 0) == 0
    assert mixing_weight(5, 0) == 1


def test_statistics_and_their_errors_are_mixed() -> None:
    model = Stack()
    mean, var = source(model.first)
    new = PopulationStatistics(mean + 1, 2 * var, mean, var, 10)
    mixed = mix_statistics(model, {"first": new}, 0.25)["first"]
    assert close(mixed.mean, mean + 0.25)
    assert close(mixed.var, 1.25 * var)
    assert close(mixed.mean_error, 0.25 * mean)
    assert mixed.count == 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_layers_see_what_mixtures_before_them_give(kind: type[nn.Module], weight: float) -> None:
    model = Stack(kind).train()
    batches = stream(4, size=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_statistics(model, batches, 4, mixing=weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    seen = []
    for batch in batches:
        x = torch.stack(batch)
        statistics = mixture(source(model.first), x, weight, unbiased=False)
        seen.append(normalized(x, model.first, *statistics).relu())
    images = torch.stack([x for batch in batches for x in batch])
    for name, x in (("first", images), ("second", torch.cat(seen))):
        assert close(found[name].mean, flat(x).mean(1))
        assert close(found[name].var, flat(x).var(1))

    apply_statistics(model, mix_statistics(model, found, weight))
    old = before["second.running_mean"].double()
    expected = (1 - weight) * old + weight * flat(torch.cat(seen)).mean(1)
    assert close(model.second.running_mean, expected)


def test_a_weight_of_1_is_no_mixture() -> None:
    model = Stack().train()
    plain = collect_statistics(model, stream(4, size=2), 4)
    mixed = collect_statistics(model, stream(4, size=2), 4, mixing=1.0)
    for name, estimate in plain.items():
        assert close(mixed[name].mean, estimate.mean)
        assert close(mixed[name].var, estimate.var)


@pytest.mark.parametrize("kind", KINDS)
def test_online_statistics_are_those_of_all_images_so_far(kind: type[nn.Module]) -> None:
    model, images = Stack(kind).eval(), stream(5)
    old = source(model.first), source(model.second)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[list[Tensor]] = [[], []]
    with OnlineStatistics(model, prior=4) as online:
        for n, batch in enumerate(images, 1):
            x, weight = torch.stack(batch), n / (n + 4)
            for k, layer in enumerate((model.first, model.second)):
                seen[k].append(x)
                statistics = mixture(old[k], torch.cat(seen[k]), weight, unbiased=True)
                x = normalized(x, layer, *statistics)
                x = x.relu() if k == 0 else x
            assert close(model(batch), x)
            assert online.images == n
        online.reset()
        assert torch.equal(model.first.running_mean, before["first.running_mean"])
        again = model(images[0])
        assert close(
            model.first.running_mean, mixture(old[0], torch.stack(images[0]), 0.2, True)[0]
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not close(model(images[0]), again)


def test_images_are_counted_and_not_forwards() -> None:
    several, one = Stack().eval(), Stack().eval()
    images = stream(6)
    with OnlineStatistics(several), OnlineStatistics(one) as online:
        several([x for batch in images for x in batch])
        for batch in images:
            one(batch)
        assert online.images == 6
        assert close(several.first.running_mean, one.first.running_mean)


def test_layers_in_training_mode_and_others_than_chosen_are_left_alone() -> None:
    model, plain = Stack().train(), Stack().train()
    with OnlineStatistics(model):
        assert torch.equal(model(stream(1)[0]), plain(stream(1)[0]))
        assert torch.equal(model.first.running_mean, plain.first.running_mean)
    model = Stack().eval()
    with OnlineStatistics(model, ["second"]):
        model(stream(1)[0])
        assert torch.equal(model.first.running_mean, Stack().first.running_mean)
        assert not torch.equal(model.second.running_mean, Stack().second.running_mean)


def test_a_layer_without_values_keeps_its_statistics() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.norm(torch.cat(images))

    model = Head().eval()
    with OnlineStatistics(model, prior=1):
        model([torch.zeros(0, C)])
        assert model.norm.running_mean.tolist() == [0.0] * C
        rois = torch.randn(6, C)
        model([rois])
        # The image without RoIs taught nothing.
        assert close(model.norm.running_mean, rois.mean(0) / 2)


@pytest.mark.parametrize("population", ["shared", "separate"])
def test_levels_are_mixed_as_they_are_normalized(population: str) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = LevelBatchNorm2d(C, 2, LevelOptions(train="shared", population=population))

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            x = torch.stack(images)
            return self.norm([x, 2 * x + 1])

    model, batch = Head().eval(), stream(1)[0]
    x = flat(torch.stack(batch))
    with OnlineStatistics(model, prior=1):
        model(batch)
        if population == "shared":
            assert close(model.norm[0].running_mean, torch.cat([x, 2 * x + 1], 1).mean(1) / 2)
        else:
            assert close(model.norm[0].running_mean, x.mean(1) / 2)
            assert close(model.norm[1].running_mean, (2 * x + 1).mean(1) / 2)
    found = collect_statistics(model.train(), [batch], 1, mixing=0.5)
    first = torch.cat([x, 2 * x + 1], 1) if population == "shared" else x
    assert close(found["norm.0"].mean, first.mean(1))


def test_what_cannot_follow_images_is_refused() -> None:
    with pytest.raises(ValueError, match="prior is -1"):
        OnlineStatistics(Stack(), prior=-1)
    with pytest.raises(ValueError, match="No BN layer of the model matches"):
        OnlineStatistics(Stack(), ["third"])
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(C)))
    convert_norm(model, "BN", "0")
    set_inference(model, "batch", ["*"])
    with pytest.raises(ValueError, match=r"0\.0 normalizes with its mini-batch at inference"):
        OnlineStatistics(model)


def test_the_toy_of_the_diagnosis_takes_part_layer_by_layer() -> None:
    """A layer that is called for each of two levels counts an image once."""
    model = Toy().eval()
    batch = stream(1)[0]
    x = flat(torch.stack(batch))
    with OnlineStatistics(model, prior=1):
        model(batch)
        assert close(model.frozen.running_mean, x.mean(1) / 2)
        assert close(model.shared.running_mean, torch.cat([x, 3 * x], 1).mean(1) / 2)
