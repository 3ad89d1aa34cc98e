"""The backward attention kernels for dq, and the row sums that both backward kernels need.

Everything is recomputed from q, k and the forward's lse. With p = exp(q.k * scale - lse) and
delta = rowsum(grad_out * out) - grad_lse:

    dv = p^T grad_out,  ds = p * (grad_out v^T - delta),  dq = ds k * scale,  dk = ds^T q * scale

dq walks a query block's row, dk and dv (`attend_bwd_dkdv.py`) walk a key block's transposed row: no
program writes what another writes, so a block list gives the same bits every time.
"""

import triton
import triton.language as tl

from sparse_attn.kernels.softmax import (
    gathered_keys,
    list_group,
    load_rows,
    load_tile,
    matmul,
    member_rows,
    power,
    program_place,
    score_factor,
    store_rows,
)


@triton.jit
def load_lse(lse, rows, num_rows, NATURAL: tl.constexpr):
    """lse in the base of the exponents; +inf (so that p = 0) for queries that attend nothing or do not
    exist."""
    value = score_factor(tl.load(lse + rows, mask=rows < num_rows, other=-float("inf")), NATURAL)
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def row_dot_kernel(
    a,  # [B, H, L, D]
    b,  # [B, H, L, D]
    out,  # [B, H, L] fp32
    stride_ab,
    stride_ah,
    stride_am,
    stride_bb,
    stride_bh,
    stride_bm,
    H,
    L,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_M sums over the last dimension of a * b, in fp32."""
    tiles = tl.cdiv(L, BLOCK_M)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    a += batch_head // H * stride_ab + batch_head % H * stride_ah
    b += batch_head // H * stride_bb + batch_head % H * stride_bh
    x = load_rows(a, rows, stride_am, L, D, BLOCK_D, True).to(tl.float32)
    y = load_rows(b, rows, stride_bm, L, D, BLOCK_D, True).to(tl.float32)
    tl.store(out + batch_head * L + rows, tl.sum(x * y, 1), mask=rows < L)


@triton.jit
def add_dq(
    dq,  # [BLOCK_M, BLOCK_D] fp32, without the scale
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    lse_m,  # [BLOCK_M], +inf for queries that take no part
    delta,  # [BLOCK_M]
    offs_m,  # [BLOCK_M]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    keys,  # [BLOCK_N]
    masked,
    L,
    S,
    factor,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of keys adds to dq of one tile of queries."""
    s = matmul(q, tl.trans(k), None, PRECISION)
    dp = matmul(do, tl.trans(v), None, PRECISION)  # here, so that it runs under the exponentials
    NATURAL: tl.constexpr = k.dtype == tl.float32
    p = power(s * factor - lse_m[:, None], NATURAL)
    if masked:
        seen = (keys < S)[None, :]
        if IS_CAUSAL:
            seen = seen & (keys[None, :] <= offs_m[:, None] + (S - L))
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta[:, None])
    return matmul(ds.to(k.dtype), k, dq, PRECISION)


@triton.jit
def attend_bwd_dq_kernel(
    q,  # [B, Hq, L, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    k_desc,
    v_desc,
    grad_out,  # [B, Hq, L, Dv]
    lse,  # [B, Hq, L] fp32
    delta,  # [B, Hq, L] fp32
    kept,  # [B, Hq, Lb, Sb] uint8
    dq,  # [B, Hq, L, D]
    offsets,
    indices,
    bounds,
    column_offsets,
    column_indices,
    column_bounds,
    order,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    B,
    Hq,
    gqa_group,
    L,
    S,
    Lb,
    Sb,
    column_rows,
    column_group,
    list_stride_b,
    list_stride_h,
    list_head_div,
    span,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program computes dq of one tile of BLOCK_M queries; tiles as in `attend_fwd_kernel`."""
    MERGE: tl.constexpr = BLOCK_M // QUERY_BLOCK if MERGED else 1
    SUB_M: tl.constexpr = 1 if MERGED else QUERY_BLOCK // BLOCK_M
    SUB_N: tl.constexpr = KEY_BLOCK // BLOCK_N
    tiles = tl.cdiv(Lb, MERGE) * SUB_M
    tile, batch_head = program_place(tiles, B * Hq, span)
    head = batch_head % Hq
    batch = batch_head // Hq
    kv_head = head // gqa_group
    group = list_group(batch, head, list_stride_b, list_stride_h, list_head_div).to(tl.int64)
    if MERGED:
        row = group * tiles + tile
        place = tile * MERGE + tl.arange(0, BLOCK_M) // QUERY_BLOCK
        query_block = tl.load(order + group * Lb + place, mask=place < Lb, other=0)
        offs_m = query_block * QUERY_BLOCK + tl.arange(0, BLOCK_M) % QUERY_BLOCK
        offs_m = tl.where(place < Lb, offs_m, L)
    else:
        query_block = tile // SUB_M
        if HAS_ORDER:
            query_block = tl.load(order + group * Lb + query_block)
        row = group * Lb + query_block
        offs_m = query_block * QUERY_BLOCK + (tile % SUB_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.load(offsets + row)
    middle = tl.load(bounds + row * 2) * SUB_N
    last = tl.load(bounds + row * 2 + 1) * SUB_N

    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    grad_out += batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    dq += batch.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
    lse += batch_head.to(tl.int64) * L
    delta += batch_head.to(tl.int64) * L
    if HAS_SKIP:
        kept += (batch_head.to(tl.int64) * Lb + query_block) * Sb

    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    factor = score_factor(scale, NATURAL)
    q_tile = load_rows(q, offs_m, stride_qm, L, HEAD_DIM, BLOCK_D, True)
    do_tile = load_rows(grad_out, offs_m, stride_gm, L, VALUE_DIM, BLOCK_DV, True)
    lse_m = load_lse(lse, offs_m, L, NATURAL)
    delta_m = tl.load(delta + offs_m, mask=offs_m < L, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # -- blocks
    list_ptr = indices + start
    entry = tl.load(list_ptr, mask=last > 0, other=0)
    for step in tl.range(0, last, num_stages=NUM_STAGES):
        first_key = (entry >> (MERGE if MERGED else 0)) * KEY_BLOCK + (step % SUB_N) * BLOCK_N
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(
            k,
            k_desc,
            batch,
            kv_head,
            first_key,
            keys,
            stride_kn,
            S,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            True,
            USE_TMA,
        )
        v_tile = load_tile(
            v,
            v_desc,
            batch,
            kv_head,
            first_key,
            keys,
            stride_vn,
            S,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_DV,
            True,
            USE_TMA,
        )
        row_lse = lse_m
        if MERGED:
            row_lse = tl.where(member_rows(entry, BLOCK_M, QUERY_BLOCK), lse_m, float("inf"))
        attended = True
        if HAS_SKIP:
            attended = tl.load(kept + entry) > 0
        if attended:
            acc = add_dq(
                acc, q_tile, do_tile, row_lse, delta_m, offs_m, k_tile, v_tile, keys, step >= middle,
                L, S, factor, IS_CAUSAL, PRECISION,
            )  # fmt: skip
        entry = tl.load(list_ptr + (step + 1) // SUB_N, mask=step + 1 < last, other=0)

    # -- columns
    if HAS_COLUMNS:
        start = tl.load(column_offsets + group * column_rows + query_block // column_group)
        unmasked = tl.load(column_bounds + row * 2)
        visible = tl.load(column_bounds + row * 2 + 1)
        for step in tl.range(0, tl.cdiv(visible, BLOCK_C), num_stages=NUM_STAGES):
            keys = gathered_keys(column_indices + start, step, visible, S, BLOCK_C, True)
            k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, True)
            v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, True)
            acc = add_dq(
                acc, q_tile, do_tile, lse_m, delta_m, offs_m, k_tile, v_tile, keys,
                (step + 1) * BLOCK_C > unmasked, L, S, factor, IS_CAUSAL, PRECISION,
            )  # fmt: skip
    store_rows(dq, offs_m, stride_dqm, L, acc * scale, HEAD_DIM, BLOCK_D)
