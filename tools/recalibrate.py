#!/usr/bin/env python
"""Estimate the population statistics of a checkpoint anew: ``bn-detection recalibrate``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["recalibrate", *sys.argv[1:]]))
