"""Pickles of arrays and plain containers, read without running anything that a file names.

A pickle is a program: it names functions of any module, and ``pickle.load`` calls them. Weights of
Detectron2's model zoo are pickles (``.pkl``), and need seven names, all of them numpy's.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from detectron2.structures import BoxMode

from .config import one_line
from .substitutes import substituted

_KINDS = "biufcSU"
"""Of numpy's dtypes: numbers, bools and text, which hold no reference to anything."""


def load_plain(file: IO[bytes], *, encoding: str = "ASCII") -> Any:
    """``pickle.load`` of numpy arrays of numbers or text and of builtin containers of them.

    Args:
        file: open for reading, in binary mode.
        encoding: of the text in pickles of Python 2, as in ``pickle.load``.

    Raises:
        pickle.UnpicklingError: the file has something else, which is named and not run; or is no
            pickle. A damaged pickle raises what ``pickle.load`` does.
    """
    return _Unpickler(file, encoding=encoding).load()


@contextmanager
def only_data(module: ModuleType) -> Iterator[None]:
    """While it lasts, files that ``module`` loads are data alone.

    Args:
        module: of a library; what it has as ``pickle`` loads as :func:`load_plain` does. torch
            loads with ``weights_only``, whoever calls it.
    """
    plain = SimpleNamespace(load=load_plain, UnpicklingError=pickle.UnpicklingError)
    load = partial(torch.load, weights_only=True)
    with substituted(module, "pickle", plain), substituted(torch, "load", load):
        yield


def why_not_loaded(error: Exception) -> str:
    """One line of why a file was not loaded; torch's own says how to run what the file names."""
    named = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error) and named:
        return (
            f"it names {named[1]}, which loading it would run. A checkpoint that is read here has "
            "tensors, numbers and text in lists, tuples and dicts, no more."
        )
    return one_line(error)


class _Array(np.ndarray):
    """An array while it is unpickled; numpy's own method takes any dtype that a file makes."""

    def __setstate__(self, state: Sequence[Any]) -> None:
        _check_dtype(state[2])
        super().__setstate__(state)


def _check_dtype(dtype: Any) -> None:
    """Refuse dtypes with references in them, also those whose flags a file made."""
    plain = isinstance(dtype, np.dtype) and dtype.kind in _KINDS and dtype.names is None
    if not plain or dtype.flags != np.dtype(dtype.str).flags:
        raise pickle.UnpicklingError(
            f"it has an array of dtype {dtype}; arrays here are of numbers or text."
        )


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``: an empty array whose state comes next."""
    if kind is not _Array:
        raise pickle.UnpicklingError(f"it has an array of type {kind}; arrays here are numpy's.")
    return np.ndarray.__new__(_Array, 0, "b")


def _from_buffer(buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``, of pickles of protocol 5."""
    _check_dtype(dtype)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _scalar(dtype: Any, data: bytes | str) -> Any:
    """``numpy.core.multiarray.scalar``."""
    _check_dtype(dtype)
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, which is how bytes are pickled by protocols 0 to 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes encoded as {encoding!r}.")
    return text.encode("latin1")


_NUMPY = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
_NAMES: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": OrderedDict,
    # Of the boxes in files of proposals; a number.
    "detectron2.structures.boxes.BoxMode": BoxMode,
    # Their names before numpy 2, and since.
    **{f"numpy.{core}.{name}": it for core in ("core", "_core") for name, it in _NUMPY.items()},
    **{
        f"{module}.{kind.__name__}": kind
        for module in ("builtins", "__builtin__")
        for kind in (bytearray, bytes, complex, frozenset, set)
    },
}
"""All that a pickle may name."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which loading it would run. A pickle that is read here "
                "has numpy arrays, numbers and text in lists, tuples, dicts and sets, no more."
            ) from None
