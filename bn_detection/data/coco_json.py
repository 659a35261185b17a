"""COCO-format datasets named in a config, and checks of datasets before anything is trained."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import ConfigError
from .coco_content import evaluation_problems, load_coco, read_coco
from .coco_paths import absolute
from .records import (
    check_classes_agree,
    check_first_images,
    check_objects,
    check_records,
    needs_of,
)

logger = logging.getLogger(__name__)

_KEY = "DATASETS.COCO_JSON"
_EXPECTED = "expected [name, annotations.json, image root]"
_NUM_SAMPLED_IMAGES = 20

_NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "BNRetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
_NUM_CLASSES_IN_LAZY_CONFIGS = {
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
}

_PACKAGES = {
    "coco_panoptic_seg": (
        "panopticapi",
        "git+https://github.com/cocodataset/panopticapi.git",
    ),
    "lvis": ("lvis", "lvis"),
    "cityscapes_instance": ("cityscapesscripts", "cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "cityscapesscripts"),
}
"""What Detectron2's evaluators import when they evaluate, by evaluator_type, and where it is."""
_COCO_KEYPOINTS = 17

_PATH_METADATA = (
    "json_file",
    "image_root",
    "image_dir",
    "gt_dir",
    "dirname",
    "panoptic_json",
    "panoptic_root",
    "sem_seg_root",
)
"""The metadata in which Detectron2's builtin datasets keep where their files are."""


def register_coco_json(entries: Sequence[Sequence[str]]) -> None:
    """Register the datasets of ``DATASETS.COCO_JSON`` with Detectron2's catalogs.

    Their contents are read when a dataset is loaded, not now. An entry that is registered already
    is passed over.

    Args:
        entries: ``[name, annotations, image root]`` each. ``~`` and environment variables are
            expanded; relative paths are relative to the working directory. (The command line tools
            have made those of a config file relative to it, by :func:`beside_config`.)

    Raises:
        ConfigError: an entry is malformed, its annotations or image root do not exist, or its name
            is that of another dataset. Loading it raises ConfigError if the annotations are not
            in COCO's format or the images are not under the image root.
    """
    for name, json_file, image_root in read_coco_json(entries):
        _register(name, json_file, image_root)


def read_coco_json(entries: Sequence[Sequence[str]]) -> Iterator[tuple[str, str, str]]:
    """Name, annotations and image root of the entries of ``DATASETS.COCO_JSON``, which are checked.

    Raises:
        ConfigError: an entry is malformed, or its annotations or image root do not exist.
    """
    if isinstance(entries, str):
        raise ConfigError(f"{_KEY} is {entries!r}; expected a list of [name, annotations, root].")
    for entry in entries:
        if (
            not isinstance(entry, list | tuple)
            or len(entry) != 3
            or not all(isinstance(part, str) and part for part in entry)
        ):
            raise ConfigError(
                f"{_KEY}: the entry {entry!r} is malformed; {_EXPECTED}, all strings."
            )
        name = entry[0]
        json_file, image_root = map(absolute, entry[1:])
        where = f'{_KEY}: dataset "{name}"'
        if not os.path.isfile(json_file):
            raise ConfigError(
                f"{where}: the annotations {json_file} do not exist (or are no file). {_looked()}"
            )
        if not os.path.isdir(image_root):
            raise ConfigError(
                f"{where}: the image root {image_root} does not exist (or is no folder). "
                f"{_looked()}"
            )
        yield name, json_file, image_root


def _looked() -> str:
    return (
        "A relative path of a config file is looked for beside it, then in the working directory, "
        f"{os.getcwd()}."
    )


def _register(name: str, json_file: str, image_root: str) -> None:
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        there = metadata.get("json_file"), metadata.get("image_root")
        if there == (json_file, image_root):
            return
        raise ConfigError(
            f'{_KEY}: dataset "{name}" is registered already, with annotations {there[0]} and '
            f"image root {there[1]}. Give this one another name."
        )
    DatasetCatalog.register(name, partial(_load, json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def _load(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    try:
        dicts = load_coco(json_file, image_root, name)
    except ValueError as error:
        raise ConfigError(
            f'{_KEY}: dataset "{name}": {json_file} cannot be used: {error}'
        ) from error
    sample = dicts[:: -(-len(dicts) // _NUM_SAMPLED_IMAGES)]
    if not any(os.path.exists(record["file_name"]) for record in sample):
        raise ConfigError(
            f'{_KEY}: dataset "{name}": none of {len(sample)} sampled images exists under the '
            f"image root {image_root}; the first one would be {sample[0]['file_name']}."
        )
    return dicts


def check_datasets(
    cfg: CfgNode, train_names: Iterable[str], num_classes_key: str | None = None
) -> None:
    """Check the datasets that a job needs, before it starts.

    Those of DATASETS.TEST are loaded, and checked as :func:`check_test_records` does. Those of
    ``train_names`` are checked by what loads them.

    Args:
        cfg: the config, its DATASETS.COCO_JSON registered.
        train_names: datasets to be trained on: DATASETS.TRAIN, or none to only evaluate.
        num_classes_key: the key that holds the model's number of classes; by default that of
            MODEL.META_ARCHITECTURE, if it is one of Detectron2's.

    Raises:
        ConfigError: a name is not registered, files of a dataset are missing, its number of classes
            is not the model's, or a record is not what the model needs.
    """
    train_names = list(train_names)
    for key, names in (("DATASETS.TRAIN", train_names), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        for name in names:
            check_dataset_files(key, name)
    if needs_of(cfg).keypoints is not None:
        _check_keypoint_names(cfg, train_names)
    for name in cfg.DATASETS.TEST:
        check_test_records(cfg, name)
        check_evaluator(cfg, name)
    for name in (*train_names, *cfg.DATASETS.TEST):
        check_num_classes(cfg, name, num_classes_key)


def _check_keypoint_names(cfg: CfgNode, train_names: Iterable[str]) -> None:
    """Detectron2's mapper needs them, also that of an evaluation those of DATASETS.TRAIN."""
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *train_names)):
        if name in DatasetCatalog and MetadataCatalog.get(name).get("keypoint_names") is None:
            raise ConfigError(
                f'DATASETS.TRAIN: dataset "{name}": MODEL.KEYPOINT_ON needs the names of its '
                'keypoints: "keypoints": ["nose", ...] in a category of its file.'
            )


def check_evaluator(cfg: CfgNode, name: str) -> None:
    """Check that what a dataset's evaluation needs is there, which comes after the training.

    Raises:
        ConfigError: a package is not installed; the sigmas of keypoints are not known.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    package = _PACKAGES.get(kind)
    if package and importlib.util.find_spec(package[0]) is None:
        raise ConfigError(
            f'DATASETS.TEST: dataset "{name}": its evaluation needs the package {package[0]}, '
            f"which is not installed: pip install {package[1]}."
        )
    number, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    needs_sigmas = kind == "coco" and needs_of(cfg).keypoints is not None
    if needs_sigmas and len(sigmas) != number and (sigmas or number != _COCO_KEYPOINTS):
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS {list(sigmas)}: the evaluation of "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {number} needs as many numbers, such as 0.05: "
            "how exact each keypoint is, relative to the size of the object."
        )


def check_test_records(cfg: CfgNode, name: str) -> None:
    """Load a dataset to be evaluated on, and check its records and the first image of each kind.

    Raises:
        ConfigError: names the image, the annotation, and what would be right.
    """
    where = f'DATASETS.TEST: dataset "{name}"'
    records = DatasetCatalog.get(name)
    without = [{k: v for k, v in record.items() if k != "annotations"} for record in records]
    check_records(without, where, needs_of(cfg))
    check_first_images(records, where)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if metadata.get("evaluator_type") == "coco" and json_file and os.path.isfile(json_file):
        try:
            problem = next(evaluation_problems(read_coco(json_file), needs_of(cfg)), None)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ConfigError(f"{where}: {json_file}: {problem}")


def check_train_records(
    cfg: CfgNode, names: Sequence[str], records: Sequence[dict[str, Any]], *, labels: bool
) -> None:
    """Check what has been loaded to train on, or to estimate statistics from.

    Args:
        cfg: the config.
        names: of the datasets.
        records: of all of them.
        labels: whether their annotations are used.

    Raises:
        ConfigError: names the image, the annotation, and what would be right; or there is no object
            to train on; or a class has another place in another dataset.
    """
    quoted = ", ".join(f'"{name}"' for name in names)
    where = f"DATASETS.TRAIN: dataset {quoted}"
    if not labels:
        records = [{k: v for k, v in r.items() if k != "annotations"} for r in records]
    check_records(records, where, needs_of(cfg))
    check_first_images(records, where)
    if labels:
        check_objects(records, where)
        if cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor") and not all(
            "sem_seg_file_name" in record for record in records
        ):
            raise ConfigError(
                f"{where}: it has no semantic labels, which MODEL.META_ARCHITECTURE "
                f'"{cfg.MODEL.META_ARCHITECTURE}" trains on, and {_KEY} has none. Register it with '
                "Detectron2's register_coco_panoptic_separated, in a module for --import."
            )


def check_classes(cfg: CfgNode) -> None:
    """Check that the classes of DATASETS.TRAIN have the same places in DATASETS.TEST.

    Datasets whose classes are not known yet are loaded.

    Raises:
        ConfigError: a class has another place, so that it would be trained as one and evaluated as
            another.
    """
    keys: dict[str, str] = {}
    classes: dict[str, Sequence[str]] = {}
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            known = _thing_classes(name)
            if known is not None and name not in classes:
                keys[name], classes[name] = f"DATASETS.{key}", known
    if classes:
        _check_agreement(classes, keys)


def check_trained_classes(cfg: CfgNode, checkpoint: Mapping[str, Any]) -> None:
    """Check that the classes that weights were trained on have the same places in DATASETS.TEST.

    Args:
        cfg: the config.
        checkpoint: what MODEL.WEIGHTS has beside weights; nothing is known where it has no
            ``thing_classes``.

    Raises:
        ConfigError: a class has another place, so that it would be evaluated as another.
    """
    trained = checkpoint.get("thing_classes")
    if trained is None:
        return
    of_weights = cfg.MODEL.WEIGHTS or "the last checkpoint"
    classes, keys = {of_weights: trained}, {of_weights: "MODEL.WEIGHTS"}
    for name in cfg.DATASETS.TEST:
        known = _thing_classes(name)
        if known is not None:
            keys[name], classes[name] = "DATASETS.TEST", known
    _check_agreement(classes, keys)


def _thing_classes(name: str) -> Sequence[str] | None:
    """The classes of a dataset, which is loaded if they are not known yet."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None and metadata.get("json_file"):
        DatasetCatalog.get(name)
    return metadata.get("thing_classes")


def _check_agreement(classes: dict[str, Sequence[str]], keys: dict[str, str]) -> None:
    for warning in check_classes_agree(classes, keys):
        logger.warning("%s", warning)


def check_dataset_files(key: str, name: str) -> None:
    """Check that a dataset is registered, and that its files are there.

    Args:
        key: that holds the name, for messages.
        name: of the dataset.

    Raises:
        ConfigError: it is not, or they are not.
    """
    _check_registered(key, name)
    _check_files(key, name)


def _check_registered(key: str, name: str) -> None:
    if name in DatasetCatalog:
        return
    raise ConfigError(f'{key}: there is no dataset "{name}". {near_names(name, DatasetCatalog)}')


def near_names(name: str, known: Iterable[str]) -> str:
    """What to tell about a name that no dataset has, of those that are known."""
    near = difflib.get_close_matches(name, known, n=5)
    hint = f"Registered names like it: {', '.join(near)}." if near else "No such name is known."
    return f"{hint} {_KEY} registers datasets in COCO's format."


def _check_files(key: str, name: str) -> None:
    metadata = MetadataCatalog.get(name)
    for attribute in _PATH_METADATA:
        path = metadata.get(attribute)
        if isinstance(path, str) and "://" not in path and not os.path.exists(path):
            root = os.environ.get("DETECTRON2_DATASETS")
            state = f"now {root}" if root else 'not set, so "datasets" is used'
            raise ConfigError(
                f'{key}: dataset "{name}": {os.path.abspath(path)} does not exist. Detectron2 '
                "looks for its builtin datasets under the folder that the environment variable "
                f"DETECTRON2_DATASETS names ({state})."
            )


def check_num_classes(cfg: CfgNode, name: str, num_classes_key: str | None = None) -> None:
    """Check that a dataset has as many classes as the model.

    Passes if the dataset's class names are not known (it has not been loaded, or has none), or if
    no key says how many classes the model has.

    Args:
        cfg: the config.
        name: of a registered dataset.
        num_classes_key: as in :func:`check_datasets`.

    Raises:
        ConfigError: names the key, the dataset, both numbers and the classes.
    """
    key = num_classes_key or _NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    classes = MetadataCatalog.get(name).get("thing_classes")
    if key is None or classes is None:
        return
    num_classes: Any = cfg
    for part in key.split("."):
        num_classes = num_classes[part]
    if len(classes) != num_classes:
        number = len(classes)
        of_file = cfg.BN.LAZY_CONFIG and _NUM_CLASSES_IN_LAZY_CONFIGS.get(key)
        advice = f"Give {of_file}={number}" if of_file else f"Set {key} {number}"
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ConfigError(
            f'{key} is {num_classes}, and the dataset "{name}" has {number} classes ({shown}). '
            f"{advice}."
        )
