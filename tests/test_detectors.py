"""Detectors of any library: which rows are which images, how they are called, and back again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torchvision.models import detection
from torchvision.ops import MultiScaleRoIAlign

from bn_detection import (
    BNOptions,
    PartitionedBatchNorm2d,
    convert_norm,
    measure_leakage,
    recalibrate,
    to_plain_batch_norm,
)
from bn_detection.detectors import (
    Detector,
    FormError,
    TorchvisionDetector,
    detector_of,
    register_detector,
)
from bn_detection.detectors import detector as registry
from bn_detection.heads import norm_names
from bn_detection.norm import partition_name

ARCHITECTURES = (
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
)
CLASSES = 3


@cache
def stock(name: str) -> nn.Module:
    """Small in its images and RoIs, in nothing else."""
    torch.manual_seed(0)
    model: Any = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=32, max_size=64
    )
    if hasattr(model, "roi_heads"):
        model.rpn._pre_nms_top_n = {"training": 30, "testing": 30}
        model.rpn._post_nms_top_n = {"training": 12, "testing": 12}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 6
        model.roi_heads.score_thresh = 0.0
    else:
        model.score_thresh, model.topk_candidates = 0.0, 20
    return model


def samples(number: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for k in range(number):
        boxes = torch.tensor([[2.0, 3.0, 16.0, 20.0], [10.0, 12.0, 30.0, 31.0], [1, 20, 12, 31]])
        boxes = boxes[: 2 + k % 2]
        masks = torch.zeros(len(boxes), 32, 40, dtype=torch.uint8)
        masks[:, 5:15, 5:25] = 1
        target = {"image_id": k, "boxes": boxes, "labels": torch.arange(len(boxes)) % 2 + 1}
        made.append((torch.rand(3, 32, 40, generator=generator), {**target, "masks": masks}))
    return made


def layers_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def keep(layer: nn.Module) -> tuple[list[Tensor], Any]:
    """The input and the output of a layer, before what comes next changes them in place."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, y: seen.extend((args[0].clone(), y.clone())))
    return seen, hook


@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torchvision_converts_and_comes_back(name: str) -> None:
    """To every norm, trained, probed, recalibrated, and back to the stock's state_dict."""
    model = stock(name)
    keys = list(model.state_dict())
    adapter = detector_of(model)
    assert (type(adapter), adapter.num_labels) == (TorchvisionDetector, CLASSES)
    # What is near the end takes less time to train.
    parts = ["roi_heads.*"] if hasattr(model, "roi_heads") else ["backbone.body.layer4.2"]
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(parts[0].rstrip("*")))
    batch = samples()
    layers = layers_of(model, nn.BatchNorm2d)
    for norm in norm_names():
        options = BNOptions(virtual_workers=2, ghost_size=3)
        names = convert_norm(model, norm, parts, options=options)
        for _ in range(2):
            train(model, batch)
        if norm == "ShuffleBN":
            found = recalibrate(model, samples(4), modules=names)
            assert set(found.layers) == set(names)
            report = measure_leakage(model, samples(4))
            assert report.modes["shuffle"]["box_ap"].is_known
        if partition_of(norm) is None:
            for key in names:  # there is no way back
                model.set_submodule(key, layers[key])
            continue
        assert set(names) <= set(layers_of(model, PartitionedBatchNorm2d))
        to_plain_batch_norm(model)
        assert list(model.state_dict()) == keys
        assert not layers_of(model, PartitionedBatchNorm2d)


def train(model: nn.Module, batch: list[Any]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    loss = sum(detector_of(model.train()).forward(batch).values())
    loss.backward()
    assert torch.isfinite(loss)
    optimizer.step()


def partition_of(norm: str) -> str | None:
    """What a norm of the BN kinds divides rows by."""
    layers = nn.Sequential(nn.BatchNorm2d(32))
    convert_norm(layers, norm, "*")
    partition = getattr(layers[0], "partition", None)
    return None if partition is None else partition_name(partition)


@pytest.mark.parametrize("head", ["box_head", "mask_head"])
def test_batches_of_images_in_torchvision_heads(head: str) -> None:
    """Each RoI is normalized with those of its image: proposals in the box head, and in the mask
    head the positive ones, counted here by how torchvision splits its losses."""
    model: Any = stock("maskrcnn_resnet50_fpn_v2").train()
    counts: dict[str, list[int]] = {}
    sampled = model.roi_heads.select_training_samples

    def count(*args: Any) -> Any:
        proposals, matched, labels, targets = sampled(*args)
        counts["box_head"] = [len(p) for p in proposals]
        counts["mask_head"] = [int((label > 0).sum()) for label in labels]
        return proposals, matched, labels, targets

    name = f"roi_heads.{head}.0.1"
    convert_norm(model, "ImageBN", "roi_heads.*")
    layer = model.get_submodule(name)
    seen, handle = keep(layer)
    model.roi_heads.select_training_samples = count
    try:
        model([image for image, _ in samples()], [target for _, target in samples()])
    finally:
        handle.remove()
        del model.roi_heads.select_training_samples
        to_plain_batch_norm(model)
    x, y = seen
    assert len(set(counts[head])) > 0 and sum(counts[head]) == len(x)
    apart = [
        batch_norm(part, None, None, layer.weight, layer.bias, True, eps=layer.eps)
        for part in x.split(counts[head])
    ]
    torch.testing.assert_close(y, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_rows_of_the_backbone_are_images() -> None:
    model = stock("fcos_resnet50_fpn").train()
    convert_norm(model, "ImageBN", "backbone.body.layer1.0.bn1")
    layer: Any = model.get_submodule("backbone.body.layer1.0.bn1")
    seen, handle = keep(layer)
    detector_of(model).forward(samples())
    handle.remove()
    to_plain_batch_norm(model)
    x, y = seen
    parts = [batch_norm(row[None], None, None, layer.weight, layer.bias, True) for row in x]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-4, atol=1e-4)


class OwnHead(nn.Module):
    """A head that nobody knows, behind a pooler of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = MultiScaleRoIAlign(["0"], 3, 2)
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
        return self.layers(self.pooler({"0": x}, boxes, [tuple(x.shape[2:])] * len(x)))


def test_poolers_tell_the_images_in_any_model() -> None:
    model = OwnHead()
    convert_norm(model, "ImageBN", "layers")
    x = torch.rand(2, 4, 16, 16)
    boxes = [torch.tensor([[0.0, 0, 8, 8]] * 3), torch.tensor([[4.0, 4, 16, 16], [0, 0, 5, 5]])]
    model(x, boxes)
    with pytest.raises(ValueError, match="partition groups whole images"):
        model.layers(torch.rand(4, 4, 3, 3))


# ----------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """Returns what it is told to."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return self.outputs


BOXES = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (torch.zeros(1, 5), r"gave a tensor of shape \(1, 5\)\. What is needed"),
        ({"loss": 1}, "gave a dict with the keys loss"),
        ([], "gave a list of 0 for 1 images"),
        ([BOXES], r"gave a list of a tensor of shape \(2, 4\)"),
        (
            [{"boxes": BOXES, "scores": BOXES[:, 0]}],
            "gave a dict with the keys boxes, scores, without the tensors lab",
        ),
        (
            [{"boxes": BOXES[:1], "scores": BOXES[:, 0], "labels": BOXES[:, 0]}],
            r"gave boxes of shape \(1, 4\) beside scores of \(2,\)",
        ),
    ],
)
def test_outputs_of_another_form(outputs: Any, message: str) -> None:
    with pytest.raises(FormError, match=f"^Scripted in eval mode {message}.*"):
        detector_of(Scripted(outputs).eval()).detect(samples(1))


def test_the_last_family_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    assert type(detector_of(Scripted([]))) is Detector

    @register_detector("scripted")
    class ScriptedDetector(Detector):
        @classmethod
        def fits(cls, model: nn.Module) -> bool:
            return isinstance(model, Scripted)

    assert type(detector_of(Scripted([]))) is ScriptedDetector
    with pytest.raises(ValueError, match='"scripted" is registered already'):
        register_detector("scripted")(Detector)
