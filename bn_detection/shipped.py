"""The configs and studies that come with the package, found by name."""

from __future__ import annotations

import os
from pathlib import Path

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
