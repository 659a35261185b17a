"""Draw mini-batch, EMA and population statistics over a training with BN.TRACE.PERIOD."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
bn-detection train --config-file quickstart/mask_rcnn_bn.yaml OUTPUT_DIR output/trace \\
    BN.TRACE.PERIOD 10
  bn-detection plot-trace output/trace"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of the training")
    parser.add_argument(
        "--layer", nargs="+", default=["*"], metavar="GLOB", help="of the layers to draw"
    )


def run(args: argparse.Namespace) -> None:
    """Draw, and say where to."""
    from ..study.trace_figure import draw_trace

    for path in draw_trace(args.output_dir, args.layer):
        print(f"Wrote {path}")
