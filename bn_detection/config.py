"""The project's configuration keys: each is defined here once, with its meaning."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


class ConfigError(ValueError):
    """A configuration or its input cannot be used as it is.

    The message names the key (or flag, or file), the value, and what would be right. The command
    line tools print it without a traceback and exit with status 2.
    """


def add_bn_detection_config(cfg: CN) -> None:
    """Add every key of this project to a Detectron2 config, in place.

    Args:
        cfg: a node from :func:`detectron2.config.get_cfg`.
    """
    cfg.BN = CN()
    # Globs over module names: the layers that the inference (and population) keys below act on.
    cfg.BN.MODULES = ["roi_heads.*", "head.*"]
    # Weight of the newest mini-batch in the running statistics (EMA), as in torch.nn.BatchNorm2d.
    cfg.BN.MOMENTUM = 0.1
    # Added to the variance before its square root.
    cfg.BN.EPS = 1e-5
    # What inference normalizes with: "population" (the running statistics) or "batch" (the
    # statistics of the current forward on this process).
    cfg.BN.INFERENCE = "population"

    # COCO-format datasets to register: [[name, annotations.json, image root], ...]. The names can
    # then be used in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_JSON = []
