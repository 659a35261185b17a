"""Where the commands of a study run: in processes of this machine, or in jobs of Slurm."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from . import process
from .folder import SLURM_FOLDER
from .matrix import Task

EXECUTORS = ("local", "slurm")
_TERMINATE_SECONDS = 10.0
_SQUEUE_SECONDS = 5.0
# NFS shows what another machine has written some 60 seconds later.
_RECORD_SECONDS = 90.0
_TAIL_LINES = 8
_MOST_JOBS = 1000
# A day: submitit's own default of five minutes would end nearly every training.
_TIMEOUT_MIN = 1440
# Of submitit, those whose values are no text; and those that give a job GPUs.
_JSON_KEYS = ("mem_gb", "setup", "teardown", "srun_args", "additional_parameters")
_GPU_KEYS = {"gpus", "gpus_per_node", "gpus_per_task", "num_gpus", "gres"}


class SubmissionError(RuntimeError):
    """Slurm did not take a job, or did not answer; later it may."""


def is_done(task: Task) -> bool:
    """Whether a task has its record, also if another machine wrote it just now."""
    # NFS remembers for a minute that a file was missing, unless its folder is listed.
    with contextlib.suppress(FileNotFoundError):
        os.listdir(task.record.parent)
    return task.record.is_file()


class Executor:
    """Runs the commands of a study: each by :mod:`.process`, which writes its log and its record.

    Attributes:
        jobs: tasks that it runs at once.
        seconds_between_polls: how often to ask it for a status.
    """

    jobs: int
    seconds_between_polls: float

    def find(self, tasks: Collection[Task]) -> dict[Task, str]:
        """Those of ``tasks`` that an earlier runner started and that still go on, and as what."""
        raise NotImplementedError

    def start(self, task: Task, keep: Sequence[int] = ()) -> None:
        """Start a task.

        Args:
            task: to start; there must be a free place.
            keep: file descriptors that it keeps open, if it runs on this machine.

        Raises:
            SubmissionError: it may be started later.
        """
        raise NotImplementedError

    def status(self, task: Task) -> int | None:
        """The exit status of a task that was started or found; None while it runs."""
        raise NotImplementedError

    def explain(self, task: Task) -> None:
        """Add to the log of a task that failed what it does not say itself."""

    def cancel(self) -> None:
        """End everything that runs."""
        raise NotImplementedError

    def leave(self) -> str:
        """Stop watching. What goes on without the runner, and how to end it, for people."""
        self.cancel()
        return ""

    @staticmethod
    def _program(task: Task, parent: int | None = None, keep: Sequence[int] = ()) -> list[str]:
        specification = {
            "command": task.command,
            "log": str(task.log.absolute()),
            "record": str(task.record.absolute()),
            "leftovers": [str(path.absolute()) for path in task.leftovers],
            "parent": parent,
            "keep": list(keep),
        }
        return [sys.executable, process.__file__, json.dumps(specification)]


class LocalExecutor(Executor):
    """Runs each task in processes of this machine, which end with this one.

    Where there are GPUs, each worker of a task has one, shared with other tasks only if ``jobs``
    are more than there are GPUs for.

    Args:
        jobs: tasks at once; None for as many as there are cores, or GPUs, for the workers of each.
        workers: the most processes of a task.
        device: MODEL.DEVICE of the tasks.
        folder: of the study, from which jobs of Slurm may have been submitted.

    Raises:
        ConfigError: there are fewer GPUs than a task has workers.
    """

    seconds_between_polls = 0.2

    def __init__(
        self,
        jobs: int | None = 1,
        *,
        workers: int = 1,
        device: str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        gpus = _gpus() if torch.device(device).type == "cuda" else []
        self.jobs = jobs or max(1, (len(gpus) or _cores()) // workers)
        if self.jobs > _MOST_JOBS:
            raise ConfigError(f"--jobs {self.jobs}: at most {_MOST_JOBS} run at once on a machine.")
        if gpus and workers > len(gpus):
            raise ConfigError(
                f"The study has tasks of {workers} workers, which need a GPU each; there are "
                f"{len(gpus)}: write workers: {len(gpus)} into its file (BN.VIRTUAL_WORKERS lets "
                f"them stand for {workers}), or add MODEL.DEVICE cpu."
            )
        starts = range(0, len(gpus) - workers + 1, workers)
        self._gpus = Counter({",".join(gpus[k : k + workers]): 0 for k in starts})
        self._running: dict[Task, tuple[subprocess.Popen[bytes], str]] = {}

    def find(self, tasks: Collection[Task]) -> dict[Task, str]:
        """None: they ended with the runner that started them.

        Raises:
            ConfigError: jobs of Slurm do some of them, or squeue cannot say whether they do.
        """
        missing = [task for task in tasks if not is_done(task)]
        submitted = self._folder and self._folder / SLURM_FOLDER
        if not missing or not submitted or not submitted.exists():
            return {}
        start = f"--executor local: jobs of Slurm were submitted from {self._folder}"
        try:
            queue = _squeue()
        except SubmissionError as error:
            raise ConfigError(
                f"{start}, and whether they go on is not known ({error}). Start it where squeue "
                f"answers, or, if none goes on, remove {submitted}."
            ) from error
        if jobs := " ".join(queue[name] for name in map(_job_name, missing) if name in queue):
            raise ConfigError(
                f"{start}, and {jobs} go on: give --executor slurm, or end them: scancel {jobs}."
            )
        return {}

    def start(self, task: Task, keep: Sequence[int] = ()) -> None:
        gpus = min(self._gpus, key=self._gpus.__getitem__, default="")
        self._gpus[gpus] += 1
        devices = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        started = subprocess.Popen(
            self._program(task, os.getpid(), keep),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **devices},
            pass_fds=keep,
            # Ctrl-C must reach the runner alone, which ends its tasks in an orderly way.
            start_new_session=True,
        )
        self._running[task] = (started, gpus)

    def status(self, task: Task) -> int | None:
        started, gpus = self._running[task]
        if started.poll() is not None:
            self._gpus[gpus] -= 1
            del self._running[task]
        return started.returncode

    def cancel(self) -> None:
        """End everything that runs; at once, if it takes longer than 10 seconds."""
        running = [started for started, _ in self._running.values()]
        deadline = time.monotonic() + _TERMINATE_SECONDS
        try:
            for started in running:
                started.terminate()
            for started in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for started in running:
                if started.poll() is None:
                    os.killpg(started.pid, signal.SIGKILL)
                    started.wait()
            self._running.clear()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES can have here."""
    number = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:number] if visible else [str(k) for k in range(number)]


class SlurmExecutor(Executor):
    """Runs each task in a job of Slurm, which goes on without the runner.

    A job has a name that only its task has: the next runner finds it by that in the queue. Success
    is the record that the job writes into the folder, which all nodes must see.

    Args:
        folder: of the study; submitit's files go to ``slurm`` in it.
        jobs: jobs in the queue at once; None for all that can run.
        workers: the most processes of a task, and so the default of ``cpus_per_task``.
        device: MODEL.DEVICE of the tasks.
        parameters: of submitit's ``AutoExecutor``, those of Slurm without their ``slurm_``.
        cluster: of submitit: "slurm", or "local" in tests.

    Raises:
        ConfigError: submitit is not installed, Slurm is not there, or a parameter is wrong.
    """

    seconds_between_polls = 1.0

    def __init__(
        self,
        folder: Path,
        jobs: int | None = None,
        *,
        workers: int = 1,
        device: str = "cpu",
        parameters: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
    ) -> None:
        try:
            from submitit import AutoExecutor
        except ImportError:
            raise ConfigError(
                "--executor slurm needs submitit: pip install 'submitit>=1.5'"
            ) from None
        self.jobs = jobs or sys.maxsize
        self._folder = folder.absolute() / SLURM_FOLDER
        given = {"cpus_per_task": workers, "timeout_min": _TIMEOUT_MIN, **(parameters or {})}
        for key in ("nodes", "tasks_per_node"):
            if given.get(key, 1) != 1:
                raise ConfigError(
                    f"--slurm {key}={given[key]}: a task starts its workers itself, on one node. "
                    "Leave it out."
                )
        generic = ("cpus_per_task", "timeout_min", "gpus_per_node", "mem_gb")
        named = {k if k in generic else f"slurm_{k}": v for k, v in given.items()}
        try:
            self._submitit = AutoExecutor(self._folder, cluster=cluster)
            self._submitit.update_parameters(**named)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"--executor slurm: {error}") from error
        keys = {*given, *(k.replace("-", "_") for k in given.get("additional_parameters", ()))}
        if torch.device(device).type == "cuda" and not keys & _GPU_KEYS:
            raise ConfigError(
                f"--executor slurm: MODEL.DEVICE is {device}, and the jobs ask for no GPU: add "
                f"--slurm gpus_per_node={workers}, or MODEL.DEVICE cpu."
            )
        self._ids: dict[Task, str] = {}
        self._gone: dict[Task, float] = {}
        self._queue: dict[str, str] = {}
        self._asked = 0.0

    def find(self, tasks: Collection[Task]) -> dict[Task, str]:
        """Those of ``tasks`` that have a job in the queue, and which.

        Raises:
            SubmissionError: squeue failed.
        """
        self._ask()
        names = {task: _job_name(task) for task in tasks}
        found = {task: self._queue[n] for task, n in names.items() if n in self._queue}
        self._ids.update(found)
        return {task: f"Slurm job {job_id}" for task, job_id in found.items()}

    def start(self, task: Task, keep: Sequence[int] = ()) -> None:
        name = _job_name(task)
        self._submitit.update_parameters(name=name)
        try:
            # It prints what it raises.
            with contextlib.redirect_stderr(io.StringIO()):
                job = self._submitit.submit(subprocess.check_call, self._program(task))
        except RuntimeError as error:
            raise SubmissionError(f"--executor slurm: sbatch failed: {error}") from error
        self._ids[task] = self._queue[name] = job.job_id

    def status(self, task: Task) -> int | None:
        """0 once a task has its record, 1 if it has none and left the queue; else None."""
        if time.monotonic() - self._asked > _SQUEUE_SECONDS:
            # Slurm's controller may be away for minutes: its jobs go on.
            with contextlib.suppress(SubmissionError):
                self._ask()
        if is_done(task):
            return 0
        if _job_name(task) in self._queue:
            return None
        gone = self._gone.setdefault(task, time.monotonic())
        return 1 if time.monotonic() - gone > _RECORD_SECONDS else None

    def explain(self, task: Task) -> None:
        """Add the end of what its job said, such as that it met its time limit."""
        of_job = self._folder / f"{self._ids[task]}_0_log.err"
        # It may not be there, and the disk may be full.
        with contextlib.suppress(OSError):
            lines = of_job.read_text(errors="replace").splitlines()
            # Without the inside of submitit's traceback.
            lines = [line for line in lines if not line.startswith(" ")][-_TAIL_LINES:]
            task.log.parent.mkdir(parents=True, exist_ok=True)
            with task.log.open("a") as file:
                print(f"\nThe end of {of_job}:", *lines, sep="\n", file=file)

    def leave(self) -> str:
        """Leave the jobs to Slurm."""
        if not (left := self._left()):
            return ""
        return (
            f"Slurm jobs {', '.join(left)} go on, and the same command finds them; "
            f"scancel {' '.join(left)} ends them. "
        )

    def cancel(self) -> None:
        if left := self._left():
            subprocess.run(["scancel", *left], check=False)

    def _left(self) -> list[str]:
        """The ids of the jobs in the queue of tasks that are not done."""
        names = [_job_name(task) for task in self._ids if not task.record.is_file()]
        return [self._queue[name] for name in names if name in self._queue]

    def _ask(self) -> None:
        self._asked = time.monotonic()
        self._queue = _squeue()


def _squeue() -> dict[str, str]:
    """The id of each job of this user that waits or runs, by name."""
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i %j"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "").strip() or error
        raise SubmissionError(f"squeue failed: {reason}") from error
    lines = (line.split(maxsplit=1) for line in asked.stdout.splitlines())
    return {name: job_id for job_id, name in lines}


def _job_name(task: Task) -> str:
    """The same for the same record, and no other's."""
    number = hashlib.sha1(str(task.record.resolve()).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', task.title)}-{number}"


def parse_slurm(parameters: Sequence[str]) -> dict[str, Any]:
    """The values of ``--slurm KEY=VALUE ...``: whole numbers, true, false, or text as it is given.

    Raises:
        ConfigError: one of them has no ``=``, or no value of its key.
    """
    return dict(map(_parse_parameter, parameters))


def _parse_parameter(parameter: str) -> tuple[str, Any]:
    key, equals, text = parameter.partition("=")
    if not equals:
        raise ConfigError(f"--slurm {parameter}: write KEY=VALUE, such as partition=gpu.")
    if key == "time":
        raise ConfigError(f"--slurm {parameter}: write timeout_min=MINUTES.")
    if key in _JSON_KEYS:
        try:
            return key, json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--slurm {parameter}: {key} takes JSON ({error}).") from error
    if re.fullmatch("0|[1-9][0-9]*", text):
        return key, int(text)
    return key, {"true": True, "false": False}.get(text, text)
