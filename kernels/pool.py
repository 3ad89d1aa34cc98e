"""Triton kernels of `sparse_attn.scoring`: pooled block scores and row-wise log-sum-exp.

Both recompute q.k tile by tile; neither stores a logit. Softmax runs in base 2 inside.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.softmax import LOG2_E, matmul, natural_log


@triton.jit
def _load_rows(base, offs, length, stride, D: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK: tl.constexpr):
    """[rows, HEAD_DIM] of a matrix of `length` rows and D columns; 0 outside. CHECK: rows may be."""
    offs_d = tl.arange(0, HEAD_DIM)
    address = base + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if CHECK:
        return tl.load(address, mask=(offs[:, None] < length) & (offs_d[None, :] < D), other=0.0)
    elif D != HEAD_DIM:
        return tl.load(address, mask=offs_d[None, :] < D, other=0.0)
    else:
        return tl.load(address)


@triton.jit
def _logits(
    q, k_base, offs_m, offs_n, first, last, S, stride_kn, shift, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [TILE_M, TILE_N]; MASKED: -inf for keys outside first .. last - 1 or in the future."""
    k = _load_rows(k_base, offs_n, S, stride_kn, D, HEAD_DIM, MASKED)
    s = matmul(q, tl.trans(k), None, PRECISION) * qk_scale
    if MASKED:
        seen = (offs_n[None, :] >= first) & (offs_n[None, :] < last)
        if IS_CAUSAL:
            seen = seen & (offs_n[None, :] <= offs_m[:, None] + shift)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _phases(
    first, last, first_query, shift, TILE_M: tl.constexpr, TILE_N: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """Key tiles lo .. hi - 1 hold every key that the queries see; clean_lo .. clean_hi - 1 need no mask."""
    end, whole = last, last
    if IS_CAUSAL:
        end = tl.minimum(last, first_query + TILE_M + shift)
        whole = tl.minimum(last, first_query + 1 + shift)
    lo, hi = first // TILE_N, tl.maximum(tl.cdiv(end, TILE_N), 0)
    clean_lo = tl.minimum(tl.cdiv(first, TILE_N), hi)
    clean_hi = tl.maximum(tl.minimum(whole // TILE_N, hi), clean_lo)
    return lo, clean_lo, clean_hi, hi


@triton.jit
def _pool_tiles(
    lo, hi, q, lse, k_base, mass, offs_m, rows, num_rows, num_cols, first, last, S, stride_kn, shift,
    qk_scale, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Key tiles lo .. hi - 1: sum 2^(s - lse) over each BLOCK_M x BLOCK_N part and store the sums."""
    for j in tl.range(lo, hi):
        offs_n = j * TILE_N + tl.arange(0, TILE_N)
        s = _logits(
            q, k_base, offs_m, offs_n, first, last, S, stride_kn, shift, qk_scale,
            D, HEAD_DIM, PRECISION, IS_CAUSAL, MASKED,
        )  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        if BLOCK_N == TILE_N:
            p = tl.sum(p, 1)[:, None]
        else:
            p = tl.sum(tl.reshape(p, [TILE_M, TILE_N // BLOCK_N, BLOCK_N]), 2)
        p = tl.sum(tl.reshape(p, [TILE_M // BLOCK_M, BLOCK_M, TILE_N // BLOCK_N]), 1)
        cols = j * (TILE_N // BLOCK_N) + tl.arange(0, TILE_N // BLOCK_N)
        inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
        tl.store(mass + rows.to(tl.int64)[:, None] * num_cols + cols[None, :], p, mask=inside)


@triton.jit
def _block_mass_kernel(
    Q, K, LSE, MASS, START, END,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    H, GROUP, L, S, num_rows, num_cols, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M queries of one head (whole query blocks) and the keys of its batch row's range.

    Reads q [TILE_M, D] once, each k [TILE_N, D], lse [TILE_M]; writes one number for each (query block,
    key block): the sum of 2^(s - lse). Blocks outside the range keep the zeros they were given.
    """
    i, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    first, last = tl.load(START + b), tl.load(END + b)
    offs_m = i * TILE_M + tl.arange(0, TILE_M)
    q_base = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = _load_rows(q_base, offs_m, L, stride_qm, D, HEAD_DIM, True)
    lse = tl.load(LSE + bh.to(tl.int64) * L + offs_m, mask=offs_m < L, other=float("inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # rows that see no key: 2^-inf = 0
    rows = i * (TILE_M // BLOCK_M) + tl.arange(0, TILE_M // BLOCK_M)
    mass = MASS + bh.to(tl.int64) * num_rows * num_cols

    shift = S - L
    lo, clean_lo, clean_hi, hi = _phases(first, last, i * TILE_M, shift, TILE_M, TILE_N, IS_CAUSAL)
    _pool_tiles(
        lo, clean_lo, q, lse, k_base, mass, offs_m, rows, num_rows, num_cols, first, last, S,
        stride_kn, shift, qk_scale, D, HEAD_DIM, PRECISION, TILE_M, TILE_N, BLOCK_M, BLOCK_N, IS_CAUSAL, True,
    )  # fmt: skip
    _pool_tiles(
        clean_lo, clean_hi, q, lse, k_base, mass, offs_m, rows, num_rows, num_cols, first, last, S,
        stride_kn, shift, qk_scale, D, HEAD_DIM,
        PRECISION, TILE_M, TILE_N, BLOCK_M, BLOCK_N, IS_CAUSAL, False,
    )  # fmt: skip
    _pool_tiles(
        clean_hi, hi, q, lse, k_base, mass, offs_m, rows, num_rows, num_cols, first, last, S,
        stride_kn, shift, qk_scale, D, HEAD_DIM, PRECISION, TILE_M, TILE_N, BLOCK_M, BLOCK_N, IS_CAUSAL, True,
    )  # fmt: skip


@triton.jit
def _sum_tiles(
    m_i, l_i, lo, hi, q, k_base, offs_m, first, last, S, stride_kn, shift, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Key tiles lo .. hi - 1 into the running maximum m_i and sum l_i, both [TILE_M], base 2."""
    for j in tl.range(lo, hi):
        offs_n = j * TILE_N + tl.arange(0, TILE_N)
        s = _logits(
            q, k_base, offs_m, offs_n, first, last, S, stride_kn, shift, qk_scale,
            D, HEAD_DIM, PRECISION, IS_CAUSAL, MASKED,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1))
        safe = m_new
        if MASKED:  # nothing seen yet: -inf - 0, not -inf - -inf
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        m_i = m_new
    return m_i, l_i


@triton.jit
def _row_lse_kernel(
    Q, K, LSE, START, END,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    H, GROUP, L, S, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: the log-sum-exp of TILE_M queries of one head over its batch row's key range.

    Reads q [TILE_M, D] once and each k [TILE_N, D]; writes lse [TILE_M] (natural log, -inf where a query
    sees no key).
    """
    i, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    first, last = tl.load(START + b), tl.load(END + b)
    offs_m = i * TILE_M + tl.arange(0, TILE_M)
    q_base = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = _load_rows(q_base, offs_m, L, stride_qm, D, HEAD_DIM, True)

    shift = S - L
    m_i = tl.full([TILE_M], float("-inf"), tl.float32)
    l_i = tl.zeros([TILE_M], tl.float32)
    lo, clean_lo, clean_hi, hi = _phases(first, last, i * TILE_M, shift, TILE_M, TILE_N, IS_CAUSAL)
    m_i, l_i = _sum_tiles(
        m_i, l_i, lo, clean_lo, q, k_base, offs_m, first, last, S, stride_kn, shift, qk_scale,
        D, HEAD_DIM, PRECISION, TILE_N, IS_CAUSAL, True,
    )  # fmt: skip
    m_i, l_i = _sum_tiles(
        m_i, l_i, clean_lo, clean_hi, q, k_base, offs_m, first, last, S, stride_kn, shift, qk_scale,
        D, HEAD_DIM, PRECISION, TILE_N, IS_CAUSAL, False,
    )  # fmt: skip
    m_i, l_i = _sum_tiles(
        m_i, l_i, clean_hi, hi, q, k_base, offs_m, first, last, S, stride_kn, shift, qk_scale,
        D, HEAD_DIM, PRECISION, TILE_N, IS_CAUSAL, True,
    )  # fmt: skip
    lse = natural_log(m_i, tl.where(l_i == 0.0, 1.0, l_i))  # no key: m_i is -inf, and so is this
    tl.store(LSE + bh.to(tl.int64) * L + offs_m, lse, mask=offs_m < L)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    start: Tensor,
    end: Tensor,
) -> Tensor:
    """float32 [B, Hq, Lb, Sb]; see `sparse_attn.scoring.block_mass`.

    Args:
        block_m, block_n: 16, 32, 64 or 128: one tile of the tensor cores' matmul.
        start, end: int32 [B], the key range of each row of the batch.
    """
    B, H, L, _ = q.shape
    Lb, Sb = triton.cdiv(L, block_m), triton.cdiv(k.shape[2], block_n)
    mass = torch.zeros(B, H, Lb, Sb, dtype=torch.float32, device=q.device)
    q, k, arguments = _arguments(q, k)
    tile = _tile(q, block_m, block_n)
    assert tile is not None, "ask `fits` first"
    _block_mass_kernel[(triton.cdiv(L, tile["TILE_M"]), B * H)](
        q, k, lse.contiguous(), mass, start, end, *arguments, Lb, Sb, scale * LOG2_E.value,
        **tile, BLOCK_M=block_m, BLOCK_N=block_n, IS_CAUSAL=is_causal,
    )  # fmt: skip
    return mass


def row_lse(q: Tensor, k: Tensor, scale: float, is_causal: bool, start: Tensor, end: Tensor) -> Tensor:
    """float32 [B, Hq, L]; see `sparse_attn.scoring.row_lse`. Args: as `block_mass`."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, arguments = _arguments(q, k)
    tile = _tile(q, 16, 16)
    assert tile is not None, "ask `fits` first"
    _row_lse_kernel[(triton.cdiv(q.shape[2], tile["TILE_M"]), q.shape[0] * q.shape[1])](
        q, k, lse, start, end, *arguments, scale * LOG2_E.value, **tile, IS_CAUSAL=is_causal
    )
    return lse


def _arguments(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Both tensors with a last stride of 1, and the strides and sizes that both kernels take."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    (_, H, L, _), (Hkv, S) = q.shape, k.shape[1:3]
    return q, k, (*q.stride()[:3], *k.stride()[:3], H, H // Hkv, L, S)


def fits(q: Tensor, block_m: int, block_n: int) -> bool:
    """Whether the kernels take this dtype and these block sizes, and the GPU has the shared memory."""
    sizes = (16, 32, 64, 128)
    plain = block_m in sizes and block_n in sizes and q.dtype != torch.float64
    return plain and _tile(q, block_m, block_n) is not None


# Largest first; the tile of a block size above it grows to the block. On an H100 (bf16, B1 H32 S32768, D 128
# and 64) 128 x 64 with 4 warps and 2 stages was within 5 % of the best for blocks of 32, 64 and 128, and
# within 10 % for the lse. 3 stages cost up to 41 %, 128 x 128 with 8 warps up to 55 %; a tile as small as a
# block of 32 took 57 ms instead of 20.
_TILES = ((128, 64, 2), (64, 64, 2), (64, 32, 2), (64, 32, 1), (16, 16, 1))


def _tile(q: Tensor, block_m: int, block_n: int) -> dict[str, Any] | None:
    """Sizes that the compiler needs to know; None where nothing fits into the GPU's shared memory."""
    D, row_bytes = q.shape[3], q.element_size()
    head_dim = max(triton.next_power_of_2(D), 16)
    precision = "ieee"
    if q.dtype == torch.float32:
        # Three tf32 products are nearly float32 ("ieee" unrolls into scalar code that took 55 s to compile).
        # Each operand is split in two, and on an H100 a head size of 256 failed: the portable code takes it.
        precision, row_bytes = "tf32x3" if torch.version.hip is None else "ieee", 2 * row_bytes
        if head_dim > 128:
            return None
    for tile_m, tile_n, stages in _TILES:
        tile_m, tile_n = max(tile_m, block_m), max(tile_n, block_n)
        if head_dim * row_bytes * (tile_m + stages * tile_n) <= _shared_bytes(q.device):
            return {
                "D": D, "HEAD_DIM": head_dim, "TILE_M": tile_m, "TILE_N": tile_n, "PRECISION": precision,
                "num_warps": 4, "num_stages": stages,
            }  # fmt: skip
    return None


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may use; Triton's interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 40
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
