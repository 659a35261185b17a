"""The datasets of a config, known to Detectron2 by name."""

from __future__ import annotations

from detectron2.config import CfgNode

from .builtin import register_builtin
from .coco_json import register_coco_json
from .corruptions import register_corrupted
from .keypoints import register_keypoints


def register_datasets(cfg: CfgNode) -> None:
    """Register the datasets of DATASETS.COCO_JSON, the embedded and corrupted ones of ``cfg``.

    Embedded ones are made if they are not there.

    Args:
        cfg: with :func:`bn_detection.add_bn_detection_config`'s keys.

    Raises:
        ConfigError: an entry is malformed, its files are not there, a name that ends in
            ``@corruption:severity`` means nothing, or MODEL.KEYPOINT_ON and the categories of a
            file do not name the keypoints.
    """
    register_coco_json(cfg.DATASETS.COCO_JSON)
    if cfg.MODEL.KEYPOINT_ON:
        register_keypoints(cfg)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    register_builtin(names)
    for name in names:
        if "@" in name:
            register_corrupted(name)
