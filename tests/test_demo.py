"""The demo, with a training too short to learn anything: its parts fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bn_detection.data import make_leaky_shapes
from bn_detection.study.demo import run_demo


@pytest.mark.timeout(280)
def test_demo_prints_a_table_and_leaves_a_figure_and_its_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = []
    for split, num_images in (("train", 4), ("val", 2)):
        made = make_leaky_shapes(tmp_path / split, num_images, seed=1, split=split)
        datasets.append([f"demo_{split}", str(made.annotations), str(made.images)])
    overrides = ["DATASETS.COCO_JSON", str(datasets), "SOLVER.MAX_ITER", "1"]
    overrides += ["DATASETS.TRAIN", "('demo_train',)", "DATASETS.TEST", "('demo_val',)"]
    folder = tmp_path / "demo"
    results = run_demo(folder, workers=2, overrides=overrides)
    aps = json.loads(results.read_text())["AP"]
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
    with Image.open(folder / "leak.png") as figure:
        assert figure.width > 600
    printed = capfd.readouterr().out
    for word in ("[1 of 4] BN: training", "[4 of 4]", "box AP", "mask AP"):
        assert word in printed

    assert run_demo(folder, workers=2, overrides=overrides) == results
    assert capfd.readouterr().out.count("done before") == 4
