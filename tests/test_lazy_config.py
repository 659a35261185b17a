"""The LazyConfig example: every component of this package, each with a gradient."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.config import instantiate
from fvcore.common.registry import Registry
from torch import nn

from bn_detection import heads

PATH = Path(__file__).parents[1] / "examples" / "lazy_config.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lazy_config", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_ours(value: object) -> bool:
    return isinstance(value, type) and value.__module__.startswith("bn_detection.")


def components() -> set[type[nn.Module]]:
    """Of every registry of Detectron2; and the modules that ``bn_detection.heads`` offers."""
    registries = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("detectron2.")
        for value in vars(module).values()
        if isinstance(value, Registry)
    }
    registered = {obj for registry in registries.values() for _, obj in registry if is_ours(obj)}
    offered = {value for value in vars(heads).values() if is_ours(value)}
    built = {value for value in offered if issubclass(value, nn.Module)}
    # The base of the others; and what needs timm, which the example does without.
    return registered | built - {heads.PartitionedHead, heads.TimmBackbone}


def test_it_uses_every_component(example: ModuleType) -> None:
    names = {component.__name__ for component in components()}
    assert {"BNConvFCHead", "BNRetinaNet", "SmallPyramidBackbone", "BNFCOSHead"} <= names
    used = {type(m) for node in example.configs().values() for m in instantiate(node).modules()}
    assert components() - used == set()


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet", "fcos"])
def test_each_detector_trains_and_detects(name: str, example: ModuleType) -> None:
    torch.manual_seed(0)
    model = instantiate(example.configs()[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps = example.train(model)
    assert all(math.isfinite(loss) for losses in steps for loss in losses.values())
    without = {key for key, p in model.named_parameters() if p.grad is None}
    assert without == set()
    means = [key for key in before if key.endswith("running_mean")]
    assert means
    assert all((model.state_dict()[key] != before[key]).any() for key in means)
    with torch.no_grad():
        (output,) = model.eval()(example.random_images(1))
    assert len(output["instances"]) > 0


def test_overrides_reach_the_components(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["mask_rcnn.roi_heads.box_head.conv_norm=GN"])
    printed = capsys.readouterr().out
    assert printed.count(f"losses of step {example.STEPS}") == 3
    with pytest.raises(ValueError, match="ShufleBN"):
        example.main(["mask_rcnn.roi_heads.box_head.conv_norm=ShufleBN"])
