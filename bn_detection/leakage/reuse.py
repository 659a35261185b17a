"""Convolutions of one pass of a head used again in the next, up to the first layer that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_COSTLY = {
    *(functional.conv1d, functional.conv2d, functional.conv3d, functional.linear),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(torch.addmm, torch.mm, torch.matmul),
}
# Of what a pass keeps.
_MOST_BYTES = 1 << 30


class Pass:
    """What a pass of a head kept.

    Attributes:
        modes: whose rows shared the batch of each layer, by name.
        before: the number of costly operations before the first call of each layer.
        outputs: of the first costly operations.
    """

    def __init__(self, modes: Mapping[str, str]) -> None:
        self.modes = dict(modes)
        self.before: dict[str, int] = {}
        self.outputs: list[Tensor] = []

    def shared(self, modes: Mapping[str, str]) -> list[Tensor]:
        """The outputs that a pass with other modes has, too: those before its first other layer."""
        other = [number for name, number in self.before.items() if modes[name] != self.modes[name]]
        return self.outputs[: min(other, default=len(self.outputs))]

    def forget_all_but_the_first(self) -> None:
        """Keep what comes before all layers."""
        del self.outputs[min(self.before.values(), default=0) :]


@contextmanager
def passing(
    layers: Mapping[str, nn.Module], modes: Mapping[str, str], last: Pass | None
) -> Iterator[Pass]:
    """Run a head, with what a pass on the same features has of it already.

    Args:
        layers: the BN layers of the head, by name.
        modes: whose rows share the batch of each.
        last: the earlier pass.

    Yields:
        This pass.
    """
    this = Pass(modes)
    mode = _Reuse(this, last.shared(modes) if last is not None else [])

    def note(name: str, *_: Any) -> None:
        this.before.setdefault(name, mode.number)

    handles = [x.register_forward_pre_hook(partial(note, name)) for name, x in layers.items()]
    try:
        with mode:
            yield this
    finally:
        for handle in handles:
            handle.remove()


class _Reuse(TorchFunctionMode):
    def __init__(self, this: Pass, known: list[Tensor]) -> None:
        super().__init__()
        self._this, self._known, self._left = this, known, _MOST_BYTES
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _COSTLY:
            return func(*args, **(kwargs or {}))
        at, self.number = self.number, self.number + 1
        output: Tensor = self._known[at] if at < len(self._known) else func(*args, **(kwargs or {}))
        self._left -= output.nbytes
        if self._left >= 0:
            self._this.outputs.append(output)
            return output.clone()  # what follows may work in place
        return output if at >= len(self._known) else output.clone()
