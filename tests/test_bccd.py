"""configs/bccd: its study can be planned, and each of its models trains, on images of noise."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bn_detection import cli
from bn_detection.config import ConfigError
from bn_detection.engine import check_config, load_config
from bn_detection.engine.rehearsal import rehearse
from bn_detection.leakage import images_per_worker
from bn_detection.shipped import SHIPPED
from bn_detection.study.matrix import plan
from bn_detection.study.study_file import read_study

STUDY = SHIPPED / "bccd" / "bccd.yaml"
NORMS = {"none": "", "gn": "GN", "bn": "BN", "syncbn": "SyncBN", "shuffle": "ShuffleBN"}
OVERRIDES = ("MODEL.TIMM.WEIGHTS", "", "BN.VIRTUAL_WORKERS", "2", "BN.VIRTUAL_LOSSES", "True")

pytestmark = pytest.mark.usefixtures("own_catalogs")


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of BCCD of four images, converted as docs/bccd.md says."""
    root = tmp_path / "datasets" / "BCCD_Dataset" / "BCCD"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, name in enumerate(("RBC", "WBC", "Platelets", "RBC")):
        pixels = generator.integers(0, 255, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{number}.jpg")
        box = "<xmin>20</xmin><ymin>10</ymin><xmax>80</xmax><ymax>70</ymax>"
        (root / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
        )
    (root / "ImageSets/Main/train.txt").write_text("0\n1\n2\n")
    (root / "ImageSets/Main/val.txt").write_text("3\n")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        line = ["voc-to-coco", "datasets/BCCD_Dataset/BCCD", "--split", split, "--output"]
        assert cli.main([*line, f"datasets/bccd/{split}.json"]) == 0


def test_without_the_photographs_their_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"bccd_train.*datasets/bccd/train\.json do not exist"):
        plan(read_study(STUDY), tmp_path, {})


@pytest.mark.usefixtures("photographs")
def test_the_study_can_be_planned(tmp_path: Path) -> None:
    study = read_study(STUDY)
    planned = plan(study, tmp_path, {})
    assert len(planned.tasks) == 3 * (5 + 3 + 3)
    norms = {name: cfg.MODEL.ROI_BOX_HEAD.NORM for name, cfg in planned.configs.items()}
    assert norms == dict(zip(study.runs, NORMS.values(), strict=True))
    for cfg in planned.configs.values():
        assert images_per_worker(cfg, study.workers) == 1


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("name", NORMS)
def test_a_step_of_each_config(name: str) -> None:
    pytest.importorskip("timm")
    file = SHIPPED / "bccd" / f"faster_rcnn_{name}.yaml"
    cfg = load_config(argparse.Namespace(config_file=str(file), opts=list(OVERRIDES)))
    check_config(cfg, num_workers=1, eval_only=False, resume=False)
    rehearse(cfg, training=True)
