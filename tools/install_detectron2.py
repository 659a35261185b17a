#!/usr/bin/env python
"""Install Detectron2 v0.6 without a compiler: ``bn-detection install-detectron2``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["install-detectron2", *sys.argv[1:]]))
