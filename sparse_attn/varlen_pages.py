"""Reading a sequence's keys and values out of the pages of a cache: all of them, or those that are needed.

Letters as in `varlen`; P pages of a sequence, Hkv key heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout


def needed_pages(layout: SparseLayout, num_kv_heads: int, page_size: int) -> Tensor | None:
    """Which pages each key head reads under a layout of batch 1: bool [Hkv, P]. None: the layout reads single
    keys as well (columns), so that all are asked for."""
    if layout.columns is not None:
        return None
    blocks = _needed_blocks(layout, num_kv_heads).to(torch.int32)
    before = torch.nn.functional.pad(blocks.cumsum(-1), (1, 0))  # needed blocks before each block
    num_pages = -(-layout.S // page_size)
    first = torch.arange(num_pages, device=blocks.device) * page_size
    last = (first + page_size).clamp(max=layout.S) - 1
    first, last = (torch.div(x, layout.block_n, rounding_mode="floor") for x in (first, last))
    return before[:, last + 1] > before[:, first]


def _needed_blocks(layout: SparseLayout, num_kv_heads: int) -> Tensor:
    """bool [Hkv, Sb]: key blocks that some query block of some query head of the key head lists."""
    lists = layout.blocks
    rows = lists.rows // layout.heads
    ends = lists.offsets[::rows]
    counts = ends[1:] - ends[:-1]
    head = torch.arange(layout.heads, device=counts.device).repeat_interleave(counts)
    found = torch.zeros(layout.heads, layout.num_key_blocks, dtype=torch.bool, device=counts.device)
    found[head, lists.indices[: head.numel()].long()] = True
    if layout.heads == 1:
        return found.expand(num_kv_heads, -1)
    return found.view(num_kv_heads, -1, layout.num_key_blocks).any(1)


def gather_pages(
    caches: tuple[Tensor, Tensor], table: Tensor, num_keys: int, needed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys [S, Hkv, D] and values [S, Hkv, Dv] of one sequence.

    Args:
        caches: keys and values, [num_pages, page_size, Hkv, D or Dv].
        table: [at least P], the sequence's pages.
        num_keys: S.
        needed: bool [Hkv, P]; pages that a head does not need are not read and come out as 0. Default: all.
    """
    page_size = caches[0].shape[1]
    pages = table[: -(-num_keys // page_size)].long()
    if needed is not None and needed.all():
        needed = None
    if needed is None:
        k, v = (x.index_select(0, pages).flatten(0, 1)[:num_keys] for x in caches)
        return k, v
    head, page = needed.nonzero(as_tuple=True)
    parts = []
    for cache in caches:
        own = cache.new_zeros(cache.shape[2], len(pages), page_size, cache.shape[3])
        own[head, page] = cache[pages[page], :, head]
        parts.append(own.flatten(1, 2)[:, :num_keys].transpose(0, 1))
    return parts[0], parts[1]
