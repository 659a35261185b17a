"""Population statistics against those of all activations together; the same on all ranks."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_model
from distributed import run_workers
from fvcore.nn import update_bn_stats
from reference import CHANNELS, clock, relative_error, samples
from torch import Tensor, nn
from training import QUICKSTART

from bn_detection import configure_model
from bn_detection.engine import argument_parser, load_config
from bn_detection.norm import PartitionedBatchNorm2d, Scope, build_partition
from bn_detection.population import (
    PopulationStatistics,
    apply_statistics,
    collect_statistics,
    untouched,
)

SIZES = [[5, 2, 7], [3, 0, 4], [1, 6, 2], [4, 4, 1]]  # by worker and batch


def batches(workers: int) -> list[list[Tensor]]:
    return [samples(SIZES[rank], seed=rank) for rank in range(workers)]


class Repeated(nn.Module):
    """A layer that is called five times a forward, and one after it."""

    def __init__(self, partition: str = "worker") -> None:
        super().__init__()
        made = build_partition(partition)
        self.first = PartitionedBatchNorm2d(CHANNELS, partition=made)
        self.last = nn.BatchNorm2d(CHANNELS)
        self.unused = nn.BatchNorm2d(CHANNELS)
        self.calls = 0
        self.finished: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = sum(self.first(value) for value in inputs_of_first(x))
        y = self.last(y) if len(y) > 1 else y
        self.finished.append(self.calls)
        return y


def inputs_of_first(x: Tensor) -> list[Tensor]:
    return [(k + 1) * x + k for k in range(5)]


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of everything together, in float64."""
    flat = torch.cat([v.double().transpose(0, 1).flatten(1) for v in values], dim=1)
    mean = flat.mean(1)
    return mean, (flat - mean[:, None]).square().sum(1) / (flat.shape[1] - 1)


def _collect(rank: int, world_size: int, partition: str) -> dict[str, tuple[Tensor, ...]]:
    model = Repeated(partition)
    found = collect_statistics(model, batches(world_size)[rank], 3, modules=["first"])
    assert model.first.running_mean.abs().max() == 0
    first = found["first"]
    assert first.count == sum(map(sum, SIZES[:world_size])) * 20 * 5
    return first.mean, first.var, first.mean_error, first.var_error


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("partition", ["worker", "world", "shuffle"])
@pytest.mark.timeout(120)
def test_pooled_is_of_all_values_and_the_same_bits_on_all_ranks(
    partition: str, workers: int
) -> None:
    results = run_workers(_collect, workers, partition)
    values = [v for of_rank in batches(workers) for x in of_rank for v in inputs_of_first(x)]
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


def test_passes_leave_nothing_behind() -> None:
    model = Repeated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_statistics(model, batches(1)[0], 3, modules=["first"])
    assert model.finished == [1, 2, 3]
    assert found["first"].count == 5 * sum(SIZES[0]) * 20
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name
    model(samples([4])[0])
    assert int(model.first.num_batches_tracked) == 5
    assert int(model.last.num_batches_tracked) == 1


def test_an_unused_layer_keeps_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    model = Repeated()
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
    model = Repeated()
    with pytest.raises(FloatingPointError, match="first: its input has values that are not finite"):
        collect_statistics(model, [torch.full((2, CHANNELS, 2, 2), bad)], 1)


def test_without_layers_or_batches() -> None:
    with pytest.raises(ValueError, match=r"No BatchNorm layer in training mode matches \['\*'\]"):
        collect_statistics(Repeated().eval(), batches(1)[0], 3)
    with pytest.raises(ValueError, match="There is no batch"):
        collect_statistics(Repeated(), [], 3)


def test_untouched_restores_generators_buffers_and_counters() -> None:
    model = Repeated()
    state, draws = torch.get_rng_state(), []
    for _ in range(2):
        with untouched(model):
            draws.append(torch.rand(3).tolist())
            model(samples([4])[0])
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert int(model.first.num_batches_tracked) == 0


def _in_parts(rank: int, world_size: int, partition: str, estimator: str) -> list[Tensor]:
    """Eight images in batches of four, or a batch of one row after the other."""
    torch.manual_seed(0)
    xs = samples([4, 4, 4, 8])
    if partition == "worker":  # whole batches are dealt out
        mine = xs[rank::world_size]
    else:  # each batch is divided
        mine = [x.chunk(world_size)[rank] for x in xs]
    made = build_partition(partition, virtual_workers=0 if partition == "worker" else 4)
    scope = Scope(made.groups, seed=3, needs_counts=made.needs_counts)
    model = nn.Sequential(
        PartitionedBatchNorm2d(CHANNELS, partition=made, scope=scope),
        nn.Conv2d(CHANNELS, CHANNELS, 3),
        nn.ReLU(),
        PartitionedBatchNorm2d(CHANNELS, partition=made, scope=scope),
    )
    scope.attach(model)
    with clock(7):
        found = collect_statistics(model, mine, len(mine), estimator=estimator)
    return [value for name in ("0", "3") for value in (found[name].mean, found[name].var)]


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_variances"])
@pytest.mark.parametrize("partition", ["worker", "world", "shuffle"])
@pytest.mark.timeout(120)
def test_the_number_of_workers_does_not_matter(partition: str, estimator: str) -> None:
    expected = _in_parts(0, 1, partition, estimator)
    for workers in (2, 4):
        for result in run_workers(_in_parts, workers, partition, estimator):
            for value, reference in zip(result, expected, strict=True):
                assert relative_error(value, reference) < 1e-6


def detector(norm: str, *options: str) -> nn.Module:
    """The quickstart's Mask R-CNN with random weights, in training mode."""
    path = QUICKSTART / "mask_rcnn_bn.yaml"
    norms = ("MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.NORM", norm)
    cfg = load_config(
        argument_parser().parse_args(["--config-file", str(path), *norms, *map(str, options)])
    )
    torch.manual_seed(0)
    return configure_model(cfg, build_model(cfg)).train()


def images(number: int, seed: int) -> list[dict[str, object]]:
    """Without labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (number, 3, 128, 128), dtype=torch.uint8, generator=generator)
    return [{"image": image, "height": 128, "width": 128} for image in pixels]


@pytest.mark.parametrize("whole", [False, True])
def test_heads_without_layers_that_take_part_are_left_out(whole: bool) -> None:
    model = detector("BN")
    called = []
    for head in (model.roi_heads.mask_head, model.roi_heads.box_predictor):
        head.register_forward_hook(lambda head, *_: called.append(head))
    options = {"rois": "inference", "whole_forwards": whole}
    box = collect_statistics(model, [images(2, 0)], 1, modules=["*box_head*"], **options)
    assert (model.roi_heads.mask_head in called) == whole
    assert model.roi_heads.box_predictor in called
    assert model.roi_heads.mask_on is True
    called.clear()
    both = collect_statistics(model, [images(2, 0)], 1, modules=["roi_heads.*"], **options)
    assert model.roi_heads.mask_head in called
    assert torch.equal(box[BOX].mean, both[BOX].mean)


BOX, MASK = "roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn2.norm"


def _rois_of_inference(
    rank: int, world_size: int, norm: str, mode: str, empty: str
) -> dict[str, tuple[list[Tensor], PopulationStatistics]]:
    model = detector(norm, "BN.SHUFFLE.MODE", mode)
    if rank == 0:
        if empty == "proposals":
            model.proposal_generator.post_nms_topk[False] = 0
        elif empty == "detections":
            model.roi_heads.box_predictor.test_score_thresh = 1.0
    inputs: dict[str, list[Tensor]] = {BOX: [], MASK: []}
    for name, into in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, x, into=into: into.append(x[0])
        )
    modes = {name: module.training for name, module in model.named_modules()}
    mine = [images(2, 5 * rank), images(1 + rank, 5 * rank + 1)]
    found = collect_statistics(model, mine, 2, modules=["roi_heads.*"], rois="inference")
    assert {name: module.training for name, module in model.named_modules()} == modes
    return {name: (inputs[name], found[name]) for name in inputs}


@pytest.mark.parametrize(
    ("norm", "mode"),
    [
        ("BN", "statistics"),
        ("SyncBN", "statistics"),
        ("ShuffleBN", "statistics"),
        ("ShuffleBN", "features"),
        ("ImageBN", "statistics"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.timeout(120)
def test_rois_of_inference_are_those_that_the_layers_see_in_eval(
    norm: str, mode: str, workers: int
) -> None:
    for empty in ("nothing", "proposals", "detections")[: 1 if workers == 1 else 3]:
        results = run_workers(_rois_of_inference, workers, norm, mode, empty)
        for name in (BOX, MASK):
            inputs = [x for result in results for x in result[name][0]]
            mean, var = moments(inputs)
            first = results[0][name][1]
            assert first.count == sum(x.shape[0] for x in inputs) * 49 > 0
            assert relative_error(first.mean, mean) < 1e-6
            assert relative_error(first.var, var) < 1e-6
            for result in results:
                assert torch.equal(result[name][1].mean, first.mean)
                assert torch.equal(result[name][1].var, first.var)


def test_modes_are_restored_after_an_error() -> None:
    model = detector("ShuffleBN")
    with pytest.raises(KeyError):
        collect_statistics(model, [[{"no image": 0}]], 1, rois="inference")
    assert all(module.training for module in model.modules())


def _uneven(
    rank: int, world_size: int, partition: str, numbers: list[int], allow: bool
) -> tuple[str, list[Tensor]]:
    xs = samples([2, 3, 4, 5, 6])
    start = sum(numbers[:rank])
    model = nn.Sequential(PartitionedBatchNorm2d(CHANNELS, partition=partition))
    try:
        found = collect_statistics(
            model, xs[start : start + numbers[rank]], max(numbers), allow_fewer=allow
        )["0"]
    except ValueError as error:
        return str(error), []
    return "", [found.mean, found.var, torch.tensor(found.count)]


@pytest.mark.parametrize("partition", ["worker", "world", "shuffle"])
@pytest.mark.parametrize("numbers", [[3, 2], [2, 3], [2, 0]])
@pytest.mark.timeout(120)
def test_batches_that_end_early(partition: str, numbers: list[int]) -> None:
    short = 0 if numbers == [2, 3] else 1
    for message, _ in run_workers(_uneven, 2, partition, numbers, False):
        together = partition != "worker" and min(numbers) == 0
        expected = "no batch" if together else f"worker {short}'s after {min(numbers)} of"
        assert expected in message
    (message, first), (other, second) = run_workers(_uneven, 2, partition, numbers, True)
    assert message == other
    xs = samples([2, 3, 4, 5, 6])
    used = xs[: sum(numbers)]  # each worker its own
    if partition != "worker":  # which all must take part in
        most = min(numbers)
        used = xs[:most] + xs[numbers[0] : numbers[0] + most]
    if not used:
        assert "no batch" in message
        return
    mean, var = moments(used)
    assert relative_error(first[0], mean) < 1e-6
    assert relative_error(first[1], var) < 1e-6
    assert int(first[2]) == sum(len(x) for x in used) * 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_lists_that_count_their_calls_get_each_level_its_own() -> None:
    model = nn.ModuleDict({"norm": CycleBatchNormList(3, num_features=CHANNELS)})

    def forward(x: Tensor) -> None:
        for level in range(3):
            model["norm"](x * (level + 1) + level)

    model.forward = forward
    xs = samples([2, 3, 4])
    found = collect_statistics(model, xs, 3)
    for level in range(3):
        mean, var = moments([x * (level + 1) + level for x in xs])
        assert relative_error(found[f"norm.{level}"].mean, mean) < 1e-6
        assert relative_error(found[f"norm.{level}"].var, var) < 1e-6
    assert model["norm"]._pos == 0


def test_layers_that_some_passes_do_not_call_are_waited_for() -> None:
    model = Repeated()  # whose last layer is not called with one row
    xs = samples([1, 1, 5, 4])
    found = collect_statistics(model, xs, 4, modules=["first", "last"])
    assert found["last"].count == 9 * 20
    assert found["first"].count == 11 * 20 * 5


def test_groups_of_one_value_give_no_mean_of_variances(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    xs = [torch.randn(1, CHANNELS, 1, 1) for _ in range(4)]
    apply_statistics(model, collect_statistics(model, xs, 4, estimator="mean_of_variances"))
    assert model[0].running_var.tolist() == [1.0] * CHANNELS
    assert "0 saw 0 values" in caplog.text
    pooled = collect_statistics(model, xs, 4)["0"]
    assert relative_error(pooled.var, moments(xs)[1]) < 1e-6


def test_too_few_samples_are_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    collect_statistics(model, [torch.randn(2, CHANNELS, 1, 1) for _ in range(8)], 8)
    assert "0: its population statistics rest on too few samples: 16 images" in caplog.text
    caplog.clear()
    deep = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()) for _ in range(4)))
    collect_statistics(deep, [torch.randn(3, CHANNELS, 1, 1) for _ in range(8)], 8)
    (line,) = caplog.messages  # the layer that needs most
    assert "rest on too few samples" in line
    assert line.endswith("So it is with 1 more layer.")
    caplog.clear()
    collect_statistics(model, [torch.randn(2, CHANNELS, 4, 4)], 1)
    assert "0: population statistics of 32 values of one batch" in caplog.text
    caplog.clear()
    collect_statistics(model, [torch.randn(64, CHANNELS, 4, 4) for _ in range(8)], 8)
    assert caplog.text == ""


def test_the_log_says_after_how_many_images_it_stopped(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    xs = [torch.randn(4, CHANNELS, 4, 4) for _ in range(64)]
    with caplog.at_level("INFO"):
        collect_statistics(model, xs, 64, tolerance=0.09)
    assert "below the tolerance of 9.00 % after 64 images" in caplog.text
    assert "0: population statistics of 1024 values, standard error" in caplog.text
    collect_statistics(model, xs, 64, tolerance=0.001)
    assert "All 256 images do not suffice for the tolerance of 0.10 %: 0 has" in caplog.text
    # A layer that is never called does not keep the others from being precise.
    unused = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    unused.add_module("unused", nn.ModuleList([nn.BatchNorm2d(CHANNELS)]))
    unused.forward = lambda x: unused[0](x)
    assert collect_statistics(unused, xs, 64, tolerance=0.09)["0"].count == 1024
