"""The forward attention kernel: block list, then column list, one online softmax.

One program computes one tile of BLOCK_M queries of one head: a layout block, a part of a larger one,
or (MERGED) several small ones that share a union list with one bit for each of them. It reads q once,
walks its row of the list (only the tail that the causal edge or the sequence end cuts is masked), and
writes out, lse (natural log) and, with a BLASST skip, the tiles it kept.
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
    natural_log,
    power,
    program_place,
    score_factor,
    store_rows,
)


@triton.jit
def hide_unseen(s, keys, offs_m, L, S, IS_CAUSAL: tl.constexpr):
    """Scores with -inf where a query must not see a key."""
    seen = (keys < S)[None, :]
    if IS_CAUSAL:
        seen = seen & (keys[None, :] <= offs_m[:, None] + (S - L))
    return tl.where(seen, s, -float("inf"))


@triton.jit
def update_softmax(
    acc,
    l_i,
    m_i,
    s,
    v_tile,
    factor,
    member,
    NATURAL: tl.constexpr,
    MERGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax. acc [BLOCK_M, BLOCK_DV], l_i and m_i (an exponent) [BLOCK_M], fp32."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    if MERGED:  # queries whose own block does not list this key block keep their state
        m_new = tl.where(member, m_new, m_i)
    m_used = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen yet: power(-inf - 0) = 0
    alpha = power(m_i - m_used, NATURAL)
    if MERGED:
        m_used = tl.where(member, m_used, float("inf"))
    p = power(s * factor - m_used[:, None], NATURAL)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = matmul(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], PRECISION)
    return acc, l_i, m_new


@triton.jit
def visit_blocks(
    acc,
    l_i,
    m_i,
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
    middle,
    last,
    L,
    S,
    factor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NATURAL: tl.constexpr,
    MERGED: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The first `last` blocks of a row, BLOCK_N keys a step; from `middle` on they are masked."""
    SUB: tl.constexpr = KEY_BLOCK // BLOCK_N
    MERGE: tl.constexpr = BLOCK_M // QUERY_BLOCK if MERGED else 0
    # The number of the next block is loaded a step ahead of its keys.
    entry = tl.load(list_ptr, mask=last > 0, other=0)
    for step in tl.range(0, last * SUB, num_stages=NUM_STAGES):
        first_key = (entry >> MERGE) * KEY_BLOCK + (step % SUB) * BLOCK_N
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
        s = matmul(q, tl.trans(k_tile), None, PRECISION)
        if step >= middle * SUB:
            s = hide_unseen(s, keys, offs_m, L, S, IS_CAUSAL)
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
        member = member_rows(entry, BLOCK_M, QUERY_BLOCK) if MERGED else True
        acc, l_i, m_i = update_softmax(acc, l_i, m_i, s, v_tile, factor, member, NATURAL, MERGED, PRECISION)
        entry = tl.load(list_ptr + (step + 1) // SUB, mask=step + 1 < last * SUB, other=0)
    return acc, l_i, m_i


@triton.jit
def visit_blocks_with_skip(
    acc,
    l_i,
    m_i,
    q,
    offs_m,
    k,
    v,
    k_desc,
    v_desc,
    batch,
    kv_head,
    stride_kn,
    stride_vn,
    list_ptr,
    middle,
    last,
    L,
    S,
    factor,
    limit,  # log of lambda, in the base of the exponents
    kept,  # row of [Sb] uint8
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NATURAL: tl.constexpr,
    WANT_KEPT: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """As `visit_blocks`, but a block that every query votes to skip changes nothing (`Plan`). The vote
    is over the whole block; the update walks the same sub-tiles in the same order, so that a vote that
    skips nothing gives the bits of `visit_blocks`."""
    SUB: tl.constexpr = KEY_BLOCK // BLOCK_N
    tl.static_assert(SUB <= 2, "a vote covers at most two sub-tiles")
    entry = tl.load(list_ptr, mask=last > 0, other=0)
    for step in tl.range(0, last, num_stages=NUM_STAGES):
        first_key = entry * KEY_BLOCK
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
        s = matmul(q, tl.trans(k_tile), None, PRECISION)
        if step >= middle:
            s = hide_unseen(s, keys, offs_m, L, S, IS_CAUSAL)
        tile_max = tl.max(s, 1)
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
        if SUB == 2:
            next_key = first_key + BLOCK_N
            keys = next_key + tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k, k_desc, batch, kv_head, next_key, keys, stride_kn, S,
                HEAD_DIM, BLOCK_N, BLOCK_D, True, USE_TMA,
            )  # fmt: skip
            s2 = matmul(q, tl.trans(k_tile), None, PRECISION)
            if step >= middle:
                s2 = hide_unseen(s2, keys, offs_m, L, S, IS_CAUSAL)
            tile_max = tl.maximum(tile_max, tl.max(s2, 1))
            v_tile2 = load_tile(
                v, v_desc, batch, kv_head, next_key, keys, stride_vn, S,
                VALUE_DIM, BLOCK_N, BLOCK_DV, True, USE_TMA,
            )  # fmt: skip

        # -- the vote: one scalar branch; padding queries and queries that see no key never dissent
        tile_max = tile_max * factor
        dissent = (offs_m < L) & (tile_max > -float("inf")) & (tile_max >= m_i + limit)
        if tl.max(dissent.to(tl.int32), 0) > 0:
            acc, l_i, m_i = update_softmax(acc, l_i, m_i, s, v_tile, factor, True, NATURAL, False, PRECISION)
            if SUB == 2:
                acc, l_i, m_i = update_softmax(
                    acc, l_i, m_i, s2, v_tile2, factor, True, NATURAL, False, PRECISION
                )
            if WANT_KEPT:
                tl.store(kept + entry, 1)
        entry = tl.load(list_ptr + step + 1, mask=step + 1 < last, other=0)
    return acc, l_i, m_i


@triton.jit
def visit_columns(
    acc,
    l_i,
    m_i,
    q,
    offs_m,
    k,
    v,
    stride_kn,
    stride_vn,
    list_ptr,
    first_step,
    last_step,
    count,
    L,
    S,
    factor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NATURAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Steps of BLOCK_C gathered columns; where MASKED, columns past `count` do not exist."""
    for step in tl.range(first_step, last_step, num_stages=NUM_STAGES):
        keys = gathered_keys(list_ptr, step, count, S, BLOCK_C, MASKED)
        k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, MASKED)
        s = matmul(q, tl.trans(k_tile), None, PRECISION)
        if MASKED:
            s = hide_unseen(s, keys, offs_m, L, S, IS_CAUSAL)
        v_tile = load_rows(v, keys, stride_vn, S, VALUE_DIM, BLOCK_DV, MASKED)
        acc, l_i, m_i = update_softmax(acc, l_i, m_i, s, v_tile, factor, True, NATURAL, False, PRECISION)
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
    B,
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
    span,
    scale,
    SIGN: tl.constexpr,  # of the caller's scale; the argument is positive
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
):
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    factor = score_factor(scale, NATURAL)

    # -- which queries, which list
    MERGE: tl.constexpr = BLOCK_M // QUERY_BLOCK if MERGED else 1
    SUB_M: tl.constexpr = 1 if MERGED else QUERY_BLOCK // BLOCK_M
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
    unmasked = tl.load(bounds + row * 2)
    visible = tl.load(bounds + row * 2 + 1)

    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    out += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    lse += batch_head.to(tl.int64) * L

    q_tile = load_rows(q, offs_m, stride_qm, L, HEAD_DIM, BLOCK_D, True)
    if SIGN != 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q_tile.dtype)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    if HAS_SKIP:
        limit = score_factor(tl.load(skip_below + batch * stride_skip_b + head * stride_skip_h), NATURAL)
        kept += (batch_head.to(tl.int64) * Lb + query_block) * Sb
        acc, l_i, m_i = visit_blocks_with_skip(
            acc, l_i, m_i, q_tile, offs_m, k, v, k_desc, v_desc, batch, kv_head, stride_kn, stride_vn,
            indices + start, unmasked, visible, L, S, factor, limit, kept,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, KEY_BLOCK,
            IS_CAUSAL, NATURAL, WANT_KEPT, USE_TMA, PRECISION, NUM_STAGES,
        )  # fmt: skip
    else:
        acc, l_i, m_i = visit_blocks(
            acc, l_i, m_i, q_tile, offs_m, k, v, k_desc, v_desc, batch, kv_head, stride_kn, stride_vn,
            indices + start, unmasked, visible, L, S, factor,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, QUERY_BLOCK, KEY_BLOCK,
            IS_CAUSAL, NATURAL, MERGED, USE_TMA, PRECISION, NUM_STAGES,
        )  # fmt: skip

    # -- columns: single keys, gathered; never skipped
    if HAS_COLUMNS:
        start = tl.load(column_offsets + group * column_rows + query_block // column_group)
        middle = tl.load(column_bounds + row * 2) // BLOCK_C
        visible = tl.load(column_bounds + row * 2 + 1)
        last = tl.cdiv(visible, BLOCK_C)
        for masked in tl.static_range(2):
            acc, l_i, m_i = visit_columns(
                acc, l_i, m_i, q_tile, offs_m, k, v, stride_kn, stride_vn,
                column_indices + start, middle if masked else 0, last if masked else middle, visible,
                L, S, factor, HEAD_DIM, VALUE_DIM, BLOCK_C, BLOCK_D, BLOCK_DV,
                IS_CAUSAL, NATURAL, masked == 1, PRECISION, NUM_STAGES,
            )  # fmt: skip

    # -- normalise; a query without keys gives 0 and -inf
    inverse = 1.0 / tl.where(l_i == 0, 1.0, l_i)
    row_lse = m_i + tl.log(l_i) if NATURAL else natural_log(m_i, l_i)
    row_lse = tl.where(l_i == 0, -float("inf"), row_lse)
    store_rows(out, offs_m, stride_om, L, acc * inverse[:, None], VALUE_DIM, BLOCK_DV)
    tl.store(lse + offs_m, row_lse, mask=offs_m < L)
