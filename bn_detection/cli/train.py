"""Train or evaluate a detector, with the flags of Detectron2's tools/train_net.py.

Change options by KEY VALUE at the end. With torchrun:
  torchrun --nproc-per-node 8 -m bn_detection train --config-file mask_rcnn_shuffle.yaml
On several machines, each with its own --machine-rank:
  bn-detection train --num-machines 2 --machine-rank 0 --dist-url tcp://HOST_OF_MACHINE_0:PORT ...
"""

from __future__ import annotations

import argparse
from typing import Any

from ..command_line import add_training_flags as add_arguments

__all__ = ["EXAMPLE", "add_arguments", "run", "train_or_evaluate"]

EXAMPLE = (
    "bn-detection train --config-file quickstart/mask_rcnn_shuffle.yaml --num-gpus 2 \\\n"
    "    OUTPUT_DIR output/shuffle"
)


def run(args: argparse.Namespace) -> None:
    """Launch the workers."""
    from .. import engine

    engine.run(train_or_evaluate, args, engine.preflight)


def train_or_evaluate(args: argparse.Namespace) -> Any:
    """What a worker does."""
    from .. import engine

    cfg = engine.setup(args)
    work = engine.evaluate if args.eval_only else engine.train
    return work(cfg, args.resume)
