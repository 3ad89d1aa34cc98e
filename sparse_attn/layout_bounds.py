"""Which entries of a layout's rows are visible, and which of those need no mask.

The entries of a row ascend, so both sets are prefixes, found by binary search on the device without
synchronising. `SparseLayout` caches the results.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_attn.layout import SparseLayout


def query_range(layout: SparseLayout) -> tuple[Tensor, Tensor]:
    """Key position that the first and the last query of each block are aligned with: int64 [Lb]."""
    first = torch.arange(layout.num_query_blocks, device=layout.device) * layout.block_m
    last = (first + layout.block_m - 1).clamp(max=layout.L - 1)
    return first + layout.S - layout.L, last + layout.S - layout.L


def block_bounds(layout: SparseLayout, is_causal: bool) -> Tensor:
    """See `SparseLayout.block_bounds`."""
    row = torch.arange(layout.blocks.rows, device=layout.device)
    unmasked_below = torch.full_like(row, layout.S // layout.block_n)
    visible_below = torch.full_like(row, layout.num_key_blocks)
    if is_causal:
        first, last = _per_row(layout)
        whole = torch.div(first + 1, layout.block_n, rounding_mode="floor")
        some = torch.div(last, layout.block_n, rounding_mode="floor") + 1
        unmasked_below, visible_below = unmasked_below.minimum(whole), visible_below.minimum(some)
    width = layout.num_key_blocks
    pair = [layout.blocks.lower_bound(row, x, width) for x in (unmasked_below, visible_below)]
    return torch.stack(pair, -1).to(torch.int32)


def column_bounds(layout: SparseLayout, is_causal: bool) -> Tensor:
    """See `SparseLayout.column_bounds`."""
    assert layout.columns is not None
    row = _column_row(layout)
    if not is_causal:
        length = layout.columns.lengths[row]
        return torch.stack([length, length], -1).to(torch.int32)
    pair = [layout.columns.lower_bound(row, x + 1, layout.S) for x in _per_row(layout)]
    return torch.stack(pair, -1).to(torch.int32)


def transposed_bounds(layout: SparseLayout, is_causal: bool) -> Tensor:
    """See `SparseLayout.transposed_bounds`."""
    lists = layout.transposed()
    row = torch.arange(lists.rows, device=layout.device)
    if not is_causal:
        return torch.zeros(lists.rows, 2, dtype=torch.int32, device=layout.device)
    block_m, block_n, shift = layout.block_m, layout.block_n, layout.S - layout.L
    key_block = row % layout.num_key_blocks
    first_key = key_block * block_n - shift
    last_key = (key_block * block_n + block_n - 1).clamp(max=layout.S - 1) - shift
    some_from = torch.div(first_key.clamp(min=0), block_m, rounding_mode="floor")
    all_from = torch.div(last_key + block_m - 1, block_m, rounding_mode="floor")
    pair = [lists.lower_bound(row, x, layout.num_query_blocks) for x in (some_from, all_from)]
    return torch.stack(pair, -1).to(torch.int32)


def _per_row(layout: SparseLayout) -> tuple[Tensor, Tensor]:
    """`query_range` for every row of the block list: int64 [B' * H' * Lb]."""
    first, last = query_range(layout)
    heads = layout.batch * layout.heads
    return first.repeat(heads), last.repeat(heads)


def _column_row(layout: SparseLayout) -> Tensor:
    """int64 [B' * H' * Lb]: the column row that each query block reads."""
    assert layout.columns is not None
    Lb, group = layout.num_query_blocks, layout.columns.group
    head = torch.arange(layout.batch * layout.heads, device=layout.device)[:, None] * ceil(Lb / group)
    return (head + torch.arange(Lb, device=layout.device) // group).flatten()
