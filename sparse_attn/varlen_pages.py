"""Reading keys and values of sequences out of the pages of a cache: all of them, or those that are needed.

Letters as in `varlen`; B rows of P pages, Hkv key heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout


def needed_pages(layout: SparseLayout, num_kv_heads: int, page_size: int) -> Tensor:
    """Which pages each key head reads under a layout: bool [layout.batch, Hkv, P]."""
    blocks = _needed(layout, layout.blocks, layout.num_key_blocks, num_kv_heads).to(torch.int32)
    before = torch.nn.functional.pad(blocks.cumsum(-1), (1, 0))  # needed blocks before each block
    num_pages = -(-layout.S // page_size)
    first = torch.arange(num_pages, device=blocks.device) * page_size
    last = (first + page_size).clamp(max=layout.S) - 1
    first, last = (torch.div(x, layout.block_n, rounding_mode="floor") for x in (first, last))
    pages = before[..., last + 1] > before[..., first]
    if layout.columns is not None:
        pages |= _needed(layout, layout.columns, num_pages, num_kv_heads, page_size)
    return pages


def _needed(
    layout: SparseLayout, lists: IndexList, width: int, num_kv_heads: int, divisor: int = 1
) -> Tensor:
    """bool [layout.batch, Hkv, width]: what some row of some query head of the key head lists, its numbers
    divided by `divisor`."""
    heads = layout.batch * layout.heads
    ends = lists.offsets[:: lists.rows // heads]
    counts = ends[1:] - ends[:-1]
    head = torch.arange(heads, device=counts.device).repeat_interleave(counts)
    number = torch.div(lists.indices[: head.numel()].long(), divisor, rounding_mode="floor")
    found = torch.zeros(heads, width, dtype=torch.bool, device=counts.device)
    found[head, number] = True
    if layout.heads == 1:
        return found.view(layout.batch, 1, width).expand(-1, num_kv_heads, -1)
    return found.view(layout.batch, num_kv_heads, -1, width).any(2)


def gather_pages(
    caches: tuple[Tensor, Tensor],
    pages: Tensor,
    needed: tuple[Tensor, Tensor, Tensor] | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys [B, Hkv, P * page_size, D] and values [B, Hkv, P * page_size, Dv] of B rows of pages.

    Args:
        caches: keys and values, [num_pages, page_size, heads, D or Dv].
        pages: int64 [B, P].
        needed: batch, key head and column of the pages to read, int64 [needed] each; the others are not read,
            and what stands in their place is undefined. Default: all.
        heads: the key heads to read, of those in the caches; default: all.
    """
    B, P = pages.shape
    parts = []
    for cache in caches:
        page_size, num_heads, dim = cache.shape[1:]
        if needed is None and heads is None:
            own = cache.index_select(0, pages.flatten())  # tokens before heads, as most caches have them
            parts.append(own.view(B, P * page_size, num_heads, dim).transpose(1, 2))
            continue
        chosen = torch.arange(num_heads) if heads is None else torch.tensor(heads)
        chosen = chosen.to(pages.device, non_blocking=True)
        if needed is None:
            own = cache[pages[:, None], :, chosen[:, None]]
        else:
            batch, head, page = needed
            own = cache.new_empty(B, len(chosen), P, page_size, dim)
            own[batch, head, page] = cache[pages[batch, page], :, chosen[head]]
        parts.append(own.flatten(2, 3))
    return parts[0], parts[1]


def gather_pages_by_head(
    caches: tuple[Tensor, Tensor], pages: Tensor, heads: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Keys [1, Hkv, P * page_size, D] and values [1, Hkv, P * page_size, Dv], other pages for each key head.

    Args:
        caches, heads: as `gather_pages`.
        pages: int64 [Hkv, P].
    """
    heads = range(caches[0].shape[2]) if heads is None else heads
    parts = []
    for cache in caches:
        if cache.device.type == "cpu":  # whole pages are copied faster than they are indexed
            own = cache.new_empty(*pages.shape, cache.shape[1], cache.shape[3])
            for n, head in enumerate(heads):
                torch.index_select(cache[:, :, head], 0, pages[n], out=own[n])
        else:
            own = cache[pages, :, torch.tensor(heads).to(pages.device, non_blocking=True)[:, None]]
        parts.append(own.flatten(1, 2)[None])
    return parts[0], parts[1]
