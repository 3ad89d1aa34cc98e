"""Counting, checking and drawing a `SparseLayout`. Everything here may synchronise."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList

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
    for start in range(0, layout.blocks.capacity, _CHUNK):
        row, key_block = _entries(layout.blocks, start)
        pairs = _block_pairs(layout, row, key_block, is_causal)
        head = torch.div(row, layout.num_query_blocks, rounding_mode="floor")
        total.index_add_(0, head, pairs.double())
    if layout.columns is not None:
        _add_column_pairs(layout, is_causal, total)
    return total[:rows].view(layout.batch, layout.heads)


def _entries(rows: IndexList, start: int) -> tuple[Tensor, Tensor]:
    """Row and index, int64, of the `_CHUNK` entries from `start` on; unused ones have row `rows.rows`."""
    stop = min(start + _CHUNK, rows.capacity)
    return rows.row_of_entry(start, stop), rows.indices[start:stop].long()


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
    span = columns.group * layout.block_m
    for start in range(0, columns.capacity, _CHUNK):
        row, key = _entries(columns, start)
        first_query = row % rows_per_head * span
        last_query = (first_query + span - 1).clamp(max=layout.L - 1)
        if is_causal:
            first_query = first_query.maximum(key - (layout.S - layout.L))
        pairs = (last_query - first_query + 1).clamp(min=0)
        head = torch.div(row, rows_per_head, rounding_mode="floor")
        total.index_add_(0, head, pairs.double())


def check(layout: SparseLayout) -> SparseLayout:
    """See `SparseLayout.check`."""
    _check_list("blocks", layout.blocks, layout.num_key_blocks)
    if layout.is_full and (layout.blocks.lengths < layout.num_key_blocks).any():
        row = int((layout.blocks.lengths < layout.num_key_blocks).nonzero()[0])
        raise ValueError(
            f"SparseLayout: is_full is set, but row {row} lists {int(layout.blocks.lengths[row])} of "
            f"{layout.num_key_blocks} blocks; leave is_full out."
        )
    if layout.columns is not None:
        _check_list("columns", layout.columns, layout.S)
        check_columns_outside_blocks(layout)
    return layout


def _check_list(name: str, rows: IndexList, width: int) -> None:
    if rows.offsets.dtype != torch.int64 or rows.indices.dtype != torch.int32:
        raise ValueError(
            f"SparseLayout: {name} must have int64 offsets and int32 indices; got "
            f"{rows.offsets.dtype} and {rows.indices.dtype}."
        )
    offsets = rows.offsets
    if offsets[0] != 0 or (rows.lengths < 0).any():
        raise ValueError(f"SparseLayout: {name}.offsets must start at 0 and never decrease.")
    used = int(offsets[-1])
    needed = used if rows.needed is None else int(rows.needed)
    if max(used, needed) > rows.capacity:
        raise ValueError(
            f"SparseLayout: {name} needs {max(used, needed)} entries but has room for {rows.capacity}; "
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
    Lb, Sb, group = layout.num_query_blocks, layout.num_key_blocks, columns.group
    rows_per_head = ceil(Lb / group)
    for start in range(0, columns.capacity, _CHUNK):
        row, key = _entries(columns, start)
        head = torch.div(row, rows_per_head, rounding_mode="floor").clamp(max=layout.batch * layout.heads - 1)
        key_block = torch.div(key, layout.block_n, rounding_mode="floor")
        for member in range(min(group, Lb)):
            query_block = row % rows_per_head * group + member
            block_row = head * Lb + query_block.clamp(max=Lb - 1)
            before = layout.blocks.lower_bound(block_row, key_block, Sb)
            inside = layout.blocks.lower_bound(block_row, key_block + 1, Sb) > before
            inside &= (query_block < Lb) & (row < columns.rows)
            if inside.any():
                at = int(inside.nonzero()[0])
                raise ValueError(
                    f"SparseLayout: column {int(key[at])} lies inside block {int(key_block[at])}, which "
                    f"query block {int(query_block[at])} already reads; the key would be counted twice. "
                    "Leave it out of the columns."
                )


# -- text -----------------------------------------------------------------------------------------

_DENSITY_LIMIT = 1 << 24  # entries that `repr` is ready to count


def describe(layout: SparseLayout) -> str:
    """See `SparseLayout.__repr__`: sizes, density and a small picture, whatever the size of the layout.

    The numbers are left out where they cannot be read: while a CUDA graph is captured, and of the
    tensors without data that `torch.compile` traces with.
    """
    parts = [
        f"L={layout.L}, S={layout.S}, block={layout.block_m}x{layout.block_n}",
        f"batch={layout.batch}, heads={layout.heads}",
    ]
    entries = layout.blocks.capacity
    readable = _readable(layout)
    if layout.columns is not None:
        entries += layout.columns.capacity
        parts.append(f"columns shared by {layout.columns.group} query blocks")
    if readable and entries <= _DENSITY_LIMIT:
        parts.append(f"density={layout.density():.3f}")
    else:
        parts.append(f"room for {entries} entries")
    text = f"SparseLayout({', '.join(parts)}, device={layout.device})"
    return f"{text}\n{layout.draw(width=32)}" if readable else text


def _readable(layout: SparseLayout) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(layout.blocks.offsets, FakeTensor) or layout.device.type == "meta":
        return False
    return not (layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def draw(layout: SparseLayout, batch: int, head: int, width: int, is_causal: bool) -> str:
    """See `SparseLayout.draw`. Reads one head's entries; never makes an Lb x Sb mask."""
    Lb, Sb = layout.num_query_blocks, layout.num_key_blocks
    which = batch % layout.batch * layout.heads + head % layout.heads
    cell = max(ceil(Lb / width), ceil(Sb / width), 1)
    grid = torch.zeros(ceil(Lb / cell), ceil(Sb / cell), dtype=torch.int8)
    if layout.columns is not None:
        group = layout.columns.group
        per_head = ceil(Lb / group)
        row, key = _one_head(layout.columns, which * per_head, per_head)
        key_block = torch.div(key, layout.block_n, rounding_mode="floor")
        for member in range(min(group, Lb)):
            query_block = row * group + member
            seen = query_block < Lb
            if is_causal:
                seen &= key <= _last_position(layout, query_block)
            grid[query_block[seen] // cell, key_block[seen] // cell] = 1
    row, key_block = _one_head(layout.blocks, which * Lb, Lb)
    if is_causal:
        seen = key_block * layout.block_n <= _last_position(layout, row)
        row, key_block = row[seen], key_block[seen]
    grid[row // cell, key_block // cell] = 2
    return "\n".join("".join(".|#"[x] for x in line) for line in grid.tolist())


def _one_head(rows: IndexList, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Row (from 0) and index of each entry of rows first .. first + count - 1, on the CPU."""
    part = rows.rows_between(first, first + count).to("cpu")
    used = int(part.offsets[-1])
    return part.row_of_entry()[:used], part.indices[:used].long()


def _last_position(layout: SparseLayout, query_block: Tensor) -> Tensor:
    """The key position that the last query of each block is aligned with."""
    last_query = ((query_block + 1) * layout.block_m - 1).clamp(max=layout.L - 1)
    return last_query + layout.S - layout.L
