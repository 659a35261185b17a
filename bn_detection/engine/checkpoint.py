"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint
from fvcore.common.checkpoint import _filter_reused_missing_keys, _IncompatibleKeys

from ..config import ConfigError
from ..files import replacing
from ..pickles import only_data, why_not_loaded
from ..words import listed

_KEYS_SHOWN = 10


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``; an interrupted one leaves ``path`` as it was."""
    with replacing(path) as unfinished:
        torch.save(data, unfinished)


def last_checkpoint(folder: str) -> str | None:
    """The path of the last checkpoint written to ``folder``, or None.

    Raises:
        ConfigError: the file that names it is damaged, or names one that is not there.
    """
    tag = Path(folder, "last_checkpoint")
    if not os.path.lexists(tag):
        return None
    cure = "Write the name of a checkpoint of the folder into it, or remove it to begin anew."
    try:
        name = tag.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{tag} cannot be read: {error.strerror}. {cure}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{tag} is damaged: it is no text. {cure}") from error
    if not name or not name.isprintable():
        raise ConfigError(f"{tag} is damaged: it has {name!a:.60}. {cure}")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ConfigError(f"{tag} names {name:.60}, which is not in the folder. {cure}")
    return path


def check_intact(path: str) -> None:
    """Compare a checkpoint with the checksums in it.

    ``torch.save`` writes the CRC-32 of each tensor, and ``torch.load`` does not look at it. Files
    without them pass.

    Raises:
        ConfigError: the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        # torch.serialization.set_crc32_options(False) leaves zeros.
        if not any(record.CRC for record in archive.infolist()):
            return
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError) as error:
            raise ConfigError(f"the file is damaged: {error}.") from error
    if damaged:
        raise ConfigError(f"the file is damaged: {damaged} is not what its checksum says.")


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer; a save that is interrupted leaves what was there before it.

    A checkpoint is loaded after a look at its checksums, and to resume only into the same model.

    Attributes:
        thing_classes: names of the classes that the model is trained on, by index, which is written
            to each checkpoint; None if they are not known.
    """

    thing_classes: Sequence[str] | None = None
    _strict = False
    _resumes = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth with the model, the checkpointables and ``kwargs``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        if self.thing_classes is not None:
            data["thing_classes"] = list(self.thing_classes)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        save_atomically(data, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As in Detectron2; on a full disk the checkpoint before stays the last."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as unfinished:
            unfinished.write_text(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return last_checkpoint(self.save_dir) is not None

    def get_checkpoint_file(self) -> str:
        return last_checkpoint(self.save_dir) or ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As in Detectron2; weights of another model are no checkpoint to resume."""
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        self._strict = self._resumes = True
        try:
            return self.load(self.get_checkpoint_file())
        finally:
            self._strict, self._resumes = type(self)._strict, False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Detectron2, but a file is data: nothing that it names is run.

        Raises:
            ConfigError: the file is missing, damaged, or cannot be read as a checkpoint, or has
                other things in it than tensors, arrays and plain containers; or it is to be
                resumed, and does not fit the model or has nothing but weights.
        """
        key = "--resume:" if self._resumes else "MODEL.WEIGHTS"
        try:
            if os.path.isfile(path):
                check_intact(path)
            return super().load(path, *args, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{key} {path}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{key} {path} cannot be read: {why_not_loaded(error)}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        """As in Detectron2, without running what the file names."""
        with only_data(detection_checkpoint):
            return super()._load_file(filename)

    def _load_model(self, checkpoint: Any) -> _IncompatibleKeys:
        for key in self.checkpointables if self._resumes else ():
            if key not in checkpoint:
                raise ConfigError(
                    f'it has no "{key}", so no training can go on from it. To begin with its '
                    "weights, give it as MODEL.WEIGHTS, and another OUTPUT_DIR."
                )
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        if not self._strict:
            super()._log_incompatible_keys(incompatible)
            return
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
        problems = [
            f"{len(keys)} {what}: {listed(keys, _KEYS_SHOWN)}"
            for what, keys in parts.items()
            if keys
        ]
        if problems:
            raise ConfigError(f"the weights do not fit the model. {'; '.join(problems)}.")


class StrictCheckpointer(AtomicCheckpointer):
    """Refuses weights that do not fit the model, instead of logging them."""

    _strict = True


def _essential(keys: Iterable[str]) -> list[str]:
    """Without the counters of training steps, which inference does not use."""
    return sorted(key for key in keys if not key.endswith("num_batches_tracked"))
