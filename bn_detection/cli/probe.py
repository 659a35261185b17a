"""Measure what leaks between RoIs through the normalization batches of a detector's heads."""

from __future__ import annotations

import argparse

from ..command_line import add_common_flags, add_overrides

EXAMPLE = (
    "bn-detection demo\n"
    "  bn-detection probe --config-file output/demo/BN/config.yaml --output output/probe.json \\\n"
    "    MODEL.WEIGHTS output/demo/BN/model_final.pth BN.LEAKAGE.IMAGES_PER_WORKER 1"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--config-file", required=True, metavar="FILE.yaml", help="of the training")
    parser.add_argument("--output", required=True, metavar="FILE.json", help="the report")
    parser.add_argument(
        "--by-layer",
        action="store_true",
        help="which layer leaks: each with the batch of others alone, and all others with it",
    )
    add_common_flags(parser)
    add_overrides(parser)
    # One process: a normalization batch is what the probe makes of it, not what a worker has.
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")


def run(args: argparse.Namespace) -> None:
    """Measure, in this process."""
    from .. import engine

    engine.run(engine.probe, args, engine.preflight_probe)
