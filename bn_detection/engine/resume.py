"""What a training needs, beside weights and optimizer, to go on with the bits it would have had."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..data.stream import TrainLoader, continued_by
from ..norm import Scope
from ..population.untouched import counters_of

logger = logging.getLogger(__name__)


class ResumeState:
    """Gathers what each worker has of its own, for checkpoints, and gives it back.

    That is where its data loaders are, numbers that modules keep as attributes (RetinaNet's loss
    normalizer), buffers that are not those of worker 0, and states of hooks likewise. Random
    numbers are not among it: they are a function of the seed and the iteration.

    Args:
        model: the model itself, on this worker, as it was built: later changes are what is kept.
        loaders: the training's, and those of hooks, in an order that is always the same.
        seed: of the training; the same on all workers.
    """

    def __init__(self, model: nn.Module, loaders: Iterable[object], seed: int) -> None:
        self.seed = seed
        self._model = model
        self._loaders = list(loaders)
        self._at_first = _numbers_of(model)
        self._gathered: list[dict[str, Any]] | None = None

    def gather(self, hooks: dict[str, Any]) -> None:
        """Gather the states of all workers for the next :meth:`state_dict`; all must call it.

        Args:
            hooks: states of the hooks of this worker.
        """
        numbers = _numbers_of(self._model)
        state = {
            "loaders": [
                loader.state_dict() if isinstance(loader, TrainLoader) else None
                for loader in self._loaders
            ],
            "numbers": {
                name: changed
                for name, values in numbers.items()
                if (changed := _without(values, self._at_first.get(name, {})))
            },
            "buffers": {name: value.cpu().clone() for name, value in self._buffers().items()},
            "hooks": hooks,
        }
        self._gathered = comm.gather(state)

    def state_dict(self, hooks: dict[str, Any]) -> dict[str, Any]:
        """What was gathered last, without what the checkpoint has anyway; once."""
        if self._gathered is None and comm.get_world_size() == 1:
            self.gather(hooks)
        if not self._gathered:
            return {}
        saved = self._buffers()
        workers = [
            {
                **state,
                "buffers": _without(state["buffers"], saved),
                "hooks": _without(state["hooks"], hooks),
            }
            for state in self._gathered
        ]
        self._gathered = None
        return {"seed": self.seed, "workers": workers}

    def load_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Go on from a state, in a log line what is not the same as if it had gone on.

        Returns:
            States of hooks that this worker has, and worker 0 has not.
        """
        workers = state["workers"]
        rank, world_size = comm.get_rank(), comm.get_world_size()
        self.seed = state["seed"]
        is_alike = len(workers) == world_size
        own = workers[rank] if is_alike else workers[0]
        if not is_alike:
            logger.warning(
                "The checkpoint is of %d workers, and these are %d: the training goes on with the "
                "images that come next, and not with the bits of an uninterrupted one, since "
                "images and random numbers are those of other workers.",
                *(len(workers), world_size),
            )
        for index, loader in enumerate(self._loaders):
            states = [worker["loaders"][index : index + 1] for worker in workers]
            if not isinstance(loader, TrainLoader) or not all(s and s[0] for s in states):
                logger.warning("A data loader has no position in the checkpoint: it begins anew.")
            elif is_alike:
                loader.load_state_dict(states[rank][0])
            else:
                loader.load_state_dict(continued_by([s for (s,) in states], rank, world_size))
        modules = dict(self._model.named_modules())
        for name, values in own["numbers"].items():
            if name in modules:
                vars(modules[name]).update(values)
        if not is_alike:
            return {}
        buffers = self._buffers()
        with torch.no_grad():
            for name, value in own["buffers"].items():
                buffers[name].copy_(value)
        return own["hooks"]

    def use_seed(self) -> None:
        """Give the seed to what draws one of its own where SEED is negative."""
        for scope in _scopes(self._model):
            if scope.seed < 0:
                scope.seed = scope.own_seed = self.seed % 2**31

    def close_loaders(self) -> None:
        """End the processes of the data loaders."""
        for loader in self._loaders:
            if isinstance(loader, TrainLoader):
                loader.close()

    def _buffers(self) -> dict[str, torch.Tensor]:
        saved = self._model.state_dict()
        return {name: value for name, value in self._model.named_buffers() if name in saved}


class GatherResumeState(HookBase):
    """Gathers the state of all workers before each periodic checkpoint, which worker 0 writes.

    Register it on every worker, before the hook that writes checkpoints.

    Args:
        period: iterations between checkpoints. The last iteration always has one.
    """

    def __init__(self, period: int) -> None:
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            self.trainer.gather_resume_state()


def _numbers_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """Numbers that modules keep as attributes, by name, without their mode."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[module]: {key: _plain(value) for key, value in numbers.items() if key != "training"}
        for module, numbers in counters_of(model).items()
    }


def _plain(value: float) -> float:
    """Without a type of numpy, which is not loaded from a checkpoint."""
    kind = next(kind for kind in (bool, int, float) if isinstance(value, kind))
    return kind(value)


def _without(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The values that others do not have, bit for bit."""
    return {k: v for k, v in values.items() if k not in others or not _alike(v, others[k])}


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other.to(one.device))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_alike(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(_alike, one, other))
        )
    return bool(one == other)


def _scopes(model: nn.Module) -> set[Scope[Any]]:
    found: set[Scope[Any]] = set()
    for module in model.modules():
        hooks = getattr(module, "_forward_pre_hooks", {}).values()
        held = [*vars(module).values(), *(getattr(hook, "__self__", None) for hook in hooks)]
        found |= {value for value in held if isinstance(value, Scope)}
    return found
