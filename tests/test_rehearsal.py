"""What cannot be built or run is said before the first iteration, with the key."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from tooling import QUICKSTART, run_tool

from bn_detection import ConfigError
from bn_detection.config import one_line
from bn_detection.engine import argument_parser, check_config, load_config
from bn_detection.engine.rehearsal import rehearse
from bn_detection.engine.values import check_values
from bn_detection.study.matrix import plan
from bn_detection.study.runner import run_studies
from bn_detection.study.study_file import read_study


def config(*more: object, config: str = "mask_rcnn_bn") -> CfgNode:
    opts = ["OUTPUT_DIR", "nowhere", *map(str, more)]
    path = QUICKSTART / f"{config}.yaml"
    return load_config(argument_parser().parse_args(["--config-file", str(path), *opts]))


def test_results_are_expected_as_in_detectron2() -> None:
    results = '[["bbox", "AP", 38.5, 0.2], ["segm", "AP", 35.0, 0.2]]'
    check_values(config("TEST.EXPECTED_RESULTS", results), training=True)


def told(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["SEED", 2**32], ["SEED", "at most"]),
        (["SOLVER.MAX_ITER", 0], ["SOLVER.MAX_ITER 0", "at least 1"]),
        (["SOLVER.STEPS", "None"], ["SOLVER.STEPS None", "tuple"]),
        (["SOLVER.STEPS", "(1200,)"], ["SOLVER.STEPS (1200,)", "SOLVER.MAX_ITER 1200"]),
        (["SOLVER.STEPS", "(20, 10)"], ["SOLVER.STEPS", "rising"]),
        (["SOLVER.CHECKPOINT_PERIOD", 0], ["SOLVER.CHECKPOINT_PERIOD 0"]),
        (["SOLVER.IMS_PER_BATCH", 0], ["SOLVER.IMS_PER_BATCH 0"]),
        (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 10**9], ["NUM_KEYPOINTS 1000000000", "10,000"]),
        (["SOLVER.IMS_PER_BATCH", 10**9], ["SOLVER.IMS_PER_BATCH 1000000000", "100,000"]),
        (["SOLVER.BASE_LR", -0.1], ["SOLVER.BASE_LR -0.1"]),
        (["SOLVER.BASE_LR", "1e400"], ["SOLVER.BASE_LR inf", "finite"]),
        (["BN.EPS", "1e400"], ["BN.EPS inf", "finite"]),
        (["BN.RENORM.R_MAX", "1e400"], ["BN.RENORM.R_MAX inf", "finite"]),
        (["BN.RENORM.D_MAX", "None"], ["BN.RENORM.D_MAX None", "5.0"]),
        (["BN.POPULATION.TOLERANCE", "None"], ["BN.POPULATION.TOLERANCE None"]),
        (["BN.POPULATION.BATCH_SIZE", 10**11], ["BN.POPULATION.BATCH_SIZE", "100,000"]),
        (["BN.MODULES", "[1]"], ["BN.MODULES [1]", "text"]),
        (["DATASETS.TRAIN", "[3]"], ["DATASETS.TRAIN [3]", "text"]),
        (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty"]),
        (["MODEL.WEIGHTS", "None"], ["MODEL.WEIGHTS None"]),
        (["MODEL.DEVICE", "gpu"], ['MODEL.DEVICE "gpu"', '"cuda"']),
        (["MODEL.DEVICE", ""], ['MODEL.DEVICE ""']),
        (["MODEL.DEVICE", "None"], ["MODEL.DEVICE None"]),
        (["MODEL.ROI_BOX_HEAD.CONV_DIM", 0], ["MODEL.ROI_BOX_HEAD.CONV_DIM 0"]),
        (["INPUT.MIN_SIZE_TRAIN", "()"], ["INPUT.MIN_SIZE_TRAIN ()"]),
        (["DATALOADER.NUM_WORKERS", -1], ["DATALOADER.NUM_WORKERS -1"]),
        (["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "()"], ["TEST.AUG.MIN_SIZES ()"]),
        (["TEST.EXPECTED_RESULTS", "[1]"], ["TEST.EXPECTED_RESULTS 1", "tolerance"]),
        (["MODEL.LOAD_PROPOSALS", True], ["DATASETS.PROPOSAL_FILES_TRAIN ()"]),
    ],
)
def test_a_value_that_means_nothing_is_refused(options: list[object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(config(*options), num_workers=1, eval_only=False, resume=False)
    for word in words:
        assert word in told(error)


def test_the_solver_does_not_count_in_an_evaluation() -> None:
    cfg = config("SOLVER.MAX_ITER", 10, "DATASETS.TRAIN", "()")
    check_config(cfg, num_workers=1, eval_only=True, resume=False)


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused(workers: int) -> None:
    with pytest.raises(ConfigError, match=f"--num-gpus {workers}"):
        check_config(config(), num_workers=workers, eval_only=False, resume=False)


RETINANET = "retinanet_separate"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MODEL.BACKBONE.NAME", "Foo"], ['MODEL.BACKBONE.NAME "Foo"', "--import"]),
        (["MODEL.META_ARCHITECTURE", "Foo"], ['MODEL.META_ARCHITECTURE "Foo"', "--import"]),
        (["MODEL.ROI_BOX_HEAD.NAME", "Foo"], ['MODEL.ROI_BOX_HEAD.NAME "Foo"', "--import"]),
        (["MODEL.RPN.HEAD_NAME", "Foo"], ['MODEL.RPN.HEAD_NAME "Foo"', "--import"]),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "Foo"], ["MODEL.ROI_BOX_HEAD.POOLER_TYPE Foo"]),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[]"], ["MODEL.ANCHOR_GENERATOR.SIZES []"]),
        (["MODEL.RPN.IN_FEATURES", "[]"], ["MODEL.RPN.IN_FEATURES []"]),
        (["MODEL.PIXEL_STD", "[1.0, 2.0]"], ["MODEL.PIXEL_STD [1.0, 2.0]"]),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "foo"], ["BBOX_REG_LOSS_TYPE foo", "training"]),
        (["SOLVER.LR_SCHEDULER_NAME", "Foo"], ["SOLVER.LR_SCHEDULER_NAME Foo"]),
        (["SOLVER.WARMUP_METHOD", "foo"], ["SOLVER.WARMUP_METHOD foo"]),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "foo"],
            ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE foo"],
        ),
        (["INPUT.FORMAT", "FOO"], ["INPUT.FORMAT FOO"]),
        (["INPUT.MASK_FORMAT", "foo"], ["INPUT.MASK_FORMAT foo"]),
        (["DATALOADER.SAMPLER_TRAIN", "Foo"], ["DATALOADER.SAMPLER_TRAIN Foo"]),
        ([RETINANET, "MODEL.RETINANET.PRIOR_PROB", 0.0], ["MODEL.RETINANET.PRIOR_PROB 0.0"]),
        ([RETINANET, "MODEL.RETINANET.IN_FEATURES", "['p9']"], ["IN_FEATURES ['p9']"]),
    ],
)
def test_what_cannot_be_built_or_run_names_the_key(options: list[object], words: list[str]) -> None:
    name = options.pop(0) if options[0] == RETINANET else "mask_rcnn_bn"
    cfg = config(*options, config=str(name))
    with pytest.raises(ConfigError) as error:
        rehearse(cfg, training=True)
    for word in words:
        assert word in told(error)


@pytest.mark.parametrize("name", ["mask_rcnn_shuffle", "mask_rcnn_renorm", "retinanet_shared"])
def test_configs_that_are_right_pass_and_leave_no_trace(name: str) -> None:
    cfg = config(config=name)
    before = cfg.dump(), random.getstate(), torch.get_rng_state()
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    rehearse(cfg, training=True)
    assert cfg.dump() == before[0]
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_what_an_evaluation_does_not_use_names_its_key_too() -> None:
    cfg = config()
    cfg.INPUT.MIN_SIZE_TRAIN = ([1],)
    with pytest.raises(ConfigError, match=r"^INPUT.MIN_SIZE_TRAIN \(\[1\],\): with it making"):
        rehearse(cfg, training=False)


@pytest.mark.parametrize(
    "options",
    [
        ["TEST.AUG.ENABLED", True],
        ["INPUT.MASK_FORMAT", "bitmask", "INPUT.CROP.ENABLED", True],
        ["BN.VIRTUAL_WORKERS", 2, "BN.VIRTUAL_LOSSES", True],
        ["INPUT.MIN_SIZE_TRAIN", "(0,)"],
        ["BN.INFERENCE", "batch"],
    ],
)
def test_so_do_options_of_every_kind(options: list[object]) -> None:
    rehearse(config(*options), training=True)


def test_a_dry_run_notices_what_is_not_registered(tmp_path: Path) -> None:
    path = QUICKSTART / "mask_rcnn_bn.yaml"
    study = tmp_path / "study.yaml"
    study.write_text(
        f"about: x\noverrides: {{MODEL.BACKBONE.NAME: Mine}}\n"
        f"runs: {{a: {{config: {path}}}}}\nevaluations: {{a: }}\n"
    )
    with pytest.raises(ConfigError, match=r'run a: MODEL.BACKBONE.NAME "Mine".*--import'):
        plan(read_study(study), tmp_path / "out", {})


def test_a_dry_run_notices_a_backbone_of_ones_own_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_backbones.py").write_text(
        "from detectron2.modeling import BACKBONE_REGISTRY\n"
        "from bn_detection.heads.backbone import SmallConvBackbone\n\n\n"
        "@BACKBONE_REGISTRY.register()\nclass Failing(SmallConvBackbone):\n"
        "    def forward(self, x):\n        return {'p9': super().forward(x)['p2']}\n"
    )
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(
        f"about: x\noverrides: {{MODEL.BACKBONE.NAME: Failing}}\n"
        f"runs: {{a: {{config: {QUICKSTART / 'mask_rcnn_bn.yaml'}}}}}\nevaluations: {{a: }}\n"
    )
    given = {"imports": ["own_backbones"], "dry_run": True}
    with pytest.raises(ConfigError, match=r"run a: .*a step of training fails: KeyError: 'p2'"):
        run_studies([Path("study.yaml")], tmp_path / "out", **given)
    (tmp_path / "own_backbones.py").unlink()


def test_a_tool_ends_with_one_line(tmp_path: Path) -> None:
    path = QUICKSTART / "mask_rcnn_bn.yaml"
    ended = run_tool("train_net", "--config-file", path, "--num-gpus", 0, "OUTPUT_DIR", tmp_path)
    assert ended.status == 2
    assert ended.error.startswith("error: --num-gpus 0")


def test_a_list_that_contains_itself_is_named() -> None:
    cfg = config()
    cfg.BN.MODULES.append(cfg.BN.MODULES)
    with pytest.raises(ConfigError, match=r"BN\.MODULES: a list in it contains itself"):
        check_values(cfg, training=True)


def test_frames_of_torch_are_not_in_a_line() -> None:
    error = RuntimeError(
        "too large\nException raised from at::f (most recent call first):\nframe #0"
    )
    assert one_line(error) == "too large"
