"""A folder of images as a dataset without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import ConfigError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that count as images, in lower or upper case."""


def register_image_folder(folder: str) -> str:
    """Register the images of a folder and its subfolders, sorted by path, without annotations.

    A folder that is registered already is passed over. The files are listed when the dataset is
    loaded, and now, to know that there are some.

    Args:
        folder: its path; ``~`` is expanded.

    Returns:
        The name of the dataset.

    Raises:
        ConfigError: there is no such folder, or no image in it.
    """
    root = Path(folder).expanduser().resolve()
    name = f"images in {root}"
    if name in DatasetCatalog:
        return name
    if not root.is_dir():
        raise ConfigError(f"--images {folder}: there is no such folder.")
    if not _load(root):
        raise ConfigError(
            f"--images {folder}: there is no image in it or its subfolders; images end in "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    DatasetCatalog.register(name, lambda: _load(root))
    MetadataCatalog.get(name).set(image_root=str(root))
    return name


def _load(root: Path) -> list[dict[str, Any]]:
    paths = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(str(path) for path in paths if path.is_file())
    return [{"file_name": path, "image_id": number} for number, path in enumerate(files)]
