"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint
from fvcore.common.checkpoint import _filter_reused_missing_keys, _IncompatibleKeys

from ..config import ConfigError
from ..files import replacing
from ..pickles import only_data, why_not_loaded

_KEYS_SHOWN = 10


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``; an interrupted one leaves ``path`` as it was."""
    with replacing(path) as unfinished:
        torch.save(data, unfinished)


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

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As in Detectron2; on a full disk the checkpoint before stays the last."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as unfinished:
            unfinished.write_text(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Detectron2, but a file is data: nothing that it names is run.

        Raises:
            ConfigError: the file is missing, cannot be read as a checkpoint, or has other things in
                it than tensors, arrays and plain containers.
        """
        try:
            return super().load(path, *args, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"MODEL.WEIGHTS {path}: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"MODEL.WEIGHTS (or the checkpoint to resume) {path} cannot be read: "
                f"{why_not_loaded(error)}"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        """As in Detectron2, without running what the file names."""
        with only_data(detection_checkpoint):
            return super()._load_file(filename)


class StrictCheckpointer(AtomicCheckpointer):
    """Refuses weights that do not fit the model, instead of logging them."""

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        misshaped = {name for name, *_ in incompatible.incorrect_shapes}
        shapes = [
            f"{name} {tuple(theirs)} instead of {tuple(ours)}"
            for name, theirs, ours in incompatible.incorrect_shapes
        ]
        missing = set(incompatible.missing_keys) - misshaped
        missing = _essential(_filter_reused_missing_keys(self.model, list(missing)))
        parts = {
            "missing": missing,
            "not in the model": _essential(incompatible.unexpected_keys),
            "of another shape": shapes,
        }
        problems = [f"{len(keys)} {what}: {_list(keys)}" for what, keys in parts.items() if keys]
        if problems:
            raise ConfigError(f"the weights do not fit the model. {'; '.join(problems)}.")


def _essential(keys: Iterable[str]) -> list[str]:
    """Without the counters of training steps, which inference does not use."""
    return sorted(key for key in keys if not key.endswith("num_batches_tracked"))


def _list(keys: list[str]) -> str:
    more = len(keys) - _KEYS_SHOWN
    return ", ".join(keys[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
