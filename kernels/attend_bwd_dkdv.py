"""The backward attention kernels for dk and dv: from the transposed block list, and of columns.

The formulas are those of `attend_bwd.py`. A block list needs no atomics. Columns add to fp32 buffers
with atomics, in no fixed order, from which the block kernel starts.
"""

import triton
import triton.language as tl

from sparse_attn.kernels.attend_bwd import load_lse
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
def add_dkdv(
    dk,  # [BLOCK_N, BLOCK_D] fp32, without the scale
    dv,  # [BLOCK_N, BLOCK_DV] fp32
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    row_lse,  # [BLOCK_M], +inf for queries that take no part
    delta,  # [BLOCK_M]
    keys,  # [BLOCK_N]
    queries,  # [BLOCK_M]
    member,  # bool [BLOCK_N], read where MERGED
    masked,
    L,
    S,
    factor,
    MERGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of queries adds to dk and dv of one tile of keys."""
    s = matmul(k, tl.trans(q), None, PRECISION)
    dp = matmul(v, tl.trans(do), None, PRECISION)  # here, so that it runs under the exponentials
    NATURAL: tl.constexpr = k.dtype == tl.float32
    p = power(s * factor - row_lse[None, :], NATURAL)
    if MERGED:
        p = tl.where(member[:, None], p, 0.0)
    if masked:
        p = tl.where(keys[:, None] <= queries[None, :] + (S - L), p, 0.0)
    dv = matmul(p.to(do.dtype), do, dv, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = matmul(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def attend_bwd_dkdv_kernel(
    q,  # [B, Hq, L, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    grad_out,  # [B, Hq, L, Dv]
    q_desc,
    grad_out_desc,
    lse,  # [B, Hq, L] fp32
    delta,  # [B, Hq, L] fp32
    kept,  # [B, Hq, Lb, Sb] uint8
    dk,  # [B, Hkv, S, D]
    dv,  # [B, Hkv, S, Dv]
    dk_columns,  # [B, Hkv, S, D] fp32 without the scale (HAS_COLUMNS)
    dv_columns,  # [B, Hkv, S, Dv] fp32
    offsets,  # of the transposed list
    indices,  # MERGED: query block << MERGE | one bit a key block
    bounds,  # [rows, 2] int32: first visible entry, first entry without a mask
    order,  # [B' * H'', Sb] int32: key blocks, longest row first; H'' is 1 or Hkv
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    B,
    Hkv,
    gqa_group,
    L,
    S,
    Lb,
    Sb,
    list_stride_b,
    list_stride_h,
    list_head_div,
    order_stride_b,
    order_stride_h,
    span,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
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
    """One program computes dk and dv of one tile of BLOCK_N keys of one key head: a layout block, a
    part of a larger one, or several small ones (MERGED). It sums over the query heads of the group."""
    MERGE: tl.constexpr = BLOCK_N // KEY_BLOCK if MERGED else 1
    SUB_N: tl.constexpr = 1 if MERGED else KEY_BLOCK // BLOCK_N
    SUB_M: tl.constexpr = QUERY_BLOCK // BLOCK_M
    tiles = tl.cdiv(Sb, MERGE) * SUB_N
    tile, batch_head = program_place(tiles, B * Hkv, span)
    kv_head = batch_head % Hkv
    batch = batch_head // Hkv
    ordered = (batch * order_stride_b + kv_head * order_stride_h).to(tl.int64) * Sb
    if MERGED:
        place = tile * MERGE + tl.arange(0, BLOCK_N) // KEY_BLOCK
        key_block = tl.load(order + ordered + place, mask=place < Sb, other=0)
        keys = key_block * KEY_BLOCK + tl.arange(0, BLOCK_N) % KEY_BLOCK
        keys = tl.where(place < Sb, keys, S)
    else:
        key_block = tile // SUB_N
        if HAS_ORDER:
            key_block = tl.load(order + ordered + key_block)
        keys = key_block * KEY_BLOCK + (tile % SUB_N) * BLOCK_N + tl.arange(0, BLOCK_N)

    k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    dk += batch.to(tl.int64) * stride_dkb + kv_head.to(tl.int64) * stride_dkh
    dv += batch.to(tl.int64) * stride_dvb + kv_head.to(tl.int64) * stride_dvh
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    factor = score_factor(scale, NATURAL)
    k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, True)
    v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, True)
    if HAS_COLUMNS:
        columns_at = batch_head.to(tl.int64) * S
        acc_k = load_rows(dk_columns + columns_at * HEAD_DIM, keys, HEAD_DIM, S, HEAD_DIM, BLOCK_D, True)
        acc_v = load_rows(dv_columns + columns_at * VALUE_DIM, keys, VALUE_DIM, S, VALUE_DIM, BLOCK_DV, True)
    else:
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for group_member in range(gqa_group):
        head = kv_head * gqa_group + group_member
        q_row = batch.to(tl.int64) * gqa_group * Hkv + head
        group = list_group(batch, head, list_stride_b, list_stride_h, list_head_div).to(tl.int64)
        row = group * tiles + tile if MERGED else group * Sb + key_block
        start = tl.load(offsets + row)
        first = tl.load(bounds + row * 2)
        unmasked = (tl.load(bounds + row * 2 + 1) - first) * SUB_M
        last = ((tl.load(offsets + row + 1) - start).to(tl.int32) - first) * SUB_M
        list_ptr = indices + start + first
        q_head = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        g_head = grad_out + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
        lse_head = lse + q_row * L
        delta_head = delta + q_row * L
        kept_head = kept
        if HAS_SKIP:
            kept_head = kept + q_row * Lb * Sb + key_block
        entry = tl.load(list_ptr, mask=last > 0, other=0)
        for step in tl.range(0, last, num_stages=NUM_STAGES):
            block = entry >> (MERGE if MERGED else 0)
            first_query = block * QUERY_BLOCK + (step % SUB_M) * BLOCK_M
            queries = first_query + tl.arange(0, BLOCK_M)
            q_tile = load_tile(
                q_head, q_desc, batch, head, first_query, queries, stride_qm, L,
                HEAD_DIM, BLOCK_M, BLOCK_D, True, USE_TMA,
            )  # fmt: skip
            do_tile = load_tile(
                g_head, grad_out_desc, batch, head, first_query, queries, stride_gm, L,
                VALUE_DIM, BLOCK_M, BLOCK_DV, True, USE_TMA,
            )  # fmt: skip
            row_lse = load_lse(lse_head, queries, L, NATURAL)
            delta_m = tl.load(delta_head + queries, mask=queries < L, other=0.0)
            member = member_rows(entry, BLOCK_N, KEY_BLOCK) if MERGED else True
            masked = False
            if IS_CAUSAL:
                masked = step < unmasked
            attended = True
            if HAS_SKIP:
                attended = tl.load(kept_head + block.to(tl.int64) * Sb) > 0
            if attended:
                acc_k, acc_v = add_dkdv(
                    acc_k, acc_v, k_tile, v_tile, q_tile, do_tile, row_lse, delta_m, keys, queries,
                    member, masked, L, S, factor, MERGED, PRECISION,
                )  # fmt: skip
            entry = tl.load(list_ptr + (step + 1) // SUB_M, mask=step + 1 < last, other=0)
    store_rows(dk, keys, stride_dkn, S, acc_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv, keys, stride_dvn, S, acc_v, VALUE_DIM, BLOCK_DV)


@triton.jit
def attend_bwd_columns_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk_columns,  # [B, Hkv, S, D] fp32, zeros or partial sums; without the scale
    dv_columns,  # [B, Hkv, S, Dv] fp32
    column_offsets,
    column_indices,
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
    Hq,
    gqa_group,
    L,
    S,
    column_rows,
    column_span,  # queries that share a column row
    splits,  # programs that share a column row
    list_stride_b,
    list_stride_h,
    list_head_div,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program adds dk and dv of every `splits`-th chunk of BLOCK_C columns of one column row,
    summed over the queries that share the row before the atomic additions."""
    split = tl.program_id(0) % splits
    column_row = tl.program_id(0) // splits % column_rows
    batch_head = tl.program_id(0) // splits // column_rows
    head = batch_head % Hq
    batch = batch_head // Hq
    kv_head = head // gqa_group
    group = list_group(batch, head, list_stride_b, list_stride_h, list_head_div).to(tl.int64)
    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    grad_out += batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    lse += batch_head.to(tl.int64) * L
    delta += batch_head.to(tl.int64) * L
    kv_row = (batch.to(tl.int64) * (Hq // gqa_group) + kv_head) * S
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    factor = score_factor(scale, NATURAL)

    start = tl.load(column_offsets + group * column_rows + column_row)
    count = (tl.load(column_offsets + group * column_rows + column_row + 1) - start).to(tl.int32)
    first_query = column_row * column_span
    last_query = tl.minimum(first_query + column_span, L)
    for step in range(split, tl.cdiv(count, BLOCK_C), splits):
        keys = gathered_keys(column_indices + start, step, count, S, BLOCK_C, True)
        k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, True)
        v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, True)
        acc_k = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_C, BLOCK_DV], tl.float32)
        for begin in range(first_query, last_query, BLOCK_M):
            rows = begin + tl.arange(0, BLOCK_M)
            q_tile = load_rows(q, rows, stride_qm, L, HEAD_DIM, BLOCK_D, True)
            do_tile = load_rows(grad_out, rows, stride_gm, L, VALUE_DIM, BLOCK_DV, True)
            row_lse = load_lse(lse, rows, last_query, NATURAL)
            delta_m = tl.load(delta + rows, mask=rows < L, other=0.0)
            acc_k, acc_v = add_dkdv(
                acc_k, acc_v, k_tile, v_tile, q_tile, do_tile, row_lse, delta_m, keys, rows,
                True, IS_CAUSAL, L, S, factor, False, PRECISION,
            )  # fmt: skip
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        address = dk_columns + (kv_row + keys)[:, None] * HEAD_DIM + offs_d[None, :]
        tl.atomic_add(address, acc_k, mask=(keys < S)[:, None] & (offs_d < HEAD_DIM)[None, :])
        address = dv_columns + (kv_row + keys)[:, None] * VALUE_DIM + offs_dv[None, :]
        tl.atomic_add(address, acc_v, mask=(keys < S)[:, None] & (offs_dv < VALUE_DIM)[None, :])
