"""A library's name with another meaning, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def substituted(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """While it lasts, what a library looks up under ``name`` in ``module`` is ``value``.

    For functions that take no such argument and look the name up when they run. It is for the whole
    process.

    Args:
        module: that has the name.
        name: of a function, a class or a module.
        value: in its place.

    Raises:
        AttributeError: the module has no such name, in another version of the library.
    """
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
