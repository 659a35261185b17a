"""Starts the workers of one machine by torch's elastic agent, and says which failed first, and why.

It is imported once there are workers to start.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from multiprocessing import spawn
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, get_error_handler
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from ..config import ConfigError, one_line
from ..files import replacing
from .launch import STOP_SIGNALS, Stopped, WorkerError, describe_failure, leave, work

_TERMINATE_SECONDS = 5
_WATCH_SECONDS = 0.5
_STOPPED = {128 + signum for signum in STOP_SIGNALS}
_JOB = "bn_detection"
# With the paths and the main module of the parent before anything else can be imported.
_WORKER = (
    "import pickle, sys; from multiprocessing import spawn; file = open(sys.argv[1], 'rb'); "
    "spawn.prepare(pickle.load(file)); pickle.load(file)()"
)


def run_workers(
    call: tuple[Any, ...],
    num_workers: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    max_restarts: int,
) -> None:
    """Run the workers of this machine to their end, or to the first failure.

    Args:
        call: the arguments of :func:`.work`; of the others :func:`.launch` tells, as of errors.
    """
    store, address = _open_store(dist_url, num_machines, machine_rank, timeout=call[-1])
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False  # it logs at length what is raised here
    rendezvous = DynamicRendezvousHandler.from_backend(
        *(_JOB, store, C10dRendezvousBackend(store, _JOB), num_machines, num_machines),
        local_addr="127.0.0.1",  # of a second store, which nobody uses
        timeout=RendezvousTimeout(join=call[-1]),
    )
    signals = (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {signum: signal.getsignal(signum) for signum in signals if _is_main_thread()}
    first_rank = machine_rank * num_workers
    with tempfile.TemporaryDirectory(prefix="bn_detection_") as folder:
        job = Path(folder, "job")
        preparation = spawn.get_preparation_data("worker")
        del preparation["authkey"]  # of multiprocessing, which does not start these
        work_there = partial(_work, os.getpid(), first_rank, call)
        job.write_bytes(pickle.dumps(preparation) + pickle.dumps(work_there))
        spec = WorkerSpec(
            *("worker", num_workers, rendezvous),
            entrypoint=sys.executable,
            args=("-c", _WORKER, str(job)),
            max_restarts=max_restarts,
            master_addr=address[0],
            master_port=address[1],
        )
        agent = _Agent(spec, folder, first_rank)
        try:
            _raise_signals()
            agent.run()
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            agent.check_end(error.sigval)
        except RendezvousError as error:
            reason = f"the workers of other machines cannot be reached ({one_line(error)})"
            raise agent.failure or WorkerError(f"{reason}: see what they say") from error
        finally:
            rendezvous.shutdown()
            for signum, handler in handlers.items():
                signal.signal(signum, handler or signal.SIG_DFL)


def _open_store(
    dist_url: str, num_machines: int, machine_rank: int, timeout: timedelta
) -> tuple[dist.TCPStore, tuple[str, int]]:
    """Where the machines meet, and its address; machine 0 holds it until its workers have ended."""
    host, port = "127.0.0.1", 0
    if dist_url != "auto":
        with contextlib.suppress(ValueError):
            url = urlsplit(dist_url)
            host, port = url.hostname if url.scheme == "tcp" else None, url.port
        if not host or not port:
            raise ConfigError(f"--dist-url {dist_url}: expected tcp://HOST:PORT")
    elif num_machines > 1:
        raise ConfigError(
            f"--dist-url auto cannot be used with --num-machines {num_machines}: give every "
            "machine the same --dist-url tcp://HOST:PORT, with a free port of machine 0"
        )
    is_master = machine_rank == 0
    try:
        store = dist.TCPStore(
            host, port, is_master=is_master, wait_for_workers=False, timeout=timeout
        )
    except dist.DistError as error:
        problem = "nobody answers there: is machine 0 started, and its port open?"
        if is_master:
            problem = "cannot listen there. Choose a free port of machine 0"
            problem += ", or leave --dist-url out" if num_machines == 1 else ""
        raise ConfigError(f"--dist-url {dist_url}: {problem} ({one_line(error)})") from error
    return store, (host, store.port)


class _Agent(LocalElasticAgent):
    """Torch's agent, with one cause for a failure, and time for workers that are asked to stop.

    Attributes:
        failure: of the workers that ran last.
    """

    failure: ConfigError | Stopped | WorkerError | None = None

    def __init__(self, spec: WorkerSpec, folder: str, first_rank: int) -> None:
        logs = DefaultLogsSpecs(log_dir=folder)
        super().__init__(spec, logs, exit_barrier_timeout=_TERMINATE_SECONDS)
        self._first_rank = first_rank

    def check_end(self, signum: int) -> None:
        """Raise how workers ended that a signal has asked to stop, unless all were done."""
        result = self._pcontext and self._pcontext.wait(0)
        if not result or result.failures:
            raise self._cause(result.failures.values() if result else (), signum)

    def _start_workers(self, group: WorkerGroup) -> dict[int, Any]:
        """Workers meet under the number of restarts: the machines agree on it."""
        used = group.spec.max_restarts - self._remaining_restarts
        group.store.set(f"restarts/{group.group_rank}", str(used))
        all_used = [group.store.get(f"restarts/{k}") for k in range(group.group_world_size)]
        self._remaining_restarts = group.spec.max_restarts - max(map(int, all_used))
        self.failure = None
        ids = super()._start_workers(group)
        _raise_signals()
        return ids

    def _monitor_workers(self, group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(group)
        if result.failures:
            self.failure = self._cause(result.failures.values())
            if not isinstance(self.failure, WorkerError) or not self._remaining_restarts:
                raise self.failure
        return result

    def _restart_workers(self, group: WorkerGroup) -> None:
        why, again = "workers of another machine failed", "the workers start again"
        if self.failure:
            used = group.spec.max_restarts - self._remaining_restarts
            why, again = self.failure, f"{again} ({used} of {group.spec.max_restarts} restarts)"
        print(f"error: {why}\n{again}", file=sys.stderr, flush=True)
        super()._restart_workers(group)

    def _shutdown(self, death_sig: signal.Signals | None = None, *_: Any, **__: Any) -> None:
        if self._pcontext is None:
            return
        processes = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
        try:
            if death_sig in STOP_SIGNALS:
                # Not to their children: the iteration that they finish needs its data.
                for process in processes:
                    process.send_signal(death_sig)
                for process in processes:
                    process.wait()
            self._pcontext.close(signal.SIGTERM, _TERMINATE_SECONDS)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _cause(
        self, failures: Iterable[ProcessFailure], signum: int = 0
    ) -> ConfigError | Stopped | WorkerError:
        """The first failure; the others follow from it."""
        statuses = {failure.exitcode for failure in failures} & _STOPPED
        statuses |= {128 + signum} if signum else set()
        if statuses and not any(map(_report, failures)):
            return Stopped(max(statuses))
        first = min(failures, key=_when)
        summary, details = _report(first) or (_describe_exit(first.exitcode), "")
        kind, _, text = summary.partition(": ")
        group = self.get_worker_group()
        world_size = group.group_world_size * group.spec.local_world_size
        rank = self._first_rank + first.local_rank
        error = WorkerError(describe_failure(rank, world_size, summary, details))
        if kind != ConfigError.__name__:
            return error
        config_error = ConfigError(text)
        config_error.__cause__ = error  # for --traceback
        return config_error


def _report(failure: ProcessFailure) -> tuple[str, str] | None:
    """What a worker has said, and its traceback."""
    said = failure.error_file_data["message"]
    return None if isinstance(said, str) else (said["message"], said["extraInfo"]["py_callstack"])


def _when(failure: ProcessFailure) -> float:
    """Seconds that tell the first failure."""
    if _report(failure):
        return os.stat(failure.error_file).st_mtime
    # SIGTERM is how the agent ends the others, SIGABRT how torch does. Another silent death comes
    # from outside: peers report it before the agent, which counts whole seconds, can see it.
    follows = failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT)
    return math.inf if follows else failure.timestamp - 2


def _describe_exit(code: int) -> str:
    if code > 0:
        return f"it exited with status {code}, without an exception"
    name = next((one.name for one in signal.Signals if one == -code), f"signal {-code}")
    hint = ""
    if code == -signal.SIGKILL:
        hint = (
            ". The usual reason is the system running out of memory: try fewer workers, fewer "
            "images per batch (SOLVER.IMS_PER_BATCH) or fewer DATALOADER.NUM_WORKERS"
        )
    return f"it was killed by {name}{hint}"


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_signals() -> None:
    """Instead of torch's handlers: only the first signal that asks to stop is raised."""

    def note(signum: int, _frame: FrameType | None) -> NoReturn:
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise SignalException(f"signal {signum}", signal.Signals(signum))

    for signum in STOP_SIGNALS if _is_main_thread() else ():
        signal.signal(signum, note)


def _work(parent: int, first_rank: int, call: tuple[Any, ...]) -> NoReturn:
    """Be a worker to its end."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Agents number the machines as they come; the store is there whatever the user has set.
    os.environ["RANK"] = str(first_rank + int(os.environ["LOCAL_RANK"]))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        work(*call)
    except Stopped as stopped:
        leave(stopped.code)
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit) or error.code:
            # An agent that reads half a report fails.
            with replacing(os.environ["TORCHELASTIC_ERROR_FILE"]) as file:
                os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
                of_any_kind = ConfigError(error) if isinstance(error, ConfigError) else error
                get_error_handler().record_exception(of_any_kind)
            leave(1)
    leave()


def _end_with(parent: int) -> NoReturn:
    """Leave nothing behind when the parent is killed, even if this worker waits for another."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)
