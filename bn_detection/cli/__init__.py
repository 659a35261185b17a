"""The command line, ``bn-detection``: a module a command.

A module has the command's help in its docstring, a command line that works in ``EXAMPLE``,
``add_arguments(parser)`` and ``run(args)``, which returns the exit status (None for 0). What a
command needs is imported when it runs, so that ``--help`` comes at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..command_line import STATUS
from ..config import ConfigError
from ..shipped import find_config

COMMANDS = (
    *("train", "diagnose", "probe", "recalibrate", "study", "demo"),
    *("leak-potential", "make-leaky-shapes", "voc-to-coco", "plot-trace", "install-detectron2"),
)
_INTERMIXED = ("study", "demo")
"""Commands whose overrides may stand between flags; those of the others are at the end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command and its arguments; those of this process by default.

    Returns:
        The exit status: 0 done, 1 findings, 2 an error in the configuration or its input, 130 ended
        by Ctrl-C.

    Raises:
        SystemExit: ``--help``, a wrong command line, or what ended the workers of a job.
        Exception: what is no error of the user, with its traceback.
    """
    args = parse(argv)
    try:
        # At once; but torchrun's workers have to agree on who says it.
        if getattr(args, "config_file", "") and "TORCHELASTIC_RUN_ID" not in os.environ:
            find_config(args.config_file)
        return args.run(args) or 0
    except ConfigError as error:
        if getattr(args, "traceback", False):
            traceback.print_exc()
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        return _fail("Detectron2 is not installed: run bn-detection install-detectron2")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What a command line says; ``run`` of it is the command's.

    Args:
        argv: the command and its arguments; those of this process by default.

    Raises:
        SystemExit: ``--help``, or a wrong command line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="bn-detection",
        description="BatchNorm in detectors: measure what leaks and what is stale, and cure it.",
        epilog=f"bn-detection COMMAND --help has the flags of a command.\n\n{STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bn-detection {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    by_name = {name: _add(commands, name) for name in COMMANDS}
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    if argv and argv[0] in _INTERMIXED:
        return by_name[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def _add(commands: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    module = import_module(f".{name.replace('-', '_')}", __name__)
    about = (module.__doc__ or "").strip()
    parser = commands.add_parser(
        name,
        help=about.partition("\n")[0],
        description=about,
        epilog=f"example:\n  {module.EXAMPLE}\n\n{STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
