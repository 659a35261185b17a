"""Starts the workers of a job, and reports the first failure among them.

A job of one worker is a plain function call. Several workers are started here (:mod:`.agent`), or
were started by ``torchrun``. They talk over NCCL where each has a GPU, otherwise over gloo.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
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
    "restarted",
    "run",
]

DEFAULT_TIMEOUT = timedelta(minutes=30)

#: What asks a job to stop; a training then writes a checkpoint first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


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
        What ``main_func`` returned, or None if several workers were started. Under torchrun it does
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
            max_restarts=getattr(args, "max_restarts", 0),
        )
        if dist.is_torchelastic_launched():
            leave()
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
            leave(stopped.code)
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
    max_restarts: int = 0,
) -> Any:
    """Call ``main_func(*args)`` in each of the workers, inside a process group.

    Call it on every machine of the job. Under ``torchrun`` nothing is started: this process is one
    of the workers. One worker on one machine, without restarts, is called directly. One worker has
    no process group.

    Source: ``detectron2.engine.launch``, whose arguments these are, except ``device``.

    Args:
        main_func: what a worker does; importable, because workers are programs of their own.
        num_workers_per_machine: one for each GPU to use, or the number of CPU processes.
        num_machines: machines in the job.
        machine_rank: which of them this is, from 0.
        dist_url: where workers meet: "auto" (one machine: a free port) or tcp://HOST:PORT.
        device: MODEL.DEVICE. Workers use CPU and gloo unless it is CUDA and there is a GPU.
        args: arguments of ``main_func``; they are pickled.
        timeout: how long a worker waits for the others, to start and in collectives.
        max_restarts: how often the workers of all machines start again after one has failed, but
            for a ConfigError; :func:`restarted` tells them.

    Returns:
        What ``main_func`` returned, in a process that called it; None if workers were started.

    Raises:
        ConfigError: the arguments do not fit each other, the GPUs, or torchrun's; or a worker
            raised it.
        WorkerError: one of several workers failed. The others have been ended.
        Stopped: the workers were asked to stop.
    """
    use_gpus = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        given = (num_workers_per_machine, num_machines, dist_url, max_restarts)
        return _join_torchrun(main_func, args, given, use_gpus, timeout)
    if num_machines < 1:
        raise ConfigError(f"--num-machines {num_machines}: at least 1 is needed")
    if not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"--machine-rank {machine_rank}: with --num-machines {num_machines} it must be "
            f"from 0 to {num_machines - 1}"
        )
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts {max_restarts}: expected 0 or more")
    _check_num_workers("--num-gpus", num_workers_per_machine, use_gpus)
    if num_machines * num_workers_per_machine == 1 and not max_restarts:
        with naming_full_disks():
            return main_func(*args)
    from .agent import run_workers  # only who starts workers waits for torch's agent

    workers = (num_workers_per_machine, num_machines, machine_rank)
    run_workers((main_func, args, use_gpus, timeout), *workers, dist_url, max_restarts)
    return None


def restarted() -> bool:
    """Whether this worker replaces one of workers that failed (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def work(
    main_func: Callable[..., Any], args: Sequence[Any], use_gpus: bool, timeout: timedelta
) -> Any:
    """Call ``main_func(*args)`` as the worker that the environment of torch's agent describes."""
    rank, local_rank, world_size, num_local_workers = _place()
    if world_size > 1:
        if use_gpus:
            torch.cuda.set_device(local_rank)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // num_local_workers))
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torch 2.14 leaves this out, and restarted workers look for those that failed.
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"attempt {attempt}", _agents_store(timeout))
        place = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group("nccl" if use_gpus else "gloo", timeout=timeout, **place)
        _create_local_process_group(num_local_workers)
        # As upstream: the first collective must not wait longer than others for slow starters.
        comm.synchronize()
    try:
        with naming_full_disks():
            result = main_func(*args)
    except Stopped:
        comm.synchronize()
        raise
    # Nobody leaves while another may still need it.
    comm.synchronize()
    if world_size > 1:
        dist.destroy_process_group()
    return result


def _place() -> list[int]:
    return [int(os.environ[name]) for name in _TORCHRUN_VARIABLES]


def _agents_store(timeout: timedelta) -> dist.TCPStore:
    """The store of torch's agent, which outlives the workers."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, is_master=False, timeout=timeout)


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


def leave(status: int = 0) -> NoReturn:
    """End this worker as the interpreter does, but without unloading torch's native threads.

    That unloading can abort a worker that has done its work ("terminate called without an active
    exception", seen now and then with torch 2.14 over gloo).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def describe_failure(rank: int, world_size: int, summary: str, details: str = "") -> str:
    """What a :class:`WorkerError` says."""
    return f"worker failed (rank {rank} of {world_size}): {summary}\n{details}".rstrip()


def _without_traceback(error: ConfigError) -> str:
    """What it says; torch puts the traceback of a data loader's process into the message."""
    return str(error).rpartition(f"{ConfigError.__module__}.{ConfigError.__name__}: ")[2].strip()


def _check_num_workers(flag: str, num_workers: int, use_gpus: bool) -> None:
    if num_workers < 1:
        raise ConfigError(f"{flag} {num_workers}: at least 1 worker is needed")
    if use_gpus and num_workers > torch.cuda.device_count():
        raise ConfigError(
            f"{flag} {num_workers}: this machine has {torch.cuda.device_count()} GPU(s), one for "
            f"each worker. Ask for fewer workers, or run them on CPU with MODEL.DEVICE cpu"
        )


def _join_torchrun(
    main_func: Callable[..., Any],
    args: Sequence[Any],
    given: Sequence[int | str],
    use_gpus: bool,
    timeout: timedelta,
) -> Any:
    rank, _, world_size, num_local_workers = _place()
    actual = (num_local_workers, world_size // num_local_workers, "auto", 0)
    flags = ("--num-gpus", "--num-machines", "--dist-url", "--max-restarts")
    for flag, value, default, fact in zip(flags, given, (1, 1, "auto", 0), actual, strict=True):
        if value not in (default, fact):
            raise ConfigError(
                f"{flag} {value} contradicts torchrun, which started {num_local_workers} worker(s) "
                f"on this machine and {world_size} in all. Leave it out, or do not use torchrun"
            )
    _check_num_workers("torchrun --nproc-per-node", num_local_workers, use_gpus)
    try:
        return work(main_func, args, use_gpus, timeout)
    except ConfigError:
        raise
    except Exception as error:
        if world_size == 1:
            raise
        get_error_handler().record_exception(error)
        summary = "".join(traceback.format_exception_only(error)).strip()
        described = describe_failure(rank, world_size, summary, traceback.format_exc())
        raise WorkerError(described) from error


def _is_first_to_report() -> bool:
    """Whether this process should print a ConfigError, which usually all workers raise.

    Only torchrun's workers have to agree on that.
    """
    if not dist.is_torchelastic_launched():
        return True
    try:
        key = f"bn_detection/config_errors/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        return _agents_store(timedelta(seconds=10)).add(key, 1) == 1
    except dist.DistError:
        return os.environ["LOCAL_RANK"] == "0"
