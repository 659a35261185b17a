"""The standard job, end to end: train, evaluate, resume, evaluate again; and what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tooling import run_script
from torch import Tensor

from bn_detection import ConfigError, PartitionedBatchNorm2d
from bn_detection.data import make_leaky_shapes
from bn_detection.engine import Trainer, argument_parser, check_config, load_config, preflight
from bn_detection.engine.checkpoint import AtomicCheckpointer
from bn_detection.engine.setup import register_datasets
from bn_detection.files import FolderLock
from bn_detection.norm import Groups, Rows

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
NORMS = {
    "none": "",
    "gn": "GN",
    "bn": "BN",
    "bn_batch_stats": "BN",
    "syncbn": "SyncBN",
    "shuffle": "ShuffleBN",
    "ghost": "GhostBN",
    "image": "ImageBN",
    "renorm": "BatchRenorm",
    "frozen": "BN",
}


# What levels share in training and as a population.
LEVELS = {
    "shared": ("shared", "shared"),
    "shared_separate": ("shared", "separate"),
    "separate_shared": ("separate", "shared"),
    "separate": ("separate", "separate"),
    # With affine parameters for each level.
    "separate_shared_affine": ("separate", "shared"),
    "separate_affine": ("separate", "separate"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``train`` and ``val``, a few images each."""
    folder = tmp_path_factory.mktemp("data")
    for split, num_images in (("train", 8), ("val", 4)):
        make_leaky_shapes(folder / split, num_images, seed=7, split=split)
    return folder


def overrides(folder: Path, output: Path, *more: object) -> list[str]:
    datasets = [
        [f"{folder.name}_{s}", f"{folder}/{s}/annotations.json", f"{folder}/{s}/images"]
        for s in ("train", "val")
    ]
    options = {
        "DATASETS.COCO_JSON": datasets,
        "DATASETS.TRAIN": (datasets[0][0],),
        "DATASETS.TEST": (datasets[1][0],),
        "OUTPUT_DIR": output,
    }
    return [str(part) for pair in options.items() for part in pair] + [str(part) for part in more]


def train_net(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "tools" / "train_net.py", *arguments)


def parse(config: Path | str, opts: list[str], *flags: str):
    return argument_parser().parse_args(["--config-file", str(config), *flags, *opts])


def ap(path: Path) -> dict[str, float]:
    results = json.loads(path.read_text())["results"]
    return {task: results[task]["AP"] for task in ("bbox", "segm")}


@pytest.mark.timeout(280)
def test_train_evaluate_resume_and_evaluate_again(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = ("--config-file", str(QUICKSTART / "mask_rcnn_shuffle.yaml"))
    options = overrides(folder, output, "SOLVER.WARMUP_ITERS", 2)
    run = train_net(*config, "--num-gpus", "2", *options, "SOLVER.MAX_ITER", "4")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "eta:" in run.stdout
    assert {"config.yaml", "metrics.json", "versions.json", "log.txt"} <= set(os.listdir(output))
    assert ap(output / "inference" / "results.json").keys() == {"bbox", "segm"}

    again = train_net(*config, "--num-gpus", "2", *options)
    assert again.returncode == 2
    assert again.stderr.count("error: ") == 1
    assert "--resume" in again.stderr

    options += ["SOLVER.MAX_ITER", "6"]
    # Workers that are started, not forked.
    command = [
        sys.executable,
        "-m",
        "bn_detection",
        "train",
        *config,
        "--resume",
        "--num-gpus",
        "2",
    ]
    resumed = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Starting training from iteration 4" in resumed.stdout
    after_training = ap(output / "inference" / "results.json")

    evaluated = train_net(*config, "--resume", "--eval-only", *options)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    # One worker instead of two evaluates the same images with the same averaged statistics.
    assert ap(output / "eval_model_final_population" / "results.json") == pytest.approx(
        after_training, abs=1e-6
    )


@pytest.mark.timeout(200)
def test_torchrun(folder: Path, tmp_path: Path) -> None:
    run = run_script(
        *("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "bn_detection", "train"),
        *("--config-file", "quickstart/mask_rcnn_syncbn.yaml"),
        *overrides(folder, tmp_path / "run", "SOLVER.MAX_ITER", 2),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "World size: 2" in run.stdout
    assert ap(tmp_path / "run" / "inference" / "results.json").keys() == {"bbox", "segm"}


def trainer(folder: Path, output: Path, config: str = "bn", *more: object) -> Trainer:
    narrow = ("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32)
    opts = overrides(folder, output, "SOLVER.IMS_PER_BATCH", 1, *narrow, *more)
    cfg = load_config(parse(QUICKSTART / f"mask_rcnn_{config}.yaml", opts))
    register_datasets(cfg)
    torch.manual_seed(0)
    return Trainer(cfg)


@pytest.mark.parametrize("kind", NORMS)
def test_every_quickstart_config_trains_and_evaluates(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    run = trainer(folder, tmp_path, kind, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1)
    run.train()
    assert ap(tmp_path / "inference" / "results.json").keys() == {"bbox", "segm"}
    layers = [m for m in run.model.modules() if isinstance(m, PartitionedBatchNorm2d)]
    assert len(layers) == (0 if kind in ("none", "gn") else 6)
    assert {m.inference for m in layers} <= {"batch" if kind == "bn_batch_stats" else "population"}


@pytest.mark.parametrize("kind", ["none", "gn", *LEVELS])
def test_every_quickstart_retinanet_trains_and_evaluates(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    config = QUICKSTART / f"retinanet_{kind}.yaml"
    options = ("SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1)
    options += ("BN.POPULATION.NUM_SAMPLES", 2)
    cfg = load_config(parse(config, overrides(folder, tmp_path, *options)))
    register_datasets(cfg)
    check_config(cfg, num_workers=1, eval_only=False, resume=False)
    run = Trainer(cfg)
    run.train()
    results = json.loads((tmp_path / "inference" / "results.json").read_text())["results"]
    assert results.keys() == {"bbox"}
    layers = [m for m in run.model.modules() if isinstance(m, PartitionedBatchNorm2d)]
    _, population = LEVELS.get(kind, (None, None))
    assert len(layers) == {None: 0, "shared": 4, "separate": 4 * 3}[population]


@pytest.mark.parametrize("kind", ["none", "gn", *LEVELS])
def test_full_size_retinanet_configs_are_detectron2s(kind: str) -> None:
    # A checkout of Detectron2 that was not installed has no model zoo.
    try:
        from detectron2 import model_zoo

        stock = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    cfg, quick = (
        load_config(parse(folder / f"retinanet_{kind}.yaml", []))
        for folder in (ROOT / "configs", QUICKSTART)
    )
    for config in (cfg, quick):
        assert config.MODEL.META_ARCHITECTURE == "BNRetinaNet"
        assert config.MODEL.RETINANET.pop("NORM") == {"none": "", "gn": "GN"}.get(kind, "SyncBN")
        chosen = {k: config.BN.LEVELS[k] for k in ("TRAIN", "POPULATION", "AFFINE")}
        affine = "separate" if kind.endswith("_affine") else "shared"
        assert tuple(chosen.values()) == (*LEVELS.get(kind, ("separate", "separate")), affine)
        # Only row 2 has running statistics that are not of how inference normalizes.
        estimator = "pooled" if kind == "shared_separate" else "ema"
        assert estimator == config.BN.POPULATION.ESTIMATOR
    stock.MODEL.RETINANET.pop("NORM")
    stock.MODEL.META_ARCHITECTURE = "BNRetinaNet"
    cfg.MODEL.ROI_KEYPOINT_HEAD.pop("NORM")  # this project's keys
    cfg.MODEL.pop("TIMM")
    cfg.SOLVER.AMP.pop("PRECISION")
    ours = {"BN", "OUTPUT_DIR", "DATASETS", "VERSION"}
    for key in stock.keys() - ours:
        assert cfg[key] == stock[key], key


@pytest.mark.parametrize("kind", NORMS)
def test_full_size_configs_are_detectron2s_mask_rcnn_3x(kind: str) -> None:
    # A checkout of Detectron2 that was not installed has no model zoo.
    try:
        from detectron2 import model_zoo

        stock = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    cfg = load_config(parse(ROOT / "configs" / f"mask_rcnn_{kind}.yaml", []))
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.pop("NORM") == ""  # this project's keys
    assert cfg.SOLVER.AMP.pop("PRECISION") == "float16"
    ours = {"BN", "OUTPUT_DIR", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_MASK_HEAD"}
    for node, keys in (("MODEL", stock.MODEL), ("", stock)):
        for key, value in keys.items():
            if f"{node}.{key}".strip(".") in {*ours, "MODEL", "DATASETS"}:
                continue
            assert (cfg[node] if node else cfg)[key] == value, key
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    assert (box.NUM_CONV, box.CONV_DIM, box.NUM_FC, box.FC_DIM) == (4, 256, 1, 1024)
    assert box.NORM == mask.NORM == NORMS[kind]
    assert (cfg.BN.INFERENCE == "batch") == (kind == "bn_batch_stats")
    quick = load_config(parse(QUICKSTART / f"mask_rcnn_{kind}.yaml", []))
    assert quick.MODEL.ROI_BOX_HEAD.NORM == quick.MODEL.ROI_MASK_HEAD.NORM == NORMS[kind]
    # A group is a part of an image's RoIs, which are fewer there.
    for config in (cfg, quick):
        assert 2 * config.BN.GHOST.SIZE <= config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    quick.BN.GHOST.SIZE = cfg.BN.GHOST.SIZE
    assert cfg.BN == quick.BN
    assert cfg.BN.RENORM.SCALE_TO_MAX_ITER is (kind == "renorm")


def test_resume_restores_optimizer_scheduler_and_iteration(folder: Path, tmp_path: Path) -> None:
    first = trainer(folder, tmp_path, "bn", "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()")
    first.train()
    second = trainer(folder, tmp_path, "bn", "SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()")
    second.resume_or_load(resume=True)
    assert second.start_iter == 3
    assert second.scheduler.last_epoch == first.scheduler.last_epoch
    momenta = [
        {name: t.optimizer.state[p]["momentum_buffer"] for name, p in t.model.named_parameters()}
        for t in (first, second)
    ]
    assert momenta[0].keys() == momenta[1].keys()
    for name, momentum in momenta[0].items():
        assert momentum.abs().max() > 0, name
        assert torch.equal(momentum, momenta[1][name]), name


def test_interrupted_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(model, str(tmp_path), save_to_disk=True)
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def save_half(data: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model.pth")


VIRTUAL_4 = ("BN.VIRTUAL_WORKERS", "4", "SOLVER.IMS_PER_BATCH", "4")


def refused(folder: Path, output: Path, *more: object, flags: tuple[str, ...] = ()) -> str:
    config = QUICKSTART / "mask_rcnn_shuffle.yaml"
    with pytest.raises(ConfigError) as info:
        preflight(parse(config, overrides(folder, output, *more), *flags))
    return str(info.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["MODEL.ROI_BOX_HEAD.NORM", "Shuffle"], ["MODEL.ROI_BOX_HEAD.NORM", '"ShuffleBN"', '""']),
        (["MODEL.ROI_MASK_HEAD.NORM", "bn"], ["MODEL.ROI_MASK_HEAD.NORM", '"BN"']),
        (["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"], ["NAME", '"BNConvFCHead"']),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], ["Res5ROIHeads", "BN.CONVERT"]),
        (["BN.INFERENCE", "minibatch"], ["BN.INFERENCE", '"population"', '"batch"']),
        (["BN.MOMENTUM", "2.0"], ["BN.MOMENTUM 2.0"]),
        (["BN.EPS", "-1.0"], ["BN.EPS -1.0"]),
        (["BN.MOMENTO", "0.1"], ["BN.MOMENTO"]),
        (["BN.GHOST.SIZE", "1"], ["BN.GHOST.SIZE 1", "at least 2"]),
        (["BN.VIRTUAL_WORKERS", "3"], ["BN.VIRTUAL_WORKERS 3", "multiple", "workers, 2"]),
        (
            ["BN.VIRTUAL_WORKERS", "4"],
            ["BN.VIRTUAL_WORKERS 4", "SOLVER.IMS_PER_BATCH 2", "multiple of 4"],
        ),
        (
            [*VIRTUAL_4, "SOLVER.REFERENCE_WORLD_SIZE", "4"],
            ["BN.VIRTUAL_WORKERS 4", "SOLVER.IMS_PER_BATCH 2", "multiple of 4"],
        ),
        (["BN.VIRTUAL_LOSSES", "True"], ["BN.VIRTUAL_LOSSES True", "BN.VIRTUAL_WORKERS"]),
        (["BN.SHUFFLE.MODE", "feature"], ['BN.SHUFFLE.MODE is "feature"', '"features"']),
        (
            ["BN.SHUFFLE.MODE", "features", *VIRTUAL_4],
            ["BN.SHUFFLE.MODE features", "BN.VIRTUAL_WORKERS 4", "BN.SHUFFLE.MODE statistics"],
        ),
        (["BN.RENORM.R_MAX", "0.5"], ["BN.RENORM.R_MAX 0.5", "at least 1"]),
        (["BN.RENORM.D_MAX", "-1.0"], ["BN.RENORM.D_MAX -1.0", "at least 0"]),
        (
            ["BN.RENORM.WARMUP_ITERS", "30000"],
            ["BN.RENORM.D_ITERS 25000", "at least 30000", "WARMUP_ITERS"],
        ),
        (["BN.POPULATION.ESTIMATOR", "exact"], ["BN.POPULATION.ESTIMATOR", '"pooled"']),
        (["BN.POPULATION.NUM_SAMPLES", "0"], ["BN.POPULATION.NUM_SAMPLES 0", "at least 1"]),
        (["BN.POPULATION.BATCH_SIZE", "3"], ["BN.POPULATION.BATCH_SIZE 3", "2 workers"]),
        (
            ["BN.POPULATION.ESTIMATOR", "pooled", "TEST.PRECISE_BN.ENABLED", "True"],
            ["BN.POPULATION.ESTIMATOR pooled", "TEST.PRECISE_BN.ENABLED"],
        ),
        (["BN.POPULATION.ROIS", "proposals"], ["BN.POPULATION.ROIS", '"inference"']),
        (
            ["BN.POPULATION.ESTIMATOR", "fvcore", "BN.POPULATION.RESTORE_EMA", "True"],
            ["BN.POPULATION.RESTORE_EMA True", "fvcore", '"pooled"'],
        ),
        (
            ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "0"],
            ["TEST.PRECISE_BN.NUM_ITER 0", "at least 1"],
        ),
        (["BN.FREEZE.LAST_ITERS", "1500"], ["BN.FREEZE.LAST_ITERS 1500", "MAX_ITER 1200"]),
        (["BN.RENORM.PARTITION", "workers"], ['BN.RENORM.PARTITION is "workers"', '"worker"']),
        (["BN.CONVERT", "['roi_heads.*', 'GN']"], ["BN.CONVERT roi_heads.*", '"ShuffleBN"]']),
        (["BN.CONVERT", "[['backbone.*']]"], ["BN.CONVERT ['backbone.*']", '"ShuffleBN"]']),
        (["BN.CONVERT", "[[0, 'GN']]"], ["BN.CONVERT [0, 'GN']", "glob"]),
        (["BN.CONVERT", "[['rpn', 'Group']]"], ["BN.CONVERT ['rpn', 'Group']", '"GN"']),
        (
            ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NORM", "BN"],
            ['MODEL.ROI_KEYPOINT_HEAD.NORM is "BN"', '"BNConvDeconvKeypointHead"'],
        ),
        (
            ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"],
            ['MODEL.ROI_MASK_HEAD.NORM is "ShuffleBN"', '"BNConvUpsampleHead"'],
        ),
        (
            [
                *("MODEL.ROI_BOX_HEAD.NORM", "GhostBN"),
                *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            ],
            ['MODEL.ROI_BOX_HEAD.NORM is "GhostBN"', '"BNConvFCHead"'],
        ),
        (
            [
                *("MODEL.ROI_BOX_HEAD.NORM", "SyncBN"),
                *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            ],
            ['MODEL.ROI_BOX_HEAD.NORM is "SyncBN"', "CPU", '"BNConvFCHead"'],
        ),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], ["MODEL.ROI_HEADS.NUM_CLASSES is 80", "4 classes"]),
        (["MODEL.WEIGHTS", "no/such.pth"], ["MODEL.WEIGHTS no/such.pth", "no such file"]),
        (["SOLVER.IMS_PER_BATCH", "3"], ["SOLVER.IMS_PER_BATCH 3", "2 workers"]),
        (
            ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "fp16"],
            ["SOLVER.AMP.PRECISION", '"bfloat16"'],
        ),
        (["BN.KERNELS", "cuda"], ["BN.KERNELS", '"triton"']),
        (["BN.KERNELS", "triton"], ["BN.KERNELS", "a GPU", '"auto"']),
        (["DATASETS.TRAIN", "('coco_2017_train',)"], ["DATASETS.TRAIN", "DETECTRON2_DATASETS"]),
        (["DATASETS.TEST", "('my_val',)"], ["DATASETS.TEST", "my_val"]),
    ],
)
def test_bad_config_is_refused_by_name(
    folder: Path, tmp_path: Path, more: list[str], words: list[str]
) -> None:
    message = refused(folder, tmp_path, *more, flags=("--num-gpus", "2"))
    for word in words:
        assert word in message


def test_missing_files_are_refused_by_key(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "incomplete"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "val" / "images")
    (copy / "train" / "annotations.json").rename(copy / "train" / "moved.json")
    message = refused(copy, tmp_path / "run")
    assert "DATASETS.COCO_JSON" in message
    assert "does not exist" in message or "do not exist" in message


def test_unreadable_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "half.pth"
    weights.write_bytes(b"PK\x03\x04 and no more")
    run = trainer(folder, tmp_path / "run", "bn", "MODEL.WEIGHTS", weights)
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS.*half\.pth cannot be read"):
        run.resume_or_load(resume=False)


@pytest.mark.timeout(60)
def test_a_folder_in_use_is_refused_with_its_owner(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    lock = FolderLock(output)
    lock.take()
    try:
        options = overrides(folder, output)
        run = train_net("--config-file", str(QUICKSTART / "mask_rcnn_bn.yaml"), *options)
    finally:
        lock.release()
    assert run.returncode == 2
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert run.stderr == (
        f"error: OUTPUT_DIR {output}: Another process works in {output} ({owner}): wait for it, or "
        "end it first.\n"
    )
    assert os.listdir(output) == [".lock"]


@pytest.mark.timeout(60)
def test_refusal_is_one_message_and_status_2(folder: Path, tmp_path: Path) -> None:
    run = train_net(
        "--config-file",
        str(QUICKSTART / "mask_rcnn_bn.yaml"),
        "--num-gpus",
        "2",
        *overrides(folder, tmp_path, "MODEL.ROI_BOX_HEAD.NORM", "Batch"),
    )
    assert run.returncode == 2
    assert run.stderr.count("error: ") == 1
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_cuda_falls_back_to_cpu_with_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bn_detection.engine import setup

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    opts = overrides(folder, tmp_path, "MODEL.DEVICE", "cuda")
    cfg = setup(parse(QUICKSTART / "mask_rcnn_bn.yaml", opts))
    assert cfg.MODEL.DEVICE == "cpu"
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len([line for line in log if "no GPU" in line]) == 1


def test_statistics_are_averaged_before_checkpoint_and_evaluation(
    folder: Path, tmp_path: Path
) -> None:
    from detectron2.engine import hooks

    from bn_detection.population import AverageStatistics

    run = trainer(folder, tmp_path, "bn")
    kinds = [type(hook) for hook in run._hooks]
    average = kinds.index(AverageStatistics)
    assert average < kinds.index(hooks.PeriodicCheckpointer)
    assert average < kinds.index(hooks.EvalHook)


def test_precise_statistics_replace_the_ema_and_leave_training_as_it_was(
    folder: Path, tmp_path: Path
) -> None:
    runs = {}
    for estimator in ("ema", "pooled", "mean_of_variances"):
        options = ("BN.POPULATION.ESTIMATOR", estimator, "BN.POPULATION.NUM_SAMPLES", 6)
        options += ("SOLVER.MAX_ITER", 4, "BN.POPULATION.PERIOD", 2, "DATASETS.TEST", "()")
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  Detectron2 draws from it
        run = trainer(folder, tmp_path / estimator, "bn", *options)
        run.train()
        runs[estimator] = run.model.state_dict()
    for name, value in runs["ema"].items():
        for estimator in ("pooled", "mean_of_variances"):
            same = torch.equal(runs[estimator][name], value)
            assert same != ("running" in name), name
    name = "roi_heads.box_head.conv1.norm.running_var"
    checkpoint = torch.load(tmp_path / "pooled" / "model_final.pth", weights_only=False)["model"]
    assert torch.equal(checkpoint[name], runs["pooled"][name])


def test_fvcores_estimator_is_detectron2s_hook(folder: Path, tmp_path: Path) -> None:
    from detectron2.engine import hooks

    options = ("BN.POPULATION.ESTIMATOR", "fvcore", "BN.POPULATION.NUM_SAMPLES", 3)
    run = trainer(folder, tmp_path, "bn", *options, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    kinds = [type(hook) for hook in run._hooks]
    precise = kinds.index(hooks.PreciseBN)
    assert precise < kinds.index(hooks.PeriodicCheckpointer)
    layer = run.model.roi_heads.box_head.conv1.norm
    batches = []
    layer.register_forward_hook(lambda _, inputs, __: batches.append(inputs[0].double()))
    run.train()
    # Two batches of training, then three of the estimate.
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches[2:5]]).mean(0)
    assert len(batches) == 5
    assert torch.allclose(layer.running_mean.double(), mean, atol=1e-5)


def test_batch_inference_needs_a_bn_layer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BN\.INFERENCE.*BN\.MODULES"):
        trainer(folder, tmp_path, "gn", "BN.INFERENCE", "batch")


def test_conversion_that_matches_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BN\.CONVERT.*roi_head\.\*.*no module.*roi_heads"):
        trainer(folder, tmp_path, "bn", "BN.CONVERT", "[['roi_head.*', 'ShuffleBN']]")


@pytest.mark.timeout(120)
def test_one_process_trains_as_four_workers(folder: Path, tmp_path: Path) -> None:
    run = train_net(
        *("--config-file", str(QUICKSTART / "mask_rcnn_shuffle.yaml"), "--num-gpus", "1"),
        *overrides(folder, tmp_path / "run", *VIRTUAL_4, "BN.VIRTUAL_LOSSES", True),
        *("SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert ap(tmp_path / "run" / "inference" / "results.json").keys() == {"bbox", "segm"}


def test_resumed_permutations_are_those_of_an_uninterrupted_run(
    folder: Path, tmp_path: Path
) -> None:
    def permutations(output: str, max_iter: int, resume: bool) -> dict[str, tuple[int, Tensor]]:
        """Seed and groups of every head and iteration."""
        run = trainer(
            *(folder, tmp_path / output, "shuffle", "SOLVER.IMS_PER_BATCH", 2),
            *("BN.VIRTUAL_WORKERS", 2, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", max_iter),
        )
        drawn = {}
        for head in ("box_head", "mask_head"):
            scope = run.model.get_submodule(f"roi_heads.{head}").bn_scope

            def make(rows: Rows, head: str = head, make: Any = scope.make) -> Groups:
                groups = make(rows)
                drawn[f"{head} {run.iter}"] = (rows.seed, groups.ids)
                return groups

            scope.make = make
        run.resume_or_load(resume=resume)
        run.train()
        return drawn

    whole = permutations("whole", 4, resume=False)
    first = permutations("parts", 2, resume=False)
    second = permutations("parts", 4, resume=True)
    assert list(second) == [f"{head} {k}" for k in (2, 3) for head in ("box_head", "mask_head")]
    assert whole.keys() == first.keys() | second.keys()
    assert len({seed for seed, _ in whole.values()}) == len(whole)
    for key, (seed, ids) in {**first, **second}.items():
        assert seed == whole[key][0], key
        # Images are drawn anew, and with them the number of foreground RoIs.
        if key.startswith("box_head"):
            assert len(ids) == 2 * 64
            assert torch.equal(ids, whole[key][1]), key


def test_an_unreadable_image_is_left_out(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    for split in ("train", "val"):
        (copy / split / "images" / "000001.png").write_bytes(b"not a picture")
    run = trainer(copy, tmp_path / "run", "bn", "SOLVER.MAX_ITER", 16)
    run.train()
    listed = (tmp_path / "run" / "unreadable_images.txt").read_text().splitlines()
    assert {Path(name).parts[-3] for name in listed} == {"train", "val"}
    assert ap(tmp_path / "run" / "inference" / "results.json").keys() == {"bbox", "segm"}
