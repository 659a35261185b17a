#!/usr/bin/env python3
"""Install Detectron2 v0.6 without a compiler, as a pure-Python wheel.

Detectron2's compiled part is deformable convolution, rotated boxes and a fast COCO evaluation;
the rest of it is Python. This tool fetches the source archive of v0.6 from the package index,
checks its hash, applies the compatibility edits listed in ``EDITS`` (Python 3.10 to 3.12, recent
torch, numpy and Pillow), and installs the result as a wheel. A compiled operator, when it is
used, raises an error that names it and says how to get it.

Run it with the interpreter of the environment that is to have Detectron2, after torch,
torchvision and setuptools::

    python tools/install_detectron2.py

A Detectron2 that is already installed, of whatever version, is kept as it is.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# ----------------------------------------------------------------------------------------------
# What is fetched, and what is made of it
# ----------------------------------------------------------------------------------------------

SOURCE_NAME = "pb1-detectron2"
"""The distribution of the package index that holds v0.6: its Python files are those of the
official tag, its C++ files are missing, which is why ``pip install`` of it fails."""
SOURCE_VERSION = "0.6"
SOURCE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

WHEEL_VERSION = "0.6+pure"
"""As upstream's own wheels: ``0.6+cu113`` was built for CUDA 11.3, ``0.6+pure`` is pure Python.
``detectron2.__version__`` is "0.6"."""

UPSTREAM = "https://github.com/facebookresearch/detectron2"

PACKAGES = {
    "detectron2": "detectron2",
    "detectron2/projects/point_rend": "projects/PointRend/point_rend",
    "detectron2/projects/deeplab": "projects/DeepLab/deeplab",
    "detectron2/projects/panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
"""Folder in the wheel: folder in the archive. As upstream's setup.py lays them out."""

PACKAGED_SUFFIXES = (".py", ".yaml")

MINIMUM_TORCH = (2, 3)
"""The first version with ``torch.amp.GradScaler``."""

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


class InstallError(RuntimeError):
    """Something the user can act on; printed without a traceback."""


# ----------------------------------------------------------------------------------------------
# The compatibility edits
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One replacement in one file of the archive.

    Attributes:
        name: what an error message calls it.
        file: path in the archive.
        old: the text to replace; a regular expression if ``regex``.
        new: its replacement.
        reason: what goes wrong without it.
        count: how often ``old`` must be there. Any other number stops the build.
        regex: whether ``old`` and ``new`` are in the syntax of :func:`re.sub`.
    """

    name: str
    file: str
    old: str
    new: str
    reason: str
    count: int = 1
    regex: bool = False


NATIVE_FILE = "detectron2/utils/native.py"
NATIVE_TEXT = f'''\
"""Stands in for ``detectron2._C``, the compiled part that a pure-Python build does not have."""


class _MissingOperators:
    """Any operator of it raises, when it is looked up, an error that names it."""

    def __getattr__(self, operator):
        if operator.startswith("__"):  # asked by Python itself: copy, pickle, inspect
            raise AttributeError(operator)
        raise ImportError(
            f"Detectron2's operator '{{operator}}' is compiled code, and this Detectron2 is a "
            "pure-Python build without it. To get it, uninstall this one (pip uninstall "
            "detectron2) and build Detectron2 from source, {UPSTREAM}, as its INSTALL.md says."
        )


_C = _MissingOperators()
'''


def _use_native_stand_in(file: str) -> Edit:
    return Edit(
        name=f"native stand-in, {Path(file).stem}",
        file=file,
        old="from detectron2 import _C\n",
        new="from detectron2.utils.native import _C\n",
        reason="Importing detectron2.layers needs the compiled part, whether it is used or not.",
    )


def _numpy_aliases(file: str, count: int) -> Edit:
    return Edit(
        name=f"numpy aliases, {Path(file).stem}",
        file=file,
        old=r"\bnp\.(bool|int|float|str)\b",
        new=r"\1",
        reason="numpy 1.24 removed np.bool, np.int, np.float and np.str.",
        count=count,
        regex=True,
    )


def _logger_warn(file: str, count: int) -> Edit:
    return Edit(
        name=f"Logger.warn, {Path(file).stem}",
        file=file,
        old="logger.warn(",
        new="logger.warning(",
        reason="The alias is deprecated: a DeprecationWarning in evaluation.",
        count=count,
    )


EDITS: tuple[Edit, ...] = (
    Edit(
        name="torch.jit.script at import",
        file="detectron2/__init__.py",
        old="from .utils.env import setup_environment\n",
        new="""\
import warnings

from .utils.env import setup_environment

warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
""",
        reason="fvcore and detectron2 script functions when they are imported. torch warns of it "
        "in every worker and data loader process, and a user can not change it.",
    ),
    # The compiled part.
    _use_native_stand_in("detectron2/layers/deform_conv.py"),
    _use_native_stand_in("detectron2/layers/roi_align_rotated.py"),
    _use_native_stand_in("detectron2/layers/rotated_boxes.py"),
    Edit(
        name="native stand-in, nms: import",
        file="detectron2/layers/nms.py",
        old="from torchvision.ops import nms  # BC-compat\n",
        new="from torchvision.ops import nms  # BC-compat\n\n"
        "from detectron2.utils.native import _C\n",
        reason="Rotated NMS is compiled code too. It is found through torch.ops, whose error for "
        "a missing operator says nothing of Detectron2.",
    ),
    Edit(
        name="native stand-in, nms: use",
        file="detectron2/layers/nms.py",
        old="return torch.ops.detectron2.nms_rotated(",
        new="return _C.nms_rotated(",
        reason="As above.",
    ),
    Edit(
        name="COCOeval_opt: import",
        file="detectron2/evaluation/fast_eval_api.py",
        old="from detectron2 import _C\n",
        new="""\
try:
    from detectron2 import _C
except ImportError:
    _C = None
""",
        reason="COCO evaluation works without compiled code, as in upstream main.",
    ),
    Edit(
        name="COCOeval_opt: fall back",
        file="detectron2/evaluation/fast_eval_api.py",
        old="""\
        logger.info("COCOeval_opt.accumulate() finished in {:0.2f} seconds.".format(toc - tic))
""",
        new="""\
        logger.info("COCOeval_opt.accumulate() finished in {:0.2f} seconds.".format(toc - tic))


if _C is None:  # pycocotools computes the same numbers, more slowly
    COCOeval_opt = COCOeval
""",
        reason="As above.",
    ),
    Edit(
        name="COCOeval_opt: say so",
        file="detectron2/evaluation/coco_evaluation.py",
        old="        self._use_fast_impl = use_fast_impl\n",
        new="""\
        if use_fast_impl and COCOeval_opt is COCOeval:
            self._logger.info("COCOeval_opt is not compiled: using the COCOeval of pycocotools.")
            use_fast_impl = False
        self._use_fast_impl = use_fast_impl
""",
        reason="Evaluation on a large dataset takes longer; as in upstream main.",
    ),
    Edit(
        name="collect_env: native operators",
        file="detectron2/utils/collect_env.py",
        old='f"not built correctly: {e}"',
        new='"none: pure-Python build"',
        reason="Printed at the start of every run; nothing was built incorrectly.",
    ),
    Edit(
        name="collect_env: no compiler",
        file="detectron2/utils/collect_env.py",
        old="""--version".format(cxx), shell=True)""",
        new="""--version".format(cxx), shell=True, stderr=subprocess.DEVNULL)""",
        reason="Without a compiler, every run begins with the shell's complaint about it.",
    ),
    # Python and its libraries.
    Edit(
        name="random.sample of a set",
        file="detectron2/data/common.py",
        old="self._rng.sample(self._fallback_candidates, k=1)[0]",
        new="self._rng.sample(list(self._fallback_candidates), k=1)[0]",
        reason="TypeError on Python 3.11, when an image has no annotation left after augmentation.",
    ),
    Edit(
        name="pkg_resources: import",
        file="detectron2/model_zoo/model_zoo.py",
        old="import pkg_resources\n",
        new="",
        reason="setuptools no longer has pkg_resources.",
    ),
    Edit(
        name="pkg_resources: use",
        file="detectron2/model_zoo/model_zoo.py",
        old="""\
    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
""",
        new="""\
    cfg_file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)
""",
        reason="As above.",
    ),
    Edit(
        name="Image.LINEAR",
        file="detectron2/data/transforms/transform.py",
        old="Image.LINEAR",
        new="Image.BILINEAR",
        reason="Pillow 10 removed the alias.",
    ),
    _numpy_aliases("detectron2/data/build.py", 2),
    _numpy_aliases("detectron2/data/datasets/pascal_voc.py", 1),
    _numpy_aliases("detectron2/evaluation/pascal_voc_evaluation.py", 2),
    _numpy_aliases("detectron2/evaluation/sem_seg_evaluation.py", 7),
    _numpy_aliases("detectron2/structures/masks.py", 3),
    _numpy_aliases("detectron2/utils/video_visualizer.py", 1),
    _numpy_aliases("detectron2/utils/visualizer.py", 3),
    Edit(
        name="keypoints of an image",
        file="detectron2/data/detection_utils.py",
        old="target.gt_keypoints = Keypoints(kpts)",
        new="target.gt_keypoints = Keypoints(np.asarray(kpts))",
        reason="torch warns that a tensor from a list of arrays is slow to make.",
    ),
    _logger_warn("detectron2/data/datasets/coco.py", 2),
    _logger_warn("detectron2/engine/defaults.py", 1),
    _logger_warn("detectron2/evaluation/coco_evaluation.py", 2),
    _logger_warn("detectron2/evaluation/lvis_evaluation.py", 2),
    _logger_warn("detectron2/evaluation/sem_seg_evaluation.py", 2),
    Edit(
        name="black: import",
        file="detectron2/config/lazy.py",
        old="        import black\n",
        new="""\
        try:
            import black
        except ImportError:
            black = None
""",
        reason="LazyConfig.to_py needs no formatter to write Python; only the layout differs.",
    ),
    Edit(
        name="black: use",
        file="detectron2/config/lazy.py",
        old="        py_str = _to_str(cfg, prefix=[prefix])\n",
        new="""\
        py_str = _to_str(cfg, prefix=[prefix])
        if black is None:
            return py_str
""",
        reason="As above.",
    ),
    # torch.
    Edit(
        name="torch's LR schedulers",
        file="detectron2/engine/hooks.py",
        old="torch.optim.lr_scheduler._LRScheduler",
        new="torch.optim.lr_scheduler.LRScheduler",
        reason="torch 2.0 made _LRScheduler a subclass that torch's own schedulers are not of: "
        "they were neither saved in checkpoints nor restored by --resume.",
        count=2,
    ),
    Edit(
        name="caffe2",
        file="detectron2/export/__init__.py",
        old="from .api import *\n",
        new="""\
try:
    from .api import *
except ImportError:  # no caffe2: tracing and scripting need none
    pass
""",
        reason="caffe2 is no longer part of torch; as in upstream main.",
    ),
    Edit(
        name="workers on CPU: check",
        file="detectron2/engine/launch.py",
        old="""\
    assert torch.cuda.is_available(), "cuda is not available. Please check your installation."
""",
        new="""\
    has_gpu = torch.cuda.is_available()
""",
        reason="launch() refuses several processes without GPUs; upstream main starts them.",
    ),
    Edit(
        name="workers on CPU: backend",
        file="detectron2/engine/launch.py",
        old='backend="NCCL"',
        new='backend="NCCL" if has_gpu else "GLOO"',
        reason="As above.",
    ),
    Edit(
        name="workers on CPU: device",
        file="detectron2/engine/launch.py",
        old="""\
    assert num_gpus_per_machine <= torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
""",
        new="""\
    if has_gpu:
        assert num_gpus_per_machine <= torch.cuda.device_count()
        torch.cuda.set_device(local_rank)
""",
        reason="As above.",
    ),
    Edit(
        name="workers on CPU: model",
        file="detectron2/engine/defaults.py",
        old='    if "device_ids" not in kwargs:\n',
        new='    if "device_ids" not in kwargs and next(model.parameters()).is_cuda:\n',
        reason="DistributedDataParallel refuses device_ids for a model on the CPU.",
    ),
    Edit(
        name="broadcast_buffers",
        file="detectron2/engine/defaults.py",
        old="    ddp = DistributedDataParallel(model, **kwargs)\n",
        new="""\
    renamed = hasattr(DistributedDataParallel, "broadcast_buffers")  # a property since then
    if renamed and "broadcast_buffers" in kwargs:
        kwargs["forward_sync_buffers"] = kwargs.pop("broadcast_buffers")
    ddp = DistributedDataParallel(model, **kwargs)
""",
        reason="torch 2.13 renamed it. With the new name buffers are broadcast when the model is "
        "wrapped, as they were in the torch of v0.6.",
    ),
    Edit(
        name="gather over workers",
        file="detectron2/utils/comm.py",
        old="""\
    storage = torch.ByteStorage.from_buffer(buffer)
    tensor = torch.ByteTensor(storage).to(device=device)
""",
        new="""\
    tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8).to(device=device)
""",
        reason="torch deprecates typed storages: a warning on each worker.",
    ),
    Edit(
        name="mixed precision: import GradScaler",
        file="detectron2/engine/train_loop.py",
        old="from torch.cuda.amp import GradScaler",
        new="from torch.amp import GradScaler",
        reason="torch deprecates torch.cuda.amp.",
    ),
    Edit(
        name="mixed precision: GradScaler",
        file="detectron2/engine/train_loop.py",
        old="grad_scaler = GradScaler()",
        new='grad_scaler = GradScaler("cuda")',
        reason="As above.",
    ),
    Edit(
        name="mixed precision: import autocast",
        file="detectron2/engine/train_loop.py",
        old="from torch.cuda.amp import autocast",
        new="from torch.amp import autocast",
        reason="As above.",
    ),
    Edit(
        name="mixed precision: autocast",
        file="detectron2/engine/train_loop.py",
        old="with autocast():",
        new='with autocast("cuda"):',
        reason="As above.",
    ),
    Edit(
        name="GroupNorm of one channel",
        file="detectron2/modeling/meta_arch/retinanet.py",
        old="str(type(get_norm(norm, 1)))",
        new="str(type(get_norm(norm, 32)))",
        reason="torch refuses 32 groups of 1 channel: FCOS, and RetinaNet with GN, could not be "
        "built. Only the type is used; as in upstream main.",
    ),
    Edit(
        name="meshgrid, anchors",
        file="detectron2/modeling/anchor_generator.py",
        old="torch.meshgrid(shifts_y, shifts_x)",
        new='torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        reason="torch warns in every run that the default will change.",
    ),
    Edit(
        name="meshgrid, Panoptic-DeepLab",
        file="projects/Panoptic-DeepLab/panoptic_deeplab/post_processing.py",
        old="torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
        new="torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"
        '        indexing="ij",\n',
        reason="As above.",
    ),
)
"""In the order in which they are applied; "as above" is the edit before. What upstream's main
branch has mended is mended as there."""


def apply_edits(root: Path, edits: Sequence[Edit]) -> None:
    """Apply ``edits`` to the source tree at ``root``, or stop at the first that does not match."""
    for edit in edits:
        path = root / edit.file
        if not path.is_file():
            raise InstallError(f"Edit '{edit.name}': {edit.file} is not in the archive.")
        text = path.read_text(encoding="utf-8")
        if edit.regex:
            text, found = re.subn(edit.old, edit.new, text)
        else:
            found = text.count(edit.old)
            text = text.replace(edit.old, edit.new)
        if found != edit.count:
            raise InstallError(
                f"Edit '{edit.name}': {edit.file} must contain {edit.old!r} {edit.count} "
                f"time(s), and contains it {found} time(s). Nothing was installed."
            )
        path.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# Archive
# ----------------------------------------------------------------------------------------------


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


def check_hash(archive: Path) -> None:
    """Refuse an archive that is not, byte for byte, the one the edits were written for."""
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


# ----------------------------------------------------------------------------------------------
# Wheel
# ----------------------------------------------------------------------------------------------


def wheel_contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the wheel, contents) of each file, from the edited source tree at ``root``."""
    for target, source in PACKAGES.items():
        for path in sorted((root / source).rglob("*")):
            if path.suffix in PACKAGED_SUFFIXES and path.is_file():
                relative = path.relative_to(root / source).as_posix()
                yield f"{target}/{relative}", path.read_bytes()

    info = f"detectron2-{WHEEL_VERSION}.dist-info"
    yield f"{info}/licenses/LICENSE", (root / "LICENSE").read_bytes()
    yield f"{info}/METADATA", _metadata().encode()
    yield (
        f"{info}/WHEEL",
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    )
    yield f"{info}/top_level.txt", b"detectron2\n"


def _metadata() -> str:
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
        f"Built from {SOURCE_NAME}-{SOURCE_VERSION}.tar.gz (sha256 {SOURCE_SHA256}).",
        f"Added: {NATIVE_FILE}. Changed:",
        "",
        *(f"* {edit.file} ({edit.name}): {edit.reason}" for edit in EDITS),
    ]
    return "\n".join(lines) + "\n"


def write_wheel(contents: Iterator[tuple[str, bytes]], folder: Path) -> Path:
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


def build_wheel(archive: Path, folder: Path) -> Path:
    """Build the wheel from ``archive`` into ``folder``; returns its path."""
    check_hash(archive)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = unpack(archive, Path(scratch))
        apply_edits(root, EDITS)
        (root / NATIVE_FILE).write_text(NATIVE_TEXT, encoding="utf-8")
        return write_wheel(wheel_contents(root), folder)


# ----------------------------------------------------------------------------------------------
# Environment
# ----------------------------------------------------------------------------------------------

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


def probe_detectron2() -> dict[str, object]:
    """What a fresh interpreter of this environment finds: present, location, version or error."""
    with tempfile.TemporaryDirectory() as elsewhere:  # a folder named detectron2 here is not it
        out = subprocess.run(
            [sys.executable, "-c", _PROBE], cwd=elsewhere, capture_output=True, text=True
        )
    if out.returncode != 0:
        raise InstallError(f"{sys.executable} failed to look for detectron2:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


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


def installed_version(distribution: str) -> str | None:
    """The version of ``distribution`` in this environment, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_requirements() -> list[str]:
    """Those of ``REQUIREMENTS`` of which no version is installed."""
    return [r for r in REQUIREMENTS if installed_version(re.match(r"[\w-]+", r)[0]) is None]


def _pip(*arguments: str, failure: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        raise InstallError(f"{failure}; pip says:\n{out.stdout}{out.stderr}".rstrip())


def install(archive: Path | None = None, wheel_dir: Path | None = None) -> None:
    """Keep the Detectron2 that is there, or build and install the pure-Python one.

    Args:
        archive: the source archive; fetched from the package index where None.
        wheel_dir: where the wheel is kept, in either case; where None, it is not.
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
    print(f"Installed detectron2 {WHEEL_VERSION} ({len(EDITS)} edits), {found.get('location')}")
    if "error" in found:
        raise InstallError(_does_not_import(found))


def _does_not_import(found: dict[str, object]) -> str:
    problem = f"detectron2 at {found['location']} does not import: {found['error']}. "
    missing = missing_requirements()
    if missing:
        requirements = " ".join(f"'{r}'" for r in missing)
        return f"{problem}It lacks: {sys.executable} -m pip install {requirements}"
    return (
        f"{problem}An installed detectron2 is never replaced: mend it, or remove it "
        f"({sys.executable} -m pip uninstall detectron2) and run this again."
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="keep the wheel in DIR; it is built even if a detectron2 is installed",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help=f"use this {SOURCE_NAME}-{SOURCE_VERSION}.tar.gz instead of fetching it",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        install(args.archive, args.wheel_dir)
    except InstallError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
