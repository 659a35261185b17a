"""Estimate the population statistics of a checkpoint anew, and write another checkpoint.

There are as many workers as in the training, if versions.json beside the checkpoint names their
number; --num-gpus chooses another.
On images without labels: --images photos/night, with BN.POPULATION.ROIS inference at the end.
"""

from __future__ import annotations

import argparse

from ..command_line import add_model_flags, add_training_flags, chosen_model

EXAMPLE = (
    "bn-detection demo\n"
    "  bn-detection recalibrate --config-file output/demo/BN/config.yaml --num-gpus 2 \\\n"
    "    --output output/recalibrated.pth MODEL.WEIGHTS output/demo/BN/model_final.pth"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_training_flags(parser)
    parser.set_defaults(num_gpus=None)
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.pth",
        help="the new checkpoint; what changed goes to FILE.json beside it",
    )
    parser.add_argument(
        "--mix",
        metavar="ALPHA",
        help="for few images: (1 - ALPHA) times the statistics that there are plus ALPHA times the "
        "new ones, of FrozenBN layers too; auto: ALPHA = n / (n + 16) from n images",
    )
    parser.add_argument(
        "--keep-if-better",
        action="store_true",
        help="evaluate on DATASETS.TEST before and after, and write the statistics with more AP",
    )
    add_model_flags(parser)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--dataset", metavar="NAME", help="instead of DATASETS.TRAIN")
    images.add_argument(
        "--images",
        metavar="FOLDER",
        help="a folder of images instead; needs BN.POPULATION.ROIS inference",
    )


def run(args: argparse.Namespace) -> None:
    """Launch the workers."""
    if chosen_model(args, needed=False):
        from ..instrument import commands

        commands.recalibrate_model(args)
        return
    from .. import engine

    engine.choose_workers(args)
    engine.run(engine.recalibrate, args, engine.preflight_recalibration)
