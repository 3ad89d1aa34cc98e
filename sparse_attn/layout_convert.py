"""Conversions of a `SparseLayout`: coarser blocks, FlexAttention, padded count and index."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout, visible_blocks


def coarsen(layout: SparseLayout, block_m: int, block_n: int) -> SparseLayout:
    """See `SparseLayout.coarsen`."""
    if block_m % layout.block_m or block_n % layout.block_n:
        raise ValueError(
            f"coarsen: blocks of {block_m}x{block_n} are not multiples of the layout's "
            f"{layout.block_m}x{layout.block_n}."
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
    mask = layout.block_mask()
    counts = mask.sum(-1, dtype=torch.int32)
    order = torch.sort(~mask, dim=-1, stable=True).indices.to(torch.int32)
    used = torch.arange(mask.shape[-1], device=mask.device) < counts[..., None]
    return counts, torch.where(used, order, 0)


def from_count_index(
    counts: Tensor, indices: Tensor, block_m: int, block_n: int, L: int, S: int
) -> SparseLayout:
    """See `SparseLayout.from_count_index`."""
    Sb = ceil(S / block_n)
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    slot = torch.where(used, indices.long(), Sb)
    mask = torch.zeros(*indices.shape[:-1], Sb + 1, dtype=torch.bool, device=indices.device)
    mask.scatter_(-1, slot, True)
    return SparseLayout.from_dense_mask(mask[..., :Sb], block_m=block_m, block_n=block_n, L=L, S=S)


def to_block_mask(layout: SparseLayout, is_causal: bool):
    """See `SparseLayout.to_block_mask`. Whole blocks go to `full_kv_*`, cut ones to `kv_*`."""
    from torch.nn.attention.flex_attention import BlockMask

    if layout.columns is not None:
        raise ValueError("to_block_mask: a BlockMask has no place for the layout's columns.")
    mask, shift = layout.block_mask(), layout.S - layout.L
    whole = torch.ones_like(mask[0, 0])
    mask_mod = None
    if is_causal:
        mask = mask & visible_blocks(layout.L, layout.S, layout.block_m, layout.block_n, mask.device)
        first_query = torch.arange(mask.shape[2], device=mask.device)[:, None] * layout.block_m
        last_key = (torch.arange(mask.shape[3], device=mask.device) + 1) * layout.block_n - 1
        whole = last_key <= first_query + shift

        def mask_mod(b, h, q_idx, kv_idx):
            return kv_idx <= q_idx + shift

    cut = _count_index(mask & ~whole)
    full = _count_index(mask & whole)
    return BlockMask.from_kv_blocks(
        *cut,
        *full,
        BLOCK_SIZE=(layout.block_m, layout.block_n),
        mask_mod=mask_mod,
        seq_lengths=(layout.L, layout.S),
    )


def _count_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    counts = mask.sum(-1, dtype=torch.int32)
    return counts, torch.sort(~mask, dim=-1, stable=True).indices.to(torch.int32)


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
    if cut.any() and not _mask_mod_is_harmless(block_mask, cut, L, S):
        raise ValueError(
            "from_block_mask: the mask_mod cuts elements out of partial blocks other than by "
            "bottom-right causality; a SparseLayout attends whole blocks."
        )
    mask = cut if full is None else cut | full
    return SparseLayout.from_dense_mask(mask, block_m=block_m, block_n=block_n, L=L, S=S)


def _mask_mod_is_harmless(block_mask, cut: Tensor, L: int, S: int) -> bool:
    """Whether mask_mod, inside the partial blocks, removes at most what causality removes."""
    block_m, block_n = block_mask.BLOCK_SIZE
    for b, h, i, j in cut.nonzero().tolist():
        queries = torch.arange(i * block_m, min((i + 1) * block_m, L), device=cut.device)[:, None]
        keys = torch.arange(j * block_n, min((j + 1) * block_n, S), device=cut.device)[None]
        at_b, at_h = torch.tensor(b, device=cut.device), torch.tensor(h, device=cut.device)
        kept = torch.as_tensor(block_mask.mask_mod(at_b, at_h, queries, keys), device=cut.device)
        kept = kept.expand(queries.shape[0], keys.shape[1])
        if not kept.all() and not torch.equal(kept, keys <= queries + S - L):
            return False
    return True
