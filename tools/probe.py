#!/usr/bin/env python
"""Measure what leaks between RoIs: ``bn-detection probe``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
