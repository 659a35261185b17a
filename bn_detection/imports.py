"""Modules of the user's own project, named on a command line."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from .config import ConfigError, one_line


def import_module_of_user(name: str, what: str) -> ModuleType:
    """Import a module, which is looked for in the working directory too.

    Args:
        name: of the module.
        what: the flag that names it, and its value.

    Raises:
        ConfigError: importing it failed.
    """
    # Where Python's -m looks first; a script looks beside itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{what} failed: {reason}") from error
