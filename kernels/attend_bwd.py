"""The backward attention kernels: dq from the block and column lists, dk and dv from the transposed
block list, and dk and dv of columns.

Everything is recomputed from q, k and the forward's lse. With p = exp(q.k * scale - lse) and
delta = rowsum(grad_out * out) - grad_lse:

    dv = p^T grad_out,  ds = p * (grad_out v^T - delta),  dq = ds k * scale,  dk = ds^T q * scale

A block list needs no atomics: dq walks a query block's row, dk and dv walk a key block's transposed
row, so the result is bitwise reproducible. Columns add to fp32 buffers with atomics.
"""

import triton
import triton.language as tl

from sparse_attn.kernels.softmax import (
    LOG2_E,
    gathered_keys,
    list_group,
    load_rows,
    load_tile,
    matmul,
    num_steps,
    store_rows,
)


@triton.jit
def load_lse_log2(lse, rows, num_rows):
    """lse in base 2, +inf (so that p = 0) for queries that attend nothing or do not exist."""
    value = tl.load(lse + rows, mask=rows < num_rows, other=-float("inf")) * LOG2_E
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def visit_keys_dq(
    dq,  # [BLOCK_M, BLOCK_D] fp32, without the scale
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    lse_log2,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    offs_m,  # [BLOCK_M]
    k,
    v,
    k_desc,
    v_desc,
    batch,
    kv_head,
    stride_kn,
    stride_vn,
    list_ptr,
    first_step,
    last_step,
    count,
    L,
    S,
    scale_log2,
    kept,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Steps first_step .. last_step - 1 of one list."""
    GATHER: tl.constexpr = KEY_BLOCK < BLOCK_N
    SUB: tl.constexpr = 1 if GATHER else KEY_BLOCK // BLOCK_N
    MERGE: tl.constexpr = BLOCK_M // QUERY_BLOCK if MERGED else 1
    offs_n = tl.arange(0, BLOCK_N)
    if not GATHER:
        entry = tl.load(list_ptr + first_step // SUB, mask=first_step < last_step, other=0)
    for step in tl.range(first_step, last_step, num_stages=NUM_STAGES):
        if GATHER:
            keys = gathered_keys(list_ptr, step, count, S, KEY_BLOCK, BLOCK_N, MASKED)
            k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, MASKED)
            v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, MASKED)
        else:
            block = entry
            if MERGED:
                block = entry >> MERGE
            first_key = block * KEY_BLOCK + (step % SUB) * BLOCK_N
            keys = first_key + offs_n
            k_tile = load_tile(
                k, k_desc, batch, kv_head, first_key, keys, stride_kn, S,
                HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, USE_TMA,
            )  # fmt: skip
            v_tile = load_tile(
                v, v_desc, batch, kv_head, first_key, keys, stride_vn, S,
                VALUE_DIM, BLOCK_N, BLOCK_DV, MASKED, USE_TMA,
            )  # fmt: skip
        attended = True
        if HAS_SKIP:
            attended = tl.load(kept + entry) > 0
        if attended:
            s = matmul(q, tl.trans(k_tile), None, PRECISION)
            row_lse = lse_log2
            if MERGED:
                member = ((entry >> (tl.arange(0, BLOCK_M) // QUERY_BLOCK)) & 1) > 0
                row_lse = tl.where(member, lse_log2, float("inf"))
            p = tl.exp2(s * scale_log2 - row_lse[:, None])
            if MASKED:
                seen = (keys < S)[None, :]
                if IS_CAUSAL:
                    seen = seen & (keys[None, :] <= offs_m[:, None] + (S - L))
                p = tl.where(seen, p, 0.0)
            dp = matmul(do, tl.trans(v_tile), None, PRECISION)
            ds = p * (dp - delta[:, None])
            dq = matmul(ds.to(k_tile.dtype), k_tile, dq, PRECISION)
        if not GATHER:
            entry = tl.load(list_ptr + (step + 1) // SUB, mask=step + 1 < last_step, other=0)
    return dq


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
    if MERGED:
        MERGE: tl.constexpr = BLOCK_M // QUERY_BLOCK
        tiles = tl.cdiv(Lb, MERGE)
    else:
        SUB_M: tl.constexpr = QUERY_BLOCK // BLOCK_M
        tiles = Lb * SUB_M
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    head = batch_head % Hq
    batch = batch_head // Hq
    kv_head = head // gqa_group
    group = list_group(batch, head, list_stride_b, list_stride_h, list_head_div).to(tl.int64)
    if MERGED:
        place = tile * MERGE + tl.arange(0, BLOCK_M) // QUERY_BLOCK
        query_block = tl.load(order + group * Lb + place, mask=place < Lb, other=0)
        offs_m = query_block * QUERY_BLOCK + tl.arange(0, BLOCK_M) % QUERY_BLOCK
        offs_m = tl.where(place < Lb, offs_m, L)
        row = group * tiles + tile
    else:
        query_block = tile // SUB_M
        if HAS_ORDER:
            query_block = tl.load(order + group * Lb + query_block)
        offs_m = query_block * QUERY_BLOCK + (tile % SUB_M) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = group * Lb + query_block

    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    grad_out += batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    dq += batch.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
    lse += batch_head.to(tl.int64) * L
    delta += batch_head.to(tl.int64) * L
    if HAS_SKIP:
        kept += (batch_head.to(tl.int64) * Lb + query_block) * Sb

    scale_log2 = scale * LOG2_E
    q_tile = load_rows(q, offs_m, stride_qm, L, HEAD_DIM, BLOCK_D, True)
    do_tile = load_rows(grad_out, offs_m, stride_gm, L, VALUE_DIM, BLOCK_DV, True)
    lse_log2 = load_lse_log2(lse, offs_m, L)
    delta_m = tl.load(delta + offs_m, mask=offs_m < L, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start = tl.load(offsets + row)
    unmasked = tl.load(bounds + row * 2)
    visible = tl.load(bounds + row * 2 + 1)
    middle = num_steps(unmasked, KEY_BLOCK, BLOCK_N, False)
    last = num_steps(visible, KEY_BLOCK, BLOCK_N, True)
    for masked in tl.static_range(2):
        acc = visit_keys_dq(
            acc, q_tile, do_tile, lse_log2, delta_m, offs_m, k, v, k_desc, v_desc, batch, kv_head,
            stride_kn, stride_vn, indices + start, middle if masked else 0, last if masked else middle,
            visible, L, S, scale_log2, kept,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, QUERY_BLOCK, KEY_BLOCK,
            IS_CAUSAL, masked == 1, MERGED, HAS_SKIP, USE_TMA, PRECISION, NUM_STAGES,
        )  # fmt: skip
    if HAS_COLUMNS:
        start = tl.load(column_offsets + group * column_rows + query_block // column_group)
        unmasked = tl.load(column_bounds + row * 2)
        visible = tl.load(column_bounds + row * 2 + 1)
        middle = num_steps(unmasked, 1, BLOCK_C, False)
        last = num_steps(visible, 1, BLOCK_C, True)
        for masked in tl.static_range(2):
            acc = visit_keys_dq(
                acc, q_tile, do_tile, lse_log2, delta_m, offs_m, k, v, k_desc, v_desc, batch, kv_head,
                stride_kn, stride_vn, column_indices + start, middle if masked else 0,
                last if masked else middle, visible, L, S, scale_log2, kept,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_C, BLOCK_D, BLOCK_DV, QUERY_BLOCK, 1,
                IS_CAUSAL, masked == 1, False, False, False, PRECISION, NUM_STAGES,
            )  # fmt: skip
    store_rows(dq, offs_m, stride_dqm, L, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def add_dkdv(
    dk,  # [BLOCK_N, BLOCK_D] fp32, without the scale
    dv,  # [BLOCK_N, BLOCK_DV] fp32
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    lse_log2,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    seen,  # broadcasts to [BLOCK_N, BLOCK_M], read where MASKED
    scale_log2,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of queries adds to dk and dv of one tile of keys."""
    s = matmul(k, tl.trans(q), None, PRECISION)
    p = tl.exp2(s * scale_log2 - lse_log2[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = matmul(p.to(do.dtype), do, dv, PRECISION)
    dp = matmul(v, tl.trans(do), None, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = matmul(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def visit_queries(
    dk,
    dv,
    k,
    v,
    keys,  # [BLOCK_N] key numbers
    q,
    grad_out,
    q_desc,
    grad_out_desc,
    batch,
    head,
    lse,
    delta,
    kept,
    stride_qm,
    stride_gm,
    list_ptr,
    first_step,
    last_step,
    L,
    S,
    Sb,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Steps first_step .. last_step - 1 of one transposed row, BLOCK_M queries each."""
    SUB: tl.constexpr = QUERY_BLOCK // BLOCK_M
    MERGE: tl.constexpr = BLOCK_N // KEY_BLOCK if MERGED else 1
    entry = tl.load(list_ptr + first_step // SUB, mask=first_step < last_step, other=0)
    for step in tl.range(first_step, last_step, num_stages=NUM_STAGES):
        block = entry
        if MERGED:
            block = entry >> MERGE
        first_query = block * QUERY_BLOCK + (step % SUB) * BLOCK_M
        rows = first_query + tl.arange(0, BLOCK_M)
        q_tile = load_tile(
            q, q_desc, batch, head, first_query, rows, stride_qm, L,
            HEAD_DIM, BLOCK_M, BLOCK_D, True, USE_TMA,
        )  # fmt: skip
        do_tile = load_tile(
            grad_out, grad_out_desc, batch, head, first_query, rows, stride_gm, L,
            VALUE_DIM, BLOCK_M, BLOCK_DV, True, USE_TMA,
        )  # fmt: skip
        lse_log2 = load_lse_log2(lse, rows, L)
        delta_m = tl.load(delta + rows, mask=rows < L, other=0.0)
        attended = True
        if HAS_SKIP:
            attended = tl.load(kept + block.to(tl.int64) * Sb) > 0
        if attended:
            seen = (keys < S)[:, None]
            if MERGED:
                member = ((entry >> (tl.arange(0, BLOCK_N) // KEY_BLOCK)) & 1) > 0
                seen = seen & member[:, None]
            if MASKED:
                seen = seen & (keys[:, None] <= rows[None, :] + (S - L))
            dk, dv = add_dkdv(
                dk, dv, k, v, q_tile, do_tile, lse_log2, delta_m, seen, scale_log2,
                MASKED or MERGED, PRECISION,
            )  # fmt: skip
        entry = tl.load(list_ptr + (step + 1) // SUB, mask=step + 1 < last_step, other=0)
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
    if MERGED:
        MERGE: tl.constexpr = BLOCK_N // KEY_BLOCK
        tiles = tl.cdiv(Sb, MERGE)
    else:
        SUB_N: tl.constexpr = KEY_BLOCK // BLOCK_N
        tiles = Sb * SUB_N
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
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
    scale_log2 = scale * LOG2_E
    k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, True)
    v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, True)
    if HAS_COLUMNS:
        columns_at = batch_head.to(tl.int64) * S
        acc_k = load_rows(dk_columns + columns_at * HEAD_DIM, keys, HEAD_DIM, S, HEAD_DIM, BLOCK_D, True)
        acc_v = load_rows(dv_columns + columns_at * VALUE_DIM, keys, VALUE_DIM, S, VALUE_DIM, BLOCK_DV, True)
    else:
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    SUB_M: tl.constexpr = QUERY_BLOCK // BLOCK_M
    for member in range(gqa_group):
        head = kv_head * gqa_group + member
        q_row = batch.to(tl.int64) * gqa_group * Hkv + head
        group = list_group(batch, head, list_stride_b, list_stride_h, list_head_div).to(tl.int64)
        if MERGED:
            row = group * tiles + tile
        else:
            row = group * Sb + key_block
        start = tl.load(offsets + row)
        visible = tl.load(bounds + row * 2)
        unmasked = tl.load(bounds + row * 2 + 1)
        end = (tl.load(offsets + row + 1) - start).to(tl.int32)
        q_head = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        g_head = grad_out + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
        kept_head = kept
        if HAS_SKIP:
            kept_head = kept + q_row * Lb * Sb + key_block
        if IS_CAUSAL:
            acc_k, acc_v = visit_queries(
                acc_k, acc_v, k_tile, v_tile, keys, q_head, g_head, q_desc, grad_out_desc, batch, head,
                lse + q_row * L, delta + q_row * L, kept_head, stride_qm, stride_gm,
                indices + start, visible * SUB_M, unmasked * SUB_M, L, S, Sb, scale_log2,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, QUERY_BLOCK, KEY_BLOCK,
                True, MERGED, HAS_SKIP, USE_TMA, PRECISION, NUM_STAGES,
            )  # fmt: skip
        acc_k, acc_v = visit_queries(
            acc_k, acc_v, k_tile, v_tile, keys, q_head, g_head, q_desc, grad_out_desc, batch, head,
            lse + q_row * L, delta + q_row * L, kept_head, stride_qm, stride_gm,
            indices + start, unmasked * SUB_M, end * SUB_M, L, S, Sb, scale_log2,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, QUERY_BLOCK, KEY_BLOCK,
            False, MERGED, HAS_SKIP, USE_TMA, PRECISION, NUM_STAGES,
        )  # fmt: skip
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
    scale_log2 = scale * LOG2_E

    start = tl.load(column_offsets + group * column_rows + column_row)
    count = (tl.load(column_offsets + group * column_rows + column_row + 1) - start).to(tl.int32)
    first_query = column_row * column_span
    last_query = tl.minimum(first_query + column_span, L)
    for step in range(split, tl.cdiv(count, BLOCK_C), splits):
        keys = gathered_keys(column_indices + start, step, count, S, 1, BLOCK_C, True)
        k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, True)
        v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, True)
        acc_k = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_C, BLOCK_DV], tl.float32)
        for begin in range(first_query, last_query, BLOCK_M):
            rows = begin + tl.arange(0, BLOCK_M)
            q_tile = load_rows(q, rows, stride_qm, L, HEAD_DIM, BLOCK_D, True)
            do_tile = load_rows(grad_out, rows, stride_gm, L, VALUE_DIM, BLOCK_DV, True)
            lse_log2 = load_lse_log2(lse, rows, L)
            delta_m = tl.load(delta + rows, mask=rows < L, other=0.0)
            seen = (keys < S)[:, None] & (rows < last_query)[None, :]
            if IS_CAUSAL:
                seen = seen & (keys[:, None] <= rows[None, :] + (S - L))
            acc_k, acc_v = add_dkdv(
                acc_k, acc_v, k_tile, v_tile, q_tile, do_tile, lse_log2, delta_m, seen, scale_log2,
                True, PRECISION,
            )  # fmt: skip
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        address = dk_columns + (kv_row + keys)[:, None] * HEAD_DIM + offs_d[None, :]
        tl.atomic_add(address, acc_k, mask=(keys < S)[:, None] & (offs_d < HEAD_DIM)[None, :])
        address = dv_columns + (kv_row + keys)[:, None] * VALUE_DIM + offs_dv[None, :]
        tl.atomic_add(address, acc_v, mask=(keys < S)[:, None] & (offs_dv < VALUE_DIM)[None, :])
