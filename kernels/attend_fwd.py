"""The forward attention kernel: block list, then column list, one online softmax.

One program computes one tile of BLOCK_M queries of one head: a layout block, a part of a larger one,
or (MERGED) several small ones that share a union list with one bit for each of them. It reads q once,
walks its row of the list (the unmasked prefix first, then the tail that the causal edge or the sequence
end cuts), and writes out, lse (natural log) and, with a BLASST skip, the tiles it kept.
"""

import triton
import triton.language as tl

from sparse_attn.kernels.softmax import (
    LN_2,
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
def visit_keys(
    acc,  # [BLOCK_M, BLOCK_DV] fp32
    l_i,  # [BLOCK_M] fp32
    m_i,  # [BLOCK_M] fp32, base 2
    q,  # [BLOCK_M, BLOCK_D]
    offs_m,  # [BLOCK_M] query numbers
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
    limit,
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
    WANT_KEPT: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Steps first_step .. last_step - 1 of one list."""
    GATHER: tl.constexpr = KEY_BLOCK < BLOCK_N
    SUB: tl.constexpr = 1 if GATHER else KEY_BLOCK // BLOCK_N
    MERGE: tl.constexpr = BLOCK_M // QUERY_BLOCK if MERGED else 1
    offs_n = tl.arange(0, BLOCK_N)
    if not GATHER:  # the number of the next block is loaded a step ahead of its keys
        entry = tl.load(list_ptr + first_step // SUB, mask=first_step < last_step, other=0)
    for step in tl.range(first_step, last_step, num_stages=NUM_STAGES, warp_specialize=WARP_SPECIALIZE):
        # -- scores: [BLOCK_M, BLOCK_N] fp32
        if GATHER:
            keys = gathered_keys(list_ptr, step, count, S, KEY_BLOCK, BLOCK_N, MASKED)
            k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, MASKED)
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
        s = matmul(q, tl.trans(k_tile), None, PRECISION)
        if MASKED:
            seen = (keys < S)[None, :]
            if IS_CAUSAL:
                seen = seen & (keys[None, :] <= offs_m[:, None] + (S - L))
            s = tl.where(seen, s, -float("inf"))
        tile_max = tl.max(s, 1) * scale_log2

        # -- the vote: one scalar branch for the whole tile
        keep_tile = True
        if HAS_SKIP:
            dissent = (offs_m < L) & (tile_max > -float("inf")) & (tile_max >= m_i + limit)
            keep_tile = tl.max(dissent.to(tl.int32), 0) > 0
        if GATHER:
            v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, MASKED)
        else:
            v_tile = load_tile(
                v, v_desc, batch, kv_head, first_key, keys, stride_vn, S,
                VALUE_DIM, BLOCK_N, BLOCK_DV, MASKED, USE_TMA,
            )  # fmt: skip
        if keep_tile:
            # -- online softmax: [BLOCK_M] state
            m_new = tl.maximum(m_i, tile_max)
            if MERGED:  # queries whose own block does not list this key block keep their state
                member = ((entry >> (tl.arange(0, BLOCK_M) // QUERY_BLOCK)) & 1) > 0
                m_new = tl.where(member, m_new, m_i)
            m_used = m_new
            if MASKED or MERGED:  # a query that has seen no key yet: exp2(-inf - 0) = 0
                m_used = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.exp2(m_i - m_used)
            if MERGED:
                m_used = tl.where(member, m_used, float("inf"))
            p = tl.exp2(s * scale_log2 - m_used[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            acc = matmul(p.to(v_tile.dtype), v_tile, acc, PRECISION)
            m_i = m_new
            if WANT_KEPT:
                tl.store(kept + entry, 1)
        if not GATHER:
            entry = tl.load(list_ptr + (step + 1) // SUB, mask=step + 1 < last_step, other=0)
    return acc, l_i, m_i


@triton.jit
def attend_fwd_kernel(
    q,  # [B, Hq, L, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    k_desc,  # tensor descriptors of k and v (USE_TMA), else k and v again
    v_desc,
    out,  # [B, Hq, L, Dv]
    lse,  # [B, Hq, L] fp32
    kept,  # [B, Hq, Lb, Sb] uint8, zeros
    offsets,  # [rows + 1] int64
    indices,  # int32; MERGED: key block << MERGE | one bit a query block
    bounds,  # [rows, 2] int32: unmasked entries, visible entries
    column_offsets,
    column_indices,
    column_bounds,
    order,  # [B' * H', Lb] int32: query blocks, longest row first
    skip_below,  # [B, Hq] fp32, natural log
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_skip_b,
    stride_skip_h,
    Hq,
    gqa_group,
    L,
    S,
    Lb,
    Sb,
    column_rows,  # column rows of one head
    column_group,
    list_stride_b,
    list_stride_h,
    list_head_div,
    scale_log2,
    SIGN: tl.constexpr,  # of scale; scale_log2 is positive
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns gathered at once
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    WANT_KEPT: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    # -- which queries, which list
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
    out += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    lse += batch_head.to(tl.int64) * L
    limit = 0.0
    if HAS_SKIP:
        limit = tl.load(skip_below + batch * stride_skip_b + head * stride_skip_h) * LOG2_E
    if WANT_KEPT:
        kept += (batch_head.to(tl.int64) * Lb + query_block) * Sb

    q_tile = load_rows(q, offs_m, stride_qm, L, HEAD_DIM, BLOCK_D, True)
    if SIGN != 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q_tile.dtype)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # -- blocks: the unmasked prefix, then the tail
    start = tl.load(offsets + row)
    unmasked = tl.load(bounds + row * 2)
    visible = tl.load(bounds + row * 2 + 1)
    middle = num_steps(unmasked, KEY_BLOCK, BLOCK_N, False)
    last = num_steps(visible, KEY_BLOCK, BLOCK_N, True)
    for masked in tl.static_range(2):
        acc, l_i, m_i = visit_keys(
            acc, l_i, m_i, q_tile, offs_m, k, v, k_desc, v_desc, batch, kv_head, stride_kn, stride_vn,
            indices + start, middle if masked else 0, last if masked else middle, visible,
            L, S, scale_log2, limit, kept,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, QUERY_BLOCK, KEY_BLOCK,
            IS_CAUSAL, masked == 1, MERGED, HAS_SKIP, WANT_KEPT, USE_TMA, PRECISION,
            NUM_STAGES, WARP_SPECIALIZE and masked == 0,
        )  # fmt: skip

    # -- columns: single keys, gathered; never skipped
    if HAS_COLUMNS:
        start = tl.load(column_offsets + group * column_rows + query_block // column_group)
        unmasked = tl.load(column_bounds + row * 2)
        visible = tl.load(column_bounds + row * 2 + 1)
        middle = num_steps(unmasked, 1, BLOCK_C, False)
        last = num_steps(visible, 1, BLOCK_C, True)
        for masked in tl.static_range(2):
            acc, l_i, m_i = visit_keys(
                acc, l_i, m_i, q_tile, offs_m, k, v, k_desc, v_desc, batch, kv_head, stride_kn, stride_vn,
                column_indices + start, middle if masked else 0, last if masked else middle, visible,
                L, S, scale_log2, limit, kept,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_C, BLOCK_D, BLOCK_DV, QUERY_BLOCK, 1,
                IS_CAUSAL, masked == 1, False, False, False, False, PRECISION,
                NUM_STAGES, False,
            )  # fmt: skip

    # -- normalise; a query without keys gives 0 and -inf
    attended = l_i > 0
    acc = acc / tl.where(attended, l_i, 1.0)[:, None]
    row_lse = tl.where(attended, (m_i + tl.log2(l_i)) * LN_2, -float("inf"))
    # NaN scores make l_i NaN, which must not read as "no key"
    row_lse = tl.where(l_i == l_i, row_lse, l_i)
    store_rows(out, offs_m, stride_om, L, acc, VALUE_DIM, BLOCK_DV)
    tl.store(lse + offs_m, row_lse, mask=offs_m < L)
