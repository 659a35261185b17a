"""The installer of Detectron2, and the Detectron2 that is installed.

The second half tests whatever Detectron2 there is: the installer's build, or upstream main,
compiled or not. What only the installer's build can do is skipped with the others.
"""

import copy
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import detectron2
import pytest
import torch

from bn_detection import cli
from bn_detection.install_detectron2 import install as installer
from bn_detection.install_detectron2 import patch, wheel


def is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


COMPILED = is_there("detectron2._C")
PURE = is_there("detectron2.utils.native")

only_pure = pytest.mark.skipif(not PURE, reason="the installed Detectron2 is not built here")


# ----------------------------------------------------------------------------------------------
# The installer
# ----------------------------------------------------------------------------------------------


OLD = "".join(f"line {n}\n" for n in range(1, 31))
NEW = OLD.replace("line 4\n", "").replace("line 20\n", "line 20\n-- 1\n+ 2\n\n")


@pytest.fixture
def tree(tmp_path):
    """A folder with a file a.py, and git's patch that changes it and adds b.py."""
    for name, text in {"a": OLD, "b": NEW}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(text)
    (tmp_path / "b" / "b.py").write_text("x = 1\n")
    diff = ["git", "diff", "--no-index", "--no-prefix", "a", "b"]
    text = subprocess.run(diff, cwd=tmp_path, capture_output=True, text=True).stdout
    lines = (n for n in text.splitlines(True) if not n.startswith(("diff ", "index ", "new file")))
    return tmp_path / "a", "# It begins.\n\n# For\n# a test.\n" + "".join(lines)


def test_patch_of_git_applies(tree):
    root, text = tree
    patches = patch.read_patch(text)
    assert [(p.file, p.reason, len(p.hunks)) for p in patches] == [
        ("a.py", "For a test.", 2),
        ("b.py", "", 1),
    ]
    patch.apply_patch(root, patches)
    assert (root / "a.py").read_text() == NEW
    assert (root / "b.py").read_text() == "x = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OLD.replace("line 18\n", "line  18\n"), r"@@ -18,6 .*line 18 must be .* is 'line  18'"),
        ("line 0\n" + OLD, r"@@ -18,6 \+17,9 @@: line 18 must be 'line 18', and is 'line 17'"),
        (OLD[:60], r"@@ -18,6 .*line 18 must be 'line 18', and is not there"),
    ],
    ids=["another line", "other line numbers", "too short"],
)
def test_hunk_that_does_not_match_stops_the_build(tree, text, message):
    root, changes = tree
    (root / "a.py").write_text(text)
    with pytest.raises(patch.InstallError, match=rf"a\.py, hunk {message}") as error:
        patch.apply_patch(root, patch.read_patch(changes))
    assert "Nothing was installed." in str(error.value)
    assert (root / "a.py").read_text() == text


def test_patch_of_a_file_that_is_not_there_and_of_a_new_one_that_is(tree):
    root, text = tree
    (root / "b.py").touch()
    with pytest.raises(patch.InstallError, match=r"b\.py, which .* is there already"):
        patch.apply_patch(root, patch.read_patch(text))
    (root / "a.py").unlink()
    with pytest.raises(patch.InstallError, match=r"a\.py, which .* is not in the archive"):
        patch.apply_patch(root, patch.read_patch(text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-line 4\n", r"a\.py, hunk @@ -1,7 \+1,6 @@: it has 6 old and 6 new lines"),
        ("+x = 1\n", r"b\.py, hunk @@ -0,0 \+1 @@: it has 0 old and 0 new lines"),
    ],
)
def test_patch_with_a_line_too_few(tree, line, message):
    with pytest.raises(patch.InstallError, match=message):
        patch.read_patch(tree[1].replace(line, "", 1))


def test_patch_with_a_line_too_many(tree):
    with pytest.raises(patch.InstallError, match=r"no hunk: '\+x = 2'"):
        patch.read_patch(tree[1] + "+x = 2\n")


def test_every_file_of_the_patch_has_a_reason():
    patches = patch.read_patch(wheel.PATCH.read_text())
    assert len({p.file for p in patches}) == len(patches) > 30
    assert all(p.reason and p.hunks for p in patches)
    assert all(hunk.old != hunk.new for p in patches for hunk in p.hunks)


def test_archive_with_another_hash_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    monkeypatch.setattr(wheel, "unpack", lambda *_: pytest.fail("unpacked before the check"))
    with pytest.raises(patch.InstallError) as error:
        wheel.build_wheel(archive, tmp_path)
    assert str(archive) in str(error.value) and wheel.SOURCE_SHA256 in str(error.value)
    assert not list(tmp_path.glob("*.whl"))


def test_archive_that_is_not_there(tmp_path):
    with pytest.raises(patch.InstallError, match=r"no file .*nowhere\.tar\.gz"):
        wheel.build_wheel(tmp_path / "nowhere.tar.gz", tmp_path)


def test_pip_is_given_the_hash_before_it_runs_anything(tmp_path, monkeypatch):
    def pip(*arguments, failure):
        (option,) = [a for a in arguments if a.startswith("--requirement=")]
        pinned = Path(option.removeprefix("--requirement=")).read_text()
        assert pinned == f"pb1-detectron2==0.6 --hash=sha256:{installer.SOURCE_SHA256}\n"
        (tmp_path / "pb1-detectron2-0.6.tar.gz").touch()

    monkeypatch.setattr(installer, "_pip", pip)
    assert installer.fetch_archive(tmp_path).name == "pb1-detectron2-0.6.tar.gz"


SMALL_PATCH = """\
# The first reason.
--- a/detectron2/__init__.py
+++ b/detectron2/__init__.py
@@ -1 +1,2 @@
+edited = 1
 __version__ = "0.6"
--- /dev/null
+++ b/detectron2/utils/native.py
@@ -0,0 +1 @@
+_C = None
"""


@pytest.fixture
def small_archive(tmp_path, monkeypatch):
    """A source archive in miniature, with a hash and a patch of its own."""
    files = {
        "detectron2/__init__.py": '__version__ = "0.6"\n',
        "detectron2/utils/__init__.py": "",
        "detectron2/layers/csrc/vision.cpp": "",
        "detectron2/model_zoo/configs/a/b.yaml": "x: 1\n",
        "projects/DeepLab/deeplab/__init__.py": "",
        "projects/DeepLab/train_net.py": "",
        "LICENSE": "Apache\n",
    }
    path = tmp_path / "pb1-detectron2-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(wheel, "SOURCE_SHA256", digest)
    changes = tmp_path / "small.patch"
    changes.write_text(SMALL_PATCH)
    monkeypatch.setattr(wheel, "PATCH", changes)
    return path


def test_wheel_holds_packages_projects_configs_and_license(tmp_path, small_archive):
    built = wheel.build_wheel(small_archive, tmp_path / "new" / "folder")
    assert built.name == "detectron2-0.6+pure-py3-none-any.whl"
    names = set(zipfile.ZipFile(built).namelist())
    assert {n for n in names if n.startswith("detectron2/")} == {
        "detectron2/__init__.py",
        "detectron2/utils/__init__.py",
        "detectron2/utils/native.py",
        "detectron2/model_zoo/configs/a/b.yaml",
        "detectron2/projects/deeplab/__init__.py",
    }
    assert "detectron2-0.6+pure.dist-info/licenses/LICENSE" in names
    again = wheel.build_wheel(small_archive, tmp_path / "again")
    assert built.read_bytes() == again.read_bytes()


def test_pip_accepts_the_wheel(tmp_path, small_archive):
    built = wheel.build_wheel(small_archive, tmp_path)
    target = tmp_path / "site"
    installer._pip(
        "install", "--no-deps", "--no-index", f"--target={target}", str(built), failure="refused"
    )
    assert "edited = 1" in (target / "detectron2/__init__.py").read_text()
    (distribution,) = importlib.metadata.distributions(path=[str(target)])
    assert distribution.metadata["Name"] == "detectron2" and distribution.version == "0.6+pure"
    assert "detectron2/__init__.py: The first reason." in distribution.metadata.get_payload()


def test_tool_needs_the_standard_library_alone():
    tool = Path(__file__).parents[1] / "tools" / "install_detectron2.py"
    command = [sys.executable, "-I", "-S", str(tool), "--help"]  # -S: no site-packages
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr) == (0, "") and "--wheel-dir" in out.stdout


def main(arguments):
    return cli.main(["install-detectron2", *arguments])


def no_building(monkeypatch):
    for name in ("fetch_archive", "build_wheel", "_pip"):
        monkeypatch.setattr(
            installer, name, lambda *_, _name=name, **__: pytest.fail(f"{_name} was called")
        )


def test_installed_detectron2_is_kept(monkeypatch, capsys):
    no_building(monkeypatch)
    assert main([]) == 0
    location = Path(detectron2.__file__).resolve()
    assert f"Keeping detectron2 {detectron2.__version__}, {location}" in capsys.readouterr().out


def test_installed_detectron2_that_does_not_import_is_not_replaced(monkeypatch, capsys):
    no_building(monkeypatch)
    broken = {
        "present": True,
        "location": "/path/to/detectron2/__init__.py",
        "error": "ImportError: x",
    }
    monkeypatch.setattr(installer, "probe_detectron2", lambda: broken)
    monkeypatch.setattr(installer, "missing_requirements", list)
    assert main([]) == 1
    message = capsys.readouterr().err
    assert "/path/to/detectron2/__init__.py does not import: ImportError: x" in message
    assert "never replaced" in message and "pip uninstall detectron2" in message

    monkeypatch.setattr(installer, "missing_requirements", lambda: ["yacs>=0.1.8"])
    assert main([]) == 1
    assert "-m pip install 'yacs>=0.1.8'" in capsys.readouterr().err


def test_wheel_alone_where_detectron2_is_installed(tmp_path, small_archive, capsys):
    arguments = ["--archive", str(small_archive), "--wheel-dir", str(tmp_path / "wheels")]
    assert main(arguments) == 0
    assert "Keeping detectron2" in capsys.readouterr().out
    assert [p.suffix for p in (tmp_path / "wheels").iterdir()] == [".whl"]


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.14.1"}, r"torchvision, setuptools must be installed first: .*pip install"),
        (
            {"torch": "2.2.0", "torchvision": "0.17", "setuptools": "80"},
            r"2\.2\.0 .* 2\.3 or later",
        ),
    ],
)
def test_prerequisites(monkeypatch, versions, message):
    monkeypatch.setattr(installer, "installed_version", versions.get)
    with pytest.raises(patch.InstallError, match=message):
        installer.check_prerequisites()


# ----------------------------------------------------------------------------------------------
# The installed Detectron2
# ----------------------------------------------------------------------------------------------

NEEDS_MORE = {
    "detectron2.export.api": ("caffe2", "onnx"),
    "detectron2.export.c10": ("caffe2", "onnx"),
    "detectron2.export.caffe2_export": ("caffe2", "onnx"),
    "detectron2.export.caffe2_inference": ("caffe2", "onnx"),
    "detectron2.export.caffe2_modeling": ("caffe2", "onnx"),
    "detectron2.export.caffe2_patch": ("caffe2", "onnx"),
    "detectron2.export.shared": ("caffe2", "onnx"),
    "detectron2.projects.panoptic_deeplab": ("panopticapi",),
    "detectron2.tracking": ("scipy",),  # upstream main has it, v0.6 has not
}
"""Modules that do not import without another library. (Their submodules are not looked at.)"""


def test_every_module_imports():
    failed = {}
    for module in pkgutil.walk_packages(detectron2.__path__, "detectron2.", onerror=lambda _: None):
        if module.name.startswith(tuple(NEEDS_MORE)) or module.name == "detectron2._C":
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as e:
            failed[module.name] = str(e)
    if not PURE:
        if not COMPILED:
            assert failed.pop("detectron2.evaluation.fast_eval_api")
        if not is_there("pkg_resources"):
            failed = {k: v for k, v in failed.items() if "pkg_resources" not in v}
    assert not failed


@only_pure
@pytest.mark.parametrize("module", NEEDS_MORE)
def test_module_that_does_not_import_lacks_a_library(module):
    libraries = NEEDS_MORE[module]
    if not is_there(module):
        pytest.skip("not in v0.6")
    if all(map(is_there, libraries)):
        pytest.skip(f"{', '.join(libraries)} installed")
    with pytest.raises(ImportError, match="|".join(libraries)):
        importlib.import_module(module)


def test_tracing_and_scripting_import():
    from detectron2.export import TracingAdapter, dump_torchscript_IR, scripting_with_instances

    assert TracingAdapter and dump_torchscript_IR and scripting_with_instances


@only_pure
def test_packaged_configs():
    from detectron2 import model_zoo

    path = "COCO-Detection/retinanet_R_50_FPN_1x"
    assert Path(model_zoo.get_config_file(f"{path}.yaml")).is_file()
    assert model_zoo.get_config(f"{path}.yaml").MODEL.META_ARCHITECTURE == "RetinaNet"
    assert model_zoo.get_config(f"{path}.py").model.num_classes == 80
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        model_zoo.get_config_file("no/such.yaml")


@only_pure
def test_metadata_of_the_installed_build():
    distribution = importlib.metadata.distribution("detectron2")
    assert distribution.version == wheel.WHEEL_VERSION
    requirements = " ".join(distribution.requires)
    assert "fvcore" in requirements and "iopath" in requirements
    for dropped in ("black", "future", "pydot", "dataclasses"):
        assert dropped not in requirements


class OnGpu(torch.Tensor):
    """A tensor that is taken to be on a GPU: there, deformable convolution is compiled code."""

    is_cuda = True


def use_deform_conv():
    from detectron2.layers.deform_conv import _DeformConv

    context = SimpleNamespace(save_for_backward=lambda *_: None)
    x, weight = torch.zeros(1, 2, 4, 4).as_subclass(OnGpu), torch.zeros(2, 2, 3, 3)
    _DeformConv.forward(context, x, torch.zeros(1, 18, 4, 4), weight, 1, 1, 1)


def use_modulated_deform_conv():
    from detectron2.layers.deform_conv import _ModulatedDeformConv

    context = SimpleNamespace(save_for_backward=lambda *_: None)
    x, weight = torch.zeros(1, 2, 4, 4).as_subclass(OnGpu), torch.zeros(2, 2, 3, 3)
    offset, mask = torch.zeros(1, 18, 4, 4), torch.zeros(1, 9, 4, 4)
    _ModulatedDeformConv.forward(context, x, offset, mask, weight, None, 1, 1, 1)


def use_box_iou_rotated():
    from detectron2.structures import RotatedBoxes, pairwise_iou_rotated

    pairwise_iou_rotated(RotatedBoxes(torch.zeros(1, 5)), RotatedBoxes(torch.zeros(1, 5)))


def use_nms_rotated():
    from detectron2.layers import batched_nms_rotated

    batched_nms_rotated(torch.zeros(1, 5), torch.zeros(1), torch.zeros(1), 0.5)


def use_roi_align_rotated():
    from detectron2.layers import ROIAlignRotated

    ROIAlignRotated((2, 2), 1.0, 0)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6))


@only_pure
@pytest.mark.parametrize(
    ("operator", "use"),
    [
        ("deform_conv_forward", use_deform_conv),
        ("modulated_deform_conv_forward", use_modulated_deform_conv),
        ("box_iou_rotated", use_box_iou_rotated),
        ("nms_rotated", use_nms_rotated),
        ("roi_align_rotated_forward", use_roi_align_rotated),
    ],
)
def test_missing_operator_is_named_when_used(operator, use):
    with pytest.raises(ImportError) as error:
        use()
    message = str(error.value)
    assert f"'{operator}'" in message
    assert "from source" in message and "INSTALL.md" in message and wheel.UPSTREAM in message


@only_pure
def test_stand_in_can_be_inspected_and_copied():
    from detectron2.utils.native import _C

    assert not hasattr(_C, "__wrapped__")
    copy.deepcopy(_C)


@pytest.mark.skipif(COMPILED, reason="this Detectron2 has the fast COCO evaluation")
def test_coco_evaluation_falls_back():
    from detectron2.evaluation import coco_evaluation
    from pycocotools.cocoeval import COCOeval

    assert coco_evaluation.COCOeval_opt is COCOeval


def test_map_dataset_replaces_an_image_without_annotations():
    from detectron2.data import DatasetFromList, MapDataset

    dataset = MapDataset(DatasetFromList([0, 1, 2]), lambda x: x or None)
    assert dataset[0] in (1, 2)


def test_head_with_group_norm():
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

    shapes = [ShapeSpec(channels=32)]
    head = RetinaNetHead(
        input_shape=shapes, num_classes=2, num_anchors=1, conv_dims=(32,), norm="GN"
    )
    assert any(isinstance(m, torch.nn.GroupNorm) for m in head.modules())


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 4]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_scheduler_is_restored(name, tmp_path):
    from detectron2.engine import hooks

    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        return optimizer, scheduler, hooks.LRScheduler(optimizer, scheduler)

    optimizer, scheduler, hook = build()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    torch.save(hook.state_dict(), tmp_path / "checkpoint.pth")

    optimizer, restored, hook = build()
    hook.load_state_dict(torch.load(tmp_path / "checkpoint.pth"))
    assert restored.last_epoch == scheduler.last_epoch == 3
    assert restored.get_last_lr() == scheduler.get_last_lr()


@only_pure
@pytest.mark.parametrize(
    "modules",
    ["detectron2.engine, detectron2.modeling, detectron2.evaluation", "bn_detection.engine"],
)
def test_import_is_silent(modules):
    out = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], capture_output=True, text=True, timeout=120
    )
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
