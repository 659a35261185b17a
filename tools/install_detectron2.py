#!/usr/bin/env python3
"""Install Detectron2 v0.6 without a compiler: ``bn-detection install-detectron2``."""

import sys
from pathlib import Path

# Before bn_detection is installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["install-detectron2", *sys.argv[1:]]))
