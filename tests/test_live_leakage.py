"""BN.LEAKAGE.PERIOD: the leak over training, which is the same without it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_workers
from training import RETINANET, build_trainer, different, make_images, train

from bn_detection import ConfigError
from bn_detection.data import make_leaky_shapes
from bn_detection.leakage import measure_leakage
from bn_detection.leakage.live import MeasureLeakage

COMMON = (
    *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0),
    *("SOLVER.IMS_PER_BATCH", 2, "INPUT.RANDOM_FLIP", "horizontal", "DATALOADER.NUM_WORKERS", 0),
    *("INPUT.MIN_SIZE_TRAIN", "(96, 112, 128)", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
)
LIVE = ("BN.LEAKAGE.PERIOD", 2, "BN.LEAKAGE.LIVE_IMAGES", 6)
SHUFFLED = ("BN.CONVERT", "[['roi_heads.*', 'ShuffleBN']]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    make_images(folder)
    make_leaky_shapes(folder / "more", 8, seed=3, split="val")
    (folder / "val").rename(folder / "few")
    (folder / "more").rename(folder / "val")
    return folder


def scalars(output: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    kinds = ("leakage/", "inconsistency/")
    found = {x["iteration"]: {k: v for k, v in x.items() if k.startswith(kinds)} for x in lines}
    return {iteration: values for iteration, values in found.items() if values}


def checkpoint(output: Path) -> dict[str, Any]:
    content = torch.load(output / "model_final.pth", weights_only=False)
    return flat(content)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


def both(folder: Path, output: Path, *more: object) -> list[str]:
    """What differs between a training with and one without measurements."""
    left = [
        train(build_trainer(folder, output / name, *COMMON, *more, *live))
        for name, live in (("without", ()), ("with", LIVE))
    ]
    differing = different(*left)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        files = [checkpoint(output / name) for name in ("without", "with")]
        differing += different(*files)
    return differing


@pytest.mark.parametrize(
    "more", [(), SHUFFLED, RETINANET], ids=["mask rcnn", "shuffled", "retinanet"]
)
def test_training_is_the_same_without_it(
    more: tuple[object, ...], folder: Path, tmp_path: Path
) -> None:
    more = (*more, "BN.MODULES", "['roi_heads.*', 'head.*']")
    assert both(folder, tmp_path, *more) == []
    assert scalars(tmp_path / "without") == {}
    found = scalars(tmp_path / "with")
    assert [*found] == [3]  # Detectron2 writes the latest of 20 iterations
    metrics = {"box_ap"} if more[0] == RETINANET[0] else {"accuracy", "loss", "box_ap"}
    for values in found.values():
        assert values.keys() >= {f"{k}/{m}" for k in ("leakage", "inconsistency") for m in metrics}


def assert_measured(folder: Path, output: Path, num_workers: int, *kinds: str) -> None:
    """The last scalars are what the probe gives for the last checkpoint."""
    trainer = build_trainer(folder, output, *COMMON, *LIVE)
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.BN.LEAKAGE.NUM_IMAGES = 6
    trainer.model.load_state_dict(torch.load(output / "model_final.pth")["model"])
    report = measure_leakage(cfg, trainer.model, num_workers=num_workers)
    last = scalars(output)[3]
    for kind in kinds:
        for metric, estimate in getattr(report, kind).items():
            assert last[f"{kind}/{metric}"] == pytest.approx(estimate.value, rel=1e-4, abs=1e-4)
    assert last["leakage/loss"] != 0


def test_it_measures_what_the_probe_measures(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="bn_detection")
    train(build_trainer(folder, tmp_path, *COMMON, *LIVE))
    assert_measured(folder, tmp_path, 1, "leakage", "inconsistency")
    assert "on 6 images" in caplog.text and "% of the training so far" in caplog.text


def _workers(rank: int, world_size: int, folder: str, output: str) -> list[str]:
    torch.use_deterministic_algorithms(True)
    try:
        return both(Path(folder), Path(output), *SHUFFLED)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.timeout(180)
def test_two_workers_wait_for_each_other(folder: Path, tmp_path: Path) -> None:
    assert run_workers(_workers, 2, str(folder), str(tmp_path), timeout=150) == [[], []]
    # All images, not worker 0's share of them. The checkpoint's running statistics are averages.
    assert_measured(folder, tmp_path / "with", 2, "leakage")


def test_weights_that_have_diverged_are_named_and_training_goes_on(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(folder, tmp_path, *COMMON, *LIVE)
    hook = next(hook for hook in trainer._hooks if isinstance(hook, MeasureLeakage))
    after_step = hook.after_step

    def spoiled() -> None:
        kept = trainer.model.state_dict()
        bias = kept["roi_heads.box_predictor.cls_score.bias"]
        before = bias.clone()
        bias.fill_(torch.inf)
        after_step()
        bias.copy_(before)

    hook.after_step = spoiled
    train(trainer)
    assert scalars(tmp_path) == {}
    assert "No leakage at iteration 1: MODEL.WEIGHTS: the box head's outputs" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("BN.LEAKAGE.PERIOD", 2, "BN.MODULES", "['nothing']"), "BN.LEAKAGE.PERIOD 2: no BN layer"),
        ((*LIVE, "DATASETS.TEST", "()"), "DATASETS.TEST is empty"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    more: tuple[object, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_trainer(folder, tmp_path, *COMMON, *more)
