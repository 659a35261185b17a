"""Trials: what other statistics give, against AP that is known and the tool that applies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from test_diagnose import CONFIG, IMAGES, config, result, tool
from test_train_net import overrides
from torch import nn

from bn_detection import cli
from bn_detection.data import make_leaky_shapes
from bn_detection.engine import trials
from bn_detection.leakage.trial import having, measure_trial
from bn_detection.population import PopulationStatistics

MOVED = "roi_heads.box_head.conv1.norm.running_mean"
BOX = {"category_id": 1, "bbox": [5.0, 5.0, 20.0, 20.0]}
TRUTH: dict[str, Any] = {
    "images": [{"id": k, "height": 40, "width": 40} for k in range(8)],
    "annotations": [
        {**BOX, "id": k + 1, "image_id": k, "area": 400.0, "iscrowd": 0} for k in range(8)
    ],
    "categories": [{"id": 1, "name": "thing"}],
}
BATCHES = [[{"image_id": k}, {"image_id": k + 1}] for k in range(0, 8, 2)]


def finds(*images: int) -> Any:
    """A detector that finds the objects of some images."""

    def detect(batch: list[dict[str, int]]) -> list[dict[str, Any]]:
        ids = [image["image_id"] for image in batch]
        return [{**BOX, "image_id": k, "score": 0.9} for k in ids if k in images]

    return detect


def test_the_gain_is_the_difference_of_two_ap() -> None:
    """Four objects of eight, all at the top: recalls up to 0.5, 51 of COCO's 101."""
    trial = measure_trial(BATCHES, finds(0, 2, 4, 6), finds(*range(8)), TRUTH)
    assert trial.images == 8
    assert trial.before.value == pytest.approx(100 * 51 / 101)
    assert trial.after.value == pytest.approx(100)
    assert trial.gain.value == pytest.approx(100 * 50 / 101)
    assert trial.gain.low < trial.gain.value < trial.gain.high
    # In some resamples all images, or none, are found before.
    same = measure_trial(BATCHES, finds(0, 2, 4, 6), finds(0, 2, 4, 6), TRUTH)
    assert (same.gain.low, same.gain.value, same.gain.high) == (0, 0, 0)
    assert trial.to_json()["gain"]["value"] == trial.gain.value


@pytest.mark.parametrize(
    ("batches", "words"), [([], "no batch"), ([[{"image_id": 9}]], "no image 9")]
)
def test_images_without_truth_are_refused(batches: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"val.*{words}"):
        measure_trial(batches, finds(), finds(), TRUTH, dataset="val")


def test_statistics_are_had_for_a_while() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mean, var = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.25])
    nothing = torch.zeros(2)
    x = torch.randn(3, 2, 4, 4)
    with having(model, {"0": PopulationStatistics(mean, var, nothing, nothing, 9)}):
        expected = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose box head was given wrong statistics; its weights are random."""
    folder = tmp_path_factory.mktemp("stale")
    for split in ("train", "val"):
        make_leaky_shapes(folder / split, IMAGES, seed=7, split=split)
    torch.manual_seed(0)
    model = build_model(config(*overrides(folder, folder)))
    model.roi_heads.box_head.conv1.norm.running_mean.fill_(5.0)
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return folder


@pytest.mark.timeout(200)
def test_what_is_tried_is_what_recalibrate_writes(
    stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def detect(model: nn.Module, batch: list[Any]) -> list[dict[str, Any]]:
        assert not model.training
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return []

    monkeypatch.setattr(trials, "detect", detect)
    tool(stale, tmp_path / "out")
    # Nothing is found with either, so nothing is lost.
    (note,) = [x for x in result(tmp_path / "out")["notes"] if x["id"] == "BN103"]
    assert "it costs nothing. Box AP with the statistics of these images: 0.0" in note["title"]
    new = tmp_path / "new.pth"
    opts = overrides(stale, tmp_path, "MODEL.WEIGHTS", stale / "weights.pth")
    more = ("BN.MODULES", [*config().BN.MODULES, *note["layers"]])
    args = ["recalibrate", "--config-file", CONFIG, "--output", new, *opts, *more]
    cli.main(list(map(str, args)))
    before, after = (torch.load(path)["model"] for path in (stale / "weights.pth", new))
    for found, expected in ((seen[0], before), (seen[1], after)):
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value.double(), rtol=1e-5), name
    assert not torch.equal(seen[0][MOVED], seen[1][MOVED])
