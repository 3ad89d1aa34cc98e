"""Triton kernels of `sparse_attn.scoring`: pooled block scores and row-wise log-sum-exp.

Both recompute q.k tile by tile; neither stores a logit. Softmax runs in base 2 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_LN_2: tl.constexpr = tl.constexpr(LN_2)


@triton.jit
def _load_rows(base, offs, length, stride, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[rows, HEAD_DIM] of a matrix of `length` rows and D columns; 0 outside."""
    offs_d = tl.arange(0, HEAD_DIM)
    mask = (offs[:, None] < length) & (offs_d[None, :] < D)
    return tl.load(base + offs.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _logits_log2(
    q, k_base, offs_m, offs_n, first, last, S, stride_kn, shift, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [BLOCK_M, BLOCK_N]; -inf for keys outside first .. last - 1 or in the future."""
    k = _load_rows(k_base, offs_n, S, stride_kn, D, HEAD_DIM)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    seen = (offs_n[None, :] >= first) & (offs_n[None, :] < last)
    if IS_CAUSAL:
        seen = seen & (offs_n[None, :] <= offs_m[:, None] + shift)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _block_mass_kernel(
    Q, K, LSE, MASS, START, END,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    H, GROUP, L, S, num_key_blocks, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: one query block of one head against all key blocks of its batch row's range.

    Reads q [BLOCK_M, D] once, each k [BLOCK_N, D], lse [BLOCK_M]; writes one number a key block:
    sum over the tile of 2^(s - lse). Blocks outside the range keep the zeros they were given.
    """
    i, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    first, last = tl.load(START + b), tl.load(END + b)
    offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    q_base = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = _load_rows(q_base, offs_m, L, stride_qm, D, HEAD_DIM)
    lse = tl.load(LSE + bh.to(tl.int64) * L + offs_m, mask=offs_m < L, other=float("inf")) * _LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # rows that see no key: 2^-inf = 0

    end = last
    if IS_CAUSAL:
        end = tl.minimum(last, i * BLOCK_M + BLOCK_M + S - L)
    row = MASS + (bh.to(tl.int64) * tl.num_programs(0) + i) * num_key_blocks
    for j in tl.range(first // BLOCK_N, tl.cdiv(end, BLOCK_N)):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        s = _logits_log2(
            q, k_base, offs_m, offs_n, first, last, S, stride_kn, S - L, qk_scale, D, HEAD_DIM, IS_CAUSAL
        )
        p = tl.exp2(s - lse[:, None])
        tl.store(row + j, tl.sum(tl.sum(p, 1), 0))


@triton.jit
def _row_lse_kernel(
    Q, K, LSE, START, END,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    H, GROUP, L, S, qk_scale,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: the log-sum-exp of one query block of one head over its batch row's key range.

    Reads q [BLOCK_M, D] once and each k [BLOCK_N, D]; writes lse [BLOCK_M] (natural log, -inf where a
    query sees no key).
    """
    i, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    first, last = tl.load(START + b), tl.load(END + b)
    offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    q_base = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = _load_rows(q_base, offs_m, L, stride_qm, D, HEAD_DIM)

    end = last
    if IS_CAUSAL:
        end = tl.minimum(last, i * BLOCK_M + BLOCK_M + S - L)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for j in tl.range(first // BLOCK_N, tl.cdiv(end, BLOCK_N)):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        s = _logits_log2(
            q, k_base, offs_m, offs_n, first, last, S, stride_kn, S - L, qk_scale, D, HEAD_DIM, IS_CAUSAL
        )
        m_new = tl.maximum(m_i, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: -inf - 0, not -inf - -inf
        l_i = l_i * tl.exp2(m_i - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        m_i = m_new
    lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_i)) * _LN_2)
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
    lse = lse.contiguous()
    _block_mass_kernel[(Lb, B * H)](
        q, k, lse, mass, start, end, *arguments, Sb, scale * LOG2_E,
        **_constants(q, block_m, block_n), IS_CAUSAL=is_causal,
    )  # fmt: skip
    return mass


def row_lse(q: Tensor, k: Tensor, scale: float, is_causal: bool, start: Tensor, end: Tensor) -> Tensor:
    """float32 [B, Hq, L]; see `sparse_attn.scoring.row_lse`. Args: as `block_mass`."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, arguments = _arguments(q, k)
    block_m, block_n = (128, 64) if q.dtype != torch.float32 else (64, 32)
    _row_lse_kernel[(triton.cdiv(q.shape[2], block_m), q.shape[0] * q.shape[1])](
        q, k, lse, start, end, *arguments, scale * LOG2_E,
        **_constants(q, block_m, block_n), IS_CAUSAL=is_causal,
    )  # fmt: skip
    return lse


def _arguments(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Both tensors with a last stride of 1, and the strides and sizes that both kernels take."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    (_, H, L, _), (Hkv, S) = q.shape, k.shape[1:3]
    return q, k, (*q.stride()[:3], *k.stride()[:3], H, H // Hkv, L, S)


def _constants(q: Tensor, block_m: int, block_n: int) -> dict[str, int]:
    head_dim = max(triton.next_power_of_2(q.shape[3]), 16)
    warps = 8 if block_m * max(block_n, head_dim) >= 128 * 128 else 4
    return {
        "D": q.shape[3], "HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip
