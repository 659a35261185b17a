"""What population statistics cost, and how exact they are, against fvcore's function.

Trains the quickstart's Mask R-CNN with BN for a short time, and estimates its population statistics
with each estimator on the same images, RoIs and model, in one process of one thread. The images are
in memory: the forward passes are timed, not the loading. fvcore's ``update_bn_stats`` and
``collect_statistics`` run in turns; a ratio is the median over the rounds.

    python benchmarks/population.py --quick            prints the tables, in about four minutes
    python benchmarks/population.py                    writes benchmarks/results/population/cpu.json
                                                       and docs/images/population_error.png as well
    python benchmarks/population.py --markdown FILE    the tables of an earlier run
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from counters import LiveBytes
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from norm import RESULTS, machine
from population_report import draw, markdown
from report import replace_tables
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bn_detection.config import ConfigError
from bn_detection.engine import Trainer, launch, load_config
from bn_detection.engine.setup import register_datasets
from bn_detection.population import (
    ESTIMATORS,
    batch_norms_in_training,
    collect_statistics,
)

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart" / "mask_rcnn_bn.yaml"
FIGURE = ROOT / "docs" / "images" / "population_error.png"
BATCH_SIZE = 2
_MOST_IMAGES = 40_000  # for a tolerance
FVCORE = "fvcore"
EVERYWHERE: tuple[str, ...] = ()
BOX_HEAD_ALONE = ("MODEL.ROI_MASK_HEAD.NORM", "")
#: Where there is BN, and the overrides of the config for it.
CASES = {
    "box and mask head": EVERYWHERE,
    "box head; no mask head": (*BOX_HEAD_ALONE, "MODEL.MASK_ON", "False"),
    "box head; mask head without BN": BOX_HEAD_ALONE,
}
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "all_to_all_single")

Batches = Sequence[list[dict[str, Any]]]
Statistics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        iterations: of the training.
        rounds: timed calls of each function.
        images: of a timed call.
        draws: how often an estimate is repeated, by the number of images that it uses.
        passes: over the training images, for the reference.
        tolerance: relative standard error at which to stop.
    """

    iterations: int
    rounds: int
    images: int
    draws: dict[int, int]
    passes: int
    tolerance: float


FULL = Plan(300, 11, 100, {10: 8, 30: 8, 100: 8, 300: 4, 1000: 2}, 3, 0.01)
QUICK = Plan(100, 5, 40, {10: 4, 30: 4, 100: 2}, 1, 0.05)


def run(plan: Plan, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, as ``--output`` has it.

    Args:
        plan: how much.
        overrides: ``KEY VALUE`` pairs for the config.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        overrides = [*overrides, "OUTPUT_DIR", folder, "SOLVER.IMS_PER_BATCH", str(BATCH_SIZE)]
        _progress(f"training, {plan.iterations} iterations")
        weights = _train(plan.iterations, overrides)
        images = load_images(overrides)
        times = {
            name: measure_times(build(overrides, weights, case), images, plan, name)
            for name, case in CASES.items()
        }
        model = build(overrides, weights)
        errors = measure_errors(model, images, plan)
        tolerance = measure_tolerance(model, images, plan.tolerance)
        _progress("two workers")
        one = statistics.median(_repeat(model, in_order(images, plan.images), plan.rounds))
        launch(_worker, 2, device="cpu", args=(overrides, plan, folder))
        two = json.loads(Path(folder, "workers.json").read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine("cpu"),
        "plan": asdict(plan),
        "times": times,
        "errors": errors,
        "tolerance": tolerance,
        "workers": {**two, "one_worker_seconds": one, "ratio": two["seconds"] / one},
    }


def _train(iterations: int, overrides: Sequence[str]) -> str:
    """The checkpoint's path."""
    schedule = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
    cfg = _config([*overrides, *schedule])
    Trainer(cfg).train()
    return f"{cfg.OUTPUT_DIR}/model_final.pth"


def _config(overrides: Sequence[str]) -> Any:
    cfg = load_config(argparse.Namespace(config_file=str(CONFIG), opts=list(overrides)))
    register_datasets(cfg)
    return cfg


def build(overrides: Sequence[str], weights: str, case: Sequence[str] = EVERYWHERE) -> nn.Module:
    """The model in training mode; layers that the weights lack keep their random ones."""
    model = Trainer.build_model(_config([*overrides, *case]))
    model.load_state_dict(torch.load(weights, weights_only=True)["model"], strict=False)
    return model.train()


def load_images(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The training images, as the model takes them."""
    cfg = _config(overrides)
    mapper = DatasetMapper(cfg, True)
    return [mapper(record) for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]


def in_order(images: list[dict[str, Any]], number: int) -> Batches:
    """Batches of the first images."""
    return [images[i : i + BATCH_SIZE] for i in range(0, min(number, len(images)), BATCH_SIZE)]


def at_random(images: list[dict[str, Any]], number: int, seed: int) -> Batches:
    """Batches of images drawn with replacement, as from a dataset without an end."""
    order = torch.randint(len(images), (number,), generator=torch.Generator().manual_seed(seed))
    drawn = [images[i] for i in order.tolist()]
    return [drawn[i : i + BATCH_SIZE] for i in range(0, number, BATCH_SIZE)]


def by_fvcore(model: nn.Module, batches: Batches) -> Statistics:
    """fvcore's estimate."""
    update_bn_stats(model, batches, len(batches))
    return running_statistics(model)


def by_us(model: nn.Module, batches: Batches, estimator: str = "pooled") -> Statistics:
    """This project's."""
    results = collect_statistics(model, batches, len(batches), estimator=estimator)
    return {name: (result.mean, result.var) for name, result in results.items()}


def running_statistics(model: nn.Module) -> Statistics:
    """Those that the layers have."""
    layers = batch_norms_in_training(model, ["*"])
    return {
        name: (layer.running_mean.double(), layer.running_var.double())
        for name, layer in layers.items()
    }


def measure_times(
    model: nn.Module, images: list[dict[str, Any]], plan: Plan, name: str
) -> dict[str, float]:
    """Seconds of each function in turns, and their peak memory."""
    batches = in_order(images, plan.images)
    functions = {FVCORE: by_fvcore, "here": by_us}
    seconds: dict[str, list[float]] = {function: [] for function in functions}
    for number in range(-1, plan.rounds):  # the first round warms up
        _progress(f"{name}: round {number + 1} of {plan.rounds}", end="\r")
        for function in list(functions)[:: 1 if number % 2 else -1]:
            seconds[function].append(_seconds(partial(functions[function], model, batches)))
    mine, fvcore = seconds["here"][1:], seconds[FVCORE][1:]
    peaks = {key: _peak_bytes(model, batches, function) for key, function in functions.items()}
    return {
        "images": BATCH_SIZE * len(batches),
        "fvcore_seconds": statistics.median(fvcore),
        "seconds": statistics.median(mine),
        "ratio": statistics.median(a / b for a, b in zip(mine, fvcore, strict=True)),
        "fvcore_peak_bytes": peaks[FVCORE],
        "peak_bytes": peaks["here"],
        "memory_ratio": peaks["here"] / peaks[FVCORE],
    }


def _seconds(call: Callable[[], Any]) -> float:
    torch.manual_seed(0)  # the same RoIs
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _repeat(model: nn.Module, batches: Batches, rounds: int) -> list[float]:
    """Seconds of this project's estimate, the first call left out."""

    def call() -> None:
        if dist.is_initialized():
            dist.barrier()
        by_us(model, batches)

    return [_seconds(call) for _ in range(rounds + 1)][1:]


def _peak_bytes(
    model: nn.Module, batches: Batches, function: Callable[[nn.Module, Batches], Any]
) -> int:
    """Most bytes alive at a time, without the model and the images."""
    persistent = [*model.parameters(), *model.buffers()]
    inputs = [leaf for leaf in tree_leaves(list(batches)) if isinstance(leaf, Tensor)]
    torch.manual_seed(0)
    with LiveBytes([*persistent, *inputs]) as live:
        function(model, batches)
    return live.peak(without=[*persistent, *inputs])


def measure_errors(model: nn.Module, images: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """Errors against the statistics of all images, by estimator and images used."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    reference = reference_statistics(model, images, plan.passes)
    found: dict[str, list[float]] = {name: [] for name in (*ESTIMATORS, FVCORE, "standard_error")}
    for number, repeats in plan.draws.items():
        squares: dict[str, list[float]] = {name: [] for name in found}
        for seed in range(repeats):
            _progress(f"errors: {number} images, {seed + 1} of {repeats}", end="\r")
            batches = at_random(images, number, seed)
            for estimator in ESTIMATORS:
                torch.manual_seed(seed)
                results = collect_statistics(model, batches, len(batches), estimator=estimator)
                estimate = {name: (r.mean, r.var) for name, r in results.items()}
                squares[estimator].append(relative_error(estimate, reference) ** 2)
                if estimator == "pooled":
                    error = max(result.relative_error for result in results.values())
                    squares["standard_error"].append(error**2)
            torch.manual_seed(seed)
            squares[FVCORE].append(relative_error(by_fvcore(model, batches), reference) ** 2)
        for name, values in squares.items():
            found[name].append(statistics.fmean(values) ** 0.5)
    model.load_state_dict(before, strict=False)
    ema = relative_error(running_statistics(model), reference)
    return {"images": list(plan.draws), "estimators": found, "ema_of_training": ema}


def reference_statistics(model: nn.Module, images: list[dict[str, Any]], passes: int) -> Statistics:
    """Mean and variance of all that enters each layer, in float64 (Chan et al. 1979)."""
    sums: dict[str, tuple[int, Tensor | float, Tensor | float]] = {}

    def see(name: str, inputs: tuple[Tensor]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        count, mean, deviations = sums.get(name, (0, 0.0, 0.0))
        total, shift = count + x.shape[1], x.mean(1) - mean
        deviations = deviations + x.var(1, correction=0) * x.shape[1]
        deviations = deviations + shift.square() * count * x.shape[1] / total
        sums[name] = total, mean + shift * x.shape[1] / total, deviations

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs))
        for name, layer in batch_norms_in_training(model, ["*"]).items()
    ]
    with torch.no_grad():
        for seed in range(passes):
            torch.manual_seed(100 + seed)
            order = torch.randperm(len(images)).tolist()
            for number, start in enumerate(range(0, len(images), BATCH_SIZE)):
                _progress(f"reference: pass {seed + 1}, batch {number}", end="\r")
                model([images[i] for i in order[start : start + BATCH_SIZE]])
    for hook in hooks:
        hook.remove()
    return {name: (mean, squares / (count - 1)) for name, (count, mean, squares) in sums.items()}


def relative_error(estimate: Statistics, reference: Statistics) -> float:
    """Of the worst layer: the larger root mean square, over channels, of the error of the mean over
    the standard deviation, and of the error of the variance over the variance.
    """
    worst = 0.0
    for name, (mean, var) in reference.items():
        of_mean = (estimate[name][0] - mean) / var.sqrt()
        of_var = (estimate[name][1] - var) / var
        worst = max(worst, *(float(e.square().mean().sqrt()) for e in (of_mean, of_var)))
    return worst


def measure_tolerance(
    model: nn.Module, images: list[dict[str, Any]], tolerance: float
) -> dict[str, float]:
    """Images and seconds until every layer is precise enough."""
    used = 0

    def counted(batches: Iterable[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        nonlocal used
        for batch in batches:
            used += len(batch)
            yield batch

    _progress(f"tolerance {tolerance}")
    batches = at_random(images, _MOST_IMAGES, seed=0)
    start = time.perf_counter()
    results = collect_statistics(model, counted(batches), len(batches), tolerance=tolerance)
    return {
        "tolerance": tolerance,
        "images": used,
        "seconds": time.perf_counter() - start,
        "standard_error": max(result.relative_error for result in results.values()),
    }


def _expect_small_samples() -> None:
    """No warning of each."""
    logging.getLogger("bn_detection.population").setLevel(logging.ERROR)


def _worker(overrides: Sequence[str], plan: Plan, folder: str) -> None:
    _expect_small_samples()
    torch.set_num_threads(1)
    model = build(overrides, f"{folder}/model_final.pth")
    batches = in_order(load_images(overrides), plan.images)[dist.get_rank() :: 2]
    with EventStorage():
        seconds = _repeat(model, batches, plan.rounds)
        with ExitStack() as stack:
            calls = [
                stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
                for name in COLLECTIVES
            ]
            by_us(model, batches)
    if dist.get_rank() == 0:
        result = {
            "images": plan.images,
            "batches_of_each": len(batches),
            "seconds": statistics.median(seconds),
            "collectives": sum(call.call_count for call in calls),
        }
        Path(folder, "workers.json").write_text(json.dumps(result))


def _progress(text: str, end: str = "\n") -> None:
    print(f"  {text:<60}", end=end, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line; refuses what cannot be done before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds; no files")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--figure", type=Path, help="the figure to write")
    parser.add_argument("--overwrite", action="store_true", help="existing files")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print tables")
    parser.add_argument("--into", type=Path, metavar="MD", help="update the tables in this file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    if not (args.quick or args.markdown):
        args.output = args.output or RESULTS / "population" / "cpu.json"
        args.figure = args.figure or FIGURE
    for path in (args.output, args.figure):
        if path and path.exists() and not (args.overwrite or args.markdown):
            parser.error(f"{path} exists: choose another file, or --overwrite it")
    return args


def main() -> None:
    args = parse_arguments()
    if args.markdown:
        document = json.loads(args.markdown.read_text())
        if args.into:
            text = replace_tables(args.into.read_text(), markdown(document), "population.py")
            args.into.write_text(text)
        else:
            print(markdown(document))
    else:
        _expect_small_samples()
        document = run(QUICK if args.quick else FULL, args.opts)
        print(markdown(document))
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    if args.figure:
        draw(document, args.figure)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
