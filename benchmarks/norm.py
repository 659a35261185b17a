"""What each normalization batch costs, against BN per worker: time, memory and bytes sent.

Measures the training step (forward and backward) of a box head, 4 x (3x3 conv, norm, ReLU) and one
fc layer on 7x7 RoIs, with every partition, in gloo workers of one thread each. The baseline is
Detectron2's head with ``nn.BatchNorm2d``; ``all-gather shuffle`` is the formulation of the paper's
reference code. All variants run in the same processes, in turns, a step of one and then a step of
the next; a ratio is the median over the rounds of the ratio within a round.

    python benchmarks/norm.py --quick                  prints the tables, in two to three minutes
    python benchmarks/norm.py                          writes benchmarks/results/cpu.json as well
    sudo PYTHON=.venv/bin/python benchmarks/link.sh    over links of 10 and 1 Gbit/s
    python benchmarks/norm.py --markdown FILE.json     the tables of an earlier run
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from all_gather import AllGatherShuffleHead
from counters import bytes_sent, peak_of_activations
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from report import markdown, replace_tables
from torch import Tensor, nn

from bn_detection import BNOptions
from bn_detection.config import ConfigError
from bn_detection.engine import launch
from bn_detection.heads import BNConvFCHead, NormFactory
from bn_detection.norm import Scope, exchange, plan_exchange, set_rows_per_image

RESULTS = Path(__file__).parent / "results"

BASELINE = "nn.BatchNorm2d per worker"
ALL_GATHER = "all-gather shuffle"
STATISTICS = "shuffle (statistics)"
FEATURES = "shuffle (features)"
#: NORM and options of this project's layer.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "worker": ("BN", {}),
    "world": ("SyncBN", {}),
    STATISTICS: ("ShuffleBN", {}),
    FEATURES: ("ShuffleBN", {"shuffle_mode": "features"}),
    "ghost": ("GhostBN", {}),
    "image": ("ImageBN", {}),
    "batch renorm": ("BatchRenorm", {}),
}
MOVES_ROIS = (FEATURES, ALL_GATHER)

FC_DIM = 1024
DRAWS = 100
CASES = ("head", "virtual", "layer", "bytes")


@dataclass(frozen=True)
class Case:
    """One table: the variants of a head, or of a layer alone.

    Attributes:
        what: ``head``; ``layer``; ``bytes``, of the head, without times; or ``link``, the speed of
            the connection between two workers.
        channels: of the layers.
        rois: of each process.
        rounds: timed steps of each variant.
        workers: processes.
        virtual_workers: that one process stands for; 0 for none.
        dtype: of the layer's input.
    """

    what: str
    channels: int
    rois: int
    rounds: int = 0
    workers: int = 1
    virtual_workers: int = 0
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """In words."""
        if self.what == "link":
            return f"Link between {self.workers} workers"
        if self.what == "layer":
            return f"Layer alone, [{self.rois}, {self.channels}, 7, 7] {self.dtype}"
        where = f"{self.workers} workers, {self.rois} RoIs each"
        if self.virtual_workers:
            where = f"{self.virtual_workers} virtual workers in one process, {self.rois} RoIs"
        if self.what == "bytes":
            return f"Bytes sent, {where}, {self.channels} channels"
        return f"Head, {where}, {self.channels} channels"

    @property
    def images(self) -> int:
        """Of each process: two as on COCO, or one for each virtual worker."""
        return max(self.virtual_workers, 2)

    @property
    def ghost_size(self) -> int:
        """The default, 32, or fewer: four groups at least."""
        return max(min(self.rois // 4, 32), 2)

    @property
    def rows_per_image(self) -> list[int]:
        """Of each process, as equal as they can be."""
        bounds = [self.rois * i // self.images for i in range(self.images + 1)]
        return [end - start for start, end in itertools.pairwise(bounds)]


def measure(case: Case) -> dict[str, Any]:
    """Results of one case, on this worker."""
    if case.what == "link":
        return _measure_link()
    if case.what == "bytes":
        return _measure_bytes(case)
    modules = _layers(case) if case.what == "layer" else _heads(case)
    x = torch.randn(case.rois, case.channels, 7, 7)
    x = x.to(getattr(torch, case.dtype)).requires_grad_()
    steps = {name: Step(module, x, case.rows_per_image) for name, module in modules.items()}
    sent, peak = {}, {}
    for name, step in steps.items():
        step()  # warms up
        with bytes_sent() as counter:
            step()
        sent[name] = _mean_over_workers(counter.total())
        peak[name] = peak_of_activations(step, modules[name], [x, step.grad])
    times = _times(steps, case)
    base = times[BASELINE]
    return {
        name: {
            "seconds": statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, base, strict=True)),
            "added_seconds": statistics.median(a - b for a, b in zip(mine, base, strict=True)),
            "peak_bytes": peak[name],
            "memory_ratio": peak[name] / peak[BASELINE],
            "bytes_sent": sent[name],
        }
        for name, mine in times.items()
    }


def _heads(case: Case, height: int = 7, width: int = 7) -> dict[str, nn.Module]:
    shape = ShapeSpec(channels=case.channels, height=height, width=width)
    dims = {"conv_dims": [case.channels] * 4, "fc_dims": [FC_DIM]}
    heads = {BASELINE: FastRCNNConvFCHead(shape, conv_norm="BN", **dims)}
    for name, (norm, options) in VARIANTS.items():
        options = BNOptions(
            virtual_workers=case.virtual_workers,
            ghost_size=case.ghost_size,
            shuffle_seed=0,
            **options,
        )
        heads[name] = BNConvFCHead(shape, conv_norm=norm, bn_options=options, **dims)
    heads[ALL_GATHER] = AllGatherShuffleHead(shape, conv_norm="BN", **dims)
    if case.workers == 1:
        for name in MOVES_ROIS:
            del heads[name]
    return heads


def _layers(case: Case) -> dict[str, nn.Module]:
    """Those that need no other process; ``shuffle`` with eight groups."""
    layers: dict[str, nn.Module] = {BASELINE: nn.BatchNorm2d(case.channels)}
    for name in ("worker", STATISTICS, "ghost", "image", "batch renorm"):
        groups = 8 if name == STATISTICS else 0
        options = BNOptions(virtual_workers=groups, ghost_size=case.ghost_size)
        layers[name] = NormFactory(VARIANTS[name][0], options)(case.channels)
    return layers


class Step:
    """Forward and backward of a module on ``x``."""

    def __init__(self, module: nn.Module, x: Tensor, rows_per_image: list[int]) -> None:
        self.module, self.x = module, x
        self.rows_per_image = rows_per_image
        self.grad: Tensor | None = None

    def __call__(self) -> None:
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        set_rows_per_image(self.rows_per_image)
        y = self.module(self.x)
        if self.grad is None:
            self.grad = torch.randn_like(y)
        y.backward(self.grad)


def _times(steps: dict[str, Step], case: Case) -> dict[str, list[float]]:
    """Seconds of each step in each round; a variant has another predecessor in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = torch.Generator().manual_seed(0)
    names = list(steps)
    for number in range(case.rounds):
        _progress(f"round {number + 1} of {case.rounds}", end="\r")
        for index in torch.randperm(len(names), generator=order).tolist():
            name = names[index]
            times[name].append(_seconds(steps[name]))
    return times


def _seconds(step: Callable[[], Any]) -> float:
    _barrier()
    start_time = time.perf_counter()
    step()
    _barrier()
    return time.perf_counter() - start_time


def _measure_bytes(case: Case) -> dict[str, Any]:
    """Bytes of a step on 7x7 maps, from those counted on maps of one and of two positions.

    They are linear in the positions, so nothing of that size needs to be sent.
    """
    counted: dict[str, list[float]] = {}
    for width in (1, 2):
        _progress(f"maps of {width} positions", end="\r")
        heads = _heads(case, 1, width)
        x = torch.randn(case.rois, case.channels, 1, width, requires_grad=True)
        for name in ("world", STATISTICS, *MOVES_ROIS):
            # The first step also sets up what the later ones use.
            Step(heads[name], x[:8].detach().requires_grad_(), case.rows_per_image)()
            with bytes_sent() as counter:
                Step(heads[name], x, case.rows_per_image)()
            counted.setdefault(name, []).append(_mean_over_workers(counter.total()))
    sent = {name: one + 48 * (two - one) for name, (one, two) in counted.items()}
    row = torch.zeros(case.rois, 1)
    scope, layer, moved = Scope(plan_exchange, seed=0), nn.Identity(), []
    for _ in range(DRAWS):
        with bytes_sent() as counter:
            exchange(row, scope.get(layer, row))
        moved.append(_mean_over_workers(counter["all_to_all_single"]) / row.nbytes)
    return {
        "bytes_sent": sent,
        "draws": DRAWS,
        "share_of_rows_moved": statistics.mean(moved),
        "standard_error": statistics.stdev(moved) / DRAWS**0.5,
    }


def _measure_link() -> dict[str, float]:
    message, number = torch.zeros(32 * 2**20, dtype=torch.uint8), torch.zeros(1)
    gathered = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    gather, reduce = [], []
    for _ in range(5):
        gather.append(_seconds(lambda: dist.all_gather(gathered, message)))
        reduce.append(_seconds(lambda: dist.all_reduce(number)))
    return {
        "gbit_per_second": message.nbytes * 8 / 1e9 / statistics.median(gather),
        "all_reduce_seconds": statistics.median(reduce),
    }


def _mean_over_workers(value: float) -> float:
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _progress(text: str, end: str = "\n") -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"  {text:<60}", end=end, file=sys.stderr, flush=True)


def _worker(cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(rank)
    results = []
    for case in cases:
        _progress(case.title)
        results.append({**asdict(case), "title": case.title, "results": measure(case)})
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def run(cases: list[Case], **machines: Any) -> list[dict[str, Any]]:
    """Results of all cases; of none where another machine has worker 0.

    Args:
        cases: in any order.
        machines: of :func:`bn_detection.workers.launch`, for workers on several machines.
    """
    results = []
    for workers in sorted({case.workers for case in cases}):
        mine = [case for case in cases if case.workers == workers]
        here = workers // machines.get("num_machines", 1)
        with tempfile.TemporaryDirectory() as folder:
            launch(_worker, here, device="cpu", args=(mine, folder), **machines)
            path = Path(folder, "results.json")
            results += json.loads(path.read_text()) if path.exists() else []
    return results


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if os.path.exists("/proc/cpuinfo"):
        models = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
        facts["cpu"] = models[0].split(":")[1].strip() if models else facts["cpu"]
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    rois, rounds = (32, 5) if args.quick else (128, 11)
    rois, rounds = args.rois or rois, args.rounds or rounds
    heads = [Case("head", channels, rois, rounds) for channels in args.channels]
    if args.num_machines > 1:
        workers = args.num_machines
        return [Case("link", 0, 0, workers=workers), *(replace(h, workers=workers) for h in heads)]
    cases = []
    if "head" in args.cases:
        cases += [replace(head, workers=w) for w in args.workers for head in heads]
    if "virtual" in args.cases:
        cases += [replace(head, virtual_workers=8) for head in heads]
    if "layer" in args.cases:
        layer = Case("layer", 256, 4 * rois, rounds)
        cases += [layer, replace(layer, dtype="bfloat16")]
    if "bytes" in args.cases:
        cases.append(Case("bytes", 256, 1024, workers=8))
    return cases


def parse_arguments() -> argparse.Namespace:
    """The command line; refuses what cannot be done before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer RoIs and rounds; no file")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4], help="of the head")
    parser.add_argument("--channels", type=int, nargs="+", default=[256, 64], help="of the head")
    parser.add_argument("--rois", type=int, help="of each process (as on COCO: 1024)")
    parser.add_argument("--rounds", type=int, help="timed steps of each variant")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="an existing file")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="JSON", help="print tables")
    parser.add_argument("--into", type=Path, metavar="MD", help="update the tables in this file")
    link = parser.add_argument_group("two workers on two machines, as benchmarks/link.sh does")
    link.add_argument("--num-machines", type=int, default=1)
    link.add_argument("--machine-rank", type=int, default=0)
    link.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    link.add_argument("--link", help="what connects them, such as 1gbit")
    args = parser.parse_args()
    if args.output is None and not args.quick:
        args.output = RESULTS / f"{f'link_{args.link}' if args.link else 'cpu'}.json"
    if args.output and args.output.exists() and not (args.overwrite or args.markdown):
        parser.error(f"{args.output} exists: choose another --output, or --overwrite it")
    return args


def main() -> None:
    args = parse_arguments()
    if args.markdown:
        tables = "\n".join(markdown(json.loads(path.read_text())) for path in args.markdown)
        if args.into:
            args.into.write_text(replace_tables(args.into.read_text(), tables))
        else:
            print(tables)
        return
    cases = choose_cases(args)
    machines = {}
    if args.num_machines > 1:
        machines = {
            "num_machines": args.num_machines,
            "machine_rank": args.machine_rank,
            "dist_url": args.dist_url,
        }
    results = run(cases, **machines)
    if args.machine_rank > 0:
        return
    document = {
        "date": datetime.date.today().isoformat(),
        "machine": machine("cpu"),
        "link": args.link,
        "cases": results,
    }
    print(markdown(document))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
