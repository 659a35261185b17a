#!/usr/bin/env python
"""Estimate the population statistics of a checkpoint anew, and write another checkpoint.

python tools/recalibrate.py --config-file configs/quickstart/mask_rcnn_bn.yaml --num-gpus 2 \\
    --output recalibrated.pth MODEL.WEIGHTS output/demo/BN/model_final.pth
python tools/recalibrate.py --config-file ... --output night.pth --images photos/night \\
    MODEL.WEIGHTS model_final.pth BN.POPULATION.ROIS inference
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bn_detection.engine import argument_parser, preflight_recalibration, recalibrate, run


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(epilog=__doc__)
    parser.description = __doc__.splitlines()[0]
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.pth",
        help="the new checkpoint; what changed goes to FILE.json beside it",
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--dataset", metavar="NAME", help="instead of DATASETS.TRAIN")
    images.add_argument(
        "--images",
        metavar="FOLDER",
        help="a folder of images instead; needs BN.POPULATION.ROIS inference",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(recalibrate, parse(), preflight_recalibration)
