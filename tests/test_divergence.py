"""A training that diverges says where, and which checkpoint is still good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from training import build_trainer, make_images

from bn_detection import ConfigError
from bn_detection.engine.divergence import (
    first_not_finite,
    last_finite_checkpoint,
    naming_divergence,
)

pytestmark = pytest.mark.usefixtures("own_catalogs")


def test_the_iteration_the_layer_and_the_last_good_checkpoint_are_named(tmp_path: Path) -> None:
    make_images(tmp_path)
    more = ("SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2)
    trainer = build_trainer(tmp_path, tmp_path / "out", *more)
    step = trainer._trainer.run_step

    def poisoned() -> None:
        if trainer.iter == 4:
            with torch.no_grad():
                trainer.model.roi_heads.box_head.conv2.norm.running_var[0] = torch.nan
                trainer.model.roi_heads.box_predictor.cls_score.weight[0] = torch.nan
        step()

    trainer._trainer.run_step = poisoned
    with pytest.raises(ConfigError) as raised, naming_divergence(trainer):
        trainer.train()
    message = str(raised.value)
    assert "\n" not in message
    for words in (
        *("at iteration 4", "loss_cls", "roi_heads.box_head.conv2.norm", "SOLVER.BASE_LR"),
        f"the last good checkpoint is {tmp_path / 'out/model_0000003.pth'}",
    ):
        assert words in message


def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path: Path) -> None:
    assert last_finite_checkpoint(str(tmp_path)) is None
    layer = nn.BatchNorm2d(2)
    torch.save({"model": layer.state_dict()}, tmp_path / "good.pth")
    assert first_not_finite(nn.Sequential(layer)) is None
    layer.running_mean[0] = torch.inf
    assert first_not_finite(nn.Sequential(layer)) == "0"
    torch.save({"model": layer.state_dict()}, tmp_path / "later.pth")
    (tmp_path / "damaged.pth").write_bytes(b"x")
    assert last_finite_checkpoint(str(tmp_path)) == str(tmp_path / "good.pth")
