"""The passes as fused Triton kernels: each reads and writes every activation once.

A program works on tiles of channels x positions of one row, in any memory format. For sums, rows
are sorted by group and cut into chunks of a group's rows; a program sums its chunk, tile by tile,
and a second kernel adds up the chunks of each group, in a fixed order: the same bits at each run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..partition import Groups

#: Elements of a tile where neighbours in memory are positions, and where they are channels.
_TILE, _TILE_LAST = 1024, 2048
#: Positions of a tile, at most, where neighbours in memory are positions.
_POSITIONS = 1024
#: Channels of a tile, at most, where they are channels (channels_last).
_CHANNELS = 64
#: Programs to fill a GPU with, before a program gets more rows or positions.
_PROGRAMS = 1024
#: Rows of a chunk, at most.
_ROWS = 64
#: Rows that are loaded at once, so that more of them are on their way from memory.
_AT_ONCE = 4
#: Neighbours that are read at once, at most: eight of 2 bytes are what a thread can.
_MOST_AT_ONCE = 8
#: Of a row: offsets in it are of 32 bits.
_MOST_ELEMENTS = 2**31 - 1


@triton.jit
def _multiple(number, ALIGNED: tl.constexpr):
    """Shows the compiler that a number is a multiple: it loads as many neighbours at once."""
    return number // ALIGNED * ALIGNED


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
    stride_n,
    stride_c,
    stride_p,
    SORTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    if ALIGNED > 1:
        end = _multiple(end, ALIGNED)
        stride_n, stride_c = _multiple(stride_n, ALIGNED), _multiple(stride_c, ALIGNED)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = in_c[:, None] & (p < end)[None, :]
        offsets = c[:, None] * stride_c + p[None, :] * stride_p
        # Of each position over the rows, so that threads exchange nothing before the last row.
        tile_sums = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        tile_products = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        rows = 0.0
        for some in range(first, last, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                is_row = some + i < last
                row = some + i
                if SORTED:
                    row = tl.load(order_ptr + row, mask=is_row, other=0)
                row = row.to(tl.int64) * stride_n
                here = mask & is_row
                values = tl.load(x_ptr + row + offsets, mask=here, other=0.0).to(ACC)
                if GRADIENT:
                    gradient = tl.load(grad_ptr + row + offsets, mask=here, other=0.0)
                    gradient = gradient.to(ACC)
                    tile_sums += gradient
                    tile_products += gradient * (values - mean[:, None])
                else:  # Welford: the mean, and the squared deviations from it
                    rows = tl.where(is_row, rows + 1.0, rows)
                    share = tl.where(is_row, 1.0 / tl.maximum(rows, 1.0), 0.0)
                    deviation = values - tile_sums
                    tile_sums += deviation * share
                    rest = values - tile_sums
                    tile_products += tl.where(is_row, deviation * rest, 0.0)
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
    scale_ptr,
    shift_ptr,
    shift_g,
    slope_ptr,
    slope_g,
    out_ptr,
    channels,
    positions,
    stride_n,
    stride_c,
    stride_p,
    GROUPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(x - mean) * scale + shift; or (grad - shift - (x - mean) * slope) * scale."""
    if ALIGNED > 1:
        positions = _multiple(positions, ALIGNED)
        stride_n, stride_c = _multiple(stride_n, ALIGNED), _multiple(stride_c, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * stride_n
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_c = c < channels
    mask = in_c[:, None] & (p < positions)[None, :]
    offsets = c[:, None] * stride_c + p[None, :] * stride_p
    values = tl.load(x_ptr + row + offsets, mask=mask, other=0.0).to(ACC)
    group = 0
    if GROUPED:
        group = tl.load(ids_ptr + tl.program_id(0)).to(tl.int32)
    mean = tl.load(mean_ptr + group * channels + c, mask=in_c, other=0.0)
    scale = tl.load(scale_ptr + group * channels + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + group * shift_g + c, mask=in_c, other=0.0).to(ACC)
    centred = values - mean[:, None]
    if GRADIENT:
        slope = tl.load(slope_ptr + group * slope_g + c, mask=in_c, other=0.0)
        gradient = tl.load(grad_ptr + row + offsets, mask=mask, other=0.0).to(ACC)
        out = (gradient - shift[:, None] - centred * slope[:, None]) * scale[:, None]
    else:
        out = centred * scale[:, None] + shift[:, None]
    tl.store(out_ptr + row + offsets, out, mask=mask)


@triton.jit
def _averages_kernel(
    count_ptr,
    count_g,
    mean_ptr,
    mean_g,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    out_ptr,
    groups,
    channels,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Over groups, of means and unbiased variances; the running ones where no group has any."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    number = tl.zeros((BLOCK_C,), tl.float64)
    means = tl.zeros((BLOCK_C,), tl.float64)
    variances = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        in_g = g < groups
        mask = in_g[:, None] & in_c[None, :]
        count = tl.load(count_ptr + g * count_g, mask=in_g, other=0.0)
        mean = tl.load(mean_ptr + g[:, None] * mean_g + c[None, :], mask=mask, other=0.0)
        var = tl.load(var_ptr + g[:, None] * channels + c[None, :], mask=mask, other=0.0)
        usable = mask & (count > 1)[:, None] & (tl.abs(mean + var) < float("inf"))
        unbiased = count / tl.maximum(count - 1, 1)
        number += tl.sum(usable.to(tl.float64), 0)
        means += tl.sum(tl.where(usable, mean, 0.0), 0)
        variances += tl.sum(tl.where(usable, var * unbiased[:, None], 0.0), 0)
    running_mean = tl.load(running_mean_ptr + c, mask=in_c, other=0.0).to(tl.float64)
    running_var = tl.load(running_var_ptr + c, mask=in_c, other=0.0).to(tl.float64)
    some = number > 0
    number = tl.maximum(number, 1.0)
    tl.store(out_ptr + c, tl.where(some, means / number, running_mean), mask=in_c)
    variances = tl.where(some, variances / number, running_var)
    tl.store(out_ptr + channels + c, variances, mask=in_c)


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
        shift: Tensor,
        slope: Tensor,
        groups: Groups,
    ) -> Tensor:
        return self._affine(x, mean, scale, shift, groups, grad, slope)

    def averages(
        self, count: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups, channels = mean.shape
        out = running_mean.new_empty(2, channels)
        _launch(
            _averages_kernel,
            (triton.cdiv(channels, 64), 1, 1),
            *_by_group(count),
            *_by_group(mean),
            var.contiguous(),
            running_mean,
            running_var,
            out,
            groups,
            channels,
            BLOCK_G=16,
            BLOCK_C=64,
        )
        return out[0], out[1]

    def _sums(self, x: Tensor, groups: Groups, grad: Tensor | None, mean: Tensor | None) -> Tensor:
        gradient = grad is not None
        x = _dense(x)
        grad = x if grad is None else _as_laid_out(grad, x)
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
        _launch(
            _sums_kernel,
            (len(chunks.group), blocks, parts),
            x,
            grad,
            sums if mean is None else mean.contiguous(),
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
            SORTED=chunks.order is not None,
            GRADIENT=gradient,
            ACC=_acc(x),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            AT_ONCE=_AT_ONCE,
            ALIGNED=_alignment(x),
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
        scale: Tensor,
        shift: Tensor,
        groups: Groups,
        grad: Tensor | None,
        slope: Tensor | None,
    ) -> Tensor:
        x = _dense(x)
        channels, positions = x.shape[1], x.shape[2] * x.shape[3]
        block_c, block_p = _blocks(x)
        out = torch.empty_like(x)
        _launch(
            _affine_kernel,
            (len(x), triton.cdiv(channels, block_c), triton.cdiv(positions, block_p)),
            x,
            x if grad is None else _as_laid_out(grad, x),
            x if groups.ids is None else groups.ids,
            mean.contiguous(),
            scale.contiguous(),
            *_by_group(shift),
            *_by_group(mean if slope is None else slope),
            out,
            channels,
            positions,
            *_strides(x),
            GROUPED=groups.ids is not None,
            GRADIENT=grad is not None,
            ACC=_acc(x),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            ALIGNED=_alignment(x),
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


def _by_group(values: Tensor) -> tuple[Tensor, int]:
    """``(G, C)`` or ``(C,)``, for all groups, and the stride of the groups."""
    if values.stride(-1) != 1:
        values = values.contiguous()
    return values, values.stride(0) if values.dim() > 1 else 0


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy in one of the two formats.

    Raises:
        ValueError: a row has too many elements.
    """
    if x[0].numel() > _MOST_ELEMENTS:
        raise ValueError(
            f"BN.KERNELS triton takes rows of at most {_MOST_ELEMENTS} elements, and one of "
            f"{tuple(x.shape)} has {x[0].numel()}; torch takes any."
        )
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _as_laid_out(grad: Tensor, x: Tensor) -> Tensor:
    """``grad``, or a copy with the strides of ``x``."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, channels and positions."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


def _alignment(x: Tensor) -> int:
    """Neighbouring positions that can be read at once: each map begins at a multiple of them."""
    stride_n, stride_c, stride_p = _strides(x)
    if stride_p != 1:
        return 1
    return math.gcd(_MOST_AT_ONCE, x.shape[2] * x.shape[3], stride_n, stride_c)


def _blocks(x: Tensor) -> tuple[int, int]:
    """Channels and positions of a tile: as many neighbours in memory as there are."""
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and positions > 1:
        block_c = min(triton.next_power_of_2(channels), _CHANNELS)
        return block_c, min(triton.next_power_of_2(positions), _TILE_LAST // block_c)
    block_p = min(triton.next_power_of_2(positions), _POSITIONS)
    return min(triton.next_power_of_2(channels), _TILE // block_p), block_p
