"""Mixed precision: the trainer against torch's own steps, and what overflow leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from reference import CHANNELS, assert_close, reference_step, samples, set_affine, step
from torch import Tensor, nn
from training import build_trainer, make_images

from bn_detection.engine.amp import PRECISIONS, AMPTrainer
from bn_detection.norm import PartitionedBatchNorm2d, set_rows_per_image


class Detector(nn.Module):
    """A convolution, BN, and a loss that a batch scales."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4)

    def forward(self, batch: tuple[Tensor, float]) -> dict[str, Tensor]:
        x, scale = batch
        return {"loss": self.bn(self.conv(x)).float().square().mean() * scale}


def batches(*scales: float) -> list[tuple[Tensor, float]]:
    return [(samples([4], seed=k)[0], scale) for k, scale in enumerate(scales)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: Detector, precision: str, data: list[tuple[Tensor, float]]) -> AMPTrainer:
    trainer = AMPTrainer(model, data, optimizer_of(model), precision=precision)
    with EventStorage() as storage:
        trainer.storage = storage
        for trainer.iter in range(len(data)):
            trainer.run_step()
            storage.step()
    return trainer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_is_that_of_torch(precision: str) -> None:
    ours, theirs = Detector(), Detector()
    data = batches(1.0, 1.0)
    train(ours, precision, data)
    optimizer = optimizer_of(theirs)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    for batch in data:
        with torch.autocast("cpu", PRECISIONS[precision]):
            loss = theirs(batch)["loss"]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert value.dtype in (torch.float32, torch.int64)


def test_a_step_that_overflows_is_skipped_and_the_scale_is_in_the_checkpoint() -> None:
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # The loss is finite in float32, its scaled gradients are not in float16.
    trainer = train(model, "float16", batches(1e30))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # The forward was finite: its statistics count, as nn.BatchNorm2d's own do.
    assert not torch.equal(model.bn.running_mean, before["bn.running_mean"])
    assert trainer.grad_scaler.get_scale() == 2.0**15
    other = AMPTrainer(model, [], optimizer_of(model), precision="float16")
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("partition", ["worker", "ghost", "image", "shuffle"])
def test_an_overflow_of_float16_moves_no_statistic_of_its_channel(partition: str) -> None:
    set_rows_per_image([4, 2])
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition=partition))
    layer.scope.seed = layer.scope.own_seed = 0
    x = samples([6])[0].half()
    x[:, 1] = torch.inf
    layer(x)
    assert torch.equal(layer.running_mean[1], torch.tensor(0.0))
    assert torch.equal(layer.running_var[1], torch.tensor(1.0))
    assert layer.running_mean[[0, 2]].all() and layer.running_mean.isfinite().all()
    assert int(layer.num_batches_tracked) == 1


def test_groups_that_overflow_leave_the_others_their_weight() -> None:
    set_rows_per_image([3, 4])
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition="image"))
    x = samples([7])[0].half()
    x[0, :, 0, 0] = torch.nan
    actual = step(layer, x, torch.ones_like(x))
    expected = reference_step(x[3:], torch.ones_like(x[3:]), torch.zeros(4))
    keys = ("running_mean", "running_var")
    assert_close(actual, {key: expected[key] for key in keys})


def test_finite_float16_moves_plain_bn_as_torchs_does() -> None:
    ours, theirs = PartitionedBatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    for seed in (0, 1):
        x = samples([5], seed)[0].half()
        assert torch.equal(ours(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict(), 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_detector_trains(precision: str, tmp_path: Path, own_catalogs: None) -> None:
    folder = tmp_path / f"amp_{precision}"
    make_images(folder)
    options = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision)
    options += ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "DATASETS.TEST", ())
    trainer = build_trainer(folder, tmp_path / "output", *options, config="shuffle")
    head = trainer.model.roi_heads.box_head
    seen = []
    head.conv2.norm.register_forward_hook(lambda _, args, y: seen.append((args[0].dtype, y.dtype)))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert seen == [(PRECISIONS[precision],) * 2] * 2
    for name, buffer in trainer.model.named_buffers():
        if "running" in name:
            assert buffer.dtype == torch.float32 and buffer.isfinite().all(), name
    trained = dict(trainer.model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in trained.values())
    # Loss scaling begins high, and may skip the first steps.
    if precision == "bfloat16":
        name = "roi_heads.box_head.conv1.weight"
        assert not torch.equal(trained[name], before[name])
