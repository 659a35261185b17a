"""Any detector in Python and by ``--model``: measured, diagnosed, recalibrated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from PIL import Image
from tiny_detectors import OwnDetector, items, own_detector, tiny_rcnn, without_norm
from tooling import QUICKSTART
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bn_detection
from bn_detection import convert_norm
from bn_detection.cli import main
from bn_detection.data import make_leaky_shapes, register_coco_json
from bn_detection.detectors import detector_of
from bn_detection.engine import Trainer, argument_parser, load_config
from bn_detection.instrument import Images, diagnosing

pytestmark = pytest.mark.usefixtures("own_catalogs")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The items as a file in COCO's format and a folder, categories 5 and 9."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    images, objects = [], []
    for number, (image, target) in enumerate(items()):
        array = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / "images" / f"{number}.png")
        height, width = image.shape[1:]
        file = {"file_name": f"{number}.png", "height": height, "width": width}
        images.append({"id": 100 - number, **file})
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x0, y0, x1, y1 = box
            found = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            found |= {"image_id": 100 - number, "category_id": {1: 5, 2: 9}[label], "iscrowd": 0}
            objects.append({"id": len(objects) + 1, **found})
    categories = [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return str(folder / "annotations.json"), str(folder / "images")


class Items(Dataset):
    """As torchvision's datasets."""

    def __len__(self) -> int:
        return len(items())

    def __getitem__(self, number: int) -> Any:
        return items()[number]


def state_of(model: nn.Module) -> dict[str, Any]:
    modes = {name: module.training for name, module in model.named_modules()}
    return {**{k: v.clone() for k, v in model.state_dict().items()}, **modes}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


# ----------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------


def collate(batch: list[Any]) -> Any:
    return tuple(zip(*batch, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        items(),
        Items(),
        DataLoader(Items(), batch_size=3, collate_fn=collate),
        DataLoader(Items(), batch_size=5, collate_fn=list),
        [(torch.stack([i for i, _ in items()]), [t for _, t in items()])],
        [((255 * image).byte(), target) for image, target in items()],
    ],
    ids=["pairs", "dataset", "loader", "lists", "stacked", "uint8"],
)
def test_forms_of_loaders(data: Any) -> None:
    images = Images(data, detector_of(tiny_rcnn()), 10)
    assert len(images) == 10 and images.have_labels
    known = {tuple(image[0, 0, :3].mul(255).byte().tolist()) for image, _ in items()}
    for number, (image, target) in enumerate(images):
        assert image.dtype == torch.float32 and image.max() <= 1
        assert tuple(image[0, 0, :3].mul(255).byte().tolist()) in known
        assert target["image_id"] == number and target["boxes"].shape == (2, 4)


def test_coco_files(coco: tuple[str, str]) -> None:
    """Categories that the model has no labels for are numbered from 1; images are in any order."""
    images = Images(coco, detector_of(tiny_rcnn()), 10)
    truth = images.truth()
    assert [image["id"] for image in truth["images"]] == list(range(10))
    assert {item["category_id"] for item in truth["annotations"]} == {1, 2}
    assert truth["annotations"][0]["bbox"] == [4, 4, 16, 16]
    # A model without known labels has those of the file.
    unknown = Images(coco, detector_of(own_detector()), 10).truth()
    assert {item["category_id"] for item in unknown["annotations"]} == {5, 9}
    own = torch.stack([image for image, _ in items()])
    for image, _ in images:
        assert (own - image).abs().amax((1, 2, 3)).min() < 0.01


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no_such_dataset", "no folder and no registered dataset no_such_dataset"),
        (("no.json", "."), "annotations .*no.json do not exist"),
        ([], "has no image"),
        ([torch.zeros(1, 3, 3)], r"Item 0 of the data is a Tensor of shape \(1, 3, 3\); they must"),
        ([(items()[0][0], {"boxes": 1})], "target of item 0 is a dict with the keys boxes; the"),
        (3, "The data are a int"),
    ],
)
def test_data_that_cannot_be(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(data, detector_of(tiny_rcnn()), 10)


# ----------------------------------------------------------------------------------------------
# In Python
# ----------------------------------------------------------------------------------------------


def test_recalibrate_gives_the_statistics_of_the_inputs() -> None:
    """Those of all inputs together, by torch; nothing else moves."""
    model = own_detector().eval()
    with torch.no_grad():
        model.layers[0].weight.mul_(3)
    before = state_of(model)
    report = bn_detection.recalibrate(model, items())
    x = model.layers[0](torch.stack([image for image, _ in items()])).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.layers[1].running_mean, x.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.layers[1].running_var, x.var(1), rtol=1e-4, atol=1e-5)
    after = state_of(model)
    for key in before:
        if "running" not in key:
            assert torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])), key
    assert report.settings["rois"] == "training" and report.layers["layers.1"]["values"] > 0
    assert "Statistics of 1 layers from 12 images" in report.text()
    assert "layers.1" in report._repr_html_() and json.dumps(report.to_json(), allow_nan=False)


def test_recalibrate_without_labels() -> None:
    model = tiny_rcnn()
    report = bn_detection.recalibrate(model, items(labels=False), modules=["roi_heads.*"])
    assert report.settings["rois"] == "inference" and model.training
    assert report.layers["roi_heads.box_head.0.1"]["values"] == 12 * 10 * 25
    with pytest.raises(ValueError, match="has no labels"):
        bn_detection.recalibrate(model, items(labels=False), rois="training")


def test_nothing_to_recalibrate() -> None:
    report = bn_detection.recalibrate(without_norm(), items())
    assert "Nothing was changed. The model has no BN layer" in report.text()


def test_measure_leakage_leaves_the_model() -> None:
    model = tiny_rcnn()
    before = state_of(model)
    report = bn_detection.measure_leakage(model, items())
    assert_same(state_of(model), before)
    assert report.batch_norms == ["roi_heads.box_head.0.1"] and report.images == 12
    assert list(report.modes) == ["image", "shuffle", "population"]
    assert json.dumps(report.to_json(), allow_nan=False) and "<" in report._repr_html_()


def test_measured_detections_are_those_of_each_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The AP of own images is that of a model that normalizes each image alone, one at a time."""
    model = own_detector().eval()
    report = bn_detection.measure_leakage(model, items(), modules=["*"])
    single = own_detector().eval()
    bn_detection.set_inference(single, "batch", ["*"])

    class Alone(OwnDetector):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            return [single([image])[0] for image in images]

    alone = Alone().eval()
    expected = bn_detection.measure_leakage(alone, items(), modules=["nothing"])
    assert report.modes["image"]["box_ap"].value == expected.modes["population"]["box_ap"].value


def test_measure_without_labels() -> None:
    with pytest.raises(ValueError, match="images without labels have no AP"):
        bn_detection.measure_leakage(tiny_rcnn(), items(labels=False))


def test_diagnose(coco: tuple[str, str]) -> None:
    model = tiny_rcnn()
    before = state_of(model)
    found = bn_detection.diagnose(model, coco, images_per_worker=1)
    assert_same(state_of(model), before)
    (layer,) = found.layers
    assert (layer.name, layer.rows, layer.sharing) == ("roi_heads.box_head.0.1", "RoIs", "worker")
    assert layer.rows_per_batch == 8 and found.probe.images == 12
    (finding,) = [f for f in found.findings if f.id == "BN102"]
    assert "bn_detection.recalibrate(model, data" in finding.cure
    assert "bn_detection.recalibrate" in found.text() and "BN102" in found._repr_html_()
    json.dumps(found.to_json(), allow_nan=False)


def test_cures_in_python_run() -> None:
    """What a finding proposes is Python that changes the model."""
    model = tiny_rcnn()
    found = bn_detection.diagnose(model, items(), images_per_worker=1)
    for finding in found.findings:
        exec(finding.cure, {"bn_detection": bn_detection, "model": model, "data": items()})
    again = bn_detection.diagnose(model, items(), images_per_worker=1)
    assert "BN102" not in {finding.id for finding in again.findings}


@pytest.mark.parametrize(("frozen", "rule"), [(True, "BN302"), (False, "BN103")])
def test_far_statistics_are_tried(frozen: bool, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen layer, or a trained one; what is detected then has statistics of the data."""
    model = tiny_rcnn()
    norm = model.roi_heads.box_head[0][1]
    norm.running_mean.fill_(9.0)
    if frozen:
        model.roi_heads.box_head[0][1] = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    seen: list[Tensor] = []
    found = diagnosing.detections

    def detections(detector: Any, batch: Any, masks: bool) -> Any:
        seen.append(model.roi_heads.box_head[0][1].running_mean.clone())
        return found(detector, batch, masks=masks)

    monkeypatch.setattr(diagnosing, "detections", detections)
    diagnosis = bn_detection.diagnose(model, items(), images_per_worker=1)
    (item,) = [x for x in (*diagnosis.findings, *diagnosis.notes) if x.id == rule]
    said = " ".join([item.title, *(x.text for x in item.evidence)])
    assert "Box AP with the statistics of these images" in said
    assert torch.equal(seen[0], torch.full_like(seen[0], 9.0))
    # The weight of 12 images, of which 16 would count as much as the old ones.
    expected = tiny_rcnn()
    bn_detection.recalibrate(expected, items(), images_per_batch=1)
    mean = expected.roi_heads.box_head[0][1].running_mean
    weight = 12 / 28 if frozen else 1.0
    assert torch.allclose(seen[1], torch.full_like(mean, 9.0).lerp(mean, weight), atol=1e-3)


def test_diagnose_without_labels_and_without_bn() -> None:
    found = bn_detection.diagnose(tiny_rcnn(), items(labels=False))
    assert found.layers[0].ema_to_precise is not None and found.probe is None
    assert "images without labels" in found.left_out[0]
    nothing = bn_detection.diagnose(without_norm(), items())
    assert nothing.verdict == "The model has no BN layer: there is nothing to diagnose."


def test_diagnose_converted_models() -> None:
    model = tiny_rcnn()
    convert_norm(model, "ImageBN", "roi_heads.*")
    found = bn_detection.diagnose(model, items())
    assert found.layers[0].sharing == "image" and found.layers[0].rows_per_batch == 8


def test_detectron2(tmp_path: Path) -> None:
    """Its model gets what its own mapper gives; its dataset is known by name."""
    make_leaky_shapes(tmp_path / "shapes", 4, seed=0, split="val")
    files = tmp_path / "shapes" / "annotations.json", tmp_path / "shapes" / "images"
    config_file = str(QUICKSTART / "mask_rcnn_bn.yaml")
    cfg = load_config(argument_parser().parse_args(["--config-file", config_file]))
    cfg.MODEL.DEVICE = "cpu"
    register_coco_json([["shapes", *map(str, files)]])
    model = Trainer.build_model(cfg)
    detector = detector_of(model)
    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format="BGR", use_instance_mask=True
    )
    expected: dict[int, Any] = {}
    for record in DatasetCatalog.get("shapes"):
        item = mapper(record)
        expected[item["image"].sum().item()] = item
    given: list[Any] = []
    handle = model.register_forward_pre_hook(lambda _, args: given.extend(args[0]))
    with torch.no_grad():
        detector.forward(list(Images("shapes", detector, 4)))
    handle.remove()
    for made in given:
        item = expected.pop(round(made["image"].sum().item()))
        torch.testing.assert_close(made["image"], item["image"].float(), atol=1e-3, rtol=0)
        objects, own = made["instances"], item["instances"]
        assert torch.equal(objects.gt_boxes.tensor, own.gt_boxes.tensor)
        assert torch.equal(objects.gt_classes, own.gt_classes)
    assert not expected
    report = bn_detection.measure_leakage(model, "shapes")
    assert all(name.startswith("roi_heads.") for name in report.batch_norms)
    found = bn_detection.diagnose(model, files, images_per_worker=1)
    assert {x.rows for x in found.layers if x.trains} == {"RoIs"}
    DatasetCatalog.register("few", lambda: [])
    with pytest.raises(ValueError, match="few has no image"):
        bn_detection.measure_leakage(model, "few")


# ----------------------------------------------------------------------------------------------
# On the command line
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def run(command: str, model: str, *arguments: object) -> int:
    return main([command, "--model", f"tiny_detectors:{model}", *map(str, arguments)])


def test_commands_on_a_model(
    coco: tuple[str, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": tiny_rcnn().state_dict(), "epoch": 3}, "weights.pth")
    common = ("--coco", *coco, "--weights", "weights.pth")
    assert run("diagnose", "tiny_rcnn", *common, "--output-dir", "d", "--format", "json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["findings"][0]["id"] == "BN102" and printed["settings"]["weights"]
    assert {path.name for path in Path("d").iterdir()} == {"diagnosis.json", "diagnosis.html"}

    assert run("recalibrate", "tiny_rcnn", *common, "--output", "new.pth") == 0
    new, old = torch.load("new.pth"), torch.load("weights.pth")
    assert new["epoch"] == 3 and new["model"].keys() == old["model"].keys()
    changed = {key for key in old["model"] if not torch.equal(new["model"][key], old["model"][key])}
    layer = "roi_heads.box_head.0.1"
    assert changed == {f"{layer}.running_mean", f"{layer}.running_var"}
    assert json.loads(Path("new.json").read_text())["layers"].keys() == {layer}

    common = (*common[:-1], "new.pth")
    more = ("--images-per-gpu", 1, "--by-class")
    assert run("probe", "tiny_rcnn", *common, "--output", "p.json", *more) == 0
    assert "leakage = image - shuffle" in capsys.readouterr().out
    probed = json.loads(Path("p.json").read_text())
    assert probed["images"] == 12 and {of["name"] for of in probed["by_class"]} == {"a", "b"}
    ended = run("diagnose", "tiny_rcnn", *common, "--output-dir", "d2", "--fail-on", "never")
    assert ended == 0


def test_commands_without_bn(
    coco: tuple[str, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--coco", *coco)
    assert run("diagnose", "without_norm", *common) == 0
    assert "The model has no BN layer" in capsys.readouterr().out
    for command, output in (("probe", "a.json"), ("recalibrate", "a.pth")):
        assert run(command, "without_norm", *common, "--output", output) == 0
        assert "The model has no BN layer" in capsys.readouterr().out
        assert not Path(output).exists()


def test_statistics_alone_without_labels(
    coco: tuple[str, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--image-folder", coco[1])
    assert run("diagnose", "tiny_rcnn", *folder, "--fail-on", "never") == 0
    printed = capsys.readouterr().out
    assert "roi_heads.box_head.0.1" in printed and "images without labels" in " ".join(
        printed.split()
    )
    assert run("recalibrate", "tiny_rcnn", *folder, "--output", "a.pth") == 0
    assert run("probe", "tiny_rcnn", *folder, "--output", "b.json") == 2
    assert "images without labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "no_such_module:f",
            "--model no_such_module:f: importing no_such_module failed: ",
        ),
        ("tiny_detectors:no_such", "tiny_detectors has no no_such"),
        ("tiny_detectors", "give package.module:function"),
        ("tiny_detectors:CHANNELS", "is a int, and no function"),
        ("tiny_detectors:needs_arguments", "calling it without arguments failed: TypeError: needs"),
        ("tiny_detectors:no_module", "returned a dict; it must be a torch.nn.Module"),
        ("tiny_detectors:other_form", "Other in eval mode gave a tensor of shape (6, 4, 23, 23)"),
        ("torchvision:resnet18", "torchvision's detectors are fasterrcnn_mobilenet_v3_large_320"),
    ],
)
def test_models_that_cannot_be(
    model: str, message: str, coco: tuple[str, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--coco", *coco, "--output", "a.json", "--images-per-gpu", "1"]
    assert main(["probe", "--model", model, *common]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --config-file, or --model."),
        (["--model", "a:b", "--config-file", "quickstart/mask_rcnn_bn.yaml"], "not both"),
        (
            ["--config-file", "quickstart/mask_rcnn_bn.yaml", "--weights", "a"],
            "--weights goes with --model",
        ),
        (["--model", "tiny_detectors:tiny_rcnn"], "--model needs images: --coco"),
        (
            ["--model", "tiny_detectors:tiny_rcnn", "MODEL.WEIGHTS", "a.pth"],
            "KEY VALUE overrides MODEL.WEIGHTS a.pth: they are of --config-file",
        ),
        (["--model", "tiny_detectors:tiny_rcnn", "--weights", "no.pth"], "there is no such file"),
        (
            ["--model", "tiny_detectors:tiny_rcnn", "--num-classes", "3"],
            "of torchvision:NAME alone",
        ),
    ],
)
def test_flags_that_cannot_be(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_flags_of_a_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recalibrate", "tiny_rcnn", "--images", "a", "--output", "a.pth") == 2
    assert "--images goes with --config-file" in capsys.readouterr().err
    common = ("--coco", "a", "b", "--output", "a.json", "--on", "rois")
    assert run("probe", "tiny_rcnn", *common) == 2
    assert "--on rois" in capsys.readouterr().err


def test_weights_of_another_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(own_detector().state_dict(), "other.pth")
    np.save("array.npy", np.zeros(3))
    common = ("--coco", "a", "b", "--output", "a.json", "--weights")
    assert run("probe", "tiny_rcnn", *common, "other.pth") == 2
    assert "do not fit the model" in capsys.readouterr().err
    assert run("probe", "tiny_rcnn", *common, "array.npy") == 2
    assert "cannot be read" in capsys.readouterr().err
