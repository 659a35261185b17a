"""Write the annotations of a Pascal VOC folder as COCO's JSON.

Boxes of VOC count pixels from 1 and include the last one. Objects that are difficult are neither
trained on nor counted. The categories are the classes of all annotations of the folder, sorted by
name, so that they are the same for every split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = (
    "bn-detection voc-to-coco BCCD_Dataset/BCCD --split train --output datasets/bccd/train.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "root",
        type=Path,
        metavar="FOLDER",
        help="with Annotations/*.xml, JPEGImages/ and ImageSets/Main/*.txt",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of ImageSets/Main, such as train; else all annotations"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the JSON to write"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=(),
        metavar="NAME",
        help="in the order of their categories, where a folder does not have all of them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    from ..data import voc_to_coco

    made = voc_to_coco(
        args.root, args.output, args.split, classes=args.classes, overwrite=args.overwrite
    )
    print(
        f"Wrote {args.output}: {made.num_images} images, {made.num_objects} objects of "
        f"{len(made.classes)} classes ({', '.join(made.classes)}); the images are in "
        f"{args.root / 'JPEGImages'}."
    )
