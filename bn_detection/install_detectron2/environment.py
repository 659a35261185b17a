"""Keep the Detectron2 of this environment, or build and install the pure-Python one."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .patch import InstallError
from .wheel import (
    REQUIREMENTS,
    SOURCE_NAME,
    SOURCE_SHA256,
    SOURCE_VERSION,
    WHEEL_VERSION,
    build_wheel,
)

MINIMUM_TORCH = (2, 3)
"""The first version with ``torch.amp.GradScaler``."""

_PROBE = """
import importlib.util, json
spec = importlib.util.find_spec("detectron2")
found = {"present": spec is not None and spec.origin is not None}
if found["present"]:
    found["location"] = spec.origin
    try:
        import detectron2, detectron2.engine, detectron2.modeling
        found["version"] = detectron2.__version__
    except Exception as e:
        found["error"] = f"{type(e).__name__}: {e}"
print(json.dumps(found))
"""


def install(archive: Path | None = None, wheel_dir: Path | None = None) -> None:
    """Keep the Detectron2 that is there, or build and install the pure-Python one.

    Args:
        archive: the source archive; fetched from the package index where None.
        wheel_dir: where the wheel is kept, in either case; where None, it is not.

    Raises:
        InstallError: what is missing, or went wrong.
    """
    found = probe_detectron2()
    if "error" in found:
        raise InstallError(_does_not_import(found))
    if found["present"]:
        print(f"Keeping detectron2 {found['version']}, {found['location']}")
        if wheel_dir is None:
            return

    check_prerequisites()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheel = build_wheel(archive or fetch_archive(folder), wheel_dir or folder)
        if wheel_dir is not None:
            print(f"Built {wheel}")
        if found["present"]:
            return
        _pip("install", "--no-deps", str(wheel), failure=f"{wheel} could not be installed")

    found = probe_detectron2()
    print(f"Installed detectron2 {WHEEL_VERSION}, {found.get('location')}")
    if "error" in found:
        raise InstallError(_does_not_import(found))


def probe_detectron2() -> dict[str, Any]:
    """What a fresh interpreter of this environment finds: present, location, version or error."""
    with tempfile.TemporaryDirectory() as elsewhere:  # a folder named detectron2 here is not it
        out = subprocess.run(
            [sys.executable, "-c", _PROBE], cwd=elsewhere, capture_output=True, text=True
        )
    if out.returncode != 0:
        raise InstallError(f"{sys.executable} failed to look for detectron2:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def _does_not_import(found: dict[str, Any]) -> str:
    problem = f"detectron2 at {found['location']} does not import: {found['error']}. "
    missing = missing_requirements()
    if missing:
        requirements = " ".join(f"'{r}'" for r in missing)
        return f"{problem}It lacks: {sys.executable} -m pip install {requirements}"
    return (
        f"{problem}An installed detectron2 is never replaced: fix it, or remove it "
        f"({sys.executable} -m pip uninstall detectron2) and run this again."
    )


def missing_requirements() -> list[str]:
    """Those of ``REQUIREMENTS`` of which no version is installed."""
    return [r for r in REQUIREMENTS if installed_version(re.match(r"[\w-]+", r)[0]) is None]


def installed_version(distribution: str) -> str | None:
    """The version of ``distribution`` in this environment, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_prerequisites() -> None:
    """torch, torchvision and setuptools come first: the archive's setup.py imports them."""
    missing = [n for n in ("torch", "torchvision", "setuptools") if installed_version(n) is None]
    if missing:
        raise InstallError(
            f"{', '.join(missing)} must be installed first: {sys.executable} -m pip install "
            f"{' '.join(missing)}"
        )
    torch = installed_version("torch")
    if tuple(int(n) for n in re.findall(r"\d+", torch)[:2]) < MINIMUM_TORCH:
        raise InstallError(
            f"torch {torch} is installed; this build of Detectron2 needs torch "
            f"{'.'.join(map(str, MINIMUM_TORCH))} or later."
        )


def fetch_archive(folder: Path) -> Path:
    """Download the source archive into ``folder`` from the package index pip is set up with.

    pip runs the archive's setup.py for its metadata. That imports torch, hence no build
    isolation, and is why pip is given the hash too: it runs nothing of an archive that differs.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{SOURCE_NAME}=={SOURCE_VERSION} --hash=sha256:{SOURCE_SHA256}\n", encoding="utf-8"
    )
    _pip(
        "download",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        f"--no-binary={SOURCE_NAME}",
        f"--dest={folder}",
        f"--requirement={requirements}",
        failure=f"The source archive {SOURCE_NAME}=={SOURCE_VERSION} could not be fetched",
    )
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise InstallError(
            f"pip was to fetch one .tar.gz of {SOURCE_NAME}=={SOURCE_VERSION}, and fetched "
            f"{[p.name for p in archives]}."
        )
    return archives[0]


def _pip(*arguments: str, failure: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        raise InstallError(f"{failure}; pip says:\n{out.stdout}{out.stderr}".rstrip())
