"""Which statistics a recalibrated checkpoint gets: the better ones, or a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from test_recalibrate import CONFIG, INFERENCE, arguments, config, data, load, model_of, run
from test_train_net import ROOT
from tooling import run_script
from torch import Tensor

from bn_detection import ConfigError
from bn_detection.engine import comparison
from bn_detection.engine.comparison import Comparison
from bn_detection.population import PRIOR, OnlineStatistics

__all__ = ["data"]

IMAGES = 5
NAME = "roi_heads.box_head.conv3.norm"
FROZEN = ("MODEL.ROI_BOX_HEAD.NORM", "FrozenBN", "MODEL.ROI_MASK_HEAD.NORM", "FrozenBN")


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in state.items() if k.endswith(("running_mean", "running_var"))}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {key for key, value in one.items() if not torch.equal(value, other[key])}


@pytest.mark.parametrize(("mix", "weight"), [("auto", IMAGES / (IMAGES + PRIOR)), ("0.5", 0.5)])
def test_the_first_layer_gets_the_mixture_of_the_closed_form(
    data: Path, tmp_path: Path, mix: str, weight: float
) -> None:
    """What comes before it is the same, mixed or not."""
    first = "roi_heads.box_head.conv1.norm"
    run(data, tmp_path / "new.pth", *INFERENCE)
    run(data, tmp_path / "mixed.pth", *INFERENCE, flags=("--mix", mix))
    old, new, mixed = (
        statistics(load(path))
        for path in (data / "weights.pth", tmp_path / "new.pth", tmp_path / "mixed.pth")
    )
    for kind in ("running_mean", "running_var"):
        key = f"{first}.{kind}"
        expected = (1 - weight) * old[key] + weight * new[key]
        assert torch.allclose(mixed[key], expected, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(mixed[f"{NAME}.{kind}"], new[f"{NAME}.{kind}"])
    record = json.loads((tmp_path / "mixed.json").read_text())
    assert record["settings"]["mix"] == pytest.approx(weight)
    assert "decision" not in record


def test_a_weight_of_1_changes_nothing(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "new.pth")
    run(data, tmp_path / "mixed.pth", flags=("--mix", 1))
    new, mixed = (statistics(load(tmp_path / f"{name}.pth")) for name in ("new", "mixed"))
    for key, value in new.items():
        assert torch.allclose(mixed[key], value, rtol=1e-4, atol=1e-6), key


def test_frozen_layers_are_mixed_without_conversion(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(data, tmp_path, *FROZEN)
    model.load_state_dict(load(data / "weights.pth"), strict=False)  # without counters
    torch.save({"model": model.state_dict()}, tmp_path / "frozen.pth")
    weights = ("MODEL.WEIGHTS", tmp_path / "frozen.pth")
    run(data, tmp_path / "mixed.pth", *FROZEN, *weights, *INFERENCE, flags=("--mix", "0.5"))
    run(data, tmp_path / "bn.pth", *INFERENCE, flags=("--mix", "0.5"))
    mixed, bn = load(tmp_path / "mixed.pth"), load(tmp_path / "bn.pth")
    moved = changed(load(tmp_path / "frozen.pth"), mixed)
    assert moved == set(statistics(mixed)) != set()
    for key in moved:
        assert torch.allclose(mixed[key], bn[key], rtol=1e-4, atol=1e-5), key
    record = json.loads((tmp_path / "mixed.json").read_text())
    assert record["layers"][NAME]["change_of_mean"] > 0


def test_a_stream_in_one_forward_is_a_recalibration(data: Path, tmp_path: Path) -> None:
    """Without a prior the first layer, before which both are the same, is the same."""
    first = "roi_heads.box_head.conv1.norm"
    run(data, tmp_path / "new.pth", *INFERENCE, "BN.POPULATION.BATCH_SIZE", IMAGES)
    model = model_of(data, tmp_path)
    model.load_state_dict(load(data / "weights.pth"))
    cfg = config(data, tmp_path)
    mapper = DatasetMapper(cfg, False)
    images = [mapper(record) for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]
    with OnlineStatistics(model.eval(), ["roi_heads.*"], prior=0) as online:
        model(images)
        assert online.images == IMAGES
        for kind in ("running_mean", "running_var"):
            key = f"{first}.{kind}"
            new, found = load(tmp_path / "new.pth")[key], model.state_dict()[key]
            assert torch.allclose(found, new, rtol=1e-4, atol=1e-6), kind
    assert not changed(load(data / "weights.pth"), model.state_dict())


@pytest.mark.parametrize(("after", "kept"), [(31.0, "new"), (30.0, "old"), (29.0, "old")])
def test_the_better_statistics_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float, kept: str
) -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluated(cfg: Any, model: Any, folder: str) -> dict[str, Any]:
        seen.append(statistics({k: v.clone() for k, v in model.state_dict().items()}))
        assert len(cfg.DATASETS.TEST) == 1
        ap = (30.0, after)[len(seen) - 1]
        return {"bbox": {"AP": ap, "AP50": 90.0}, "segm": {"AP": 20.0}}

    monkeypatch.setattr(comparison.Trainer, "test", staticmethod(evaluated))
    run(data, tmp_path / "new.pth", *INFERENCE, flags=("--keep-if-better",))
    old, new = statistics(load(data / "weights.pth")), statistics(load(tmp_path / "new.pth"))
    assert not changed(seen[0], old)
    assert changed(seen[1], old)
    assert not changed(new, seen[1] if kept == "new" else old)
    record = json.loads((tmp_path / "new.json").read_text())
    assert record["decision"] == {
        "kept": kept,
        "before": {"bbox": 30.0, "segm": 20.0},
        "after": {"bbox": after, "segm": 20.0},
    }
    assert record["layers"][NAME]["change_of_mean"] > 0  # that of the estimate


@pytest.mark.timeout(200)
def test_two_workers_evaluate_and_agree(data: Path, tmp_path: Path) -> None:
    """The weights are random, so both AP are 0, and the old statistics stay."""
    more = (*INFERENCE, "BN.POPULATION.BATCH_SIZE", 2)
    flags = ("--num-gpus", 2, "--keep-if-better", "--mix", "auto")
    command = arguments(data, tmp_path / "new.pth", *more, flags=flags)
    ran = run_script(ROOT / "tools" / "recalibrate.py", *command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "before," in ran.stdout
    assert "The old statistics are kept (--keep-if-better)." in ran.stdout
    assert not changed(load(data / "weights.pth"), load(tmp_path / "new.pth"))
    for when in ("before", "after"):
        assert (tmp_path / "new_recalibration" / when / "results.json").exists()


def test_the_decision_is_by_the_mean_over_tasks_and_datasets() -> None:
    before = {"day/bbox": 40.0, "night/bbox": 10.0}
    better = Comparison(before, {"day/bbox": 39.0, "night/bbox": 12.0})
    assert better.is_better
    assert "day/bbox 40.00 before, 39.00 after, night/bbox 10.00 before" in better.text()
    assert not Comparison(before, {"day/bbox": 41.5, "night/bbox": 8.0}).is_better


@pytest.mark.parametrize(
    ("more", "flags", "words"),
    [
        ([], ["--mix", "2"], ["--mix 2", "auto", "at most 1"]),
        ([], ["--mix", "0"], ["--mix 0", "above 0"]),
        ([], ["--mix", "much"], ["--mix much"]),
        (["BN.INFERENCE", "batch"], ["--mix", "auto"], ["BN.INFERENCE is batch"]),
        (["BN.POPULATION.ESTIMATOR", "fvcore"], ["--mix", "auto"], ["ESTIMATOR is fvcore"]),
        (["DATASETS.TEST", "()"], ["--keep-if-better"], ["DATASETS.TEST is empty"]),
    ],
)
def test_refusals(
    data: Path, tmp_path: Path, more: list[object], flags: list[object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        run(data, tmp_path / "new.pth", *more, flags=tuple(flags))
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("new*"))


def test_images_without_labels_cannot_be_compared_on(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "val" / "annotations.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    entries = [
        *config(data, tmp_path, config_file=CONFIG).DATASETS.COCO_JSON,
        [f"{tmp_path.name}_empty", str(tmp_path / "empty.json"), str(data / "val" / "images")],
    ]
    more = ("DATASETS.COCO_JSON", entries, "DATASETS.TEST", (f"{tmp_path.name}_empty",))
    with pytest.raises(ConfigError, match="no labelled object to compute an AP"):
        run(data, tmp_path / "new.pth", *more, flags=("--keep-if-better",))
