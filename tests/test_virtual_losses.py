"""Losses averaged over virtual workers, against Detectron2's own on each worker's images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
    build_roi_heads,
)
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from bn_detection import ConfigError, add_bn_detection_config, configure_model
from bn_detection.heads import BNConvDeconvKeypointHead, BNConvUpsampleHead
from bn_detection.heads.virtual_losses import average_losses_over_virtual_workers

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"

CLASSES, KEYPOINTS, SIZE = 3, 5, 64
SHAPE = ShapeSpec(channels=4, height=6, width=6)
# RoIs of each image, and virtual workers: unequal, images with none, workers with none.
CASES = [([5, 2], 2), ([3, 0, 1, 7], 2), ([2, 1, 0, 0, 4, 6], 3), ([0, 4], 2), ([0, 0], 2)]

# Detectron2 computes the mask loss in float32, whatever the logits are.
FLOAT32, FLOAT64 = 1e-6, 1e-12

Factory = Callable[[], nn.Module]


def box_predictor() -> nn.Module:
    return FastRCNNOutputLayers(
        ShapeSpec(channels=144),
        box2box_transform=Box2BoxTransform((1, 1, 1, 1)),
        num_classes=CLASSES,
    )


def mask_head(cls: type = MaskRCNNConvUpsampleHead, num_classes: int = CLASSES) -> nn.Module:
    return cls(SHAPE, num_classes=num_classes, conv_dims=[4, 4], loss_weight=0.7)


def keypoint_head(
    cls: type = KRCNNConvDeconvUpsampleHead, normalizer: str | float = "visible"
) -> nn.Module:
    return cls(
        SHAPE,
        num_keypoints=KEYPOINTS,
        conv_dims=[4],
        loss_weight=0.7,
        loss_normalizer=normalizer,
    )


HEADS: dict[str, Factory] = {
    "box": box_predictor,
    "mask": mask_head,
    "mask, class-agnostic": partial(mask_head, num_classes=1),
    "mask, ours": partial(mask_head, BNConvUpsampleHead),
    "keypoint": keypoint_head,
    "keypoint, per image": partial(keypoint_head, normalizer=3.0),
    "keypoint, ours": partial(keypoint_head, BNConvDeconvKeypointHead),
}


def boxes(count: int) -> Boxes:
    corner = torch.rand(count, 2) * SIZE / 2
    return Boxes(torch.cat([corner, corner + 8 + torch.rand(count, 2) * SIZE / 3], dim=1))


def sampled(count: int, *, background: bool) -> Instances:
    """RoIs of an image as the ROI heads sample them; mask and keypoint heads see no background."""
    instances = Instances((SIZE, SIZE))
    instances.proposal_boxes = boxes(count)
    instances.gt_classes = torch.randint(CLASSES + int(background), (count,))
    instances.gt_boxes = boxes(count)
    instances.gt_masks = BitMasks(torch.rand(count, SIZE, SIZE) > 0.4)
    keypoints = torch.rand(count, KEYPOINTS, 3) * SIZE
    keypoints[..., 2] = torch.randint(3, (count, KEYPOINTS))
    instances.gt_keypoints = Keypoints(keypoints)
    return instances


def losses_of(module: nn.Module, x: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
    """Of the given RoIs; the box losses as the ROI heads ask for them."""
    if isinstance(module, FastRCNNOutputLayers):
        return module.losses(module(x), instances)
    return module(x, instances)


def average_over_calls(
    module: nn.Module, x: Tensor, instances: list[Instances], workers: int
) -> dict[str, Tensor]:
    """What DDP does: each worker calls Detectron2's code on its own images."""
    images, total, first = len(instances) // workers, {}, 0
    for worker in range(workers):
        mine = instances[worker * images : (worker + 1) * images]
        last = first + sum(len(of_image) for of_image in mine)
        for name, loss in losses_of(module, x[first:last], mine).items():
            total[name] = total.get(name, 0) + loss / workers
        first = last
    return total


def gradients(module: nn.Module, x: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all parameters and ``x``, through losses of different weights."""
    total = sum((k + 1) * loss for k, (_, loss) in enumerate(sorted(losses.items())))
    inputs = {**dict(module.named_parameters()), "x": x}
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(inputs.items(), grads, strict=True)
    }


def make(
    factory: Factory, counts: list[int], workers: int
) -> tuple[nn.Module, nn.Module, Tensor, list[Instances]]:
    """A float64 head with virtual losses, the same without, and inputs."""
    torch.manual_seed(0)
    plain = factory().double().train()
    for parameter in plain.parameters():  # Detectron2 begins with zero biases and tiny weights
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(sum(counts), 4, 6, 6, dtype=torch.float64, requires_grad=True)
    instances = [sampled(count, background=factory is box_predictor) for count in counts]
    virtual = nn.ModuleDict({"head": copy.deepcopy(plain)})
    average_losses_over_virtual_workers(virtual, workers)
    return virtual["head"], plain, x, instances


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        error = (actual[name] - right).abs().max() if right.numel() else torch.zeros(())
        assert error <= tolerance * (right.abs().max() if right.numel() else 1), name


@pytest.mark.parametrize(("counts", "workers"), CASES)
@pytest.mark.parametrize("head", HEADS)
def test_losses_and_gradients_are_the_averages_of_separate_calls(
    head: str, counts: list[int], workers: int
) -> None:
    virtual, plain, x, instances = make(HEADS[head], counts, workers)
    with EventStorage():
        actual = losses_of(virtual, x, instances)
        expected = average_over_calls(plain, x, instances, workers)
    tolerance = FLOAT32 if "mask" in head else FLOAT64
    assert_same(actual, expected, tolerance)
    assert_same(gradients(virtual, x, actual), gradients(plain, x, expected), tolerance)


@pytest.mark.parametrize("head", HEADS)
def test_means_over_rois_differ_from_those_of_the_process(head: str) -> None:
    virtual, plain, x, instances = make(HEADS[head], [6, 1], 2)
    with EventStorage():
        averaged, of_process = losses_of(virtual, x, instances), losses_of(plain, x, instances)
    for name, loss in of_process.items():
        is_mean_over_images = head == "keypoint, per image"
        assert torch.allclose(averaged[name], loss) == is_mean_over_images, name


@pytest.mark.parametrize("normalizer", ["visible", 3.0])
def test_a_virtual_worker_without_a_visible_keypoint(normalizer: str | float) -> None:
    factory = partial(keypoint_head, normalizer=normalizer)
    virtual, plain, x, instances = make(factory, [2, 3, 4, 1], 2)
    for of_image in instances[:2]:
        of_image.gt_keypoints.tensor[..., 2] = 0
    with EventStorage() as storage:
        actual = losses_of(virtual, x, instances)
        assert storage.latest().keys() == {"kpts_num_skipped_batches"}
        expected = average_over_calls(plain, x, instances, 2)
    assert actual["loss_keypoint"] > 0
    assert_same(actual, expected, FLOAT64)
    grads = gradients(virtual, x, actual)
    assert_same(grads, gradients(plain, x, expected), FLOAT64)
    assert grads["x"][:5].eq(0).all()


def test_an_image_without_ground_truth() -> None:
    virtual, plain, x, instances = make(box_predictor, [3, 5], 2)
    instances[1].gt_classes.fill_(CLASSES)
    for field in ("gt_boxes", "gt_masks", "gt_keypoints"):
        instances[1].remove(field)
    with EventStorage():
        actual = losses_of(virtual, x, instances)
        assert_same(actual, average_over_calls(plain, x, instances, 2), FLOAT64)


@pytest.mark.parametrize(
    ("head", "names"),
    {
        "box": ["cls_accuracy", "fg_cls_accuracy", "false_negative"],
        "mask": ["accuracy", "false_positive", "false_negative"],
    }.items(),
)
def test_logged_scalars_are_means_over_virtual_workers(head: str, names: list[str]) -> None:
    virtual, plain, x, instances = make(HEADS[head], [5, 7, 4, 2, 3, 6], 3)
    prefix = {"box": "fast_rcnn", "mask": "mask_rcnn"}[head]
    with EventStorage(start_iter=4) as storage, storage.name_scope("stage1"):
        losses_of(virtual, x, instances)
    with EventStorage(start_iter=4) as separate:
        average_over_calls(plain, x, instances, 3)
    for name in names:
        of_workers = [value for value, _ in separate.history(f"{prefix}/{name}").values()]
        assert len(of_workers) == 3
        [(value, iteration)] = storage.history(f"stage1/{prefix}/{name}").values()
        assert iteration == 4
        assert value == pytest.approx(sum(of_workers) / 3)
    assert len(storage.latest()) == len(names)


def test_visualized_masks_reach_the_storage() -> None:
    virtual, _, x, instances = make(mask_head, [2, 3], 2)
    virtual.vis_period = 5
    shown = []
    for iteration in (4, 5):
        with EventStorage(start_iter=iteration) as storage:
            storage.put_image = lambda name, image: shown.append(image)
            losses_of(virtual, x, instances)
    assert len(shown) == 5


@pytest.mark.parametrize("head", ["mask", "keypoint", "mask, ours", "keypoint, ours"])
def test_layers_run_once_and_inference_is_unchanged(head: str) -> None:
    virtual, plain, x, instances = make(HEADS[head], [3, 0, 1, 7], 2)
    rows = []
    first = next(module for module in virtual.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with EventStorage():
        losses_of(virtual, x, instances)
    assert rows == [11]
    for of_image in instances:
        of_image.pred_boxes, of_image.pred_classes = of_image.proposal_boxes, of_image.gt_classes
    # One image: inference knows no virtual workers.
    rows_of_image, field = x[:3].detach(), "pred_masks" if "mask" in head else "pred_keypoints"
    expected = plain.eval()(rows_of_image, copy.deepcopy(instances[:1]))[0].get(field)
    assert torch.equal(virtual.eval()(rows_of_image, instances[:1])[0].get(field), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("head", ["box", "mask", "keypoint"])
def test_a_copy_has_losses_of_its_own(head: str, again: Callable[[nn.Module], nn.Module]) -> None:
    virtual, plain, x, instances = make(HEADS[head], [3, 1], 2)
    assert virtual.state_dict().keys() == plain.state_dict().keys()
    copied = again(virtual)
    # Whatever the copy took from the original would fail.
    vars(virtual).update(loss_weight=None, training=None, _modules={})
    with EventStorage():
        actual = losses_of(copied, x, instances)
        expected = average_over_calls(plain, x, instances, 2)
    assert_same(actual, expected, FLOAT32)
    assert_same(gradients(copied, x, actual), gradients(plain, x, expected), FLOAT32)


# Whole ROI heads.


def roi_heads_config(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    # All proposals are sampled, so nothing is left to chance but their order.
    cfg.MODEL.ROI_HEADS.update({"BATCH_SIZE_PER_IMAGE": 100, "POSITIVE_FRACTION": 1.0})
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.KEYPOINT_ON = name != "Res5ROIHeads"
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        head.update({"CONV_DIM": 4, "NUM_CONV": 1, "POOLER_RESOLUTION": 4})
    cfg.MODEL.ROI_BOX_HEAD.update({"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 8})
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = name == "CascadeROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_KEYPOINT_HEAD.update({"CONV_DIMS": [4], "NUM_KEYPOINTS": KEYPOINTS})
    cfg.MODEL.RESNETS.update({"RES2_OUT_CHANNELS": 2, "WIDTH_PER_GROUP": 2, "NORM": ""})
    return cfg


def ground_truth(count: int) -> Instances:
    """Objects whose keypoints are in their boxes."""
    instances = sampled(count, background=False)
    box, keypoints = instances.gt_boxes.tensor, instances.gt_keypoints.tensor
    place = torch.rand(count, KEYPOINTS, 2)
    keypoints[..., :2] = box[:, None, :2] + place * (box[:, None, 2:] - box[:, None, :2])
    instances.remove("proposal_boxes")
    return instances


def proposed(count: int, targets: Instances) -> Instances:
    """Boxes around the objects, then anywhere."""
    near = targets.gt_boxes.tensor.repeat_interleave(4, dim=0)
    near = near + torch.rand_like(near) * 3
    instances = Instances((SIZE, SIZE))
    instances.proposal_boxes = Boxes.cat([Boxes(near), boxes(count)])
    instances.objectness_logits = torch.zeros(len(instances.proposal_boxes))
    return instances


@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads"])
def test_roi_heads(name: str) -> None:
    torch.manual_seed(0)
    shape = {"p2": ShapeSpec(channels=8, stride=4)}
    plain = build_roi_heads(roi_heads_config(name), shape).double().train()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    virtual = copy.deepcopy(plain)
    average_losses_over_virtual_workers(virtual, 2)
    virtual = copy.deepcopy(virtual)
    x = torch.randn(4, 8, SIZE // 4, SIZE // 4, dtype=torch.float64, requires_grad=True)
    # The second worker's images have no objects in one case.
    for objects in ([2, 1, 0, 3], [2, 1, 0, 0]):
        targets = [ground_truth(count) for count in objects]
        proposals = [proposed(n, t) for n, t in zip([20, 2, 4, 9], targets, strict=True)]
        with EventStorage():
            actual = virtual(None, {"p2": x}, proposals, targets)[1]
            parts = [
                plain(None, {"p2": x[mine]}, proposals[mine], targets[mine])[1]
                for mine in (slice(0, 2), slice(2, 4))
            ]
        expected = {key: (parts[0][key] + parts[1][key]) / 2 for key in parts[0]}
        tasks = {"cls", "box_reg", "mask"} | ({"keypoint"} if name != "Res5ROIHeads" else set())
        assert {key.removeprefix("loss_").partition("_stage")[0] for key in actual} == tasks
        assert all(loss > 0 for loss in expected.values())
        assert_same(actual, expected, FLOAT32)
        assert_same(gradients(virtual, x, actual), gradients(plain, x, expected), FLOAT32)


# What cannot be.


def test_images_that_cannot_be_divided_are_refused_by_name() -> None:
    virtual, _, x, instances = make(box_predictor, [2, 1, 3], 2)
    message = r"head: 3 images .* 2 virtual workers: SOLVER.IMS_PER_BATCH .*BN.VIRTUAL_WORKERS"
    with EventStorage(), pytest.raises(ValueError, match=message):
        losses_of(virtual, x, instances)


def configured(**changes: Any) -> nn.Module:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.merge_from_file(str(QUICKSTART / "mask_rcnn_bn.yaml"))
    cfg.merge_from_list([part for pair in changes["keys"].items() for part in pair])
    model = build_model(cfg)
    if "mask_head" in changes:
        model.roi_heads.mask_head = changes["mask_head"]
    return configure_model(cfg, model)


VIRTUAL = {"BN.VIRTUAL_WORKERS": 2, "BN.VIRTUAL_LOSSES": True}


def test_a_model_without_a_second_stage_is_refused() -> None:
    keys = {**VIRTUAL, "MODEL.META_ARCHITECTURE": "ProposalNetwork"}
    message = r"^BN\.VIRTUAL_LOSSES True .*ProposalNetwork.* set BN\.VIRTUAL_LOSSES False\.$"
    with pytest.raises(ConfigError, match=message):
        configured(keys=keys)


def test_a_head_of_another_kind_is_refused_by_name() -> None:
    message = r"^BN\.VIRTUAL_LOSSES True: roi_heads\.mask_head is a Flatten"
    with pytest.raises(ConfigError, match=message):
        configured(keys=VIRTUAL, mask_head=nn.Flatten())


def test_a_conversion_that_matches_nothing_is_not_blamed_on_the_losses() -> None:
    keys = {**VIRTUAL, "BN.CONVERT": [["neck.*", "BN"]]}
    with pytest.raises(ConfigError, match=r"^BN\.CONVERT \[\['neck") as error:
        configured(keys=keys)
    assert "VIRTUAL_LOSSES" not in str(error.value)
