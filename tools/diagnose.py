#!/usr/bin/env python
"""Diagnose the BN layers of a Detectron2 model: what hurts it, by how much, and what mends it.

python tools/diagnose.py --config-file configs/quickstart/mask_rcnn_bn.yaml --num-gpus 2 --quick \\
    MODEL.WEIGHTS output/demo/BN/model_final.pth

The exit status is 0 without findings, 1 with findings (--fail-on), and 2 after an error.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from bn_detection.engine import add_common_flags, diagnose, preflight_diagnosis, run
from bn_detection.report_flags import add_report_flags


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        dest="config",
        metavar="FILE.yaml",
        help="of the training; also the name of one in Detectron2's model zoo",
    )
    parser.add_argument("--quick", action="store_true", help="fewer images: about a minute")
    parser.add_argument("--images", type=int, metavar="N", help="instead of 512, or 64 if quick")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        dest="workers",
        metavar="W",
        help="workers of the training; the diagnosis itself runs in one process",
    )
    parser.add_argument("--output-dir", help="default: OUTPUT_DIR/diagnosis_<checkpoint>")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier diagnosis")
    add_report_flags(parser)
    add_common_flags(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        status = run(diagnose, parse(), preflight_diagnosis)
    except Exception:
        # Python's own status for it is 1.
        traceback.print_exc()
        status = 2
    sys.exit(status)
