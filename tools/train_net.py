#!/usr/bin/env python
"""Train or evaluate a detector: ``bn-detection train``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
