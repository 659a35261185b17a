"""A job in miniature: what it will build is built once before, so that errors come at once."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from ..config import ConfigError, add_bn_detection_config, one_line
from ..heads import configure_model
from .lazy_files import build
from .values import leaves

_REGISTRIES = {
    "META_ARCH": "MODEL.META_ARCHITECTURE",
    "BACKBONE": "MODEL.BACKBONE.NAME",
    "PROPOSAL_GENERATOR": "MODEL.PROPOSAL_GENERATOR.NAME",
    "RPN_HEAD": "MODEL.RPN.HEAD_NAME",
    "ANCHOR_GENERATOR": "MODEL.ANCHOR_GENERATOR.NAME",
    "ROI_HEADS": "MODEL.ROI_HEADS.NAME",
    "ROI_BOX_HEAD": "MODEL.ROI_BOX_HEAD.NAME",
    "ROI_MASK_HEAD": "MODEL.ROI_MASK_HEAD.NAME",
    "ROI_KEYPOINT_HEAD": "MODEL.ROI_KEYPOINT_HEAD.NAME",
    "SEM_SEG_HEADS": "MODEL.SEM_SEG_HEAD.NAME",
}
"""The key that chooses from each of Detectron2's registries."""
_ARCHITECTURES = ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "BNRetinaNet")
"""Those whose inputs are known."""
_ModelOf = Callable[[CfgNode], nn.Module]
_SIDE = 256
_NOISE = "bn_detection_noise"
_FEW_ROIS, _FEW_PROPOSALS = 8, 50
_SECONDS_TO_SEARCH = 20.0


def rehearse(cfg: CfgNode, *, training: bool, step: bool = True) -> None:
    """Build what a job will build, on the CPU, and run one step on images of noise.

    Random generators are afterwards as they were.

    Args:
        cfg: the config, of which the keys of this project have been checked.
        training: whether it will be trained.
        step: whether to run a step too, where the model is one of Detectron2's.

    Raises:
        ConfigError: something cannot be built or run. Names the key where it can be told, or what
            was built.
    """
    small: list[CfgNode] = []
    groups = ("INPUT", "TEST", "MODEL")
    _stage("making the job small", groups, cfg, lambda c: small.append(_in_small(c)))
    cfg = small[0]
    with (
        _generators_kept(),
        _quiet(),
        _keypoints_known(cfg),
        tempfile.TemporaryDirectory() as folder,
    ):
        record = _record(cfg, Path(folder, "noise.png"))
        built: list[nn.Module] = []
        _stage("building the model", ("MODEL", "BN"), cfg, lambda c: built.append(_build(c)))

        def model_of(other: CfgNode) -> nn.Module:
            return built[0] if other is cfg else _build(other)

        if training:
            _stage("building the optimizer", ("SOLVER",), cfg, _build_solver)
            load = partial(_load, record)
            _stage("loading images to train on", ("INPUT", "DATALOADER"), cfg, load)
        _stage("loading images to evaluate on", ("INPUT",), cfg, partial(_map, record, False))
        known = cfg.MODEL.META_ARCHITECTURE in _ARCHITECTURES and not cfg.MODEL.LOAD_PROPOSALS
        if step and known:
            groups = ("MODEL", "INPUT", "BN", "TEST")
            if training:
                _stage("a step of training", groups, cfg, partial(_train, record, model_of))
            _stage("a step of inference", groups, cfg, partial(_infer, record, model_of))


def _stage(
    what: str, groups: tuple[str, ...], cfg: CfgNode, run: Callable[[CfgNode], object]
) -> None:
    """Run it; an exception becomes a ConfigError that names a key of ``groups``, where it can."""
    start = time.monotonic()
    try:
        run(cfg)
    except ConfigError:
        raise
    except Exception as error:
        seconds = time.monotonic() - start
        reason = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, KeyError) and (choice := _unregistered(cfg, error)):
            raise ConfigError(choice) from error
        keys = (
            list(_mentioned(cfg, groups, one_line(error)))
            or list(_to_blame(cfg, groups, run, seconds))
            or list(_emptied(cfg, groups))
        )
        if keys:
            raise ConfigError(f"{' or '.join(keys)}: with it {what} fails: {reason}") from error
        nodes = ", ".join(f"{group}.*" for group in groups)
        raise ConfigError(f"With this config {what} fails (keys {nodes}): {reason}") from error


def _unregistered(cfg: CfgNode, error: KeyError) -> str | None:
    for registry, key in _REGISTRIES.items():
        if f"'{registry}' registry" in str(error):
            value: Any = cfg
            for part in key.split("."):
                value = value[part]
            return (
                f'{key} "{value}": nothing of that name is registered. If it is of your own '
                "project, --import MODULE imports what registers it."
            )
    return None


def _to_blame(
    cfg: CfgNode, groups: tuple[str, ...], run: Callable[[CfgNode], object], seconds: float
) -> Iterator[str]:
    """The keys whose default alone lets it pass, as far as there is time to try."""
    known = _defaults()
    deadline = time.monotonic() + _SECONDS_TO_SEARCH
    for key, value in _changed(cfg, groups):
        if time.monotonic() + seconds > deadline:
            return
        other = cfg.clone()
        node: Any = other
        *path, last = key.split(".")
        for part in path:
            node = node[part]
        node[last] = known[key]
        try:
            run(other)
        except Exception:  # that key is not what is wrong
            continue
        yield f"{key} {value}"


def _defaults() -> dict[str, Any]:
    defaults = get_cfg()
    add_bn_detection_config(defaults)
    return dict(leaves(defaults))


def _mentioned(cfg: CfgNode, groups: tuple[str, ...], reason: str) -> Iterator[str]:
    """The keys of a text, or of a list with one, that an error repeats: a name or a feature's."""
    words = set(re.findall(r"[^\s'\",.:()\[\]]{2,}", reason))
    for key, value in _changed(cfg, groups):
        if not words.isdisjoint([value] if isinstance(value, str) else _texts(value)):
            yield f"{key} {value}"


def _emptied(cfg: CfgNode, groups: tuple[str, ...]) -> Iterator[str]:
    for key, value in _changed(cfg, groups):
        if isinstance(value, list | tuple) and not value:
            yield f"{key} {value}"


def _changed(cfg: CfgNode, groups: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The keys of these groups whose values are not the defaults."""
    known = _defaults()
    for key, value in leaves(cfg):
        if key.split(".")[0] in groups and key in known and known[key] != value:
            yield key, value


def _texts(value: Any) -> list[str]:
    return [x for x in value if isinstance(x, str)] if isinstance(value, list | tuple) else []


def _in_small(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.BN.KERNELS = "auto"
    heads, rpn = cfg.MODEL.ROI_HEADS, cfg.MODEL.RPN
    heads.BATCH_SIZE_PER_IMAGE = min(heads.BATCH_SIZE_PER_IMAGE, _FEW_ROIS)
    for key in ("PRE_NMS_TOPK_TRAIN", "PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TRAIN"):
        rpn[key] = min(rpn[key], _FEW_PROPOSALS)
    rpn.POST_NMS_TOPK_TEST = min(rpn.POST_NMS_TOPK_TEST, _FEW_ROIS)
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = [sizes] if isinstance(sizes, int) else sizes
    cfg.INPUT.MIN_SIZE_TRAIN = tuple(min(size, _SIDE) for size in sizes)
    cfg.INPUT.MIN_SIZE_TEST = min(cfg.INPUT.MIN_SIZE_TEST, _SIDE)
    cfg.TEST.AUG.MIN_SIZES = tuple(min(size, _SIDE) for size in cfg.TEST.AUG.MIN_SIZES[:1])
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = comm.get_world_size()
    return cfg


def _build(cfg: CfgNode) -> nn.Module:
    return configure_model(cfg, build(cfg))


def _build_solver(cfg: CfgNode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    DefaultTrainer.build_lr_scheduler(cfg, optimizer)


def _record(cfg: CfgNode, path: Path) -> dict[str, Any]:
    """An image of noise, at ``path``, with two objects that have all that a model may need."""
    noise = np.random.randint(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)  # noqa: NPY002
    Image.fromarray(noise).save(path)
    annotations = []
    for x0, y0, x1, y1 in ((20, 20, 120, 100), (140, 60, 200, 220)):
        keypoint = [(x0 + x1) / 2, (y0 + y1) / 2, 2]
        annotations.append(
            {
                "bbox": [x0, y0, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                "keypoints": keypoint * cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
            }
        )
    image = {"file_name": str(path), "height": _SIDE, "width": _SIDE, "image_id": 0}
    return {**image, "annotations": annotations}


def _map(record: dict[str, Any], training: bool, cfg: CfgNode) -> dict[str, Any]:
    return DatasetMapper(cfg, training)(record)


def _load(record: dict[str, Any], cfg: CfgNode) -> None:
    mapper = DatasetMapper(cfg, True)
    mapper(record)
    build_detection_train_loader(cfg, mapper=mapper, dataset=[record])


def _train(record: dict[str, Any], model_of: _ModelOf, cfg: CfgNode) -> None:
    images = max(cfg.BN.VIRTUAL_WORKERS, 1)
    with EventStorage(0), torch.no_grad():
        model_of(cfg).train()([_map(record, True, cfg) for _ in range(images)])


def _infer(record: dict[str, Any], model_of: _ModelOf, cfg: CfgNode) -> None:
    model = model_of(cfg).eval()
    with torch.no_grad():
        model([_map(record, False, cfg)])
        if cfg.TEST.AUG.ENABLED:
            GeneralizedRCNNWithTTA(cfg, model)([_map(record, False, cfg)])


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    numbers, state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(state)  # noqa: NPY002


@contextlib.contextmanager
def _keypoints_known(cfg: CfgNode) -> Iterator[None]:
    """The images of noise have keypoints with names."""
    if not cfg.MODEL.KEYPOINT_ON:
        yield
        return
    names = [str(number) for number in range(cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)]
    MetadataCatalog.get(_NOISE).set(keypoint_names=names, keypoint_flip_map=[])
    cfg.DATASETS.TRAIN = (_NOISE,)
    try:
        yield
    finally:
        MetadataCatalog.remove(_NOISE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of what is built, which come again with the job."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
