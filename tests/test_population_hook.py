"""What the hook for precise statistics leaves untouched, and in which order it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import hooks
from distributed import run_workers
from torch import nn
from training import RETINANET, build_trainer, different, make_images, train

from bn_detection import ConfigError
from bn_detection.engine.hooks import model_itself
from bn_detection.population import AverageStatistics, FreezeStatistics, PreciseStatistics

POOLED = ("BN.POPULATION.ESTIMATOR", "pooled", "BN.POPULATION.NUM_SAMPLES", 4)
EVERY_2 = ("TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population_hook")
    make_images(folder)
    return folder


def run(
    folder: Path, output: Path, *options: object, stops: tuple[int, ...] = (4,)
) -> dict[str, Any]:
    """A training that is interrupted at some iterations, and resumed."""
    for start, stop in zip((0, *stops), stops, strict=False):
        trainer = build_trainer(folder, output, *EVERY_2, *options, resume=start > 0)
        trainer.max_iter = stop
        assert trainer.start_iter == start
        left = train(trainer)
    return left


@pytest.mark.parametrize("model", ["mask_rcnn", "retinanet"])
def test_with_restore_ema_training_is_as_without_the_hook(
    folder: Path, tmp_path: Path, model: str
) -> None:
    more = ("SOLVER.MAX_ITER", 3)
    if model == "retinanet":
        more += RETINANET
        # torch.jit compiles its focal loss after the first calls, and then it has other last bits.
        run(folder, tmp_path / "first", *more, stops=(3,))
    without = run(folder, tmp_path / "without", *more, stops=(3,))
    restored = ("BN.POPULATION.RESTORE_EMA", True, "BN.POPULATION.BATCH_SIZE", 1)
    restored += ("BN.POPULATION.PERIOD", 1)
    estimates = []
    trainer = build_trainer(folder, tmp_path / "with", *EVERY_2, *more, *POOLED, *restored)
    (hook,) = (h for h in trainer._hooks if isinstance(h, PreciseStatistics))
    hook.listeners.append(lambda iteration, statistics: estimates.append(iteration))
    found = train(trainer)
    assert estimates == [0, 1, 2]
    # Evaluated and saved with the last estimate, from which no training goes on.
    assert different(found, without) == [name for name in found if ".running_" in name]
    hook.before_step()
    for name, buffer in trainer.model.named_buffers():
        if "running" in name or "num_batches" in name:
            assert torch.equal(buffer, without[name]), name
    if model == "retinanet":
        assert without["loss normalizer"] != 100


def test_the_ema_is_restored_after_a_resume(folder: Path, tmp_path: Path) -> None:
    more = ("SOLVER.MAX_ITER", 6)
    restored = (*POOLED, "BN.POPULATION.RESTORE_EMA", True)
    without = run(folder, tmp_path / "without", *more, stops=(4, 5))
    found = run(folder, tmp_path / "with", *more, *restored, stops=(4, 5))
    assert different(found, without) == [name for name in found if ".running_" in name]
    checkpoints = [
        torch.load(tmp_path / name / "model_0000003.pth", weights_only=False)
        for name in ("with", "without")
    ]
    kept = checkpoints[0]["trainer"]["hooks"]["PreciseStatistics"]["replaced"]
    assert len(kept) == 6
    for name, statistics in kept.items():
        for key, value in statistics.items():
            of = [c["model"][f"{name}.{key}"] for c in checkpoints]
            assert torch.equal(value, of[1])
            assert not torch.equal(value, of[0])


def test_without_restore_ema_only_running_statistics_differ(folder: Path, tmp_path: Path) -> None:
    without = run(folder, tmp_path / "without", "SOLVER.MAX_ITER", 4)
    found = run(folder, tmp_path / "with", *POOLED, "SOLVER.MAX_ITER", 4)
    assert different(found, without) == [name for name in found if ".running_" in name]
    saved = torch.load(tmp_path / "with" / "model_0000001.pth", weights_only=False)
    assert "PreciseStatistics" not in saved["trainer"].get("hooks", {})


def test_without_restore_ema_training_goes_on_from_the_estimate(
    folder: Path, tmp_path: Path
) -> None:
    options = (*POOLED, "SOLVER.MAX_ITER", 3, "BN.POPULATION.PERIOD", 2)
    trainer = build_trainer(folder, tmp_path, *options, "DATASETS.TEST", "()")
    layer = trainer.model.roi_heads.box_head.conv1.norm
    (hook,) = (h for h in trainer._hooks if isinstance(h, PreciseStatistics))
    estimates, inputs, running = [], [], []
    hook.listeners.append(lambda _, found: estimates.append(found))

    def record(module: nn.Module, x: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        if torch.is_grad_enabled() and trainer.iter == 2:
            inputs.append(x[0].double())
            running.append(layer.running_mean.double())

    layer.register_forward_hook(record)
    trainer.train()
    estimate = estimates[0]["roi_heads.box_head.conv1.norm"].mean
    expected = 0.9 * estimate + 0.1 * inputs[0].mean((0, 2, 3))
    assert torch.allclose(running[0], expected, atol=1e-6)


def test_every_checkpoint_has_the_estimate_of_its_weights(folder: Path, tmp_path: Path) -> None:
    """Also one between evaluations; compared with all values that a layer saw, in float64."""
    periods = ("TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 5)
    trainer = build_trainer(folder, tmp_path, *POOLED, *periods, "SOLVER.IMS_PER_BATCH", 2)
    layer = trainer.model.roi_heads.box_head.conv1.norm
    seen: dict[int, list[torch.Tensor]] = {}

    def record(module: nn.Module, x: tuple[torch.Tensor, ...]) -> None:
        if module.training and not torch.is_grad_enabled():
            seen.setdefault(trainer.iter, []).append(x[0].double())

    layer.register_forward_pre_hook(record)
    trainer.train()
    assert list(seen) == [1, 3, 4]
    for iteration, name in ((1, "model_0000001"), (3, "model_0000003"), (4, "model_final")):
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen[iteration]], dim=1)
        saved = torch.load(tmp_path / f"{name}.pth", weights_only=False)["model"]
        mean, var = (saved[f"roi_heads.box_head.conv1.norm.running_{s}"] for s in ("mean", "var"))
        assert torch.allclose(mean.double(), values.mean(1), atol=1e-5)
        assert torch.allclose(var.double(), values.var(1), rtol=1e-4)


def test_a_period_of_ones_own_is_the_only_one(folder: Path, tmp_path: Path) -> None:
    own = ("BN.POPULATION.PERIOD", 3, "SOLVER.MAX_ITER", 5)
    trainer = build_trainer(folder, tmp_path, *EVERY_2, *POOLED, *own)
    (hook,) = (h for h in trainer._hooks if isinstance(h, PreciseStatistics))
    estimates: list[int] = []
    hook.listeners.append(lambda iteration, _: estimates.append(iteration))
    trainer.train()
    assert estimates == [2, 4]


def _two_workers(rank: int, world_size: int, folder: str, output: str) -> list[dict[str, Any]]:
    torch.use_deterministic_algorithms(True)
    found = []
    for name, options in {
        "without": (),
        "with": (*POOLED, "BN.POPULATION.RESTORE_EMA", True),
    }.items():
        left = run(Path(folder), Path(output, name), "SOLVER.MAX_ITER", 6, *options, stops=(4, 6))
        found.append(left)
    torch.use_deterministic_algorithms(False)
    return found


@pytest.mark.timeout(200)
def test_two_workers_train_as_without_the_hook_and_end_with_the_same_statistics(
    folder: Path, tmp_path: Path
) -> None:
    results = run_workers(_two_workers, 2, str(folder), str(tmp_path), timeout=150)
    for without, found in results:
        assert different(found, without) == [name for name in found if ".running_" in name]
    of_ranks = [found for _, found in results]
    statistics = [name for name in of_ranks[0] if ".running_" in name]
    assert len(statistics) == 12
    for name in statistics:
        assert torch.equal(of_ranks[0][name], of_ranks[1][name]), name


def test_values_that_are_not_finite_stop_the_training(folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(folder, tmp_path, *POOLED, "SOLVER.MAX_ITER", 1)
    bias = trainer.model.roi_heads.mask_head.mask_fcn1.norm.bias

    def spoil(*_: object) -> None:
        nn.init.constant_(bias, float("nan"))

    trainer._trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"roi_heads\.mask_head\.mask_fcn2\.norm: its"):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))
    layer = trainer.model.roi_heads.mask_head.mask_fcn2.norm
    assert int(layer.num_batches_tracked) == 1
    assert layer.running_mean.isfinite().all()


def test_only_layers_of_bn_modules_are_estimated(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only = ("BN.MODULES", "['roi_heads.box_head.*']", "SOLVER.MAX_ITER", 1)
    with caplog.at_level(logging.INFO, logger="bn_detection"):
        found = train(build_trainer(folder, tmp_path / "with", *POOLED, *only))
    assert "2 BN layers outside BN.MODULES ['roi_heads.box_head.*'] keep" in caplog.text
    without = train(build_trainer(folder, tmp_path / "without", *only))
    names = [name for name in found if ".running_" in name and ".box_head." in name]
    assert different(found, without) == names


@pytest.mark.parametrize("estimator", ["pooled", "fvcore"])
def test_a_model_without_bn_is_refused(folder: Path, tmp_path: Path, estimator: str) -> None:
    with pytest.raises(ConfigError, match=rf"ESTIMATOR {estimator}: no BN layer.*BN\.MODULES"):
        build_trainer(folder, tmp_path, "BN.POPULATION.ESTIMATOR", estimator, config="gn")


def _precise_bn(rank: int, world_size: int, folder: str, output: str) -> dict[str, torch.Tensor]:
    options = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3)
    trainer = build_trainer(Path(folder), Path(output), *EVERY_2, *options, "SOLVER.MAX_ITER", 2)
    kinds = [type(hook) for hook in trainer._hooks]
    order = [kinds.index(kind) for kind in (AverageStatistics, hooks.PreciseBN, hooks.EvalHook)]
    assert order == sorted(order)
    layer = model_itself(trainer).roi_heads.box_head.conv1.norm
    inputs: list[torch.Tensor] = []

    def record(_: nn.Module, x: tuple[torch.Tensor, ...]) -> None:
        if layer.training:
            inputs.append(x[0])

    layer.register_forward_pre_hook(record)
    trainer.train()
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs[2:]], dim=1)
    assert len(inputs) == 5
    assert torch.allclose(layer.running_mean.double(), values.mean(1), atol=1e-5)
    assert torch.allclose(layer.running_var.double(), values.var(1, correction=0), rtol=1e-3)
    return {"mean": layer.running_mean.clone()}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_test_precise_bn_keeps_its_meaning(folder: Path, tmp_path: Path, workers: int) -> None:
    found = run_workers(_precise_bn, workers, str(folder), str(tmp_path), timeout=100)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    assert torch.equal(saved["roi_heads.box_head.conv1.norm.running_mean"], found[0]["mean"])
    if workers == 2:  # as upstream's: each has its own
        assert not torch.equal(found[0]["mean"], found[1]["mean"])


def test_the_hooks_run_in_the_order_in_which_they_act(folder: Path, tmp_path: Path) -> None:
    options = ("BN.FREEZE.LAST_ITERS", 1, "SOLVER.MAX_ITER", 2)
    kinds = [type(hook) for hook in build_trainer(folder, tmp_path, *POOLED, *options)._hooks]
    order = [AverageStatistics, PreciseStatistics, FreezeStatistics, hooks.PeriodicCheckpointer]
    at = [kinds.index(kind) for kind in order]
    assert at == sorted(at)


def test_rois_of_inference(folder: Path, tmp_path: Path) -> None:
    options = (*POOLED, "BN.POPULATION.ROIS", "inference", "SOLVER.MAX_ITER", 1)
    trainer = build_trainer(folder, tmp_path, *options, "SOLVER.IMS_PER_BATCH", 2)
    model = trainer.model
    inputs: list[torch.Tensor] = []
    layer = model.roi_heads.box_head.conv1.norm

    def record(_: nn.Module, x: tuple[torch.Tensor, ...]) -> None:
        if layer.training and not model.training:
            inputs.append(x[0])

    layer.register_forward_pre_hook(record)
    trainer.train()
    assert len(inputs) == 2
    # All proposals: not the 64 an image that training samples.
    assert {len(x) for x in inputs} != {128}
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    assert torch.allclose(layer.running_mean.double(), values.mean(1), atol=1e-6)
    assert torch.allclose(layer.running_var.double(), values.var(1), rtol=1e-5)
