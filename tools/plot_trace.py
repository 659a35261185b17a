#!/usr/bin/env python
"""Draw mini-batch, EMA and population statistics over a training with BN.TRACE.PERIOD."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bn_detection.config import ConfigError
from bn_detection.study.trace_figure import draw_trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of the training")
    parser.add_argument(
        "--layer", nargs="+", default=["*"], metavar="GLOB", help="of the layers to draw"
    )
    args = parser.parse_args()
    try:
        for path in draw_trace(args.output_dir, args.layer):
            print(f"Wrote {path}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
