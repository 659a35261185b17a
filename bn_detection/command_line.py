"""The flags that command lines share, and the command line of a command of this package."""

from __future__ import annotations

import argparse
import sys

from .config import ConfigError

STATUS = """\
exit status:
  0 done; 1 a failure, or findings; 2 an error in the configuration or its input
  130 ended by Ctrl-C; 143 stopped by SIGTERM, 138 by SIGUSR1: a training has finished its
  iteration and written a checkpoint, from which --resume goes on"""


def command_line(command: str, *arguments: object) -> list[str]:
    """The program and arguments that run a command of ``bn-detection`` with this Python.

    Args:
        command: such as ``train``.
        arguments: of the command.
    """
    return [sys.executable, "-m", __package__, command, *map(str, arguments)]


def argument_parser(epilog: str = STATUS) -> argparse.ArgumentParser:
    """The command line of Detectron2's tools, for a script of your own.

    Args:
        epilog: text after the list of flags.
    """
    parser = argparse.ArgumentParser(
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_flags(parser)
    return parser


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of Detectron2's tools, and those that all commands share.

    Source: ``detectron2.engine.default_argument_parser``; flags and meanings are the same, but
    ``--num-gpus`` also counts CPU workers, and without ``--dist-url`` a free port is used, so that
    two jobs on a machine do not collide. It is not called, because importing it takes seconds.

    Args:
        parser: of a command; what it parses is for :func:`bn_detection.engine.run`.
    """
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="YAML, or a LazyConfig (.py, which is run); or the name of one of bn_detection's or "
        "Detectron2's model zoo",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, without training")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="workers per machine: GPUs where there are any, otherwise CPU processes",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="machines of the job")
    parser.add_argument("--machine-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where the workers meet: 'auto' (a free port; one machine only), or "
        "tcp://HOST_OF_MACHINE_0:PORT",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often all workers are started again after one has failed; a training then goes "
        "on from its last checkpoint",
    )
    add_common_flags(parser)
    add_overrides(parser)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands with a config have.

    Args:
        parser: of a command.
    """
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import a module of yours first, which registers its heads, backbones or datasets, "
        "such as my_project.heads; it is looked for in the working directory too. May be repeated",
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from, not only what it is",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a model that has no config of Detectron2's.

    Args:
        parser: of a command that measures a model.
    """
    group = parser.add_argument_group("any torch detector, in place of --config-file")
    group.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="what builds it, such as my_project.models:detector, or "
        "torchvision:fasterrcnn_resnet50_fpn_v2",
    )
    group.add_argument("--weights", metavar="FILE", help="its state_dict, or a checkpoint with one")
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="of torchvision:NAME, the background too"
    )
    group.add_argument(
        "--coco", nargs=2, metavar=("JSON", "FOLDER"), help="its images, with labels"
    )
    group.add_argument("--image-folder", metavar="FOLDER", help="its images, without labels")
    group.add_argument(
        "--images-per-gpu",
        type=int,
        default=2,
        metavar="N",
        help="images of a step of its training on one GPU",
    )


def chosen_model(args: argparse.Namespace, *, needed: bool = True) -> bool:
    """Whether a command is about ``--model``, not ``--config-file``.

    Args:
        args: with the flags of :func:`add_model_flags`.
        needed: whether one of both has to be given.

    Raises:
        ConfigError: both are given, or none; or images without a model.
    """
    if args.model and args.config_file:
        raise ConfigError(f"--model {args.model}: give it or --config-file, not both.")
    if needed and not (args.model or args.config_file):
        raise ConfigError("Give --config-file, or --model.")
    for flag in ("weights", "num_classes", "coco", "image_folder"):
        if getattr(args, flag) and not args.model:
            raise ConfigError(f"--{flag.replace('_', '-')} goes with --model.")
    if args.images_per_gpu < 1:
        raise ConfigError(f"--images-per-gpu {args.images_per_gpu}: at least 1 is needed.")
    return bool(args.model)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``KEY VALUE ...``, which take the rest of the command line."""
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of the config, at the end: SOLVER.BASE_LR 0.01 MODEL.WEIGHTS model.pth",
    )
