"""What mixes the devices of tensors is found without a GPU: training, statistics, measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from pretend_cuda import CUDA, pretend_cuda
from tiny_detectors import items, tiny_rcnn
from torch import nn
from training import RETINANET, build_trainer, make_images

import bn_detection
from bn_detection import cli
from bn_detection.engine import Trainer, diagnosis, recalibration
from bn_detection.engine.setup import register_datasets

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda.py")


def test_pretence() -> None:
    with pretend_cuda():
        x = torch.ones(3, 2, device="cuda")
        y = torch.ones(3, 2)
        assert x.device == CUDA and x.is_cuda and x.to("cpu").device == torch.device("cpu")
        assert (2 * x[:1] + 1).device == x.new_tensor([1.0]).device == CUDA
        assert y.to(x).device == torch.zeros_like(x).device == CUDA
        assert y[0].device == x.cpu().device == torch.device("cpu")
        with pytest.raises(RuntimeError, match="one device"):
            x + y
        with pytest.raises(RuntimeError, match="one device"):
            y[torch.tensor([0], device="cuda")]
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x[torch.tensor([0, 1])].device == CUDA
        layer = nn.Conv2d(2, 3, 1).to("cuda")
        loss = layer(torch.ones(1, 2, 2, 2, device="cuda")).sum().cpu()
        loss.backward()
        assert layer.weight.grad.device == CUDA
        torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9).step()
        assert layer.weight.device == CUDA and x.sum().item() == 6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    make_images(folder)
    return folder


VIRTUAL = ("BN.VIRTUAL_WORKERS", 2, "BN.VIRTUAL_LOSSES", True)
TRAININGS: dict[str, tuple[str, tuple[object, ...]]] = {
    "BN of virtual workers": ("bn", VIRTUAL),
    "ShuffleBN of virtual workers": ("shuffle", VIRTUAL),
    "GhostBN, frozen": ("ghost", ("BN.FREEZE.LAST_ITERS", 1, "BN.FREEZE.STATISTICS", "precise")),
    "ImageBN, traced": ("image", ("BN.TRACE.PERIOD", 1)),
    "BatchRenorm": ("renorm", ()),
    "SyncBN by conversion": ("gn", ("BN.CONVERT", [["roi_heads.*head", "SyncBN"]])),
    "levels": ("bn", (*RETINANET, "MODEL.META_ARCHITECTURE", "BNRetinaNet")),
}


def train(images: Path, folder: Path, name: str, device: str) -> Trainer:
    config, options = TRAININGS[name]
    trainer = build_trainer(
        images,
        folder / device,
        *("MODEL.DEVICE", device, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2),
        *("BN.POPULATION.ESTIMATOR", "pooled", "BN.POPULATION.NUM_SAMPLES", 4),
        *options,
        config=config,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.usefixtures("own_catalogs")
def test_training_on_a_gpu_is_that_of_a_cpu(name: str, images: Path, tmp_path: Path) -> None:
    """With the passes for a GPU, population statistics and an evaluation."""
    expected = train(images, tmp_path, name, "cpu").model.state_dict()
    with pretend_cuda():
        model = train(images, tmp_path, name, "cuda").model
        assert {value.device for value in model.state_dict().values()} == {CUDA}
        actual = {key: value.cpu() for key, value in model.state_dict().items()}
    # (A bias before BN has no gradient but rounding.)
    close = {k: torch.allclose(actual[k], v, rtol=1e-3, atol=1e-5) for k, v in expected.items()}
    assert all(close.values()), [key for key, is_close in close.items() if not is_close]


@pytest.mark.usefixtures("own_catalogs")
def test_measurements_on_a_gpu(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe, the diagnosis and a recalibration."""

    def begin(cfg: CfgNode, args: object, folder: str, *, quiet: bool) -> CfgNode:
        """Without the look for a GPU."""
        register_datasets(cfg)
        return cfg

    for module in (diagnosis, recalibration):
        monkeypatch.setattr(module, "begin", begin)

    def run(tool: str, measure: Callable[[Any], Any], *flags: object) -> Any:
        args = cli.parse([tool, *map(str, (*flags, *options))])
        if tool == "recalibrate":
            recalibration.choose_workers(args)
        return measure(args)

    trained = train(images, tmp_path, "BN of virtual workers", "cpu")
    config = tmp_path / "config.yaml"
    config.write_text(trained.cfg.dump())
    options = ("MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", tmp_path / "cpu/model_final.pth")
    options += ("BN.LEAKAGE.RESAMPLES", 20, "DATASETS.TEST", f"('{images.name}_train',)")
    folder, output = tmp_path / "diagnosis", tmp_path / "precise.pth"
    folder.mkdir()
    with pretend_cuda():
        flags = ("--config-file", config, "--quick", "--output-dir", folder)
        assert run("diagnose", diagnosis.diagnose, *flags) in (0, 1)
        run("recalibrate", recalibration.recalibrate, "--config-file", config, "--output", output)
    assert (folder / "diagnosis.json").exists() and output.exists()
    tensors = torch.load(output, weights_only=True)["model"]
    assert all(value.device.type == "cpu" for value in tensors.values())


def test_any_detector_on_a_gpu() -> None:
    """Measured, diagnosed with a trial, and recalibrated as on a CPU."""

    def results(model: nn.Module) -> tuple[Any, ...]:
        model.roi_heads.box_head[0][1].running_mean.fill_(5.0)
        torch.manual_seed(0)
        leak = bn_detection.measure_leakage(model, items(), images_per_worker=2)
        diagnosis = bn_detection.diagnose(model, items(), images_per_worker=1)
        bn_detection.recalibrate(model, items(labels=False))
        state = model.state_dict()
        (device,) = {value.device.type for value in state.values()}
        assert "BN103" in {one.id for one in (*diagnosis.findings, *diagnosis.notes)}
        assert not diagnosis.left_out
        values = {mode: metrics["box_ap"].value for mode, metrics in leak.modes.items()}
        titles = [one.title for one in (*diagnosis.findings, *diagnosis.notes)]
        return device, values, titles, {key: value.cpu() for key, value in state.items()}

    on_the_cpu = results(tiny_rcnn())
    with pretend_cuda():
        on_gpu = results(tiny_rcnn().to("cuda"))
    assert (on_the_cpu[0], on_gpu[0]) == ("cpu", "cuda")
    assert on_gpu[1:3] == on_the_cpu[1:3]
    torch.testing.assert_close(on_gpu[3], on_the_cpu[3])
