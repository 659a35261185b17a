"""What each NORM adds to a training step of the quickstart detector.

Trains the quickstart's Mask R-CNN with each NORM in turn, a step of one and then a step of the
next, in the same two CPU workers; ratios are medians over paired steps. ``ShuffleBN:features``
shuffles in that mode.

    python benchmarks/step.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from bn_detection.engine import Trainer, launch, load_config
from bn_detection.engine.setup import register_datasets

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "mask_rcnn_bn.yaml"
NORMS = ["BN", "SyncBN", "ShuffleBN", "ShuffleBN:features", "GhostBN", "ImageBN", "BatchRenorm"]
WARM_UP = 20


def worker(norms: list[str], steps: int) -> None:
    trainers = []
    for choice in norms:
        norm, _, mode = choice.partition(":")
        overrides = ["MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.NORM", norm]
        overrides += ["BN.SHUFFLE.MODE", mode] if mode else []
        cfg = load_config(argparse.Namespace(config_file=str(CONFIG), opts=overrides))
        register_datasets(cfg)
        trainers.append(Trainer(cfg))
    times: dict[str, list[float]] = {norm: [] for norm in norms}
    with EventStorage() as storage:
        for step in range(steps + WARM_UP):
            for norm, trainer in zip(norms, trainers, strict=True):
                trainer.iter = step
                trainer.storage = storage
                dist.barrier()
                start = time.perf_counter()
                trainer.run_step()
                dist.barrier()
                times[norm].append(time.perf_counter() - start)
            storage.step()
    if comm.is_main_process():
        base = times[norms[0]][WARM_UP:]
        print(f"{'NORM':<20} {'step':>9} {'ratio to ' + norms[0]:>14}")
        for norm in norms:
            mine = times[norm][WARM_UP:]
            ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
            print(f"{norm or 'none':<20} {statistics.median(mine) * 1e3:>6.1f} ms {ratio:>14.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", default=NORMS, help="the first is the baseline")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each")
    args = parser.parse_args()
    launch(worker, 2, device="cpu", args=(args.norms, args.steps))


if __name__ == "__main__":
    main()
