"""Corrupted datasets: ``name@corruption:severity`` for any registered dataset.

Those of COCO-C (Michaelis et al. 2019, arXiv:1907.07484), after Hendrycks & Dietterich 2019
(arXiv:1903.12261), are registered here. Nothing is written: an image is corrupted when it is read,
under a path ``corrupted://corruption:severity/path``. So every mapper works unchanged.
"""

from __future__ import annotations

import difflib
import io
import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import IO, Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from ..config import ConfigError, one_line
from .builtin import register_builtin
from .coco_json import near_names

Corruption = Callable[[np.ndarray, int, int], np.ndarray]
"""Takes an image, ``(H, W, 3)`` uint8, RGB, a severity, and a seed of what is random, from 0 to
2**32 - 1, which is the same each time that the image is read; returns an image of the same shape.
"""

CORRUPTIONS: dict[str, Corruption] = {}
"""By name; those of COCO-C come first, in its order."""

SEVERITIES = (1, 2, 3, 4, 5)

_COCO_C = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
_PREFIX = "corrupted://"
_HAVE_A_SEED = ("impulse_noise", "glass_blur")  # the others use numpy's global generator
_SMALLEST_SIDE = 32  # of the images that the library accepts, px


def register_corruption(name: str) -> Callable[[Corruption], Corruption]:
    """Function decorator: make a :data:`Corruption` available under ``name``.

    Raises:
        ValueError: the name is taken, or cannot be a part of ``name@corruption:severity``.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f'The corruption "{name}": a name has letters, digits and "_" alone.')
    if name in CORRUPTIONS:
        raise ValueError(f'The corruption "{name}" is registered already.')

    def register(corruption: Corruption) -> Corruption:
        CORRUPTIONS[name] = corruption
        return corruption

    return register


def register_corrupted(name: str) -> None:
    """Register ``name@corruption:severity``, the corrupted images of a registered dataset.

    Its dicts and metadata are those of the dataset, except for ``file_name`` and ``image_root``. A
    name that is registered already is passed over. The embedded datasets need not be registered.

    Args:
        name: such as ``coco_2017_val@fog:3``.

    Raises:
        ConfigError: the dataset, the corruption or the severity does not exist, the dataset is
            corrupted already, or the library is not installed.
    """
    if "@" in name and name in DatasetCatalog:
        return
    base, prefix = read_corrupted_name(name)
    register_builtin([base])
    if base not in DatasetCatalog:
        near = near_names(base, DatasetCatalog)
        raise ConfigError(f'DATASETS: "{name}": there is no dataset "{base}". {near}')
    DatasetCatalog.register(name, lambda: _load(base, name, prefix))
    _copy_metadata(base, name, prefix)


def read_corrupted_name(name: str) -> tuple[str, str]:
    """Split ``name@corruption:severity``; the dataset need not be there.

    Returns:
        The name of the clean dataset, and the prefix of the paths of the corrupted images.

    Raises:
        ConfigError: the corruption or the severity does not exist, the dataset is corrupted
            already, or the library is not installed.
    """
    where = f'DATASETS: "{name}"'
    base, at, suffix = name.rpartition("@")
    if not at:
        raise ConfigError(f"{where}: a corrupted dataset is name@corruption:severity.")
    corruption, _, severity = suffix.partition(":")
    if corruption not in CORRUPTIONS:
        near = difflib.get_close_matches(corruption, CORRUPTIONS, n=1, cutoff=0.5)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(
            f'{where}: there is no corruption "{corruption}".{hint} The corruptions are '
            f"{', '.join(CORRUPTIONS)}."
        )
    if severity not in map(str, SEVERITIES):
        raise ConfigError(
            f'{where}: there is no severity "{severity}"; it is one of '
            f"{', '.join(map(str, SEVERITIES))}, as in {base}@{corruption}:3."
        )
    if base.rpartition("@")[2].partition(":")[0] in CORRUPTIONS:
        raise ConfigError(f'{where}: "{base}" is corrupted already; name one corruption.')
    if corruption in _COCO_C:
        _library(where)
    return base, f"{_PREFIX}{corruption}:{severity}/"


def _load(base: str, name: str, prefix: str) -> list[dict[str, Any]]:
    dicts = DatasetCatalog.get(base)
    _copy_metadata(base, name, prefix)  # some is known only now, such as the classes of COCO files
    return [{**record, "file_name": prefix + record["file_name"]} for record in dicts]


def _copy_metadata(base: str, name: str, prefix: str) -> None:
    metadata = MetadataCatalog.get(base).as_dict()
    del metadata["name"]
    if "image_root" in metadata:
        metadata["image_root"] = prefix + metadata["image_root"]
    MetadataCatalog.get(name).set(**metadata)


def corrupt(image: np.ndarray, corruption: str, severity: int, *, seed: int) -> np.ndarray:
    """Corrupt an image.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        corruption: one of :data:`CORRUPTIONS`.
        severity: one of :data:`SEVERITIES`.
        seed: of what is random in it, from 0 to 2**32 - 1.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        ValueError: the corruption gave something else.
    """
    corrupted = CORRUPTIONS[corruption](image, severity, seed)
    if corrupted.shape != image.shape or corrupted.dtype != np.uint8:
        raise ValueError(
            f"The corruption {corruption} made {corrupted.dtype} of shape {corrupted.shape} of an "
            f"image of shape {image.shape}; it must be uint8 of the same shape."
        )
    return corrupted


def _of_coco_c(name: str, image: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """Sides below 32 pixels are continued by reflection before, and cut again after.

    Numpy's generator is afterwards as it was.
    """
    height, width = image.shape[:2]
    missing = [(0, max(_SMALLEST_SIDE - side, 0)) for side in (height, width)]
    image = np.pad(image, (*missing, (0, 0)), mode="symmetric")
    seeded = {"seed": seed} if name in _HAVE_A_SEED else {}
    library = _library(f"The corruption {name}")
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        corrupted = library.corrupt(image, severity, name, **seeded)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return corrupted[:height, :width]


for _name in _COCO_C:
    register_corruption(_name)(partial(_of_coco_c, _name))


def _library(where: str) -> Any:
    try:
        import imagecorruptions
    except ImportError as error:
        raise ConfigError(
            f"{where} needs the library imagecorruptions-imaug, which cannot be imported: "
            f'{one_line(error)}. Install it by: pip install "bn_detection[corruptions]" && '
            "pip install --no-deps imagecorruptions-imaug"
        ) from error
    return imagecorruptions


class _CorruptedFiles(PathHandler):
    """Opens ``corrupted://corruption:severity/path``: an image, corrupted, as a BMP file."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        if mode != "rb":
            raise ValueError(f'{path} can only be read, with mode "rb"; this is mode "{mode}".')
        corruption, severity, original = _split(path)
        image = read_image(original, format="RGB")
        # Not of the folder, so that a copy of the dataset elsewhere has the same pixels.
        seed = zlib.crc32(f"{original.rpartition('/')[2]}/{corruption}/{severity}".encode())
        corrupted = corrupt(image, corruption, severity, seed=seed)
        file = io.BytesIO()
        Image.fromarray(corrupted).save(file, "BMP")
        file.seek(0)
        return file

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return PathManager.exists(_split(path)[2])

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return PathManager.isfile(_split(path)[2])


def _split(path: str) -> tuple[str, int, str]:
    kind, _, original = path.removeprefix(_PREFIX).partition("/")
    corruption, _, severity = kind.partition(":")
    return corruption, int(severity), original


PathManager.register_handler(_CorruptedFiles())
