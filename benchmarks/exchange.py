"""What moving RoIs costs: one all-to-all each way against gathering every RoI on every worker.

Times shuffle + unshuffle, forward + backward, of [rows, 256, 7, 7] a worker, over gloo on this
machine. The baseline is the formulation of Detectron2's projects/Rethinking-BatchNorm, written here
from its description: pad, all-gather all rows, pick this worker's share of a permutation broadcast
by worker 0; the same to undo it; the backward of each all-gather is an all-reduce of all rows.
Both run in the same processes, in turns; the ratio is the median over the rounds.

    python benchmarks/exchange.py --workers 2 4
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bn_detection.norm import RoIShuffle, exchange, restore


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather_all_rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """All workers' rows, in order, and the number of each worker's."""
    size = torch.tensor([x.shape[0]])
    gathered = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, size)
    sizes = [int(n) for n in gathered]
    padded = torch.cat([x, x.new_zeros(max(sizes) - x.shape[0], *x.shape[1:])])
    rows = _AllGather.apply(padded)
    return torch.cat([part[:n] for part, n in zip(rows, sizes, strict=True)]), sizes


def all_gather_round_trip(x: Tensor, step: int) -> Tensor:
    """Shuffle and unshuffle by gathering everything, twice."""
    rows, sizes = gather_all_rows(x)
    rank = dist.get_rank()
    order = torch.randperm(rows.shape[0])
    dist.broadcast(order, src=0)
    chunk = math.ceil(rows.shape[0] / len(sizes))
    shuffled = rows[order[rank * chunk : (rank + 1) * chunk]]
    back, _ = gather_all_rows(shuffled)
    start = sum(sizes[:rank])
    return back[torch.argsort(order)[start : start + sizes[rank]]]


def all_to_all_round_trip(x: Tensor, step: int) -> Tensor:
    """Shuffle and unshuffle by sending each row once each way."""
    plan = _SHUFFLE.plan(x, step)
    return restore(exchange(x, plan), plan)


_SHUFFLE = RoIShuffle(seed=0)


def _seconds(round_trip: Callable[[Tensor, int], Tensor], x: Tensor, step: int) -> float:
    x.grad = None
    dist.barrier()
    start = time.perf_counter()
    y = round_trip(x, step)
    y.backward(x.detach())
    dist.barrier()
    elapsed = time.perf_counter() - start
    if not torch.equal(y, x):
        raise RuntimeError(f"{round_trip.__name__} did not give the rows back in order")
    return elapsed


def _worker(rank: int, workers: int, rows: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers
    )
    torch.manual_seed(rank)
    x = torch.randn(rows, 256, 7, 7, requires_grad=True)
    times: dict[str, list[float]] = {"all_to_all": [], "all_gather": []}
    for step in range(rounds + 1):
        pair = {
            "all_to_all": _seconds(all_to_all_round_trip, x, step),
            "all_gather": _seconds(all_gather_round_trip, x, step),
        }
        if step > 0:  # the first is a warm-up
            for name, value in pair.items():
                times[name].append(value)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def measure(workers: int, rows: int, rounds: int) -> dict[str, float]:
    """Medians over ``rounds``, in seconds, and the median ratio of the paired rounds."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _worker, (workers, rows, rounds, folder), nprocs=workers, start_method="spawn"
        )
        times = json.loads(Path(folder, "times.json").read_text())
    pairs = zip(times["all_gather"], times["all_to_all"], strict=True)
    return {
        "all_to_all_s": statistics.median(times["all_to_all"]),
        "all_gather_s": statistics.median(times["all_gather"]),
        "ratio": statistics.median(gather / exchange_ for gather, exchange_ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=512, help="RoIs a worker")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, gloo, {platform.machine()}, {mp.cpu_count()} CPUs")
    print(f"[{args.rows}, 256, 7, 7] a worker; shuffle + unshuffle, forward + backward; medians")
    print(f"{'workers':>7} {'all-to-all':>11} {'all-gather':>11} {'ratio':>6}")
    for workers in args.workers:
        result = measure(workers, args.rows, args.rounds)
        print(
            f"{workers:>7} {result['all_to_all_s']:>9.3f} s {result['all_gather_s']:>9.3f} s "
            f"{result['ratio']:>5.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
