"""The leakage probe against upstream's training forward, pycocotools, and known answers."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.layers import Conv2d
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_diagnose import layer as layer_report
from test_train_net import QUICKSTART
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bn_detection import ConfigError, PartitionedBatchNorm2d, cli
from bn_detection.data import LeakyShapesConfig, make_leaky_shapes
from bn_detection.engine import (
    Trainer,
    argument_parser,
    load_config,
    preflight_probe,
    probe,
)
from bn_detection.engine.setup import register_datasets
from bn_detection.estimate import Ratio, resample
from bn_detection.leakage import (
    Estimate,
    LayerLeakage,
    images_per_worker,
    measure_layers,
    measure_leakage,
)
from bn_detection.leakage.average_precision import AveragePrecision
from bn_detection.leakage.batches import (
    MODES,
    Division,
    normalization_batches,
    normalizing,
    own_shares,
)
from bn_detection.leakage.by_layer_figure import by_layer_figure, by_layer_metrics
from bn_detection.leakage.detections import paste
from bn_detection.leakage.findings import Examined, conclude
from bn_detection.leakage.rois import draw, receptive_margin, sample_rois
from bn_detection.leakage.second_stage import SecondStage, UnknownSecondStage
from bn_detection.leakage.window import Window

IMAGES = 5
PLAIN = LeakyShapesConfig(texture_amplitude=0.0, pixel_noise=0.0, background_std=0.0)
STOCK = (
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(-8.767, -11.881, -5.638), "-8.8 [-11.9, -5.6]"),
        (Estimate(90.04, math.nan, math.nan), "90.0"),
        (Estimate(math.nan, math.nan, math.nan), "-"),
    ],
)
def test_an_estimate_shows_what_it_has(estimate: Estimate, text: str) -> None:
    assert estimate.text(1) == text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    make_leaky_shapes(folder / "val", IMAGES, seed=7, split="val")
    make_leaky_shapes(folder / "plain", 40, seed=7, config=PLAIN, split="val")
    return folder


def config(data: Path, *more: object, norm: str = "bn", split: str = "val") -> Any:
    name, folder = f"{data.name}_{split}", data / split
    options: dict[str, object] = {
        "DATASETS.COCO_JSON": [[name, f"{folder}/annotations.json", f"{folder}/images"]],
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,),
        "OUTPUT_DIR": data / "output",
        "BN.LEAKAGE.RESAMPLES": 20,
        "BN.LEAKAGE.IMAGES_PER_WORKER": 2,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    }
    values = [str(part) for pair in options.items() for part in pair] + [str(m) for m in more]
    file = str(QUICKSTART / f"mask_rcnn_{norm}.yaml")
    cfg = load_config(argument_parser().parse_args(["--config-file", file, *values]))
    register_datasets(cfg)
    return cfg


def build(cfg: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_score" in name or "mask_head.predictor.weight" in name:
                parameter.normal_(std=0.3)  # predictions that differ from RoI to RoI
    return model


def test_own_image_is_what_upstream_computes_in_training(data: Path) -> None:
    cfg = config(data)
    model = build(cfg)
    report = measure_leakage(cfg, model)
    assert report.images == 4  # whole workers of 2
    totals = dict.fromkeys(("loss", "correct", "mask_loss", "mask_correct"), 0.0)
    rois = foreground = 0
    model.eval()
    records = sorted(DatasetCatalog.get(cfg.DATASETS.TEST[0]), key=draw)[:4]
    sampled = list(sample_rois(cfg, model, SecondStage(model), records))
    model.train()
    for image in sampled:
        levels = {"p2": features_of(model, image)}
        number, positive = len(image.proposals), int(image.foreground.sum())
        with EventStorage() as storage, torch.no_grad():
            losses = model.roi_heads._forward_box(levels, [image.proposals])
            losses |= model.roi_heads._forward_mask(levels, [image.proposals])
            seen = {name: value for name, (value, _) in storage.latest().items()}
        rois, foreground = rois + number, foreground + positive
        totals["loss"] += losses["loss_cls"].item() * number
        totals["mask_loss"] += losses["loss_mask"].item() * positive
        totals["correct"] += seen["fast_rcnn/fg_cls_accuracy"] * positive
        totals["mask_correct"] += seen["mask_rcnn/accuracy"] * positive
    own = report.modes["own_image"]
    assert (report.rois, report.foreground_rois) == (rois, foreground)
    assert own["loss"].value == pytest.approx(totals["loss"] / rois, rel=1e-5)
    assert own["accuracy"].value == pytest.approx(100 * totals["correct"] / foreground, abs=1e-6)
    assert own["mask_loss"].value == pytest.approx(totals["mask_loss"] / foreground, rel=1e-5)
    assert own["mask_accuracy"].value == pytest.approx(
        100 * totals["mask_correct"] / foreground, abs=0.01
    )
    assert own["loss"].value != pytest.approx(report.modes["own_worker"]["loss"].value, rel=1e-3)


def features_of(model: nn.Module, image: Any, name: str = "p2") -> Tensor:
    pixels = read_image(image.record["file_name"], format="BGR").copy()
    item = {"image": torch.as_tensor(pixels.transpose(2, 0, 1))}
    with torch.no_grad():
        return model.backbone(model.preprocess_image([item]).tensor)[name]


def test_the_model_and_the_generators_are_untouched(data: Path) -> None:
    cfg = config(data)
    model = build(cfg).train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    topk = dict(model.proposal_generator.post_nms_topk)
    state = torch.get_rng_state()
    report = measure_leakage(cfg, model)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert topk == model.proposal_generator.post_nms_topk
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert report.to_json() == measure_leakage(cfg, model).to_json()


def test_stock_heads_with_the_same_weights_give_the_same_report(data: Path) -> None:
    ours = build(config(data))
    expected = measure_leakage(config(data), ours).to_json()
    assert expected["leakage"]["loss"]["value"] != 0
    for norm in ("BN", "SyncBN"):
        norms = (*("MODEL.ROI_BOX_HEAD.NORM", norm), *("MODEL.ROI_MASK_HEAD.NORM", norm))
        cfg = config(data, *STOCK, *norms)
        stock = build(cfg)
        stock.load_state_dict(ours.state_dict())
        assert not any(isinstance(layer, PartitionedBatchNorm2d) for layer in stock.modules())
        assert_close(measure_leakage(cfg, stock).to_json(), expected)
    for partition in ("forward", "image"):
        options = ("BN.INFERENCE", "batch", "BN.INFERENCE_PARTITION", partition)
        cfg = config(data, *options, norm="shuffle")
        converted = build(cfg)
        converted.load_state_dict(ours.state_dict())
        assert_close(measure_leakage(cfg, converted).to_json(), expected)


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    else:
        assert found == expected


class _Between(StandardROIHeads):
    """With a convolution between the pooler and the box head."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.between = Conv2d(64, 64, 3, padding=1, norm=nn.BatchNorm2d(64))

    def _forward_box(self, features: dict, proposals: list) -> Any:
        maps = [features[f] for f in self.box_in_features]
        pooled = self.added(self.box_pooler(maps, [x.proposal_boxes for x in proposals]), maps)
        predictions = self.box_predictor(self.box_head(pooled))
        if self.training:
            return self.box_predictor.losses(predictions, proposals)
        return self.box_predictor.inference(predictions, proposals)[0]

    def added(self, pooled: Tensor, maps: list[Tensor]) -> Tensor:
        return self.between(pooled)


class _LooksAround(_Between):
    """With the mean of the feature map in every RoI."""

    def added(self, pooled: Tensor, maps: list[Tensor]) -> Tensor:
        return pooled + maps[0].mean((2, 3), keepdim=True)


def own_heads(model: nn.Module, heads: type[nn.Module]) -> nn.Module:
    """The model with heads of one's own class, and the parts of its own."""
    stock, options = model.roi_heads, {}
    for name in ("box_in_features", "box_pooler", "box_head", "box_predictor", "num_classes"):
        options[name] = getattr(stock, name)
    for name in ("batch_size_per_image", "positive_fraction", "proposal_matcher"):
        options[name] = getattr(stock, name)
    torch.manual_seed(1)
    model.roi_heads = heads(**options)
    return model


def test_what_a_subclass_adds_to_the_box_head_is_run(data: Path) -> None:
    cfg = config(data, "MODEL.MASK_ON", False)
    model = own_heads(build(cfg), _Between)
    between = model.roi_heads.between
    report = measure_leakage(cfg, model)
    assert report.batch_norms[-1] == "roi_heads.between.norm"
    assert report.modes["own_image"]["loss"].value == pytest.approx(
        training_loss(cfg, model, "own_image"), rel=1e-5
    )
    with torch.no_grad():
        between.weight.zero_()
    changed = measure_leakage(cfg, model)
    for mode in MODES:
        assert changed.modes[mode]["loss"].value != report.modes[mode]["loss"].value


def test_heads_that_look_at_more_than_their_rois_are_refused(data: Path) -> None:
    cfg = config(data, "MODEL.MASK_ON", False)
    with pytest.raises(UnknownSecondStage, match=r"box part of a _LooksAround gives other outputs"):
        measure_leakage(cfg, own_heads(build(cfg), _LooksAround))


def training_loss(cfg: Any, model: nn.Module, mode: str) -> float:
    """The loss of the classes in training, image by image, of the RoIs that the probe samples."""
    model.eval()
    records = sorted(DatasetCatalog.get(cfg.DATASETS.TEST[0]), key=draw)[:4]
    sampled = list(sample_rois(cfg, model, SecondStage(model), records))
    model.train()
    total = rois = 0.0
    for image in sampled:
        with EventStorage(), torch.no_grad():
            losses = model.roi_heads._forward_box(
                {"p2": features_of(model, image)}, [image.proposals]
            )
        total += losses["loss_cls"].item() * len(image.proposals)
        rois += len(image.proposals)
    return total / rois


def test_heads_without_batch_statistics_leak_nothing(data: Path) -> None:
    cfg = config(data, norm="gn")
    report = measure_leakage(cfg, build(cfg))
    assert report.batch_norms == []
    assert "no BN layer" in report.text()
    assert {*report.modes["shuffled"]} == {"accuracy", "loss", "box_ap"}
    for differences in (report.leakage, report.inconsistency, report.staleness):
        assert all(difference.value == 0 for difference in differences.values())


def test_a_head_that_ignores_its_normalized_values_leaks_nothing(data: Path) -> None:
    cfg = config(data)
    model = build(cfg)
    for layer in model.modules():
        if isinstance(layer, PartitionedBatchNorm2d):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, 0.5)
    report = measure_leakage(cfg, model)
    assert report.batch_norms == [
        name for name, m in model.named_modules() if isinstance(m, PartitionedBatchNorm2d)
    ]
    assert report.leakage["loss"].value == pytest.approx(0, abs=1e-6)
    assert report.leakage["box_ap"].value == pytest.approx(0, abs=1e-6)
    assert report.inconsistency["mask_loss"].value == pytest.approx(0, abs=1e-6)


class _Relative(nn.Module):
    """Shows the brightness of the middle of an RoI, relative to its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.norm.running_mean.fill_(3 + (128 - 110) / 50)
        self.norm.running_var.fill_((40**2 + 24.6**2 + 4**2) / 50**2)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.norm(x[:, :1, 2:5, 2:5]).mean((1, 2, 3))
        return nn.functional.pad(middle[:, None], (0, 255))


def reading(data: Path, head: nn.Module) -> tuple[Any, nn.Module]:
    """A model whose box head sees brightness alone, and the class that it shows, if any."""
    cfg = config(
        data,
        *("BN.LEAKAGE.IMAGES_PER_WORKER", 1, "BN.LEAKAGE.RESAMPLES", 300),
        *("MODEL.MASK_ON", False, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 6),
        split="plain",
    )
    model = build(cfg)
    with torch.no_grad():
        for conv in model.backbone.convs:  # passes the brightness on
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = 1
            conv.bias.zero_()
        model.backbone.convs[0].bias.fill_(3)
        model.roi_heads.box_head = head
        predictor = model.roi_heads.box_predictor.cls_score
        levels = (torch.arange(4) - 1.5) * 22 / 24.9  # of the classes, in standard deviations
        predictor.weight.zero_()
        predictor.weight[:4, 0] = 2 * levels
        predictor.bias[:4] = -(levels**2)
        predictor.bias[4] = -100
    return cfg, model


def test_a_head_that_reads_its_batch(data: Path) -> None:
    head = _Relative()
    cfg, model = reading(data, head)
    report = measure_leakage(cfg, model)
    assert report.batch_norms == ["roi_heads.box_head.norm"]
    assert report.batch_sizes["own_worker"] == 6
    assert head.norm.running_mean.item() == pytest.approx(3.36)
    own, shuffled = simulated_accuracies()
    accuracy = {mode: values["accuracy"] for mode, values in report.modes.items()}
    assert accuracy["own_worker"].low < own < accuracy["own_worker"].high
    assert accuracy["shuffled"].low < shuffled < accuracy["shuffled"].high
    assert report.leakage["accuracy"].low < own - shuffled < report.leakage["accuracy"].high
    assert report.leakage["accuracy"].low > 5
    assert report.inconsistency["accuracy"].low > 5
    limit = report.limit
    assert (limit.cue, limit.method) == ("leaky cue", "closed form")
    assert limit.limit == pytest.approx(41.17, abs=0.01)
    assert limit.above.low > 0
    assert "points above" in report.text()


class _OneOfTwo(nn.Module):
    """Reads its batch in its second layer; what the first one shows is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.blind, self.reads = nn.BatchNorm2d(1), _Relative()
        nn.init.zeros_(self.blind.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.reads(x + self.blind(x[:, :1]))


def test_the_layer_that_leaks_is_the_one_that_reads(data: Path) -> None:
    cfg, model = reading(data, _OneOfTwo())
    cfg.BN.LEAKAGE.NUM_IMAGES = 32
    report = measure_leakage(cfg, model, by_layer=True)
    blind, reads = report.by_layer
    assert [layer.name.split("box_head.")[1] for layer in report.by_layer] == [
        "blind",
        "reads.norm",
    ]
    for metric in ("accuracy", "loss"):
        leak = report.leakage[metric].value
        assert reads.removed[metric].value == pytest.approx(leak, abs=1e-6)
        assert reads.alone[metric].value == pytest.approx(leak, abs=1e-6)
        assert blind.removed[metric].value == pytest.approx(0, abs=1e-6)
        assert blind.alone[metric].value == pytest.approx(0, abs=1e-6)
    assert reads.removed["accuracy"].low > 1
    assert reads.leaks("accuracy", 1) and not blind.leaks("accuracy", 1)
    assert measure_layers(cfg, model, ["accuracy"]) == report.by_layer
    assert measure_layers(cfg, model, ["mask_accuracy"]) == []
    assert report.to_json()["by_layer"][1]["name"] == reads.name
    assert LayerLeakage.from_json(reads.to_json()) == reads
    assert f"{reads.name}  foreground accuracy, %  {reads.removed['accuracy'].text(1)}" in (
        report.text()
    )


def count_convolutions(function: Any) -> list[int]:
    """The channels of each convolution that is computed."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        function()
    return [e.input_shapes[1][0] for e in seen.events() if e.name == "aten::conv2d"]


def test_what_passes_share_is_computed_once(data: Path) -> None:
    cfg = config(data)
    model = build(cfg).eval()
    stage = SecondStage(model)
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:4]
    images = list(sample_rois(cfg, model, stage, records))
    own, foreign = (dict.fromkeys(stage.all_layers, m) for m in ("own_worker", "shuffled"))
    shared = Window(images, stage, 2, 0)
    with torch.no_grad():
        shared.run(own, keep=True)
        changed = own | {"roi_heads.box_head.conv2.norm": "shuffled"}
        changed |= {"roi_heads.mask_head.mask_fcn1.norm": "population"}
        for modes in (own, foreign, changed):
            for part, outputs in Window(images, stage, 2, 0).run(modes).items():
                for one, other in zip(outputs, shared.run(modes)[part], strict=True):
                    assert torch.equal(one, other)
        seen = count_convolutions(lambda: shared.run(changed, ["box"]))
    assert seen == [64, 64]  # of conv3 and conv4


def test_a_finding_names_the_layer_that_leaks(data: Path) -> None:
    cfg, model = reading(data, _OneOfTwo())
    cfg.BN.LEAKAGE.NUM_IMAGES = 32
    report = measure_leakage(cfg, model, by_layer=True).to_json()
    layers = [layer_report(name) for name in report["batch_norms"]]
    found, _ = conclude(
        Examined(cfg, layers, report["batch_norms"], report, workers=2, averages_workers=True)
    )
    assert [finding.id for finding in found] == ["BN201"]
    assert found[0].layers == ("roi_heads.box_head.reads.norm",)
    assert "through 1 of its 2 layers: roi_heads.box_head.reads.norm" in found[0].title
    assert found[0].fix == {"BN": {"CONVERT": [["roi_heads.box_head.reads", "ShuffleBN"]]}}
    by_layer = [item for item in found[0].evidence if item.layer]
    assert [item.metric for item in by_layer] == [
        "by_layer.removed.accuracy",
        "by_layer.alone.accuracy",
    ]
    del report["by_layer"]
    (whole,), _ = conclude(
        Examined(cfg, layers, report["batch_norms"], report, workers=2, averages_workers=True)
    )
    assert whole.layers == tuple(report["batch_norms"])


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_stage2"])
def test_the_figure_has_a_bar_and_an_interval_for_each_difference(metric: str) -> None:
    known, none = Estimate(3.0, 2.0, 4.0), Estimate(1.0)
    layers = [
        LayerLeakage("roi_heads.a", {metric: known}, {metric: none}),
        LayerLeakage("roi_heads.b", {metric: none}, {metric: known}),
        LayerLeakage("roi_heads.of_masks", {"mask_accuracy": none}, {"mask_accuracy": none}),
    ]
    assert by_layer_metrics(layers) == [metric, "mask_accuracy"]
    figure, words = by_layer_figure(layers, metric)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [3, 1, 1, 3]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert sum(len(lines.get_segments()) for lines in axes.collections) == 2
    assert "roi_heads.a: 3.0 [2.0, 4.0] gone without the layer" in words


def test_a_single_layer_leaks_all(data: Path) -> None:
    cfg, model = reading(data, _Relative())
    cfg.BN.LEAKAGE.NUM_IMAGES = 16
    report = measure_leakage(cfg, model, by_layer=True)
    (layer,) = report.by_layer
    assert layer.removed == layer.alone
    assert layer.removed == {key: report.leakage[key] for key in layer.removed}


def simulated_accuracies() -> tuple[float, float]:
    """Of that head, percent, from the brightness of 6 objects of an image, and of any images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=(20000, 6))
    brightness = 22 * (labels - 1.5) + rng.normal(0, 40, (20000, 1)) + rng.normal(0, 4, (20000, 6))
    accuracies = []
    for order in (np.arange(labels.size), rng.permutation(labels.size)):
        b, c = brightness.ravel()[order].reshape(-1, 6), labels.ravel()[order].reshape(-1, 6)
        relative = (b - b.mean(1, keepdims=True)) / b.std(1, keepdims=True)
        nearest = np.abs(relative[..., None] - (np.arange(4) - 1.5) * 22 / 24.9).argmin(-1)
        accuracies.append(100 * (nearest == c).mean())
    return accuracies[0], accuracies[1]


def test_the_order_of_the_file_is_no_matter(data: Path, tmp_path: Path) -> None:
    split = data / "val"
    content = json.loads((split / "annotations.json").read_text())
    reports = []
    for name in ("as_it_is", "backwards"):
        if name == "backwards":  # Detectron2 sorts by id
            for record, key in [
                *((image, "id") for image in content["images"]),
                *((annotation, "image_id") for annotation in content["annotations"]),
            ]:
                record[key] = 1000 - record[key]
            content["images"].reverse()
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        cfg = config(data, "BN.LEAKAGE.IMAGES_PER_WORKER", 1, "BN.LEAKAGE.NUM_IMAGES", 4)
        files = [name, str(tmp_path / f"{name}.json"), str(split / "images")]
        cfg.DATASETS.COCO_JSON, cfg.DATASETS.TEST = [files], (name,)
        register_datasets(cfg)
        reports.append(measure_leakage(cfg, build(cfg)).to_json() | {"dataset": ""})
    assert reports[0]["images"] == 4 < IMAGES
    assert reports[0] == reports[1]


def test_shares_of_the_own_worker() -> None:
    # Two workers of two images; of the first batch three RoIs are of the first worker, one is not.
    batches = [torch.tensor([0, 1, 2, 5]), torch.tensor([3, 4])]
    shares = own_shares(batches, [2, 1, 0, 3], 2)
    assert shares == [0.75, 0.75, 0.75, 0.25, 1, 1]
    assert own_shares([torch.arange(3), torch.arange(3, 6)], [2, 1, 0, 3], 2) == [1] * 6


WINDOWS, WORKERS, OBJECTS = 12, 8, 6


def correct_of_windows(seed: int, windows: int, cast: float) -> np.ndarray:
    """Correct objects, ``(2, windows, WORKERS)``: in the own worker's batch, and shuffled.

    Of a head that tells two classes by the brightness relative to its batch, on images of one
    worker each, whose objects share a cast.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=(windows, WORKERS, OBJECTS))
    brightness = 2 * labels - 1 + rng.normal(0, cast, (windows, WORKERS, 1))
    brightness = brightness + rng.normal(0, 1, labels.shape)
    order = rng.permuted(np.tile(np.arange(WORKERS * OBJECTS), (windows, 1)), axis=1)
    mixed = np.take_along_axis(brightness.reshape(windows, -1), order, 1).reshape(labels.shape)
    bright = (mixed > mixed.mean(2, keepdims=True)).reshape(windows, -1)
    shuffled = np.take_along_axis(bright, np.argsort(order, 1), 1).reshape(labels.shape)
    own = brightness > brightness.mean(2, keepdims=True)
    return np.stack([(guess == labels).sum(2) for guess in (own, shuffled)])


@pytest.mark.parametrize(("cast", "leak"), [(0.0, 0.0), (0.86, 5.0)])
def test_intervals_cover_a_known_leak(cast: float, leak: float) -> None:
    own, shuffled = correct_of_windows(0, 100_000, cast).mean((1, 2)) * 100 / OBJECTS
    assert own - shuffled == pytest.approx(leak, abs=0.3)
    covered = 0
    weights = resample(WINDOWS, 400).repeat(WORKERS, axis=1)
    for repetition in range(1, 201):
        correct = correct_of_windows(repetition, WINDOWS, cast).reshape(2, -1)
        accuracy = [Ratio(100 * c, np.full(c.shape, OBJECTS))(weights) for c in correct]
        found = Estimate.of(accuracy[0] - accuracy[1], WINDOWS)
        covered += found.low <= own - shuffled <= found.high
    assert 0.9 * 200 <= covered <= 0.99 * 200


def test_one_image_a_worker_is_computed_once(data: Path) -> None:
    cfg = config(data, "BN.LEAKAGE.IMAGES_PER_WORKER", 1)
    report = measure_leakage(cfg, build(cfg)).to_json()
    assert report["modes"]["own_image"] == report["modes"]["own_worker"]
    json.dumps(report, allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any),
    per_worker=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(MODES),
)
def test_batches_hold_each_roi_once(counts: list[int], per_worker: int, mode: str) -> None:
    batches = normalization_batches(mode, counts, per_worker, 0)
    assert sorted(torch.cat(batches).tolist()) == list(range(sum(counts)))
    image = np.repeat(np.arange(6), counts)
    for rows in batches:
        images = {image[row] for row in rows.tolist()}
        assert len(images) == 1 or mode != "own_image"
        assert len({i // per_worker for i in images}) == 1 or mode == "shuffled"
    if mode == "shuffled":
        sizes = [len(rows) for rows in batches]
        assert len(batches) == min(6 // per_worker, sum(counts))
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), PartitionedBatchNorm2d(3, partition="shuffle")],
    ids=lambda layer: type(layer).__name__,
)
def test_batches_are_normalized_with_their_own_statistics(layer: nn.Module) -> None:
    layer = nn.Sequential(layer).eval()
    state = copy.deepcopy(layer.state_dict())
    x = 3 + 2 * torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    batches = [torch.tensor([5, 0, 2]), torch.tensor([1, 6, 3, 4])]

    layers = {"0": layer[0]}
    with torch.no_grad(), normalizing(layers, {"0": {7: Division.of(batches)}}):
        found = layer(x)
        with pytest.raises(ConfigError, match=r"0 was given 6 rows, where there are 7 RoIs"):
            layer(x[:6])
    expected = torch.empty_like(x, dtype=torch.double)
    for rows in batches:
        part = x[rows].double()
        var, mean = torch.var_mean(part, (0, 2, 3), correction=0, keepdim=True)
        expected[rows] = (part - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), normalizing(layers, {"0": None}):
        found = layer(x)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def coco_problem(seed: int = 0) -> tuple[list[dict], list[dict], list[dict]]:
    """Images, objects (some crowds) and detections near some of them."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "height": 100, "width": 100} for i in range(7)]
    objects, detections = [], []
    for image in range(6):  # the last has none
        for _ in range(rng.integers(1, 6)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(15, 40, 2)]
            category = int(rng.integers(3))
            crowd = int(rng.random() < 0.15)
            place = {"image_id": image, "category_id": category}
            objects.append({**place, "bbox": box, "iscrowd": crowd})
            for _ in range(rng.integers(0, 3)):
                near = (np.array(box) + rng.normal(0, 2.5, 4)).tolist()
                detections.append({**place, "bbox": near, "score": float(rng.random())})
    for image in range(7):
        place = {"image_id": image, "category_id": int(rng.integers(3))}
        detections.append({**place, "bbox": [1, 1, 30, 30], "score": float(rng.random())})
    return images, objects, detections


def by_pycocotools(images: list[dict], objects: list[dict], detections: list[dict]) -> float:
    truth = COCO()
    truth.dataset = {
        "images": images,
        "categories": [{"id": c} for c in range(3)],
        "annotations": [
            {**item, "id": i, "area": item["bbox"][2] * item["bbox"][3]}
            for i, item in enumerate(objects, 1)
        ],
    }
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_resamples_is_that_of_duplicated_images(seed: int) -> None:
    images, objects, detections = coco_problem(seed)
    ap = AveragePrecision(images, objects, detections, 3, "bbox")
    weights = np.random.default_rng(seed).integers(0, 4, (6, len(images)))
    weights[0] = 1
    found = ap(weights)
    assert found[0] == pytest.approx(by_pycocotools(images, objects, detections), abs=1e-6)
    for row, value in zip(weights[1:], found[1:], strict=True):
        copies = [image for image, count in enumerate(row) for _ in range(count)]

        def duplicated(items: list[dict], copies: list[int] = copies) -> list[dict]:
            return [
                {**item, "image_id": new}
                for new, old in enumerate(copies)
                for item in items
                if item["image_id"] == old
            ]

        expected = by_pycocotools(
            [{**images[old], "id": new} for new, old in enumerate(copies)],
            duplicated(objects),
            duplicated(detections),
        )
        assert value == pytest.approx(expected, abs=1e-6)


def test_recalls_that_are_reached_are_those_of_a_search() -> None:
    images, objects, _ = coco_problem()
    ap = AveragePrecision(images, objects, [], 3, "bbox")
    number = np.repeat(np.arange(1, 401), 401).reshape(400, 401)
    true = np.minimum(np.arange(401)[None], number)
    expected = np.searchsorted(ap._recalls, true / number, side="right")
    assert np.array_equal(ap._reached(true, number), expected)


def test_masks_are_placed_as_detectron2_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(40, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.5 + 30 * torch.rand(40, 2, generator=generator)], 1)
    boxes[:, 2] = boxes[:, 2].clamp(max=70)
    boxes[:, 3] = boxes[:, 3].clamp(max=90)
    boxes[0] = torch.tensor([0.0, 0.0, 70.0, 90.0])
    masks = torch.rand(40, 14, 14, generator=generator)
    expected = paste_masks_in_image(masks, Boxes(boxes), (90, 70))
    assert torch.equal(paste(masks, boxes, 90, 70), expected)
    monkeypatch.setattr("bn_detection.leakage.detections._MOST_PIXELS", 90 * 90 * 3)
    assert torch.equal(paste(masks, boxes, 90, 70), expected)
    assert paste(masks[:0], boxes[:0], 90, 70).shape == (0, 90, 70)


def test_ap_without_detections_or_objects() -> None:
    images, objects, _ = coco_problem()
    ap = AveragePrecision(images, objects, [], 3, "bbox")
    values = ap(np.array([[1] * 7, [0] * 6 + [5]]))
    assert values[0] == 0
    assert np.isnan(values[1])


def test_intervals_of_a_mean_are_those_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    above, below = rng.normal(5, 2, 400), np.ones(400)
    estimate = Estimate.of(Ratio(above, below)(resample(400, 4000)), 400)
    half = 1.96 * above.std() / 20
    assert estimate.value == pytest.approx(above.mean())
    assert estimate.low == pytest.approx(above.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(above.mean() + half, abs=0.1 * half)
    unknown = Estimate.of(Ratio(above, np.zeros(400))(resample(400, 3)), 400)
    assert unknown.to_json() == {"value": None, "low": None, "high": None}


def test_resamples_count_each_image_and_repeat() -> None:
    weights = resample(9, 20, seed=3)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 9).all()
    assert np.array_equal(weights, resample(9, 20, seed=3))
    assert not np.array_equal(weights[1:], resample(9, 20, seed=4)[1:])


def test_receptive_margin(data: Path) -> None:
    # Three convolutions see 15 px, 7 on each side; interpolation adds a cell of 4.
    model = build(config(data)).eval()
    assert 10 <= receptive_margin(model, 128, ["p2"]) <= 13


def test_images_per_worker(data: Path) -> None:
    cfg = config(data, "BN.LEAKAGE.IMAGES_PER_WORKER", 0, "SOLVER.IMS_PER_BATCH", 8)
    assert images_per_worker(cfg, 2) == 4
    cfg.BN.VIRTUAL_WORKERS = 8
    assert images_per_worker(cfg, 2) == 1
    cfg.BN.LEAKAGE.IMAGES_PER_WORKER = 3
    assert images_per_worker(cfg, 2) == 3
    cfg.BN.LEAKAGE.IMAGES_PER_WORKER, cfg.BN.VIRTUAL_WORKERS = 0, 3
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH 8 cannot be divided among the 3"):
        images_per_worker(cfg, 2)


def test_images_per_worker_are_those_of_the_reference_world_size(data: Path) -> None:
    cfg = config(data, "BN.LEAKAGE.IMAGES_PER_WORKER", 0, "SOLVER.IMS_PER_BATCH", 16)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    for workers in (1, 4, 8):
        scaled = Trainer.auto_scale_workers(cfg, workers)
        assert images_per_worker(cfg, workers) == scaled.SOLVER.IMS_PER_BATCH / workers == 2
    cfg.BN.VIRTUAL_WORKERS = 8
    assert images_per_worker(cfg, 4) == 1
    cfg.BN.VIRTUAL_WORKERS = 16
    with pytest.raises(ConfigError, match=r"REFERENCE_WORLD_SIZE 8\) cannot .* the 16 workers"):
        images_per_worker(cfg, 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), r"must be a GeneralizedRCNN .* a RetinaNet"),
        (("BN.LEAKAGE.IMAGES_PER_WORKER", 5), r"5 images have labels, and with 5 .* needs 10"),
        (("BN.LEAKAGE.RESAMPLES", 0), r"BN.LEAKAGE.RESAMPLES 0: it must be at least 1"),
        (("DATASETS.TEST", ()), r"DATASETS.TEST is empty"),
    ],
)
def test_what_cannot_be_probed_is_refused(data: Path, more: tuple, message: str) -> None:
    retinanet = ("MODEL.RETINANET.IN_FEATURES", "['p2']", "MODEL.RETINANET.NUM_CLASSES", 4)
    cfg = config(data, *more, *retinanet)
    with pytest.raises(ConfigError, match=message):
        measure_leakage(cfg, build(cfg))


def test_a_dataset_without_labels_is_refused(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "val" / "annotations.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    entry = ["probe_none", str(tmp_path / "none.json"), str(data / "val" / "images")]
    cfg = config(data)
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TEST = [entry], ("probe_none",)
    register_datasets(cfg)
    with pytest.raises(ConfigError, match=r'"probe_none": none of its 5 images has a labelled'):
        measure_leakage(cfg, build(cfg))


def test_weights_that_diverged_are_named(data: Path) -> None:
    cfg = config(data)
    model = build(cfg)
    nn.init.constant_(model.roi_heads.box_predictor.cls_score.weight, float("nan"))
    proposals = dict(model.proposal_generator.post_nms_topk)
    with pytest.raises(ConfigError) as error:  # it keeps what the traceback holds
        measure_leakage(cfg, model)
    assert model.proposal_generator.post_nms_topk == proposals
    assert re.search(r"box head's outputs are not finite .*own_image", str(error.value))


def test_a_mask_head_is_left_out_where_objects_have_no_masks(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "val" / "annotations.json").read_text())
    del content["annotations"][1]["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    whole = measure_leakage(config(data), build(config(data)))
    cfg = config(data)
    entry = ["probe_boxes", str(tmp_path / "boxes.json"), str(data / "val" / "images")]
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TEST = [entry], ("probe_boxes",)
    register_datasets(cfg)
    report = measure_leakage(cfg, build(cfg))
    assert list(report.leakage) == ["accuracy", "loss", "box_ap"]
    found, expected = report.to_json()["leakage"], whole.to_json()["leakage"]
    assert found == {metric: expected[metric] for metric in found}
    assert list(report.left_out) == ["roi_heads.mask_head"]
    assert "1 of" in report.left_out["roi_heads.mask_head"]
    assert '"probe_boxes" have no mask' in report.text()
    assert not whole.left_out


def test_a_keypoint_head_is_left_out(data: Path) -> None:
    more = (
        *("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", True),
        *("MODEL.ROI_KEYPOINT_HEAD.NAME", "BNConvDeconvKeypointHead"),
        *("MODEL.ROI_KEYPOINT_HEAD.NORM", "BN", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)),
        *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 1),
    )
    cfg = config(data, *more)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    metadata.keypoint_names, metadata.keypoint_flip_map = ("centre",), ()
    report = measure_leakage(cfg, build(cfg))
    assert report.batch_norms == []
    assert list(report.left_out) == ["roi_heads.keypoint_head"]


def test_the_tool_writes_a_report_and_replaces_none(data: Path, tmp_path: Path) -> None:
    cfg = config(data)
    weights = tmp_path / "weights.pth"
    torch.save({"model": build(cfg).state_dict()}, weights)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / "new" / "probe.json"
    args = cli.parse(
        [
            *("probe", "--config-file", f"{tmp_path}/config.yaml", "--output", str(output)),
            *("--by-layer", "--by-class", "MODEL.WEIGHTS", str(weights)),
            *("BN.LEAKAGE.NUM_IMAGES", "4"),
        ]
    )
    assert preflight_probe(args) == "cpu"
    probe(args)
    report = json.loads(output.read_text())
    assert report["images"] == 4
    assert report["images_per_worker"] == 2
    assert list(report["modes"]) == list(MODES)
    for metrics in (*report["modes"].values(), report["leakage"], report["inconsistency"]):
        assert list(metrics) == [
            *("accuracy", "loss", "box_ap"),
            *("mask_accuracy", "mask_loss", "mask_ap"),
        ]
        assert all(list(value) == ["value", "low", "high"] for value in metrics.values())
    assert report["limit"]["dataset cue"] == "both cues"
    assert [layer["name"] for layer in report["by_layer"]] == report["batch_norms"]
    for of_class in report["by_class"]:
        assert of_class["objects"] > 0
        assert list(of_class["leakage"]) == ["accuracy", "box_ap", "mask_ap"]
    for metric in ("accuracy", "mask_accuracy"):
        assert (tmp_path / f"new/probe_probe/by_layer_{metric}.png").stat().st_size > 1000
    assert "leakage = own_worker - shuffled" in (tmp_path / "new/probe_probe/log.txt").read_text()
    with pytest.raises(ConfigError, match=r"probe.json exists"):
        preflight_probe(args)


def test_the_tool_names_weights_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    cfg = config(data)
    weights = tmp_path / "weights.pth"
    torch.save({"model": build(config(data, norm="gn")).state_dict()}, weights)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / "probe.json"
    args = cli.parse(
        [
            *("probe", "--config-file", f"{tmp_path}/config.yaml", "--output", str(output)),
            *("MODEL.WEIGHTS", str(weights)),
        ]
    )
    with pytest.raises(ConfigError, match=r"missing: .*conv1.norm.running_mean"):
        probe(args)
    assert not output.exists()
