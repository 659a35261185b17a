"""Multi-process tests: run a function in real gloo workers.

Workers import torch once and are used again by later calls with the same world size, each of which
starts from ``torch.manual_seed(rank)``. Other global state of a worker persists between calls.
"""

from __future__ import annotations

import io
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
from tooling import FORK_SERVER

_START_SECONDS = 120.0
_pools: dict[int, _Pool] = {}


def run_workers(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` in each worker of a gloo process group.

    Args:
        fn: a function at the top level of an importable module, such as a test module.
        world_size: number of workers; 1 is a process group of one.
        args: more arguments of ``fn``; they are pickled.
        timeout: seconds that all workers together may take, not counting their start.

    Returns:
        The results, by rank. Tensors are copied.

    Raises:
        AssertionError: a worker failed; the message has the rank and traceback of the first one.
        TimeoutError: the workers did not finish in time.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = _Pool(world_size)
    try:
        return pool.run(fn, args, timeout)
    except BaseException:
        del _pools[world_size]
        pool.kill()
        raise


class _Pool:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = []
        self._pipes: list[connection.Connection] = []
        for rank in range(world_size):
            ours, theirs = FORK_SERVER.Pipe()
            process = FORK_SERVER.Process(
                target=_serve, args=(rank, world_size, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._started = False

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        if not self._started:
            self._receive(_START_SECONDS, "start")
            self._started = True
        for pipe in self._pipes:
            pipe.send((fn, args))
        replies = self._receive(timeout, f"finish {fn.__qualname__}")
        return [torch.load(io.BytesIO(reply), weights_only=False) for reply in replies]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _receive(self, timeout: float, what: str) -> list[bytes]:
        deadline = time.monotonic() + timeout
        replies: dict[int, bytes] = {}
        while len(replies) < self.world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in replies}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"workers {sorted(waiting.values())} of {self.world_size} did not {what} "
                    f"in {timeout:g} s"
                )
            errors = []
            for pipe in ready:
                reply = self._read(waiting[pipe])
                if isinstance(reply, bytes):
                    replies[waiting[pipe]] = reply
                else:
                    errors.append((*reply, waiting[pipe]))
            if errors:
                _, text, rank = min(errors)
                raise AssertionError(f"rank {rank} of {self.world_size} failed:\n{text}")
        return [replies[rank] for rank in range(self.world_size)]

    def _read(self, rank: int) -> bytes | tuple[float, str]:
        """A result, or the time and traceback of a failure."""
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return 0.0, f"the process ended with exit code {self._processes[rank].exitcode}"


def _serve(rank: int, world_size: int, port: int, pipe: connection.Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    pipe.send(b"started")
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            fn, args = pickle.loads(request)
            torch.manual_seed(rank)
            reply = io.BytesIO()
            torch.save(fn(rank, world_size, *args), reply)
        except BaseException:
            pipe.send((time.monotonic(), traceback.format_exc()))
        else:
            pipe.send(reply.getvalue())
