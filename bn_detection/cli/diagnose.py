"""Diagnose the BN layers of a detector: what hurts it, by how much, and what fixes it.

The exit status is 0 without findings, 1 with findings (--fail-on), and 2 after any error.
"""

from __future__ import annotations

import argparse
import traceback

from ..command_line import add_common_flags, add_model_flags, add_overrides, chosen_model
from ..config import ConfigError

FORMATS = ("text", "json", "markdown", "junit")
FAIL_ON = ("finding", "note", "never")
EXAMPLE = (
    "bn-detection demo\n"
    "  bn-detection diagnose --config-file output/demo/BN/config.yaml --quick \\\n"
    "    MODEL.WEIGHTS output/demo/BN/model_final.pth"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="of the training: YAML, or a LazyConfig (.py, which is run); also the name of one of "
        "bn_detection's or Detectron2's model zoo",
    )
    parser.add_argument("--quick", action="store_true", help="fewer images: about a minute")
    parser.add_argument("--images", type=int, metavar="N", help="instead of 512, or 64 if quick")
    parser.add_argument(
        "--num-gpus",
        type=int,
        dest="workers",
        metavar="W",
        help="workers of the training; default: those that versions.json beside the checkpoint "
        "names, else 1. The diagnosis itself runs in one process",
    )
    parser.add_argument("--output-dir", help="default: OUTPUT_DIR/diagnosis_<checkpoint>")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier diagnosis")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="of what is printed; the log goes to stderr unless it is text",
    )
    parser.add_argument(
        "--fail-on",
        choices=FAIL_ON,
        default="finding",
        help="what makes the exit status 1; it is 2 after an error, whatever this says",
    )
    add_model_flags(parser)
    add_common_flags(parser)
    add_overrides(parser)
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")


def run(args: argparse.Namespace) -> int:
    """Diagnose, in this process. A failure is status 2, because 1 says that there are findings."""
    by_model = chosen_model(args)
    try:
        if by_model:
            from ..instrument import commands

            return commands.diagnose_model(args)
        from .. import engine

        return engine.run(engine.diagnose, args, engine.preflight_diagnosis)
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception:
        traceback.print_exc()
        return 2
