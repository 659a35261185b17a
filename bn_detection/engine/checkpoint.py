"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..config import ConfigError


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``; an interrupted one leaves ``path`` as it was."""
    unfinished = f"{path}.partial"
    try:
        torch.save(data, unfinished)
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(unfinished)


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer; a save that is interrupted leaves what was there before it."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth with the model, the checkpointables and ``kwargs``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        save_atomically(data, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Detectron2.

        Raises:
            ConfigError: the file is missing or cannot be read as a checkpoint.
        """
        try:
            return super().load(path, *args, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"MODEL.WEIGHTS {path}: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"MODEL.WEIGHTS (or the checkpoint to resume) {path} cannot be read: {error}"
            ) from error
