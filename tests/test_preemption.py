"""SIGTERM and SIGUSR1: a training stops after an iteration, and goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_workers
from training import QUICKSTART, RETINANET, build_trainer, different, make_images, train

from bn_detection.engine import Stopped, Trainer, argument_parser
from bn_detection.engine.preemption import noting_signals

ROOT = Path(__file__).parents[1]
OPTIONS = (
    *("SOLVER.MAX_ITER", 5, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", "()"),
    *("TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    make_images(folder)
    return folder


def interrupted(
    folder: Path, output: Path, *options: object, signum: int = signal.SIGTERM, rank: int = 0
) -> list[dict[str, Any]]:
    """What a whole training leaves, and one that one of its workers is asked to stop."""
    whole = train(build_trainer(folder, output / "whole", *OPTIONS, *options))

    def ask(trainer: Trainer) -> None:
        is_asked = not torch.distributed.is_initialized() or torch.distributed.get_rank() == rank
        if trainer.iter == 2 and is_asked:
            os.kill(os.getpid(), signum)

    trainer = build_trainer(folder, output / "part", *OPTIONS, *options)
    before = signal.getsignal(signum)
    with noting_signals(), pytest.raises(Stopped) as info:
        train(trainer, ask)
    assert signal.getsignal(signum) == before
    assert info.value.code == 128 + signum
    assert trainer.iter == 2
    assert (output / "part" / "last_checkpoint").read_text() == "model_0000002.pth"
    trainer = build_trainer(folder, output / "part", *OPTIONS, *options, resume=True)
    assert trainer.start_iter == 3
    resumed = train(trainer)
    whole["images"] = whole["images"][-len(resumed["images"]) :]
    return [resumed, whole]


@pytest.mark.parametrize(
    ("signum", "period"), [(signal.SIGTERM, 100), (signal.SIGUSR1, 3)], ids=["SIGTERM", "SIGUSR1"]
)
def test_one_worker(folder: Path, tmp_path: Path, signum: int, period: int) -> None:
    # The second is asked to stop after an iteration that has a checkpoint anyway.
    options = ("SOLVER.CHECKPOINT_PERIOD", period)
    assert different(*interrupted(folder, tmp_path, *options, signum=signum)) == []


EMA = ("BN.POPULATION.ESTIMATOR", "pooled", "BN.POPULATION.NUM_SAMPLES", 4)
EMA += ("BN.POPULATION.RESTORE_EMA", True, "BN.POPULATION.PERIOD", 3)
ON_TWO_WORKERS = {"bn": (), "restore ema": EMA, "retinanet": RETINANET}


def _two_workers(rank: int, world_size: int, folder: str, output: str) -> dict[str, list[str]]:
    torch.use_deterministic_algorithms(True)
    found = {
        name: different(*interrupted(Path(folder), Path(output, name), *options, rank=1))
        for name, options in ON_TWO_WORKERS.items()
    }
    torch.use_deterministic_algorithms(False)
    return found


@pytest.mark.timeout(200)
def test_two_workers_of_which_one_is_asked(folder: Path, tmp_path: Path) -> None:
    for found in run_workers(_two_workers, 2, str(folder), str(tmp_path), timeout=180):
        assert not any(found.values()), found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("launcher", ["--num-gpus 2", "torchrun"])
def test_the_tool_passes_the_signal_on(folder: Path, tmp_path: Path, launcher: str) -> None:
    datasets = [
        [f"{folder.name}_{s}", f"{folder}/{s}/annotations.json", f"{folder}/{s}/images"]
        for s in ("train", "val")
    ]
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    command = (
        *(sys.executable, *(torchrun if launcher == "torchrun" else ())),
        *(str(ROOT / "tools" / "train_net.py"), "--config-file"),
        *(str(QUICKSTART / "mask_rcnn_shuffle.yaml"),),
        *(launcher.split() if launcher != "torchrun" else ()),
        *("DATASETS.COCO_JSON", str(datasets), "DATASETS.TRAIN", f"('{datasets[0][0]}',)"),
        *("DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "1"),
        *("SOLVER.MAX_ITER", "100000", "SOLVER.STEPS", "()"),
    )
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for line in process.stdout:
            if "eta:" in line:
                break
        if launcher == "torchrun":
            process.send_signal(signal.SIGTERM)
        else:
            # As a batch system does, to every process of the job.
            for pid in reversed(processes_below(process.pid)):
                os.kill(pid, signal.SIGTERM)
        started = time.monotonic()
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - started < 25
    name = (tmp_path / "last_checkpoint").read_text()
    assert f"with the checkpoint {name}; --resume goes on" in printed + errors
    state = torch.load(tmp_path / name)["trainer"]
    assert name == f"model_{state['iteration']:07d}.pth"
    assert len(state["resume"]["workers"]) == 2
    assert "SIGABRT" not in errors and "terminate called" not in errors
    if launcher != "torchrun":
        assert process.returncode == 143
        assert "Traceback" not in errors, errors


def processes_below(pid: int) -> list[int]:
    import psutil

    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def test_help_has_the_statuses() -> None:
    text = argument_parser().format_help()
    assert "143 stopped by SIGTERM, 138 by SIGUSR1" in text
