"""Training in mixed precision, on any device."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

#: What SOLVER.AMP.PRECISION can be.
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` under autocast; in float16 with loss scaling.

    Detectron2's own (``detectron2.engine.AMPTrainer``) is for CUDA and, in v0.6, float16 alone.
    Its checkpoints load here, and these there.

    Args:
        model: on the device to train on.
        data_loader: as for ``SimpleTrainer``.
        optimizer: of the model.
        precision: one of :data:`PRECISIONS`.

    Attributes:
        precision: that autocast computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "float16",
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.precision = PRECISIONS[precision]
        self._device = next(model.parameters()).device.type
        scales = self.precision == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self._device, enabled=scales)

    def run_step(self) -> None:
        """One iteration; the scaler skips the optimizer's step where a gradient overflowed."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self._device, self.precision):
            loss_dict = self.model(data)
            losses = sum(loss_dict.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(losses).backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):  # bfloat16 has an empty one
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
