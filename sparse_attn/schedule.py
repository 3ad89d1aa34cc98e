"""How GPU engines walk a layout: the order of its rows, and small blocks merged into full tiles or paired.

A schedule changes when and in which company a query block is computed, never what it attends to. It is
made once for a layout, on the device, without synchronising, and travels through the operators beside
the lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.layout_bounds import query_range

if TYPE_CHECKING:
    from sparse_attn.engines.base import AttendCall

MERGED_TILE = 64  # rows of a merged tile: what one matrix instruction of Hopper takes


@dataclass(frozen=True, eq=False)
class MergedRows:
    """A list whose rows are the unions of `merge` rows of another list.

    Attributes:
        offsets: int64 [merged rows + 1].
        indices: int32 [capacity]: number << merge | bits; bit x is set where the x-th of the merged
            rows holds the number. Ascending within a row.
        bounds: int32 [merged rows, 2], as `block_bounds` or `transposed_bounds`. (`paired_rounds` says what
            differs there.)
    """

    offsets: Tensor
    indices: Tensor
    bounds: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """Row orders and merged rows of a layout; None where they do not apply.

    Attributes:
        order: int32 [B' * H', Lb]: query blocks, longest row first.
        merged: query blocks `order[g, x * merge : (x + 1) * merge]` as one row; of `full_rows`, whose order
            counts tiles, the list that all tiles begin; where key blocks were cut (`refined`), those lists.
        t_order: int32 [B' * (1 or Hkv), Sb]: key blocks, longest transposed row first.
        t_merged: the same for the transposed list; its rows are counted by the layout's heads.
    """

    order: Tensor | None = None
    merged: MergedRows | None = None
    t_order: Tensor | None = None
    t_merged: MergedRows | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        parts = []
        for order, merged in ((self.order, self.merged), (self.t_order, self.t_merged)):
            parts += [order]
            parts += [None] * 3 if merged is None else [merged.offsets, merged.indices, merged.bounds]
        return tuple(parts)

    @staticmethod
    def from_flat(parts: tuple[Tensor | None, ...]) -> Schedule:
        order, rows, indices, bounds, t_order, t_rows, t_indices, t_bounds = parts
        merged = None if rows is None else MergedRows(rows, indices, bounds)  # type: ignore[arg-type]
        t_merged = None if t_rows is None else MergedRows(t_rows, t_indices, t_bounds)  # type: ignore[arg-type]
        return Schedule(order, merged, t_order, t_merged)


NUM_FLAT = 8


def schedule_of(call: AttendCall) -> Schedule:
    """The schedule of a call, cached on its layout."""
    layout, causal = call.layout, call.is_causal
    merges = layout.neighbours_alike and call.skip_below is None and layout.columns is None
    merges = merges and call.q.element_size() == 2  # a 128-row tile of fp32 leaves no room for keys
    order = row_order(layout, causal)
    merged = t_order = t_merged = None
    merge = merge_factor(layout.block_m) if merges else 1
    if merge > 1:
        merged = merged_queries(layout, causal, order, merge)
    if call.needs_grad:
        heads, group = t_order_heads(layout.heads, call.k.shape[1]), 1
        group = layout.heads // heads
        t_order = layout._cached(("t_order", causal, group), lambda: _transposed_order(layout, causal, group))
        merge = merge_factor(layout.block_n) if merges else 1
        if merge > 1:
            t_merged = layout._cached(
                ("t_merged", causal, group), lambda: _merge_keys(layout, causal, t_order, group, merge)
            )
    return Schedule(order, merged, t_order, t_merged)


def merge_factor(block: int) -> int:
    """How many blocks of this size share a merged tile; 1 means no merging."""
    return max(MERGED_TILE // block, 1) if block >= 16 else 1


def t_order_heads(layout_heads: int, kv_heads: int) -> int:
    """Head count of a transposed order: one program serves all query heads of a key head."""
    return min(layout_heads, kv_heads)


def _longest_first(lengths: Tensor) -> Tensor:
    """int32, the shape of lengths: positions in each row of `lengths`, largest first, ties in order."""
    return torch.sort(lengths, dim=-1, descending=True, stable=True).indices.to(torch.int32)


def row_order(layout: SparseLayout, causal: bool) -> Tensor:
    """int32 [B' * H', Lb]: the query blocks of each head, longest row first. Cached."""
    return layout._cached(("order", causal), lambda: _row_order(layout, causal))


def _row_order(layout: SparseLayout, causal: bool) -> Tensor:
    lengths = layout.block_bounds(causal)[:, 1]
    if layout.columns is not None:
        lengths = lengths * layout.block_n + layout.column_bounds(causal)[:, 1]
    return _longest_first(lengths.view(-1, layout.num_query_blocks))


def _transposed_order(layout: SparseLayout, causal: bool, group: int) -> Tensor:
    lengths = layout.transposed().lengths - layout.transposed_bounds(causal)[:, 0]
    return _longest_first(lengths.view(-1, group, layout.num_key_blocks).sum(1))


def merged_queries(layout: SparseLayout, causal: bool, order: Tensor, merge: int) -> MergedRows:
    """The layout's rows, `merge` consecutive ones of `order` as one. Cached."""
    return layout._cached(("merged", causal, merge), lambda: _merge_queries(layout, causal, order, merge))


def _merge_queries(layout: SparseLayout, causal: bool, order: Tensor, merge: int) -> MergedRows:
    offsets, indices = merge_rows(layout.blocks, order, layout.num_key_blocks, merge)
    limits = _limits(layout, causal, order, merge)
    return MergedRows(offsets, indices, _bounds(offsets, indices, limits, layout.num_key_blocks, merge))


def _limits(layout: SparseLayout, causal: bool, order: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """int64 [groups, tiles] twice: key blocks below the first are seen whole by all queries of a tile, from
    the second on by none."""
    members = _members(order, merge)  # [groups, tiles, merge]
    whole = torch.full_like(members, layout.S // layout.block_n)
    some = torch.full_like(members, layout.num_key_blocks)
    if causal:
        first, last = query_range(layout)
        first, last = first[members], last[members]
        whole = whole.minimum(torch.div(first + 1, layout.block_n, rounding_mode="floor"))
        some = some.minimum(torch.div(last, layout.block_n, rounding_mode="floor") + 1)
    return whole.amin(-1), some.amax(-1)


def full_rows(layout: SparseLayout, causal: bool, block_m: int, block_n: int) -> Schedule:
    """A layout that is full, cut into tiles of `block_m` queries and `block_n` keys. Cached.

    If one is cut, it is the first, which under the causal edge is the shortest (`first_row`).

    Every tile reads the key blocks from the first on: `merged.offsets` is 0 throughout, `merged.indices` are
    plain numbers, and `merged.bounds` says how many a tile sees whole, and how many at all.
    """
    key = ("full", causal, block_m, block_n)
    return layout._cached(key, lambda: _full_rows(layout, causal, block_m, block_n))


def first_row(L: int, block_m: int) -> int:
    """The row that the first tile of `full_rows` begins with: at most 0, a multiple of a warpgroup's 64."""
    return -((-L % block_m) // 64 * 64)


def _full_rows(layout: SparseLayout, causal: bool, block_m: int, block_n: int) -> Schedule:
    device, shift, width = layout.device, layout.S - layout.L, ceil(layout.S / block_n)
    first = torch.arange(first_row(layout.L, block_m), layout.L, block_m, device=device)
    last = (first + block_m - 1).clamp(max=layout.L - 1)
    whole = torch.full_like(first, layout.S // block_n)
    some = torch.full_like(first, width)
    if causal:
        seen = [(x + shift + 1).clamp(min=0) for x in (first, last)]  # keys, of the first query and the last
        whole = whole.minimum(torch.div(seen[0], block_n, rounding_mode="floor"))
        some = some.minimum(torch.div(seen[1] + block_n - 1, block_n, rounding_mode="floor"))
    offsets = torch.zeros(first.numel() + 1, dtype=torch.int64, device=device)
    bounds = torch.stack([whole.minimum(some), some], -1).to(torch.int32)
    rows = MergedRows(offsets, torch.arange(width, dtype=torch.int32, device=device), bounds)
    order = some.clone()
    if first_row(layout.L, block_m) < 0:
        order[0] = -1  # the cut tile comes last
    return Schedule(order=_longest_first(order[None]), merged=rows)


def refined(layout: SparseLayout, block_n: int) -> SparseLayout:
    """The layout with its key blocks cut into blocks of `block_n` keys, which divides theirs. Cached."""
    if block_n == layout.block_n:
        return layout
    return layout._cached(("refined", block_n), lambda: _refine(layout, block_n))


def _refine(layout: SparseLayout, block_n: int) -> SparseLayout:
    lists, parts = layout.blocks, layout.block_n // block_n
    part = torch.arange(parts, device=layout.device)
    number = lists.indices.long()[:, None] * parts + part  # [capacity, parts]
    # Unused entries have no parts; of the last block, those count that begin before the end of the keys.
    is_used = (lists.row_of_entry() < lists.rows)[:, None] & (number < ceil(layout.S / block_n))
    ends = torch.cumsum(is_used.sum(1), 0)
    before = torch.cat([ends.new_zeros(1), ends])  # parts listed before each entry
    slot = torch.where(is_used, before[:-1, None] + part, number.numel())
    indices = torch.zeros(number.numel() + 1, dtype=torch.int32, device=layout.device)
    indices.scatter_(0, slot.flatten(), number.flatten().to(torch.int32))
    return SparseLayout(
        IndexList(before[lists.offsets], indices[:-1]), layout.block_m, block_n, layout.L, layout.S,
        layout.batch, layout.heads, layout.columns,
    )  # fmt: skip


def merged_pairs(layout: SparseLayout, causal: bool, order: Tensor) -> MergedRows:
    """Pairs of query blocks as one row each, in the ascending order that a skip rule needs. Cached.

    `bounds[:, 0]` counts leading entries that both rows list and see whole.
    """
    return layout._cached(("pairs", causal), lambda: _merge_pairs(layout, causal, order))


def _merge_pairs(layout: SparseLayout, causal: bool, order: Tensor) -> MergedRows:
    rows = merged_queries(layout, causal, order, 2)
    whole, _ = _limits(layout, causal, order, 2)
    lists = IndexList(rows.offsets, rows.indices)
    row = lists.row_of_entry()  # lists.rows where an entry is unused
    whole = torch.cat([whole.flatten(), whole.new_zeros(1)])
    is_masked = (rows.indices & 3 != 3) | (rows.indices.long() >> 2 >= whole[row]) | (row == lists.rows)
    place = torch.arange(lists.capacity, device=row.device)
    first = torch.full((lists.rows + 1,), lists.capacity, device=row.device)
    first.scatter_reduce_(0, row, torch.where(is_masked, place, lists.capacity), "amin")
    unmasked = (first[:-1].minimum(rows.offsets[1:]) - rows.offsets[:-1]).int()
    visible = rows.bounds[:, 1]
    return MergedRows(rows.offsets, rows.indices, torch.stack([unmasked.minimum(visible), visible], -1))


def paired_rounds(layout: SparseLayout, causal: bool, order: Tensor, stage: int) -> MergedRows:
    """Pairs of query blocks for an engine with two teams, one for each block, that share its keys. Cached.

    The keys come in stages of `stage` key blocks. First those that both query blocks list and see whole, as
    far as they fill stages: both teams read them. What is left comes together, in stages that both teams read
    and mask, if those are no more than its own would be for the team that has more left. Else it comes in
    rounds of two stages, one for each team with what is left of its query block; an entry of both is in both.
    In the first rounds both teams see all keys of their stage.

    Returns:
        offsets int64 [rows + 1]; indices int32 [capacity], in stage order: number << 2 | bits, of which bit x
        is set where it is for the x-th query block, and `num_key_blocks << 2` where a slot is empty; bounds
        int32 [rows, 4]: stages for both, rounds without a mask, rounds with one or stages together, and 4 for
        together plus bit x where the x-th query block reads nothing in the second half of its last stage.
    """
    return layout._cached(("rounds", causal, stage), lambda: _pair_rounds(layout, causal, order, stage))


def _pair_rounds(layout: SparseLayout, causal: bool, order: Tensor, stage: int) -> MergedRows:
    lists, width, device = layout.blocks, layout.num_key_blocks, layout.device
    rows = order.shape[0] * ceil(order.shape[1] / 2)
    pair, number, side, is_masked, is_again = _entries_by_pair(layout, causal, order)

    def stages_of(entries: Tensor) -> Tensor:
        return torch.div(entries + stage - 1, stage, rounding_mode="floor")

    # A key block that both see whole: shared, as far as stages are filled.
    no = is_again.new_zeros(1)
    twin = is_again[1:] & ~is_masked[1:] & ~is_masked[:-1]
    is_first, is_second = torch.cat([twin, no]), torch.cat([no, twin])
    shared, rank = _count_and_rank(pair, is_first, rows)
    both = torch.div(shared, stage, rounding_mode="floor")
    is_shared = (is_first | is_second) & (rank < (both * stage)[pair])

    # The others of a side in order, first those that it sees whole.
    alone = torch.where(is_shared, rows, pair) * 4 + side * 2 + is_masked
    counts = alone.new_zeros((rows + 1) * 4).scatter_add_(0, alone, torch.ones_like(alone))
    by_side = torch.argsort(alone, stable=True)
    before = (torch.cumsum(counts, 0) - counts).view(-1, 2, 2)[..., 0]
    alone_rank = torch.empty_like(pair)
    alone_rank[by_side] = torch.arange(lists.capacity, device=device) - before.flatten()[alone[by_side] >> 1]
    counts = counts.view(-1, 2, 2)
    rounds = torch.div(counts[..., 0], stage, rounding_mode="floor").amin(-1)
    all_rounds = stages_of(counts.sum(-1)).amax(-1)

    # The others of a pair in order, each number once.
    left, left_rank = _count_and_rank(pair, ~is_again & ~is_shared & (pair < rows), rows)
    is_together = (stages_of(left) <= all_rounds) & (left > 0)
    tail = torch.where(is_together, stages_of(left), all_rounds)

    length = stage * (both + tail * torch.where(is_together, 1, 2))[:-1]
    offsets = torch.cat([length.new_zeros(1), torch.cumsum(length, 0)])
    in_round = (torch.div(alone_rank, stage, rounding_mode="floor") * 2 + side) * stage + alone_rank % stage
    in_tail = (both * stage)[pair] + torch.where(is_together[pair], left_rank, in_round)
    slot = offsets[pair] + torch.where(is_shared, rank, in_tail)
    # Room for what is stored at most: a list of rounds is twice as long as its longer side, and filled up.
    capacity = 2 * lists.capacity + 4 * stage * rows
    slot = torch.where(pair == rows, capacity, slot)
    # Two entries of one slot: the first brings the number, both their bits.
    is_number = ~(is_again & (is_shared | is_together[pair]))
    word = torch.where(is_number, number << 2, 0) + (1 << side)
    indices = torch.zeros(capacity + 1, dtype=torch.int64, device=device).scatter_add_(0, slot, word)
    indices = torch.where(indices == 0, width << 2, indices).to(torch.int32)

    # Who has something in the second half of the last stage.
    nth = torch.where(is_together[pair], left_rank, alone_rank) - ((tail - 1) * stage)[pair]
    is_late = ~is_shared & (2 * nth >= stage)
    late = pair.new_zeros(2 * (rows + 1)).scatter_add_(0, 2 * pair + side, is_late.long()).view(-1, 2)
    flags = (late[:, 0] == 0) + 2 * (late[:, 1] == 0) + 4 * is_together
    clear = torch.where(is_together, 0, rounds)
    bounds = torch.stack([both, clear, tail - clear, flags], -1)[:-1].to(torch.int32)
    return MergedRows(offsets, indices[:capacity], bounds.contiguous())


def _entries_by_pair(layout: SparseLayout, causal: bool, order: Tensor) -> tuple[Tensor, ...]:
    """The lists' entries by pair of rows, key block and side, each int64 or bool [capacity]: the pair, or the
    number of pairs for an entry that is unused or unseen; the key block; which of the pair's rows it is of;
    whether it needs a mask; whether the entry before it is the same key block of the same pair."""
    lists, bounds, width = layout.blocks, layout.block_bounds(causal).long(), layout.num_key_blocks
    groups, n = order.shape
    pairs = groups * ceil(n / 2)
    place = torch.empty_like(order)
    place.scatter_(1, order.long(), torch.arange(n, dtype=torch.int32, device=order.device).expand(groups, n))
    place = torch.cat([place.flatten(), place.new_zeros(1)]).long()
    bounds = torch.cat([bounds, bounds.new_zeros(1, 2)])  # of unused entries
    start = torch.cat([lists.offsets[:-1], lists.offsets.new_zeros(1)])

    row = lists.row_of_entry()
    nth = torch.arange(lists.capacity, device=order.device) - start[row]
    is_used, is_masked = nth < bounds[row, 1], nth >= bounds[row, 0]
    pair = torch.div(row, n, rounding_mode="floor") * ceil(n / 2) + place[row] // 2
    key = ((pair * width + lists.indices) * 2 + place[row] % 2) * 2 + is_masked
    key = torch.where(is_used, key, pairs * width * 4).sort().values
    pair, number = torch.div(key, 4 * width, rounding_mode="floor"), (key >> 2) % width
    is_again = torch.cat([key.new_zeros(1).bool(), key[1:] >> 2 == key[:-1] >> 2]) & (pair < pairs)
    return pair, number, key >> 1 & 1, (key & 1).bool(), is_again


def _count_and_rank(pair: Tensor, is_counted: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """How many entries of each pair count, [pairs + 1]; and for each entry the number, from 0, of the last of
    its pair that counts, itself among them."""
    count = pair.new_zeros(pairs + 1).scatter_add_(0, pair, is_counted.long())
    rank = torch.cumsum(is_counted, 0) - 1 - (torch.cumsum(count, 0) - count)[pair]
    return count, rank


def _merge_keys(layout: SparseLayout, causal: bool, order: Tensor, group: int, merge: int) -> MergedRows:
    order = order.repeat_interleave(group, 0)
    offsets, indices = merge_rows(layout.transposed(), order, layout.num_query_blocks, merge)
    members = _members(order, merge)
    some, whole = torch.zeros_like(members), torch.zeros_like(members)
    if causal:
        first_key = members * layout.block_n
        last_key = (first_key + layout.block_n - 1).clamp(max=layout.S - 1)
        shift = layout.S - layout.L
        some = torch.div((first_key - shift).clamp(min=0), layout.block_m, rounding_mode="floor")
        whole = torch.div(last_key - shift + layout.block_m - 1, layout.block_m, rounding_mode="floor")
    limits = (some.amin(-1), whole.amax(-1))
    return MergedRows(offsets, indices, _bounds(offsets, indices, limits, layout.num_query_blocks, merge))


def _members(order: Tensor, merge: int) -> Tensor:
    """int64 [groups, tiles, merge]: the blocks of each tile; a short last tile repeats its last block."""
    tiles = ceil(order.shape[1] / merge)
    place = torch.arange(tiles * merge, device=order.device).clamp(max=order.shape[1] - 1)
    return order.long()[:, place].view(-1, tiles, merge)


def _bounds(
    offsets: Tensor, indices: Tensor, limits: tuple[Tensor, Tensor], width: int, merge: int
) -> Tensor:
    """int32 [rows, 2]: how many leading entries of each merged row have a number below each limit."""
    row = torch.arange(offsets.numel() - 1, device=offsets.device)
    lists = IndexList(offsets, indices)
    pair = [lists.lower_bound(row, x.flatten() << merge, width) for x in limits]
    return torch.stack(pair, -1).to(torch.int32)


def merge_rows(lists: IndexList, order: Tensor, width: int, merge: int) -> tuple[Tensor, Tensor]:
    """Unite `merge` consecutive rows of `order`.

    Args:
        lists: rows = groups * n, row-major.
        order: int32 [groups, n], a permutation of 0..n-1 for each group.
        width: indices are below it; width < 2 ** (31 - merge).

    Returns:
        offsets int64 [groups * ceil(n / merge) + 1] and indices int32 [capacity] of `MergedRows`.
    """
    groups, n = order.shape
    tiles = ceil(n / merge)
    device = order.device
    place = torch.empty_like(order)
    place.scatter_(1, order.long(), torch.arange(n, dtype=torch.int32, device=device).expand(groups, n))
    place = torch.cat([place.flatten(), place.new_zeros(1)])  # unused entries have row = groups * n

    row = lists.row_of_entry()
    used = row < lists.rows
    group = torch.div(row, n, rounding_mode="floor")
    at = place[row.clamp(max=groups * n)].long()
    merged_row = group * tiles + torch.div(at, merge, rounding_mode="floor")
    key = torch.where(used, merged_row * width + lists.indices, groups * tiles * width)
    key, by_key = torch.sort(key)
    used = used[by_key]

    first = torch.ones_like(used)
    first[1:] = key[1:] != key[:-1]
    first &= used
    found = torch.cumsum(first, 0)  # distinct numbers up to and including each entry
    slot = torch.where(used, found - 1, lists.capacity)
    number = lists.indices[by_key].long() << merge
    word = torch.where(first, number, 0) + (1 << (at[by_key] % merge))
    indices = torch.zeros(lists.capacity + 1, dtype=torch.int64, device=device)
    indices.scatter_add_(0, slot, word)

    starts = torch.arange(groups * tiles + 1, device=device) * width
    found = torch.cat([found.new_zeros(1), found])
    return found[torch.searchsorted(key, starts)], indices[:-1].to(torch.int32)
