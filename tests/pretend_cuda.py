"""A GPU of pretence: tensors that say they are on it, and are not to be mixed with the CPU's.

The numbers are computed on the CPU, so whole trainings and measurements run. What is wrong on a
GPU is wrong here: an operator on tensors of both devices, ``numpy()`` of a tensor on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bn_detection.norm.scope import in_backward

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten.set_.source_Tensor)
#: Their second argument can be indices on the CPU.
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


class _Storages:
    """The storages on the GPU; their addresses are not used again while they are known."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known[reference.cdata] = reference
        return tensor

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._known


class _Operators(TorchDispatchMode):
    """An operator with tensors of the GPU gives tensors of the GPU, and takes no others."""

    def __init__(self, gpu: _Storages) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor in self.gpu for tensor in inputs):
            return result
        strict = (args[0], *args[2:]) if func in _INDEXED else inputs
        others = [
            tuple(leaf.shape)
            for leaf in tree_leaves(strict)
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf not in self.gpu
        ]
        # Backwards make tensors on the device that the inputs of their forwards really had.
        if others and not in_backward():
            raise RuntimeError(
                f"{func}: expected all tensors to be on one device; of {len(inputs)} there are "
                f"some on the CPU, of shape {others}"
            )
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.gpu.add(leaf)
        return result


class _Functions(TorchFunctionMode):
    """Devices as Python asks for them, and gives them."""

    def __init__(self, gpu: _Storages) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self._device(args[0])
        if func == Tensor.is_cuda.__get__:
            return args[0] in self.gpu
        if func == Tensor.is_cpu.__get__:
            return args[0] not in self.gpu
        if func in (Tensor.numpy, Tensor.__array__) and args[0] in self.gpu:
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        if func is Tensor.cpu:
            return self._moved(args[0], _CPU)
        if func is Tensor.cuda:
            return self._moved(args[0], CUDA)
        if func is Tensor.backward:
            with self:  # for the backwards that are written in Python
                return torch.autograd.backward(
                    args[0], kwargs.pop("gradient", *args[1:] or (None,)), **kwargs
                )
        if func is torch.nn.functional.one_hot:  # makes its result on the device as it is
            result = func(self._moved(args[0], _CPU), *args[1:], **kwargs)
            return self._moved(result, self._device(args[0]))
        kwargs.pop("pin_memory", None)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        device = self._device(args[0]) if func is Tensor.new_tensor else kwargs.get("device")
        kwargs = {k: (_CPU if k == "device" and v is not None else v) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        if device is not None:
            device = torch.device(device)
            return tree_map(lambda leaf: self._moved(leaf, device), result)
        return result

    def _device(self, tensor: Tensor) -> torch.device:
        return CUDA if tensor in self.gpu else _CPU

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for argument in args:
            if isinstance(argument, Tensor):
                device, dtype = self._device(argument), argument.dtype
            elif isinstance(argument, str | torch.device):
                device = argument
            elif isinstance(argument, torch.dtype):
                dtype = argument
        device = self._device(tensor) if device is None else torch.device(device)
        memory_format = kwargs.get("memory_format", torch.preserve_format)
        tensor = Tensor.to(tensor, dtype or tensor.dtype, memory_format=memory_format)
        return self._moved(tensor, device)

    def _moved(self, tensor: Any, device: torch.device) -> Any:
        if not isinstance(tensor, Tensor) or (tensor in self.gpu) == (device.type == "cuda"):
            return tensor
        return _Move.apply(tensor, self.gpu, device.type == "cuda")


class _Move(torch.autograd.Function):
    """A copy on the other device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: _Storages, to_gpu: bool) -> Tensor:
        ctx.gpu, ctx.to_gpu = gpu, to_gpu
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        moved.copy_(tensor)
        return gpu.add(moved) if to_gpu else moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Move.apply(grad, ctx.gpu, not ctx.to_gpu), None, None


@contextmanager
def pretend_cuda() -> Iterator[torch.device]:
    """While it is open, tensors can be on a GPU that is not there."""
    gpu = _Storages()
    with _Operators(gpu), _Functions(gpu):
        yield CUDA
