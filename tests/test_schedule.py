"""Rows of 64 queries in pairs (`schedule.merged_pairs`, `schedule.paired_rounds`), which an H100 executes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparse_attn import ops
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.schedule import full_rows, merged_pairs, paired_rounds, refined, row_order
from sparse_attn.testing import random_layout

HEADS = 3
SHAPES = pytest.mark.parametrize(("L", "S"), [(700, 700), (450, 900), (300, 130)], ids=str)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
BLOCK_N = pytest.mark.parametrize("block_n", [64, 128])


def layout_of(block_n: int, L: int, S: int, density: float = 0.6) -> SparseLayout:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, HEADS, -(-L // 64), -(-S // block_n), generator=generator) < density
    return SparseLayout.from_dense_mask(mask, block_m=64, block_n=block_n, L=L, S=S)


@SHAPES
@CAUSAL
@BLOCK_N
def test_pairs_hold_both_rows_and_know_what_needs_no_mask(block_n, causal, L, S):
    layout = layout_of(block_n, L, S)
    order, mask = row_order(layout, causal), layout.block_mask()
    rows = merged_pairs(layout, causal, order)
    pairs = -(-layout.num_query_blocks // 2)
    some_unmasked = 0
    for row in range(HEADS * pairs):
        head, place = divmod(row, pairs)
        words = rows.indices[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        unmasked, visible = rows.bounds[row].tolist()
        members = order[head, 2 * place : 2 * place + 2].tolist()
        for bit in range(2):
            listed = {x >> 2 for x in words if x >> bit & 1}
            wanted = mask[0, head, members[bit]].nonzero().flatten().tolist() if bit < len(members) else []
            assert listed == set(wanted)
        assert len({x >> 2 for x in words}) == len(words)
        needs_no_mask = [
            x & 3 == 3 and all(_is_whole(x >> 2, m, block_n, causal, L, S) for m in members) for x in words
        ]
        assert all(needs_no_mask[:unmasked]) and 0 <= unmasked <= visible <= len(words)
        assert not any(_is_seen(x >> 2, m, block_n, causal, L, S) for x in words[visible:] for m in members)
        assert words == sorted(words)  # which a skip rule needs
        assert unmasked == len(words) or not needs_no_mask[unmasked]
        some_unmasked += unmasked
    assert some_unmasked > 0 or S < 256


@SHAPES
@CAUSAL
@BLOCK_N
@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
def test_rounds_give_each_row_its_list_and_mask_only_the_last(density, block_n, causal, L, S):
    layout, stage = layout_of(block_n, L, S, density), 128 // block_n
    order, mask, end = row_order(layout, causal), layout.block_mask(), layout.num_key_blocks
    rows = paired_rounds(layout, causal, order, stage)
    pairs = -(-layout.num_query_blocks // 2)
    for row in range(HEADS * pairs):
        head, place = divmod(row, pairs)
        words = rows.indices[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        shared, unmasked, masked, flags = rows.bounds[row].tolist()
        together = flags >> 2
        assert len(words) == (shared + (unmasked + masked) * (1 if together else 2)) * stage
        assert all(word & 3 == 3 for word in words[: shared * stage])
        assert not (together and unmasked)
        members = order[head, 2 * place : 2 * place + 2].tolist()
        for team in range(2):
            stages = [words[n * stage : (n + 1) * stage] for n in range(shared)]
            for n in range(unmasked + masked):
                at = shared + (n if together else 2 * n + team)
                stages.append(words[at * stage : (at + 1) * stage])
            if masked and flags >> team & 1:
                assert all(not word >> team & 1 for word in stages[-1][(stage + 1) // 2 :])
            visited = [word for words in stages for word in words]
            if team == len(members):
                assert not any(word >> team & 1 for word in visited)
                continue
            listed = mask[0, head, members[team]].nonzero().flatten().tolist()
            seen = [x for x in listed if _is_seen(x, members[team], block_n, causal, L, S)]
            assert sorted(word >> 2 for word in visited if word >> team & 1) == seen
            assert all(word >> 2 <= end for word in visited)
            clear = visited[: (shared + unmasked) * stage]
            assert all(word >> team & 1 for word in clear)
            assert all(_is_whole(word >> 2, members[team], block_n, causal, L, S) for word in clear)


@pytest.mark.parametrize("density", [0.5, 0.97])
def test_what_is_left_comes_together_where_that_takes_no_more_stages(density):
    layout, stage = layout_of(64, 1024, 1024, density), 2
    order, mask = row_order(layout, True), layout.block_mask()
    rows = paired_rounds(layout, True, order, stage)
    pairs, found = layout.num_query_blocks // 2, set()
    for row in range(HEADS * pairs):
        head, place = divmod(row, pairs)
        shared, unmasked, masked, flags = rows.bounds[row].tolist()
        first = rows.indices[rows.offsets[row] :][: shared * stage] >> 2
        left = []
        for block in order[head, 2 * place : 2 * place + 2].tolist():
            listed = set(mask[0, head, block].nonzero().flatten().tolist()) - set(first.tolist())
            left.append({x for x in listed if _is_seen(x, block, 64, True, 1024, 1024)})
        own = max(-(-len(x) // stage) for x in left)
        union = -(-len(left[0] | left[1]) // stage)
        assert (flags >> 2 == 1) == (0 < union <= own)
        assert masked == union if flags >> 2 else unmasked + masked == own
        found.add(flags >> 2)
    assert found == {0, 1}


def test_rows_alike_share_all_but_their_edges():
    layout = SparseLayout.full(1024, 1024, block_m=64, block_n=64)
    order = row_order(layout, True)
    shared, unmasked, masked, flags = paired_rounds(layout, True, order, 2).bounds.unbind(-1)
    lengths = torch.arange(16, 0, -2, dtype=torch.int32)  # key blocks that the longer of a pair sees
    assert torch.equal(shared, (lengths - 2) // 2) and not unmasked.any() and bool((masked == 1).all())
    # Both read the last stage, and the shorter row, the second of its pair, only its first half.
    assert bool((flags == 4 + 2).all())


@SHAPES
@CAUSAL
@pytest.mark.parametrize(("block_m", "block_n"), [(192, 128), (128, 64)])
def test_tiles_of_their_own_read_a_full_layout(causal, L, S, block_m, block_n):
    layout, width, tiles = SparseLayout.full(L, S, block_m=48, block_n=80), -(-S // block_n), -(-L // block_m)
    schedule = full_rows(layout, causal, block_m, block_n)
    rows = schedule.merged
    assert rows.indices.tolist() == list(range(width)) and not rows.offsets.any()
    assert sorted(schedule.order[0].tolist()) == list(range(tiles))
    assert rows.bounds[schedule.order[0].long(), 1].diff().le(0).all()  # longest first
    if -L % block_m >= 64:
        assert schedule.order[0, -1] == 0  # the cut tile, whose idle warpgroups leave
    for tile, (unmasked, visible) in enumerate(rows.bounds.tolist()):
        first = tile * block_m - (tiles * block_m - L) // 64 * 64
        end = min(first + block_m, L)
        for block in range(width):
            begin, past = block * block_n, (block + 1) * block_n
            assert (block < unmasked) == (past <= min(S, first + S - L + 1 if causal else S))
            assert (block < visible) == (begin < min(S, end + S - L if causal else S))


@pytest.mark.parametrize("kind", ["random", "empty_rows", "columns"])
@pytest.mark.parametrize("S", [640, 650, 577, 17])
def test_cut_key_blocks_list_the_same_keys(kind, S):
    layout = random_layout(kind, 500, S, block_m=64, block_n=64, heads=HEADS)
    cut = refined(layout, 16).check()
    assert (cut.block_n, cut.columns) == (16, layout.columns)
    assert torch.equal(cut.to_dense(is_causal=True), layout.to_dense(is_causal=True))
    assert refined(layout, 16) is cut and refined(layout, 64) is layout


@pytest.mark.parametrize(
    ("L", "D", "heads", "is_full", "tile"),
    [(1153, 64, 96, True, 192), (1153, 64, 48, True, 128), (1153, 128, 96, True, 128),
     (1153, 64, 96, False, None)],
    ids=["many", "few", "head size 128", "lists"],
)  # fmt: skip
def test_tall_tiles_are_taken_where_they_gain(L, D, heads, is_full, tile):
    """7 tiles of 192 queries a head; from four for each of 132 processors on."""
    q = torch.zeros(1).expand(1, heads, L, D)
    full = SparseLayout.full(L, L)
    layout = full if is_full else SparseLayout(full.blocks, 128, 128, L, L)
    schedule = ENGINES["hopper"].schedule(AttendCall(q, q, q, layout, None, True, 0.125))
    tiles = None if schedule.merged is None else -(-L // tile)
    assert tiles is None or schedule.order.shape[1] == tiles
    assert (tile is None) == (tiles is None)


@pytest.mark.parametrize(("D", "block_n", "cut"), [(128, 32, 16), (128, 256, 128), (256, 128, 64)])
def test_key_blocks_are_cut_for_the_kernels(D, block_n, cut):
    q = torch.zeros(1, HEADS, 500, D)
    layout = random_layout("random", 500, 500, block_m=128, block_n=block_n, heads=HEADS)
    schedule = ENGINES["hopper"].schedule(AttendCall(q, q, q, layout, None, True, 0.125))
    finer = refined(layout, cut)
    assert schedule.merged.indices is finer.blocks.indices and schedule.merged.offsets is finer.blocks.offsets
    assert torch.equal(schedule.merged.bounds, finer.block_bounds(True))
    assert torch.equal(schedule.order, row_order(finer, True))


@pytest.mark.parametrize("extra", ["skip", "columns"])
def test_a_full_layout_keeps_its_blocks_under_a_skip_and_beside_columns(extra):
    """Which tiles fall depends on them, and columns are read beside them."""
    q = torch.zeros(1, HEADS, 300, 128)
    layout, skip = SparseLayout.full(300, 300), None
    if extra == "skip":
        skip = torch.zeros(1, HEADS)
    else:
        none = IndexList(torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
        layout = replace(layout, columns=none)
    schedule = ENGINES["hopper"].schedule(AttendCall(q, q, q, layout, skip, True, 0.125))
    assert schedule.merged is None and torch.equal(schedule.order, row_order(layout, True))


def test_a_full_layout_stays_full_elsewhere():
    layout = SparseLayout.full(300, 300)
    assert layout.is_full and layout.to("cpu").is_full and not layout_of(128, 300, 300).is_full


@pytest.mark.parametrize("is_full", [True, False])
def test_the_operator_brings_what_is_known_of_a_layout(is_full):
    """The kernel's tiles depend on it: they must be those that the schedule was made for."""
    q = torch.zeros(1, HEADS, 300, 64)
    layout = SparseLayout.full(300, 300) if is_full else layout_of(128, 300, 300)
    call, engine = ops._unflatten(ops.flatten(AttendCall(q, q, q, layout, None, True, 0.125), "hopper"))
    assert (engine, call.layout.is_full) == ("hopper", is_full)


def _is_whole(block: int, member: int, block_n: int, causal: bool, L: int, S: int) -> bool:
    end = (block + 1) * block_n
    return end <= S and (not causal or end - 1 <= member * 64 + S - L)


def _is_seen(block: int, member: int, block_n: int, causal: bool, L: int, S: int) -> bool:
    return not causal or block * block_n <= min(member * 64 + 63, L - 1) + S - L
