"""Measure, before any training, what the other objects of its image tell of an object's class.

That is what a head with BatchNorm over the RoIs of one image can learn to read from its batch.
"""

from __future__ import annotations

import argparse
import json

EXAMPLE = (
    "bn-detection make-leaky-shapes\n"
    "  bn-detection leak-potential --coco datasets/leaky_shapes/train/annotations.json \\\n"
    "    datasets/leaky_shapes/train/images"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--coco",
        nargs=2,
        required=True,
        metavar=("JSON", "FOLDER"),
        help="annotations in COCO's format, and the images",
    )
    parser.add_argument(
        "--images", type=int, default=500, metavar="N", help="to use, random ones; 0 for all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="of what is printed"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, and print."""
    from ..leakage import measure_leak_potential

    found = measure_leak_potential(
        *args.coco, num_images=args.images, seed=args.seed, progress=True
    )
    as_json = args.format == "json"
    print(json.dumps(found.to_json(), indent=2, allow_nan=False) if as_json else found.text())
