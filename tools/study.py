#!/usr/bin/env python
"""Run a study: ``bn-detection study``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
