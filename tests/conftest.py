"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Triton reads it when its functions are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def own_catalogs() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def own_loggers() -> Iterator[None]:
    """What a test sets up of the loggers, of the tools or Detectron2, is forgotten after it."""
    loggers = [logging.getLogger(name) for name in ("bn_detection", "detectron2", "fvcore")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture(autouse=True, scope="session")
def sigint_interrupts() -> None:
    """As from a terminal: a shell has the children of its background jobs ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
