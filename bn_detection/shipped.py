"""The configs and studies that come with the package, and those of Detectron2, found by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .config import ConfigError

SHIPPED = Path(__file__).parent / "configs"
"""The top-level ``configs/``, as package data."""


def find_shipped(name: str) -> Path | None:
    """The file that has a name among those of the package, if there is one.

    Args:
        name: such as ``quickstart/mask_rcnn_bn.yaml``; ``configs/`` before it makes no difference,
            so that what works in a clone works elsewhere.
    """
    path = SHIPPED / name.removeprefix("configs/")
    # pathlib's raises where a name is too long.
    return path if os.path.isfile(path) else None


def find_config(name: str) -> str:
    """The path of a config file: of the user, of this package, or of Detectron2's model zoo.

    Nothing is imported, so that a name that is wrong is refused at once.

    Args:
        name: a path, or the name that a file has in ``configs/`` or in the model zoo.

    Raises:
        ConfigError: it is nowhere; says where it was looked for.
        ModuleNotFoundError: it is not here, and there is no Detectron2 to look in.
    """
    if os.path.isfile(name):
        return name
    if found := find_shipped(name):
        return str(found)
    detectron2 = importlib.util.find_spec("detectron2")
    if detectron2 is None or detectron2.origin is None:
        raise ModuleNotFoundError("No module named 'detectron2'", name="detectron2")
    zoo = os.path.join(os.path.dirname(detectron2.origin), "model_zoo", "configs")
    if os.path.isfile(path := os.path.join(zoo, name)):
        return path
    raise ConfigError(
        f"--config-file {name}: there is no such file, none in {SHIPPED}, and none in Detectron2's "
        f"model zoo, {zoo}."
    )
