#!/usr/bin/env python3
"""Make the embedded dataset LeakyShapes: <root>/train and <root>/val in COCO's format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bn_detection.config import ConfigError
from bn_detection.data import LeakyShapesConfig, honest_accuracy_limit, make_leaky_shapes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path("datasets/leaky_shapes"))
    parser.add_argument(
        "--num-images",
        nargs=2,
        type=int,
        default=(1000, 150),
        metavar=("TRAIN", "VAL"),
        help="images in each split",
    )
    parser.add_argument("--seed", type=int, default=0, help="of both splits; their images differ")
    dials = parser.add_argument_group("dials of the generator")
    for dial in fields(LeakyShapesConfig):
        pair = isinstance(dial.default, tuple)
        dials.add_argument(
            "--" + dial.name.replace("_", "-"),
            nargs=2 if pair else None,
            type=int if pair else type(dial.default),
            default=dial.default,
            metavar=("MIN", "MAX") if pair else "N",
            help=dial.metadata["help"],
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    values = {dial.name: getattr(args, dial.name) for dial in fields(LeakyShapesConfig)}
    try:
        config = LeakyShapesConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
        for split, num_images in zip(("train", "val"), args.num_images, strict=True):
            print(f"{args.root / split}: {num_images} images ...", flush=True)
            made = make_leaky_shapes(
                args.root / split, num_images, args.seed, config, split=split, progress=True
            )
            print(
                f"{'Found' if made.reused else 'Wrote'} {made.annotations}: {made.num_images} "
                f"images, {made.num_objects} objects; {made.clipped_fraction:.1%} of object pixels "
                "clipped."
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limit = honest_accuracy_limit(config)
    print(f"From the brightness of one object at most {limit:.1%} of the classes can be told.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
