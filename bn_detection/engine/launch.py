"""Starts the workers of a job, and reports the first failure among them.

A job of one worker is a plain function call. Several workers are spawned here, or were started by
``torchrun``. They talk over NCCL where each has a GPU, otherwise over gloo.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, parent_process
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from bn_detection.config import ConfigError
from bn_detection.files import naming_full_disks

__all__ = [
    "DEFAULT_TIMEOUT",
    "STOP_SIGNALS",
    "Stopped",
    "WorkerError",
    "launch",
    "run",
]

DEFAULT_TIMEOUT = timedelta(minutes=30)

#: What asks a job to stop; a training then writes a checkpoint first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_POLL_SECONDS = 0.2
# Peers can notice that a worker was killed some milliseconds before its parent can.
_SETTLE_SECONDS = 0.5
_TERMINATE_SECONDS = 5.0
_STOPPED = tuple(128 + signum for signum in STOP_SIGNALS)
_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


class Stopped(SystemExit):
    """All workers have stopped as they were asked to: by a signal, of number ``code - 128``."""


class WorkerError(RuntimeError):
    """One of several workers failed; the message has its rank, the cause, and its traceback."""


def run(
    main_func: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    get_device: Callable[[argparse.Namespace], str],
) -> Any:
    """Run a command line tool: launch its workers, and end the process as a tool should.

    A :class:`ConfigError` prints its message once, with ``--traceback`` also where it comes from,
    and exits with status 2. A failed worker prints its rank and traceback and exits with status 1,
    Ctrl-C exits with status 130, a job that was stopped by SIGTERM or SIGUSR1 with 128 and its
    number. The exception of a single process passes through.

    Args:
        main_func: called as ``main_func(args)`` in each worker; it must be importable.
        args: what :func:`bn_detection.engine.argument_parser` parsed.
        get_device: called as ``get_device(args)`` before the workers start; returns MODEL.DEVICE.

    Returns:
        What ``main_func`` returned, or None if several workers were spawned. Under torchrun it does
        not return: the process ends.
    """
    try:
        result = launch(
            main_func,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            device=get_device(args),
            args=(args,),
        )
        if dist.is_torchelastic_launched():
            _leave()
        return result
    except ConfigError as error:
        if _is_first_to_report():
            if getattr(args, "traceback", False):
                traceback.print_exc()
            print(f"error: {_without_traceback(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Stopped as stopped:
        if dist.is_torchelastic_launched():
            _leave(stopped.code)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def launch(
    main_func: Callable[..., Any],
    num_workers_per_machine: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: Sequence[Any] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> Any:
    """Call ``main_func(*args)`` in each of the workers, inside a process group.

    Call it on every machine of the job. Under ``torchrun`` nothing is started: this process is one
    of the workers. One worker on one machine is called directly, without a process group.

    Source: ``detectron2.engine.launch``, whose arguments these are, except ``device``.

    Args:
        main_func: what a worker does; importable, because workers are spawned.
        num_workers_per_machine: one for each GPU to use, or the number of CPU processes.
        num_machines: machines in the job.
        machine_rank: which of them this is, from 0.
        dist_url: where workers meet: "auto" (one machine: a free port) or a torch.distributed URL.
        device: MODEL.DEVICE. Workers use CPU and gloo unless it is CUDA and there is a GPU.
        args: arguments of ``main_func``; they are pickled.
        timeout: how long a worker waits for the others, to start and in collectives.

    Returns:
        What ``main_func`` returned, in a process that called it; None if workers were spawned.

    Raises:
        ConfigError: the arguments do not fit each other, the GPUs, or torchrun's; or a worker
            raised it.
        WorkerError: one of several workers failed. The others have been ended.
        Stopped: the workers were asked to stop.
    """
    use_gpus = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if os.environ.keys() >= _TORCHRUN_VARIABLES:
        return _join_torchrun(
            main_func, num_workers_per_machine, num_machines, dist_url, use_gpus, args, timeout
        )
    if num_machines < 1:
        raise ConfigError(f"--num-machines {num_machines}: at least 1 is needed")
    if not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"--machine-rank {machine_rank}: with --num-machines {num_machines} it must be "
            f"from 0 to {num_machines - 1}"
        )
    _check_num_workers("--num-gpus", num_workers_per_machine, use_gpus)
    if num_machines * num_workers_per_machine == 1:
        with naming_full_disks():
            return main_func(*args)

    # Kept alive here until the workers are done.
    store, address = _open_rendezvous(dist_url, num_machines, machine_rank, timeout)
    job = _Job(
        main_func,
        tuple(args),
        num_workers_per_machine,
        num_machines,
        machine_rank,
        address,
        use_gpus,
        timeout,
    )
    _spawn(job)
    del store
    return None


def _without_traceback(error: ConfigError) -> str:
    """What it says; torch puts the traceback of a data loader's process into the message."""
    return str(error).rpartition(f"{ConfigError.__module__}.{ConfigError.__name__}: ")[2].strip()


@dataclass(frozen=True)
class _Job:
    """What the workers of one machine are told."""

    main_func: Callable[..., Any]
    args: tuple[Any, ...]
    num_workers: int
    num_machines: int
    machine_rank: int
    # Of the TCPStore, or a URL that torch handles.
    address: tuple[str, int] | str
    use_gpus: bool
    timeout: timedelta

    @property
    def world_size(self) -> int:
        return self.num_machines * self.num_workers


@dataclass(frozen=True)
class _Failure:
    """What a failing worker tells its parent."""

    time: float
    is_config_error: bool
    summary: str
    traceback: str


def _check_num_workers(flag: str, num_workers: int, use_gpus: bool) -> None:
    if num_workers < 1:
        raise ConfigError(f"{flag} {num_workers}: at least 1 worker is needed")
    if use_gpus and num_workers > torch.cuda.device_count():
        raise ConfigError(
            f"{flag} {num_workers}: this machine has {torch.cuda.device_count()} GPU(s), one for "
            f"each worker. Ask for fewer workers, or run them on CPU with MODEL.DEVICE cpu"
        )


def _open_rendezvous(
    dist_url: str, num_machines: int, machine_rank: int, timeout: timedelta
) -> tuple[dist.TCPStore | None, tuple[str, int] | str]:
    """Open the workers' meeting point, if it is this process that has to.

    Holding the store here, and not in the worker of rank 0, finds a port that is in use before
    any worker starts, leaves no gap between finding a free port and taking it, and lets the store
    outlive every worker.

    Returns:
        The store to keep alive, and what the workers need to reach it.
    """
    if dist_url == "auto":
        if num_machines > 1:
            raise ConfigError(
                f"--dist-url auto cannot be used with --num-machines {num_machines}: give every "
                "machine the same --dist-url tcp://HOST:PORT, with a free port of machine 0"
            )
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return store, ("127.0.0.1", store.port)

    try:
        url = urlsplit(dist_url)
        host, port = url.hostname, url.port
    except ValueError:
        raise ConfigError(f"--dist-url {dist_url}: expected tcp://HOST:PORT") from None
    if url.scheme != "tcp":
        return None, dist_url
    if not host or not port:
        raise ConfigError(f"--dist-url {dist_url}: expected tcp://HOST:PORT")
    if machine_rank > 0:
        return None, (host, port)
    try:
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"--dist-url {dist_url}: cannot listen there. Choose a free port of machine 0"
            + (", or leave --dist-url out" if num_machines == 1 else "")
            + f" ({error})"
        ) from error
    return store, (host, port)


def _call_in_process_group(
    main_func: Callable[..., Any],
    args: Sequence[Any],
    use_gpus: bool,
    local_rank: int,
    num_local_workers: int,
    timeout: timedelta,
    **rendezvous: Any,
) -> Any:
    if use_gpus:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local_workers))
    dist.init_process_group("nccl" if use_gpus else "gloo", timeout=timeout, **rendezvous)
    _create_local_process_group(num_local_workers)
    # As upstream does: the first collective must not wait longer than the others for slow starters.
    comm.synchronize()
    with naming_full_disks():
        result = main_func(*args)
    # Nobody leaves while another may still need it.
    comm.synchronize()
    return result


def _create_local_process_group(num_local_workers: int) -> None:
    """The group behind ``comm.get_local_rank()``, which Detectron2 v0.6 makes in its launch."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_local_workers)
        return
    for first in range(0, dist.get_world_size(), num_local_workers):
        ranks = range(first, first + num_local_workers)
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


# ---------------------------------------------------------------------------------------------
# Workers that torchrun started
# ---------------------------------------------------------------------------------------------


def _join_torchrun(
    main_func: Callable[..., Any],
    num_workers: int,
    num_machines: int,
    dist_url: str,
    use_gpus: bool,
    args: Sequence[Any],
    timeout: timedelta,
) -> Any:
    rank, world_size, local_rank, num_local_workers = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    for flag, value, default, actual in (
        ("--num-gpus", num_workers, 1, num_local_workers),
        ("--num-machines", num_machines, 1, world_size // num_local_workers),
        ("--dist-url", dist_url, "auto", "auto"),
    ):
        if value not in (default, actual):
            raise ConfigError(
                f"{flag} {value} contradicts torchrun, which started {num_local_workers} worker(s) "
                f"on this machine and {world_size} in all. Leave it out, or do not use torchrun"
            )
    _check_num_workers("torchrun --nproc-per-node", num_local_workers, use_gpus)
    if world_size == 1:
        with naming_full_disks():
            return main_func(*args)
    try:
        result = _call_in_process_group(
            main_func,
            args,
            use_gpus,
            local_rank,
            num_local_workers,
            timeout,
            init_method="env://",
        )
        # Not after a failure, when it could wait for workers that are gone.
        dist.destroy_process_group()
        return result
    except ConfigError:
        raise
    except Exception as error:
        get_error_handler().record_exception(error)
        raise WorkerError(
            _describe(rank, world_size, _summary(error), traceback.format_exc())
        ) from error


def _is_first_to_report() -> bool:
    """Whether this process should print a ConfigError, which usually all workers raise.

    Only torchrun's workers have to agree on that. Its agent holds a store that outlives them.
    """
    if not dist.is_torchelastic_launched():
        return True
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        return store.add("bn_detection/config_errors", 1) == 1
    except dist.DistError:
        return os.environ["LOCAL_RANK"] == "0"


# ---------------------------------------------------------------------------------------------
# Workers that are spawned here: the parent's side
# ---------------------------------------------------------------------------------------------


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, job: _Job, local_rank: int) -> None:
        context = mp.get_context("spawn")
        self.rank = job.machine_rank * job.num_workers + local_rank
        self._reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work, args=(job, self.rank, local_rank, writer), name=f"rank {self.rank}"
        )
        self._failure: _Failure | None = None
        self.process.start()
        writer.close()

    def failure(self) -> _Failure | None:
        """What the worker reported, if it did. Ask for the exit code before, not after."""
        if self._failure is None:
            with contextlib.suppress(EOFError):
                if self._reader.poll():
                    self._failure = self._reader.recv()
        return self._failure

    def send_signal(self, signum: signal.Signals) -> None:
        """To the worker and its children, such as those of data loaders."""
        if self.process.is_alive():
            os.kill(self.process.pid, signum)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)


def _spawn(job: _Job) -> None:
    """Run the workers of this machine to their end, or to the first failure.

    Raises:
        ConfigError: a worker raised it.
        WorkerError: a worker failed in another way.
        Stopped: a signal asked to stop, which was passed on to them.
    """
    workers: list[_Worker] = []
    asked: list[int] = []
    with contextlib.ExitStack() as stack:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) == signal.SIG_DFL:
                stack.enter_context(_handle(signum, lambda signum, _: asked.append(signum)))
        try:
            # Ignoring is inherited: Ctrl-C must reach this process alone, which ends the workers.
            with _handle(signal.SIGINT, signal.SIG_IGN):
                for local_rank in range(job.num_workers):
                    workers.append(_Worker(job, local_rank))
            _wait(workers, job.world_size, asked)
        except BaseException:
            _end(workers)
            raise


def _wait(workers: list[_Worker], world_size: int, asked: Sequence[int] = ()) -> None:
    running, passed_on = workers, 0
    while running:
        # Time limited, because a worker's children keep its sentinel from firing.
        connection.wait([worker.process.sentinel for worker in running], _POLL_SECONDS)
        for signum in asked[passed_on:]:
            passed_on += 1
            for worker in running:
                # Not to its children: the iteration that it finishes needs its data.
                if worker.process.is_alive():
                    os.kill(worker.process.pid, signum)
        codes = {worker.process.exitcode for worker in workers} - {None, 0, *_STOPPED}
        # Who has no training to finish is ended by the signal itself.
        if any(-signum in codes for signum in asked):
            raise Stopped(128 + asked[0])
        if codes or any(worker.failure() for worker in running):
            time.sleep(_SETTLE_SECONDS)
            raise _first_failure(workers, world_size)
        running = [worker for worker in running if worker.process.exitcode is None]
    stopped = {worker.process.exitcode for worker in workers} & {*_STOPPED}
    if stopped:
        raise Stopped(max(stopped))


def _first_failure(workers: list[_Worker], world_size: int) -> ConfigError | WorkerError:
    """The root cause: the failures that follow from it are later."""
    exit_codes = [worker.process.exitcode for worker in workers]
    failures = [(worker.rank, failure) for worker in workers if (failure := worker.failure())]
    silent = [
        (worker.rank, code)
        for worker, code in zip(workers, exit_codes, strict=True)
        if code and worker.failure() is None
    ]
    # A worker that dies without a report was ended from outside, and so is a cause. SIGABRT is
    # how torch ends a worker whose peers are gone.
    causes = [(rank, code) for rank, code in silent if code != -signal.SIGABRT]
    if causes or not failures:
        rank, code = (causes or silent)[0]
        return WorkerError(_describe(rank, world_size, _describe_exit(code)))
    rank, first = min(failures, key=lambda item: item[1].time)
    if first.is_config_error:
        error = ConfigError(first.summary)
        # For --traceback.
        error.__cause__ = WorkerError(first.traceback)
        return error
    return WorkerError(_describe(rank, world_size, first.summary, first.traceback))


def _end(workers: list[_Worker]) -> None:
    with _handle(signal.SIGINT, signal.SIG_IGN), _handle(signal.SIGTERM, signal.SIG_IGN):
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for worker in workers:
                worker.send_signal(signum)
            deadline = time.monotonic() + _TERMINATE_SECONDS
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))


def _describe(rank: int, world_size: int, summary: str, details: str = "") -> str:
    return f"worker failed (rank {rank} of {world_size}): {summary}\n{details}".rstrip()


def _describe_exit(code: int) -> str:
    if code > 0:
        return f"it exited with status {code}, without an exception"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ""
    if code == -signal.SIGKILL:
        hint = (
            ". The usual reason is the system running out of memory: try fewer workers, fewer "
            "images per batch (SOLVER.IMS_PER_BATCH) or fewer DATALOADER.NUM_WORKERS"
        )
    return f"it was killed by {name}{hint}"


def _summary(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


@contextlib.contextmanager
def _handle(signum: signal.Signals, handler: Any) -> Iterator[None]:
    """Handle a signal in another way for a while. Only the main thread can, others do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, previous)


# ---------------------------------------------------------------------------------------------
# Workers that are spawned here: the worker's side
# ---------------------------------------------------------------------------------------------


def _work(job: _Job, rank: int, local_rank: int, reports: connection.Connection) -> None:
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if isinstance(job.address, str):
            rendezvous = {"init_method": job.address}
        else:
            rendezvous = {"store": dist.TCPStore(*job.address, timeout=job.timeout)}
        _call_in_process_group(
            job.main_func,
            job.args,
            job.use_gpus,
            local_rank,
            job.num_workers,
            job.timeout,
            rank=rank,
            world_size=job.world_size,
            **rendezvous,
        )
        _leave()
    except Stopped as stopped:
        _leave(stopped.code)
    except (Exception, SystemExit) as error:
        failure_time = time.monotonic()
        if isinstance(error, SystemExit) and not error.code:
            raise
        is_config_error = isinstance(error, ConfigError)
        summary = str(error) if is_config_error else _summary(error)
        sys.stdout.flush()
        sys.stderr.flush()
        reports.send(_Failure(failure_time, is_config_error, summary, traceback.format_exc()))
        sys.exit(1)


def _leave(status: int = 0) -> None:
    """End this worker as the interpreter does, but without unloading torch's native threads.

    That unloading can abort a worker that has done its work ("terminate called without an active
    exception", seen now and then with torch 2.14 over gloo).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """Leave no orphans, even when the parent is killed and this worker waits in a collective."""
    connection.wait([parent_process().sentinel])
    os.killpg(os.getpgrp(), signal.SIGKILL)
