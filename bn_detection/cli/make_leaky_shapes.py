"""Make the embedded dataset LeakyShapes: <root>/train and <root>/val in COCO's format."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ..dials import LeakyShapesConfig

EXAMPLE = "bn-detection make-leaky-shapes datasets/strong_leak --class-step 40"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.formatter_class = _Formatter
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


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def run(args: argparse.Namespace) -> None:
    """Make both splits; one that is there already is found."""
    from ..data import honest_accuracy_limit, make_leaky_shapes

    values = {dial.name: getattr(args, dial.name) for dial in fields(LeakyShapesConfig)}
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
    limit = honest_accuracy_limit(config)
    print(f"From the brightness of one object at most {limit:.1%} of the classes can be told.")
