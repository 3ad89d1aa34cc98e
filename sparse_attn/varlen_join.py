"""Layouts of several sequences over pages, joined into one, so that one engine call serves them all.

* `join_tokens`, for decoding: every token is a query block of its own, and the keys of all sequences lie one
  after the other on one axis. The query heads of a key head are the rows of the block, so that they share
  its list and its keys. A list names the blocks that its token sees whole; of a last block that the token
  sees in part, the keys are columns. So nothing is masked, and sequences of any lengths go together. What a
  key head does not need is left out of its axis.
* `join_padded`, for prompts: every sequence is an entry of the batch with the block lists that it has alone.
  All must have the causal edge of the call, so each is placed where its own edge and the call's agree.

Letters as in `varlen`; B entries of the joined batch, P pages of each, Lr rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.varlen_pages import needed_pages

Needed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Pages:
    """The pages of a call: tokens in one, columns of the block table, key heads, and the device."""

    size: int
    table_width: int
    num_kv_heads: int
    device: torch.device


@dataclass(frozen=True)
class Member:
    """One sequence: its row of the block table, its first token of all queries, its lengths, and how many
    rows before its first one its layout takes for queries."""

    number: int
    start: int
    L: int
    S: int
    lead: int = 0

    @property
    def before(self) -> int:
        """Keys before that of the layout's first query."""
        return self.S - self.L - self.lead


@dataclass(frozen=True, eq=False)
class Joined:
    """A layout of several sequences, and where their queries, keys and results lie.

    Attributes:
        layout: batch B.
        pages: int64 [B, P], entries of the flattened block table; or with `by_head` [Hkv, P] for B = 1.
        needed: batch, key head and column of `pages` of those that some list names; None: all.
        queries: int64, the token that each row of `layout` takes, for `join_tokens` one for each query block.
        results, tokens: int64 [tokens], the row that has the result of each token; `join_tokens` has them in
            the order of `queries`.
        tails: batch, positions that follow a sequence in its last block, and its last position; int64. Their
            keys are to be finite, and such that no query has a larger score there than at the last position.
    """

    layout: SparseLayout
    pages: Tensor
    needed: Needed | None
    queries: Tensor
    results: Tensor
    tokens: Tensor
    tails: tuple[Tensor, Tensor, Tensor] | None = None
    by_head: bool = False


# -- decoding -------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def join_tokens(
    layouts: tuple[SparseLayout | None, ...],
    members: tuple[Member, ...],
    pages: Pages,
    *,
    is_causal: bool,
    block_m: int,
    block_n: int,
    unit: int,
) -> Joined:
    """Sequences with few queries, remembered from layer to layer.

    Args:
        layouts: of each sequence: batch 1, one query block, key blocks of `block_n`, no columns, equally many
            heads; or None, every key block.
        block_m: rows of a query block of the result.
        unit: keys by which sequences begin, a multiple of `block_n` and of the page size.
    """
    with torch.inference_mode(False):
        lengths = torch.tensor([(x.L, x.S) for x in members])
        owner = torch.arange(len(members)).repeat_interleave(lengths[:, 0])  # the sequence of each token
        L, S = lengths[owner].unbind(1)
        within = ramp(lengths[:, 0])
        edge = (S - L + within + 1).clamp(min=0) if is_causal else S  # keys that each token sees
        room = -(-lengths[:, 1] // unit) * unit
        base = (room.cumsum(0) - room)[owner] // block_n
        lists = _token_lists(layouts, owner, edge, block_n)
        heads = 1 if layouts[0] is None else layouts[0].heads
        blocks, columns = _cut_at_edges(*lists, heads, edge, base, block_n)
        layout = SparseLayout(
            blocks, block_m, block_n, len(owner) * block_m, int(room.sum()), 1, heads, columns
        )
        count = room // pages.size
        table = _page_index(members, pages, torch.zeros_like(room), count)[None]
        is_padding = ramp(count) >= (-(-lengths[:, 1] // pages.size)).repeat_interleave(count)
        layout, table, by_head = _without_unneeded(layout, table, is_padding, pages, unit)
        queries = torch.tensor([x.start for x in members])[owner] + within
        return Joined(
            _on(layout, pages.device, False), table.to(pages.device), None, queries.to(pages.device),
            torch.arange(len(owner)).to(pages.device), queries.to(pages.device), by_head=by_head,
        )  # fmt: skip


def _without_unneeded(
    layout: SparseLayout, table: Tensor, is_padding: Tensor, pages: Pages, unit: int
) -> tuple[SparseLayout, Tensor, bool]:
    """The layout over axes without the units of keys that the key head does not need, the pages [Hkv, P] of
    those axes, and True; or layout, pages and False, where every head needs all pages but padding."""
    per_unit, per_block = unit // pages.size, unit // layout.block_n
    needed = needed_pages(layout, pages.num_kv_heads, pages.size)[0]
    if (needed | is_padding).all() or not needed.any():
        return layout, table, False
    needed = needed.unflatten(1, (-1, per_unit))
    units = needed.any(2)
    counts = units.sum(1, keepdim=True)
    most = int(counts.max())
    needed_first = torch.sort(~units, dim=1, stable=True).indices
    chosen = needed_first[:, :most]
    chosen = chosen.where(torch.arange(most) < counts, chosen[:, :1])
    # Of a unit that is needed in part, the first needed page stands for the others.
    own = torch.where(needed, torch.arange(per_unit), needed.int().argmax(2, keepdim=True))
    page = chosen[..., None] * per_unit + own.gather(1, chosen[..., None].expand(-1, -1, per_unit))
    place = units.cumsum(1) - 1
    group = max(layout.heads // pages.num_kv_heads, 1)

    def moved(lists: IndexList, size: int) -> IndexList:
        """Numbers of keys or blocks, `size` of them in a unit."""
        row = torch.arange(lists.rows).repeat_interleave(lists.lengths)
        head = torch.div(row, lists.rows // layout.heads * group, rounding_mode="floor")
        number = lists.indices[: len(row)].long()
        number = place[head, number // size] * size + number % size
        return IndexList(lists.offsets, number.to(torch.int32) if len(row) else lists.indices)

    assert layout.columns is not None
    blocks, columns = moved(layout.blocks, per_block), moved(layout.columns, unit)
    smaller = replace(layout, blocks=blocks, columns=columns, S=most * unit, _cache={})
    return smaller, table[0, page.flatten(1)], True


def _token_lists(
    layouts: Sequence[SparseLayout | None], owner: Tensor, edge: Tensor, block_n: int
) -> tuple[Tensor, Tensor]:
    """Listed key blocks of every token, token by token and head by head, and how many there are of each
    [tokens, heads]."""
    if layouts[0] is None:
        whole = -(-edge // block_n)
        return ramp(whole), whole[:, None]
    parts, counts = [], []
    for n in owner.tolist():
        layout = layouts[n]
        assert layout is not None
        lists = layout.blocks.to("cpu")
        parts.append(lists.indices[: int(lists.offsets[-1])])
        counts.append(lists.lengths)
    return torch.cat(parts).long(), torch.stack(counts)


def _cut_at_edges(
    entries: Tensor, counts: Tensor, heads: int, edge: Tensor, base: Tensor, block_n: int
) -> tuple[IndexList, IndexList]:
    """The lists of whole blocks and of single keys, rows in the order (head, token), from the key blocks
    `entries` of each token's own sequence, which begins at block `base`."""
    tokens = len(edge)
    slot = torch.arange(tokens * heads).repeat_interleave(counts.flatten())
    token = torch.div(slot, heads, rounding_mode="floor")
    row = slot % heads * tokens + token
    whole, rest = edge // block_n, edge % block_n
    is_whole = entries < whole[token]
    is_tail = (entries == whole[token]) & (rest > 0)[token]
    key_block = entries + base[token]
    blocks = _sorted_rows(row[is_whole], key_block[is_whole], heads * tokens)
    row, first, count = row[is_tail], key_block[is_tail] * block_n, rest[token[is_tail]]
    keys = first.repeat_interleave(count) + ramp(count)
    return blocks, _sorted_rows(row.repeat_interleave(count), keys, heads * tokens)


def _sorted_rows(row: Tensor, indices: Tensor, num_rows: int) -> IndexList:
    """Entries by row; those of a row stay in their order."""
    order = torch.sort(row, stable=True).indices
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=num_rows), 0, out=offsets[1:])
    indices = indices[order].to(torch.int32)
    return IndexList(offsets, indices if len(indices) else indices.new_zeros(1))


# -- prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where sequences lie in a batch: rows and keys of an entry, and of each sequence its first row and its
    first key."""

    rows: int
    keys: int
    first_row: tuple[int, ...]
    first_key: tuple[int, ...]


def place_prompts(members: Sequence[Member], unit: int) -> Place:
    """The first queries of all layouts lie side by side. `before` must have one remainder by `unit`."""
    shift = max(x.before for x in members)
    keys = -(-(shift + max(x.L + x.lead for x in members)) // unit) * unit
    first_key = tuple(shift - x.before for x in members)
    return Place(keys - shift, keys, tuple(x.lead for x in members), first_key)


def place_few(members: Sequence[Member], unit: int) -> Place:
    """The last `unit` keys of an entry are those of the last keys' unit, and as many rows lie beside them.
    The L queries of a sequence must not straddle two units of its keys."""
    keys = -(-max(x.S for x in members) // unit) * unit
    before = [(x.S - x.L) // unit * unit for x in members]
    first_row = tuple(x.S - x.L - n for x, n in zip(members, before, strict=True))
    return Place(unit, keys, first_row, tuple(keys - unit - n for n in before))


@lru_cache(maxsize=16)
def remembered_padded(*args, **how) -> Joined:
    """`join_padded` of layouts that are remembered themselves, from layer to layer."""
    return join_padded(*args, **how)


def join_padded(
    layouts: tuple[SparseLayout, ...],
    members: tuple[Member, ...],
    pages: Pages,
    place: Place,
    *,
    block_m: int,
    keys_are_read: bool = False,
) -> Joined:
    """Sequences as entries of one batch, attended causally.

    Rows before a sequence's first one repeat its first query, those behind its last one its last; whole query
    blocks of them read nothing. So a BLASST skip is decided by the sequence's own queries.

    Args:
        layouts: of each sequence: batch 1, and all alike in heads, block sizes and columns' group.
        block_m: rows of a query block of the result: that of the layouts, or another where each has but one.
        keys_are_read: keys are there already, so that which pages are needed is not asked.
    """
    with torch.inference_mode(False):
        one = layouts[0]
        to_block = [x // one.block_n for x in place.first_key]
        first_block = [(row - x.lead) // block_m for x, row in zip(members, place.first_row, strict=True)]
        num_blocks = -(-place.rows // block_m)
        blocks = _join_lists([x.blocks for x in layouts], one.heads, num_blocks, first_block, to_block)
        columns = None
        if one.columns is not None:
            lists = [x.columns for x in layouts if x.columns is not None]
            per_head = -(-num_blocks // one.columns.group)
            columns = _join_lists(lists, one.heads, per_head, [0] * len(lists), list(place.first_key))
        alike = all(x.neighbours_alike for x in layouts)
        layout = SparseLayout(
            blocks, block_m, one.block_n, place.rows, place.keys, len(members), one.heads, columns,
            neighbours_alike=alike,
        )  # fmt: skip
        start, L, S = torch.tensor([(x.start, x.L, x.S) for x in members]).unbind(1)
        row, key = torch.tensor(place.first_row), torch.tensor(place.first_key)
        own_row = torch.arange(place.rows) - row[:, None]
        queries = start[:, None] + own_row.clamp(min=0).minimum(L[:, None] - 1)
        member, within = torch.arange(len(members)).repeat_interleave(L), ramp(L)
        index = (
            queries.flatten(),
            member * place.rows + row[member] + within,
            start[member] + within,
        )
        queries, results, tokens = (x.to(pages.device) for x in index)
        spans = [(n, x) for n, x in enumerate(place.first_key)]
        needed = None if keys_are_read else _needed(layout, members, pages, spans)
        return Joined(
            _on(layout, pages.device, True), prompt_pages(members, pages, place).to(pages.device), needed,
            queries, results, tokens, _tails(key + S, one.block_n, pages.device),
        )  # fmt: skip


def prompt_pages(members: Sequence[Member], pages: Pages, place: Place) -> Tensor:
    """`Joined.pages` of `join_padded`, on the host."""
    first = torch.tensor(place.first_key) // pages.size
    return _page_index(members, pages, first, torch.full_like(first, place.keys // pages.size)).view(
        len(members), -1
    )


def _join_lists(
    lists: Sequence[IndexList], heads: int, rows: int, first_row: Sequence[int], shift: Sequence[int]
) -> IndexList:
    """Lists of single sequences as one with `rows` rows for each head of each; indices are shifted."""
    device = lists[0].offsets.device
    lengths = torch.zeros(len(lists), heads, rows, dtype=torch.int64, device=device)
    used = torch.stack([x.offsets[-1] for x in lists]).tolist()  # one synchronisation
    parts = []
    for n, own in enumerate(lists):
        count = own.rows // heads
        lengths[n, :, first_row[n] : first_row[n] + count] = own.lengths.view(heads, count)
        parts.append(own.indices[: used[n]] + shift[n])
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=device)
    torch.cumsum(lengths.flatten(), 0, out=offsets[1:])
    indices = torch.cat(parts)
    return IndexList(offsets, indices if len(indices) else indices.new_zeros(1), lists[0].group)


def _tails(end: Tensor, block_n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    count = -end % block_n
    if not count.any():
        return None
    entry = torch.arange(len(end)).repeat_interleave(count)
    return tuple(x.to(device) for x in (entry, end[entry] + ramp(count), end[entry] - 1))  # type: ignore[return-value]


# -- both -----------------------------------------------------------------------------------------


def ramp(counts: Tensor) -> Tensor:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) - (ends - counts).repeat_interleave(counts)


def _page_index(members: Sequence[Member], pages: Pages, before: Tensor, count: Tensor) -> Tensor:
    """Entries of the flattened block table for `count` pages of each sequence, the first `before` of which
    lie before its own: what is not its own repeats its first or its last page."""
    owner = torch.arange(len(members)).repeat_interleave(count)
    used = torch.tensor([-(-x.S // pages.size) for x in members])[owner]
    page = (ramp(count) - before[owner]).clamp(min=0).minimum(used - 1)
    return torch.tensor([x.number for x in members])[owner] * pages.table_width + page


def _needed(
    layout: SparseLayout, members: Sequence[Member], pages: Pages, spans: Sequence[tuple[int, int]]
) -> Needed | None:
    """`Joined.needed`; `spans` are the batch entry and the first key of each sequence."""
    needed = needed_pages(layout, pages.num_kv_heads, pages.size)
    own = torch.zeros(layout.batch, needed.shape[2], dtype=torch.bool)
    for x, (entry, key) in zip(members, spans, strict=True):
        own[entry, key // pages.size : -(-(key + x.S) // pages.size)] = True
    if (needed.cpu() | ~own[:, None]).all():
        return None
    return tuple(x.to(pages.device) for x in needed.nonzero(as_tuple=True))  # type: ignore[return-value]


def _on(layout: SparseLayout, device: torch.device, is_causal: bool) -> SparseLayout:
    """The layout on a device, with the bounds that its call reads, made where its lists are."""
    if layout.device == device:
        return layout
    moved = layout.to(device)
    moved._cache["block_bounds", is_causal] = layout.block_bounds(is_causal).to(device)
    if layout.columns is not None:
        moved._cache["column_bounds", is_causal] = layout.column_bounds(is_causal).to(device)
    return moved
