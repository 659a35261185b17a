"""The passes as fused Triton kernels: each reads and writes every activation once.

A program works on tiles of channels x positions of one row, in any memory format. For sums, rows
are sorted by group and cut into chunks of a group's rows; a program sums its chunk, tile by tile,
and a second kernel adds up the chunks of each group, in a fixed order: the same bits at each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..partition import Groups
from .torch_passes import accumulation_dtype

#: Elements of a tile: 16 a thread.
_TILE = 2048
#: Positions of a tile, at most, where neighbours in memory are positions.
_POSITIONS = 1024
#: Channels of a tile, at most, where they are channels (channels_last).
_CHANNELS = 64
#: Programs to fill a GPU with, before a program gets more rows or positions.
_PROGRAMS = 4096
#: Rows of a chunk, at most.
_ROWS = 16


@triton.jit
def _locate(row, c, p, stride_n, stride_c, stride_p):
    """Offsets of a tile of channels x positions."""
    return row.to(tl.int64) * stride_n + c[:, None] * stride_c + p[None, :] * stride_p


@triton.jit
def _sums_kernel(
    x_ptr,
    grad_ptr,
    mean_ptr,
    order_ptr,
    group_of_chunk_ptr,
    first_chunk_ptr,
    first_row_ptr,
    out_ptr,
    channels,
    positions,
    positions_a_program,
    rows_a_chunk,
    groups,
    x_n,
    x_c,
    x_p,
    grad_n,
    grad_c,
    grad_p,
    SORTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Two float64 sums over a chunk, (chunk, 2, C): of x and its squares, or of the gradients."""
    chunk = tl.program_id(0)
    part = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    group = tl.load(group_of_chunk_ptr + chunk)
    used = group < groups
    first_row = tl.load(first_row_ptr + group, mask=used, other=0)
    first_chunk = tl.load(first_chunk_ptr + group, mask=used, other=0)
    first = first_row + (chunk - first_chunk) * rows_a_chunk
    last = tl.load(first_row_ptr + group + 1, mask=used, other=0)
    last = tl.minimum(first + rows_a_chunk, last)
    sums = tl.zeros((BLOCK_C,), tl.float64)
    products = tl.zeros((BLOCK_C,), tl.float64)
    mean = tl.zeros((BLOCK_C,), ACC)
    if GRADIENT:
        mean = tl.load(mean_ptr + group * channels + c, mask=in_c & used, other=0.0)
    begin = part * positions_a_program
    end = tl.minimum(begin + positions_a_program, positions)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = in_c[:, None] & (p < end)[None, :]
        # Of each position over the rows, so that threads exchange nothing before the last row.
        tile_sums = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        tile_products = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        rows = 0.0
        for i in range(first, last):
            row = i
            if SORTED:
                row = tl.load(order_ptr + i)
            values = tl.load(x_ptr + _locate(row, c, p, x_n, x_c, x_p), mask=mask, other=0.0)
            values = values.to(ACC)
            if GRADIENT:
                offsets = _locate(row, c, p, grad_n, grad_c, grad_p)
                gradient = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(ACC)
                tile_sums += gradient
                tile_products += gradient * (values - mean[:, None])
            else:  # Welford: the mean, and the squared deviations from it
                rows += 1.0
                deviation = values - tile_sums
                tile_sums += deviation * (1.0 / rows)
                tile_products += deviation * (values - tile_sums)
        if GRADIENT:
            sums += tl.sum(tile_sums, 1).to(tl.float64)
            products += tl.sum(tile_products, 1).to(tl.float64)
        else:
            width = tl.minimum(end - start, BLOCK_P)
            tile_mean = tl.sum(tile_sums, 1) / width.to(ACC)
            deviation = tl.where(mask, tile_sums - tile_mean[:, None], 0.0)
            squares = tl.sum(tile_products + rows * deviation * deviation, 1).to(tl.float64)
            tile_mean = tile_mean.to(tl.float64)
            count = (width * (last - first)).to(tl.float64)
            sums += tile_mean * count
            products += squares + tile_mean * tile_mean * count
    out_ptr += (chunk * tl.num_programs(2) + part).to(tl.int64) * 2 * channels
    tl.store(out_ptr + c, sums, mask=in_c)
    tl.store(out_ptr + channels + c, products, mask=in_c)


@triton.jit
def _add_chunks_kernel(
    sums_ptr,
    first_chunk_ptr,
    first_row_ptr,
    out_ptr,
    columns,
    positions,
    parts,
    offset,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The sums of a group from those of its chunks, behind its count where there is room for it."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(first_chunk_ptr + group) * parts
    last = tl.load(first_chunk_ptr + group + 1) * parts
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, CHUNKS):
        k = start + tl.arange(0, CHUNKS)
        offsets = k.to(tl.int64)[:, None] * columns + c[None, :]
        mask = (k < last)[:, None] & (c < columns)[None, :]
        total += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), 0)
    out_ptr += group.to(tl.int64) * (columns + offset)
    tl.store(out_ptr + offset + c, total, mask=c < columns)
    if (offset == 1) & (tl.program_id(1) == 0):
        rows = tl.load(first_row_ptr + group + 1) - tl.load(first_row_ptr + group)
        tl.store(out_ptr, rows.to(tl.float64) * positions)


@triton.jit
def _affine_kernel(
    x_ptr,
    grad_ptr,
    ids_ptr,
    mean_ptr,
    slope_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    channels,
    positions,
    x_n,
    x_c,
    x_p,
    grad_n,
    grad_c,
    grad_p,
    out_n,
    out_c,
    out_p,
    GROUPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(x - mean) * slope + shift, and grad * scale added to it."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_c = c < channels
    mask = in_c[:, None] & (p < positions)[None, :]
    parameters = c
    if GROUPED:
        parameters += tl.load(ids_ptr + row).to(tl.int32) * channels
    mean = tl.load(mean_ptr + parameters, mask=in_c, other=0.0)
    slope = tl.load(slope_ptr + parameters, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + parameters, mask=in_c, other=0.0)
    values = tl.load(x_ptr + _locate(row, c, p, x_n, x_c, x_p), mask=mask, other=0.0).to(ACC)
    out = (values - mean[:, None]) * slope[:, None] + shift[:, None]
    if GRADIENT:
        scale = tl.load(scale_ptr + parameters, mask=in_c, other=0.0)
        offsets = _locate(row, c, p, grad_n, grad_c, grad_p)
        gradient = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(ACC)
        out += gradient * scale[:, None]
    tl.store(out_ptr + _locate(row, c, p, out_n, out_c, out_p), out, mask=mask)


@dataclass(frozen=True)
class _Chunks:
    """Rows sorted by group, and chunks of rows of one group.

    Attributes:
        order: ``(N,)`` int32, the rows; None where their order is that of their groups.
        first_row: ``(G + 1,)`` int32, where each group begins in ``order``.
        first_chunk: ``(G + 1,)`` int32, where each group begins among the chunks.
        group: ``(K,)`` int32, the group of each chunk; G where a chunk is not used.
        rows: of a chunk, at most.
    """

    order: Tensor | None
    first_row: Tensor
    first_chunk: Tensor
    group: Tensor
    rows: int


def _cut(groups: Groups, number: int, device: torch.device, rows: int) -> _Chunks:
    """Cut ``number`` rows into chunks, without reading anything back from the device."""
    order, counts = None, torch.full((1,), number, dtype=torch.int32, device=device)
    if groups.ids is not None:
        order = torch.argsort(groups.ids, stable=True).int()
        counts = torch.zeros(groups.number, dtype=torch.int32, device=device)
        counts.index_add_(0, groups.ids, torch.ones_like(groups.ids, dtype=torch.int32))
    chunks = (counts + (rows - 1)).div(rows, rounding_mode="floor")
    first_row, first_chunk = (
        torch.nn.functional.pad(t.cumsum(0, dtype=torch.int32), (1, 0)) for t in (counts, chunks)
    )
    most = -(-number // rows) + (0 if groups.ids is None else groups.number)
    numbers = torch.arange(most, dtype=torch.int32, device=device)
    group = torch.searchsorted(first_chunk[1:], numbers, right=True, out_int32=True)
    return _Chunks(order, first_row, first_chunk, group, rows)


class TritonKernels:
    """:class:`bn_detection.norm.kernels.Kernels` in Triton."""

    name = "triton"

    def __init__(self) -> None:
        # All layers of a head have the same groups.
        self._chunks = WeakIdKeyDictionary()

    def moments(self, x: Tensor, groups: Groups) -> Tensor:
        return self._sums(x, groups, None, None)

    def gradient_sums(self, grad: Tensor, x: Tensor, mean: Tensor, groups: Groups) -> Tensor:
        return self._sums(x, groups, grad, mean)

    def affine(
        self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, groups: Groups
    ) -> Tensor:
        return self._affine(x, mean, scale, shift, groups, None, None)

    def input_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        slope: Tensor,
        shift: Tensor,
        groups: Groups,
    ) -> Tensor:
        return self._affine(x, mean, slope, shift, groups, grad, scale)

    def _sums(self, x: Tensor, groups: Groups, grad: Tensor | None, mean: Tensor | None) -> Tensor:
        gradient = grad is not None
        x = _with_positions(x)
        grad = x if grad is None else _with_positions(grad)
        number, channels, positions = len(x), x.shape[1], x.shape[2] * x.shape[3]
        block_c, block_p = _blocks(x)
        blocks = triton.cdiv(channels, block_c)
        chunks = self._cut(groups, x, min(max(number * blocks // _PROGRAMS, 1), _ROWS))
        # Large maps of few rows are divided among programs too.
        tiles = triton.cdiv(positions, block_p)
        parts = min(tiles, max(_PROGRAMS // (len(chunks.group) * blocks), 1))
        part = triton.cdiv(tiles, parts) * block_p
        parts = triton.cdiv(positions, part)
        sums = x.new_empty(len(chunks.group), parts, 2, channels, dtype=torch.float64)
        offset = 0 if gradient else 1
        out = x.new_empty(groups.number, offset + 2 * channels, dtype=torch.float64)
        mean = sums if mean is None else mean.to(accumulation_dtype(x)).contiguous()
        _launch(
            _sums_kernel,
            (len(chunks.group), blocks, parts),
            x,
            grad,
            mean,
            chunks.first_row if chunks.order is None else chunks.order,
            chunks.group,
            chunks.first_chunk,
            chunks.first_row,
            sums,
            channels,
            positions,
            part,
            chunks.rows,
            groups.number,
            *_strides(x),
            *_strides(grad),
            SORTED=chunks.order is not None,
            GRADIENT=gradient,
            ACC=_acc(x),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
        _launch(
            _add_chunks_kernel,
            (groups.number, triton.cdiv(2 * channels, 64), 1),
            sums,
            chunks.first_chunk,
            chunks.first_row,
            out,
            2 * channels,
            positions,
            parts,
            offset,
            BLOCK=64,
            CHUNKS=32,
        )
        return out

    def _affine(
        self,
        x: Tensor,
        mean: Tensor,
        slope: Tensor,
        shift: Tensor,
        groups: Groups,
        grad: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        gradient = grad is not None
        x = _with_positions(x)
        out = torch.empty_like(x)
        grad = x if grad is None else _with_positions(grad)
        scale = slope if scale is None else scale
        acc = accumulation_dtype(x)
        channels, positions = x.shape[1], x.shape[2] * x.shape[3]
        block_c, block_p = _blocks(x)
        _launch(
            _affine_kernel,
            (len(x), triton.cdiv(channels, block_c), triton.cdiv(positions, block_p)),
            x,
            grad,
            x if groups.ids is None else groups.ids,
            *(t.to(acc).contiguous() for t in (mean, slope, shift, scale)),
            out,
            channels,
            positions,
            *_strides(x),
            *_strides(grad),
            *_strides(out),
            GROUPED=groups.ids is not None,
            GRADIENT=gradient,
            ACC=_acc(x),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
        return out

    def _cut(self, groups: Groups, x: Tensor, rows: int) -> _Chunks:
        if groups.ids is None:
            return _cut(groups, len(x), x.device, rows)
        known: dict[int, _Chunks] = self._chunks.setdefault(groups.ids, {})
        if rows not in known:
            known[rows] = _cut(groups, len(x), x.device, rows)
        return known[rows]


def _launch(
    kernel: Any, grid: tuple[int, int, int], x: Tensor, *args: Any, **constants: Any
) -> None:
    """Run a kernel on the device of its first argument."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **constants)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _with_positions(x: Tensor) -> Tensor:
    """``x``, or a copy in which one stride leads from each position of a map to the next."""
    one_stride = 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)
    return x if one_stride else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, channels and positions."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


def _blocks(x: Tensor) -> tuple[int, int]:
    """Channels and positions of a tile: as many neighbours in memory as there are."""
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and positions > 1:
        block_c = min(triton.next_power_of_2(channels), _CHANNELS)
        return block_c, min(triton.next_power_of_2(positions), _TILE // block_c)
    block_p = min(triton.next_power_of_2(positions), _POSITIONS)
    return min(triton.next_power_of_2(channels), _TILE // block_p), block_p
