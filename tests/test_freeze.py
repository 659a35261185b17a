"""Frozen endings, against layers that are replaced by frozen ones, and across resumes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from distributed import run_workers
from torch import Tensor, nn
from training import build_trainer, different, make_images, train

from bn_detection import ConfigError, add_bn_detection_config
from bn_detection.data import build_train_loader
from bn_detection.engine import Trainer, check_config
from bn_detection.engine.checks import first_frozen_iteration
from bn_detection.engine.hooks import model_itself
from bn_detection.norm import replace_layers
from bn_detection.population import FreezeStatistics, PreciseStatistics

LAYERS = [f"roi_heads.box_head.conv{k}.norm" for k in (1, 2, 3, 4)]
LAYERS += ["roi_heads.mask_head.mask_fcn1.norm", "roi_heads.mask_head.mask_fcn2.norm"]
UNFROZEN = ("SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()")
SHORT = (*UNFROZEN, "BN.FREEZE.LAST_ITERS", 2)
DECAY = ("SOLVER.WEIGHT_DECAY_NORM", 0.1, "SOLVER.CLIP_GRADIENTS.ENABLED", True)


class Batches:
    """The same batches in each run; those of the iterations from ``start`` on."""

    def __init__(self, cfg: Any) -> None:
        self.start = 0
        self._batches = list(islice(build_train_loader(cfg, seed=0), 4))

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        yield from self._batches[self.start :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freeze")
    make_images(folder)
    return folder


def seeded(trainer: Trainer) -> None:
    """Draws that depend on the iteration alone."""
    torch.manual_seed(trainer.iter)
    np.random.seed(trainer.iter)  # noqa: NPY002  Detectron2 draws from it


class Affine(nn.Module):
    """Fixed statistics and trained parameters, from the formula."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[
            :, None, None
        ]


def without_affine_updates(layer: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    new = FrozenBatchNorm2d(layer.num_features, eps=layer.eps)
    new.load_state_dict({k: v for k, v in layer.state_dict().items() if "num_batches" not in k})
    return new


@pytest.mark.parametrize("affine", ["fixed", "train"])
def test_the_ending_is_that_of_a_model_with_frozen_layers(
    folder: Path, tmp_path: Path, affine: str
) -> None:
    replacement = without_affine_updates if affine == "fixed" else Affine
    reference = build_trainer(folder, tmp_path / "replaced", *UNFROZEN, *DECAY)

    def replace(trainer: Trainer) -> None:
        if trainer.iter == 2:
            replace_layers(
                trainer.model,
                lambda _, m: replacement(m) if isinstance(m, nn.BatchNorm2d) else None,
            )
            optimizer, left = trainer._trainer.optimizer, set(trainer.model.parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p in left]
            for parameter in set(optimizer.state) - left:
                del optimizer.state[parameter]

    expected = train(reference, replace)
    trainer = build_trainer(folder, tmp_path / "frozen", *SHORT, *DECAY, "BN.FREEZE.AFFINE", affine)
    at_switch: dict[str, Tensor] = {}

    def remember(trainer: Trainer) -> None:
        if trainer.iter == 2:
            at_switch.update({k: v.clone() for k, v in trainer.model.state_dict().items()})

    found = train(trainer, remember)
    for name in trainer.model.state_dict():
        if "num_batches_tracked" not in name:
            assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6), name
    for layer in LAYERS:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(found[f"{layer}.{key}"], at_switch[f"{layer}.{key}"])
        for key in ("weight", "bias"):
            same = torch.equal(found[f"{layer}.{key}"], at_switch[f"{layer}.{key}"])
            assert same == (affine == "fixed")


def test_an_evaluation_does_not_unfreeze(folder: Path, tmp_path: Path) -> None:
    options = ("SOLVER.MAX_ITER", 4, "BN.FREEZE.LAST_ITERS", 3, "TEST.EVAL_PERIOD", 1)
    trainer = build_trainer(folder, tmp_path, *options)
    train(trainer)
    for name in LAYERS:
        layer = trainer.model.get_submodule(name)
        assert int(layer.num_batches_tracked) == 1
        assert layer.training  # by the last evaluation, as Detectron2 leaves it


PRECISE = (
    *("BN.FREEZE.LAST_ITERS", 2, "BN.FREEZE.STATISTICS", "precise", "BN.FREEZE.AFFINE", "fixed"),
    *("BN.POPULATION.NUM_SAMPLES", 4, "BN.POPULATION.ESTIMATOR", "pooled"),
    *("BN.POPULATION.RESTORE_EMA", True, "BN.POPULATION.PERIOD", 1),
)


@pytest.mark.parametrize(
    "options", [("BN.FREEZE.LAST_ITERS", 0.5), PRECISE], ids=["ema", "precise"]
)
def test_a_resume_on_either_side_is_the_uninterrupted_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    monkeypatch.setattr(Trainer, "build_train_loader", classmethod(lambda _, cfg: Batches(cfg)))

    def part(output: str, stop: int, resume: bool) -> tuple[dict[str, Any], int]:
        trainer = build_trainer(
            *(folder, tmp_path / output, *UNFROZEN, *options, "SOLVER.CHECKPOINT_PERIOD", 1),
            resume=resume,
        )
        switches: list[int] = []
        (hook,) = (h for h in trainer._hooks if isinstance(h, FreezeStatistics))
        switch = hook._switch
        monkeypatch.setattr(hook, "_switch", lambda: (switches.append(trainer.iter), switch()))
        trainer._trainer.data_loader.start = trainer.start_iter
        trainer.max_iter = stop
        left = train(trainer, seeded)
        return left, switches

    whole, switches = part("whole", 4, False)
    assert switches == [2]
    for stop in (1, 2, 3):
        _, before = part(f"until {stop}", stop, False)
        found, after = part(f"until {stop}", 4, True)
        assert before + after == [2]
        differing = different({**found, "images": 0}, {**whole, "images": 0})
        assert differing == [], stop


def test_a_precise_ending_keeps_the_statistics_of_all_images(folder: Path, tmp_path: Path) -> None:
    options = ("BN.FREEZE.STATISTICS", "precise", "BN.POPULATION.NUM_SAMPLES", 4)
    trainer = build_trainer(folder, tmp_path, *SHORT, *options, "SOLVER.IMS_PER_BATCH", 2)
    layer = trainer.model.get_submodule(LAYERS[0])
    inputs: list[Tensor] = []

    def record(_: nn.Module, x: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            inputs.append(x[0])

    layer.register_forward_pre_hook(record)
    trainer.train()
    assert len(inputs) == 2
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    assert torch.allclose(layer.running_mean.double(), values.mean(1), atol=1e-6)
    assert torch.allclose(layer.running_var.double(), values.var(1), rtol=1e-5)


def test_the_population_hook_leaves_frozen_layers_alone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("BN.POPULATION.ESTIMATOR", "pooled", "BN.POPULATION.NUM_SAMPLES", 2)
    options += ("BN.POPULATION.PERIOD", 1)
    for modules, number in (("[]", 0), ("['*.box_head.*']", 2)):
        trainer = build_trainer(
            folder, tmp_path / str(number), *SHORT, *options, "BN.FREEZE.MODULES", modules
        )
        (hook,) = (h for h in trainer._hooks if isinstance(h, PreciseStatistics))
        estimated: list[int] = []
        hook.listeners.append(lambda _, found, to=estimated: to.append(len(found)))
        with caplog.at_level(logging.INFO, logger="bn_detection"):
            trainer.train()
        assert estimated == [6, 6] + [number] * (2 if number else 0)
    assert caplog.text.count("All layers are frozen") == 1


def _two_workers(rank: int, world_size: int, folder: str, output: str) -> list[dict[str, Any]]:
    options = (*SHORT, "BN.FREEZE.AFFINE", "fixed", "SOLVER.IMS_PER_BATCH", 2)
    trainer = build_trainer(Path(folder), Path(output), *options)
    at_switch: dict[str, Any] = {}

    def remember(trainer: Trainer) -> None:
        if trainer.iter == 2:
            state = model_itself(trainer).state_dict()
            at_switch.update({name: value.clone() for name, value in state.items()})

    left = train(trainer, remember)
    return [at_switch, {name: left[name] for name in at_switch}]


@pytest.mark.timeout(120)
def test_workers_freeze_the_average_of_their_statistics(folder: Path, tmp_path: Path) -> None:
    (first, one), (second, other) = run_workers(
        _two_workers, 2, str(folder), str(tmp_path), timeout=100
    )
    assert different(one, other) == []
    for layer in LAYERS:
        for key in ("running_mean", "running_var"):
            name = f"{layer}.{key}"
            assert not torch.equal(first[name], second[name])
            expected = (first[name].double() + second[name].double()) / 2
            assert torch.allclose(one[name].double(), expected, atol=1e-7)
        assert torch.equal(one[f"{layer}.weight"], first[f"{layer}.weight"])
    assert not torch.equal(
        one["roi_heads.box_head.fc1.weight"], first["roi_heads.box_head.fc1.weight"]
    )


@pytest.mark.parametrize("kind", ["own", "shared by a list"])
def test_fixed_parameters_have_no_part_in_a_step(kind: str) -> None:
    norm = nn.BatchNorm2d(3) if kind == "own" else CycleBatchNormList(2, num_features=3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, norm) if kind == "own" else None
    model = model or nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu")
    hook = FreezeStatistics(model, 2, ["*"], fixed=optimizer)
    hook.trainer = SimpleNamespace(iter=0)
    seen = []
    for iteration in range(4):
        hook.trainer.iter = iteration
        hook.before_step()
        x = torch.randn(2, 3, 4, 4)
        loss = model(x).square().sum() + (model(x).sum() if kind != "own" else 0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append((norm.weight.detach().clone(), model[0].weight.detach().clone()))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[1][0], seen[3][0])
    assert not torch.equal(seen[1][1], seen[3][1])


def test_an_ending_that_is_moved_behind_a_resume_starts_anew() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    switches: list[list[str]] = []
    hooks = [FreezeStatistics(model, first, ["*"], precise=switches.append) for first in (5, 7)]
    hooks[0].trainer = hooks[1].trainer = SimpleNamespace(iter=5)
    hooks[0].before_step()
    hooks[1].load_state_dict(hooks[0].state_dict())
    model.train()
    for iteration in (6, 7, 8):
        hooks[1].trainer.iter = iteration
        hooks[1].before_step()
        assert model[0].training == (iteration < 7)
    assert switches == [["0"], ["0"]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["BN.FREEZE.LAST_ITERS", 5], ["BN.FREEZE.LAST_ITERS 5", "SOLVER.MAX_ITER 4"]),
        (["BN.FREEZE.LAST_ITERS", -1], ["BN.FREEZE.LAST_ITERS -1"]),
        (["BN.FREEZE.LAST_ITERS", 0], ["BN.FREEZE.LAST_ITERS 0", "None for never"]),
        (["BN.FREEZE.LAST_ITERS", 1.5], ["BN.FREEZE.LAST_ITERS 1.5", "between 0 and 1"]),
        (["BN.FREEZE.LAST_ITERS", 1.0], ["BN.FREEZE.LAST_ITERS 1.0", "between 0 and 1"]),
        (["BN.FREEZE.LAST_ITERS", 0.0], ["BN.FREEZE.LAST_ITERS 0.0", "between 0 and 1"]),
        (["BN.FREEZE.LAST_ITERS", "half"], ["BN.FREEZE.LAST_ITERS half"]),
        (["BN.FREEZE.LAST_ITERS", True], ["BN.FREEZE.LAST_ITERS True"]),
        (["BN.FREEZE.STATISTICS", "mean"], ['BN.FREEZE.STATISTICS is "mean"', '"precise"']),
        (["BN.FREEZE.AFFINE", "none"], ['BN.FREEZE.AFFINE is "none"', '"fixed"']),
        (
            ["BN.FREEZE.STATISTICS", "precise", "BN.POPULATION.ESTIMATOR", "fvcore"],
            ["BN.FREEZE.STATISTICS precise", "fvcore", '"pooled"'],
        ),
        (
            ["BN.FREEZE.MODULES", "['roi_head.*']"],
            ["BN.FREEZE.MODULES ['roi_head.*']", "no BN layer", LAYERS[0]],
        ),
        (["BN.INFERENCE", "batch"], ["BN.FREEZE.LAST_ITERS 2", LAYERS[0], "batch statistics"]),
    ],
)
def test_endings_that_cannot_be_are_refused(
    folder: Path, tmp_path: Path, more: list[object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as info:
        base = UNFROZEN if "BN.FREEZE.LAST_ITERS" in more else SHORT
        trainer = build_trainer(folder, tmp_path, *base, *more)
        check_config(trainer.cfg, num_workers=1, eval_only=False, resume=False)
    for word in words:
        assert word in str(info.value)


@pytest.mark.parametrize(
    ("last", "first"), [(4, 0), (1, 3), (0.5, 2), (0.1, 3), (3.0, 1), (None, None)]
)
def test_the_ending_is_a_number_or_a_fraction_of_iterations(
    last: float | None, first: int | None
) -> None:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.SOLVER.MAX_ITER = 4
    cfg.BN.FREEZE.LAST_ITERS = last
    assert first_frozen_iteration(cfg) == first
