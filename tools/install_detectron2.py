#!/usr/bin/env python3
"""Install Detectron2 v0.6 without a compiler, as a pure-Python wheel; see ``--help``."""

import sys
from pathlib import Path

# The package itself does not import before Detectron2 is there.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bn_detection"))
from install_detectron2 import main

if __name__ == "__main__":
    sys.exit(main())
