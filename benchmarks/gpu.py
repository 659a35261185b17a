"""Everything that needs a GPU, in one command of at most nine minutes on one card.

Five parts, in this order; one that fails is reported, and the next goes on:

    a  tests/test_cuda.py
    b  the layer alone: each partition, with torch's and Triton's kernels, against nn.BatchNorm2d
       and against the time that the memory needs
    c  the box and the mask head of one worker of eight at COCO's shape, each NORM against BN
    d  an iteration of Mask R-CNN, R50-FPN at 800 px, with and without mixed precision
    e  the leak of R50-FPN on LeakyShapes: 16 virtual workers of one image, BN and ShuffleBN

In b and c this process is worker 0 of eight in torch's fake process group. What the others would
send is what this worker sends, and arrives at once: so all is measured but the wire, also of
SyncBN, which in one process alone would be nn.BatchNorm2d.

    python benchmarks/gpu.py                  writes benchmarks/results/gpu_<card>.json
    python benchmarks/gpu.py --parts a b      these parts alone
    python benchmarks/gpu.py --quick          tiny sizes, also on a CPU; writes no file
    python benchmarks/gpu.py --markdown FILE  the tables of an earlier run
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from counters import LiveBytes, peak_of_activations
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from norm import Step, machine
from probe import config
from report import gpu_part, gpu_tables
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bn_detection import BNOptions
from bn_detection.data import LeakyShapesConfig, make_leaky_shapes
from bn_detection.engine import Trainer
from bn_detection.heads import BNConvFCHead, BNConvUpsampleHead, NormFactory
from bn_detection.leakage import measure_leakage
from bn_detection.norm import INFERENCE, collectives, set_inference

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

WORKERS = 8
#: Of the tests, those of whole heads, detectors and trainings.
WHOLE = "detector or training or of_the_cpu"
BASELINE = "nn.BatchNorm2d"
Results = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Attributes:
        quick: whether the numbers mean nothing, and take what time they need.
        device: ``cuda`` or ``cpu``.
        tests: pytest's ``-k``, of processes that run at once.
        shapes: of the layer's inputs.
        dtypes: likewise.
        heads: RoIs and their side, by head.
        channels: of the heads.
        fc_dim: of the box head.
        ghost_size: rows in a group of GhostBN.
        rounds: samples of each variant, at most.
        steps: in a row in each sample.
        detectors: the folder of the configs of d and e.
        large: the images of d.
        iterations: timed, of each detector in d.
        virtual_workers: of one image each, in d and e.
        virtual_iterations: timed with them in d.
        precision: of mixed precision.
        small: the images of e.
        train_images: of e.
        test_images: of e.
        probe_iterations: of e, to tell the speed from.
        evaluation_seconds: of both evaluations of e, at once; the trainings have the rest.
        most_iterations: of each training of e.
        overrides: of the configs of e.
        loaders: processes that load images.
    """

    quick: bool
    device: str
    tests: tuple[str, ...]
    shapes: tuple[tuple[int, int, int, int], ...]
    dtypes: tuple[str, ...]
    heads: dict[str, tuple[int, int]]
    channels: int
    fc_dim: int
    ghost_size: int
    rounds: int
    steps: int
    detectors: str
    large: LeakyShapesConfig
    iterations: int
    virtual_workers: int
    virtual_iterations: int
    precision: str
    small: LeakyShapesConfig
    train_images: int
    test_images: int
    probe_iterations: int
    evaluation_seconds: float
    most_iterations: int
    overrides: tuple[object, ...] = ()
    loaders: int = 0

    @property
    def kernels(self) -> tuple[str, ...]:
        """That the device has."""
        return ("torch", "triton") if self.device == "cuda" else ("torch",)


def full_plan(device: str) -> Plan:
    """The sizes of the published results."""
    return Plan(
        quick=False,
        device=device,
        tests=(
            "compiled",
            "triton and float32",
            "triton and not float32",
            "not triton and not compiled and partition",
            f"not triton and not compiled and not partition and ({WHOLE})",
            f"not triton and not compiled and not partition and not ({WHOLE})",
        ),
        shapes=((4096, 256, 7, 7), (1024, 256, 14, 14)),
        dtypes=("float32", "bfloat16"),
        heads={"box": (1024, 7), "mask": (256, 14)},
        channels=256,
        fc_dim=1024,
        ghost_size=32,
        rounds=15,
        steps=5,
        detectors="",
        large=LeakyShapesConfig(
            image_size=800,
            objects_per_image=(6, 20),
            object_size=(48, 128),
            texture_period=30.0,
        ),
        iterations=60,
        virtual_workers=16,
        virtual_iterations=8,
        precision="float16",
        small=LeakyShapesConfig(image_size=256, object_size=(44, 66), gap=8, texture_period=16.0),
        train_images=1500,
        test_images=100,
        probe_iterations=20,
        evaluation_seconds=120.0,
        most_iterations=5000,
        # Random weights need a normalization in the backbone; GN knows of no other image.
        overrides=(
            *("MODEL.MASK_ON", False, "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN"),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5),
            *("INPUT.MIN_SIZE_TRAIN", (256,), "INPUT.MIN_SIZE_TEST", 256),
            *("INPUT.RANDOM_FLIP", "none"),
        ),
        loaders=min(6, os.cpu_count() or 1),
    )


def quick_plan(device: str) -> Plan:
    """Sizes of seconds: every part, and nothing to learn from the numbers."""
    return Plan(
        quick=True,
        device=device,
        tests=("partition and rois and float32 or far_from_zero or recalibrat",),
        shapes=((16, 8, 7, 7), (4, 8, 14, 14)),
        dtypes=("float32", "bfloat16"),
        heads={"box": (16, 7), "mask": (8, 14)},
        channels=32,
        fc_dim=16,
        ghost_size=4,
        rounds=2,
        steps=1,
        detectors="quickstart/",
        large=LeakyShapesConfig(),
        iterations=2,
        virtual_workers=4,
        virtual_iterations=1,
        # A CPU without instructions for float16 takes seconds an iteration.
        precision="float16" if device == "cuda" else "bfloat16",
        small=LeakyShapesConfig(),
        train_images=8,
        test_images=4,
        probe_iterations=1,
        evaluation_seconds=0.0,
        most_iterations=3,
    )


class Deadline:
    """Of a part, or of a share of it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; negative once it has passed."""
        return self._end - time.monotonic()


# ---------------------------------------------------------------------------------------------
# a: correctness
# ---------------------------------------------------------------------------------------------


def correctness(plan: Plan, results: Results, deadline: Deadline) -> None:
    """Run the tests in processes of their own, and count how they end."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["BN_DETECTION_TEST_DEVICE"] = plan.device
    results.update(passed=0, failed=0, skipped=0, failures={}, incomplete={})
    with tempfile.TemporaryDirectory() as folder:
        reports, logs, processes = [], [], []
        for number, expression in enumerate(plan.tests):
            reports.append(Path(folder, f"{number}.xml"))
            logs.append(Path(folder, f"{number}.log"))
            command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-k", expression]
            command += ["-p", "no:cacheprovider", f"--junitxml={reports[-1]}"]
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        try:
            late = await_all(processes, deadline)
        finally:
            for process in processes:
                process.kill()
        for expression, process, report, log in zip(
            plan.tests, processes, reports, logs, strict=True
        ):
            if report.exists():
                _count(report, results)
            if process in late:
                results["incomplete"][expression] = "did not end in time"
            elif process.returncode not in (0, 1):  # 1: tests failed
                results["incomplete"][expression] = f"ended with {process.returncode}"
            if process.returncode != 0:
                progress(f"pytest -k '{expression}' ended with {process.returncode}:")
                print(log.read_text()[-6000:], file=sys.stderr)
    if results["failed"] or results["incomplete"]:
        raise RuntimeError(
            f"{results['failed']} tests failed, {results['passed']} passed, and "
            f"{len(results['incomplete'])} of {len(plan.tests)} processes did not finish theirs."
        )


def await_all(
    processes: list[subprocess.Popen[Any]], deadline: Deadline
) -> list[subprocess.Popen[Any]]:
    """Wait for processes, and interrupt those that are late: pytest reports what it has then.

    Returns:
        Those that were late; all have ended.
    """
    late = [process for process in processes if not _ends(process, deadline)]
    for process in late:
        process.send_signal(signal.SIGINT)
    patience = Deadline(8)
    for process in late:
        if not _ends(process, patience):
            process.kill()
            process.wait()
    return late


def _ends(process: subprocess.Popen[Any], deadline: Deadline) -> bool:
    try:
        process.wait(max(deadline.left(), 0))
    except subprocess.TimeoutExpired:
        return False
    return True


def _count(path: Path, results: Results) -> None:
    """Add what a report of pytest says."""
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            results["failed"] += 1
            message = without_folders(wrong[0].get("message", ""))
            results["failures"][case.get("name")] = message[:300]
        else:
            results["skipped" if case.find("skipped") is not None else "passed"] += 1


# ---------------------------------------------------------------------------------------------
# What b and c share
# ---------------------------------------------------------------------------------------------


class _Done:
    """The work of a collective that has ended."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> bool:
        return True


@contextmanager
def one_of(workers: int) -> Iterator[None]:
    """Make this process worker 0 of several that have the rows that it has.

    torch's fake process group leaves a message as it is. Here it is summed over, or gathered from,
    workers that all send the same.
    """

    def all_reduce(tensor: Tensor, *_: Any, async_op: bool = False, **__: Any) -> _Done | None:
        tensor.mul_(workers)
        return _Done() if async_op else None

    def all_gather(gathered: list[Tensor], tensor: Tensor, **_: Any) -> _Done:
        for received in gathered:
            received.copy_(tensor)
        return _Done()

    def all_gather_single(gathered: Tensor, tensor: Tensor, *_: Any, **__: Any) -> None:
        gathered.view(workers, *tensor.shape).copy_(tensor)

    def all_to_all_single(received: Tensor, tensor: Tensor, *_: Any, **__: Any) -> _Done:
        received.copy_(tensor)  # all workers have as many rows
        return _Done()

    dist.init_process_group("fake", rank=0, world_size=workers, store=FakeStore())
    try:
        with (
            mock.patch.object(dist, "all_reduce", all_reduce),
            mock.patch.object(dist, "all_gather", all_gather),
            # Of nn.SyncBatchNorm, by its name in this torch and in earlier ones.
            mock.patch.object(dist, "all_gather_single", all_gather_single, create=True),
            mock.patch.object(dist, "all_gather_into_tensor", all_gather_single),
            mock.patch.object(dist, "all_to_all_single", all_to_all_single),
            # gloo cannot be faked.
            mock.patch.object(collectives, "_cpu_group", lambda: dist.group.WORLD),
        ):
            yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Sample:
    """Of a few steps in a row.

    Attributes:
        seconds: of the device, for a step.
        host_seconds: that the host takes to launch it.
    """

    seconds: float
    host_seconds: float


def sample(step: Callable[[], Any], plan: Plan, before: Callable[[], Any] = lambda: None) -> Sample:
    """Time some steps.

    Args:
        step: what is timed.
        plan: the device, and how many steps.
        before: is launched before, so that the device has something to do meanwhile.
    """
    if plan.device == "cpu":
        start_time = time.perf_counter()
        step()
        seconds = time.perf_counter() - start_time
        return Sample(seconds, seconds)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before()
    start.record()
    start_time = time.perf_counter()
    for _ in range(plan.steps):
        step()
    host_seconds = (time.perf_counter() - start_time) / plan.steps
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) / 1e3 / plan.steps, host_seconds)


def compare(
    steps: dict[str, Callable[[], Any]],
    bases: dict[str, str],
    plan: Plan,
    deadline: Deadline,
    before: dict[str, Callable[[], Any]],
) -> dict[str, Results]:
    """Time variants in turns, in another order each round; ratios are medians over the rounds.

    Args:
        steps: by variant.
        bases: of each variant, the one that it is compared with.
        plan: how many rounds, at most.
        deadline: after which no round begins, but for the first two.
        before: of each variant, as for :func:`sample`.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    order = torch.Generator().manual_seed(0)
    names = list(steps)
    for number in range(plan.rounds):
        if number >= 2 and deadline.left() < 0:
            break
        for index in torch.randperm(len(names), generator=order).tolist():
            name = names[index]
            samples[name].append(sample(steps[name], plan, before[name]))
    return {
        name: {
            "seconds": statistics.median(s.seconds for s in mine),
            "host_seconds": statistics.median(s.host_seconds for s in mine),
            "ratio": statistics.median(
                s.seconds / base.seconds for s, base in zip(mine, samples[bases[name]], strict=True)
            ),
            "rounds": len(mine),
        }
        for name, mine in samples.items()
    }


def measure(
    modules: dict[str, nn.Module],
    inputs: dict[str, Tensor],
    bases: dict[str, str],
    rows_per_image: list[int],
    plan: Plan,
    deadline: Deadline,
    *,
    copy: tuple[Callable[[], Any], float] | None = None,
) -> dict[str, Results]:
    """Time, memory and waits of the training steps of modules.

    Args:
        modules: by variant.
        inputs: likewise.
        bases: as for :func:`compare`.
        rows_per_image: of the inputs.
        plan: the sizes.
        deadline: as there.
        copy: something for the device to do while the host launches a sample, and its seconds: so
            that the time is the device's, however fast the host is.
    """
    results: dict[str, Results] = {}
    steps, before = {}, {}
    for name, module in modules.items():
        x = inputs[name]
        step = steps[name] = Step(module, x, rows_per_image)
        step()  # compiles
        peak = peak_of_activations(step, module, [x, step.grad])
        launching = plan.steps * sample(step, plan).host_seconds
        copies = math.ceil(1.5 * launching / copy[1]) if copy else 0
        before[name] = _times(copies, copy[0] if copy else step)
        sample(step, plan, before[name])  # pinned memory for as many steps as are launched at once
        results[name] = {"peak_bytes": peak, "waits": waits(step, plan.device)}
    for name, times in compare(steps, bases, plan, deadline, before).items():
        memory = results[name]["peak_bytes"] / results[bases[name]]["peak_bytes"]
        results[name] |= {**times, "memory_ratio": memory}
    return results


def _times(number: int, call: Callable[[], Any]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(number):
            call()

    return calls


def waits(step: Callable[[], Any], device: str) -> int | None:
    """How often the host waits for the GPU in a step; None on a CPU."""
    if device == "cpu":
        step()
        return None
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def rows_per_image(rows: int, images: int) -> list[int]:
    """As equal as they can be."""
    bounds = [rows * i // images for i in range(images + 1)]
    return [end - start for start, end in itertools.pairwise(bounds)]


# ---------------------------------------------------------------------------------------------
# b: the layer alone
# ---------------------------------------------------------------------------------------------

LAYERS = {
    "world": "SyncBN",
    "shuffle": "ShuffleBN",
    "ghost": "GhostBN",
    "image": "ImageBN",
    "batch renorm": "BatchRenorm",
}
LAST = " (channels last)"


def layer_alone(plan: Plan, results: Results, deadline: Deadline) -> None:
    """Each partition as one worker of eight has it, against nn.BatchNorm2d and the memory."""
    cases = list(itertools.product(plan.shapes, plan.dtypes))
    for number, (shape, dtype) in enumerate(cases):
        share = Deadline(deadline.left() / (len(cases) - number))
        title = f"{list(shape)} {dtype}"
        progress(f"layer, {title}")
        x = torch.randn(shape, device=plan.device).to(getattr(torch, dtype))
        with one_of(WORKERS):
            results[title] = _layers_on(x, plan, share)


def _layers_on(x: Tensor, plan: Plan, deadline: Deadline) -> Results:
    modules = {name: module.to(plan.device) for name, module in _layers(x.shape[1], plan).items()}
    copied = torch.empty_like(x)

    def copy() -> None:
        copied.copy_(x)

    copy()
    copy_seconds = statistics.median(sample(copy, plan).seconds for _ in range(5))
    bandwidth = 2 * x.nbytes / copy_seconds
    # Forward: two reads and a write. Backward: x and the gradient twice, and a write.
    floor = 8 * x.nbytes / bandwidth
    rows, last = (
        x.clone(memory_format=memory_format).requires_grad_()
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    variants = measure(
        modules,
        {name: last if name.endswith(LAST) else rows for name in modules},
        {name: BASELINE + (LAST if name.endswith(LAST) else "") for name in modules},
        rows_per_image(len(x), WORKERS),
        plan,
        deadline,
        copy=(copy, copy_seconds) if plan.device == "cuda" else None,
    )
    for result in variants.values():
        result["times_the_floor"] = result["seconds"] / floor
    return {"bytes_per_second": bandwidth, "floor_seconds": floor, "variants": variants}


def _layers(channels: int, plan: Plan) -> dict[str, nn.Module]:
    """By variant: partition, kernels, and memory format if it is not the usual one."""

    def make(norm: str, kernels: str) -> nn.Module:
        options = BNOptions(ghost_size=plan.ghost_size, shuffle_seed=0, kernels=kernels)
        return NormFactory(norm, options)(channels)

    # On one worker, BN is torch's in one call, whatever the kernels.
    modules = {BASELINE: nn.BatchNorm2d(channels), "worker": make("BN", "auto")}
    for (name, norm), kernels in itertools.product(LAYERS.items(), plan.kernels):
        modules[f"{name}, {kernels}"] = make(norm, kernels)
    modules[BASELINE + LAST] = nn.BatchNorm2d(channels)
    for kernels in plan.kernels:
        modules[f"shuffle, {kernels}{LAST}"] = make("ShuffleBN", kernels)
    return modules


# ---------------------------------------------------------------------------------------------
# c: the heads of one worker of eight
# ---------------------------------------------------------------------------------------------

#: NORM, options.
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "BN": ("BN", {}),
    "SyncBN": ("SyncBN", {}),
    "ShuffleBN": ("ShuffleBN", {}),
    "ShuffleBN, torch": ("ShuffleBN", {"kernels": "torch"}),
    "ShuffleBN, features": ("ShuffleBN", {"shuffle_mode": "features"}),
    "GhostBN": ("GhostBN", {}),
    "ImageBN": ("ImageBN", {}),
    "BatchRenorm": ("BatchRenorm", {}),
    "IN": ("IN", {}),
    "GN": ("GN", {}),
    "LN": ("LN", {}),
    "FrozenBN": ("FrozenBN", {}),
}
STOCK_SYNC = "nn.SyncBatchNorm"


def heads(plan: Plan, results: Results, deadline: Deadline) -> None:
    """Forward and backward of box and mask head, with every NORM; two images."""
    for number, (kind, (rois, side)) in enumerate(plan.heads.items()):
        share = Deadline(deadline.left() / (len(plan.heads) - number))
        title = f"{kind} head, {rois} RoIs of {plan.channels} x {side} x {side}"
        progress(title)
        modules = _heads(kind, side, plan)
        x = torch.randn(rois, plan.channels, side, side, device=plan.device, requires_grad=True)
        with one_of(WORKERS):
            results[title] = measure(
                modules,
                dict.fromkeys(modules, x),
                dict.fromkeys(modules, BASELINE),
                rows_per_image(rois, 2),
                plan,
                share,
            )


def _heads(kind: str, side: int, plan: Plan) -> dict[str, nn.Module]:
    channels = plan.channels
    if kind == "box":
        ours, stock = BNConvFCHead, FastRCNNConvFCHead
        arguments = {"conv_dims": [channels] * 4, "fc_dims": [plan.fc_dim]}
    else:
        ours, stock = BNConvUpsampleHead, MaskRCNNConvUpsampleHead
        arguments = {"conv_dims": [channels] * 5, "num_classes": 80}
    shape = ShapeSpec(channels=channels, height=side, width=side)
    made = {BASELINE: stock(shape, conv_norm="BN", **arguments)}
    if plan.device == "cuda":  # it refuses a CPU's tensors
        made[STOCK_SYNC] = stock(shape, conv_norm="SyncBN", **arguments)
    for name, (norm, options) in NORMS.items():
        options = BNOptions(shuffle_seed=0, ghost_size=plan.ghost_size, **options)
        made[name] = ours(shape, conv_norm=norm, bn_options=options, **arguments)
    for head in made.values():
        # A mask head's forward ends with a loss or with masks.
        head.forward = getattr(head, "layers", head.forward)
        head.to(plan.device)
    return made


# ---------------------------------------------------------------------------------------------
# d: an iteration of a detector
# ---------------------------------------------------------------------------------------------

#: As on each of the eight workers of the configs.
IMAGES_OF_A_WORKER = 2
WARM_UP = 2


class Detector:
    """A trainer whose images are in memory, one iteration at a time."""

    def __init__(self, cfg: CfgNode, batches: list[Any]) -> None:
        in_memory = staticmethod(lambda _: itertools.cycle(batches))
        with mock.patch.object(Trainer, "build_train_loader", in_memory):
            self.trainer = Trainer(cfg)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        self.trainer.iter = len(self.seconds)
        with EventStorage() as self.trainer.storage:
            synchronize(self.trainer.cfg.MODEL.DEVICE)
            start = time.perf_counter()
            self.trainer.run_step()
            synchronize(self.trainer.cfg.MODEL.DEVICE)
            self.seconds.append(time.perf_counter() - start)

    def kept(self) -> list[Tensor]:
        """What it holds from one iteration to the next."""
        model, optimizer = self.trainer.model, self.trainer._trainer.optimizer
        parameters = list(model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = optimizer.state.values()
        momenta = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [*parameters, *model.buffers(), *gradients, *momenta]

    def peak(self) -> int:
        """The most bytes alive in an iteration, of this detector."""
        if self.trainer.cfg.MODEL.DEVICE == "cpu":
            with LiveBytes(self.kept()) as live:
                self()
            return live.peak(without=[])
        kept = sum(tensor.nbytes for tensor in self.kept())
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated() - before + kept


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def detectors(plan: Plan, results: Results, deadline: Deadline) -> None:
    """Seconds and memory of an iteration, the images in memory, in turns."""
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", plan.precision)
    virtual = ("BN.VIRTUAL_WORKERS", plan.virtual_workers)
    real = ("bn", "shuffle", "syncbn")
    cases = {
        IMAGES_OF_A_WORKER: (real, {"float32": (), plan.precision: amp}, plan.iterations, 0.65),
        plan.virtual_workers: (real[:2], {"float32": virtual}, plan.virtual_iterations, 1.0),
    }
    with tempfile.TemporaryDirectory() as folder:
        make_leaky_shapes(f"{folder}/large", plan.virtual_workers * 2, 0, plan.large, split="large")
        for images, (norms, choices, iterations, share) in cases.items():
            title = f"{images} images"
            title += " of as many virtual workers" if images == plan.virtual_workers else ""
            progress(f"detectors, {title}")
            configs = {
                f"{norm}, {precision}": _large_config(plan, folder, norm, images, *overrides)
                for precision, overrides in choices.items()
                for norm in norms
            }
            until = Deadline(share * deadline.left())
            results[title] = _time_detectors(configs, plan, images, iterations, until)
            release(plan.device)


def release(device: str) -> None:
    """Give back the memory of models that are not used any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _large_config(plan: Plan, folder: str, norm: str, images: int, *overrides: object) -> CfgNode:
    return config(
        f"{plan.detectors}mask_rcnn_{norm}.yaml",
        *of_datasets(folder, "large"),
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", plan.device, "OUTPUT_DIR", folder),
        *("MODEL.ROI_HEADS.NUM_CLASSES", plan.large.num_classes, "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.MIN_SIZE_TRAIN", (plan.large.image_size,), "SOLVER.IMS_PER_BATCH", images),
        # Random weights and nothing that normalizes them: activations and steps are to stay small.
        *("MODEL.PIXEL_STD", [58.0] * 3, "SOLVER.BASE_LR", 1e-4),
        *overrides,
    )


def of_datasets(folder: str, *splits: str) -> tuple[object, ...]:
    """Overrides that train on the first of the splits in a folder, and know the others."""
    names = [f"{Path(folder).name}_{split}" for split in splits]
    datasets = [
        [name, f"{folder}/{split}/annotations.json", f"{folder}/{split}/images"]
        for name, split in zip(names, splits, strict=True)
    ]
    return (
        *("DATASETS.COCO_JSON", datasets),
        *("DATASETS.TRAIN", (names[0],), "DATASETS.TEST", ()),
    )


def _time_detectors(
    configs: dict[str, CfgNode], plan: Plan, images: int, iterations: int, deadline: Deadline
) -> Results:
    loader = iter(Trainer.build_train_loader(next(iter(configs.values()))))
    start = time.perf_counter()
    batches = [next(loader) for _ in range(2 * plan.virtual_workers // images)]
    loading_seconds = (time.perf_counter() - start) / len(batches)
    seed_all_rng(0)
    made = {name: Detector(cfg, batches) for name, cfg in configs.items()}
    for detector in made.values():
        for _ in range(WARM_UP):
            detector()
    peaks = {name: detector.peak() for name, detector in made.items()}
    for detector in made.values():
        detector.seconds.clear()
    for number in range(iterations):
        if number > 0 and deadline.left() < 0:
            break
        for detector in made.values():
            detector()
    bases = {name: made["bn, " + name.partition(", ")[2]].seconds for name in made}
    return {
        "loading_seconds": loading_seconds,
        "variants": {
            name: {
                "seconds": statistics.median(detector.seconds),
                "ratio": statistics.median(
                    mine / base for mine, base in zip(detector.seconds, bases[name], strict=True)
                ),
                "peak_bytes": peaks[name],
                "iterations": len(detector.seconds),
            }
            for name, detector in made.items()
        },
    }


# ---------------------------------------------------------------------------------------------
# e: the leak
# ---------------------------------------------------------------------------------------------


LEAK_NORMS = ("bn", "shuffle")


def leak(plan: Plan, results: Results, deadline: Deadline) -> None:
    """Train with BN and with ShuffleBN; evaluate with both statistics; measure the leak.

    Both at once: a process waits for its launches, and leaves most of the GPU idle.
    """
    with tempfile.TemporaryDirectory() as folder, processes(len(LEAK_NORMS)) as pool:
        for split, number in (("train", plan.train_images), ("val", plan.test_images)):
            make_leaky_shapes(f"{folder}/{split}", number, 0, plan.small, split=split)
        progress("leak, the speed of a few iterations")
        speed = max(pool.map(partial(_speed, plan, folder), LEAK_NORMS))
        fit = int(0.95 * (deadline.left() - plan.evaluation_seconds) / speed)
        iterations = min(max(fit, 2), plan.most_iterations)  # one before its step size falls
        progress(f"leak, {' and '.join(LEAK_NORMS)}: {iterations} iterations")
        all_found = pool.map(partial(_leak_of, plan, folder, iterations), LEAK_NORMS)
        results.update(zip(LEAK_NORMS, all_found, strict=True))


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """New ones, which are killed where an error, such as the end of the time, leaves this."""
    quiet = {"initializer": logging.disable, "initargs": (logging.INFO,)}
    others = {process.pid for process in active_children()}
    with ProcessPoolExecutor(number, get_context("spawn"), **quiet) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                if process.pid not in others:
                    process.kill()
            raise


def _leak_of(plan: Plan, folder: str, iterations: int, norm: str) -> Results:
    cfg = _leak_config(plan, folder, norm, iterations)
    start = time.perf_counter()
    model = _trained(cfg)
    synchronize(plan.device)
    seconds = (time.perf_counter() - start) / iterations
    return {"iterations": iterations, "seconds": seconds, **_evaluate(cfg, model)}


def _leak_config(plan: Plan, folder: str, norm: str, iterations: int) -> CfgNode:
    return config(
        f"{plan.detectors}mask_rcnn_{norm}.yaml",
        *of_datasets(folder, "train", "val"),
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", plan.device, "OUTPUT_DIR", f"{folder}/{norm}"),
        *("MODEL.PIXEL_MEAN", [110.0] * 3, "MODEL.PIXEL_STD", [50.0] * 3),
        *("MODEL.ROI_HEADS.NUM_CLASSES", plan.small.num_classes),
        *("SOLVER.IMS_PER_BATCH", plan.virtual_workers),
        *("BN.VIRTUAL_WORKERS", plan.virtual_workers, "BN.VIRTUAL_LOSSES", True),
        *("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (int(0.8 * iterations),)),
        *("SOLVER.BASE_LR", 0.02, "SOLVER.WARMUP_ITERS", max(min(100, iterations // 5), 1)),
        *("DATALOADER.NUM_WORKERS", plan.loaders),
        *plan.overrides,
    )


def _speed(plan: Plan, folder: str, norm: str) -> float:
    """Seconds of an iteration, the loading of its images included."""
    trainer = Trainer(_leak_config(plan, folder, norm, plan.most_iterations))
    with EventStorage() as trainer.storage:
        for number in range(WARM_UP + plan.probe_iterations):
            if number == WARM_UP:
                synchronize(plan.device)
                start = time.perf_counter()
            trainer.iter = number
            trainer.run_step()
        synchronize(plan.device)
    return (time.perf_counter() - start) / plan.probe_iterations


def _trained(cfg: CfgNode) -> nn.Module:
    seed_all_rng(1)
    trainer = Trainer(cfg)
    trainer.train()
    return trainer.model


def _evaluate(cfg: CfgNode, model: nn.Module) -> Results:
    cfg = cfg.clone()
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_JSON[1][0],)
    found: Results = {"box_ap": {}}
    with contextlib.redirect_stdout(sys.stderr):
        for mode in INFERENCE:
            set_inference(model, mode, cfg.BN.MODULES)
            found["box_ap"][mode] = Trainer.test(cfg, model)["bbox"]["AP"]
        set_inference(model, "population", cfg.BN.MODULES)
        report = measure_leakage(cfg, model)
    for kind in ("leakage", "inconsistency"):
        estimates = getattr(report, kind)
        found[kind] = {name: estimates[name].to_json() for name in ("accuracy", "box_ap")}
    return found


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        title: in words.
        seconds: that it may take.
        run: fills the results, which are kept as far as it comes.
    """

    title: str
    seconds: float
    run: Callable[[Plan, Results, Deadline], None]


PARTS = {
    "a": Part("Correctness", 110, correctness),
    "b": Part("The layer alone", 50, layer_alone),
    "c": Part("The heads of one worker of eight", 40, heads),
    "d": Part("An iteration of Mask R-CNN", 70, detectors),
    "e": Part("The leak", 400, leak),
}
#: Of all parts, with some seconds of nine minutes left to start and to end. So the last part has
#: at least 250.
ALL_SECONDS = 520
#: A part plans to end that much before it is stopped.
MARGIN = 12


def run(
    plan: Plan, names: Iterable[str], save: Callable[[Results], None] = lambda _: None
) -> Results:
    """Measure parts, one after the other.

    Args:
        plan: the sizes.
        names: of :data:`PARTS`.
        save: called with all results after each part.

    Returns:
        All results; a part that failed has an ``error`` beside those that it came to.
    """
    document: Results = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(plan.device),
        "quick": plan.quick,
        "parts": {},
    }
    everything = Deadline(ALL_SECONDS)
    measure_part = run_part
    for name in names:
        limit = max(everything.left(), 1)
        if not plan.quick:
            limit = min(PARTS[name].seconds, limit)
        progress(f"{name}. {PARTS[name].title}")
        entry = document["parts"][name] = measure_part(name, plan, limit)
        save(document)
        print(gpu_part(name, entry), file=sys.stderr, flush=True)
        if not is_usable(plan.device):
            progress("this process cannot use the GPU any more; the next parts get others")
            measure_part = run_in_new_process
    return document


def run_part(name: str, plan: Plan, limit: float) -> Results:
    """The results of a part, as far as it comes in ``limit`` seconds, and the error if it fails."""
    entry: Results = {"title": PARTS[name].title, "results": {}}
    start = time.perf_counter()
    try:
        with time_limit(limit):
            PARTS[name].run(plan, entry["results"], Deadline(limit - MARGIN))
    except Exception:
        traceback.print_exc()
        entry["error"] = without_folders(traceback.format_exc())
    entry["seconds"] = time.perf_counter() - start
    return entry


def run_in_new_process(name: str, plan: Plan, limit: float) -> Results:
    """As :func:`run_part`: a kernel's access to wrong memory costs a process its GPU."""
    start = time.perf_counter()
    with processes(1) as pool:
        try:
            return pool.submit(run_part, name, plan, limit).result()
        except BrokenProcessPool:
            traceback.print_exc()
            error = without_folders(traceback.format_exc())
    seconds = time.perf_counter() - start
    return {"title": PARTS[name].title, "results": {}, "error": error, "seconds": seconds}


def is_usable(device: str) -> bool:
    """Whether this process can go on with the device; what is not used any more is released."""
    try:
        release(device)
        synchronize(device)
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def _machine(device: str) -> Results:
    facts = machine(device)
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        facts |= {
            "gpu_memory_gib": round(memory / 2**30),
            "cuda": torch.version.cuda,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return facts


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the main thread once the time is over."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def without_folders(text: str) -> str:
    """Paths below this checkout as they are there, and of others the file names alone."""
    text = text.replace(f"{ROOT}/", "")
    return re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+", "", text)


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line; refuses what cannot be done before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes; no file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu with --quick alone")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="an existing file")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print tables")
    args = parser.parse_args()
    if args.markdown:
        return args
    has_gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    if args.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch finds no GPU")
    if args.device == "cpu" and not args.quick:
        parser.error("there is no GPU to measure; --quick runs everything with tiny sizes on a CPU")
    if args.output is None and not args.quick:
        card = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
        args.output = RESULTS / f"gpu_{card}.json"
    if args.output and args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists: choose another --output, or --overwrite it")
    return args


def main() -> int:
    """The exit status: 1 where a part failed."""
    args = parse_arguments()
    if args.markdown:
        print(gpu_tables(json.loads(args.markdown.read_text())))
        return 0
    logging.disable(logging.INFO)

    def save(document: Results) -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(document, indent=1) + "\n")

    plan = (quick_plan if args.quick else full_plan)(args.device)
    # In the order of the parts, whatever that of the arguments.
    document = run(plan, [name for name in PARTS if name in args.parts], save)
    print(gpu_tables(document))
    return int(any("error" in part for part in document["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
