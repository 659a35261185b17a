#!/usr/bin/env python
"""Measure what leaks between RoIs through the normalization batches of a detector's heads.

python tools/probe.py --config-file configs/quickstart/mask_rcnn_bn.yaml --output probe.json \\
    MODEL.WEIGHTS output/demo/BN/model_final.pth BN.LEAKAGE.IMAGES_PER_WORKER 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bn_detection.engine import add_common_flags, preflight_probe, probe, run


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE.yaml", help="of the training")
    parser.add_argument("--output", required=True, metavar="FILE.json", help="the report")
    add_common_flags(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ..., such as MODEL.WEIGHTS"
    )
    # One process: a normalization batch is what the probe makes of it, not what a worker has.
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(probe, parse(), preflight_probe)
