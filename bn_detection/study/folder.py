"""The folder of a study: one study's, and one process's at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .study_file import Overrides, Study


@contextmanager
def claimed(folder: Path, study: Study, overrides: Overrides) -> Iterator[int]:
    """Work in a folder alone and on one study; seeds, runs and evaluations can be added to it.

    Args:
        folder: made if it is not there.
        study: the study.
        overrides: of the command line.

    Yields:
        A file descriptor; a process that keeps it open keeps the folder.

    Raises:
        ConfigError: the folder has results of another study or of other settings, or another
            process works there.
    """
    record = folder / "study.json"
    if not record.exists() and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has files, and none of a study; give another --output-dir.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process works in {folder}: wait for it, or end it first."
            ) from None
        before = json.loads(record.read_text()) if record.exists() else {}
        now = _settings(study, overrides)
        for name, value in now.items():
            if before.get(name, value) != value:
                raise ConfigError(
                    f"{record}: the results there are of another {name}: {before[name]}, and not "
                    f"{value}. Give another --output-dir, or remove that folder."
                )
        write_json(record, {**before, **now})
        yield lock.fileno()


def _settings(study: Study, overrides: Overrides) -> dict[str, Any]:
    """What results depend on, seeds aside, as JSON has it."""
    settings = {"study": study.name, "workers": study.workers, "overrides": study.overrides}
    settings["command line"] = overrides
    for name, run in study.runs.items():
        settings[f"run {name}"] = asdict(run)
    for name, evaluation in study.evaluations.items():
        settings[f"evaluation {name}"] = {**asdict(evaluation), "runs": None}
    return json.loads(json.dumps(settings, default=str))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
