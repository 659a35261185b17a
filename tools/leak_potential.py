#!/usr/bin/env python
"""What the others of its image tell of an object: ``bn-detection leak-potential``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["leak-potential", *sys.argv[1:]]))
