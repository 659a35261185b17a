"""Measure what leaks between RoIs through the normalization batches of a detector.

How many images a worker of the training had follows from versions.json beside the checkpoint, or
is BN.LEAKAGE.IMAGES_PER_WORKER.
"""

from __future__ import annotations

import argparse

from ..command_line import add_common_flags, add_model_flags, add_overrides, chosen_model

EXAMPLE = (
    "bn-detection demo\n"
    "  bn-detection probe --config-file output/demo/BN/config.yaml --output output/probe.json \\\n"
    "    MODEL.WEIGHTS output/demo/BN/model_final.pth"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the training")
    parser.add_argument("--output", required=True, metavar="FILE.json", help="the report")
    parser.add_argument(
        "--on",
        choices=("rois", "detections"),
        help="rois: the second stage on the RoIs of the training sampler, in accuracy, loss and AP "
        "(the default where the second stage is known); detections: the AP of the detector's own "
        "detections, of any detector",
    )
    parser.add_argument(
        "--by-layer",
        action="store_true",
        help="which layer leaks: each with the batch of others alone, and all others with it",
    )
    parser.add_argument(
        "--by-class",
        action="store_true",
        help="which classes leak: accuracy and AP of each, the largest leakage first",
    )
    add_model_flags(parser)
    add_common_flags(parser)
    add_overrides(parser)
    # One process: a normalization batch is what the probe makes of it, not what a worker has.
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")


def run(args: argparse.Namespace) -> None:
    """Measure, in this process."""
    if chosen_model(args):
        from ..instrument import commands

        commands.probe_model(args)
        return
    from .. import engine

    engine.run(engine.probe, args, engine.preflight_probe)
