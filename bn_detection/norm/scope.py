"""What the layers below a module share in one call of it: its rows, their images, their groups."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import checkpoint

from .batch_norms import tracks_statistics
from .collectives import Collectives, rank, world_size
from .transfer import to_device

T = TypeVar("T")

_KEPT_FORWARDS = 16
# Where torch.utils.checkpoint runs a forward again: without and with reentrant autograd.
_RECOMPUTE = ("unpack_hook", "backward")

_clock: Callable[[], int | None] = lambda: None  # noqa: E731
_rows_per_image: list[int] | None = None


def set_clock(clock: Callable[[], int | None]) -> None:
    """Say where the training iteration is found, for permutations that are right after a resume.

    Args:
        clock: returns the current iteration, or None if it is unknown; then calls are counted,
            from ``num_batches_tracked`` of the layer that asks first.
    """
    global _clock
    _clock = clock


def set_rows_per_image(counts: Sequence[int]) -> None:
    """Say which images the rows (RoIs) of the next forward of a head come from.

    It holds for one training forward of a head that shares groups; at inference until the next
    time. Detectron2's poolers and heads do it when the head is one of this project or converted, or
    has a partition at inference.

    Args:
        counts: number of rows of each image of this worker, in the order of the rows.
    """
    global _rows_per_image
    _rows_per_image = [int(count) for count in counts]


# Private, with a substitute for a torch that has none.
_graph_task_id: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)


def in_backward() -> bool:
    """Whether autograd is running backward: a forward then is a recomputation of a checkpoint."""
    if torch.compiler.is_compiling():
        return False
    return _in_checkpoint() if _graph_task_id is None else _graph_task_id() != -1


def _in_checkpoint() -> bool:
    """Whether activation checkpointing calls this function in a backward."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__ and code.co_name in _RECOMPUTE:
            return True
        frame = frame.f_back
    return False


def normalizes_in_training(module: nn.Module) -> bool:
    """Whether a BN layer at or below ``module`` is in training mode, whatever the module's own.

    Population statistics of inference are collected in a model in eval mode with such layers; and
    a model in training can have frozen ones.
    """
    return any(m.training for m in module.modules() if isinstance(m, _BatchNorm))


class Rows:
    """The rows (``x.shape[0]``: RoIs, or images) of one call on this worker.

    Attributes:
        owner: name of the module that was called.
        count: number of rows of this worker.
        device: of the activations.
        are_images: whether each row is an image.
        rank: of this worker; at inference it is alone.
        world_size: number of workers.
        collectives: of the module.
    """

    def __init__(self, x: Tensor, scope: Scope[Any], iteration: int, call: int) -> None:
        self.owner = scope.owner
        self.count = x.shape[0]
        self.device = x.device
        self.are_images = scope.rows_are_images
        self.rank, self.world_size = (0, 1) if scope.is_alone else (rank(), world_size())
        self.collectives = scope.collectives
        self._scope = scope
        self._key = f"{scope.name}/{iteration}/{call}"
        self.asked_for_images = False
        self._counts: list[int] | None = None
        self._gather: Callable[[], list[list[int]]] | None = None

    @property
    def seed(self) -> int:
        """The same on all workers, another at every call, reproducible from the scope's seed."""
        if self._scope.seed < 0:
            self.all_counts()
        return zlib.crc32(f"{self._scope.seed}/{self._key}".encode())

    @property
    def own_seed(self) -> int:
        """Another on each worker and at every call, reproducible from the scope's seed."""
        if self._scope.own_seed < 0:
            self._scope.own_seed = _draw_seed()
        return zlib.crc32(f"{self._scope.own_seed}/{self._key}/{self.rank}".encode())

    def begin_all_counts(self) -> Callable[[], list[list[int]]]:
        """Begin the collective of :meth:`all_counts`, to do something else meanwhile."""
        seed = self._scope.seed if self._scope.seed >= 0 else _draw_seed()
        if self.world_size > 1:
            self._gather = self.collectives.all_gather((self.count, seed))
        else:
            self._gather = lambda: [[self.count, seed]]
        return self._gather

    def all_counts(self) -> list[int]:
        """Number of rows of every worker, by rank: one collective, so every worker must ask."""
        if self._counts is None:
            gathered = (self._gather or self.begin_all_counts())()
            self._counts = [count for count, _ in gathered]
            if self._scope.seed < 0:
                self._scope.seed = gathered[0][1]
        return self._counts

    def per_image(self) -> list[int]:
        """Number of rows of each image of this worker.

        Raises:
            ValueError: it is unknown which image a row belongs to.
        """
        self.asked_for_images = not self.are_images
        counts = _rows_per_image if self.asked_for_images else [1] * self.count
        if counts is None or sum(counts) != self.count:
            known = "nothing says which image each belongs to"
            if counts is not None:
                known = f"the last RoIs that were pooled are {sum(counts)}"
            raise ValueError(
                f"{self.owner}: its partition groups whole images, but of its {self.count} rows "
                f"{known}. Call bn_detection.norm.set_rows_per_image([rows of image 0, ...]) "
                "before the head (Detectron2's poolers do it), or, where each row is an image, "
                "convert with rows_are_images=True."
            )
        return counts

    def images(self) -> Tensor:
        """``(count,)`` int64, the image of each row, from 0; errors as :meth:`per_image`."""
        counts = torch.tensor(self.per_image(), dtype=torch.long)
        images = torch.arange(len(counts))
        return self.to_device(images.repeat_interleave(counts, output_size=self.count))

    def to_device(self, ids: Tensor) -> Tensor:
        """``ids``, made on the CPU, where the rows are; the host waits for no GPU."""
        return to_device(ids, self.device)


def _draw_seed() -> int:
    return int(torch.randint(2**31, ()))


@dataclass
class _Forward(Generic[T]):
    probe: Tensor
    value: T
    repeats: int = 0


class Forwards(Generic[T]):
    """The latest training forwards of a layer, for those that checkpointing repeats.

    A repeated forward is known by its input. Of several with the same input it is the newest that
    was repeated least, since the backward goes from the last to the first.
    """

    def __init__(self) -> None:
        self._kept: deque[_Forward[T]] = deque(maxlen=_KEPT_FORWARDS)

    def keep(self, x: Tensor, value: T) -> None:
        """Remember what the forward of ``x`` had."""
        self._kept.append(_Forward(_probe(x).clone(), value))

    def find(self, x: Tensor) -> T | None:
        """What the forward had that is repeated with ``x``; None if it is not known."""
        probe = _probe(x)
        kept = [f for f in reversed(self._kept) if f.probe.shape == probe.shape]
        differences = [probe, *(forward.probe - probe for forward in kept)]
        size, *distances = torch.stack([d.abs().sum() for d in differences]).tolist()
        # Not always the same bits: some GPU kernels add in any order.
        candidates = [
            (distance, forward.repeats, age, forward)
            for age, (distance, forward) in enumerate(zip(distances, kept, strict=True))
            if distance <= 0.01 * size
        ]
        if not candidates:
            return None
        found = min(candidates, key=lambda candidate: candidate[:3])[-1]
        found.repeats += 1
        return found.value

    def __reduce__(self) -> tuple[type[Forwards[T]], tuple[()]]:
        return Forwards, ()


def _probe(x: Tensor) -> Tensor:
    """One value of each row."""
    first: tuple[slice | int, ...] = (slice(None), *(0,) * (x.dim() - 1))
    return x.detach()[first]


class _Call(Generic[T]):
    def __init__(self, iteration: int, number: int) -> None:
        self.iteration = iteration
        self.number = number
        self.rows: Rows | None = None
        self.value: T | None = None

    def rows_for(self, x: Tensor, scope: Scope[T]) -> Rows:
        if self.rows is None:
            self.rows = Rows(x, scope, self.iteration, self.number)
        return self.rows


class Scope(Generic[T]):
    """Makes one value a call of a module, for all the layers below it that ask.

    A scope that is not attached to a module makes one at each request. A forward that activation
    checkpointing repeats in the backward gets the value of its first run.

    Args:
        make: makes the value from the rows of the call.
        seed: of random values, one number that all workers share; a negative one is replaced by a
            number that worker 0 draws when a value is first asked for, or for values of a worker
            alone by one that each draws.
        rows_are_images: whether each row is an image; else :func:`set_rows_per_image` says.
        needs_counts: whether ``make`` asks for the row counts of all workers, which are then
            exchanged while the first layers run.
    """

    #: Whether a call is of this process, whatever the number of workers.
    is_alone = False

    def __init__(
        self,
        make: Callable[[Rows], T],
        *,
        seed: int = -1,
        rows_are_images: bool = False,
        needs_counts: bool = False,
    ) -> None:
        self.make = make
        self.seed = self.own_seed = seed
        self.needs_counts = needs_counts
        self.rows_are_images = rows_are_images
        self.rename("")
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forwards: dict[int, Forwards[tuple[int, T]]] = {}
        self._open: _Call[T] | None = None
        self._iteration: int | None = None
        self._calls_in_iteration = 0

    def rename(self, name: str) -> None:
        """Set the name that sets apart the permutations of several heads, and names errors."""
        self.name = name
        self.owner = name or "a layer of partitioned BatchNorm"
        self.collectives = Collectives(self.owner)

    def attach(self, module: nn.Module) -> None:
        """Make each forward of ``module`` in which a BN layer below it trains a call."""
        self.handles += [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def detach(self) -> None:
        """Undo :meth:`attach`, and remove the other hooks in ``handles``."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def get(self, layer: nn.Module, x: Tensor) -> T:
        """The value of the current call.

        Args:
            layer: that asks, in training mode.
            x: its input, ``(N, C, H, W)``.

        Raises:
            RuntimeError: there is no call that this forward belongs to.
        """
        if in_backward():
            return self._recomputed(layer, x)
        call = self._open
        if call is None:
            if self.handles:
                raise RuntimeError(
                    f"{_describe(layer)} was called in training outside a forward of {self.owner}, "
                    "so there are no groups of this step that it shares. Call it through that "
                    "module, or convert the modules that are called: with the pattern "
                    f'"{self.name}.*" in place of "{self.name}".'
                )
            call = self._begin(layer)
        rows = call.rows_for(x, self)
        value = call.value
        if value is None:
            value = call.value = self.make(rows)
        if rows.count != x.shape[0]:
            raise RuntimeError(
                f"{_describe(layer)} has {x.shape[0]} rows, and {self.owner} or its layers before "
                f"it {rows.count}: they cannot share groups. Convert the modules that work on "
                "other rows by names of their own, such as "
                '[["roi_heads.box_head", "ShuffleBN"], ["roi_heads.mask_head", "ShuffleBN"]]; '
                f"where {self.owner} works on parts of its rows, those below it: with the pattern "
                f'"{self.name}.*" in place of "{self.name}".'
            )
        self._forwards.setdefault(id(layer), Forwards()).keep(x, (call.iteration, value))
        return value

    def _recomputed(self, layer: nn.Module, x: Tensor) -> T:
        now = _clock()
        found = self._forwards.get(id(layer), Forwards()).find(x)
        if found is not None and now in (None, found[0]):
            return found[1]
        raise RuntimeError(
            f"{_describe(layer)} is computed again in the backward (activation checkpointing), but "
            f"the groups of its forward are those of another step. Run the backward of a step "
            "before the next step begins."
        )

    def _enter(self, module: nn.Module, args: Any) -> None:
        if normalizes_in_training(module) and not in_backward():
            self._open_call(module, args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open is not None:
            self._close_call(self._open)

    @torch.compiler.disable
    def _open_call(self, module: nn.Module, args: Any) -> None:
        if not self._is_used(module):
            self.detach()
            return
        call = self._open = self._begin(module)
        # Input of other dimensions has other rows than the layers get.
        if self.needs_counts and args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            call.rows_for(args[0], self).begin_all_counts()

    @torch.compiler.disable
    def _close_call(self, call: _Call[T]) -> None:
        global _rows_per_image
        if call.rows is not None and call.rows.asked_for_images:
            _rows_per_image = None  # of another head, or step, from now on
        self._open = None

    def _is_used(self, module: nn.Module) -> bool:
        """Whether a layer or head below ``module`` has this scope: others may have replaced it."""
        return any(value is self for m in module.modules() for value in vars(m).values())

    def _begin(self, asker: nn.Module) -> _Call[T]:
        iteration = _clock()
        if iteration is None:
            if self._iteration is None:
                seen = [m for m in asker.modules() if tracks_statistics(m)]
                self._iteration = int(seen[0].num_batches_tracked) - 1 if seen else -1
            iteration = self._iteration + 1
        self._calls_in_iteration = (
            self._calls_in_iteration + 1 if iteration == self._iteration else 0
        )
        self._iteration = iteration
        return _Call(iteration, self._calls_in_iteration)


class InferenceScope(Scope[T]):
    """Makes the values of a model's forwards at inference, on this process alone.

    Layers of a forward that have the same rows get the same value. It is reproducible: random
    values follow from the seed, the training iteration and the number of forwards in it.
    """

    is_alone = True

    def attach(self, module: nn.Module) -> None:
        """Make each forward of ``module`` a call."""
        self.handles.append(module.register_forward_pre_hook(self._enter))

    def get(self, layer: nn.Module, x: Tensor) -> T:
        """The value of the current call for the rows of ``x``, ``(N, ...)``.

        Args:
            layer: that asks, at inference with the batch.
            x: its input.
        """
        if self._open is None:  # a part of the model was called
            self._open = self._begin(layer)
        return self.make(Rows(x, self, self._open.iteration, self._open.number))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open = self._begin(module)


Announcer = Callable[[nn.Module, list[str], InferenceScope[Any]], set[str]]
_announcers: list[Announcer] = []


def register_announcer(announce: Announcer) -> Announcer:
    """Have ``announce`` tell the images of the rows of layers, for models of a family.

    Args:
        announce: takes a model, names of its layers and a scope; gives the names of the layers
            whose rows are images, and adds hooks to the scope's ``handles`` that call
            :func:`set_rows_per_image` before the others.
    """
    _announcers.append(announce)
    return announce


def announce_rows(model: nn.Module, names: list[str], scope: InferenceScope[Any]) -> set[str]:
    """The names of the layers whose rows are images, by all registered announcers.

    Args:
        model: any model.
        names: of its layers.
        scope: keeps the hooks that say which images the RoIs of the others are of.
    """
    return {name for announce in _announcers for name in announce(model, names, scope)}


def _describe(layer: nn.Module) -> str:
    return getattr(layer, "name", "") or type(layer).__name__
