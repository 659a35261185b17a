"""Trainings that are killed at any moment: what they saved is whole, and they go on exactly."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from test_preemption import processes_below
from test_train_net import overrides
from tooling import QUICKSTART, ROOT, run_tool

from bn_detection.engine.checkpoint import check_intact

from .counting import HANG, OTHER, TRACEBACK, WORKS, Tally, own_state
from .running import DATA

PART = "trainings killed by SIGKILL"
OPTIONS = (
    *("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.STEPS", "()"),
    *("SOLVER.WARMUP_ITERS", 1, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", "()"),
)
_MARK = "BN_DETECTION_CAMPAIGN"
_CHECKPOINTS = 5
_SECONDS_TO_END = 60.0


class WrongError(Exception):
    """A promise was broken."""


def command(material: Path, output: Path, workers: int, loaders: int) -> list[str]:
    """The command line of a training behind ``python``.

    Args:
        material: of :func:`campaign.running.make_material`.
        output: OUTPUT_DIR.
        workers: processes that train; two shuffle their RoIs.
        loaders: processes of a worker that load images.
    """
    config = QUICKSTART / f"mask_rcnn_{'bn' if workers == 1 else 'shuffle'}.yaml"
    more = (*OPTIONS, "DATALOADER.NUM_WORKERS", loaders)
    options = overrides(material / DATA, output, *more)
    flags = ["--config-file", str(config), "--num-gpus", str(workers)]
    return [str(ROOT / "tools" / "train_net.py"), *flags, *options]


def train_whole(material: Path, folder: Path, workers: int, *, here: bool = False) -> None:
    """The training to compare with, which nothing interrupts, in ``folder/whole_WORKERS``.

    Args:
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        workers: processes that train.
        here: whether to train in this process.
    """
    _finish(command(material, folder / f"whole_{workers}", workers, 0), _SECONDS_TO_END * 3, here)


def run(
    seed: int,
    numbers: list[int],
    material: Path,
    folder: Path,
    seconds: float,
    *,
    here: bool = False,
) -> Tally:
    """Kill trainings, and resume each; of even numbers one worker trains, of odd ones two.

    Args:
        seed: of the campaign.
        numbers: of the trainings.
        material: of :func:`campaign.running.make_material`.
        folder: of :func:`train_whole`.
        seconds: that a training may take.
        here: whether to resume in this process, if one worker trains.
    """
    tally = Tally(PART)
    for number in numbers:
        workers, loaders = 1 + number % 2, number // 2 % 2
        output = folder / f"killed_{number}"
        name = f"number {number}: {workers} workers, {loaders} loaders each"
        line = command(material, output, workers, loaders)
        try:
            name += _kill(random.Random(f"{seed}/{PART}/{number}"), line, output, workers, seconds)
            _check_saved(output)
            _finish([line[0], "--resume", *line[1:]], seconds, here and workers == 1)
            check_end(output, folder / f"whole_{workers}")
        except WrongError as error:
            tally.add(name, TRACEBACK if "Traceback" in str(error) else OTHER, str(error))
        except subprocess.TimeoutExpired as error:
            tally.add(name, HANG, str(error))
        else:
            tally.add(name, WORKS)
    return tally


def _kill(rng: random.Random, line: list[str], output: Path, workers: int, seconds: float) -> str:
    """Start a training, and kill the tool or one of its workers; returns when, and whom."""
    after, delay = rng.randrange(_CHECKPOINTS + 1), rng.random()
    of_worker = workers > 1 and rng.random() < 0.5
    mark = f"{os.getpid()}_{output}"
    while True:
        process = _start(line, mark)
        deadline = time.monotonic() + seconds
        while process.poll() is None and len(list(output.glob("model_*.pth"))) < after:
            if time.monotonic() > deadline:
                process.kill()
                raise subprocess.TimeoutExpired(line, seconds)
            time.sleep(0.005)
        # Before the first checkpoint are seconds, and some tenths are between two.
        time.sleep(delay * (4.0 if after == 0 else 0.3))
        if process.poll() is None:
            victim = _victim(rng, process.pid, of_worker)
            with contextlib.suppress(ProcessLookupError):  # a worker that has just ended
                os.kill(victim, signal.SIGKILL)
            break
        if process.returncode:
            raise WrongError(f"ended by itself: {process.communicate()[1][-2000:]}")
        if after == 0:
            raise WrongError("it was done before it could be killed")
        # It was done before.
        after -= 1
        for path in output.iterdir():
            if path.is_file():
                path.unlink()
    # The pipe is open as long as one of its processes is.
    try:
        process.communicate(timeout=_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    finally:
        left = _marked(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    if left:
        raise WrongError(f"processes that were left: {left}")
    whom = "the tool" if victim == process.pid else "a worker"
    return f", {whom} killed after checkpoint {after}"


def _victim(rng: random.Random, tool: int, of_worker: bool) -> int:
    """The tool, or one of its workers or of their loaders, if they have started."""
    with contextlib.suppress(psutil.Error):
        victims = [pid for pid in processes_below(tool)[1:] if of_worker and _works(pid)]
        return rng.choice(sorted(victims) or [tool])
    return tool


def _start(line: list[str], mark: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", _MARK: mark}
    return subprocess.Popen(
        [sys.executable, *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def _works(pid: int) -> bool:
    """Whether it is a worker or its loader, and not what Python starts beside."""
    try:
        process = psutil.Process(pid)
        beside = any("resource_tracker" in part for part in process.cmdline())
        return "LOCAL_RANK" in process.environ() and not beside
    except psutil.Error:
        return False


def _marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def _finish(line: list[str], seconds: float, here: bool) -> None:
    if here:
        with own_state():
            ended = run_tool("train_net", *line[1:])
        if ended.status:
            raise WrongError(f"status {ended.status}: {ended.error}")
        return
    ended = subprocess.run(
        [sys.executable, *line],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    if ended.returncode:
        raise WrongError(f"status {ended.returncode}: {ended.stderr[-3000:]}")


def _check_saved(output: Path) -> None:
    """What ``last_checkpoint`` names can be read, and so can all other checkpoints."""
    names = {path.name for path in output.glob("*.pth")}
    tag = output / "last_checkpoint"
    if tag.exists():
        names.add(tag.read_text())
    for name in names:
        try:
            check_intact(str(output / name))
            torch.load(output / name, weights_only=True)
        except Exception as error:
            raise WrongError(f"{name} is not whole: {error}") from error


def check_end(output: Path, whole: Path) -> None:
    found, expected = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (output, whole)
    )
    names = list(_different(found, expected))
    if names:
        raise WrongError(f"{len(names)} values with other bits: {names[:5]}")
    lines = (output / "metrics.json").read_text().splitlines()
    if max(json.loads(line)["iteration"] for line in lines) != 11:
        raise WrongError("the last iteration is not in metrics.json")


def _different(one: Any, other: Any, name: str = "") -> Any:
    """The names of what is not the same, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from _different(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield name
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _different(*pair, f"{name}.{number}")
    elif one != other:
        yield name
