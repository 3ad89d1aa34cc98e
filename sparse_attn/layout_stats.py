"""Counting, checking and drawing a `SparseLayout`. Everything here may synchronise."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_attn.layout import SparseLayout

_CHUNK = 1 << 22  # entries handled at once, to bound the memory of the counts


def visible_pairs(L: int, S: int, is_causal: bool) -> int:
    """(query, key) pairs that dense attention of this shape computes."""
    if not is_causal:
        return L * S
    first, last = S - L + 1, S  # keys seen by the first and by the last query
    first = max(first, 1)
    return (first + last) * (last - first + 1) // 2 if last >= first else 0


def attended_pairs(layout: SparseLayout, is_causal: bool) -> Tensor:
    """float64 [B', H']: (query, key) pairs that the layout attends, cut by the causal edge."""
    rows = layout.batch * layout.heads
    total = torch.zeros(rows + 1, dtype=torch.float64, device=layout.device)
    row = layout.blocks.row_of_entry()
    for start in range(0, layout.blocks.capacity, _CHUNK):
        part = slice(start, start + _CHUNK)
        pairs = _block_pairs(layout, row[part], layout.blocks.indices[part].long(), is_causal)
        head = torch.div(row[part], layout.num_query_blocks, rounding_mode="floor")
        total.index_add_(0, head, pairs.double())
    if layout.columns is not None:
        _add_column_pairs(layout, is_causal, total)
    return total[:rows].view(layout.batch, layout.heads)


def _block_pairs(layout: SparseLayout, row: Tensor, key_block: Tensor, is_causal: bool) -> Tensor:
    """Pairs in each listed block: the sum over its queries of the keys that each one sees."""
    first_query = row % layout.num_query_blocks * layout.block_m
    last_query = (first_query + layout.block_m - 1).clamp(max=layout.L - 1)
    first_key = key_block * layout.block_n
    size = (layout.S - first_key).clamp(max=layout.block_n)
    if not is_causal:
        return (last_query - first_query + 1) * size
    shift = layout.S - layout.L + 1 - first_key  # query x sees clamp(x + shift, 0, size) keys
    return _ramp_sum(last_query + shift, size) - _ramp_sum(first_query + shift - 1, size)


def _ramp_sum(t: Tensor, top: Tensor) -> Tensor:
    """Sum over u <= t of clamp(u, 0, top)."""
    below = t.clamp(min=0).minimum(top)
    return below * (below + 1) // 2 + (t - top).clamp(min=0) * top


def _add_column_pairs(layout: SparseLayout, is_causal: bool, total: Tensor) -> None:
    columns = layout.columns
    assert columns is not None
    rows_per_head = ceil(layout.num_query_blocks / columns.group)
    row, span = columns.row_of_entry(), columns.group * layout.block_m
    for start in range(0, columns.capacity, _CHUNK):
        part = slice(start, start + _CHUNK)
        first_query = row[part] % rows_per_head * span
        last_query = (first_query + span - 1).clamp(max=layout.L - 1)
        if is_causal:
            sees_from = columns.indices[part].long() - (layout.S - layout.L)
            first_query = first_query.maximum(sees_from)
        pairs = (last_query - first_query + 1).clamp(min=0)
        head = torch.div(row[part], rows_per_head, rounding_mode="floor")
        total.index_add_(0, head, pairs.double())


def check(layout: SparseLayout) -> SparseLayout:
    """See `SparseLayout.check`."""
    _check_list("blocks", layout.blocks, layout.num_key_blocks)
    if layout.columns is not None:
        _check_list("columns", layout.columns, layout.S)
        check_columns_outside_blocks(layout)
    return layout


def _check_list(name: str, rows, width: int) -> None:
    if rows.offsets.dtype != torch.int64 or rows.indices.dtype != torch.int32:
        raise ValueError(
            f"SparseLayout: {name} must have int64 offsets and int32 indices; got "
            f"{rows.offsets.dtype} and {rows.indices.dtype}."
        )
    offsets = rows.offsets
    if offsets[0] != 0 or (rows.lengths < 0).any():
        raise ValueError(f"SparseLayout: {name}.offsets must start at 0 and never decrease.")
    used = int(offsets[-1])
    if used > rows.capacity:
        raise ValueError(
            f"SparseLayout: {name} needs {used} entries but has room for {rows.capacity}; "
            "build it with a larger capacity."
        )
    indices = rows.indices[:used]
    if used and (indices.min() < 0 or indices.max() >= width):
        raise ValueError(
            f"SparseLayout: {name} holds indices in [{int(indices.min())}, {int(indices.max())}]; "
            f"they must lie in [0, {width - 1}]."
        )
    row = rows.row_of_entry()[:used]
    same_row = row[1:] == row[:-1]
    falls = same_row & (indices[1:] <= indices[:-1])
    if falls.any():
        where = int(row[1:][falls][0])
        raise ValueError(f"SparseLayout: {name} row {where} is not strictly ascending.")


def check_columns_outside_blocks(layout: SparseLayout) -> None:
    """Invariant 4: no column inside a block that the same query block reads."""
    columns = layout.columns
    assert columns is not None
    Lb, group = layout.num_query_blocks, columns.group
    rows_per_head = ceil(Lb / group)
    row = columns.row_of_entry()
    head = torch.div(row, rows_per_head, rounding_mode="floor").clamp(max=layout.batch * layout.heads - 1)
    key_block = torch.div(columns.indices, layout.block_n, rounding_mode="floor")
    for member in range(group):
        query_block = row % rows_per_head * group + member
        block_row = head * Lb + query_block.clamp(max=Lb - 1)
        width = layout.num_key_blocks
        inside = layout.blocks.lower_bound(block_row, key_block + 1, width)
        inside = inside > layout.blocks.lower_bound(block_row, key_block, width)
        inside &= (query_block < Lb) & (row < columns.rows)
        if inside.any():
            at = int(inside.nonzero()[0])
            raise ValueError(
                f"SparseLayout: column {int(columns.indices[at])} lies inside block "
                f"{int(key_block[at])}, which query block {int(query_block[at])} already reads; "
                "the key would be counted twice. Leave it out of the columns."
            )


def draw(layout: SparseLayout, batch: int, head: int, width: int, is_causal: bool) -> str:
    """See `SparseLayout.draw`."""
    Lb, Sb = layout.num_query_blocks, layout.num_key_blocks
    blocks = layout.block_mask()[batch % layout.batch, head % layout.heads].cpu()
    columns = torch.zeros(Lb, Sb, dtype=torch.bool)
    if layout.columns is not None:
        mask = layout.column_mask()[batch % layout.batch, head % layout.heads].cpu()
        mask = torch.nn.functional.pad(mask, (0, Sb * layout.block_n - layout.S))
        columns = mask.view(-1, Sb, layout.block_n).any(-1)
        columns = columns.repeat_interleave(layout.columns.group, 0)[:Lb]
    if is_causal:
        from sparse_attn.layout import visible_blocks

        seen = visible_blocks(layout.L, layout.S, layout.block_m, layout.block_n)
        blocks, columns = blocks & seen, columns & seen
    blocks, columns = _shrink(blocks, width), _shrink(columns, width)
    lines = []
    for block_row, column_row in zip(blocks.tolist(), columns.tolist(), strict=True):
        pairs = zip(block_row, column_row, strict=True)
        lines.append("".join("#" if b else "|" if c else "." for b, c in pairs))
    return "\n".join(lines)


def _shrink(mask: Tensor, width: int) -> Tensor:
    """Any-pool a mask to at most `width` rows and columns."""
    cell = max(ceil(mask.shape[0] / width), ceil(mask.shape[1] / width), 1)
    pad = [-mask.shape[1] % cell, -mask.shape[0] % cell]
    padded = torch.nn.functional.pad(mask, (0, pad[0], 0, pad[1]))
    return padded.view(padded.shape[0] // cell, cell, -1, cell).any(3).any(1)
