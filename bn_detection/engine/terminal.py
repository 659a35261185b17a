"""What a tool that answers a question prints: progress and the answer; all else is in log.txt."""

from __future__ import annotations

import logging
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

_FOR_THE_LOG = ("bn_detection.population.collect",)
"""Loggers of this package with a line a layer."""
_PROGRESS = ("detectron2.evaluation.evaluator",)
"""Loggers of Detectron2 that say how far it is."""


def print_answers_only(folder: str) -> None:
    """Keep the config, the model and the environment, which Detectron2 logs, off the terminal.

    Warnings are printed, and what this package logs. Call it before Detectron2's ``default_setup``,
    which logs first.

    Args:
        folder: that of ``log.txt``, which has everything.
    """
    rank = comm.get_rank()
    # As default_setup asks for them: a logger is set up once.
    loggers = [
        setup_logger(folder, distributed_rank=rank),
        setup_logger(folder, distributed_rank=rank, name="fvcore"),
        setup_logger(folder, distributed_rank=rank, name="bn_detection"),
    ]
    for logger in loggers:
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout:  # log.txt is a stream too
                handler.addFilter(_is_for_the_terminal)


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    ours = record.name.startswith("bn_detection.") and record.name not in _FOR_THE_LOG
    shown = ours or record.name in _PROGRESS
    return record.levelno >= (logging.INFO if shown else logging.WARNING)
