"""The probe on every kind of second stage, against the model's own training forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from test_probe import build, config, draw, features_of
from test_records import KEYPOINTS, with_keypoints
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bn_detection.data import make_leaky_shapes
from bn_detection.leakage import measure_leakage
from bn_detection.leakage.rois import ImageRois, sample_rois
from bn_detection.leakage.second_stage import SecondStage
from bn_detection.leakage.window import Window

IMAGES = 4
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.MASK_ON", False),
)
C4 = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']"),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
)
KEYPOINT_HEAD = (
    *KEYPOINTS,
    *("MODEL.ROI_KEYPOINT_HEAD.NAME", "BNConvDeconvKeypointHead", "MODEL.MASK_ON", False),
    *("MODEL.ROI_KEYPOINT_HEAD.NORM", "BN", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)),
    *("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 7, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", True),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    made = make_leaky_shapes(folder / "val", IMAGES, seed=7, split="val")
    content = json.loads(made.annotations.read_text())
    with_keypoints(content)
    for item in content["annotations"]:
        x, y, width, height = item["bbox"]
        item["keypoints"] = [x + width / 2, y + height / 3, 2, x + width / 3, y + height / 2, 1]
    made.annotations.write_text(json.dumps(content))
    return folder


def sampled(cfg: Any, model: nn.Module) -> list[ImageRois]:
    """The RoIs of the probe, with the model then in training mode."""
    records = sorted(DatasetCatalog.get(cfg.DATASETS.TEST[0]), key=draw)[:IMAGES]
    images = list(sample_rois(cfg, model.eval(), SecondStage(model), records))
    model.train()
    return images


def as_given(heads: nn.Module) -> Any:
    """Lets the heads train on the RoIs that they are given."""
    return mock.patch.object(
        heads, "label_and_sample_proposals", lambda proposals, targets: proposals
    )


def maps_of(cfg: Any, model: nn.Module, image: ImageRois) -> dict[str, Tensor]:
    """The feature maps of inference."""
    model.eval()
    name = cfg.MODEL.ROI_HEADS.IN_FEATURES[0]
    maps = {name: features_of(model, image, name)}
    model.train()
    return maps


def test_c4_heads(data: Path) -> None:
    cfg = config(data, *C4)
    model = build(cfg)
    report = measure_leakage(cfg, model)
    losses = {"loss": 0.0, "mask_loss": 0.0}
    images = sampled(cfg, model)
    for image in images:
        with EventStorage(), torch.no_grad(), as_given(model.roi_heads):
            maps = maps_of(cfg, model, image)
            _, found = model.roi_heads(None, maps, [image.proposals], [image.objects])
        losses["loss"] += found["loss_cls"].item() * len(image.proposals)
        losses["mask_loss"] += found["loss_mask"].item() * int(image.foreground.sum())
    own = report.modes["own_image"]
    assert own["loss"].value == pytest.approx(losses["loss"] / report.rois, rel=1e-4)
    expected = losses["mask_loss"] / report.foreground_rois
    assert own["mask_loss"].value == pytest.approx(expected, rel=1e-4)
    assert "roi_heads.res5.2.conv3.norm" in report.batch_norms
    assert "roi_heads.mask_head.mask_fcn1.norm" in report.batch_norms
    for metric in ("loss", "mask_loss"):
        assert len({values[metric].value for values in report.modes.values()}) == 4
    assert not report.left_out


def test_each_stage_of_a_cascade(data: Path) -> None:
    cfg = config(data, *CASCADE)
    model = build(cfg)
    report = measure_leakage(cfg, model, by_class=True)
    heads: Any = model.roi_heads
    losses, correct, foreground = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    of_classes = torch.zeros(2, 4)
    images = sampled(cfg, model)
    for image in images:
        maps = [maps_of(cfg, model, image)["p2"]]
        boxes, truth = image.proposals.proposal_boxes, image.objects
        classes = image.proposals.gt_classes
        for stage, threshold in enumerate(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS):
            head, predictor = heads.box_head[stage], heads.box_predictor[stage]
            if stage:
                overlap, of = pairwise_iou(truth, boxes).max(0)
                classes = torch.where(overlap >= threshold, object_classes(image)[of], 4)
            with torch.no_grad():
                pooled = heads.box_pooler(maps, [boxes])
                logits, _ = predictor(head.train()(pooled))
                _, deltas = predictor(head.eval()(pooled))
            losses[stage] += cross_entropy(logits, classes, reduction="sum")
            is_object = classes < 4
            correct[stage] += ((logits.argmax(1) == classes) & is_object).sum()
            foreground[stage] += is_object.sum()
            right = is_object & (logits.argmax(1) == classes)
            of_classes += torch.stack(
                [classes[x].bincount(minlength=4) for x in (right, is_object)]
            )
            found = predictor.box2box_transform.apply_deltas(deltas, boxes.tensor)
            boxes = type(boxes)(found)
            boxes.clip(image.proposals.image_size)
    own = report.modes["own_image"]
    for stage in range(3):
        expected = losses[stage].item() / report.rois
        assert own[f"loss_stage{stage + 1}"].value == pytest.approx(expected, rel=1e-4)
        accuracy = 100 * (correct[stage] / foreground[stage]).item()
        assert own[f"accuracy_stage{stage + 1}"].value == pytest.approx(accuracy, abs=1e-3)
    assert own["loss"].value == pytest.approx(losses.sum().item() / 3 / report.rois, rel=1e-4)
    assert own["accuracy"].value == pytest.approx(
        100 * (correct.sum() / foreground.sum()).item(), abs=1e-3
    )
    by_class = dict(enumerate((100 * of_classes[0] / of_classes[1]).tolist()))
    assert {
        int(of.name.removeprefix("class_")): of.modes["own_image"]["accuracy"].value
        for of in report.by_class
    } == pytest.approx(by_class, abs=1e-3)
    assert [name.split(".")[2] for name in report.batch_norms] == ["0", "1", "2"]
    assert "stage 2 foreground accuracy" in report.text()


def object_classes(image: ImageRois) -> Tensor:
    annotations = image.record["annotations"]
    return torch.tensor([item["category_id"] for item in annotations])


def test_the_detections_of_a_cascade_are_its_own(data: Path) -> None:
    cfg = config(data, *CASCADE)
    model = build(cfg).eval()
    stage = SecondStage(model)
    image = sampled(cfg, model)[0]
    maps = maps_of(cfg, model, image)
    model.eval()
    with torch.no_grad():
        (expected,), _ = model.roi_heads(None, maps, [image.proposals])
        (rois,) = sample_rois(cfg, model, stage, [image.record])
        outputs = [
            stage.run(part, rois.parts[part].features, [rois.parts[part].instances])
            for part in stage.boxes
        ]
        instances = [[rois.parts[part].instances] for part in stage.boxes]
        ((found, _),) = stage.detections(outputs, instances)
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_a_keypoint_head(data: Path) -> None:
    cfg = config(data, *KEYPOINT_HEAD)
    model = build(cfg)
    with torch.no_grad():
        nn.init.normal_(model.roi_heads.keypoint_head.score_lowres.weight, std=0.3)
    report = measure_leakage(cfg, model)
    loss = visible = 0.0
    for image in sampled(cfg, model):
        with EventStorage(), torch.no_grad():
            losses = model.roi_heads._forward_keypoint(
                maps_of(cfg, model, image), [image.proposals]
            )
        rois = image.proposals[image.foreground]
        _, of_rois = rois.gt_keypoints.to_heatmap(rois.proposal_boxes.tensor, 28)
        number = int(of_rois.sum())
        loss, visible = loss + losses["loss_keypoint"].item() * number, visible + number
    own = report.modes["own_image"]
    assert own["keypoint_loss"].value == pytest.approx(loss / visible, rel=1e-4)
    assert own["keypoint_loss"].value != report.modes["shuffled"]["keypoint_loss"].value
    assert report.batch_norms[-1] == "roi_heads.keypoint_head.conv_fcn1.norm"
    assert not report.left_out


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 100), (1, 100), (2, 0)])
def test_a_keypoint_is_right_in_its_cell_or_beside_it(
    shift: int, accuracy: float, data: Path
) -> None:
    cfg = config(data, *KEYPOINT_HEAD)
    stage = SecondStage(model := build(cfg))
    images = list(
        sample_rois(cfg, model.eval(), stage, DatasetCatalog.get(cfg.DATASETS.TEST[0])[:1])
    )
    ((cells, visible),) = (
        image.gt_keypoints.to_heatmap(image.proposal_boxes.tensor, 28)
        for image in (images[0].parts["keypoint"].instances,)
    )
    away = cells // 28 * 28 + (cells % 28 + shift) % 28
    heatmaps = torch.nn.functional.one_hot(away, 28 * 28).float().unflatten(2, (28, 28))
    scores = Window(images, stage, 1, 0).scores({"keypoint": (heatmaps,)})
    ((right,), (number,)) = scores["keypoint_accuracy"]
    assert number == visible.sum() > 0
    assert right == accuracy * number


class _Sigmoids(FastRCNNOutputLayers):
    """As Detectron2's with USE_SIGMOID_CE, which v0.6 has not."""

    use_sigmoid_ce = True

    def predict_probs(self, predictions: Any, proposals: Any) -> Any:
        return predictions[0].sigmoid().split([len(p) for p in proposals])


def test_a_predictor_with_sigmoids(data: Path) -> None:
    cfg = config(data, "MODEL.MASK_ON", False, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1)
    model = build(cfg)
    model.roi_heads.box_predictor.__class__ = _Sigmoids
    report = measure_leakage(cfg, model)
    loss = correct = 0.0
    for image in sampled(cfg, model):
        maps = [maps_of(cfg, model, image)["p2"]]
        heads, classes = model.roi_heads, image.proposals.gt_classes
        with torch.no_grad():
            pooled = heads.box_pooler(maps, [image.proposals.proposal_boxes])
            logits = heads.box_predictor(heads.box_head(pooled))[0][:, :4]
        targets = torch.stack([(classes == c).float() for c in range(4)], 1)
        loss += binary_cross_entropy_with_logits(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(1) == classes).sum())
    own = report.modes["own_image"]
    assert own["loss"].value == pytest.approx(loss / report.rois, rel=1e-4)
    assert own["accuracy"].value == pytest.approx(100 * correct / report.foreground_rois, rel=1e-6)
    assert own["box_ap"].value > 0
