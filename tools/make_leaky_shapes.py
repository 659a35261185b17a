#!/usr/bin/env python
"""Make the embedded dataset LeakyShapes: ``bn-detection make-leaky-shapes``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["make-leaky-shapes", *sys.argv[1:]]))
