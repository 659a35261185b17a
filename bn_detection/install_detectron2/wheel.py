"""The pure-Python wheel of Detectron2 v0.6, from its source archive."""

from __future__ import annotations

import base64
import hashlib
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .patch import FilePatch, InstallError, apply_patch, read_patch

SOURCE_NAME = "pb1-detectron2"
"""The distribution of the package index that holds v0.6: its Python files are those of the
official tag, its C++ files are missing, which is why ``pip install`` of it fails."""
SOURCE_VERSION = "0.6"
SOURCE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

WHEEL_VERSION = "0.6+pure"
"""As upstream's own wheels: ``0.6+cu113`` was built for CUDA 11.3, ``0.6+pure`` is pure Python.
``detectron2.__version__`` is "0.6"."""

UPSTREAM = "https://github.com/facebookresearch/detectron2"

PATCH = Path(__file__).with_name("detectron2-0.6.patch")

PACKAGES = {
    "detectron2": "detectron2",
    "detectron2/projects/point_rend": "projects/PointRend/point_rend",
    "detectron2/projects/deeplab": "projects/DeepLab/deeplab",
    "detectron2/projects/panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
"""Folder in the wheel: folder in the archive. As upstream's setup.py lays them out."""

PACKAGED_SUFFIXES = (".py", ".yaml")

OPTIONAL_REQUIREMENTS = ("shapely", "psutil", "pygments>=2.2")
"""Upstream's extra ``all``. Cropping polygon masks (``INPUT.CROP``) needs shapely."""

REQUIREMENTS = (
    "torch>=2.3",
    "torchvision",
    "numpy",
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)
"""Those of upstream's setup.py without ``black`` (pinned to a version of 2021, and needed by
``LazyConfig.to_py`` alone), ``future`` and ``pydot`` (for caffe2) and ``dataclasses`` (in the
standard library); with what it imports and does not name."""


def build_wheel(archive: Path, folder: Path) -> Path:
    """Build the wheel from ``archive`` into ``folder``; returns its path.

    Raises:
        InstallError: if the archive is not the expected one, or the patch does not match it.
    """
    check_hash(archive)
    patches = read_patch(PATCH.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = unpack(archive, Path(scratch))
        apply_patch(root, patches)
        return write_wheel(wheel_contents(root, patches), folder)


def check_hash(archive: Path) -> None:
    """Refuse an archive that is not, byte for byte, the one the patch was written for."""
    if not archive.is_file():
        raise InstallError(f"There is no file {archive}.")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise InstallError(
            f"{archive} is not the expected {SOURCE_NAME} {SOURCE_VERSION}: its sha256 is {found}, "
            f"and must be {SOURCE_SHA256}."
        )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack into ``folder``; returns the archive's one top-level folder."""
    with tarfile.open(archive) as tar:
        # Python 3.10 and 3.11 have the filter from 3.10.12 and 3.11.4 on.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(folder)
    return next(p for p in folder.iterdir() if p.is_dir())


def wheel_contents(root: Path, patches: Sequence[FilePatch]) -> Iterator[tuple[str, bytes]]:
    """(path in the wheel, contents) of each file, from the patched source tree at ``root``."""
    for target, source in PACKAGES.items():
        for path in sorted((root / source).rglob("*")):
            if path.suffix in PACKAGED_SUFFIXES and path.is_file():
                relative = path.relative_to(root / source).as_posix()
                yield f"{target}/{relative}", path.read_bytes()

    info = f"detectron2-{WHEEL_VERSION}.dist-info"
    yield f"{info}/licenses/LICENSE", (root / "LICENSE").read_bytes()
    yield f"{info}/METADATA", _metadata(patches).encode()
    yield (
        f"{info}/WHEEL",
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    )
    yield f"{info}/top_level.txt", b"detectron2\n"


def _metadata(patches: Sequence[FilePatch]) -> str:
    """The core metadata. Its description says what was changed, as the license asks."""
    lines = [
        "Metadata-Version: 2.4",
        "Name: detectron2",
        f"Version: {WHEEL_VERSION}",
        "Summary: Detectron2 v0.6 in pure Python: edited for recent libraries, without the "
        "compiled operators",
        "Author: FAIR",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        f"Project-URL: Homepage, {UPSTREAM}",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {r}" for r in REQUIREMENTS),
        "Provides-Extra: all",
        *(f"Requires-Dist: {r}; extra == 'all'" for r in OPTIONAL_REQUIREMENTS),
        "",
        f"Built from {SOURCE_NAME}-{SOURCE_VERSION}.tar.gz (sha256 {SOURCE_SHA256}). Changed:",
        "",
        *(f"* {patch.file}: {patch.reason}" for patch in patches),
    ]
    return "\n".join(lines) + "\n"


def write_wheel(contents: Iterable[tuple[str, bytes]], folder: Path) -> Path:
    """Write the wheel into ``folder``. The same contents give the same bytes."""
    wheel = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    record_name = f"detectron2-{WHEEL_VERSION}.dist-info/RECORD"
    record = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:

        def add(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name)  # dated 1980, whenever it is built
            entry.external_attr = 0o644 << 16
            file.writestr(entry, data, zipfile.ZIP_DEFLATED)

        for name, data in contents:
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(data)}")
            add(name, data)
        record.append(f"{record_name},,")
        add(record_name, ("\n".join(record) + "\n").encode())
    return wheel
