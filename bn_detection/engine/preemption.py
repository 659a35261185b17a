"""Trainings that are asked to stop write a checkpoint first.

A batch system sends SIGTERM, or what it was told to such as SIGUSR1, before it takes a machine
away. A training then finishes its iteration, writes a checkpoint from which ``--resume`` goes on
with the same bits, and ends with the status 128 and the number of the signal.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..population import average_running_statistics
from ..workers import STOP_SIGNALS, Stopped

logger = logging.getLogger(__name__)

_asked = 0


@contextmanager
def noting_signals() -> Iterator[None]:
    """Note :data:`STOP_SIGNALS` for :class:`StopOnSignal` instead of ending.

    Only the main thread can; in others nothing changes.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _note) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        _asked = 0


def _note(signum: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = max(_asked, signum)


class StopOnSignal(HookBase):
    """Ends the training after the iteration in which a worker was asked to stop.

    The workers agree on it after each iteration, by a number on the CPU: no worker stops in an
    iteration that others do not finish. If the iteration has no checkpoint, it gets one.

    Register it on every worker, behind the hook that writes checkpoints and before evaluations.

    Args:
        period: iterations between checkpoints.
    """

    def __init__(self, period: int) -> None:
        self._period = period
        self._group = None
        if comm.get_world_size() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def after_step(self) -> None:
        signum = self._agreed()
        done = self.trainer.iter + 1
        if not signum or done >= self.trainer.max_iter:
            return
        name = f"model_{self.trainer.iter:07d}"
        if self._period <= 0 or done % self._period:
            # Each worker goes on from its own statistics; who evaluates the file has their average.
            self.trainer.gather_resume_state()
            average_running_statistics(self.trainer.model)
            if comm.is_main_process():
                self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
        comm.synchronize()
        logger.warning(
            "Stopped by %s after iteration %d, with the checkpoint %s.pth; --resume goes on.",
            *(signal.Signals(signum).name, self.trainer.iter, name),
        )
        raise Stopped(128 + signum)

    def _agreed(self) -> int:
        if comm.get_world_size() == 1:
            return _asked
        asked = torch.tensor(_asked)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return int(asked)
