"""Leakage by class, against pycocotools and numpy."""

from __future__ import annotations

import copy
import io
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_probe import PLAIN, _Relative, coco_problem, features_of, reading
from torch import Tensor, nn

from bn_detection.data import make_leaky_shapes
from bn_detection.estimate import Estimate, resample
from bn_detection.leakage import measure_detections, measure_leakage
from bn_detection.leakage.average_precision import AveragePrecision
from bn_detection.leakage.rois import draw, sample_rois
from bn_detection.leakage.second_stage import SecondStage

WINDOWS = 3  # of detections
IMAGES = 48  # of RoIs
RESAMPLES = 12
CLASSES = {3: "cat", 5: "dog", 7: "rare", 9: "none"}


def by_pycocotools(truth: dict[str, Any], found: list[dict], copies: list[int]) -> list[float]:
    """AP of each category, where some images are there several times; NaN without objects."""

    def of_copies(items: list[dict]) -> list[dict]:
        return [
            {**item, "image_id": new}
            for new, old in enumerate(copies)
            for item in items
            if item["image_id"] == old
        ]

    coco = COCO()
    coco.dataset = {
        "images": [{"id": new} for new, _ in enumerate(copies)],
        "categories": truth["categories"],
        "annotations": [
            {**item, "id": number, "area": item["bbox"][2] * item["bbox"][3]}
            for number, item in enumerate(of_copies(truth["annotations"]), 1)
        ],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(of_copies(copy.deepcopy(found))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # -1 without objects
    means = precision.mean((0, 1))
    return [100 * ap if ap >= 0 else math.nan for ap in means]


def test_ap_of_each_class_is_that_of_pycocotools() -> None:
    images, objects, detections = coco_problem(1)
    truth = {"categories": [{"id": c} for c in range(4)], "annotations": objects}
    weights = np.array([[1] * 7, [2, 0, 1, 0, 3, 1, 0], [0] * 6 + [1]])
    found = AveragePrecision(images, objects, detections, 4, "bbox").by_class(weights)
    expected = [
        by_pycocotools(truth, detections, np.repeat(np.arange(7), row).tolist()) for row in weights
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isnan(found[:, 3]).all() and np.isnan(found[2]).all()


def made_up() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Annotations, and detections by mode: those of cats are the worse the more is shuffled."""
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [{"id": i, "height": 99, "width": 99} for i in range(4 * WINDOWS)],
        "categories": [{"id": number, "name": name} for number, name in CLASSES.items()],
        "annotations": [],
    }
    jitter = {"image": {3: 0.5, 5: 2}, "shuffle": {3: 4, 5: 2}, "population": {3: 4, 5: 3}}
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in jitter}
    for image in range(4 * WINDOWS):
        categories = [3, 5, *rng.choice([3, 5], 3).tolist(), *([7] if image < 4 else [])]
        for place, category in enumerate(categories):
            box = [18 * place + 2, 18 * place + 2, *rng.uniform(12, 16, 2)]
            item = {"image_id": image, "category_id": category}
            of = {"id": len(truth["annotations"]) + 1, "area": box[2] * box[3], "iscrowd": 0}
            truth["annotations"].append({**item, **of, "bbox": box})
            for mode, width in jitter.items():
                near = (np.array(box) + rng.normal(0, width.get(category, 1), 4)).tolist()
                found[mode].append({**item, "bbox": near, "score": rng.random()})
        crowd = {"image_id": image, "category_id": 9, "iscrowd": 1, "bbox": [80, 80, 9, 9]}
        truth["annotations"].append({**crowd, "id": len(truth["annotations"]) + 1, "area": 81})
    return truth, found


def test_on_detections() -> None:
    truth, found = made_up()
    batches = [[{"image_id": 4 * w + k} for k in range(4)] for w in range(WINDOWS)]
    calls = iter(list(found) * WINDOWS)

    def detect(batch: list[dict[str, int]]) -> list[dict[str, Any]]:
        ids = {item["image_id"] for item in batch}
        return [item for item in found[next(calls)] if item["image_id"] in ids]

    report = measure_detections(
        nn.BatchNorm2d(1), batches, detect, truth, resamples=RESAMPLES, by_class=True
    )
    weights = np.repeat(resample(WINDOWS, RESAMPLES), 4, 1)
    expected = {
        mode: np.array(
            [
                by_pycocotools(truth, of, np.repeat(np.arange(4 * WINDOWS), row).tolist())
                for row in weights
            ]
        )
        for mode, of in found.items()
    }
    assert [of.name for of in report.by_class] == ["cat", "dog", "rare"]  # none: a crowd alone
    places = {name: place for place, name in enumerate(CLASSES.values())}
    for of in report.by_class:
        units = 1 if of.name == "rare" else WINDOWS
        values = {mode: each[:, places[of.name]] for mode, each in expected.items()}
        for mode, each in values.items():
            same(of.modes[mode]["box_ap"], Estimate.of(each, units))
        own, shuffled, population = values.values()
        same(of.leakage["box_ap"], Estimate.of(own - shuffled, units))
        same(of.inconsistency["box_ap"], Estimate.of(own - population, units))
        same(of.staleness["box_ap"], Estimate.of(shuffled - population, units))
        name = of.name
        assert of.objects == sum(CLASSES[x["category_id"]] == name for x in truth["annotations"])
    cat, _, rare = report.by_class
    assert cat.leakage["box_ap"].low > 5
    assert not rare.leakage["box_ap"].has_interval  # in one window alone
    mean = np.mean([of.leakage["box_ap"].value for of in report.by_class])
    assert report.leakage["box_ap"].value == pytest.approx(mean)
    shown = f"cat {cat.objects} box AP, % {cat.leakage['box_ap'].text(1)}"
    assert shown in " ".join(report.text().split())
    (first, *_) = report.to_json()["by_class"]
    assert first["name"] == "cat" and first["leakage"]["box_ap"]["low"] > 5
    plain = measure_detections(
        nn.BatchNorm2d(1), batches[:1], lambda _: found["image"][:4], truth, ["population"]
    )
    assert plain.by_class == () and plain.to_json()["by_class"] == []
    assert "by class" not in plain.text()


def same(found: Estimate, expected: Estimate) -> None:
    ends = [(of.value, of.low, of.high) for of in (found, expected)]
    np.testing.assert_allclose(*ends, atol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_class")
    make_leaky_shapes(folder / "plain", IMAGES, seed=7, config=PLAIN, split="val")
    return folder


def test_on_rois(data: Path) -> None:
    cfg, model = reading(data, _Relative())
    cfg.BN.LEAKAGE.RESAMPLES = 100
    report = measure_leakage(cfg, model, by_class=True)
    assert report.windows == IMAGES // 8
    heads: Any = model.eval().roi_heads
    correct, rois, objects = np.zeros((2, IMAGES, 4)), np.zeros((IMAGES, 4)), np.zeros(4)
    records = sorted(DatasetCatalog.get(cfg.DATASETS.TEST[0]), key=draw)
    for number, image in enumerate(list(sample_rois(cfg, model, SecondStage(model), records))):
        maps = [features_of(model, image)]
        pooled = heads.box_pooler(maps, [image.proposals.proposal_boxes])
        classes = image.proposals.gt_classes
        for mode, training in enumerate((True, False)):
            with torch.no_grad():
                kept = copy.deepcopy(heads.box_head).train(training)
                logits: Tensor = heads.box_predictor(kept(pooled))[0]
            for true, said in zip(classes.tolist(), logits.argmax(1).tolist(), strict=True):
                if true < 4:
                    correct[mode, number, true] += true == said
                    rois[number, true] += 0.5
        for item in image.record["annotations"]:
            objects[item["category_id"]] += 1
    weights = np.repeat(resample(report.windows, cfg.BN.LEAKAGE.RESAMPLES), 8, 1)
    own, population = 100 * (weights @ correct) / (weights @ rois)
    names = [f"class_{c}" for c in range(4)]
    lows = [of.leakage["accuracy"].low for of in report.by_class]
    assert lows == sorted(lows, reverse=True) and max(lows) > 0
    assert sorted(of.name for of in report.by_class) == sorted(names)
    for of in report.by_class:
        c = names.index(of.name)
        assert of.objects == objects[c]
        same(of.modes["own_worker"]["accuracy"], Estimate.of(own[:, c], report.windows))
        difference = Estimate.of(own[:, c] - population[:, c], report.windows)
        same(of.inconsistency["accuracy"], difference)
        assert of.leakage.keys() == {"accuracy", "box_ap"}
    for mode, metrics in report.modes.items():
        parts = [of.modes[mode]["accuracy"].value for of in report.by_class]
        shares = [rois[:, names.index(of.name)].sum() for of in report.by_class]
        assert metrics["accuracy"].value == pytest.approx(np.average(parts, weights=shares))
        parts = [of.modes[mode]["box_ap"].value for of in report.by_class]
        assert metrics["box_ap"].value == pytest.approx(np.mean(parts))
    assert "Leakage by class:" in report.text()
