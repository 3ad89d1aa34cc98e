"""Conversions of a `SparseLayout`: coarser blocks, FlexAttention, padded count and index."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout, visible_blocks

_CHUNK = 1 << 22  # elements handled at once, to bound the memory of 64-bit temporaries


def coarsen(layout: SparseLayout, block_m: int, block_n: int) -> SparseLayout:
    """See `SparseLayout.coarsen`."""
    if block_m < 1 or block_n < 1 or block_m % layout.block_m or block_n % layout.block_n:
        raise ValueError(
            f"coarsen: blocks of {block_m}x{block_n} are not multiples of the layout's "
            f"{layout.block_m}x{layout.block_n}; choose multiples, or build the layout at that size."
        )
    if layout.columns is not None:
        raise ValueError(
            "coarsen: the layout has columns, which larger blocks could swallow for some of the "
            "query blocks that share them; coarsen before adding columns."
        )
    rows, cols = block_m // layout.block_m, block_n // layout.block_n
    mask = layout.block_mask()
    Lb, Sb = ceil(layout.L / block_m), ceil(layout.S / block_n)
    pad = (0, Sb * cols - mask.shape[3], 0, Lb * rows - mask.shape[2])
    mask = torch.nn.functional.pad(mask, pad).view(*mask.shape[:2], Lb, rows, Sb, cols)
    return SparseLayout.from_dense_mask(
        mask.any(5).any(3), block_m=block_m, block_n=block_n, L=layout.L, S=layout.S
    )


def to_count_index(layout: SparseLayout) -> tuple[Tensor, Tensor]:
    """See `SparseLayout.to_count_index`."""
    if layout.columns is not None:
        raise ValueError("to_count_index: this format has no place for the layout's columns.")
    counts, indices = _padded_rows(layout.blocks, layout.num_key_blocks)
    shape = (layout.batch, layout.heads, layout.num_query_blocks)
    return counts.view(shape), indices.view(*shape, -1)


def _padded_rows(rows: IndexList, width: int) -> tuple[Tensor, Tensor]:
    """counts int32 [rows], indices int32 [rows, width], ascending, unused entries 0."""
    counts, place = rows.lengths, torch.arange(width, device=rows.offsets.device)
    indices = torch.zeros(rows.rows, width, dtype=torch.int32, device=rows.offsets.device)
    step = max(_CHUNK // width, 1)
    for start in range(0, rows.rows, step):
        part = slice(start, start + step)
        entry = (rows.offsets[:-1][part, None] + place).clamp_(max=rows.capacity - 1)
        indices[part] = torch.where(place < counts[part, None], rows.indices[entry], 0)
    return counts.to(torch.int32), indices


def from_count_index(
    counts: Tensor, indices: Tensor, block_m: int, block_n: int, L: int, S: int
) -> SparseLayout:
    """See `SparseLayout.from_count_index`."""
    Sb = ceil(S / block_n)
    if counts.dim() != 3 or indices.dim() != 4 or indices.shape[:3] != counts.shape:
        raise ValueError(
            f"from_count_index: counts has shape {tuple(counts.shape)} and indices {tuple(indices.shape)}; "
            "expected [B, H, Lb] and [B, H, Lb, width]."
        )
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    slot = torch.where(used, indices.long(), Sb)
    mask = torch.zeros(*indices.shape[:-1], Sb + 1, dtype=torch.bool, device=indices.device)
    mask.scatter_(-1, slot, True)
    return SparseLayout.from_dense_mask(mask[..., :Sb], block_m=block_m, block_n=block_n, L=L, S=S)


def to_block_mask(layout: SparseLayout, is_causal: bool):
    """See `SparseLayout.to_block_mask`. Whole blocks go to `full_kv_*`; those that the causal edge or a
    sequence end cuts go to `kv_*`, as `create_block_mask` sorts them."""
    from torch.nn.attention.flex_attention import BlockMask

    if layout.columns is not None:
        raise ValueError("to_block_mask: a BlockMask has no place for the layout's columns.")
    listed, shift = layout.block_mask(), layout.S - layout.L
    block_m, block_n, device = layout.block_m, layout.block_n, layout.device
    query_end = (torch.arange(layout.num_query_blocks, device=device)[:, None] + 1) * block_m
    key_end = (torch.arange(layout.num_key_blocks, device=device) + 1) * block_n
    whole = (query_end <= layout.L) & (key_end <= layout.S)
    mask = listed
    if is_causal:
        mask = listed & visible_blocks(layout.L, layout.S, block_m, block_n, device)
        whole &= key_end - 1 <= query_end - block_m + shift
    one_batch, one_head = layout.batch == 1, layout.heads == 1

    def mask_mod(b, h, q_idx, kv_idx):
        # Eager FlexAttention reads this function alone, so the block list has to be in it.
        b, h = b * 0 if one_batch else b, h * 0 if one_head else h
        keep = listed[b, h, q_idx // block_m, kv_idx // block_n]
        return keep & (kv_idx <= q_idx + shift) if is_causal else keep

    return BlockMask.from_kv_blocks(
        *_count_index(mask & ~whole),
        *_count_index(mask & whole),
        BLOCK_SIZE=(block_m, block_n),
        mask_mod=mask_mod,
        seq_lengths=(layout.L, layout.S),
    )


def _count_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    """counts int32 [B, H, Lb], indices int32 [B, H, Lb, Sb] of a block mask [B, H, Lb, Sb]."""
    rows = IndexList.from_mask(mask.reshape(-1, mask.shape[-1]))
    counts, indices = _padded_rows(rows, mask.shape[-1])
    return counts.view(mask.shape[:3]), indices.view(mask.shape)


def from_block_mask(block_mask, L: int | None, S: int | None) -> SparseLayout:
    """See `SparseLayout.from_block_mask`."""
    L, S = L or block_mask.seq_lengths[0], S or block_mask.seq_lengths[1]
    block_m, block_n = block_mask.BLOCK_SIZE
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = from_count_index(
            block_mask.full_kv_num_blocks, block_mask.full_kv_indices, block_m, block_n, L, S
        ).block_mask()
    cut = from_count_index(
        block_mask.kv_num_blocks, block_mask.kv_indices, block_m, block_n, L, S
    ).block_mask()
    mask = cut if full is None else cut | full
    if _is_cut_causally(block_mask, cut, L, S):
        first_query = torch.arange(mask.shape[2], device=mask.device)[:, None] * block_m
        last_key = ((torch.arange(mask.shape[3], device=mask.device) + 1) * block_n).clamp(max=S) - 1
        beyond = last_key > first_query + S - L
        uncut = mask & ~cut if full is None else full
        if (uncut & beyond).any():
            raise ValueError(
                "from_block_mask: mask_mod is causal in some blocks while full blocks reach beyond the "
                "causal edge; a SparseLayout is attended causally as a whole or not at all."
            )
    return SparseLayout.from_dense_mask(mask, block_m=block_m, block_n=block_n, L=L, S=S)


def _is_cut_causally(block_mask, cut: Tensor, L: int, S: int) -> bool:
    """Whether mask_mod removes from the partial blocks what causality removes (True) or nothing.

    Raises:
        ValueError: it removes anything else.
    """
    block_m, block_n = block_mask.BLOCK_SIZE
    where = cut.nonzero()
    causal, whole = True, True
    step = max(_CHUNK // (block_m * block_n), 1)
    for part in where.split(step):
        b, h, i, j = (x.view(-1, 1, 1) for x in part.unbind(1))
        queries = i * block_m + torch.arange(block_m, device=cut.device)[:, None]
        keys = j * block_n + torch.arange(block_n, device=cut.device)
        inside = (queries < L) & (keys < S)
        kept = block_mask.mask_mod(b, h, queries.clamp(max=L - 1), keys.clamp(max=S - 1))
        removed = inside & ~torch.as_tensor(kept, device=cut.device)
        whole &= not removed.any()
        causal &= torch.equal(removed, inside & (keys > queries + S - L))
    if not (whole or causal):
        raise ValueError(
            "from_block_mask: mask_mod cuts elements out of partial blocks other than by bottom-right "
            "causality; a SparseLayout attends whole blocks."
        )
    return causal and not whole
