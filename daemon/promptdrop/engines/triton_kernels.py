"""The functions of `kernels.py` on a GPU, in Triton.

Each program of a kernel has one row, that is one token, in its registers; a program of `gated_products`
has a tile.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from promptdrop.engines.rows import FP8, LARGEST, SMALLEST_SCALE, Branch, Norm, Rows, Scaled

# TILE: the rows of a matrix product, and the columns of each weight, that a program has in registers.
# DEPTH: how much of the inner dimension it multiplies in one step. Other values were 2 to 40% slower.
TILE, DEPTH = 128, 64
# The number of rows from which on a CPU's launches of a whole evaluation (36 ms with `gated_products`,
# else 20) are hidden behind the GPU's 43 ms.
MANY = 2048


def normed(x: Tensor, norm: Norm, fp8: bool) -> Rows:
    """See `kernels.normed`."""
    return _rows(x, None, norm, fp8)[1]


def added(x: Tensor, branch: Branch) -> Tensor:
    """See `kernels.added`."""
    return _rows(x, branch, None, False)[0]


def added_normed(x: Tensor, branch: Branch, norm: Norm, fp8: bool) -> tuple[Tensor, Rows]:
    """See `kernels.added_normed`."""
    return _rows(x, branch, norm, fp8)


def scaled(x: Tensor) -> Scaled:
    """See `kernels.scaled`."""
    out = _scaled_rows(x)
    _scale_row[(len(x),)](
        x, *out, x.shape[1], LARGEST, SMALLEST_SCALE, BLOCK=_block(x.shape[1]), num_warps=4
    )
    return out


def normed_rotated(x: Tensor, norm: Norm, freqs: Tensor) -> Tensor:
    """See `kernels.normed_rotated`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = freqs.shape[1]
    heads = x.shape[1] // (2 * half)
    _norm_rotate[(len(x),)](
        x, norm.weight, freqs, out, x.stride(0), norm.eps,
        HEADS=heads, PADDED=_block(heads), HALF=half, num_warps=4,
    )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor, fp8: bool) -> Rows:
    """See `kernels.gated`."""
    out = _empty(gate, fp8)
    values, scales = out if fp8 else (out, out)
    hidden = gate.shape[1]
    _gate[(len(gate),)](
        gate, up, values, scales, LARGEST, SMALLEST_SCALE,
        COLUMNS=hidden, BLOCK=_block(hidden), FP8=fp8, num_warps=8,
    )  # fmt: skip
    return out


def gated_products(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """See `kernels.gated_products`. The weights are `joined`."""
    (rows, dim), hidden = x.shape, len(w1)
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    apart = w3.storage_offset() - w1.storage_offset()
    weights = w1.as_strided((2, hidden, dim), (apart, dim, 1))
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(hidden, TILE)
    _gated_products[(min(tiles, _multiprocessors(x)),)](
        TensorDescriptor.from_tensor(x, [TILE, DEPTH]),
        TensorDescriptor.from_tensor(weights, [2, TILE, DEPTH]),
        TensorDescriptor.from_tensor(out, [TILE, TILE]),
        rows, hidden, dim, TILE=TILE, DEPTH=DEPTH, num_warps=8,
    )  # fmt: skip
    return out


def is_fast(x: Tensor, w1: Tensor, w3: Tensor) -> bool:
    """Whether `gated_products` can take these and is faster: on Hopper, by measurement, with many rows.

    With few rows, its launch, which takes the CPU longer, is not hidden behind the GPU's work.
    """
    return (
        len(x) >= MANY
        and joined(w1, w3)
        and x.dtype == w1.dtype
        and x.dtype.itemsize == 2
        and all(n % 8 == 0 for n in w1.shape)  # TMA needs rows that begin at a multiple of 16 bytes
        and torch.version.hip is None  # AMD has a 9.0, too
        and (_properties(x.device).major, _properties(x.device).minor) == (9, 0)
    )


def joined(w1: Tensor, w3: Tensor) -> bool:
    """Whether both weights lie in one storage, w3 behind w1."""
    one, other = (w.untyped_storage().data_ptr() for w in (w1, w3))
    return one == other and w3.storage_offset() > w1.storage_offset()


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _multiprocessors(x: Tensor) -> int:
    return (
        int(_properties(x.device).multi_processor_count) if x.is_cuda else 2
    )  # Triton's interpreter


def _rows(x: Tensor, branch: Branch | None, norm: Norm | None, fp8: bool) -> tuple[Tensor, Rows]:
    total = torch.empty_like(x) if branch else x
    out = _empty(x, fp8) if norm else x
    values, scales = out if isinstance(out, tuple) else (out, out)
    y, y_weight, y_eps, gate = branch or (x, x, 0.0, None)
    weight, eps, scale = norm or (x, 0.0, None)
    _add_norm[(len(x),)](
        x, y, y_weight, x if gate is None else gate, weight, x if scale is None else scale,
        total, values, scales, y_eps, eps, LARGEST, SMALLEST_SCALE,
        COLUMNS=x.shape[1], BLOCK=_block(x.shape[1]), ADD=branch is not None, GATE=gate is not None,
        NORM=norm is not None, SCALE=scale is not None, FP8=fp8, num_warps=8,
        enable_fp_fusion=False,  # gate * term is rounded before it is added
    )  # fmt: skip
    return total, out


def _empty(x: Tensor, fp8: bool) -> Rows:
    """Allocate the rows that a kernel writes, of the shape of x."""
    return _scaled_rows(x) if fp8 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _scaled_rows(x: Tensor) -> Scaled:
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return Scaled(torch.empty(x.shape, dtype=FP8, device=x.device), scales)


def _block(columns: int) -> int:
    return int(triton.next_power_of_2(columns))


@triton.jit
def _write(value, out, scales, row, column, largest, smallest, COLUMNS, FP8: tl.constexpr):
    """Write a row of float32 as the next product takes it."""
    if FP8:
        scale = tl.maximum(tl.max(tl.abs(value), axis=0) / largest, smallest)
        tl.store(scales + row, scale)
        value = value / scale
    to = out + row * COLUMNS + column
    tl.store(to, value.to(out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def _rounded(value, like):
    """Round a float32 to the dtype that `like` points to, as the library does there."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _gated(opening, value, dtype: tl.constexpr):
    """Compute silu(opening) * value in float32. The silu is rounded to dtype, as in the library."""
    return (opening * tl.sigmoid(opening)).to(dtype).to(tl.float32) * value


@triton.jit
def _in_bands(tile, tiles, down, BAND: tl.constexpr = 11):
    """Return row and column of a tile.

    Tiles are numbered down a band of BAND rows, then down the next column of the band, so that programs
    that run together share what they read. Hopper's 132 programs are 12 columns of 11: 2.6% faster than
    with bands of 8.
    """
    across = tiles // down
    first = tile // (BAND * across) * BAND
    high = min(down - first, BAND)
    return first + tile % (BAND * across) % high, tile % (BAND * across) // high


@triton.jit
def _add_norm(
    x, y, y_weight, gate, weight, scale, total, out, scales, y_eps, eps, largest, smallest,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    value = tl.load(x + row * COLUMNS + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        term = tl.load(y + row * COLUMNS + column, mask=inside, other=0).to(tl.float32)
        term = _rounded(term * tl.rsqrt(tl.sum(term * term, axis=0) / COLUMNS + y_eps), x)
        term = _rounded(term * tl.load(y_weight + column, mask=inside, other=0).to(tl.float32), x)
        if GATE:
            opening = tl.load(gate + column, mask=inside, other=0).to(tl.float32)
            term = _rounded(term * _rounded(2 * tl.sigmoid(2 * opening) - 1, x), x)  # tanh
        value = _rounded(value + term, x)
        tl.store(total + row * COLUMNS + column, value.to(total.dtype.element_ty), mask=inside)
    if NORM:
        value = _rounded(value * tl.rsqrt(tl.sum(value * value, axis=0) / COLUMNS + eps), x)
        value = _rounded(value * tl.load(weight + column, mask=inside, other=0).to(tl.float32), x)
        if SCALE:
            factor = 1 + tl.load(scale + column, mask=inside, other=0).to(tl.float32)
            value = _rounded(value * _rounded(factor, x), x)
        _write(value, out, scales, row, column, largest, smallest, COLUMNS, FP8)


@triton.jit
def _norm_rotate(
    x, weight, freqs, out, stride, eps,
    HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)[:, None]
    channel = tl.arange(0, 2 * HALF)[None, :]
    inside = (head < HEADS) & (channel >= 0)
    column = head * (2 * HALF) + channel  # [PADDED, 2 HALF]
    value = tl.load(x + row * stride + column, mask=inside, other=0).to(tl.float32)
    square = tl.sum(value * value, axis=1)[:, None]
    value = _rounded(value * tl.rsqrt(square / (2 * HALF) + eps), x)
    value = _rounded(value * tl.load(weight + channel).to(tl.float32), x)
    # Whole lines are loaded and stored; a pair is in the registers of one thread already.
    even, odd = tl.split(tl.reshape(value, (PADDED, HALF, 2)))
    turn = tl.load(freqs + row * (2 * HALF) + channel)
    cosine, sine = tl.split(tl.reshape(turn, (1, HALF, 2)))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    turned = tl.reshape(turned, (PADDED, 2 * HALF)).to(out.dtype.element_ty)
    tl.store(out + row * (HEADS * 2 * HALF) + column, turned, mask=inside)


@triton.jit
def _gate(
    gate, up, out, scales, largest, smallest,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    opening = tl.load(gate + row * COLUMNS + column, mask=inside, other=0).to(tl.float32)
    value = tl.load(up + row * COLUMNS + column, mask=inside, other=0).to(tl.float32)
    value = _rounded(_gated(opening, value, gate.dtype.element_ty), gate)
    _write(value, out, scales, row, column, largest, smallest, COLUMNS, FP8)


@triton.jit
def _gated_products(x, weights, out, rows, hidden, dim, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Compute tiles of both products at once, as one 128 x 256 product of the tensor cores.

    A program does several tiles, and loads for the next one while it stores.
    """
    down = tl.cdiv(rows, TILE)
    tiles = down * tl.cdiv(hidden, TILE)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _in_bands(tile, tiles, down)
        sums = tl.zeros((TILE, 2 * TILE), tl.float32)
        for inner in tl.range(0, dim, DEPTH, num_stages=3):
            some = x.load([row * TILE, inner])  # [TILE, DEPTH]
            both = weights.load([0, column * TILE, inner]).reshape(2 * TILE, DEPTH)
            sums = tl.dot(some, both.T, sums)
        gate, up = tl.split(sums.reshape(TILE, 2, TILE).permute(0, 2, 1))  # each [TILE, TILE]
        opening, value = gate.to(out.dtype).to(tl.float32), up.to(out.dtype).to(tl.float32)
        value = _gated(opening, value, out.dtype)
        out.store([row * TILE, column * TILE], value.to(out.dtype))


@triton.jit
def _scale_row(x, out, scales, COLUMNS, largest, smallest, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * COLUMNS + column, mask=column < COLUMNS, other=0).to(tl.float32)
    _write(value, out, scales, row, column, largest, smallest, COLUMNS, True)
