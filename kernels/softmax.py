"""Pieces shared by the forward and backward Triton kernels: addresses, tiles of keys, list walking.

Letters as in `sparse_attn.functional`. A *step* visits one tile of BLOCK_N keys: a listed block of
KEY_BLOCK keys, or a part of one.

Scores of 16-bit inputs live in base 2, `s * factor` with factor = scale * LOG2_E, which saves a product
an element; those of fp32 inputs in base e (NATURAL), since rounding that factor would cost the last bits.
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
def score_factor(scale, NATURAL: tl.constexpr):
    """What turns a raw score (given `scale`), or a natural logarithm (given as `scale`), into an exponent."""
    return scale if NATURAL else scale * LOG2_E


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """e^x or 2^x."""
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def natural_log(exponent, total):
    """log(2^exponent * total): an lse from a running maximum in base 2. It is rounded once after the
    logarithm; the sum in base 2, turned to base e, was rounded twice, once at 1.44 times the size."""
    return tl.fma(exponent, LN_2, tl.log(total))


@triton.jit
def program_place(tiles, num_heads, span):
    """(tile, batch and head) of this program. `span` heads run side by side, tile by tile: their first
    (longest) tiles start before any later one, and their keys and values share the L2 cache."""
    section = tl.program_id(0) // (tiles * span)
    within = tl.program_id(0) % (tiles * span)
    heads_here = tl.minimum(span, num_heads - section * span)
    return within // heads_here, section * span + within % heads_here


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
    elif D == BLOCK_D:
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
def gathered_keys(list_ptr, step, count, S, BLOCK_C: tl.constexpr, CHECK: tl.constexpr):
    """int32 [BLOCK_C]: the key numbers of one step of a column list; S where there is no entry."""
    entry = step * BLOCK_C + tl.arange(0, BLOCK_C)
    if not CHECK:
        return tl.load(list_ptr + entry)
    return tl.load(list_ptr + entry, mask=entry < count, other=S)


@triton.jit
def member_rows(entry, BLOCK: tl.constexpr, SMALL: tl.constexpr):
    """bool [BLOCK]: rows of a merged tile whose own small block holds this entry."""
    return ((entry >> (tl.arange(0, BLOCK) // SMALL)) & 1) > 0
