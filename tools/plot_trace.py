#!/usr/bin/env python
"""Draw statistics over a training: ``bn-detection plot-trace``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot-trace", *sys.argv[1:]]))
