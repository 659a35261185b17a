"""Compiles the launches of Triton's passes for GPUs that need not be here.

python tests/compile_kernels.py 90 75
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bn_detection.norm import Groups
from bn_detection.norm.kernels import triton_passes

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = [["tt.divisibility", 16]]

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches() -> list[Launch]:
    """Kernel, arguments and constants of each launch of the passes, for a few inputs."""
    found: list[Launch] = []
    triton_passes._launch = lambda kernel, grid, *args, **constants: found.append(
        (kernel, args, constants)
    )
    passes = triton_passes.TritonKernels()
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(4, 256, 7, 7).to(dtype, memory_format=memory_format)
            ids = None if dtype == torch.bfloat16 else torch.tensor([0, 1, 1, 0])
            groups = Groups(ids, 1 if ids is None else 2)
            values = torch.zeros(groups.number, 256)
            sums = passes.moments(x, groups)
            passes.affine(x, values, values, values[0], groups)
            passes.gradient_sums(x, x, values, groups)
            passes.input_gradient(x, x, values, values, values, values, groups)
            count, mean, var = sums.split([1, 256, 256], dim=1)
            passes.averages(count, mean, var, values[0], values[0])
    return found


def source(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """Specialized as a launch does it: numbers that are 1, and multiples of 16."""
    signature = dict.fromkeys(constants, "constexpr")
    values, attributes = dict(constants), {}
    for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], attributes[position,] = _TYPES[value.dtype], _ALIGNED
        elif value == 1:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[position,] = _ALIGNED
    ordered = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=ordered, constexprs=values, attrs=attributes)


def main() -> None:
    seen = set()
    for launch in launches():
        made = source(*launch)
        for capability in map(int, sys.argv[1:]):
            if (made.hash(), capability) not in seen:
                seen.add((made.hash(), capability))
                compiled = triton.compile(made, target=GPUTarget("cuda", capability, 32))
                size = len(compiled.asm["cubin"])
                print(f"{launch[0].fn.__name__} sm_{capability} {size} bytes")


if __name__ == "__main__":
    main()
