"""The trace of statistics over training, against those of the layers' inputs in float64."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import NaiveSyncBatchNorm
from distributed import run_workers
from reference import CHANNELS, relative_error, samples
from test_train_net import refused, trainer
from torch import Tensor, nn

from bn_detection import ConfigError
from bn_detection.data import make_leaky_shapes
from bn_detection.norm import PartitionedBatchNorm2d
from bn_detection.population import TraceStatistics, collect_statistics
from bn_detection.study.trace_figure import draw_trace

SIZES = [[5, 2, 0, 1], [3, 4, 6, 2]]  # by worker and iteration
LAYER = "roi_heads.box_head.conv2.norm"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    for split in ("train", "val"):
        make_leaky_shapes(folder / split, 4, seed=7, split=split)
    return folder


class Toy(TrainerBase):
    """Runs a model on given batches, in training mode."""

    def __init__(self, model: nn.Module, batches: list[Tensor], output: Path, **options: Any):
        super().__init__()
        self.model = model
        self.batches = batches
        self.trace = TraceStatistics(model, str(output), **options)
        self.register_hooks([self.trace])

    def run_step(self) -> None:
        self.model(self.batches[self.iter])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "bn_trace.jsonl").read_text().splitlines()]


def unbiased(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.SyncBatchNorm, PartitionedBatchNorm2d])
def test_batch_and_ema_are_those_of_the_inputs(layer: Any, tmp_path: Path) -> None:
    xs = samples(SIZES[1])
    Toy(nn.Sequential(layer(CHANNELS)), xs, tmp_path, period=1, channels=99).train(0, 4)
    found = records(tmp_path)
    assert [r["iteration"] for r in found] == [k for k in range(4) for _ in range(CHANNELS)]
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    for k, x in enumerate(xs):
        batch = unbiased(x)
        mean, var = 0.9 * mean + 0.1 * batch[0], 0.9 * var + 0.1 * batch[1]
        mine = [r for r in found if r["iteration"] == k]
        assert [r["channel"] for r in mine] == list(range(CHANNELS))
        for name, value in (("batch", batch), ("ema", (mean, var))):
            for moment, expected in zip(("mean", "var"), value, strict=True):
                got = torch.tensor([r[f"{name}_{moment}"] for r in mine], dtype=torch.float64)
                assert relative_error(got, expected) < 1e-6


class CPUSyncBatchNorm(nn.SyncBatchNorm):
    """Torch's refuses CPU tensors of several workers; the trace needs its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x


STOCK = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "nn.SyncBatchNorm": CPUSyncBatchNorm,
    "NaiveSyncBatchNorm": partial(NaiveSyncBatchNorm, stats_mode="N"),
}


def _trace_of_worker_0(rank: int, world_size: int, kind: str, output: str) -> None:
    if kind in STOCK:
        model = nn.Sequential(STOCK[kind](CHANNELS))
    else:
        model = nn.Sequential(PartitionedBatchNorm2d(CHANNELS, partition=kind))
    xs = samples(SIZES[rank], seed=rank)
    Toy(model, xs, Path(output), period=2, channels=99).train(0, 4)


@pytest.mark.parametrize("kind", ["worker", "world", *STOCK])
@pytest.mark.timeout(120)
def test_with_two_workers_the_batch_is_that_of_worker_0_or_of_both(
    kind: str, tmp_path: Path
) -> None:
    run_workers(_trace_of_worker_0, 2, kind, str(tmp_path))
    found = records(tmp_path)
    assert {r["iteration"] for r in found} == {1, 3}
    by_worker = [samples(SIZES[rank], seed=rank) for rank in range(2)]
    for k in (1, 3):
        of_worker = kind in ("worker", "nn.BatchNorm2d")
        seen = [xs[k] for xs in by_worker[: 1 if of_worker else 2]]
        mean, var = unbiased(torch.cat(seen))
        mine = [r for r in found if r["iteration"] == k]
        assert relative_error(torch.tensor([r["batch_mean"] for r in mine]), mean) < 1e-6
        assert relative_error(torch.tensor([r["batch_var"] for r in mine]), var) < 1e-6


def test_an_empty_batch_has_no_statistics(tmp_path: Path) -> None:
    model = nn.Sequential(PartitionedBatchNorm2d(CHANNELS))
    Toy(model, samples([0, 3]), tmp_path, period=1, channels=1).train(0, 2)
    empty, full = records(tmp_path)
    assert empty["batch_mean"] is None and empty["batch_var"] is None
    assert (empty["ema_mean"], empty["ema_var"]) == (0, 1)
    assert math.isfinite(full["batch_var"])


def test_of_several_groups_and_forwards_it_is_the_first(tmp_path: Path) -> None:
    layer = PartitionedBatchNorm2d(CHANNELS, partition="image")
    layer.scope.rows_are_images = True
    x = samples([3])[0]
    model = nn.Sequential()
    model.layer = layer
    model.forward = lambda x: (layer(x), layer(2 * x))
    Toy(model, [x], tmp_path, period=1, channels=99).train(0, 1)
    mean, var = unbiased(x[:1])
    assert relative_error(torch.tensor([r["batch_mean"] for r in records(tmp_path)]), mean) < 1e-6
    assert relative_error(torch.tensor([r["batch_var"] for r in records(tmp_path)]), var) < 1e-6


@pytest.mark.parametrize(("number", "expected"), [(1, [32]), (2, [16, 48]), (4, [8, 24, 40, 56])])
def test_channels_are_evenly_spaced(number: int, expected: list[int], tmp_path: Path) -> None:
    x = torch.randn(2, 64, 2, 2)
    Toy(nn.Sequential(nn.BatchNorm2d(64)), [x], tmp_path, period=1, channels=number).train(0, 1)
    assert [r["channel"] for r in records(tmp_path)] == expected


def test_population_records_are_the_estimates(tmp_path: Path) -> None:
    model, xs = nn.Sequential(nn.BatchNorm2d(CHANNELS)), samples([4, 4])
    toy = Toy(model, xs, tmp_path, period=99, channels=99)
    toy.train(0, 2)
    estimate = collect_statistics(model, xs, 2)
    toy.trace.record_population(7, {**estimate, "another": estimate["0"]})
    found = records(tmp_path)
    assert {(r["iteration"], r["layer"]) for r in found} == {(7, "0")}
    assert [r["population_mean"] for r in found] == estimate["0"].mean.tolist()
    assert [r["population_var"] for r in found] == estimate["0"].var.tolist()


def test_resuming_replaces_what_runs_again(tmp_path: Path) -> None:
    xs = samples([4] * 6)
    Toy(nn.Sequential(nn.BatchNorm2d(CHANNELS)), xs, tmp_path, period=1, channels=1).train(0, 5)
    whole = records(tmp_path)
    with (tmp_path / "bn_trace.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lay')  # killed here
    Toy(nn.Sequential(nn.BatchNorm2d(CHANNELS)), xs, tmp_path, period=1, channels=1).train(3, 6)
    found = records(tmp_path)
    assert [r["iteration"] for r in found] == [0, 1, 2, 3, 4, 5]
    assert found[:3] == whole[:3]


def test_scalars_are_in_the_event_storage(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    toy = Toy(model, samples([4]), tmp_path, period=1, channels=1)
    toy.train(0, 1)
    (record,) = records(tmp_path)
    for name in ("batch_mean", "batch_var", "ema_mean", "ema_var"):
        assert toy.storage.latest()[f"bn_trace/0/1/{name}"] == (record[name], 0)


@pytest.mark.parametrize("kind", ["bn", "shuffle", "renorm"])
def test_training_is_the_same_with_and_without(kind: str, data: Path, tmp_path: Path) -> None:
    states = []
    for period in (0, 1):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  Detectron2 draws from it
        options = ("SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", 2)
        options += ("BN.VIRTUAL_WORKERS", 2) if kind == "shuffle" else ()
        run = trainer(data, tmp_path / str(period), kind, *options, "BN.TRACE.PERIOD", period)
        run.train()
        states.append(run.model.state_dict())
    assert not (tmp_path / "0" / "bn_trace.jsonl").exists()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_of_a_detector_with_population_statistics(data: Path, tmp_path: Path) -> None:
    options = ("BN.TRACE.PERIOD", 2, "BN.POPULATION.ESTIMATOR", "pooled", "BN.TRACE.CHANNELS", 3)
    options += ("BN.POPULATION.NUM_SAMPLES", 3, "BN.POPULATION.PERIOD", 3, "DATASETS.TEST", "()")
    run = trainer(data, tmp_path, "bn", *options, "SOLVER.MAX_ITER", 5)
    inputs: list[Tensor] = []
    run.model.get_submodule(LAYER).register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    run.train()
    found = [r for r in records(tmp_path) if r["layer"] == LAYER]
    channels = [5, 16, 26]
    assert [r["channel"] for r in found] == channels * 4
    kinds = [("population" if "population_mean" in r else "batch") for r in found[::3]]
    iterations = [r["iteration"] for r in found[::3]]
    assert list(zip(iterations, kinds, strict=True)) == [
        (1, "batch"),
        (2, "population"),
        (3, "batch"),
        (4, "population"),
    ]
    mean, var = unbiased(inputs[1])
    assert relative_error(torch.tensor([r["batch_mean"] for r in found[:3]]), mean[channels]) < 1e-5
    assert relative_error(torch.tensor([r["batch_var"] for r in found[:3]]), var[channels]) < 1e-5
    running = run.model.get_submodule(LAYER).running_mean[channels]
    assert torch.equal(torch.tensor([r["population_mean"] for r in found[-3:]]), running)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["BN.TRACE.PERIOD", "-1"], ["BN.TRACE.PERIOD -1", "at least 0"]),
        (["BN.TRACE.PERIOD", "20", "BN.TRACE.CHANNELS", "0"], ["BN.TRACE.CHANNELS 0", "least 1"]),
    ],
)
def test_bad_config_is_refused_by_name(
    data: Path, tmp_path: Path, more: list[str], words: list[str]
) -> None:
    message = refused(data, tmp_path, *more)
    assert all(word in message for word in words)


def test_modules_that_match_no_layer_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BN\.TRACE\.MODULES.*head\.cls.*roi_heads\.box_head"):
        options = ("BN.TRACE.PERIOD", 1, "BN.TRACE.MODULES", "['head.cls']")
        trainer(data, tmp_path, "bn", *options)
    with pytest.raises(ConfigError, match=r"BN\.TRACE\.PERIOD.*BN\.MODULES.*has no BN layer"):
        trainer(data, tmp_path, "gn", "BN.TRACE.PERIOD", 1)


def test_figure_shows_the_three_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, xs = nn.Sequential(*(nn.BatchNorm2d(CHANNELS) for _ in range(3))), samples([0, 4, 4])
    xs[0] = torch.zeros(1, CHANNELS, 1, 2)
    toy = Toy(model, xs, tmp_path, period=1, channels=2)
    toy.train(0, 3)
    toy.trace.record_population(2, collect_statistics(model, xs, 3))
    lines: dict[str, list[Any]] = {}
    close = plt.close

    def look(figure: Any) -> None:
        for panel in (panel for part in figure.subfigs for panel in part.axes):
            drawn = [tuple(line.get_xydata().ravel().tolist()) for line in panel.lines]
            lines[f"{panel.figure.get_suptitle()} {panel.get_title()}"] = drawn
        close(figure)

    monkeypatch.setattr(plt, "close", look)
    paths = draw_trace(tmp_path, ["0", "2"])
    assert [path.name for path in paths] == ["bn_trace.png", "bn_trace.svg"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert len(lines) == 2 * 2 * 2
    found = [r for r in records(tmp_path) if (r["layer"], r["channel"]) == ("2", 2)]
    for name, moment in (("mean", "mean"), ("variance", "var")):
        batch, ema, population = lines[f"2 channel 2: {name}"]
        for drawn, kind in ((batch, "batch"), (ema, "ema"), (population, "population")):
            key = f"{kind}_{moment}"
            assert drawn == tuple(v for r in found if key in r for v in (r["iteration"], r[key]))


def test_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bn_trace\.jsonl does not exist: .*BN\.TRACE\.PERIOD"):
        draw_trace(tmp_path)
    x = samples([4])
    Toy(nn.Sequential(nn.BatchNorm2d(CHANNELS)), x, tmp_path, period=1, channels=1).train(0, 1)
    with pytest.raises(ConfigError, match=r"--layer head\.\* matches no layer .* has 0\."):
        draw_trace(tmp_path, ["head.*"])
