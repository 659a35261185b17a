"""BatchNorm in detectors: normalization batches, population statistics and leakage.

An extension of Detectron2 after *Rethinking "Batch" in BatchNorm* (Wu & Johnson, 2021,
arXiv:2105.07576). Importing it registers its components; ``add_bn_detection_config`` adds its keys.

The components enter Detectron2's registries as soon as these are there: at once, where Detectron2
is imported already, otherwise when it is. Until then, and until something of this package is used,
neither torch nor Detectron2 is imported: the command line starts at once, and installs Detectron2
where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import heads, norm
    from .config import ConfigError, add_bn_detection_config
    from .data import register_datasets
    from .heads import BNOptions, configure_model, convert_norm, to_plain_batch_norm
    from .instrument import diagnose, measure_leakage, recalibrate
    from .norm import PartitionedBatchNorm2d, set_inference

__version__ = "0.1.0"

__all__ = [
    "BNOptions",
    "ConfigError",
    "PartitionedBatchNorm2d",
    "add_bn_detection_config",
    "configure_model",
    "convert_norm",
    "diagnose",
    "heads",
    "measure_leakage",
    "norm",
    "recalibrate",
    "register_datasets",
    "set_inference",
    "to_plain_batch_norm",
]

_REGISTERED = {"detectron2.data": "data", "detectron2.modeling": "heads"}
"""Who enters whose registries."""
_ROOMS = ("config", "norm", "heads", "data", "instrument")
"""Where the names of ``__all__`` are defined."""


def __getattr__(name: str) -> Any:
    """A name of ``__all__`` is imported when it is first used."""
    try:
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        for room in _ROOMS if name in __all__ else ():
            if hasattr(found := import_module(f"{__name__}.{room}"), name):
                return getattr(found, name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ImportError(
            "bn_detection needs Detectron2, which is not installed: run bn-detection "
            "install-detectron2",
            name="detectron2",
        ) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _WithDetectron2(MetaPathFinder):
    """Imports components at the end of the import of the registries that they enter."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTERED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(f"{__name__}.{_REGISTERED[fullname]}")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WithDetectron2())
for _registry, _room in _REGISTERED.items():
    if _registry in sys.modules:
        import_module(f"{__name__}.{_room}")
