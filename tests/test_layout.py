"""`SparseLayout` and `IndexList` against dense masks made by loops."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_attn import index_list
from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout, visible_blocks

LENGTHS = [(1, 1), (63, 63), (63, 127), (127, 63), (1, 127), (127, 1), (1000, 1000), (127, 1000), (1000, 127)]
BLOCKS = [(32, 32), (16, 48), (64, 20)]
sizes = pytest.mark.parametrize(("L", "S"), LENGTHS, ids=lambda x: str(x))
blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
causality = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def size(L, S, block):
    return {"block_m": block[0], "block_n": block[1], "L": L, "S": S}


def grid(L, S, block):
    return ceil(L / block[0]), ceil(S / block[1])


def queries(i, L, block_m):
    return range(i * block_m, min((i + 1) * block_m, L))


def by_loops(L, S, block, reads):
    """bool [1, 1, Lb, Sb] from reads(i, j)."""
    Lb, Sb = grid(L, S, block)
    return torch.tensor([[[[bool(reads(i, j)) for j in range(Sb)] for i in range(Lb)]]])


def random_mask(L, S, block, *, batch=2, heads=3, density=0.4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, *grid(L, S, block), generator=draw) < density


def random_layout(L, S, block, *, columns=True, group=2, **how):
    """A random layout with empty and full rows, and columns outside its blocks."""
    mask = random_mask(L, S, block, **how)
    mask[:, :, 0] = False
    mask[:, 1:, -1] = True
    column_mask = None
    if columns:
        Lb = mask.shape[2]
        draw = torch.Generator().manual_seed(1)
        column_mask = torch.rand(*mask.shape[:2], ceil(Lb / group), S, generator=draw) < 0.2
        token = mask.repeat_interleave(block[1], 3)[..., :S]
        for i in range(Lb):
            column_mask[:, :, i // group] &= ~token[:, :, i]
    return SparseLayout.from_dense_mask(mask, **size(L, S, block), columns=column_mask, column_group=group)


def dense_by_loops(layout, is_causal):
    """bool [B', H', L, S] from the lists themselves, one entry at a time."""
    out = torch.zeros(layout.batch, layout.heads, layout.L, layout.S, dtype=torch.bool)
    for b in range(layout.batch):
        for h in range(layout.heads):
            for i in range(layout.num_query_blocks):
                rows = slice(i * layout.block_m, (i + 1) * layout.block_m)
                for j in row_of(layout.blocks, layout, b, h, i):
                    out[b, h, rows, j * layout.block_n : (j + 1) * layout.block_n] = True
                if layout.columns is not None:
                    out[b, h, rows, row_of(layout.columns, layout, b, h, i)] = True
    if is_causal:
        out &= torch.ones(layout.L, layout.S, dtype=torch.bool).tril(layout.S - layout.L)
    return out


def row_of(rows, layout, b, h, i):
    """The list that query block i of (b, h) reads."""
    per_head = ceil(layout.num_query_blocks / rows.group)
    r = (b * layout.heads + h) * per_head + i // rows.group
    return rows.indices[int(rows.offsets[r]) : int(rows.offsets[r + 1])].tolist()


# -- builders -------------------------------------------------------------------------------------


@sizes
@blocks
def test_full(L, S, block) -> None:
    layout = SparseLayout.full(L, S, block_m=block[0], block_n=block[1]).check()
    assert torch.equal(layout.block_mask(), by_loops(L, S, block, lambda i, j: True))
    assert layout.to_dense().all() and layout.to_dense().shape == (1, 1, L, S)


@sizes
@blocks
@pytest.mark.parametrize(("left", "right", "sinks"), [(0, 0, 0), (2, 0, 1), (1, 3, 0)], ids=str)
def test_window(L, S, block, left, right, sinks) -> None:
    def reads(i, j):
        own = [(x + S - L) // block[1] for x in queries(i, L, block[0])]
        return own[0] - left <= j <= own[-1] + right or j < sinks

    how = {"block_m": block[0], "block_n": block[1], "left": left, "right": right, "sink_blocks": sinks}
    layout = SparseLayout.window(L, S, **how).check()
    assert torch.equal(layout.block_mask(), by_loops(L, S, block, reads))
    sized = SparseLayout.window(L, S, **how, capacity=layout.blocks.capacity + 5).check()
    assert torch.equal(sized.block_mask(), layout.block_mask())


@sizes
@pytest.mark.parametrize(
    "shifts", [None, [3, 0, 3], torch.tensor([1, 1, 2])], ids=["default", "list", "tensor"]
)
def test_strided(L, S, shifts) -> None:
    how = {"heads": 3, "block": 16, "local_blocks": 2, "stride": 3, "shifts": shifts}
    layout = SparseLayout.strided(L, S, **how).check()
    for h in range(3):
        shift = h if shifts is None else int(shifts[h])

        def reads(i, j, shift=shift):
            last = (queries(i, L, 16)[-1] + S - L) // 16
            return j <= last and (last - j < 2 or (j + shift) % 3 == 0)

        assert torch.equal(layout.block_mask()[:, h : h + 1], by_loops(L, S, (16, 16), reads))


@sizes
@blocks
def test_from_dense_mask_is_what_to_dense_gives_back(L, S, block) -> None:
    layout = random_layout(L, S, block).check()
    for is_causal in (False, True):
        assert torch.equal(layout.to_dense(is_causal), dense_by_loops(layout, is_causal))
    again = SparseLayout.from_dense_mask(
        layout.block_mask(), **size(L, S, block), columns=layout.column_mask(), column_group=2
    )
    for ours, theirs in ((again.blocks, layout.blocks), (again.columns, layout.columns)):
        assert torch.equal(ours.offsets, theirs.offsets) and torch.equal(ours.indices, theirs.indices)


@causality
def test_top_k(is_causal) -> None:
    L, S, block = 100, 127, (16, 16)
    scores = torch.rand(2, 1, *grid(L, S, block))
    scores[0, 0, 3, 2:] = -torch.inf
    scores[1, 0, 6, :3] = torch.nan
    layout = SparseLayout.top_k(scores, 3, **size(L, S, block), is_causal=is_causal).check()
    for b in range(2):
        for i in range(7):
            reach = (queries(i, L, 16)[-1] + S - L) // 16 if is_causal else 7
            ranked = [j for j in range(8) if j <= reach and scores[b, 0, i, j] > -torch.inf]
            ranked.sort(key=lambda j, b=b, i=i: -scores[b, 0, i, j])
            assert row_of(layout.blocks, layout, b, 0, i) == sorted(ranked[:3])


@causality
def test_threshold(is_causal) -> None:
    L, S, block = 100, 127, (16, 48)
    scores = torch.rand(1, 2, *grid(L, S, block))
    scores[0, 0, 0, 0] = torch.nan
    scores[0, 0, 0, 1] = 0.5  # equal counts
    layout = SparseLayout.threshold(scores, 0.5, **size(L, S, block), is_causal=is_causal).check()
    seen = by_loops(L, S, block, lambda i, j: not is_causal or j * 48 <= queries(i, L, 16)[-1] + S - L)
    assert torch.equal(layout.block_mask(), (scores >= 0.5) & seen)


def test_batch_and_heads_of_mask_and_columns_broadcast() -> None:
    mask = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    columns = torch.zeros(2, 1, 4, 63, dtype=torch.bool)
    columns[1, 0, 2, 40] = True
    layout = SparseLayout.from_dense_mask(mask, **size(63, 63, (16, 16)), columns=columns).check()
    assert (layout.batch, layout.heads) == (2, 3)
    assert layout.to_dense().nonzero()[:, 0].unique().tolist() == [1]
    assert layout.to_dense().sum((2, 3)).tolist() == [[0, 0, 0], [16, 16, 16]]


def dense(mask=None, **how):
    mask = true(2, 1, 4, 4) if mask is None else mask
    return SparseLayout.from_dense_mask(mask, **size(63, 63, (16, 16)), **how)


def true(*shape):
    return torch.ones(shape, dtype=torch.bool)


def scored(build, how, *shape):
    return build(torch.rand(shape), how, **size(63, 63, (16, 16)))


def one_block_layout(num_rows=1, group=1, L=8):
    rows = IndexList(torch.zeros(num_rows + 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), group)
    return SparseLayout(rows, 8, 8, L, 8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseLayout.full(0, 5), "full: L is 0"),
        (lambda: SparseLayout.full(5, 5, block_n=0), "full: block_n is 0"),
        (lambda: SparseLayout.window(5, 5, left=-1), "window: left is -1; it must be at least 0"),
        (lambda: SparseLayout.strided(5, 5, heads=2, stride=0), "strided: stride is 0"),
        (
            lambda: SparseLayout.strided(5, 5, heads=2, shifts=[1]),
            r"shape \(1,\); expected one for each of 2",
        ),
        (lambda: dense(torch.ones(1, 1, 4, 4)), "dtype torch.float32; it must be torch.bool"),
        (lambda: dense(true(1, 1, 4, 5)), r"mask has shape \(1, 1, 4, 5\); expected \["),
        (lambda: dense(columns=true(1, 1, 2, 63)), "columns has shape"),
        (lambda: dense(columns=torch.ones(1, 1, 4, 63)), "columns has dtype torch.float32"),
        (lambda: dense(columns=true(1, 1, 4, 63)), "column 0 lies inside block 0"),
        (lambda: dense(columns=true(3, 1, 4, 63)), "mask has batch 2 but columns has 3"),
        (lambda: dense(column_group=0), "column_group is 0"),
        (lambda: scored(SparseLayout.top_k, 5, 1, 1, 4, 4), "k is 5; it must be between 1 and 4"),
        (lambda: scored(SparseLayout.top_k, 1, 4, 4), "top_k: scores has shape"),
        (lambda: scored(SparseLayout.threshold, 0.5, 1, 1, 3, 4), "threshold: scores has shape"),
        (lambda: one_block_layout(num_rows=2), "blocks has 2 rows; expected 1"),
        (lambda: one_block_layout(group=2), "blocks.group is 2"),
        (lambda: one_block_layout(L=0), "L is 0"),
    ],
)
def test_builders_refuse(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# -- capacity -------------------------------------------------------------------------------------


@sizes
@pytest.mark.parametrize("spare", [0, 1, 100], ids=lambda x: f"spare{x}")
def test_capacity_path_equals_exact_path(L, S, spare) -> None:
    block = (32, 16)
    exact = random_layout(L, S, block)
    room = {"capacity": exact.blocks.capacity + spare, "column_capacity": exact.columns.capacity + spare}
    sized = SparseLayout.from_dense_mask(
        exact.block_mask(), **size(L, S, block), columns=exact.column_mask(), column_group=2, **room
    ).check()
    for ours, theirs in ((sized.blocks, exact.blocks), (sized.columns, exact.columns)):
        assert ours.capacity == theirs.capacity + spare
        assert torch.equal(ours.offsets, theirs.offsets)
        assert torch.equal(ours.indices[: theirs.capacity], theirs.indices)
    for is_causal in (False, True):
        assert torch.equal(sized.block_bounds(is_causal), exact.block_bounds(is_causal))
        assert torch.equal(sized.column_bounds(is_causal), exact.column_bounds(is_causal))
        assert torch.equal(sized.transposed_bounds(is_causal), exact.transposed_bounds(is_causal))
        assert sized.density(is_causal) == exact.density(is_causal)
    assert torch.equal(sized.to_dense(), exact.to_dense())
    assert torch.equal(sized.transposed().offsets, exact.transposed().offsets)


@pytest.mark.parametrize("capacity", [0, 1, 7, 23], ids=str)
def test_too_small_a_capacity_keeps_the_first_entries_and_check_says_so(capacity) -> None:
    mask = torch.zeros(5, 10, dtype=torch.bool)
    mask[1, ::2] = mask[2] = mask[4, 1:] = True
    rows = IndexList.from_mask(mask, capacity=capacity)
    kept = mask.flatten().nonzero().flatten()[: max(capacity, 1)]
    expected = torch.zeros(50, dtype=torch.bool).index_fill_(0, kept, True).view(5, 10)
    assert torch.equal(rows.to_mask(10), expected)
    assert int(rows.offsets[-1]) <= rows.capacity == max(capacity, 1)
    layout = SparseLayout(rows, 16, 16, 80, 160)
    with pytest.raises(ValueError, match=f"blocks needs 24 entries but has room for {max(capacity, 1)}"):
        layout.check()


@pytest.mark.parametrize("chunk", [1, 64, 1 << 22], ids=str)
def test_chunked_building_is_exact(chunk, monkeypatch) -> None:
    monkeypatch.setattr(index_list, "_CHUNK", chunk)
    mask = random_mask(127, 1000, (16, 48))[0].flatten(0, 1)
    rows = IndexList.from_mask(mask)
    assert rows.indices.tolist() == mask.nonzero()[:, 1].tolist()
    assert torch.equal(rows.to_mask(mask.shape[1]), mask)


class LargestTensor(TorchDispatchMode):
    """Records the most bytes that one operator's result takes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("capacity", [None, 8 * 512 * 512], ids=["exact", "capacity"])
def test_large_masks_take_no_64_bit_copy(capacity, monkeypatch) -> None:
    monkeypatch.setattr(index_list, "_CHUNK", 1 << 16)
    mask = torch.ones(1, 8, 512, 512, dtype=torch.bool)
    with LargestTensor() as largest:
        layout = SparseLayout.from_dense_mask(mask, **size(8192, 8192, (16, 16)), capacity=capacity)
    assert largest.nbytes <= layout.blocks.indices.untyped_storage().nbytes() == mask.numel() * 4 + 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the CPU has no host synchronisation")
def test_no_synchronisation_where_a_capacity_is_given() -> None:
    mask = random_mask(1000, 1000, (16, 16)).cuda()
    columns = torch.zeros(2, 3, 63, 1000, dtype=torch.bool, device="cuda")
    scores = torch.rand(1, 2, 63, 63, device="cuda")
    how = size(1000, 1000, (16, 16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [
            SparseLayout.from_dense_mask(mask, **how, columns=columns, capacity=30000, column_capacity=10),
            SparseLayout.top_k(scores, 5, **how, is_causal=True, capacity=1000),
            SparseLayout.threshold(scores, 0.5, **how, capacity=8000),
            SparseLayout.full(1000, 1000, device="cuda"),
            SparseLayout.window(1000, 1000, left=2, device="cuda", capacity=64),
            SparseLayout.strided(1000, 1000, heads=4, device="cuda", capacity=1024),
        ]
        for layout in made:
            for is_causal in (False, True):
                layout.block_bounds(is_causal), layout.transposed_bounds(is_causal)
                layout.density(is_causal, per_head=True)
            layout.block_mask()
        made[0].column_bounds(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for layout in made:
        layout.check()


# -- what the engines read ------------------------------------------------------------------------


@sizes
@blocks
@causality
def test_block_and_column_bounds(L, S, block, is_causal) -> None:
    layout = random_layout(L, S, block)
    block_bounds, column_bounds = layout.block_bounds(is_causal), layout.column_bounds(is_causal)
    assert block_bounds.dtype == column_bounds.dtype == torch.int32
    row = 0
    for b in range(layout.batch):
        for h in range(layout.heads):
            for i in range(layout.num_query_blocks):
                own = [x + S - L for x in queries(i, L, block[0])]
                listed = row_of(layout.blocks, layout, b, h, i)
                ends = [(j + 1) * block[1] - 1 for j in listed]
                whole = [e < S and (not is_causal or e <= own[0]) for e in ends]
                seen = [not is_causal or j * block[1] <= own[-1] for j in listed]
                assert block_bounds[row].tolist() == [sum(whole), sum(seen)]
                columns = row_of(layout.columns, layout, b, h, i)
                by_all = [c for c in columns if not is_causal or c <= own[0]]
                by_some = [c for c in columns if not is_causal or c <= own[-1]]
                assert column_bounds[row].tolist() == [len(by_all), len(by_some)]
                row += 1
    assert row == len(block_bounds) == len(column_bounds)


@sizes
@blocks
@causality
def test_transposed_lists_and_bounds(L, S, block, is_causal) -> None:
    layout = random_layout(L, S, block, columns=False)
    lists, bounds, mask = layout.transposed(), layout.transposed_bounds(is_causal), layout.block_mask()
    Sb = layout.num_key_blocks
    assert lists.rows == len(bounds) == 6 * Sb
    for row in range(lists.rows):
        head, j = divmod(row, Sb)
        b, h = divmod(head, layout.heads)
        got = lists.indices[int(lists.offsets[row]) : int(lists.offsets[row + 1])].tolist()
        assert got == mask[b, h, :, j].nonzero().flatten().tolist()
        first, last = j * block[1], min((j + 1) * block[1], S) - 1
        reach = [[x + S - L for x in queries(i, L, block[0])] for i in got]
        unseen = [is_causal and own[-1] < first for own in reach]
        cut = [is_causal and own[0] < last for own in reach]
        assert bounds[row].tolist() == [sum(unseen), sum(cut)]


def test_derived_lists_are_made_once() -> None:
    layout = random_layout(63, 127, (16, 16))
    for make in (layout.block_bounds, layout.column_bounds, layout.transposed_bounds):
        assert make(True) is make(True) and make(True) is not make(False)
    assert layout.transposed() is layout.transposed()


@blocks
def test_visible_blocks(block) -> None:
    for L, S in LENGTHS:
        seen = by_loops(
            L, S, block, lambda i, j, L=L, S=S: j * block[1] <= queries(i, L, block[0])[-1] + S - L
        )
        assert torch.equal(visible_blocks(L, S, *block), seen[0, 0])


def test_moving_a_layout_keeps_everything() -> None:
    layout = replace(random_layout(63, 127, (16, 16)), neighbours_alike=True)
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.columns.group == 2 and moved.neighbours_alike
    same = layout.to("cpu")
    assert torch.equal(same.to_dense(), layout.to_dense())


# -- density, coarser blocks, other formats -------------------------------------------------------


@sizes
@blocks
@causality
def test_density_counts_tokens(L, S, block, is_causal) -> None:
    layout = random_layout(L, S, block)
    attended = layout.to_dense(is_causal).sum((2, 3)).double()
    total = torch.ones(L, S).tril(S - L if is_causal else S).sum().item()
    expected = attended / total if total else attended
    torch.testing.assert_close(layout.density(is_causal, per_head=True), expected)
    assert layout.density(is_causal) == pytest.approx(expected.mean().item())
    assert SparseLayout.full(L, S, block_m=block[0], block_n=block[1]).density(is_causal) == 1.0


@sizes
def test_coarsen_is_the_smallest_cover(L, S) -> None:
    layout = random_layout(L, S, (16, 8), columns=False)
    coarse = layout.coarsen(32, 24).check()
    fine = layout.block_mask()

    def reads(b, h):
        return lambda i, j: fine[b, h, i * 2 : i * 2 + 2, j * 3 : j * 3 + 3].any()

    for b in range(layout.batch):
        for h in range(layout.heads):
            assert torch.equal(coarse.block_mask()[b, h], by_loops(L, S, (32, 24), reads(b, h))[0, 0])
    assert (coarse.to_dense() >= layout.to_dense()).all() and coarse.density() >= layout.density()
    assert torch.equal(layout.coarsen(16, 8).block_mask(), fine)


@pytest.mark.parametrize("block", [(24, 8), (16, 12), (8, 8), (0, 8)], ids=str)
def test_coarsen_refuses_what_is_no_multiple(block) -> None:
    with pytest.raises(ValueError, match="not multiples of the layout's 16x8"):
        random_layout(63, 63, (16, 8), columns=False).coarsen(*block)


@sizes
@blocks
def test_count_and_index_both_ways(L, S, block) -> None:
    layout = random_layout(L, S, block, columns=False)
    counts, indices = layout.to_count_index()
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == (2, 3, *grid(L, S, block)[:1]) and indices.shape == (2, 3, *grid(L, S, block))
    for b, h, i in ((0, 0, 0), (1, 2, layout.num_query_blocks - 1), (0, 1, layout.num_query_blocks // 2)):
        listed = row_of(layout.blocks, layout, b, h, i)
        assert indices[b, h, i].tolist() == listed + [0] * (layout.num_key_blocks - len(listed))
    again = SparseLayout.from_count_index(counts, indices, **size(L, S, block)).check()
    assert torch.equal(again.block_mask(), layout.block_mask())
    place = torch.arange(indices.shape[-1])
    backwards = torch.where(place < counts[..., None], counts[..., None] - 1 - place, place)
    shuffled = SparseLayout.from_count_index(counts, indices.gather(-1, backwards), **size(L, S, block))
    assert torch.equal(shuffled.block_mask(), layout.block_mask())


def test_other_formats_refuse_columns_and_wrong_shapes() -> None:
    layout = random_layout(63, 63, (16, 16))
    for convert in (layout.to_count_index, layout.to_block_mask, lambda: layout.coarsen(32, 32)):
        with pytest.raises(ValueError, match="columns"):
            convert()
    with pytest.raises(ValueError, match=r"expected \[B, H, Lb\]"):
        SparseLayout.from_count_index(torch.ones(4), torch.ones(4, 4), **size(63, 63, (16, 16)))


@sizes
@causality
def test_block_mask_both_ways(L, S, is_causal) -> None:
    block = (32, 16)
    layout = random_layout(L, S, block, columns=False)
    mask = layout.to_block_mask(is_causal)
    assert isinstance(mask, BlockMask) and mask.seq_lengths == (L, S) and block == mask.BLOCK_SIZE
    seen = layout.block_mask()
    if is_causal:
        seen = seen & visible_blocks(L, S, *block)
    assert torch.equal(mask.to_dense().bool(), seen)
    back = SparseLayout.from_block_mask(mask).check()
    assert torch.equal(back.to_dense(is_causal), layout.to_dense(is_causal))


@pytest.mark.parametrize(("L", "S"), [(128, 128), (128, 256)], ids=str)
@causality
def test_block_mask_in_eager_flex_attention(L, S, is_causal) -> None:
    layout = random_layout(L, S, (32, 16), columns=False, heads=2)
    q, k, v = (torch.randn(2, 2, n, 16, dtype=torch.float64) for n in (L, S, S))
    dense_mask = layout.to_dense(is_causal)
    rows = dense_mask.any(-1)
    assert not rows.all()  # FlexAttention leaves rows without a key undefined
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask)
    out = flex_attention(q, k, v, block_mask=layout.to_block_mask(is_causal))
    torch.testing.assert_close(out[rows], exact[rows])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: compiles FlexAttention")
@pytest.mark.plain_empty
@pytest.mark.parametrize(("L", "S"), [(512, 512), (500, 777), (1000, 640)], ids=str)
@causality
def test_block_mask_in_compiled_flex_attention(L, S, is_causal) -> None:
    layout = random_layout(L, S, (128, 128), columns=False, heads=2).to("cuda")
    q, k, v = (torch.randn(2, 2, n, 64, device="cuda") for n in (L, S, S))
    dense_mask = layout.to_dense(is_causal)
    rows = dense_mask.any(-1)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask)
    out = torch.compile(flex_attention)(q, k, v, block_mask=layout.to_block_mask(is_causal))
    torch.testing.assert_close(out[rows], exact[rows], rtol=1e-2, atol=1e-2)


def test_from_block_mask_reads_what_torch_makes() -> None:
    def causal(b, h, q, kv):
        return q >= kv

    def blocky(b, h, q, kv):
        return (q // 32 + kv // 32 + h) % 2 == 0

    mask = create_block_mask(causal, 1, 1, 100, 100, device="cpu", BLOCK_SIZE=32)
    layout = SparseLayout.from_block_mask(mask).check()
    assert torch.equal(layout.to_dense(is_causal=True)[0, 0], torch.ones(100, 100).tril().bool())
    mask = create_block_mask(blocky, 2, 2, 96, 100, device="cpu", BLOCK_SIZE=32)
    layout = SparseLayout.from_block_mask(mask).check()
    expected = [[[(i // 32 + j // 32 + h) % 2 == 0 for j in range(100)] for i in range(96)] for h in range(2)]
    assert torch.equal(layout.to_dense(), torch.tensor(expected).expand(2, 2, 96, 100))


@pytest.mark.parametrize(
    ("mask_mod", "message"),
    [
        (lambda b, h, q, kv: (q - kv).abs() < 20, "other than by bottom-right causality"),
        (lambda b, h, q, kv: (q >= kv) & (kv != 5), "other than by bottom-right causality"),
        (lambda b, h, q, kv: (q >= kv) | (kv >= 64), "reach beyond the causal edge"),
    ],
    ids=["band", "hole", "causal_and_full"],
)
def test_from_block_mask_refuses_what_a_layout_cannot_say(mask_mod, message) -> None:
    mask = create_block_mask(mask_mod, 1, 1, 96, 96, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match=message):
        SparseLayout.from_block_mask(mask)


# -- check ----------------------------------------------------------------------------------------


def lists(offsets, indices, group=1, **how):
    return IndexList(torch.tensor(offsets), torch.tensor(indices, dtype=torch.int32), group, **how)


GOOD = lists([0, 2, 2, 5], [0, 3, 1, 2, 3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lists([0, 2, 2, 5], [0, 4, 1, 2, 3]), r"indices in \[0, 4\]; they must lie in \[0, 3\]"),
        (lists([0, 2, 2, 5], [-1, 3, 1, 2, 3]), r"indices in \[-1, 3\]"),
        (lists([0, 2, 2, 5], [3, 0, 1, 2, 3]), "blocks row 0 is not strictly ascending"),
        (lists([0, 2, 2, 5], [0, 3, 1, 1, 3]), "blocks row 2 is not strictly ascending"),
        (lists([0, 2, 1, 5], [0, 3, 1, 2, 3]), "offsets must start at 0 and never decrease"),
        (lists([1, 2, 2, 5], [0, 3, 1, 2, 3]), "offsets must start at 0 and never decrease"),
        (lists([0, 2, 2, 6], [0, 3, 1, 2, 3]), "needs 6 entries but has room for 5"),
        (lists([0, 2, 2, 5], [0, 3, 1, 2, 3], needed=torch.tensor(9)), "needs 9 entries but has room for 5"),
        (IndexList(GOOD.offsets.int(), GOOD.indices), "int64 offsets and int32 indices"),
        (IndexList(GOOD.offsets, GOOD.indices.long()), "int64 offsets and int32 indices"),
    ],
)
def test_check_names_each_broken_invariant(rows, message) -> None:
    assert SparseLayout(GOOD, 16, 16, 48, 64).check() is not None
    with pytest.raises(ValueError, match=message):
        SparseLayout(rows, 16, 16, 48, 64).check()


def test_check_finds_a_full_layout_that_is_none() -> None:
    with pytest.raises(ValueError, match="is_full is set, but row 0 lists 2 of 4 blocks; leave is_full out"):
        SparseLayout(GOOD, 16, 16, 48, 64, is_full=True).check()


def test_check_ignores_what_lies_past_the_rows() -> None:
    SparseLayout(lists([0, 2, 2, 5], [0, 3, 1, 2, 3, 77, -5]), 16, 16, 48, 64).check()


@pytest.mark.parametrize(
    ("column", "group", "message"),
    [
        (47, 1, None),
        (48, 1, "column 48 lies inside block 3, which query block 0"),
        (63, 1, "column 63"),
        (16, 3, "column 16 lies inside block 1, which query block 2"),
        (64, 1, r"columns holds indices in \[64, 64\]; they must lie in \[0, 63\]"),
    ],
    ids=str,
)
def test_check_finds_columns_inside_blocks(column, group, message) -> None:
    offsets = [0, 1] + [1] * (2 if group == 1 else 0)
    layout = SparseLayout(GOOD, 16, 16, 48, 64, columns=lists(offsets, [column], group))
    if message is None:
        layout.check()
    else:
        with pytest.raises(ValueError, match=message):
            layout.check()


# -- pictures -------------------------------------------------------------------------------------


def test_draw() -> None:
    layout = SparseLayout(GOOD, 16, 16, 48, 64, columns=lists([0, 1, 2, 2], [20, 33]))
    assert layout.draw() == "#|.#\n..|.\n.###"
    assert layout.draw(is_causal=True) == "#|..\n..|.\n.###"
    assert layout.draw(width=2) == "##\n##"
    shared = SparseLayout(GOOD, 16, 16, 48, 64, columns=lists([0, 1], [4], 3))
    assert shared.draw() == "#..#\n|...\n|###"


@sizes
@causality
def test_draw_pools_the_dense_mask(L, S, is_causal) -> None:
    layout = random_layout(L, S, (16, 16))
    text = layout.draw(batch=1, head=2, width=5, is_causal=is_causal).split("\n")
    Lb, Sb = grid(L, S, (16, 16))
    cell = 16 * max(ceil(Lb / 5), ceil(Sb / 5))
    attended = layout.to_dense(is_causal)[1, 2]
    for i in range(ceil(L / cell)):
        for j in range(ceil(S / cell)):
            some = attended[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].any()
            assert (text[i][j] != ".") == bool(some)
    assert len(text) == ceil(L / cell) and {len(line) for line in text} == {ceil(S / cell)}


def test_repr_says_size_density_and_pattern() -> None:
    text = repr(SparseLayout.window(100, 128, block_m=32, block_n=32, left=1))
    assert text == (
        "SparseLayout(L=100, S=128, block=32x32, batch=1, heads=1, density=0.660, device=cpu)\n"
        "##..\n###.\n.###\n..##"
    )
    assert "columns shared by 2 query blocks" in repr(random_layout(63, 127, (16, 16)))


def test_repr_of_a_huge_layout_is_small_and_quick() -> None:
    offsets = torch.arange(32 * 4096 + 1) * 512
    indices = torch.arange(512, dtype=torch.int32).expand(32 * 4096, 512).reshape(-1)
    layout = SparseLayout(IndexList(offsets, indices), 32, 256, 131072, 131072, 1, 32)
    with LargestTensor() as largest:
        text = repr(layout)
    assert "room for 67108864 entries" in text and len(text) < 2000
    assert largest.nbytes <= indices.untyped_storage().nbytes()  # the layout's own memory, seen as a view


def test_repr_without_data() -> None:
    layout = random_layout(63, 127, (16, 16)).to("meta")
    assert repr(layout).count("\n") == 0 and "room for" in repr(layout)
    assert repr(layout.blocks).startswith("IndexList(24 rows, room for ")


# -- lists ----------------------------------------------------------------------------------------


def test_from_counts() -> None:
    rows = IndexList.from_counts(torch.tensor([2, 0, 3]), torch.tensor([[0, 3, 9], [9, 9, 9], [1, 2, 3]]))
    assert torch.equal(rows.offsets, GOOD.offsets) and torch.equal(rows.indices, GOOD.indices)
    empty = IndexList.from_counts(torch.zeros(2).long(), torch.zeros(2, 3).long())
    assert empty.lengths.tolist() == [0, 0] and empty.capacity == 1


def test_rows_between() -> None:
    part = GOOD.rows_between(1, 3)
    assert part.offsets.tolist() == [0, 0, 3] and part.indices.tolist() == [1, 2, 3]
    assert GOOD.rows_between(1, 2).lengths.tolist() == [0]


masks = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=9)
)


@settings(deadline=None, max_examples=60)
@given(masks, st.integers(0, 60))
def test_lists_round_trip(mask, spare) -> None:
    mask = torch.tensor(mask)
    exact = IndexList.from_mask(mask)
    sized = IndexList.from_mask(mask, capacity=int(mask.sum()) + spare)
    for rows in (exact, sized):
        assert torch.equal(rows.to_mask(mask.shape[1]), mask)
        assert torch.equal(rows.lengths, mask.sum(-1))
        back = rows.transpose(mask.shape[0], mask.shape[1])
        assert torch.equal(back.to_mask(mask.shape[0]), mask.T)
        row_numbers = mask.nonzero()[:, 0]
        assert torch.equal(rows.row_of_entry()[: len(row_numbers)], row_numbers)
        assert (rows.row_of_entry()[len(row_numbers) :] == rows.rows).all()


@settings(deadline=None, max_examples=60)
@given(masks, st.integers(-2, 12))
def test_lower_bound_counts_what_is_below(mask, value) -> None:
    mask = torch.tensor(mask)
    row = torch.arange(mask.shape[0])
    below = IndexList.from_mask(mask).lower_bound(row, torch.full_like(row, value), mask.shape[1])
    assert torch.equal(below, mask[:, : max(value, 0)].sum(-1))


@settings(deadline=None, max_examples=40)
@given(
    L=st.integers(1, 70), S=st.integers(1, 70), block_m=st.integers(1, 40), block_n=st.integers(1, 40),
    group=st.integers(1, 5), is_causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_layout_keeps_its_invariants(L, S, block_m, block_n, group, is_causal, seed) -> None:
    layout = random_layout(L, S, (block_m, block_n), group=group, seed=seed, batch=1, heads=2).check()
    attended = layout.to_dense(is_causal)
    assert torch.equal(attended, dense_by_loops(layout, is_causal))
    total = torch.ones(L, S).tril(S - L if is_causal else S).sum().item()
    assert layout.density(is_causal) == pytest.approx(attended.sum().item() / 2 / max(total, 1))
    for bounds, rows in ((layout.block_bounds, layout.blocks), (layout.column_bounds, layout.columns)):
        whole, seen = bounds(is_causal).long().unbind(-1)
        assert (whole >= 0).all() and (whole <= seen).all()
        per_block = rows.lengths.view(2, -1).repeat_interleave(rows.group, 1)[:, : layout.num_query_blocks]
        assert (seen <= per_block.flatten()).all()
