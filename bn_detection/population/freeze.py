"""Training that ends with frozen population statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .average import average_running_statistics
from .observe import batch_norms_in_training

logger = logging.getLogger(__name__)

AFFINE = ("train", "fixed")


class FreezeStatistics(HookBase):
    """From an iteration on, BN layers normalize with population statistics in training too.

    *Rethinking "Batch" in BatchNorm* ends trainings so, with FrozenBN, against the difference
    between the statistics of training and of inference. At the switch the workers average their
    running statistics once; then no statistic moves.

    Register it on every worker, after :class:`PreciseStatistics`, and before the hooks that save.

    Args:
        model: the model, on this worker, in training mode.
        first_iter: the first iteration, from 0, with frozen layers.
        modules: globs over the names of the layers.
        precise: called at the switch with the names of the layers, to replace their averaged
            statistics by better ones; None keeps them.
        fixed: the optimizer that is to leave the affine parameters of frozen layers alone, weight
            decay and momentum included; None to go on training them.

    Raises:
        ValueError: no BN layer in training mode matches; or one that does uses the statistics of
            the mini-batch at inference, and has none to freeze.
    """

    def __init__(
        self,
        model: nn.Module,
        first_iter: int,
        modules: Sequence[str],
        *,
        precise: Callable[[list[str]], None] | None = None,
        fixed: torch.optim.Optimizer | None = None,
    ) -> None:
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers = batch_norms_in_training(model, modules)
        if not self._layers:
            raise ValueError(f"{list(modules)}: no BN layer in training mode matches to be frozen.")
        for name, layer in self._layers.items():
            if getattr(layer, "inference", "population") == "batch":
                raise ValueError(
                    f"{list(modules)}: {name} uses batch statistics at inference, so it has no "
                    "statistics to freeze."
                )
        self._affine = [p for name in self._layers for p in _affine_parameters(model, name)]
        self._fixed: list[torch.Tensor] = []
        self._first_iter = first_iter
        self._precise = precise
        self._optimizer = fixed
        self._switched_at: int | None = None

    def before_step(self) -> None:
        if self.trainer.iter < self._first_iter:
            return
        if self._switched_at is None:
            self._switch()
        # In each step, since an evaluation puts all layers back into training mode.
        for layer in self._layers.values():
            layer.eval()
        if self._optimizer is not None and not self._fixed:
            self._fixed = [parameter.detach().clone() for parameter in self._affine]
            self._optimizer.register_step_pre_hook(self._before_update)
            self._optimizer.register_step_post_hook(self._after_update)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._switched_at is None else {"switched_at": self._switched_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A training that was frozen goes on so, unless its first such iteration is now later."""
        if self._first_iter <= state["switched_at"]:
            self._switched_at = state["switched_at"]

    def _switch(self) -> None:
        average_running_statistics(nn.ModuleList(self._layers.values()))
        if self._precise is not None:
            self._precise(list(self._layers))
        self._switched_at = self.trainer.iter
        logger.info(
            "From iteration %d on, %d layers keep their statistics (%s): %s",
            self.trainer.iter,
            len(self._layers),
            "running averages" if self._precise is None else "a precise estimate",
            ", ".join(self._layers),
        )

    # Not by requires_grad, which DDP does not allow to change, nor without gradients, which
    # gradient clipping fails on.

    def _before_update(self, *_: Any) -> None:
        """Of the gradients that are clipped together, those count as zero."""
        for parameter in self._affine:
            if parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def _after_update(self, *_: Any) -> None:
        """Weight decay and momentum move parameters without a gradient too."""
        for parameter, value in zip(self._affine, self._fixed, strict=True):
            parameter.copy_(value)


def _affine_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Those of a layer; or of the list that it is in, whose layers share them."""
    layer = model.get_submodule(name)
    owner = layer if layer.affine else model.get_submodule(name.rpartition(".")[0])
    return list(owner.parameters(recurse=False))
