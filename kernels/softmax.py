"""Pieces shared by the forward and backward Triton kernels: addresses, tiles of keys, list walking.

Letters as in `sparse_attn.functional`. In the kernels a *step* visits one tile of BLOCK_N keys:

* KEY_BLOCK >= BLOCK_N: a listed block is walked in KEY_BLOCK / BLOCK_N sub-tiles of neighbouring keys;
* KEY_BLOCK < BLOCK_N: BLOCK_N / KEY_BLOCK listed blocks are gathered into one tile. A column list is
  the same thing with KEY_BLOCK = 1.

Scores live in base 2: `s * scale_log2`, with `scale_log2 = scale * LOG2_E`, is log2 of exp(s * scale).
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The interpreter multiplies the bit patterns of bf16 operands, so there they are widened first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in fp32; acc None starts from zero."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def list_group(batch, head, list_stride_b, list_stride_h, list_head_div):
    """Which (b', h') of a layout a (batch, query head) reads; strides are 0 where it broadcasts."""
    return batch * list_stride_b + (head // list_head_div) * list_stride_h


@triton.jit
def load_rows(base, rows, stride, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Rows of a [num_rows, D] matrix by number: [len(rows), BLOCK_D], zero past D (and past num_rows)."""
    offs_d = tl.arange(0, BLOCK_D)
    address = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if CHECK_ROWS:
        if D == BLOCK_D:
            tile = tl.load(address, mask=(rows < num_rows)[:, None], other=0.0)
        else:
            tile = tl.load(address, mask=(rows < num_rows)[:, None] & (offs_d < D)[None, :], other=0.0)
    else:
        if D == BLOCK_D:
            tile = tl.load(address)
        else:
            tile = tl.load(address, mask=(offs_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, rows, stride, num_rows, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`; rows past num_rows and elements past D are not written."""
    offs_d = tl.arange(0, BLOCK_D)
    address = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    keep = (rows < num_rows)[:, None]
    if D != BLOCK_D:
        keep = keep & (offs_d < D)[None, :]
    tl.store(address, tile.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_tile(
    base,
    desc,
    batch,
    head,
    first_row,
    rows,
    stride,
    num_rows,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """BLOCK_ROWS neighbouring rows from first_row on. A tensor descriptor fills zeros past the edges."""
    if USE_TMA:
        tile = desc.load([batch, head, first_row, 0]).reshape(BLOCK_ROWS, BLOCK_D)
    else:
        start = base + first_row.to(tl.int64) * stride
        tile = load_rows(start, rows - first_row, stride, num_rows - first_row, D, BLOCK_D, CHECK_ROWS)
    return tile


@triton.jit
def gathered_keys(
    list_ptr, step, count, S, KEY_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr
):
    """The key numbers of a tile gathered from BLOCK_N / KEY_BLOCK entries; S where there is no entry."""
    offs = tl.arange(0, BLOCK_N)
    entry = step * (BLOCK_N // KEY_BLOCK) + offs // KEY_BLOCK
    if CHECK:
        block = tl.load(list_ptr + entry, mask=entry < count, other=0)
        keys = tl.where(entry < count, block * KEY_BLOCK + offs % KEY_BLOCK, S)
    else:
        keys = tl.load(list_ptr + entry) * KEY_BLOCK + offs % KEY_BLOCK
    return keys


@triton.jit
def num_steps(entries, KEY_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, ROUND_UP: tl.constexpr):
    """Steps that `entries` listed blocks take; where several share a tile, whole tiles or all of them."""
    if KEY_BLOCK >= BLOCK_N:
        steps = entries * (KEY_BLOCK // BLOCK_N)
    elif ROUND_UP:
        steps = (entries + (BLOCK_N // KEY_BLOCK - 1)) // (BLOCK_N // KEY_BLOCK)
    else:
        steps = entries // (BLOCK_N // KEY_BLOCK)
    return steps
