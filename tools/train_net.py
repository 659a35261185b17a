#!/usr/bin/env python
"""Train or evaluate a detector: Detectron2's tools/train_net.py with this project's components.

python tools/train_net.py --config-file configs/mask_rcnn_shuffle.yaml --num-gpus 8
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
torchrun --nproc-per-node 2 tools/train_net.py --config-file ...
"""

from __future__ import annotations

import argparse
from typing import Any

from bn_detection.engine import argument_parser, evaluate, preflight, run, setup, train


def main(args: argparse.Namespace) -> Any:
    cfg = setup(args)
    return evaluate(cfg, args.resume) if args.eval_only else train(cfg, args.resume)


if __name__ == "__main__":
    run(main, argument_parser().parse_args(), preflight)
