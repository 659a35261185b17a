"""Population statistics against those of all activations together; the same on all ranks."""

from __future__ import annotations

import pytest
import torch
from distributed import run_workers
from fvcore.nn import update_bn_stats
from reference import CHANNELS, relative_error, samples
from torch import Tensor, nn

from bn_detection.norm import PartitionedBatchNorm2d, build_partition
from bn_detection.population import apply_statistics, collect_statistics, untouched

SIZES = [[5, 2, 7], [3, 0, 4], [1, 6, 2], [4, 4, 1]]  # by worker and batch


def batches(workers: int) -> list[list[Tensor]]:
    return [samples(SIZES[rank], seed=rank) for rank in range(workers)]


class Twice(nn.Module):
    """A layer that is called twice a forward, and one after it."""

    def __init__(self, partition: str) -> None:
        super().__init__()
        made = build_partition(partition)
        self.first = PartitionedBatchNorm2d(CHANNELS, partition=made)
        self.last = nn.BatchNorm2d(CHANNELS)
        self.unused = nn.BatchNorm2d(CHANNELS)
        self.calls = 0
        self.finished: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.first(x) + self.first(2 * x + 1)
        y = self.last(y) if len(y) > 1 else y
        self.finished.append(self.calls)
        return y


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of everything together, in float64."""
    flat = torch.cat([v.double().transpose(0, 1).flatten(1) for v in values], dim=1)
    mean = flat.mean(1)
    return mean, (flat - mean[:, None]).square().sum(1) / (flat.shape[1] - 1)


def _collect(rank: int, world_size: int, partition: str) -> dict[str, tuple[Tensor, ...]]:
    model = Twice(partition)
    found = collect_statistics(model, batches(world_size)[rank], 3, modules=["first"])
    assert model.first.running_mean.abs().max() == 0
    first = found["first"]
    assert first.count == sum(map(sum, SIZES[:world_size])) * 20 * 2
    return first.mean, first.var, first.mean_error, first.var_error


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("partition", ["worker", "world", "shuffle"])
@pytest.mark.timeout(120)
def test_pooled_is_of_all_values_and_the_same_bits_on_all_ranks(
    partition: str, workers: int
) -> None:
    results = run_workers(_collect, workers, partition)
    values = [v for of_rank in batches(workers) for x in of_rank for v in (x, 2 * x + 1)]
    mean, var = moments(values)
    assert relative_error(results[0][0], mean) < 1e-6
    assert relative_error(results[0][1], var) < 1e-6
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def _upstream_and_ours(rank: int, world_size: int) -> list[Tensor]:
    upstream, ours = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    mine = batches(world_size)[rank]
    update_bn_stats(upstream, [x for x in mine if len(x)], sum(len(x) > 0 for x in mine))
    model = nn.Sequential(ours)
    apply_statistics(model, collect_statistics(model, mine, 3))
    return [upstream.running_mean, ours.running_mean, ours.running_var]


@pytest.mark.timeout(60)
def test_ranks_agree_where_upstreams_differ() -> None:
    # fvcore issue 152, detectron2 issues 5398 and 5409.
    first, second = run_workers(_upstream_and_ours, 2)
    assert not torch.allclose(first[0], second[0], rtol=0.01)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    mean, var = moments([x for of_rank in batches(2) for x in of_rank])
    assert relative_error(first[1], mean) < 1e-6
    assert relative_error(first[2], var) < 1e-6


def test_mean_of_variances_is_that_of_the_groups() -> None:
    model = nn.Sequential(PartitionedBatchNorm2d(CHANNELS, partition=build_partition("image")))
    model[0].scope.rows_are_images = True
    xs = samples([4, 3, 0, 5])
    found = collect_statistics(model, xs, 4, estimator="mean_of_variances")["0"]
    groups = [moments([image[None]]) for x in xs for image in x]
    assert relative_error(found.mean, sum(m for m, _ in groups) / 12) < 1e-6
    assert relative_error(found.var, sum(v for _, v in groups) / 12) < 1e-6


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_variances"])
def test_standard_errors_are_the_spread_of_repeated_estimates(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        # Batches that differ in mean and scale, so values within one are not independent.
        shift, scale = torch.randn(2, 1, CHANNELS, 1, 1, generator=generator)
        return torch.randn(8, CHANNELS, 2, 2, generator=generator) * (1 + 0.2 * scale) + shift

    found = []
    for _ in range(150):
        model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
        found += (
            collect_statistics(model, (batch() for _ in range(40)), 40, estimator=estimator)["0"],
        )
    for value, error in (("mean", "mean_error"), ("var", "var_error")):
        spread = torch.stack([getattr(f, value) for f in found]).std(0)
        expected = torch.stack([getattr(f, error) for f in found]).mean(0)
        assert (expected / spread - 1).abs().max() < 0.2


def test_passes_end_after_the_last_layer_and_leave_nothing_behind() -> None:
    model = Twice("worker")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_statistics(model, batches(1)[0], 3, modules=["first"])
    assert model.finished == [1], "only the first pass goes to the end"
    assert found["first"].count == 2 * sum(SIZES[0]) * 20
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name
    model(samples([4])[0])
    assert int(model.first.num_batches_tracked) == 2
    assert int(model.last.num_batches_tracked) == 1


def test_an_unused_layer_keeps_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    model = Twice("worker")
    model.unused.running_mean.fill_(7.0)
    apply_statistics(model, collect_statistics(model, batches(1)[0], 3))
    assert model.unused.running_mean.tolist() == [7.0] * CHANNELS
    assert "unused" in caplog.text


def test_tolerance_stops_when_every_layer_is_precise_enough() -> None:
    used = []

    def endless() -> object:
        while True:
            used.append(1)
            yield torch.randn(16, CHANNELS, 4, 4)

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    found = collect_statistics(model, endless(), 10_000, tolerance=0.01)["0"]
    # 1 % of a standard deviation takes 10,000 independent values; of a variance, 20,000.
    assert found.relative_error < 0.01
    assert 20_000 / 256 / 2 < len(used) <= 256


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(bad: float) -> None:
    model = Twice("worker")
    with pytest.raises(FloatingPointError, match="first: its input has values that are not finite"):
        collect_statistics(model, [torch.full((2, CHANNELS, 2, 2), bad)], 1)


def test_without_layers_or_batches() -> None:
    with pytest.raises(ValueError, match=r"No BatchNorm layer in training mode matches \['\*'\]"):
        collect_statistics(Twice("worker").eval(), batches(1)[0], 3)
    with pytest.raises(ValueError, match="There is no batch"):
        collect_statistics(Twice("worker"), [], 3)


def test_untouched_restores_generators_buffers_and_counters() -> None:
    model = Twice("worker")
    state, draws = torch.get_rng_state(), []
    for _ in range(2):
        with untouched(model):
            draws.append(torch.rand(3).tolist())
            model(samples([4])[0])
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert int(model.first.num_batches_tracked) == 0
