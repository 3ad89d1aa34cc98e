"""What is the Hopper engine's own; it runs where there is an H100 (or another sm_90 card).

`tests/test_engines.py` holds it to the cases that it takes; here are more of its block sizes and edges.
"""

from __future__ import annotations

import pytest
import torch

import sparse_attn as sa
from sparse_attn import Plan, SparseLayout
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.testing import check_engine, make_inputs, random_layout

WHY_OFF = ENGINES["hopper"].why_off()
needs_hopper = pytest.mark.skipif(bool(WHY_OFF), reason=f"hopper: {'; '.join(WHY_OFF)}")
F16, BF16 = torch.float16, torch.bfloat16

# kind, L, S, query heads, key heads, D, key block, dtype, causal, layout heads, strides
CASES = {
    "columns": ("columns", 1000, 1000, 4, 2, 128, 128, BF16, True, 4, "contiguous"),
    "columns-shared": ("columns", 700, 1300, 8, 2, 64, 64, F16, True, 2, "blhd"),
    "columns-256-keys": ("columns", 1000, 1300, 4, 2, 128, 256, BF16, True, 4, "contiguous"),
    "columns-full": ("columns", 900, 1000, 2, 2, 128, 64, F16, False, 1, "contiguous"),
    "only-columns": ("only_columns", 640, 2000, 2, 2, 64, 128, BF16, True, 2, "contiguous"),
    "one-column": ("one_column", 300, 300, 2, 1, 128, 128, BF16, False, 1, "contiguous"),
    "full": ("full", 128, 128, 1, 1, 128, 128, BF16, False, 1, "contiguous"),
    "full-causal-ragged": ("full", 300, 300, 2, 2, 128, 128, F16, True, 1, "contiguous"),
    "one-query": ("full", 1, 257, 4, 1, 128, 128, BF16, True, 1, "contiguous"),
    "blind-rows": ("full", 300, 130, 2, 2, 64, 64, BF16, True, 1, "contiguous"),
    "chunk": ("full", 513, 1300, 4, 1, 128, 64, F16, True, 1, "contiguous"),
    "random-heads": ("random", 1000, 1000, 8, 2, 128, 128, BF16, True, 8, "contiguous"),
    "random-kv-heads": ("random", 700, 900, 8, 2, 64, 128, F16, False, 2, "contiguous"),
    "random-64-keys": ("random", 1000, 1000, 6, 6, 128, 64, BF16, False, 6, "contiguous"),
    "random-64-keys-causal": ("random", 1000, 1000, 6, 6, 64, 64, F16, True, 1, "contiguous"),
    "empty-rows": ("empty_rows", 640, 640, 4, 4, 128, 128, BF16, False, 4, "contiguous"),
    "blhd": ("random", 640, 640, 4, 2, 128, 128, BF16, True, 4, "blhd"),
    "long-lists": ("full", 256, 9000, 2, 1, 64, 64, BF16, True, 1, "contiguous"),
    "many-items": ("random", 4096, 4096, 16, 16, 64, 128, BF16, True, 16, "contiguous"),
    "random-16-keys": ("random", 700, 900, 4, 2, 128, 16, BF16, True, 4, "contiguous"),
    "random-32-keys": ("random", 1000, 1000, 4, 2, 64, 32, F16, True, 2, "blhd"),
    "random-48-keys": ("random", 500, 1001, 2, 2, 128, 48, BF16, False, 1, "contiguous"),
    "random-256-keys": ("random", 1000, 1300, 4, 4, 128, 256, BF16, True, 4, "contiguous"),
    "empty-rows-16-keys": ("empty_rows", 640, 640, 4, 4, 128, 16, BF16, True, 4, "contiguous"),
    "d256-full": ("full", 900, 900, 4, 2, 256, 128, BF16, False, 1, "contiguous"),
    "d256-causal": ("full", 1000, 1000, 4, 1, 256, 128, F16, True, 1, "blhd"),
    "d256-chunk": ("full", 513, 1300, 4, 1, 256, 128, BF16, True, 1, "contiguous"),
    "d256-blind-rows": ("full", 300, 130, 2, 2, 256, 64, BF16, True, 1, "contiguous"),
    "d256-random": ("random", 1000, 1000, 8, 2, 256, 128, BF16, True, 8, "contiguous"),
    "d256-random-64-keys": ("random", 700, 1000, 4, 4, 256, 64, F16, False, 4, "contiguous"),
    "d256-random-32-keys": ("random", 700, 1000, 4, 4, 256, 32, BF16, True, 1, "contiguous"),
    "d256-empty-rows": ("empty_rows", 640, 640, 4, 4, 256, 128, BF16, False, 4, "contiguous"),
    "d256-many-items": ("random", 3000, 3000, 16, 8, 256, 128, BF16, True, 16, "contiguous"),
}


@needs_hopper
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_against_masked_attention(name, batch):
    kind, L, S, heads, kv_heads, D, block_n, dtype, causal, layout_heads, strides = CASES[name]
    if batch == 2 and L > 2000:
        pytest.skip("once is enough for the large case")
    q, k, v = make_inputs(
        batch=batch, heads=heads, kv_heads=kv_heads, L=L, S=S, head_dim=D, dtype=dtype, strides=strides,
        device="cuda",
    )  # fmt: skip
    layout = random_layout(kind, L, S, block_m=128, block_n=block_n, heads=layout_heads, device="cuda")
    check_engine(q, k, v, Plan(layout), engine="hopper", is_causal=causal)


@needs_hopper
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("L", "S", "dtype"),
    [(1000, 1000, BF16), (1153, 1300, F16), (1000, 300, BF16), (1060, 1124, BF16), (1152, 1152, BF16)],
    ids=["even", "chunk", "blind-rows", "two-of-three", "whole"],
)
def test_tiles_of_192_queries(L, S, dtype, causal):
    """Of a full layout at head size 64, where there are many."""
    q, k, v = make_inputs(batch=2, heads=48, kv_heads=12, L=L, S=S, head_dim=64, dtype=dtype, device="cuda")
    layout = SparseLayout.full(L, S, device="cuda")
    call = AttendCall(q, k, v, layout, None, causal, 0.125)
    assert ENGINES["hopper"].schedule(call).merged is not None
    check_engine(q, k, v, Plan(layout), engine="hopper", is_causal=causal)


@needs_hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("block_m", [64, 128])
def test_many_short_items_over_and_over(block_m, D):
    """Where a warp runs ahead of its warpgroup, or one of the other: a stage freed too soon hung here."""
    q, k, v = make_inputs(heads=96, kv_heads=96, L=1000, S=1000, head_dim=D, dtype=BF16, device="cuda")
    layouts = [
        SparseLayout.full(1000, 1000, block_m=block_m, device="cuda"),
        random_layout("random", 1000, 1000, block_m=block_m, block_n=64, heads=96, device="cuda"),
        random_layout("strided", 1000, 1000, block_m=block_m, block_n=64, heads=96, device="cuda"),
    ]
    for layout in layouts:
        first = sa.sparse_attention(q, k, v, layout, is_causal=True, engine="hopper")
        for _ in range(1000):
            again = sa.sparse_attention(q, k, v, layout, is_causal=True, engine="hopper")
        assert torch.equal(first, again)


# kind, L, S, query heads, key heads, D, key block, dtype, causal, layout heads
HALF_CASES = {
    "full": ("full", 512, 512, 2, 1, 128, 128, BF16, True, 1),
    "ragged": ("full", 333, 333, 2, 2, 64, 64, F16, True, 1),
    "one-query": ("full", 1, 257, 4, 1, 128, 128, BF16, True, 1),
    "blind-rows": ("full", 300, 130, 2, 2, 64, 64, BF16, True, 1),
    "strided": ("strided", 1500, 1500, 4, 4, 128, 64, BF16, True, 4),
    "random": ("random", 1000, 1000, 8, 2, 128, 64, BF16, False, 8),
    "random-causal": ("random", 1000, 1200, 8, 2, 64, 64, F16, True, 2),
    "random-128": ("random", 700, 1000, 4, 4, 128, 128, F16, True, 4),
    "empty-rows": ("empty_rows", 640, 640, 4, 4, 128, 64, BF16, False, 4),
    "many-items": ("strided", 4096, 4096, 16, 16, 128, 64, BF16, True, 16),
    "random-16-keys": ("random", 700, 900, 4, 2, 128, 16, BF16, True, 4),
    "random-32-keys": ("random", 1000, 1000, 4, 2, 64, 32, F16, False, 2),
    "strided-16": ("strided", 1500, 1500, 4, 4, 64, 16, BF16, True, 4),
    "d256-ragged": ("full", 333, 333, 2, 2, 256, 64, F16, True, 1),
    "d256-strided": ("strided", 1500, 1500, 4, 4, 256, 64, BF16, True, 4),
    "d256-random": ("random", 1000, 1000, 8, 2, 256, 128, BF16, False, 8),
    "d256-random-16-keys": ("random", 700, 900, 4, 2, 256, 16, BF16, True, 4),
    "d256-empty-rows": ("empty_rows", 640, 640, 4, 4, 256, 64, BF16, False, 4),
    "d256-many-items": ("random", 3000, 3000, 16, 16, 256, 64, BF16, True, 16),
}


@needs_hopper
@pytest.mark.parametrize("name", HALF_CASES)
def test_blocks_of_64_queries(name):
    kind, L, S, heads, kv_heads, D, block_n, dtype, causal, layout_heads = HALF_CASES[name]
    q, k, v = make_inputs(heads=heads, kv_heads=kv_heads, L=L, S=S, head_dim=D, dtype=dtype, device="cuda")
    layout = random_layout(kind, L, S, block_m=64, block_n=block_n, heads=layout_heads, device="cuda")
    check_engine(q, k, v, Plan(layout), engine="hopper", is_causal=causal)


@needs_hopper
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", ["full", "few-queries", "blind-rows", "random-128", "long"])
def test_skips_tile_for_tile(name, threshold, block_m):
    """The votes are replayed in float64: every tile that was skipped, and no other."""
    more = {
        "long": ("full", 2100, 2100, 4, 2, 128, 128, BF16, True, 1),
        "few-queries": ("full", 40, 257, 4, 1, 128, 128, BF16, True, 1),
    }
    kind, L, S, heads, kv_heads, D, _, dtype, causal, layout_heads = {**HALF_CASES, **more}[name]
    q, k, v = make_inputs(heads=heads, kv_heads=kv_heads, L=L, S=S, head_dim=D, dtype=dtype, device="cuda")
    q = q * 3  # peaked, so that there is something to skip
    layout = random_layout(kind, L, S, block_m=block_m, block_n=128, heads=layout_heads, device="cuda")
    limit = torch.full((1, heads), threshold, device="cuda").log()
    limit[:, ::2] -= 1.0  # heads differ
    check_engine(q, k, v, Plan(layout, limit), engine="hopper", is_causal=causal)


@needs_hopper
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["full", "random"])
def test_heads_that_skip_much_little_and_nothing(kind, head_dim, block_m):
    """More items than the card has blocks, so that each block goes from one rule to another."""
    heads, length = 12, 3000
    q, k, v = make_inputs(
        heads=heads, kv_heads=4, L=length, S=length, head_dim=head_dim, dtype=BF16, device="cuda"
    )
    layout = random_layout(kind, length, length, block_m=block_m, block_n=128, heads=1, device="cuda")
    limit = torch.tensor([0.0, 1e-3, 0.3, 1.0] * 3, device="cuda").log()[None]
    check_engine(q * 3, k, v, Plan(layout, limit), engine="hopper", is_causal=True)


# Logits that all keys of a block of 128 get on top of their own: maxima are looked for among integers, which
# order floats below zero the other way round.
LEVELS = {
    "below": lambda n: torch.full((n,), -12.0),
    "rising": lambda n: torch.linspace(-20, 10, n),
    "falling": lambda n: torch.linspace(10, -20, n),
    "to-zero": lambda n: torch.linspace(-14, 0, n),
    "swinging": lambda n: 14 * torch.sin(torch.arange(n) * 2.0) - 6,
}


def at_levels(q, k, levels):
    """The same inputs with logits moved by what `levels` says of each block of 128 keys. In quarters, so that
    scores are exact: what a tensor core's sums leave out grows with them, and would show in the lse."""
    q, k = (q * 4).round() / 4, (k * 4).round() / 4
    blocks = levels(-(-k.shape[2] // 128)).to(k.device)
    q[..., 0] = 8
    quarters = (blocks / 8 * q.shape[-1] ** 0.5 * 4).round() / 4
    k[..., 0] = quarters.repeat_interleave(128)[: k.shape[2]].to(k.dtype)
    return q, k


@needs_hopper
@pytest.mark.parametrize("threshold", [None, 0.01, 0.5])
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("levels", LEVELS)
def test_scores_of_either_sign(levels, head_dim, block_m, threshold):
    q, k, v = make_inputs(heads=4, kv_heads=2, L=1000, S=1500, head_dim=head_dim, dtype=BF16, device="cuda")
    q, k = at_levels(q, k, LEVELS[levels])
    layout = random_layout("random", 1000, 1500, block_m=block_m, block_n=128, heads=4, device="cuda")
    limit = None if threshold is None else torch.full((1, 4), threshold, device="cuda").log()
    check_engine(q, k, v, Plan(layout, limit), engine="hopper", is_causal=True)


@needs_hopper
@pytest.mark.parametrize("levels", LEVELS)
def test_scores_of_either_sign_in_tiles_of_192(levels):
    q, k, v = make_inputs(
        batch=2, heads=48, kv_heads=12, L=1000, S=1100, head_dim=64, dtype=F16, device="cuda"
    )
    q, k = at_levels(q, k, LEVELS[levels])
    check_engine(q, k, v, Plan(SparseLayout.full(1000, 1100, device="cuda")), engine="hopper", is_causal=True)


@needs_hopper
@pytest.mark.parametrize("block_m", [64, 128])
def test_lambda_zero_is_dense_bit_for_bit(block_m):
    q, k, v = make_inputs(heads=4, kv_heads=2, L=1111, S=1111, head_dim=128, dtype=BF16, device="cuda")
    layout = SparseLayout.full(1111, 1111, block_m=block_m, device="cuda")
    options = {"is_causal": True, "enable_gqa": True, "engine": "hopper"}
    dense = sa.attend(q, k, v, Plan(layout), **options)
    never = sa.attend(q, k, v, Plan(layout, torch.full((1, 4), -torch.inf, device="cuda")), **options)
    assert torch.equal(dense.out, never.out) and torch.equal(dense.lse, never.lse)


@needs_hopper
def test_a_full_layout_of_odd_blocks():
    q, k, v = make_inputs(heads=4, kv_heads=2, L=500, S=700, head_dim=128, dtype=BF16, device="cuda")
    layout = SparseLayout.full(500, 700, block_m=40, block_n=56, device="cuda")
    check_engine(q, k, v, Plan(layout), engine="hopper", is_causal=True)


@needs_hopper
def test_it_repeats_its_bits():
    q, k, v = make_inputs(heads=4, kv_heads=4, L=700, S=700, head_dim=128, dtype=BF16, device="cuda")
    layout = random_layout("random", 700, 700, block_m=128, block_n=128, heads=4, device="cuda")
    outs = [sa.sparse_attention(q, k, v, layout, engine=name) for name in ("hopper",) * 3]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])


@needs_hopper
def test_cuda_graph():
    q, k, v = make_inputs(heads=4, kv_heads=2, L=512, S=512, head_dim=128, dtype=BF16, device="cuda")
    layout = SparseLayout.full(512, 512, device="cuda")
    args = dict(is_causal=True, enable_gqa=True, engine="hopper")
    expected = sa.sparse_attention(q, k, v, layout, **args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sa.sparse_attention(q, k, v, layout, **args)
    out.zero_()
    for _ in range(3):  # the work counter must start at zero in every replay
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_refusals_are_named():
    q, k, v = make_inputs(heads=2, kv_heads=2, L=64, S=64, head_dim=32)
    layout = random_layout("columns", 64, 64, block_m=32, block_n=32)
    skip = torch.zeros(1, 2)
    call = AttendCall(q, k, v, layout, skip, False, -1.0, needs_grad=True)
    text = "\n".join(ENGINES["hopper"].why_not(call))
    for word in ("CUDA tensors", "float32", "head_dim 64, 128 and 256", "backward", "scale"):
        assert word in text, word


@pytest.mark.parametrize(
    ("D", "block_m", "block_n", "skips", "words"),
    [
        (128, 32, 32, False, ["64 or 128 queries", "32x32"]),
        (128, 64, 40, False, ["a multiple of 16 keys", "64x40"]),
        (128, 64, 64, True, ["skip takes", "64x64"]),
        (256, 128, 128, True, ["skip takes", "256 and 128x128"]),
    ],
)
def test_refused_layouts_are_named(D, block_m, block_n, skips, words):
    q = torch.zeros(1, 1, 300, D)
    layout = random_layout("random", 300, 300, block_m=block_m, block_n=block_n)
    call = AttendCall(q, q, q, layout, torch.zeros(1, 1) if skips else None, False, 1.0)
    text = "\n".join(ENGINES["hopper"].why_not(call))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("D", "block_m", "block_n", "skips", "is_refused"),
    [
        (128, 64, 64, False, True), (128, 128, 32, False, True), (256, 128, 64, False, True),
        (128, 128, 128, True, True), (128, 128, 64, False, False), (64, 128, 128, False, False),
    ],
)  # fmt: skip
def test_refused_columns_are_named(D, block_m, block_n, skips, is_refused):
    q = torch.zeros(1, 1, 300, D)
    layout = random_layout("columns", 300, 300, block_m=block_m, block_n=block_n)
    skip = torch.zeros(1, 1) if skips else None
    reasons = ENGINES["hopper"].why_not(AttendCall(q, q, q, layout, skip, False, 1.0))
    assert any("column lists" in x for x in reasons) == is_refused, reasons
