"""Normalization of feature levels, against BatchNorm's formula on the concatenated activations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from distributed import run_workers
from fvcore.common.checkpoint import Checkpointer
from fvcore.nn import update_bn_stats
from reference import CHANNELS, assert_close, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bn_detection.norm import (
    LevelBatchNorm2d,
    LevelOptions,
    PartitionedBatchNorm2d,
    RenormSchedule,
    set_inference,
)
from bn_detection.population import (
    apply_statistics,
    average_running_statistics,
    collect_statistics,
)

COMBINATIONS = [
    LevelOptions(*choices) for choices in itertools.product(("shared", "separate"), repeat=3)
]
LEVELS = 3
EPS = 1e-5


def name(options: LevelOptions) -> str:
    return f"{options.train}-{options.population}-{options.affine}"


every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=name)


def pyramid(images: int, size: int = 8, seed: int = 0) -> list[Tensor]:
    """Levels of halving size whose means and scales differ, and differ between channels."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.arange(CHANNELS).view(-1, 1, 1)
    return [
        torch.randn(images, CHANNELS, size >> k, (size >> k) + 1, generator=generator) * (1 + k)
        + 3 * k * offset
        - seed
        for k in range(LEVELS)
    ]


def affine(options: LevelOptions) -> tuple[Tensor, Tensor]:
    """``(LEVELS, CHANNELS)`` each; one row repeated where levels share them."""
    generator = torch.Generator().manual_seed(5)
    rows = LEVELS if options.affine == "separate" else 1
    values = torch.randn(2, rows, CHANNELS, generator=generator)
    return tuple(value.expand(LEVELS, -1) for value in values)


def make(options: LevelOptions, **kwargs: Any) -> LevelBatchNorm2d:
    layer = LevelBatchNorm2d(CHANNELS, LEVELS, options, **kwargs)
    weight, bias = affine(options)
    own = (
        (layer.weights, layer.biases)
        if options.affine == "separate"
        else (layer.weight, layer.bias)
    )
    for parameter, value in zip(own, (weight, bias), strict=True):
        parameter.data.copy_(value if options.affine == "separate" else value[0])
    return layer


def step(layer: nn.Module, features: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    features = [x.detach().requires_grad_() for x in features]
    layer.zero_grad()
    outputs = layer(features)
    torch.autograd.backward(outputs, grads)
    return {
        **{f"y{k}": y.detach() for k, y in enumerate(outputs)},
        **{f"grad_x{k}": x.grad for k, x in enumerate(features)},
        **{f"grad_{key}": parameter.grad for key, parameter in layer.named_parameters()},
        **{key: value.clone() for key, value in layer.named_buffers()},
    }


def values(*parts: Tensor) -> Tensor:
    """``(C, number of values)`` of feature maps."""
    return torch.cat([x.movedim(1, 0).flatten(1) for x in parts], dim=1)


class Formula:
    """Levels normalized as *Rethinking "Batch" in BatchNorm*, Sec. 5.2, in float64.

    Every list is by level, and then by worker: a tensor ``(N, C, H, W)`` each.
    """

    def __init__(self, options: LevelOptions, momentum: float = 0.1) -> None:
        self.options, self.momentum = options, momentum
        number = LEVELS if options.population == "separate" else 1
        self.mean = [torch.zeros(CHANNELS).double() for _ in range(number)]
        self.var = [torch.ones(CHANNELS).double() for _ in range(number)]
        self.parameters = tuple(t.double().clone() for t in affine(options))

    def batches(self) -> list[list[int]]:
        """The levels of each normalization batch."""
        levels = list(range(LEVELS))
        return [levels] if self.options.train == "shared" else [[level] for level in levels]

    def normalize(
        self, features: list[list[Tensor]], mean: Tensor, var: Tensor, level: int
    ) -> list[Tensor]:
        scale, shift = (t[level][:, None, None] for t in self.parameters)
        mean, std = mean[:, None, None], (var + EPS).sqrt()[:, None, None]
        return [(x - mean) / std * scale + shift for x in features[level]]

    def train(self, features: list[list[Tensor]]) -> list[list[Tensor]]:
        outputs: list[Any] = [None] * LEVELS
        for batch in self.batches():
            joint = values(*itertools.chain(*(features[level] for level in batch)))
            mean, var = joint.mean(1), joint.var(1, unbiased=False)
            for level in batch:
                outputs[level] = self.normalize(features, mean, var, level)
        separate = self.options.population == "separate"
        for batch in [[level] for level in range(LEVELS)] if separate else self.batches():
            joint = values(*itertools.chain(*(features[level] for level in batch))).detach()
            index = batch[0] if separate else 0
            self.mean[index] = self.mean[index].lerp(joint.mean(1), self.momentum)
            self.var[index] = self.var[index].lerp(joint.var(1), self.momentum)
        return outputs

    def infer(self, features: list[list[Tensor]]) -> list[list[Tensor]]:
        index = [k if self.options.population == "separate" else 0 for k in range(LEVELS)]
        return [
            self.normalize(features, self.mean[index[k]], self.var[index[k]], k)
            for k in range(LEVELS)
        ]

    def step(self, features: list[list[Tensor]], grads: list[list[Tensor]]) -> dict[str, Any]:
        features = [[x.double().requires_grad_() for x in level] for level in features]
        for parameter in self.parameters:
            parameter.requires_grad_().grad = None
        outputs = self.train(features)
        torch.autograd.backward(
            list(itertools.chain(*outputs)), [g.double() for g in itertools.chain(*grads)]
        )
        separate = self.options.affine == "separate"
        gradients = [p.grad if separate else p.grad.sum(0) for p in self.parameters]
        names = ("grad_weights", "grad_biases") if separate else ("grad_weight", "grad_bias")
        return {
            **{f"y{k}": [y.detach() for y in outputs[k]] for k in range(LEVELS)},
            **{f"grad_x{k}": [x.grad for x in features[k]] for k in range(LEVELS)},
            **dict(zip(names, gradients, strict=True)),
            **{f"{k}.running_mean": mean for k, mean in enumerate(self.mean)},
            **{f"{k}.running_var": var for k, var in enumerate(self.var)},
        }


def gradients(features: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(x.shape, generator=generator) for x in features]


@every_combination
@pytest.mark.parametrize("partition", ["worker", "world"])
def test_training_and_inference_are_the_formula(options: LevelOptions, partition: str) -> None:
    layer, formula = make(options, partition=partition), Formula(options)
    for seed in range(3):
        features = pyramid(2, seed=seed)
        grads = gradients(features, seed)
        actual = step(layer, features, grads)
        expected = formula.step([[x] for x in features], [[g] for g in grads])
        assert_close(actual, {k: v[0] if isinstance(v, list) else v for k, v in expected.items()})
    features = pyramid(1, seed=9)
    expected = [level[0] for level in formula.infer([[x.double()] for x in features])]
    for y, y_expected in zip(layer.eval()(features), expected, strict=True):
        assert relative_error(y, y_expected) < 1e-5


def worker_step(rank: int, _: int, choices: tuple[str, ...], partition: str) -> dict[str, Tensor]:
    layer = make(LevelOptions(*choices), partition=partition)
    features = pyramid(1 + rank, 8 - 4 * rank, seed=rank)  # other images, of other sizes
    result = step(layer, features, gradients(features, rank))
    average_running_statistics(layer)
    return {**result, **dict(layer.named_buffers())}


@every_combination
@pytest.mark.timeout(60)
def test_two_workers_are_the_formula(options: LevelOptions) -> None:
    choices = (options.train, options.population, options.affine)
    features = [pyramid(1, 8, seed=0), pyramid(2, 4, seed=1)]
    grads = [gradients(x, rank) for rank, x in enumerate(features)]
    formula = Formula(options)
    by_level = [list(level) for level in zip(*features, strict=True)]
    expected = formula.step(by_level, [list(level) for level in zip(*grads, strict=True)])
    together = run_workers(worker_step, 2, choices, "world")
    for rank, actual in enumerate(together):
        mine = {k: v[rank] if isinstance(v, list) else v for k, v in expected.items()}
        shares = {k: v for k, v in mine.items() if not k.startswith(("grad_w", "grad_b"))}
        assert_close(actual, shares)
    for key in expected:
        if key.startswith(("grad_w", "grad_b")):
            assert relative_error(sum(t[key] for t in together), expected[key]) < 1e-5, key

    alone = run_workers(worker_step, 2, choices, "worker")
    averages: dict[str, list[Tensor]] = {}
    for rank, actual in enumerate(alone):
        expected = Formula(options).step([[x] for x in features[rank]], [[g] for g in grads[rank]])
        for key, value in expected.items():
            if "running" in key:
                averages.setdefault(key, []).append(value)
            else:
                value = value[0] if isinstance(value, list) else value
                assert relative_error(actual[key], value) < 1e-5, key
    for key, parts in averages.items():
        assert relative_error(alone[0][key], sum(parts) / 2) < 1e-5, key
        assert torch.equal(alone[0][key], alone[1][key])


class TwoLayers(nn.Module):
    """The second layer's input depends on how the first normalizes."""

    def __init__(self, options: LevelOptions) -> None:
        super().__init__()
        self.norm1, self.norm2 = make(options), make(options)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return self.norm2([x.relu() for x in self.norm1(features)])


@every_combination
@pytest.mark.parametrize("estimator", ["pooled", "mean_of_variances"])
def test_population_statistics_are_those_of_inference_batches(
    options: LevelOptions, estimator: str
) -> None:
    """Normalization of the collecting pass: joint where levels share their population too."""
    model = TwoLayers(options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [pyramid(images, seed=seed) for seed, images in enumerate((1, 3, 2))]
    statistics = collect_statistics(model.train(), batches, 3, estimator=estimator)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    by_level = options.population == "separate" or options.train == "separate"
    formula = Formula(
        LevelOptions("separate" if by_level else "shared", options.population, options.affine)
    )
    seen: dict[str, list[list[Tensor]]] = {}
    for batch in batches:
        features = [[x.double()] for x in batch]
        for layer in ("norm1", "norm2"):
            for levels in formula.batches():
                index = levels[0] if options.population == "separate" else 0
                group = values(*(features[level][0] for level in levels))
                seen.setdefault(f"{layer}.{index}", []).append(group)
            features = [[x.relu() for x in level] for level in formula.train(features)]
    assert statistics.keys() == seen.keys()
    for key, groups in seen.items():
        pooled = torch.cat(groups, dim=1)
        mean, var = pooled.mean(1), pooled.var(1)
        if estimator == "mean_of_variances":
            mean = torch.stack([group.mean(1) for group in groups]).mean(0)
            var = torch.stack([group.var(1) for group in groups]).mean(0)
        assert relative_error(statistics[key].mean, mean) < 1e-5, key
        assert relative_error(statistics[key].var, var) < 1e-5, key
    apply_statistics(model, statistics)
    assert relative_error(model.norm2[0].running_mean, statistics["norm2.0"].mean) < 1e-6


@pytest.mark.parametrize("affine", ["shared", "separate"])
@pytest.mark.parametrize("choice", ["shared", "separate"])
def test_fvcores_function_where_a_layer_is_called_once(choice: str, affine: str) -> None:
    """Rows 1 and 4; its hooks are on the BN layers, and see their calls."""
    options = LevelOptions(choice, choice, affine)
    batches = [pyramid(images, seed=seed) for seed, images in enumerate((1, 3, 2))]
    exact = collect_statistics(TwoLayers(options).train(), batches, 3)
    model = TwoLayers(options).train()
    update_bn_stats(model, batches, 3)
    for key, statistics in exact.items():
        layer = model.get_submodule(key)
        biased = statistics.var * (statistics.count - 1) / statistics.count
        assert relative_error(layer.running_mean, statistics.mean) < 1e-5, key
        assert relative_error(layer.running_var, biased) < 1e-5, key


@every_combination
def test_an_observer_that_agrees_changes_nothing(options: LevelOptions) -> None:
    features = pyramid(2)
    expected = step(make(options), features, gradients(features, 0))
    layer, seen = make(options), []
    for part in layer:
        part.observer = lambda statistics, spans: seen.append(statistics) or True
    assert_close(step(layer, features, gradients(features, 0)), expected, tolerance=1e-6)
    joint = (options.train, options.population) == ("shared", "shared")
    assert len(seen) == (1 if joint else LEVELS)


@every_combination
def test_inference_with_mini_batch_statistics(options: LevelOptions) -> None:
    layer = make(options).eval()
    assert len(set_inference(layer, "batch", ["*"])) == len(layer)
    before = {key: value.clone() for key, value in layer.named_buffers()}
    features = pyramid(2)
    expected = Formula(options).train([[x.double()] for x in features])
    for y, (y_expected,) in zip(layer(features), expected, strict=True):
        assert relative_error(y, y_expected) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


@every_combination
def test_frozen_levels_use_their_population(options: LevelOptions) -> None:
    layer = make(options).train()
    for part in layer:
        part.eval()
    features = pyramid(2)
    expected = Formula(options).infer([[x.double()] for x in features])
    for y, (y_expected,) in zip(layer(features), expected, strict=True):
        assert relative_error(y, y_expected) < 1e-5


@every_combination
@pytest.mark.parametrize("partition", ["worker", "world", "image"])
def test_checkpointing_moves_statistics_once(options: LevelOptions, partition: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make(options, partition=partition)
            for part in self.norm:
                part.scope.rows_are_images = True

        def forward(self, features: list[Tensor]) -> list[Tensor]:
            return list(checkpoint(lambda *xs: self.norm(list(xs)), *features, use_reentrant=False))

    features = pyramid(2)
    plain = Checkpointed()
    expected = step(plain.norm, features, gradients(features, 0))
    actual = step(Checkpointed(), features, gradients(features, 0))
    assert_close({k.replace("norm.", ""): v for k, v in actual.items()}, expected)


@pytest.mark.parametrize("train", ["shared", "separate"])
def test_images_as_groups(train: str) -> None:
    """ImageBN: with shared training all levels of an image are one group."""
    options = LevelOptions(train, "separate", "shared")
    layer = make(options, partition="image")
    for part in layer:
        part.scope.rows_are_images = True
    features = pyramid(3)
    outputs = layer(features)
    for image in range(3):
        alone = Formula(options).train([[x[image : image + 1].double()] for x in features])
        for y, (y_alone,) in zip(outputs, alone, strict=True):
            assert relative_error(y[image : image + 1], y_alone) < 1e-5


def test_a_relu_in_place_after_it() -> None:
    for options in COMBINATIONS:
        for levels in (1, LEVELS):
            layer = LevelBatchNorm2d(CHANNELS, levels, options)
            features = [x.requires_grad_() for x in pyramid(2)[:levels]]
            outputs = [nn.functional.relu(y, inplace=True) for y in layer(features)]
            sum(y.square().sum() for y in outputs).backward()
            grads = [x.grad for x in features]
            again = [x.detach().requires_grad_() for x in features]
            fresh = LevelBatchNorm2d(CHANNELS, levels, options)
            sum(y.relu().square().sum() for y in fresh(again)).backward()
            for grad, x in zip(grads, again, strict=True):
                assert relative_error(grad, x.grad) < 1e-6


@every_combination
def test_half_precision_and_no_images(options: LevelOptions) -> None:
    layer = make(options)
    outputs = layer([x.bfloat16() for x in pyramid(2)])
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    before = {key: value.clone() for key, value in layer.named_buffers()}
    outputs = layer([x[:0] for x in pyramid(2)])
    assert [y.shape for y in outputs] == [x[:0].shape for x in pyramid(2)]
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


def test_the_default_is_detectron2s_list() -> None:
    stock = CycleBatchNormList(LEVELS, num_features=CHANNELS)
    layer = LevelBatchNorm2d(CHANNELS, LEVELS)
    assert list(layer.state_dict()) == list(stock.state_dict())
    for seed in range(2):
        for y, x in zip(layer(pyramid(2, seed=seed)), pyramid(2, seed=seed), strict=True):
            assert relative_error(y, stock(x)) < 1e-6
    assert_close(layer.state_dict(), stock.state_dict(), tolerance=1e-6)


@pytest.mark.parametrize("number", [LEVELS - 1, LEVELS + 1])
def test_another_number_of_levels_is_an_error(number: int) -> None:
    for options in COMBINATIONS:
        layer = make(options)
        layer.rename("head.cls_subnet.1")
        before = {key: value.clone() for key, value in layer.named_buffers()}
        for mode in (True, False):
            features = [*pyramid(1), *pyramid(1)][:number]
            with pytest.raises(ValueError, match=rf"head\.cls_subnet\.1.*{number} .*{LEVELS} "):
                layer.train(mode)(features)
        assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


def test_a_tensor_is_not_a_list_of_levels() -> None:
    with pytest.raises(TypeError, match="list"):
        LevelBatchNorm2d(CHANNELS, LEVELS)(torch.zeros(LEVELS, CHANNELS, 2, 2))


def test_bad_choices_are_refused() -> None:
    for key in ("TRAIN", "POPULATION", "AFFINE"):
        with pytest.raises(ValueError, match=rf'BN\.LEVELS\.{key}.*"both".*"shared", "separate"'):
            LevelOptions(**{key.lower(): "both"})
    for train, population in (("shared", "separate"), ("separate", "shared")):
        with pytest.raises(ValueError, match=r"BatchRenorm.*BN\.LEVELS\.TRAIN.*POPULATION"):
            make(LevelOptions(train, population), renorm=RenormSchedule())
    make(LevelOptions("shared", "shared"), renorm=RenormSchedule())(pyramid(2))


def save(options: LevelOptions) -> tuple[LevelBatchNorm2d, dict[str, Tensor]]:
    layer = make(options)
    for seed in range(2):
        layer(pyramid(2, seed=seed))
    return layer, {f"norm.{key}": value.clone() for key, value in layer.state_dict().items()}


def load(options: LevelOptions, state: dict[str, Tensor]) -> tuple[LevelBatchNorm2d, Any]:
    """As ``Trainer`` does, through fvcore's checkpointer."""
    model = nn.ModuleDict({"norm": LevelBatchNorm2d(CHANNELS, LEVELS, options)})
    incompatible = Checkpointer(model)._load_model({"model": dict(state)})
    return model["norm"], incompatible


@every_combination
def test_checkpoint_with_shared_statistics_in_separate_ones(options: LevelOptions) -> None:
    shared = LevelOptions(options.train, "shared", options.affine)
    separate = LevelOptions(options.train, "separate", options.affine)
    layer, state = save(shared)
    loaded, incompatible = load(separate, state)
    assert not (incompatible.missing_keys or incompatible.unexpected_keys)
    features = pyramid(1, seed=7)
    for y, expected in zip(loaded.eval()(features), layer.eval()(features), strict=True):
        assert torch.equal(y, expected)
    # Each level has its own from now on.
    loaded.train()(features)
    assert not torch.equal(loaded[0].running_mean, loaded[1].running_mean)


@every_combination
def test_checkpoint_with_separate_statistics_in_shared_ones(
    options: LevelOptions, caplog: pytest.LogCaptureFixture
) -> None:
    separate = LevelOptions(options.train, "separate", options.affine)
    layer, state = save(separate)
    loaded, incompatible = load(LevelOptions(options.train, "shared", options.affine), state)
    assert not (incompatible.missing_keys or incompatible.unexpected_keys)
    # An equal mixture of as many distributions: sampled by their moments, mean +- std.
    sample = torch.stack(
        [part.running_mean + sign * part.running_var.sqrt() for part in layer for sign in (-1, 1)]
    ).double()
    assert relative_error(loaded[0].running_mean, sample.mean(0)) < 1e-6
    assert relative_error(loaded[0].running_var, sample.var(0, unbiased=False)) < 1e-6
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "norm" in record.getMessage() and "recalibrate" in record.getMessage()


@every_combination
def test_checkpoint_with_another_choice_of_affine(options: LevelOptions) -> None:
    shared = LevelOptions(options.train, options.population, "shared")
    separate = LevelOptions(options.train, options.population, "separate")
    layer, state = save(shared)
    loaded, incompatible = load(separate, state)
    assert not (incompatible.missing_keys or incompatible.unexpected_keys)
    features = pyramid(1, seed=7)
    for y, expected in zip(loaded.eval()(features), layer.eval()(features), strict=True):
        assert relative_error(y, expected) < 1e-6

    _, incompatible = load(shared, save(separate)[1])
    assert {"norm.weight", "norm.bias"} <= set(incompatible.missing_keys)
    assert {"norm.weights", "norm.biases"} <= set(incompatible.unexpected_keys)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model = nn.ModuleDict({"norm": LevelBatchNorm2d(CHANNELS, LEVELS, shared)})
        model.load_state_dict(save(separate)[1])


@every_combination
def test_checkpoint_with_the_same_choices(options: LevelOptions) -> None:
    layer, state = save(options)
    loaded, incompatible = load(options, state)
    assert not (incompatible.missing_keys or incompatible.unexpected_keys)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert all(isinstance(part, PartitionedBatchNorm2d) for part in loaded)


def test_checkpoint_with_another_number_of_levels_is_named() -> None:
    other = LevelBatchNorm2d(CHANNELS, LEVELS - 1)
    with pytest.raises(RuntimeError, match=f"{LEVELS - 1}.running_mean"):
        LevelBatchNorm2d(CHANNELS, LEVELS).load_state_dict(other.state_dict())
