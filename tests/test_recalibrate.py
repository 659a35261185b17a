"""Recalibrated checkpoints against the activations of the same images, in float64."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from PIL import Image
from reference import relative_error
from test_train_net import QUICKSTART, ROOT, ap, overrides, parse, train_net
from tooling import run_script
from torch import Tensor, nn

from bn_detection import ConfigError, cli
from bn_detection.data import make_leaky_shapes, register_image_folder
from bn_detection.engine import (
    Trainer,
    load_config,
    preflight_recalibration,
    recalibrate,
)
from bn_detection.engine.setup import register_datasets
from bn_detection.population import PopulationStatistics, statistics_change

CONFIG = QUICKSTART / "mask_rcnn_bn.yaml"
INFERENCE = ("BN.POPULATION.ROIS", "inference")
IMAGES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``train`` and ``val``, and ``weights.pth`` whose proposals are not empty."""
    folder = tmp_path_factory.mktemp("recalibrated")
    for split in ("train", "val"):
        make_leaky_shapes(folder / split, IMAGES, seed=7, split=split)
    torch.manual_seed(0)
    torch.save({"model": model_of(folder, folder).state_dict()}, folder / "weights.pth")
    return folder


def config(data: Path, output: Path, *more: object, config_file: Path = CONFIG) -> Any:
    cfg = load_config(parse(config_file, overrides(data, output, *more)))
    register_datasets(cfg)
    return cfg


def model_of(data: Path, output: Path, *more: object) -> nn.Module:
    return Trainer.build_model(config(data, output, *more))


def arguments(
    data: Path,
    output: Path,
    *more: object,
    flags: tuple[object, ...] = (),
    config_file: Path = CONFIG,
) -> list[str]:
    opts = overrides(data, output.parent, "MODEL.WEIGHTS", data / "weights.pth", *more)
    return [
        *("--config-file", str(config_file), "--output", str(output)),
        *(str(flag) for flag in flags),
        *opts,
    ]


def run(data: Path, output: Path, *more: object, **options: Any) -> None:
    """What the tool does with one worker."""
    args = cli.parse(["recalibrate", *arguments(data, output, *more, **options)])
    preflight_recalibration(args)
    recalibrate(args)


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    flat = torch.cat([v.double().transpose(0, 1).flatten(1) for v in values], dim=1)
    return flat.mean(1), flat.var(1)


def assert_statistics_are_those_of(inputs: dict[str, list[Tensor]], state: dict[str, Any]) -> None:
    assert inputs
    for name, values in inputs.items():
        mean, var = moments(values)
        assert relative_error(state[f"{name}.running_mean"], mean) < 1e-6, name
        assert relative_error(state[f"{name}.running_var"], var) < 1e-6, name


def watch(model: nn.Module, inputs: dict[str, list[Tensor]]) -> nn.Module:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: inputs[name].append(args[0].detach().clone())
            )
    return model


@pytest.mark.timeout(280)
def test_inference_rois_without_labels(data: Path, tmp_path: Path) -> None:
    # What each image alone gives in eval mode, with the BN layers alone in training mode.
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    cfg = config(data, tmp_path)
    model = model_of(data, tmp_path)
    model.load_state_dict(load(data / "weights.pth"))
    watch(model.eval(), inputs)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    mapper = DatasetMapper(cfg, False)
    for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        model([mapper(record)])

    options = (*INFERENCE, "BN.POPULATION.BATCH_SIZE", 1)
    images = tmp_path / "elsewhere"
    shutil.copytree(data / "train" / "images", images / "deeper")
    run(data, tmp_path / "named.pth", *options)
    run(data, tmp_path / "folder.pth", *options, flags=("--images", images))
    for name in ("named", "folder"):
        assert_statistics_are_those_of(inputs, load(tmp_path / f"{name}.pth"))
    record = json.loads((tmp_path / "folder.json").read_text())
    assert record["settings"]["images"] == IMAGES
    assert record["settings"]["datasets"] == [f"images in {images}"]

    # The same batches on two workers, one of which has an image more; then an evaluation.
    tool = ROOT / "tools" / "recalibrate.py"
    options = (*INFERENCE, "BN.POPULATION.BATCH_SIZE", 2)
    flags = ("--num-gpus", 2)
    command = [tool, *arguments(data, tmp_path / "two.pth", *options, flags=flags)]
    ran = run_script(*command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "images: all are used" in ran.stdout
    assert f"--eval-only MODEL.WEIGHTS {tmp_path / 'two.pth'}" in ran.stdout
    assert_statistics_are_those_of(inputs, load(tmp_path / "two.pth"))
    assert json.loads((tmp_path / "two.json").read_text())["settings"]["workers"] == 2

    again = run_script(*command)
    assert again.returncode == 2
    assert again.stderr.count("error: ") == 1 and "two.pth exists" in again.stderr

    weights = ("MODEL.WEIGHTS", str(tmp_path / "two.pth"))
    evaluated = train_net(
        *("--config-file", str(CONFIG), "--eval-only"), *overrides(data, tmp_path, *weights)
    )
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    results = tmp_path / "eval_two_population" / "results.json"
    assert ap(results).keys() == {"bbox", "segm"}


def watched_run(
    data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *more: object
) -> dict[str, list[Tensor]]:
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    build = Trainer.build_model
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "build_model", lambda cfg: watch(build(cfg), inputs))
        run(data, output, *more)
    return inputs


def test_training_rois_and_nothing_else_changes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new" / "weights.pth"
    modules = ("BN.MODULES", "['*box_head*']")
    inputs = watched_run(data, output, monkeypatch, *modules)
    selected = {name: values for name, values in inputs.items() if "box_head" in name}
    assert all(sum(map(len, values)) == 64 * IMAGES for values in selected.values())
    old, new = load(data / "weights.pth"), load(output)
    assert_statistics_are_those_of(selected, new)
    assert list(new) == list(old)
    for name, value in old.items():
        changes = "box_head" in name and name.endswith(("running_mean", "running_var"))
        assert torch.equal(new[name], value) != changes, name
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["layers"].keys() == selected.keys()
    assert record["settings"]["estimator"] == "pooled"
    name = "roi_heads.box_head.conv3.norm"
    layer = record["layers"][name]
    assert layer["values"] == 64 * IMAGES * 49
    shift = (new[f"{name}.running_mean"] - old[f"{name}.running_mean"]).double()
    shift /= (old[f"{name}.running_var"].double() + 1e-5).sqrt()
    assert layer["change_of_mean"] == pytest.approx(shift.square().mean().sqrt().item(), rel=1e-5)


def test_the_checkpoint_loads_in_plain_detectron2(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "new.pth", *INFERENCE)
    cfg = config(data, tmp_path)
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model = build_model(cfg)
    left = DetectionCheckpointer(model).load(str(tmp_path / "new.pth"))
    assert left == {}
    for name, value in load(tmp_path / "new.pth").items():
        assert torch.equal(model.state_dict()[name], value), name


def test_fvcores_estimator_has_no_bessel_correction(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new.pth"
    inputs = watched_run(data, output, monkeypatch, "BN.POPULATION.ESTIMATOR", "fvcore")
    new = load(output)
    values = inputs["roi_heads.box_head.conv4.norm"]
    assert len(values) == 3  # of two images, and a last one of one
    mean, var = moments(values)
    count = sum(v.numel() // v.shape[1] for v in values)
    biased = var * (count - 1) / count
    assert relative_error(new["roi_heads.box_head.conv4.norm.running_mean"], mean) < 1e-5
    assert relative_error(new["roi_heads.box_head.conv4.norm.running_var"], biased) < 1e-5
    record = json.loads(output.with_suffix(".json").read_text())
    layer = record["layers"]["roi_heads.box_head.conv4.norm"]
    assert layer["values"] == count
    assert layer["relative_standard_error"] is None


def test_levels_get_statistics_of_their_own_or_in_common(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, separate = (QUICKSTART / f"retinanet_{k}.yaml" for k in ("shared", "shared_separate"))
    torch.manual_seed(0)
    model = Trainer.build_model(config(data, tmp_path, config_file=shared))
    torch.save({"model": model.state_dict()}, tmp_path / "shared.pth")
    name = "head.cls_subnet.1"
    by_level: list[list[Tensor]] = [[], [], []]
    build = Trainer.build_model

    def keep(_: nn.Module, args: tuple[list[Tensor]]) -> None:
        for level, x in zip(by_level, args[0], strict=True):
            level.append(x)

    def watched(cfg: Any) -> nn.Module:
        model = build(cfg)
        model.get_submodule(name).register_forward_pre_hook(keep)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "build_model", watched)
        weights = ("MODEL.WEIGHTS", tmp_path / "shared.pth")
        run(data, tmp_path / "separate.pth", *weights, config_file=separate)
    inputs = {f"{name}.{level}": values for level, values in enumerate(by_level)}
    assert_statistics_are_those_of(inputs, load(tmp_path / "separate.pth"))

    weights = ("MODEL.WEIGHTS", tmp_path / "separate.pth")
    run(data, tmp_path / "again.pth", *weights, config_file=shared)
    again = load(tmp_path / "again.pth")
    assert again.keys() == load(tmp_path / "shared.pth").keys()
    positions = [torch.cat([x.flatten(2) for x in xs], 2) for xs in zip(*by_level, strict=True)]
    assert_statistics_are_those_of({f"{name}.0": [x[..., None] for x in positions]}, again)


def test_num_samples_are_distinct_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    map_image = DatasetMapper.__call__

    def note(mapper: DatasetMapper, record: dict[str, Any]) -> Any:
        if data in Path(record["file_name"]).parents:  # not that of the rehearsal
            seen.append(record["file_name"])
        return map_image(mapper, record)

    monkeypatch.setattr(DatasetMapper, "__call__", note)
    run(data, tmp_path / "new.pth", *INFERENCE, "BN.POPULATION.NUM_SAMPLES", 4)
    assert len(seen) == len(set(seen)) == 4


def test_an_unreadable_image_is_passed_over(data: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(data / "train" / "images", images)
    (images / "000001.png").write_bytes(b"not a picture")
    run(data, tmp_path / "new.pth", *INFERENCE, flags=("--images", images))
    assert json.loads((tmp_path / "new.json").read_text())["settings"]["images"] == IMAGES - 1
    listed = tmp_path / "new_recalibration" / "unreadable_images.txt"
    assert listed.read_text().splitlines() == [str(images / "000001.png")]


def test_a_folder_of_images_is_sorted_and_recursive(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.png", "a/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not name.endswith("txt"):
            Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / name)
    name = register_image_folder(str(tmp_path))
    assert register_image_folder(f"{tmp_path}/") == name
    names = [record["file_name"] for record in DatasetCatalog.get(name)]
    assert names == [str(tmp_path / part) for part in ("a/c.webp", "a/z.png", "b.JPG")]


def test_change_is_the_formula() -> None:
    layer = nn.BatchNorm2d(2, eps=0.0)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([4.0, 1.0]))
    mean, var = torch.tensor([3.0, 1.5]).double(), torch.tensor([4.0, 9.0]).double()
    change = statistics_change(layer, PopulationStatistics(mean, var, mean, var, 10))
    assert change.mean.tolist() == [1.0, -0.5]
    assert change.std.tolist() == pytest.approx([0.0, np.log(3)])
    assert change.rms_mean == pytest.approx((1.25 / 2) ** 0.5)
    assert change.rms_std == pytest.approx(np.log(3) / 2**0.5)
    assert change.largest_channel == 1


@pytest.mark.parametrize(
    ("more", "flags", "words"),
    [
        (["MODEL.WEIGHTS", ""], [], ['MODEL.WEIGHTS is ""']),
        (["MODEL.WEIGHTS", "no/such.pth"], [], ["MODEL.WEIGHTS no/such.pth", "no such file"]),
        (["BN.POPULATION.BATCH_SIZE", 3], ["--num-gpus", 2], ["BATCH_SIZE 3", "2 workers"]),
        (["SOLVER.IMS_PER_BATCH", 1], ["--num-gpus", 2], ["IMS_PER_BATCH 1", "2 workers"]),
        (["BN.POPULATION.ESTIMATOR", "fvcore"], ["--num-gpus", 2], ["fvcore", "2 workers"]),
        ([*INFERENCE], ["--images", "no/folder"], ["--images no/folder", "no such folder"]),
        ([*INFERENCE], ["--images", "{data}/empty"], ["no image in it", ".png"]),
        ([], ["--images", "{data}/train/images"], ["--images", "labels", "ROIS inference"]),
        ([], ["--dataset", "no_such"], ['--dataset: there is no dataset "no_such"']),
        ([], ["--resume"], ["--resume", "MODEL.WEIGHTS"]),
        (["BN.MODULES", "['backbone.*']"], [], ["BN.MODULES", "roi_heads.box_head.conv1.norm"]),
        (
            ["MODEL.ROI_BOX_HEAD.NORM", "FrozenBN", "MODEL.ROI_MASK_HEAD.NORM", "FrozenBN"],
            [],
            ["no BN layer that tracks", "FrozenBN layers (roi_heads.box_head.conv1.norm"],
        ),
        (
            ["MODEL.ROI_BOX_HEAD.NUM_CONV", 5, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16],
            [],
            [
                "weights.pth: the weights do not fit",
                "5 missing: roi_heads.box_head.conv5.norm.bias",
                "mask_head.mask_fcn1.weight (32, 64, 3, 3) instead of (16, 64, 3, 3)",
            ],
        ),
        (["MODEL.MASK_ON", "False"], [], ["not in the model: roi_heads.mask_head"]),
    ],
)
def test_refusals_name_what_was_wrong_and_write_nothing(
    data: Path, tmp_path: Path, more: list[object], flags: list[object], words: list[str]
) -> None:
    (data / "empty").mkdir(exist_ok=True)
    flags = [str(flag).format(data=data) for flag in flags]
    with pytest.raises(ConfigError) as info:
        run(data, tmp_path / "new.pth", *more, flags=tuple(flags))
    for word in words:
        assert word in str(info.value)
    assert not list(tmp_path.glob("new.*"))


def test_nothing_is_overwritten(data: Path, tmp_path: Path) -> None:
    for name in ("new.pth", "new.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"{name} exists"):
            run(data, tmp_path / "new.pth", *INFERENCE)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"ends in \.pth"):
        run(data, tmp_path / "new.pkl", *INFERENCE)


def test_labels_are_needed_for_training_rois(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "unlabeled"
    shutil.copytree(data, copy)
    annotations = copy / "train" / "annotations.json"
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ConfigError, match=r"unlabeled_train.*ROIS inference"):
        run(copy, tmp_path / "new.pth")
    run(copy, tmp_path / "new.pth", *INFERENCE)


@pytest.mark.parametrize("estimator", ["pooled", "fvcore"])
def test_values_that_are_not_finite_name_the_layer(
    data: Path, tmp_path: Path, estimator: str
) -> None:
    state = load(data / "weights.pth")
    state["roi_heads.box_head.conv2.weight"][0] = float("nan")
    torch.save({"model": state}, tmp_path / "nan.pth")
    options = ("MODEL.WEIGHTS", tmp_path / "nan.pth", "BN.POPULATION.ESTIMATOR", estimator)
    with pytest.raises(ConfigError, match=r"box_head\.conv2\.norm: .*not finite.*Nothing was writ"):
        run(data, tmp_path / "new.pth", *options)
    assert not list(tmp_path.glob("new.*"))


def test_an_interrupted_write_leaves_no_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run(data, tmp_path / "new.pth", *INFERENCE)
    assert not list(tmp_path.glob("new.*"))


def test_frozen_layers_of_a_backbone_are_recalibrated_once_converted(
    data: Path, tmp_path: Path
) -> None:
    frozen = ("MODEL.ROI_MASK_HEAD.NORM", "FrozenBN")
    model = model_of(data, tmp_path, *frozen)
    assert isinstance(model.roi_heads.mask_head.mask_fcn1.norm, FrozenBatchNorm2d)
    torch.save({"model": model.state_dict()}, tmp_path / "frozen.pth")
    options = (*frozen, "MODEL.WEIGHTS", tmp_path / "frozen.pth", *INFERENCE)
    run(data, tmp_path / "kept.pth", *options)
    convert = ("BN.CONVERT", "[['roi_heads.mask_head', 'BN']]")
    run(data, tmp_path / "converted.pth", *options, *convert, "BN.MODULES", "['*mask_head*']")
    name = "roi_heads.mask_head.mask_fcn1.norm.running_mean"
    old = load(tmp_path / "frozen.pth")[name]
    assert torch.equal(load(tmp_path / "kept.pth")[name], old)
    assert not torch.equal(load(tmp_path / "converted.pth")[name], old)
