"""The examples run, and notice when what they show is not so."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from notebooks import run_notebook
from PIL import Image
from tooling import run_script

from bn_detection.data import make_leaky_shapes

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(EXAMPLES / name, *arguments)


def skip_without_model_zoo() -> None:
    """A checkout of Detectron2 that was not installed has none."""
    try:
        from detectron2 import model_zoo

        model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))


@pytest.mark.timeout(280)
@pytest.mark.parametrize("choice", ["shared", "separate"])
def test_fcos_levels(choice: str) -> None:
    skip_without_model_zoo()
    overrides = [f"model.head.levels.{key}={choice}" for key in ("train", "population")]
    run = example("fcos_levels.py", *overrides)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"train='{choice}', population='{choice}'" in run.stdout
    (count,) = re.findall(r"(\d+) detections; in the stock model", run.stdout)
    assert int(count) > 0


@pytest.mark.timeout(280)
def test_plug_in(tmp_path: Path) -> None:
    skip_without_model_zoo()
    run = example("plug_in.py", "--output-dir", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Converted 10 layers to ShuffleBN: roi_heads.res5.0" in run.stdout
    assert "all 10 layers are torch.nn.BatchNorm2d: True" in run.stdout
    assert "bn_detection imported: False" in run.stdout
    losses = [float(loss) for loss in re.findall(r"Step \d of \d: loss (\S+)\.\n", run.stdout)]
    assert losses[-1] < losses[0]
    (largest,) = re.findall(r"Largest difference .*: (\S+)\.\n", run.stdout)
    assert float(largest) <= 1e-5

    # The statistics of one layer, a little off.
    state = torch.load(tmp_path / "model.pth")
    state["roi_heads.res5.2.conv3.norm.running_mean"] += 0.1
    torch.save(state, tmp_path / "model.pth")
    again = example("plug_in.py", "--load-only", "--output-dir", str(tmp_path))
    assert again.returncode == 1, again.stdout + again.stderr
    (largest,) = re.findall(r"Largest difference .*: (\S+)\.\n", again.stdout)
    assert float(largest) > 1e-5


@pytest.mark.timeout(280)
@pytest.mark.parametrize("norm", ["", "GN"])
def test_torchvision_finetune(norm: str, tmp_path: Path) -> None:
    """Few steps: the stock model trains on one image a step, and is diagnosed; so is the other."""
    small = ("--steps", "2", "--images", "4", "--output-dir", str(tmp_path))
    run = example("torchvision_finetune.py", *small, *(["--norm", norm] if norm else []))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "step 2 of 2: loss" in run.stdout and "4 images, which have" in run.stdout
    state = torch.load(tmp_path / f"{norm or 'BN'}.pth")["model"]
    assert ("roi_heads.box_head.0.1.running_mean" in state) == (not norm)


@pytest.mark.timeout(280)
def test_notebook(tmp_path: Path) -> None:
    """Its cells run, and show reports: pages, and tables."""
    few = {"steps": 2, "images": 4, "train_images": 4, "folder": str(tmp_path)}
    shown = run_notebook(EXAMPLES / "diagnose.ipynb", **few)
    assert [bool(cell.html) for cell in shown] == [False] * 3 + [True] * 4
    leak, diagnosis, recalibration, other = (cell for cell in shown if cell.html)
    assert "leakage = image - shuffle" in leak.html
    assert diagnosis.html.startswith("<iframe srcdoc=") and "roi_heads.box_head" in diagnosis.html
    assert "Statistics of 4 layers" in recalibration.html
    assert "The model has no BN layer whose batch could be changed" in other.html


def test_draw_detections(tmp_path: Path) -> None:
    """Detections that are the annotations look as these do; those of low scores are left out."""
    made = make_leaky_shapes(tmp_path / "shapes", 2, 0, split="val")
    training = tmp_path / "study" / "BN" / "seed_1"
    batch = training / "evaluations" / "batch statistics"
    entry = ["shapes", str(made.annotations), str(made.images)]
    annotations = json.loads(made.annotations.read_text())["annotations"]
    for folder, score in ((training / "inference", 0.9), (batch / "eval_model_final_batch", 0.1)):
        (folder / "shapes").mkdir(parents=True)
        found = [{**annotation, "score": score} for annotation in annotations]
        (folder / "shapes" / "coco_instances_results.json").write_text(json.dumps(found))
    config = {"DATASETS": {"COCO_JSON": [entry], "TEST": ["shapes"]}}
    (training / "config.yaml").write_text(json.dumps(config))
    columns = ("BN/population statistics", "BN/batch statistics")
    output = tmp_path / "boxes.png"
    arguments = ["--output", str(output), "--images", "1", "--columns", *columns]
    run = example("draw_detections.py", str(training.parents[1]), *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    pixels = np.asarray(Image.open(output).convert("RGB")).astype(int)
    # Colored pixels: what is grey is of LeakyShapes, and of the titles. Below is the legend.
    colored = np.ptp(pixels, axis=2)[: int(0.8 * len(pixels))].max(axis=0) > 60
    truth, population, none = np.array_split(colored, 3)
    assert truth.sum() == population.sum() > 20 and none.sum() == 0
