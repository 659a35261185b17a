"""The sdist and the wheel, installed into an empty environment and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from bn_detection.data import make_leaky_shapes
from bn_detection.study.demo import run_demo

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/**/*.yaml"))
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make dist`` builds: the wheel comes out of the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return folder


def test_the_wheel_has_all_files_of_the_package_and_its_metadata(dist: Path) -> None:
    (path,) = dist.glob("*.whl")
    with ZipFile(path) as wheel:
        names = set(wheel.namelist())
        for config in CONFIGS:
            assert wheel.read(f"bn_detection/{config}") == (ROOT / config).read_bytes()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    files = (ROOT / "bn_detection").rglob("*.*")
    ours = {str(p.relative_to(ROOT)) for p in files if p.suffix != ".pyc" and p.is_file()}
    assert ours <= names
    assert {name.partition("/")[0] for name in names} == {"bn_detection", info}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    classifiers = metadata.get_all("Classifier")
    assert all(f"Programming Language :: Python :: {v}" in classifiers for v in VERSIONS)
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras >= {"corruptions", "slurm", "docs", "dev"}
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not any(line.startswith(("numba", "scikit-image")) for line in core)


def test_the_sdist_has_what_its_tests_need(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*map(str, CONFIGS)} <= names
    files = ("setup.py", "constraints.txt", "Makefile", "tools/train_net.py", "tests/conftest.py")
    assert {*files} <= names


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel, and with the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (wheel,) = dist.glob("*.whl")
    pip = ("-m", "pip", "--python", folder / "bin/python", "install", "--no-index", "--no-deps")
    installed = run(sys.executable, *pip, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    # Afterwards, because pip would find the bn_detection that is installed there. The .pth files of
    # these libraries, such as that of an editable install, are not read.
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(program: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that finds nothing of this checkout."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = variables.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [entry for entry in path if entry and Path(entry).resolve() != ROOT]:
        variables["PYTHONPATH"] = os.pathsep.join(kept)
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.timeout(280)
def test_demo_diagnose_and_study_in_an_empty_folder(
    environment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = []
    for split, num_images in (("train", 4), ("val", 4)):
        made = make_leaky_shapes(tmp_path / split, num_images, seed=1, split=split)
        datasets.append([f"demo_{split}", str(made.annotations), str(made.images)])
    overrides = ["DATASETS.COCO_JSON", str(datasets), "SOLVER.MAX_ITER", "1"]
    overrides += ["BN.LEAKAGE.PERIOD", "1"]
    overrides += ["DATASETS.TRAIN", "('demo_train',)", "DATASETS.TEST", "('demo_val',)"]
    empty = tmp_path / "empty"
    empty.mkdir()

    def bn_detection(*arguments: object, status: tuple[int, ...] = (0,)) -> str:
        done = run(environment / "bn-detection", *arguments, cwd=empty)
        assert done.returncode in status, done.stdout + done.stderr
        assert "error:" not in done.stderr
        return done.stdout

    code = "import bn_detection; print(bn_detection.__file__)"
    found = run(environment / "python", "-c", code, cwd=empty).stdout
    assert found.startswith(str(environment.parent))
    assert bn_detection("--version").startswith("bn-detection ")

    printed = bn_detection("demo", "--num-gpus", "1", *overrides)
    for word in ("[1 of 4] BN: training", "[4 of 4]", "box AP", "mask AP"):
        assert word in printed
    folder = empty / "output" / "demo"
    aps = json.loads((folder / "results.json").read_text())["AP"]
    assert {v: set(by_statistics) for v, by_statistics in aps.items()} == {
        "BN": {"population", "batch"},
        "ShuffleBN": {"population", "batch"},
    }
    for variant, inference, path in (
        ("BN", "population", "inference"),
        ("ShuffleBN", "batch", "eval_model_final_batch"),
    ):
        metrics = json.loads((folder / variant / path / "results.json").read_text())
        assert metrics["BN.INFERENCE"] == inference
        assert aps[variant][inference]["mask"] == metrics["results"]["segm"]["AP"]
    for name in ("leak.png", "leak_over_training.png"):
        with Image.open(folder / name) as figure:
            assert figure.width > 600

    weights = ("MODEL.WEIGHTS", folder / "BN" / "model_final.pth")
    flags = ("--config-file", "output/demo/BN/config.yaml", "--num-gpus", "2", "--quick")
    bn_detection("diagnose", *flags, *weights, status=(0, 1))
    assert (folder / "BN" / "diagnosis_model_final" / "diagnosis.json").exists()

    printed = bn_detection("study", "studies/leakage.yaml", "--dry-run")
    assert "Nothing was run" in printed and "[1 of " in printed

    # What the demo has done stays done.
    assert run_demo(folder, workers=1, overrides=overrides) == folder / "results.json"
    assert capfd.readouterr().out.count("done before") == 4
