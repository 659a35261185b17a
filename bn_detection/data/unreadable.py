"""Images that cannot be decoded: passed over, named, and counted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from detectron2.data.detection_utils import SizeMismatchError, read_image
from detectron2.utils import comm

from ..config import ConfigError, one_line
from .records import image_file_problem, original_path
from .stream import iterate

logger = logging.getLogger(__name__)

FILE_NAME = "unreadable_images.txt"
"""In OUTPUT_DIR: one file name a line, written by each process that met it."""

_MOST_FAILURES = 100
_NAMES_SHOWN = 5

Mapper = Callable[[dict[str, Any]], Any]


def unreadable_file(output_dir: str) -> str:
    """Where the processes of a job note the images that they could not read."""
    return os.path.join(output_dir, FILE_NAME)


def read_unreadable(output_dir: str) -> set[str]:
    """The distinct names of images noted as unreadable under ``output_dir`` so far."""
    try:
        with open(unreadable_file(output_dir), encoding="utf-8") as file:
            return {line.rstrip("\n") for line in file}
    except FileNotFoundError:
        return set()


def report_unreadable(output_dir: str) -> int:
    """Warn of the images that could not be read, if there are any.

    Args:
        output_dir: OUTPUT_DIR of the job.

    Returns:
        How many distinct images could not be read.
    """
    names = sorted(read_unreadable(output_dir))
    if names:
        logger.warning(
            "Unreadable images left out: %d (%s%s). All names: %s",
            len(names),
            ", ".join(names[:_NAMES_SHOWN]),
            ", ..." if len(names) > _NAMES_SHOWN else "",
            unreadable_file(output_dir),
        )
    return len(names)


class SkipUnreadable:
    """A mapper that passes over images which cannot be decoded.

    In training it returns None for one, which makes Detectron2's ``MapDataset`` take another image.
    In testing it returns a marker that :class:`ReadableLoader` drops, so that no other image is
    evaluated in its place. Failures other than reading the image, such as wrong annotations, are
    raised as they are.
    """

    def __init__(
        self,
        mapper: Mapper,
        output_dir: str,
        *,
        dataset: str,
        num_images: int | None = None,
    ) -> None:
        """
        Args:
            mapper: what Detectron2's DatasetMapper does: takes a dataset dict with ``file_name``.
            output_dir: the names are noted there, in :data:`FILE_NAME`.
            dataset: its name, for messages.
            num_images: in training, how many image files it has; None in testing.
        """
        self._mapper = mapper
        self._output_dir = output_dir
        self._dataset = dataset
        self._num_images = num_images
        # Those that could not be read when they were last tried, and all that have been noted.
        self._failing: set[str] = set()
        self._noted: set[str] = set()
        self._any_read = False

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Map one dataset dict.

        Raises:
            ConfigError: an image has another size than its record says; in training, the first 100
                distinct images (or all of them, if they are fewer) could not be read by this
                process, or later all could not when they were last tried.
        """
        name = dataset_dict["file_name"]
        reason = image_file_problem(name)  # before reading, which would wait for a pipe
        if reason is None:
            try:
                mapped = self._mapper(dataset_dict)
                self._any_read = True
                self._failing.discard(original_path(name))
                return mapped
            except SizeMismatchError as error:
                raise ConfigError(f'Dataset "{self._dataset}": {one_line(error)}') from error
            except Exception:
                reason = _why_unreadable(name)
                if reason is None:
                    raise
        self._note(name, reason)
        return None if self._num_images is not None else _marker(name)

    def _note(self, name: str, reason: str) -> None:
        name = original_path(name)  # the same image for every corruption
        self._failing.add(name)
        if name not in self._noted:
            self._noted.add(name)
            self._write(name, reason)
        if self._num_images is None:
            return
        most = self._num_images if self._any_read else min(self._num_images, _MOST_FAILURES)
        if len(self._failing) >= most:
            raise _none_readable(self._dataset, len(self._failing), name, reason)

    def _write(self, name: str, reason: str) -> None:
        logger.warning("Cannot read the image %s, which is left out: %s", name, reason)
        os.makedirs(self._output_dir, exist_ok=True)
        with open(unreadable_file(self._output_dir), "a", encoding="utf-8") as file:
            file.write(name + "\n")


def _marker(name: str) -> dict[str, Any]:
    return {"unreadable": True, "file_name": name}


def _why_unreadable(name: str) -> str | None:
    """Why an image cannot be decoded, or None if it can."""
    if problem := image_file_problem(name):
        return problem
    try:
        read_image(name, format="RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return f"{type(error).__name__}: {error}"
    return None


def _none_readable(dataset: str, count: int, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f'Dataset "{dataset}": none of the {count} images tried could be read; the last one was '
        f"{name} ({reason})."
    )


class ReadableLoader:
    """A test loader without the images that cannot be read.

    Its length is that of the loader it wraps, which counts them.
    """

    def __init__(self, loader: Iterable[list[dict[str, Any]]], dataset: str) -> None:
        """
        Args:
            loader: has a length, and a mapper that is :class:`SkipUnreadable`.
            dataset: its name, for messages.
        """
        self._loader = loader
        self._dataset = dataset

    @property
    def dataset(self) -> Any:
        """The wrapped loader's dataset; an image that cannot be read is a marker there."""
        return self._loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of mapped dataset dicts; a batch with no readable image is left out.

        Raises:
            ConfigError: a single process could read no image at all. With several, some may have
                none, and the evaluator decides.
        """
        num_dropped, any_read = 0, False
        for batch in iterate(self._loader):
            readable = [item for item in batch if not item.get("unreadable")]
            num_dropped += len(batch) - len(readable)
            if readable:
                any_read = True
                yield readable
            else:
                last = batch[-1]["file_name"]
        if num_dropped and not any_read and comm.get_world_size() == 1:
            reason = _why_unreadable(last) or "now it can be read"
            raise _none_readable(self._dataset, num_dropped, last, reason)
