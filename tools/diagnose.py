#!/usr/bin/env python
"""Diagnose the BN layers of a Detectron2 model: ``bn-detection diagnose``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
