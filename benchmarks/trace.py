"""What BN.TRACE adds to a training step of the quickstart detector.

The quickstart's Mask R-CNN on two CPU workers, a step without and a step with records, in turns;
the differences are between the steps of a pair.

    python benchmarks/trace.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from bn_detection.engine import Trainer, launch, load_config
from bn_detection.engine.setup import register_datasets
from bn_detection.population import TraceStatistics

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "mask_rcnn_bn.yaml"
PERIOD = 20
WARM_UP = 20


def worker(steps: int, channels: int, folder: str) -> None:
    times: dict[int, list[float]] = {0: [], 1: []}
    trainers = {}
    for period in times:
        overrides = ["BN.TRACE.PERIOD", str(period), "BN.TRACE.CHANNELS", str(channels)]
        overrides += ["OUTPUT_DIR", folder]
        cfg = load_config(argparse.Namespace(config_file=str(CONFIG), opts=overrides))
        register_datasets(cfg)
        trainers[period] = Trainer(cfg)
    with EventStorage() as storage:
        for step in range(steps + WARM_UP):
            for period, trainer in trainers.items():
                trainer.iter = step
                trainer.storage = storage
                hooks = [hook for hook in trainer._hooks if isinstance(hook, TraceStatistics)]
                dist.barrier()
                start = time.perf_counter()
                for hook in hooks:
                    hook.before_step()
                trainer.run_step()
                for hook in hooks:
                    hook.after_step()
                dist.barrier()
                times[period].append(time.perf_counter() - start)
            storage.step()
    if comm.is_main_process():
        plain, traced = (values[WARM_UP:] for values in times.values())
        step = statistics.median(plain)
        adds = statistics.median(b - a for a, b in zip(plain, traced, strict=True))
        print(f"A step: {step * 1e3:.1f} ms. A record of {channels} channels a layer adds ", end="")
        print(f"{adds * 1e3:.1f} ms: with BN.TRACE.PERIOD {PERIOD}, {adds / step / PERIOD:.1%}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each kind")
    parser.add_argument("--channels", type=int, default=2, help="traced of each layer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launch(worker, 2, device="cpu", args=(args.steps, args.channels, folder))


if __name__ == "__main__":
    main()
