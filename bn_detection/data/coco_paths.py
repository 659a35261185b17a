"""Where the relative paths of DATASETS.COCO_JSON lead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..config import ConfigError


def absolute(path: str) -> str:
    """A path with ``~`` and environment variables expanded, else of the working directory."""
    return os.path.abspath(expanded(path))


def expanded(path: str) -> str:
    """``~`` and environment variables expanded."""
    return os.path.expanduser(os.path.expandvars(path))


def beside_config(entries: Any, config_file: str) -> Any:
    """The entries of DATASETS.COCO_JSON of a config file, with paths relative to its folder.

    A path that is not there stays relative where the working directory has it.

    Args:
        entries: ``[name, annotations, image root]`` each; others are left as they are.
        config_file: that has them.

    Raises:
        ConfigError: both folders have the path.
    """
    if not isinstance(entries, list | tuple):
        return entries
    folder = os.path.dirname(os.path.abspath(config_file))
    return [
        [entry[0], *(_beside(path, folder, config_file) for path in entry[1:])]
        if _is_entry(entry)
        else entry
        for entry in entries
    ]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, Sequence)
        and len(entry) == 3
        and all(isinstance(part, str) and part for part in entry)
    )


def _beside(path: str, folder: str, config_file: str) -> str:
    if os.path.isabs(expanded(path)):
        return path
    beside, here = os.path.normpath(os.path.join(folder, expanded(path))), absolute(path)
    if not os.path.exists(here):
        return beside
    if os.path.exists(beside) and not os.path.samefile(beside, here):
        raise ConfigError(
            f"--config-file {config_file}: DATASETS.COCO_JSON: {path} is there twice, {beside} "
            f"beside the config file and {here} in the working directory. Give the absolute path."
        )
    return path if here != beside else beside
