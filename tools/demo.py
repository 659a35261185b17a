#!/usr/bin/env python
"""The leak in one table and one figure: ``bn-detection demo``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
