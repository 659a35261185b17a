"""A diagnosis of configs of Detectron2's model zoo: each meta-architecture and each ROI head."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import model_zoo  # noqa: E402

SAMPLE = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml": "on rois: loss",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": "on rois: loss",
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml": "on detections: box_ap",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": "on detections: box_ap",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml": "a ProposalNetwork gives no instances, but proposals",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml": "on rois: loss, mask_loss",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml": "on rois: loss, mask_loss",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": "on rois: loss",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml": "on rois: loss, mask_loss",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": (
        "on rois: loss, loss_stage1, loss_stage2, loss_stage3, mask_loss"
    ),
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml": model_zoo.NATIVE,
    "Misc/semantic_R_50_FPN_1x.yaml": "a SemanticSegmentor gives no instances, but sem_seg",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    model_zoo.make_data(folder)
    return folder


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_config_of_the_zoo_is_diagnosed(name: str, folder: Path) -> None:
    if SAMPLE[name] == model_zoo.NATIVE and model_zoo.has_native():
        pytest.skip("native operators are there")
    row = model_zoo.diagnose_config(name, folder)
    assert "\n" not in row.probe
    assert SAMPLE[name] in row.probe
    if SAMPLE[name] != model_zoo.NATIVE:
        measured, all_layers = row.layers.split(" of ")
        assert measured == all_layers != "0"


def test_the_docs_have_every_config_of_the_zoo() -> None:
    table = (BENCHMARKS.parent / "docs" / "model_zoo.md").read_text()
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == (
        model_zoo.configs()
    )
