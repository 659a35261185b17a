"""The folder of a study: one study's, and one process's at a time."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import ConfigError
from ..files import FolderLock
from .process import write_json
from .study_file import TAKEN, Overrides, Study

_RECORD = "study.json"
# What a start has left that was killed before it had written the record.
_BEGUN = {FolderLock.FILE_NAME, f"{_RECORD}.partial"}
_RECORDS = {"training.json", "recalibration.json", "evaluation.json"}
SLURM_FOLDER = "slurm"
"""Of submitit's files, once a job was submitted."""
_KEYS_SHOWN = 5


@contextmanager
def claimed(
    folder: Path, study: Study, overrides: Overrides, configs: Mapping[str, CfgNode]
) -> Iterator[FolderLock]:
    """Work in a folder alone and on one study; seeds, runs and evaluations can be added to it.

    Args:
        folder: made if it is not there.
        study: the study.
        overrides: of the command line.
        configs: of the training of each run.

    Yields:
        The lock of the folder; a process that keeps its descriptor open keeps the folder.

    Raises:
        ConfigError: the folder has results of another study or of other settings, or another
            process works there.
    """
    # Here, so that nothing is left in a folder of something else; below, once nobody else writes.
    check_folder(folder, study, overrides, configs)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.take()
    try:
        settings = check_folder(folder, study, overrides, configs)
        write_json(folder / _RECORD, settings)
        yield lock
    finally:
        lock.release()


def check_folder(
    folder: Path, study: Study, overrides: Overrides, configs: Mapping[str, CfgNode]
) -> dict[str, Any]:
    """Whether results in a folder, if any, are of this study and these settings.

    A setting can be changed as long as no result depends on it.

    Args:
        folder: of the study; it need not be there.
        study: the study.
        overrides: of the command line.
        configs: of the training of each run.

    Returns:
        The settings on which results depend: those there, and the new ones.

    Raises:
        ConfigError: they are not; names the run or evaluation and what differs.
    """
    record = folder / _RECORD
    if not record.exists() and folder.exists() and {*os.listdir(folder)} - _BEGUN:
        raise ConfigError(f"{folder} has files, and none of a study; give another --output-dir.")
    before = _read(record) if record.exists() else {}
    now = _settings(study, overrides)
    for name, value in now.items():
        if before.get(name, value) != value:
            _check_unused(folder, name, f"{before[name]}, and not {value}")
    for run, cfg in configs.items():
        name = f"config of run {run}"
        now[name] = json.loads(json.dumps(dict(_flat(cfg))))
        # A key that only one has came or went with a version.
        changed = [
            f"{key} was {before[name][key]!r}, and is {value!r}"
            for key, value in now[name].items()
            if before.get(name, {}).get(key, value) != value
        ]
        if changed:
            more = f" (and {len(changed) - _KEYS_SHOWN} more)" if changed[_KEYS_SHOWN:] else ""
            change = f"in {study.runs[run].config}, {'; '.join(changed[:_KEYS_SHOWN])}{more}"
            _check_unused(folder, name, change)
    return {**before, **now}


def _check_unused(folder: Path, setting: str, change: str) -> None:
    """Refuse to change a setting with which a result was made, or may be in the making."""
    kind, _, name = setting.removeprefix("config of ").partition(" ")
    places = {
        "run": f"{glob.escape(name)}/seed_*",
        "evaluation": f"*/seed_*/evaluations/{glob.escape(name)}",
    }
    for file in folder.glob(f"{places.get(kind, '*/seed_*')}/*"):
        if file.name in _RECORDS or file.suffix == ".pth":
            raise ConfigError(
                f"{file} is of another {setting}: {change}. Give another --output-dir, or remove "
                "what there is of it."
            )
    jobs = folder / SLURM_FOLDER
    if jobs.exists():
        raise ConfigError(
            f"{jobs} is of another {setting}: {change}. Give another --output-dir, or remove it, "
            "once squeue shows none of its jobs."
        )


def _read(record: Path) -> dict[str, Any]:
    """What is recorded, in the form of today."""
    content = json.loads(record.read_text())
    for name, value in content.items():
        if name.startswith("evaluation "):
            content[name] = _given(value)
        elif name.startswith("run "):
            value.pop("config", None)
    return content


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted key, but for those that the runner chooses."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        elif prefix + key not in TAKEN:
            yield prefix + key, value


def _settings(study: Study, overrides: Overrides) -> dict[str, Any]:
    """What results depend on, seeds aside, as JSON has it."""
    settings = {"study": study.name, "workers": study.workers, "overrides": study.overrides}
    settings["command line"] = overrides
    for name, run in study.runs.items():
        # Its config is compared key by key.
        settings[f"run {name}"] = {"overrides": run.overrides}
    for name, evaluation in study.evaluations.items():
        settings[f"evaluation {name}"] = _given({**asdict(evaluation), "runs": None})
    return json.loads(json.dumps(settings, default=str))
