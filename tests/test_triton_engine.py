"""What is particular to the Triton engine. `test_engines.py` holds it against float64 like the others."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.attend import attend
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.engines.triton import row_dot
from sparse_attn.kernels import configs
from sparse_attn.layout import SparseLayout
from sparse_attn.plan import Plan
from sparse_attn.schedule import MERGED_TILE, merge_factor, merge_rows, schedule_of
from sparse_attn.testing import check_engine, make_inputs, random_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs(**kwargs):
    return make_inputs(device=DEVICE, **{"head_dim": 16, **kwargs})


def call_of(layout, *, heads=2, kv_heads=None, dtype=torch.float16, is_causal=True, **kwargs) -> AttendCall:
    q, k, v = make_inputs(
        heads=heads, kv_heads=kv_heads, L=layout.L, S=layout.S, head_dim=16, dtype=dtype, device=layout.device
    )
    skip = kwargs.pop("skip_below", None)
    return AttendCall(q, k, v, layout, skip, is_causal, 0.25, **kwargs)


# -- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_m, block_n", [(256, 256), (16, 256), (256, 16)])
def test_large_blocks_are_walked_in_sub_tiles(block_m, block_n):
    layout = random_layout("random", 300, 290, block_m=block_m, block_n=block_n, density=0.7, device=DEVICE)
    q, k, v = inputs(heads=1, L=300, S=290, dtype=torch.float16)
    check_engine(q, k, v, Plan(layout), engine="triton", is_causal=True, grad=True)


@pytest.mark.parametrize("value_dim, head_dim", [(24, 80), (48, 16), (16, 192)])
def test_head_sizes_between_powers_of_two(value_dim, head_dim):
    layout = random_layout("random", 50, 70, block_m=16, block_n=32, device=DEVICE)
    q, k, v = make_inputs(heads=1, L=50, S=70, head_dim=head_dim, value_dim=value_dim, device=DEVICE)
    check_engine(q, k, v, Plan(layout), engine="triton", grad=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_of_any_sign(scale):
    layout = random_layout("random", 50, 70, block_m=16, block_n=16, device=DEVICE)
    q, k, v = inputs(heads=1, L=50, S=70)
    check_engine(q, k, v, Plan(layout), engine="triton", is_causal=True, scale=scale, grad=True)


def test_expanded_gradients_are_accepted():
    layout = random_layout("random", 33, 33, block_m=16, block_n=16, device=DEVICE)
    grads = {}
    for engine in ("triton", "reference"):
        q, k, v = inputs(heads=1, L=33, requires_grad=True)
        attend(q, k, v, Plan(layout), engine=engine).out.sum().backward()  # strides of 0
        grads[engine] = q.grad, k.grad, v.grad
    for got, expected in zip(*grads.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_row_dot_sums_in_float32(dtype):
    a, b, _ = inputs(batch=2, L=70, head_dim=24, dtype=dtype, strides="blhd")
    torch.testing.assert_close(row_dot(a, b), (a.float() * b.float()).sum(-1), rtol=1e-5, atol=1e-5)


# -- row order and merged rows --------------------------------------------------------------------


def test_order_puts_long_rows_first():
    layout = random_layout("random", 200, 300, block_m=16, block_n=32, heads=2, density=0.5, device=DEVICE)
    schedule = schedule_of(call_of(layout, needs_grad=True))
    lengths = layout.block_bounds(True)[:, 1].view(2, -1)
    ordered = lengths.gather(1, schedule.order.long())
    assert torch.equal(ordered, lengths.sort(dim=1, descending=True).values)
    assert schedule.order.sort(dim=1).values[0].tolist() == list(range(layout.num_query_blocks))
    assert schedule.t_order.shape == (2, layout.num_key_blocks)


@pytest.mark.parametrize("merge", [2, 4])
def test_merged_rows_hold_exactly_their_members(merge):
    layout = random_layout("random", 150, 300, block_m=16, block_n=16, heads=2, density=0.3, device=DEVICE)
    Lb, Sb = layout.num_query_blocks, layout.num_key_blocks
    order = torch.stack([torch.randperm(Lb, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    order = order.int().to(DEVICE)
    offsets, indices = merge_rows(layout.blocks, order, Sb, merge)
    tiles = ceil(Lb / merge)
    rebuilt = torch.zeros(2, Lb, Sb, dtype=torch.bool)
    for row in range(2 * tiles):
        words = indices[offsets[row] : offsets[row + 1]].tolist()
        numbers = [word >> merge for word in words]
        assert numbers == sorted(set(numbers)), f"row {row} is not ascending"
        for word in words:
            members = [x for x in range(merge) if word >> x & 1]
            assert members, f"row {row} lists a block that no member reads"
            for x in members:
                head, place = row // tiles, row % tiles * merge + x
                rebuilt[head, order[head, place], word >> merge] = True
    assert torch.equal(rebuilt, layout.block_mask()[0].cpu())


LAYOUTS = {
    "strided": lambda: SparseLayout.strided(
        170, 170, heads=2, block=32, local_blocks=2, stride=3, device=DEVICE
    ),
    "L<S": lambda: SparseLayout.strided(90, 170, heads=2, block=16, local_blocks=2, stride=3, device=DEVICE),
    "L>S": lambda: SparseLayout.window(170, 90, block_m=16, block_n=32, left=1, device=DEVICE),
    "sinks": lambda: SparseLayout.window(
        330, 330, block_m=32, block_n=128, left=0, sink_blocks=1, device=DEVICE
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_merged_tiles_are_exact(name):
    layout = LAYOUTS[name]()
    q, k, v = inputs(L=layout.L, S=layout.S, kv_heads=1, dtype=torch.float16)
    call = AttendCall(q, k, v, layout, None, True, 0.25, needs_grad=True)
    assert schedule_of(call).merged is not None, "this layout was meant to be merged"
    check_engine(q, k, v, Plan(layout), engine="triton", is_causal=True, grad=True)


@pytest.mark.parametrize("name", ["strided", "L<S"])
def test_merging_changes_no_more_than_rounding(name):
    """A row meets the same keys in the same order, alone or in company, and that is all that is promised:
    a tile of 64 rows is multiplied by other instructions than one of 16 or 32, and a row's sum of
    exponentials is spread over other threads, so the last bits differ. Each keeps to the accuracy rule,
    and one key more or less would move an lse by 1 / 330 at the least."""
    layout = LAYOUTS[name]()
    q, k, v = inputs(L=layout.L, S=layout.S, dtype=torch.float16)
    alone = replace(layout, neighbours_alike=False, _cache={})
    got = [check_engine(q, k, v, Plan(x), engine="triton", is_causal=True) for x in (layout, alone)]
    assert torch.equal(got[0].kept, got[1].kept)
    torch.testing.assert_close(got[0].lse, got[1].lse, rtol=0, atol=2e-6)


def test_only_what_allows_it_is_merged():
    layout = LAYOUTS["strided"]()
    assert schedule_of(call_of(layout)).merged is not None
    assert schedule_of(call_of(layout, dtype=torch.float32)).merged is None
    limit = torch.zeros(1, 2, device=DEVICE)
    assert schedule_of(call_of(layout, skip_below=limit)).merged is None
    assert schedule_of(call_of(replace(layout, neighbours_alike=False, _cache={}))).merged is None
    large = SparseLayout.window(256, 256, block_m=64, block_n=64, left=1, device=DEVICE)
    assert schedule_of(call_of(large)).merged is None


# -- the table ------------------------------------------------------------------------------------


SIZES = [
    (itemsize, head_dim, block_m, block_n)
    for itemsize in (2, 4)
    for head_dim in (16, 64, 128, 256)
    for block_m in (16, 64, 128, 256)
    for block_n in (16, 64, 128, 256)
]


@pytest.mark.parametrize("tma", [False, True])
def test_tiles_fit_their_blocks(tma):
    for size in SIZES:
        tiles = [configs.forward_tile(*size, merged=False, skips=False, tma=tma)]
        tiles += [configs.dq_tile(*size, merged=False, tma=tma)]
        tiles += [configs.dkdv_tile(*size, merged=False, tma=tma)]
        for tile in tiles:
            assert size[2] % tile.block_m == 0 and size[3] % tile.block_n == 0, (size, tile)
            assert tile.num_warps in (4, 8) and tile.num_stages >= 1, (size, tile)


@pytest.mark.parametrize("block", [16, 32])
def test_merged_tiles_hold_whole_blocks(block):
    assert merge_factor(block) * block == MERGED_TILE
    forward = configs.forward_tile(2, 128, block, 64, merged=True, skips=False, tma=True)
    dq = configs.dq_tile(2, 128, block, 64, merged=True, tma=True)
    dkdv = configs.dkdv_tile(2, 128, 64, block, merged=True, tma=True)
    assert forward.block_m == dq.block_m == dkdv.block_n == MERGED_TILE


@pytest.mark.parametrize("tma", [False, True])
def test_a_skip_walks_the_tiles_that_run_without_one(tma):
    for size in SIZES:
        with_skip, without = (
            configs.forward_tile(*size, merged=False, skips=skips, tma=tma) for skips in (True, False)
        )
        top = configs.max_block_with_skip(size[0])
        if max(size[2:]) <= top:
            assert (with_skip.block_m, with_skip.block_n) == (without.block_m, without.block_n), size
            assert with_skip.block_m == size[2], "the vote covers whole query blocks"


# -- refusals -------------------------------------------------------------------------------------


def reasons(layout, **kwargs) -> str:
    return " | ".join(ENGINES["triton"].why_not(call_of(layout, **kwargs)))


def test_runs_what_it_should():
    assert not reasons(random_layout("random", 64, 64, device=DEVICE))


def test_refusals_name_the_remedy():
    odd = random_layout("random", 64, 64, block_m=48, block_n=8, device=DEVICE)
    assert "block_m is 48; use a power of two from 16" in reasons(odd)
    assert "block_n is 8; use a power of two from 16" in reasons(odd)
    plain = random_layout("random", 64, 64, device=DEVICE)
    assert "use float16, bfloat16 or float32" in reasons(plain, dtype=torch.float64)
    large = random_layout("random", 300, 300, block_m=256, block_n=256, device=DEVICE)
    limit = torch.zeros(1, 2, device=DEVICE)
    assert "at most 128" in reasons(large, skip_below=limit)
    assert "at most 64" in reasons(large, skip_below=limit, dtype=torch.float32)


def test_column_gradients_need_leave_to_use_atomics():
    columns = random_layout("columns", 64, 64, device=DEVICE)
    assert not reasons(columns, needs_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert "summed with atomics" in reasons(columns, needs_grad=True)
        assert not reasons(columns)
        assert not reasons(random_layout("random", 64, 64, device=DEVICE), needs_grad=True)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_cpu_tensors_are_refused_where_there_is_a_gpu():
    layout = random_layout("random", 64, 64)
    assert "move them to cuda" in reasons(layout)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("sparse_attn.engines.triton.HAS_TRITON", False)
    assert ENGINES["triton"].why_off() == ["Triton is not installed; pip install triton"]
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no GPU" in ENGINES["triton"].why_off()[0]


# -- on the GPU -----------------------------------------------------------------------------------


@needs_gpu
def test_cuda_graph_replays_new_inputs():
    layout = random_layout("columns", 512, 512, block_m=64, block_n=64, heads=2, device=DEVICE)
    q, k, v = inputs(L=512, head_dim=64, dtype=torch.bfloat16)
    run = lambda: attend(q, k, v, Plan(layout), is_causal=True, engine="triton").out  # noqa: E731
    run()  # compiles, and caches what the layout needs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, run())


@needs_gpu
@pytest.mark.parametrize("merged", [False, True])
def test_block_gradients_are_bitwise_reproducible(merged):
    layout = SparseLayout.strided(1000, 1000, heads=4, block=32, local_blocks=2, stride=4, device=DEVICE)
    layout = replace(layout, neighbours_alike=merged, _cache={})
    first = None
    for _ in range(3):
        q, k, v = inputs(heads=4, kv_heads=2, L=1000, head_dim=64, dtype=torch.bfloat16, requires_grad=True)
        attend(
            q, k, v, Plan(layout), is_causal=True, enable_gqa=True, engine="triton"
        ).out.square().sum().backward()
        grads = q.grad, k.grad, v.grad
        first = first or grads
        assert all(torch.equal(x, y) for x, y in zip(first, grads, strict=True))


@needs_gpu
@pytest.mark.parametrize("block", [64, 128])
def test_lambda_zero_is_dense_bit_for_bit(block):
    layout = random_layout("random", 1000, 1000, block_m=block, block_n=block, density=0.7, device=DEVICE)
    q, k, v = inputs(L=1000, head_dim=128, dtype=torch.bfloat16)
    limit = torch.full((1, 2), -torch.inf, device=DEVICE)
    skip = attend(q, k, v, Plan(layout, limit), is_causal=True, engine="triton")
    dense = attend(q, k, v, Plan(layout), is_causal=True, engine="triton")
    assert torch.equal(skip.out, dense.out) and torch.equal(skip.lse, dense.lse)
