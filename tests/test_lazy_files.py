"""``--config-file`` takes LazyConfigs: what they say and build, and what is wrong in them."""

from __future__ import annotations

import builtins
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from tooling import ROOT
from torch import nn

from bn_detection import ConfigError
from bn_detection.cli import main
from bn_detection.data import make_leaky_shapes
from bn_detection.engine import Trainer, argument_parser, load_config
from bn_detection.engine.checkpoint import StrictCheckpointer
from bn_detection.heads import BNRetinaNetHead
from bn_detection.norm import LevelOptions

pytestmark = pytest.mark.usefixtures("own_catalogs")

FILE = """
import lazy_config
from detectron2 import model_zoo

from .parts import classes

model = lazy_config.mask_rcnn()
for key in [key for key in model.roi_heads if key.startswith("keypoint")]:
    del model.roi_heads[key]
for node in (model.roi_heads, model.roi_heads.box_predictor, model.roi_heads.mask_head):
    node.num_classes = classes.number
model.roi_heads.box_head.conv_norm = "BN"
del model.roi_heads.box_head.bn_options
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "shapes"
dataloader.test.dataset.names = "shapes"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = (96, 128)
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train
train.max_iter = 2
train.device = "cpu"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a LazyConfig, a part that it imports, and a small dataset."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    make_leaky_shapes(tmp_path / "shapes", 8, seed=0, split="val")
    Path("config.py").write_text(FILE)
    Path("parts.py").write_text("classes = dict(number=4)\n")
    return tmp_path


def data() -> tuple[str, ...]:
    files = ["shapes", "shapes/annotations.json", "shapes/images"]
    return ("DATASETS.COCO_JSON", repr([files]))


def tool(arguments: list[str]) -> object:
    """The exit status of a command line."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def config(*overrides: str) -> Any:
    return load_config(argument_parser().parse_args(["--config-file", "config.py", *overrides]))


def test_what_a_file_says_is_in_the_keys(folder: Path) -> None:
    cfg = config("optimizer.lr=0.5", "MODEL.WEIGHTS", "a.pth", "train.max_iter=90000")
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == ("GeneralizedRCNN", 4)
    assert (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) == (True, False)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("shapes",), ("shapes",))
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((96, 128), 1333)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT) == (800, "BGR")
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.IMS_PER_BATCH, solver.MAX_ITER) == (0.5, 2, 90000)
    assert (solver.STEPS, solver.GAMMA, solver.WARMUP_ITERS) == ((60000, 80000), 0.1, 1000)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (1e-4, 0.0)
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR) == ("a.pth", "cpu", "./output")


def test_the_model_is_that_of_the_file(folder: Path) -> None:
    """With the overrides, and with BN.CONVERT on top."""
    cfg = config(
        *("model.roi_heads.box_head.fc_dims=[24]", "BN.CONVERT"), '[["roi_heads.*", "ShuffleBN"]]'
    )
    model: Any = Trainer.build_model(cfg)
    assert model.roi_heads.box_head.fc1.out_features == 24
    assert type(model.roi_heads.box_head.conv1.norm.partition).__name__ == "ShufflePartition"
    stock = instantiate(config().BN.LAZY_CONFIG and _lazy().model)
    assert list(Trainer.build_model(config()).state_dict()) == list(stock.state_dict())


def _lazy() -> Any:
    from detectron2.config import LazyConfig

    return LazyConfig.load("config.py")


@pytest.mark.timeout(280)
def test_the_tools_on_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, evaluated, diagnosed, probed and recalibrated."""
    file = ("--config-file", "config.py")
    assert tool(["train", *file, *data()]) == 0
    weights = ("MODEL.WEIGHTS", "output/model_final.pth")
    assert tool(["train", *file, "--eval-only", *weights, *data()]) == 0
    assert tool(["diagnose", *file, "--quick", "--fail-on", "never", *weights, *data()]) == 0
    found = json.loads(Path("output/diagnosis_model_final/diagnosis.json").read_text())
    assert {x["name"] for x in found["layers"] if x["trains"]} >= {"roi_heads.box_head.conv1.norm"}
    leak = ("BN.LEAKAGE.NUM_IMAGES", "4")
    assert tool(["probe", *file, "--output", "p.json", *weights, *data(), *leak]) == 0
    assert json.loads(Path("p.json").read_text())["batch_norms"]
    assert tool(["recalibrate", *file, "--output", "new.pth", *weights, *data()]) == 0
    assert Path("new.pth").is_file()
    # What a training leaves beside its checkpoint is YAML, which runs nothing.
    assert tool(["train", "--config-file", "output/config.yaml", "--eval-only", *weights]) == 2
    assert "a LazyConfig is code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.py", "model = (\n", "config.py, line 1: SyntaxError: '(' was never closed"),
        ("parts.py", "\n\nclasses = =\n", "parts.py, line 3: SyntaxError: invalid syntax"),
        ("config.py", "import nothing_at_all\n", "config.py, line 1: ModuleNotFoundError"),
        (
            "parts.py",
            "from torch import nn\nclasses = nn.SyncBatchNorm2d\n",
            "parts.py, line 2: AttributeError: module 'torch.nn' has no attribute",
        ),
        ("config.py", "train = dict(max_iter=3)\n", "it has no model = LazyCall(...)(...). It has"),
    ],
)
def test_files_that_cannot_be(
    folder: Path, file: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = builtins.__import__
    Path(file).write_text(content)
    assert tool(["train", "--config-file", "config.py"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --config-file config.py") and message in line
    assert builtins.__import__ is before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.ROI_BOX_HEAD.NORM", "BN"], "MODEL.ROI_BOX_HEAD.NORM: the model is what the Lazy"),
        (["model.no.such=3", "optimizer.lr=)"], "the override optimizer.lr=) failed"),
        (["BN.NO_SUCH", "3"], "Non-existent key: BN.NO_SUCH"),
    ],
)
def test_overrides_that_cannot_be(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        config(*overrides)


def test_code_runs_only_where_it_is_named(folder: Path) -> None:
    """A file of data that names a LazyConfig is refused, and the file not run."""
    Path("config.py").write_text("raise SystemExit('it ran')\n")
    Path("a.yaml").write_text("BN: {LAZY_CONFIG: [config.py]}\n")
    Path("b.yaml").write_text("_BASE_: config.py\n")
    for file, message in (("a.yaml", "a LazyConfig is code"), ("b.yaml", "a base is YAML")):
        with pytest.raises(ConfigError, match=message):
            load_config(argument_parser().parse_args(["--config-file", file]))


def test_what_no_key_can_say_is_not_trained(folder: Path) -> None:
    zoo = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
    with pytest.raises(ConfigError, match="no key for the augmentation ResizeScale"):
        load_config(argument_parser().parse_args(["--config-file", zoo]))
    cfg = load_config(argument_parser().parse_args(["--config-file", zoo, "--eval-only"]))
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((1024,), 1024)


# ----------------------------------------------------------------------------------------------
# Checkpoints of Detectron2's project Rethinking-BatchNorm
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["shared", "separate"])
def test_retinanet_of_the_reference_project(train: str, tmp_path: Path) -> None:
    """One BN layer for all levels: outputs of the stock head with it, from its checkpoint."""
    torch.manual_seed(0)
    shape = {"input_shape": [ShapeSpec(channels=8)] * 2, "num_classes": 2, "num_anchors": 1}
    stock = RetinaNetHead(**shape, conv_dims=[8, 8], norm=nn.SyncBatchNorm)
    assert "cls_subnet.1.running_mean" in stock.state_dict()
    for module in stock.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    torch.save(
        {"model": {f"head.{k}": v for k, v in stock.state_dict().items()}}, tmp_path / "a.pth"
    )
    levels = LevelOptions(train=train, population="shared")
    model = nn.Module()
    model.head = BNRetinaNetHead(**shape, conv_dims=[8, 8], norm="SyncBN", levels=levels)
    StrictCheckpointer(model).load(str(tmp_path / "a.pth"))
    features = [torch.rand(2, 8, 5, 5), torch.rand(2, 8, 3, 3)]
    expected, actual = (head.eval()(features) for head in (stock, model.head))
    for one, other in zip(chain(*expected), chain(*actual), strict=True):
        torch.testing.assert_close(one, other)
