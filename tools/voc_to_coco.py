#!/usr/bin/env python
"""Write the annotations of a Pascal VOC folder as COCO's JSON: ``bn-detection voc-to-coco``."""

import sys

from bn_detection.cli import main

if __name__ == "__main__":
    sys.exit(main(["voc-to-coco", *sys.argv[1:]]))
