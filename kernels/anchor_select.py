"""AnchorAttention's selection on a GPU: `pool_anchor` and `fill_columns`, as in
`sparse_attn.methods.anchor_select`, where their contracts stand.

Three kernels. The first runs q @ k.T over the anchor alone, without v, and keeps one number and one mean
query a block. The second multiplies the mean queries with every offered key and keeps one bit a (superblock,
key) and one count a (superblock, tile of 128 keys). A running sum of the counts says where each tile's
keys go; the third kernel writes them there. Nothing waits for the host but the size of the result, and
that only where no capacity is given and the worst case is too large to set aside.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.kernels.softmax import LOG2_E, load_rows, matmul, natural_log

if TYPE_CHECKING:
    from sparse_attn.methods.anchor_regions import AnchorRegions

TILE = 128  # keys of one bit tile: four words of 32
POOLED_ROWS = 32  # mean queries of one product (H100: 64 and 128 are 20 % slower)
FILL_TILES = 16  # bit tiles of one program of the third kernel
# Numbers of a dtype whose sum holds a float32 mean to its last bit or two: the comparison is one of float32.
PARTS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
SPARE_BYTES = 64 << 20  # indices are set aside for the worst case up to this size


@triton.jit
def visit_anchor(
    m_i,  # [BLOCK] fp32: greatest q.k so far; base 2 and scaled if WANT_LSE
    l_i,  # [BLOCK] fp32
    q_tile,
    offs_m,
    k,
    stride_kn,
    first_start,  # first key of the first region
    first_stop,  # one past the last key it may see
    first_steps,
    second_start,
    second_stop,
    steps,  # of both regions
    shift,
    S,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WANT_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tiles of two regions of the anchor, one after the other in one pipelined loop."""
    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        is_first = step < first_steps
        first_key = tl.where(
            is_first, first_start + step * TILE_N, second_start + (step - first_steps) * TILE_N
        )
        keys = first_key + tl.arange(0, TILE_N)
        k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, MASKED)
        s = matmul(q_tile, tl.trans(k_tile), None, PRECISION)
        if MASKED:
            stop = tl.where(is_first, first_stop, second_stop)
            seen = (keys < stop)[None, :] & (keys[None, :] <= offs_m[:, None] + shift)
            s = tl.where(seen, s, -float("inf"))
        if WANT_LSE:
            s = s * scale_log2
            m_new = tl.maximum(m_i, tl.max(s, 1))
            m_used = tl.where(m_new == -float("inf"), 0.0, m_new)
            l_i = l_i * tl.exp2(m_i - m_used) + tl.sum(tl.exp2(s - m_used[:, None]), 1)
            m_i = m_new
        else:
            m_i = tl.maximum(m_i, tl.max(s, 1))
    return m_i, l_i


@triton.jit
def pool_anchor_kernel(
    q,  # [B, Hq, L, D]
    k,  # [B, Hkv, S, D]
    anchor,  # [B, Hq, Lb] fp32
    pooled,  # [PARTS, B, Hq, Lb, D]
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    Hq,
    gqa_group,
    L,
    S,
    Lb,
    G,
    step,
    init_blocks,
    local_blocks,
    part_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    WANT_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One query block of one head: the mean over its queries of their maximum (or log-sum-exp) in the
    anchor, and their mean, split into PARTS numbers of the input's dtype that add up to it."""
    # The last block of a superblock has the longest anchor: all last blocks start first.
    place = tl.program_id(0) % (G * step)
    batch_head = tl.program_id(0) // (G * step)
    i = (place % G) * step + (step - 1 - place // G)
    if i < Lb:
        batch = batch_head // Hq
        head = batch_head % Hq
        kv_head = head // gqa_group
        shift = S - L
        first_local = tl.maximum((i // step) * step * BLOCK + shift, 0) // BLOCK - local_blocks
        first_local = tl.maximum(first_local, 0)
        init_stop = tl.minimum(init_blocks, first_local) * BLOCK
        local_start = first_local * BLOCK
        local_stop = tl.minimum((i + 1) * BLOCK, L) + shift

        q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
        offs_m = i * BLOCK + tl.arange(0, BLOCK)
        q_tile = load_rows(q, offs_m, stride_qm, L, HEAD_DIM, BLOCK_D, True)
        m_i = tl.full([BLOCK], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK], tl.float32)

        # Whole tiles that no edge cuts, then what is left of the first blocks and of the neighbourhood.
        init_whole = init_stop // TILE_N
        local_whole = tl.maximum(i * BLOCK + shift + 1 - local_start, 0) // TILE_N
        local_all = tl.cdiv(tl.maximum(local_stop - local_start, 0), TILE_N)
        for masked in tl.static_range(2):
            init_from = init_whole * TILE_N if masked else 0
            init_steps = tl.cdiv(init_stop, TILE_N) - init_whole if masked else init_whole
            local_from = local_start + local_whole * TILE_N if masked else local_start
            local_steps = local_all - local_whole if masked else local_whole
            m_i, l_i = visit_anchor(
                m_i, l_i, q_tile, offs_m, k, stride_kn, init_from, init_stop, init_steps,
                local_from, local_stop, init_steps + local_steps,
                shift, S, scale * LOG2_E,
                HEAD_DIM, TILE_N, BLOCK_D, masked == 1, WANT_LSE, PRECISION, NUM_STAGES,
            )  # fmt: skip

        row = m_i * scale
        if WANT_LSE:
            row = tl.where(l_i > 0, natural_log(m_i, l_i), -float("inf"))
        count = (tl.minimum((i + 1) * BLOCK, L) - i * BLOCK).to(tl.float32)
        at = batch_head.to(tl.int64) * Lb + i
        tl.store(anchor + at, tl.sum(tl.where(offs_m < L, row, 0.0), 0) / count)
        rest = tl.sum(q_tile.to(tl.float32), 0) / count  # rows past L were loaded as 0
        offs_d = tl.arange(0, BLOCK_D)
        for part in tl.static_range(PARTS):
            value = rest.to(pooled.dtype.element_ty)
            rest -= value.to(tl.float32)
            tl.store(pooled + part * part_stride + at * HEAD_DIM + offs_d, value, mask=offs_d < HEAD_DIM)


@triton.jit
def identify_kernel(
    pooled,  # [PARTS, B, Hq, Lb, D]
    k,  # [B, Hkv, S, D]
    at_least,  # [B, Hq, Lb] fp32
    bits,  # [B, H', G, tiles, 4] int32, left alone where the count stays 0
    counts,  # [B, H', G, tiles] int32, zeros
    stride_kb,
    stride_kh,
    stride_kn,
    lists,  # B * H'
    heads,  # H'
    gqa_group,
    L,
    S,
    Lb,
    G,
    tiles,
    step,
    init_blocks,
    local_blocks,
    part_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,  # `step` rounded up to a power of two
    ROWS: tl.constexpr,  # mean queries a product, a multiple of STEP
    MEMBERS: tl.constexpr,  # query heads that share a list
    PRECISION: tl.constexpr,
):
    """One tile of keys of one list, against every superblock that is offered some of it."""
    SUPERBLOCKS: tl.constexpr = ROWS // STEP
    # Early tiles are offered to most superblocks: they start first.
    tile = tl.program_id(0) // lists
    batch = (tl.program_id(0) % lists) // heads
    first_head = (tl.program_id(0) % lists) % heads * MEMBERS
    list_number = (tl.program_id(0) % lists).to(tl.int64)
    Hq = heads * MEMBERS
    k += batch.to(tl.int64) * stride_kb + (first_head // gqa_group).to(tl.int64) * stride_kh
    offs_n = tl.arange(0, TILE_N)
    keys = tile * TILE_N + offs_n
    k_tile = load_rows(k, keys, stride_kn, S, HEAD_DIM, BLOCK_D, True)
    shift = S - L
    span = step * BLOCK
    # The first superblock whose neighbourhood starts past this tile's first key.
    first = tl.maximum(tile * TILE_N + (local_blocks + 1) * BLOCK - shift + span - 1, 0) // span

    offs_r = tl.arange(0, ROWS)
    for g in range(first, G, SUPERBLOCKS):
        row = (g + offs_r // STEP) * step + offs_r % STEP
        valid = (offs_r % STEP < step) & (row < Lb)
        gs = g + tl.arange(0, SUPERBLOCKS)
        hit = tl.zeros([TILE_N, SUPERBLOCKS], tl.int32)
        for member in tl.static_range(MEMBERS):
            at = (batch * Hq + first_head + member).to(tl.int64) * Lb
            limit = tl.load(at_least + at + row, mask=valid, other=float("inf"))
            s = tl.zeros([TILE_N, ROWS], tl.float32)
            for part in tl.static_range(PARTS):
                mean = pooled + part * part_stride + at * HEAD_DIM
                s = matmul(
                    k_tile,
                    tl.trans(load_rows(mean, row, HEAD_DIM, Lb, HEAD_DIM, BLOCK_D, True)),
                    s,
                    PRECISION,
                )
            reached = (s * scale >= limit[None, :]).to(tl.int32)
            hit = tl.maximum(hit, tl.max(tl.reshape(reached, [TILE_N, SUPERBLOCKS, STEP]), 2))

        first_local = tl.maximum(tl.maximum(gs * span + shift, 0) // BLOCK - local_blocks, 0)
        init_end = tl.minimum(first_local, init_blocks)
        offered = (keys[:, None] >= (init_end * BLOCK)[None, :]) & (
            keys[:, None] < (first_local * BLOCK)[None, :]
        )
        hit = tl.where(offered, hit, 0)
        place = (list_number * G + gs) * tiles + tile  # [SUPERBLOCKS]
        tl.store(counts + place, tl.sum(hit, 0), mask=gs < G)
        lane = tl.arange(0, 32)
        words = tl.sum(tl.reshape(hit, [TILE_N // 32, 32, SUPERBLOCKS]) << lane[None, :, None], 1)
        offs_w = tl.arange(0, TILE_N // 32)
        target = bits + place[None, :] * (TILE_N // 32) + offs_w[:, None]
        tl.store(target, words, mask=(gs < G)[None, :] & (offs_w[:, None] >= 0))


@triton.jit
def fill_kernel(
    bits,  # [rows, tiles, 4] int32
    counts,  # [rows, tiles] int32
    ends,  # [rows, tiles] int64: running sum of counts
    indices,  # [capacity] int32
    tiles,
    capacity,
    TILE_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES tiles of one row: write the numbers of the keys whose bit is set."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    at = tl.program_id(1).to(tl.int64) * tiles + tile
    count = tl.load(counts + at, mask=tile < tiles, other=0)
    if tl.max(count, 0) > 0:
        start = tl.load(ends + at, mask=tile < tiles, other=0) - count
        offs_n = tl.arange(0, TILE_N)
        word_at = bits + at[:, None] * (TILE_N // 32) + (offs_n // 32)[None, :]
        word = tl.load(word_at, mask=(count > 0)[:, None] & (offs_n >= 0)[None, :], other=0)
        listed = (word >> (offs_n % 32)[None, :]) & 1
        slot = start[:, None] + tl.cumsum(listed, 1) - listed
        keys = tile[:, None] * TILE_N + offs_n[None, :]
        tl.store(indices + slot, keys, mask=(listed > 0) & (slot < capacity))


def _pool_config(query: Tensor) -> tuple[int, int, int]:
    """Keys of a tile, warps and pipeline stages of `pool_anchor_kernel`.

    H100, H32 N32768 D128 bf16: 0.74 ms; (128, 4, 2) 0.77, (128, 8, 3) 0.89, (128, 8, 2) 1.03. Tensor
    descriptors gain 3 % at best.
    """
    if query.element_size() > 2:
        return 32, 8, 1
    return 64, 4, 3


def pool_anchor(
    query: Tensor, key: Tensor, regions: AnchorRegions, scale: float, reference: str
) -> tuple[Tensor, Tensor]:
    """As `sparse_attn.methods.anchor_select.pool_anchor`, but the mean queries come as numbers of the
    input's dtype that add up to them: [parts, B, Hq, Lb, D]."""
    B, Hq, L, D = query.shape
    Lb, G = regions.num_query_blocks, regions.num_superblocks
    parts = PARTS[query.dtype]
    anchor = torch.empty(B, Hq, Lb, dtype=torch.float32, device=query.device)
    pooled = torch.empty(parts, B, Hq, Lb, D, dtype=query.dtype, device=query.device)
    tile_n, num_warps, num_stages = _pool_config(query)
    pool_anchor_kernel[(G * regions.step * B * Hq,)](
        query, key, anchor, pooled, *query.stride()[:3], *key.stride()[:3],
        Hq, Hq // key.shape[1], L, regions.S, Lb, G, regions.step, regions.init_blocks,
        regions.local_blocks, pooled.stride(0), scale, D, regions.block, tile_n, _padded(D), parts,
        reference == "lse", "ieee", num_stages, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return anchor, pooled


def fill_columns(
    pooled: Tensor,
    key: Tensor,
    at_least: Tensor,
    regions: AnchorRegions,
    scale: float,
    share_kv_group: bool,
    capacity: int | None,
) -> IndexList:
    """As `sparse_attn.methods.anchor_select.fill_columns`, with the mean queries of this module's
    `pool_anchor`. Without a capacity, up to 64 MiB are set aside for the worst case; beyond, the host
    waits for the exact size."""
    B, Hq, Lb, D = pooled.shape[1:]
    heads = key.shape[1] if share_kv_group else Hq
    G, step = regions.num_superblocks, regions.step
    rows, offered = B * heads * G, regions.offered_keys(G - 1).stop
    tiles = max(ceil(offered / TILE), 1)
    counts = torch.zeros(rows, tiles, dtype=torch.int32, device=key.device)
    bits = torch.empty(rows, tiles, TILE // 32, dtype=torch.int32, device=key.device)
    padded_step = 1 << (step - 1).bit_length()
    product_rows = max(padded_step, POOLED_ROWS)
    if offered:
        identify_kernel[(tiles * B * heads,)](
            pooled, key, at_least.float().contiguous(), bits, counts, *key.stride()[:3],
            B * heads, heads, Hq // key.shape[1], regions.L, regions.S, Lb, G, tiles, step,
            regions.init_blocks, regions.local_blocks, pooled.stride(0), scale, D, regions.block, TILE,
            _padded(D), pooled.shape[0], padded_step, product_rows, Hq // heads, "ieee",
            num_warps=4, num_stages=2 if product_rows * _padded(D) <= 32 * 128 else 1,
        )  # fmt: skip
    ends = torch.cumsum(counts.flatten(), 0, dtype=torch.int64)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=key.device)
    offsets[1:] = ends.view(rows, tiles)[:, -1]
    if capacity is None:
        worst = B * heads * regions.offered
        capacity = worst if worst * 4 <= SPARE_BYTES else int(ends[-1])
    indices = torch.empty(max(capacity, 1), dtype=torch.int32, device=key.device)
    fill_kernel[(ceil(tiles / FILL_TILES), rows)](
        bits, counts, ends, indices, tiles, capacity, TILE, FILL_TILES, num_warps=4
    )
    return IndexList(offsets, indices, step)


def _padded(head_dim: int) -> int:
    return max(1 << (head_dim - 1).bit_length(), 16)
