"""The probe on detections against evaluations by hand, and against the probe on fixed RoIs."""

from __future__ import annotations

import copy
import io
import json
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from reference import shuffled
from test_inference_partition import detector
from test_probe import PLAIN, _Relative, build, config
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from bn_detection import ConfigError, cli
from bn_detection.data import build_test_loader, make_leaky_shapes
from bn_detection.leakage import (
    DetectionReport,
    measure_detections,
    measure_leakage,
    measure_own_detections,
)
from bn_detection.norm import set_inference
from bn_detection.study.results import _add_probe

IMAGES = 20
LAYER = "roi_heads.box_head.norm"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed_detections")
    make_leaky_shapes(folder / "plain", IMAGES, seed=7, config=PLAIN, split="val")
    return folder


def cfg_of(data: Path, *more: object) -> Any:
    return config(
        data,
        *("BN.LEAKAGE.IMAGES_PER_WORKER", 1, "BN.LEAKAGE.RESAMPLES", 100),
        *("BN.LEAKAGE.SHUFFLED_IMAGES", 8, "MODEL.MASK_ON", False),
        *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 6),
        *more,
        split="plain",
    )


class Objects(nn.Module):
    """Proposes the boxes of the objects of an image, which it knows by its pixels."""

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        super().__init__()
        records = {r["image_id"]: r for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])}
        self.boxes: dict[float, Tensor] = {}
        for (item,) in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
            boxes = [
                BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
                for x in records[item["image_id"]]["annotations"]
            ]
            image = model.preprocess_image([item]).tensor[0]
            self.boxes[self.key(image)] = torch.tensor(boxes)

    def key(self, image: Tensor) -> float:
        return round(float(image.double().sum()), 4)

    def forward(self, images: Any, features: Any, instances: Any) -> tuple[list[Instances], dict]:
        found = [self.boxes[self.key(image)] for image in images.tensor]
        return [
            Instances(
                (128, 128), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes))
            )
            for boxes in found
        ], {}


def leaky(cfg: Any) -> nn.Module:
    """Classifies by the brightness of an object relative to its normalization batch."""
    model = build(cfg).eval()
    with torch.no_grad():
        for conv in model.backbone.convs:  # passes the brightness on
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = 1
            conv.bias.zero_()
        model.backbone.convs[0].bias.fill_(3)
        model.roi_heads.box_head = _Relative()
        predictor = model.roi_heads.box_predictor
        levels = (torch.arange(4) - 1.5) * 22 / 24.9
        for parameter in predictor.parameters():
            parameter.zero_()
        predictor.cls_score.weight[:4, 0] = 2 * levels
        predictor.cls_score.bias[:4] = -(levels**2)
        predictor.cls_score.bias[4] = -100
    return model


def by_objects(cfg: Any, model: nn.Module) -> nn.Module:
    model.proposal_generator = Objects(cfg, model)
    return model.eval()


def detections(model: nn.Module, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        result
        for item, output in zip(batch, model(batch), strict=True)
        for result in instances_to_coco_json(output["instances"], item["image_id"])
    ]


def batches_of(cfg: Any, sizes: list[int]) -> list[list[dict[str, Any]]]:
    """In the order of the ids, by which COCO's evaluation orders detections of equal scores."""
    images = iter(build_test_loader(cfg, cfg.DATASETS.TEST[0]))
    return [[item for (item,) in islice(images, size)] for size in sizes]


def annotations(cfg: Any) -> Path:
    ((_, file, _),) = cfg.DATASETS.COCO_JSON
    return Path(file)


def coco_ap(file: Path, found: list[dict[str, Any]], images: list[int]) -> float:
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        names = {category["name"]: category["id"] for category in truth.loadCats(truth.getCatIds())}
        assert sorted(names.values()) == [1, 2, 3, 4]
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


def by_hand(
    model: nn.Module, batches: list[list[dict[str, Any]]], mode: str, images: int
) -> list[dict[str, Any]]:
    """With the layer's own forward replaced, and images one by one where that is enough."""
    model = copy.deepcopy(model)
    layer, found = model.get_submodule(LAYER), []
    kept = (layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def of_batch(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, *kept[2:], training=True)

    def of_random(x: Tensor, window: int) -> Tensor:
        workers = len(batches[window]) // images
        (ids,) = shuffled([len(x)], workers, seed=window, name="", iteration=0, call=0)
        y = torch.empty_like(x)
        for group in range(workers):
            y[ids == group] = of_batch(x[ids == group])
        return y

    for window, batch in enumerate(batches):
        size = {"shuffle": len(batch), "worker": images}.get(mode, 1)
        layer.forward = {
            "population": lambda x: batch_norm(x, *kept),
            "shuffle": partial(of_random, window=window),
        }.get(mode, of_batch)
        for start in range(0, len(batch), size):
            with torch.no_grad():
                found += detections(model, batch[start : start + size])
    return [{**result, "category_id": result["category_id"] + 1} for result in found]


@pytest.mark.parametrize("images", [1, 2])
def test_each_partition_is_what_an_evaluation_by_hand_gives(data: Path, images: int) -> None:
    cfg = cfg_of(data)
    model = by_objects(cfg, leaky(cfg))
    batches = batches_of(cfg, [8, 12])
    modes = ("image", "worker", "shuffle", "population")
    calls = []

    def detect(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        calls.append(len(batch))
        found = detections(model, batch)
        return [{**result, "category_id": result["category_id"] + 1} for result in found]

    report = measure_detections(
        model, iter(batches), detect, annotations(cfg), modes, images_per_worker=images
    )
    assert calls == [8] * 4 + [12] * 4
    ids = [item["image_id"] for batch in batches for item in batch]
    expected = {
        mode: coco_ap(annotations(cfg), by_hand(model, batches, mode, images), ids)
        for mode in modes
    }
    found = {mode: values["box_ap"].value for mode, values in report.modes.items()}
    # Objects of the same brightness differ in their scores by rounding alone.
    assert found == pytest.approx(expected, abs=0.02)
    assert expected["worker"] > expected["shuffle"] + 5
    differences = {
        "leakage": expected["worker"] - expected["shuffle"],
        "inconsistency": expected["worker"] - expected["population"],
        "staleness": expected["shuffle"] - expected["population"],
    }
    for name, value in differences.items():
        assert getattr(report, name)["box_ap"].value == pytest.approx(value, abs=0.02)
    assert report.leakage["box_ap"].has_interval
    assert (report.images, report.windows, report.batch_norms) == (IMAGES, 2, [LAYER])
    assert report.own_share == pytest.approx(100 * images * 2 / IMAGES)
    assert "leakage = worker - shuffle" in report.text()


def test_both_probes_agree_in_sign_and_order(data: Path) -> None:
    cfg = cfg_of(data, "BN.MODULES", ["roi_heads.*"])
    model = leaky(cfg)
    rois = measure_leakage(cfg, model)
    own = measure_own_detections(cfg, by_objects(cfg, model))
    names = {"own_image": "image", "shuffled": "shuffle", "population": "population"}
    for metric in ("accuracy", "box_ap"):
        on_rois = {names[m]: v[metric].value for m, v in rois.modes.items() if m in names}
        detected = {mode: values["box_ap"].value for mode, values in own.modes.items()}
        assert max(on_rois, key=on_rois.get) == max(detected, key=detected.get) == "image"
        for kind in ("leakage", "inconsistency"):
            assert getattr(rois, kind)[metric].value > 5
            assert getattr(own, kind)["box_ap"].value > 5
    assert own.windows == 2 and own.images == IMAGES


def test_masks_are_measured_where_there_are_any(data: Path) -> None:
    cfg = cfg_of(data, "MODEL.MASK_ON", True)
    model = by_objects(cfg, leaky(cfg))
    report = measure_own_detections(cfg, model)
    assert report.modes["image"].keys() == {"box_ap", "mask_ap"}
    assert measure_own_detections(cfg_of(data), model).leakage.keys() == {"box_ap", "mask_ap"}
    boxes = measure_own_detections(cfg_of(data), by_objects(cfg, leaky(cfg_of(data))))
    assert boxes.modes["image"].keys() == {"box_ap"}


def test_the_order_of_the_file_is_no_matter(data: Path, tmp_path: Path) -> None:
    cfg = cfg_of(data)
    content = json.loads(annotations(cfg).read_text())
    model, reports = by_objects(cfg, leaky(cfg)), []
    for name in ("as_it_is", "backwards"):
        if name == "backwards":  # Detectron2 sorts by id
            for record, key in [
                *((image, "id") for image in content["images"]),
                *((annotation, "image_id") for annotation in content["annotations"]),
            ]:
                record[key] = 1000 - record[key]
            content["images"].reverse()
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        entry = [f"d_{name}", str(tmp_path / f"{name}.json"), str(data / "plain" / "images")]
        other = cfg_of(
            data,
            *("DATASETS.COCO_JSON", [entry], "DATASETS.TEST", (f"d_{name}",)),
            *("DATASETS.TRAIN", (f"d_{name}",), "BN.LEAKAGE.NUM_IMAGES", 17),
        )
        reports.append(measure_own_detections(other, model).to_json() | {"dataset": ""})
    assert reports[0] == reports[1]
    assert reports[0]["images"] == 17 and reports[0]["on"] == "detections"


def test_the_model_and_the_generators_are_untouched(data: Path) -> None:
    cfg = cfg_of(data)
    model = by_objects(cfg, leaky(cfg))
    set_inference(model, "batch", ["*"], partition="shuffle")
    model.train()
    modules = dict(model.named_modules())
    hooks = {name: len(m._forward_pre_hooks) for name, m in modules.items()}
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first = measure_own_detections(cfg, model)
    assert dict(model.named_modules()) == modules and model.training
    assert hooks == {name: len(m._forward_pre_hooks) for name, m in modules.items()}
    layer = model.get_submodule(LAYER)
    assert layer.inference == "batch" and layer.inference_scope is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    set_inference(model, "population", ["*"])
    assert first.to_json() == measure_own_detections(cfg, model).to_json()
    plain = by_objects(cfg, leaky(cfg))
    assert first.to_json() == measure_own_detections(cfg, plain).to_json()
    assert type(plain.get_submodule(LAYER)) is nn.BatchNorm2d
    assert not plain._forward_pre_hooks


def test_feature_maps_are_compared_with_those_of_other_images(tmp_path: Path) -> None:
    make_leaky_shapes(tmp_path / "val", 4, seed=5, split="val")
    cfg = detector(tmp_path, "retinanet", 1)
    model = build(cfg).eval()
    set_inference(model, "population", ["*"])
    batches, outputs = batches_of(cfg, [3, 1]), []

    def detect(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs.append(detections(model, batch))
        return [{**result, "category_id": result["category_id"] + 1} for result in outputs[-1]]

    report = measure_detections(model, batches, detect, annotations(cfg))
    assert len(report.batch_norms) > 2
    set_inference(model, "batch", ["*"])
    with torch.no_grad():
        alone = [result for item in batches[0] for result in detections(model, [item])]
        together = detections(model, batches[0])
    for found, expected in zip(outputs[:2], (alone, together), strict=True):
        assert [x["score"] for x in found] == pytest.approx([x["score"] for x in expected])
    assert [x["score"] for x in alone] != pytest.approx([x["score"] for x in together])


def test_a_detector_without_batch_norm_is_evaluated_once(data: Path) -> None:
    cfg = cfg_of(data)
    model = by_objects(cfg, leaky(cfg))
    model.roi_heads.box_head.norm = nn.InstanceNorm2d(1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    report = measure_own_detections(cfg, model)
    assert len(calls) == report.windows == 2
    assert report.batch_norms == [] and "no BN layer" in report.text()
    assert report.leakage["box_ap"].value == report.inconsistency["box_ap"].value == 0


def small() -> tuple[nn.Module, dict[str, Any]]:
    truth = {
        "images": [{"id": "a", "height": 8, "width": 8}, {"id": "b", "height": 8, "width": 8}],
        "annotations": [
            {"id": 1, "image_id": "a", "category_id": 3, "bbox": [0, 0, 4, 4], "area": 16},
        ],
        "categories": [{"id": 3, "name": "x"}],
    }
    return nn.Sequential(nn.BatchNorm2d(3)), truth


def found_in(batch: list[Any], **more: Any) -> list[dict[str, Any]]:
    result = {"image_id": "a", "category_id": 3, "bbox": [0, 0, 4, 4], "score": 0.5}
    return [{**result, **more}] if "'a'" in str(batch) else []


def test_a_loader_of_pairs_of_image_and_target() -> None:
    """As torchvision's references give them; ids of any kind."""
    model, truth = small()
    pairs = [
        [(torch.zeros(3, 8, 8), {"image_id": "a"})],
        [(torch.zeros(3, 8, 8), {"image_id": "b"})],
    ]
    report = measure_detections(model, pairs, lambda b: found_in([x[1] for x in b]), truth)
    assert isinstance(report, DetectionReport)
    assert report.modes["image"]["box_ap"].value == 100
    assert (report.images, report.objects, report.windows) == (2, 1, 2)


def test_a_study_reads_it_as_it_reads_the_other_probe() -> None:
    model, truth = small()
    batches = [[{"image_id": "a"}], [{"image_id": "b"}]]
    report = measure_detections(model, batches, found_in, truth)
    collected = Mock()
    _add_probe(collected, Mock(), report.to_json())
    names = {call.args[0] for call in collected.add.call_args_list}
    modes = {f"box AP, {mode}" for mode in ("own image", "shuffled", "population")}
    assert names == modes | {"leakage in box AP", "inconsistency in box AP"}


@pytest.mark.parametrize(
    ("batches", "more", "message"),
    [
        ([], {}, "has no batch"),
        ([[{"image_id": "c"}]], {}, "no image 'c', which a batch has"),
        ([[{"image_id": "b"}]], {}, "none of its 1 images has an object"),
        ([[{"image_id": "a"}]], {"category_id": 1}, "category_id 1; known are 3"),
        ([[{"image_id": "a"}]], {"image_id": "b"}, "image_id 'b'; known are 'a'"),
    ],
)
def test_what_cannot_be_measured(
    batches: list[list[Any]], more: dict[str, Any], message: str
) -> None:
    model, truth = small()
    with pytest.raises(ValueError, match=message):
        measure_detections(model, batches, lambda batch: found_in(batch, **more), truth)


def test_layers_that_are_not_in_the_modules_are_named(data: Path) -> None:
    cfg = cfg_of(data, "BN.MODULES", ["head.*"])
    with pytest.raises(ConfigError, match=r"BN.MODULES \['head.*the 1 BN layers .*box_head"):
        measure_own_detections(cfg, by_objects(cfg, leaky(cfg)))


def test_the_command_measures_detections_where_no_rois_are_known(tmp_path: Path) -> None:
    make_leaky_shapes(tmp_path / "val", 4, seed=5, split="val")
    cfg = detector(tmp_path, "retinanet", 1)
    options = ["DATASETS.COCO_JSON", str(cfg.DATASETS.COCO_JSON)]
    options += ["DATASETS.TEST", str(cfg.DATASETS.TEST), "BN.LEAKAGE.IMAGES_PER_WORKER", "1"]
    for name, on in (("retinanet_shared", []), ("mask_rcnn_bn", ["--on", "detections"])):
        output = tmp_path / f"{name}.json"
        arguments = ["--config-file", f"quickstart/{name}.yaml", "--output", str(output), *on]
        arguments += ["--by-class"]
        assert cli.main(["probe", *arguments, *options]) == 0
        report = json.loads(output.read_text())
        assert report["on"] == "detections" and report["images"] == 4
        assert {of_class["name"][:6] for of_class in report["by_class"]} == {"class_"}
