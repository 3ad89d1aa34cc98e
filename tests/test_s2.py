"""S2-Attention: the selector against its literal reference, the operator against masked attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_bytes import PeakBytes
from references import s2 as reference
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_attn as sa
from sparse_attn.methods import METHODS, Context, per_head
from sparse_attn.methods.per_head import LayoutLru
from sparse_attn.methods.s2 import S2Config, s2_layout
from sparse_attn.methods.s2_report import is_kv_cache_efficient
from sparse_attn.testing import assert_close, make_inputs, masked_attention, plain_gradients

# The worked example of 8 blocks: 4 heads, window of 2, stride 4, offset 1.
WORKED = """
#....... #....... #....... #.......
##...... ##...... ##...... ##......
.##..... .##..... .##..... ###.....
..##.... ..##.... .###.... #.##....
...##... ..###... .#.##... #..##...
...###.. ..#.##.. .#..##.. #...##..
...#.##. ..#..##. .#...##. #...###.
...#..## ..#...## .#...### #...#.##
"""


def layout_mask(config, L, S, num_heads, num_kv_heads=None, is_causal=True, **more):
    """bool [pattern heads of the call, Lb, Sb] from the selector, one row of heads for every pattern."""
    kv_heads = num_kv_heads or num_heads
    layout = s2_layout(
        config, L, S, num_heads=num_heads, num_kv_heads=kv_heads, is_causal=is_causal, **more
    ).check()
    heads = num_heads if config.per_query_head else kv_heads
    assert layout.heads in (1, heads)
    return layout.block_mask()[0].expand(heads, -1, -1)


def reference_mask(config, L, S, num_heads, num_kv_heads=None, is_causal=True):
    shifts = reference.shift_rule(config, num_heads, num_kv_heads or num_heads)
    return torch.tensor([reference.block_mask(config, x, L, S, is_causal) for x in shifts])


# -- the pattern ----------------------------------------------------------------------------------


def test_worked_example_of_eight_blocks():
    rows = WORKED.split()
    expected = ["\n".join(rows[h::4]) for h in range(4)]
    config = S2Config(block_size=16, local_blocks=2, vert_stride=4, shift_offset=1)
    layout = s2_layout(config, 128, 128, num_heads=4)
    assert [layout.draw(head=h, is_causal=True) for h in range(4)] == expected
    q = torch.zeros(1, 4, 128, 16)
    plan = METHODS["s2"].select(q, q, config, is_causal=True, scale=1.0, context=Context())
    assert plan.layout is layout and plan.skip_below is None


configs = st.builds(
    S2Config,
    block_size=st.sampled_from([1, 3, 4, 8]),
    local_blocks=st.integers(1, 4),
    vert_stride=st.integers(1, 6),
    sink_blocks=st.integers(0, 3),
    num_dense_heads=st.integers(0, 1),
    head_shift=st.sampled_from([None, 0, 1, 3, -1, "dkernel"]),
    shift_offset=st.integers(-3, 3),
    per_query_head=st.booleans(),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    config=configs, L=st.integers(1, 40), S=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (8, 1), (6, 3)]), is_causal=st.booleans(),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
def test_layout_equals_the_literal_pattern(config, L, S, heads, is_causal):
    got = layout_mask(config, L, S, *heads, is_causal=is_causal)
    assert torch.equal(got, reference_mask(config, L, S, *heads, is_causal=is_causal))


@pytest.mark.parametrize("L,S", [(37, 37), (16, 37 + 3), (1, 39), (5, 5 + 32), (40, 40 - 16)])
def test_aligned_layout_is_the_definition_to_the_token(L, S):
    config = S2Config(8, local_blocks=2, vert_stride=3, sink_blocks=1)
    assert L == 1 or (S - L) % 8 == 0
    dense = s2_layout(config, L, S, num_heads=3).to_dense(is_causal=True)[0]
    expected = [reference.token_mask(config, x, L, S, True) for x in reference.shift_rule(config, 3, 3)]
    assert torch.equal(dense, torch.tensor(expected))


def test_a_chunk_that_straddles_blocks_loses_nothing_and_adds_one_block_at_most():
    config, L, S = S2Config(8, local_blocks=2, vert_stride=4), 20, 51
    shifts = reference.shift_rule(config, 4, 4)
    got = s2_layout(config, L, S, num_heads=4).to_dense(is_causal=True)[0]
    exact = torch.tensor([reference.token_mask(config, x, L, S, True) for x in shifts])
    assert not (exact & ~got).any()
    assert 0 < (got & ~exact).sum(-1).max() <= 8
    assert not (got & ~exact)[:, 0].any(), "the first query of a block decides where its window begins"


def test_chunked_prefill_equals_whole_prefill():
    config = S2Config(8, local_blocks=2, vert_stride=3)
    whole = s2_layout(config, 64, 64, num_heads=3).to_dense(is_causal=True)
    for start in (0, 16, 40):
        part = s2_layout(config, 16, start + 16, num_heads=3).to_dense(is_causal=True)
        assert torch.equal(part, whole[:, :, start : start + 16, : start + 16])


def test_shifts_spread_over_the_stride_when_heads_are_few():
    assert S2Config(vert_stride=8).shifts(3) == [0, 2, 5]
    assert S2Config(vert_stride=8, head_shift="dkernel").shifts(3) == [0, 2, 4]
    assert S2Config(vert_stride=8).shifts(12) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert S2Config(vert_stride=8, shift_offset=1, num_dense_heads=1).shifts(8, 4) == [1, 3, 5, None]
    assert S2Config(vert_stride=4, per_query_head=True, num_dense_heads=1).shifts(4, 2) == [0, 1, None, None]
    assert S2Config(vert_stride=4, head_shift=(3, 3, 9)).shifts(3) == [3, 3, 1]


@pytest.mark.parametrize("per_query_head", [False, True], ids=["by_key_head", "by_query_head"])
def test_ranks_see_the_patterns_of_their_global_heads(per_query_head):
    config = S2Config(8, 1, 4, num_dense_heads=1, per_query_head=per_query_head, num_heads=8, num_kv_heads=4)
    whole = layout_mask(config, 80, 80, 8, 4)
    per_rank = 4 if per_query_head else 2
    for rank in range(2):
        part = layout_mask(config, 80, 80, 4, 2, head_offset=4 * rank)
        assert torch.equal(part, whole[rank * per_rank : (rank + 1) * per_rank])
    # More ranks than key heads: two ranks hold one key head each, the same one.
    halves = [layout_mask(config, 80, 80, 1, 1, head_offset=n) for n in (2, 3)]
    expected = whole[2:4] if per_query_head else whole[1:2].expand(2, -1, -1)
    assert torch.equal(torch.cat(halves), expected)


def test_heads_collapse_where_all_patterns_agree():
    assert s2_layout(S2Config(8, head_shift=0), 64, 64, num_heads=4).heads == 1
    full = s2_layout(S2Config(8, vert_stride=1), 64, 64, num_heads=4)
    assert full.heads == 1 and full.density(is_causal=True) == 1
    assert s2_layout(S2Config(8, 1, 2), 64, 64, num_heads=8, num_kv_heads=2).heads == 2


# -- memory and cache -----------------------------------------------------------------------------


def test_long_context_needs_little_more_than_the_layout():
    from sparse_attn.methods.s2 import _build

    config, S = S2Config(), 131072
    with PeakBytes() as memory:
        layout = _build((64, 16, 8, 0), S, S, config.shifts(32), True, True, device=torch.device("cpu"))
    size = layout.blocks.indices.nbytes + layout.blocks.offsets.nbytes
    # A mask of this size would be 134 MB, a padded index list 537 MB.
    assert memory.peak > size > 30e6
    assert memory.peak - size < 160e6


def test_layouts_are_cached_and_usable_for_training_after_inference():
    config, q = S2Config(4, 1, 3), torch.randn(1, 3, 21, 8)
    args = {"block_size": 4, "local_blocks": 1, "vert_stride": 3}
    with torch.inference_mode():
        sa.s2_attention(q, q, q, **args)
    layout = s2_layout(config, 21, 21, num_heads=3)
    assert layout is s2_layout(config, 21, 21, num_heads=3)
    assert layout is not s2_layout(config, 21, 22, num_heads=3)
    x = q.clone().requires_grad_()
    sa.s2_attention(x, x, x, **args).sum().backward()
    assert x.grad.isfinite().all()


def test_cache_is_bounded_by_bytes_and_forgets_the_oldest():
    def make(n):
        return lambda: sa.SparseLayout.full(16 * n, 16, block_m=16, block_n=16)

    cache = LayoutLru(max_bytes=200)  # n blocks: 8 * (n + 1) + 4 * n bytes
    first = cache.get("a", make(4))
    assert cache.get("a", make(4)) is first
    cache.get("b", make(4))
    assert cache.get("a", make(4)) is first
    cache.get("c", make(4))
    cache.get("d", make(4))
    assert len(cache) == 3
    assert cache.get("a", make(4)) is first, "used last, so it stays"
    cache.get("large", make(100))
    assert len(cache) == 1
    cache.clear()
    assert len(cache) == 0


def test_cache_counts_what_engines_derive_and_caps_the_number_of_layouts(monkeypatch):
    cache = LayoutLru(max_bytes=1000)
    small = cache.get("small", lambda: sa.SparseLayout.full(64, 16, block_m=16, block_n=16))
    small._cache["derived"] = torch.zeros(1000, dtype=torch.uint8)
    cache.get("next", lambda: sa.SparseLayout.full(64, 16, block_m=16, block_n=16))
    assert len(cache) == 1
    monkeypatch.setattr(per_head, "MAX_LAYOUTS", 3)
    for n in range(5):
        cache.get(n, lambda: sa.SparseLayout.full(16, 16, block_m=16, block_n=16))
    assert len(cache) == 3


# -- the report -----------------------------------------------------------------------------------


def test_validate_gives_the_known_numbers_of_phi3_small():
    config = S2Config(head_shift=1, shift_offset=1, per_query_head=True)
    report = config.validate(32, 8, 8192)
    assert report.union_complete and report.kv_cache_efficient
    assert report.kv_kept == pytest.approx(72 / 128) and max(report.kept_per_head) == 30 / 128
    assert config.validate(32, 8, 131072).kv_kept == pytest.approx(0.504, abs=5e-4)
    shared = S2Config(shift_offset=1).validate(32, 8, 8192)
    assert shared.kv_kept == pytest.approx(30 / 128)
    assert "56.2%" in str(report) and "covers every key  yes" in str(report)


def test_validate_density_is_what_the_layout_attends():
    config = S2Config(8, 2, 4, sink_blocks=1, num_dense_heads=1)
    report = config.validate(6, 3, 100)
    layout = s2_layout(config, 100, 100, num_heads=6, num_kv_heads=3)
    shares = layout.density(is_causal=True, per_head=True)[0].tolist()
    assert report.density_per_head == pytest.approx([x for x in shares for _ in range(2)])
    assert report.density_per_head[-1] == 1 and report.kept_per_kv_head[-1] == 1
    last = layout.to_dense(is_causal=True)[0, :, -1].double().mean(-1)
    assert report.kept_per_kv_head == pytest.approx(last.tolist())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(config=configs, length=st.integers(1, 60), heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]))
def test_validate_union_is_what_the_masks_cover(config, length, heads):
    for is_causal in (True, False):
        report = config.validate(*heads, length, is_causal=is_causal)
        union = reference_mask(config, length, length, *heads, is_causal=is_causal).any(0)
        missing = set((~union).any(0).nonzero().flatten().tolist()) if not is_causal else set()
        if is_causal:
            missing = {j for i in range(len(union)) for j in range(i + 1) if not union[i, j]}
        assert set(report.missing_residues) == {j % config.vert_stride for j in missing}
        assert report.kv_cache_efficient == is_causal


def test_incomplete_union_is_named_and_warned_about():
    config = S2Config(4, 1, 8)
    report = config.validate(4, 4, 4 * 40)
    assert report.missing_residues == (1, 3, 5, 7) and not report.union_complete
    assert "NO: blocks j with j mod 8 in [1, 3, 5, 7] are lost" in str(report)
    with pytest.warns(UserWarning, match=r"mod 8 in \[1, 3, 5, 7\]"):
        s2_layout(config, 161, 161, num_heads=4)


def test_kv_cache_efficiency_finds_a_block_that_comes_back():
    keeps = torch.eye(6, dtype=torch.bool)
    keeps[:, 0] = True
    layout = sa.SparseLayout.from_dense_mask(keeps[None, None], block_m=4, block_n=4, L=24, S=24)
    assert is_kv_cache_efficient(layout)
    keeps[4, 2] = True  # row 3 did not read block 2
    layout = sa.SparseLayout.from_dense_mask(keeps[None, None], block_m=4, block_n=4, L=24, S=24)
    assert not is_kv_cache_efficient(layout)
    with pytest.raises(ValueError, match="L == S"):
        is_kv_cache_efficient(sa.SparseLayout.full(8, 16, block_m=4, block_n=4))


# -- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "heads,kv_heads,L,S,per_query_head",
    [(4, 4, 63, 63, False), (6, 2, 40, 127, False), (4, 1, 127, 127, True), (8, 2, 1, 127, False),
     (3, 3, 100, 30, False)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator_equals_masked_attention(heads, kv_heads, L, S, per_query_head, is_causal, dtype):
    q, k, v = make_inputs(
        heads=heads, kv_heads=kv_heads, L=L, S=S, head_dim=32, value_dim=16, dtype=dtype, strides="blhd"
    )
    config = S2Config(16, 2, 3, sink_blocks=1, per_query_head=per_query_head, num_heads=heads)
    out, lse = sa.s2_attention(
        q, k, v, block_size=16, local_blocks=2, vert_stride=3, sink_blocks=1, per_query_head=per_query_head,
        num_heads=heads, is_causal=is_causal, enable_gqa=heads != kv_heads, return_lse=True,
        engine="reference",
    )  # fmt: skip
    layout = s2_layout(config, L, S, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
    shifts = reference.shift_rule(config, heads, kv_heads)
    blocks = torch.tensor([reference.block_mask(config, x, L, S, is_causal) for x in shifts])
    mask = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[None, :, :L, :S]
    if is_causal:
        mask = mask & (torch.arange(S) <= torch.arange(L)[:, None] + S - L)
    assert torch.equal(layout.to_dense(is_causal).expand_as(mask), mask)
    truth = masked_attention(q, k, v, mask)
    assert_close(out, truth[0], masked_attention(q, k, v, mask, dtype=dtype)[0], "out")
    assert_close(lse, truth[1], masked_attention(q, k, v, mask, dtype=torch.float32)[1], "lse")


def test_gradients_through_gqa_equal_those_of_masked_sdpa():
    q, k, v = make_inputs(batch=2, heads=6, kv_heads=2, L=50, S=70, head_dim=16, requires_grad=True)
    config = S2Config(8, 2, 4, num_dense_heads=1, num_heads=6)
    out = sa.s2_attention(
        q, k, v, block_size=8, local_blocks=2, vert_stride=4, num_dense_heads=1, num_heads=6, enable_gqa=True,
        engine="reference",
    )  # fmt: skip
    layout = s2_layout(config, 50, 70, num_heads=6, num_kv_heads=2)
    mask = layout.to_dense(is_causal=True)
    assert 0.2 < mask.float().mean() < 0.9
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out, (q, k, v), grad_out)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *exact, attn_mask=mask.repeat_interleave(3, 1), enable_gqa=True
    )
    truth = torch.autograd.grad(sdpa, exact, grad_out.double())
    plain = plain_gradients((q, k, v), mask, grad_out, torch.zeros(2, 6, 50), dtype=torch.float32)
    for name, x, ref, base in zip(("dq", "dk", "dv"), found, truth, plain, strict=True):
        assert_close(x, ref, base, name)


def test_stride_one_is_dense():
    q, k, v = make_inputs(heads=2, L=63, head_dim=16)
    dense = sa.sparse_attention(q, k, v, sa.SparseLayout.full(63, 63, block_m=8, block_n=8), is_causal=True)
    assert torch.equal(sa.s2_attention(q, k, v, block_size=8, local_blocks=1, vert_stride=1), dense)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args,message",
    [
        ({"block_size": 0}, "block_size is 0; it must be an integer of at least 1"),
        ({"local_blocks": 0}, "local_blocks is 0"),
        ({"vert_stride": 2.5}, "vert_stride is 2.5"),
        ({"vert_stride": True}, "vert_stride is True"),
        ({"sink_blocks": -1, "num_dense_heads": -2}, "sink_blocks is -1.*num_dense_heads is -2"),
        ({"head_shift": "even"}, "head_shift is 'even'"),
        ({"head_shift": (1, 2)}, "head_shift has 2 shifts; expected 4"),
        ({"shift_offset": 0.5}, "shift_offset is 0.5"),
        ({"num_dense_heads": 5}, "num_dense_heads is 5, but there are only 4 key heads"),
        ({"head_offset": 4}, "head_offset is 4 but num_heads is not given; pass num_heads"),
        ({"head_offset": 6, "num_heads": 8}, "query heads 6..9 do not lie within num_heads=8"),
        ({"head_offset": -1, "num_heads": 8}, "query heads -1..2 do not lie within num_heads=8"),
        ({"num_heads": 8, "num_kv_heads": 3}, "8 query heads are not a multiple of 3"),
        ({"engine": "fast"}, "unknown engine"),
    ],
)
def test_bad_arguments_raise_one_clear_error(args, message):
    q = torch.randn(1, 4, 32, 16)
    with pytest.raises(ValueError, match=message):
        sa.s2_attention(q, q, q, **args)


def test_ranks_that_split_key_heads_unevenly_are_refused():
    q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16)
    with pytest.raises(ValueError, match=r"groups of 2 query heads from head_offset=1 on do not lie within"):
        sa.s2_attention(q, k, k, enable_gqa=True, num_heads=8, head_offset=1)


def test_gqa_without_leave_and_wrong_rank_are_refused():
    q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16)
    with pytest.raises(
        ValueError, match="s2_attention: query has 4 heads but key has 2; pass enable_gqa=True"
    ):
        sa.s2_attention(q, k, k)
    with pytest.raises(ValueError, match="s2_attention: query has 3 dimensions"):
        sa.s2_attention(q[0], q, q)
    with pytest.raises(ValueError, match="length is 0"):
        S2Config().validate(4, 4, 0)


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.plain_empty
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_compiles_into_one_graph_with_its_layout(grad):
    args = {"block_size": 8, "local_blocks": 2, "vert_stride": 3, "engine": "reference", "enable_gqa": True}

    def call(q, k, v):
        return sa.s2_attention(q, k, v, **args) * 2

    q, k, v = make_inputs(heads=6, kv_heads=3, L=40, S=64, head_dim=16, requires_grad=grad)
    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    expected = call(q, k, v)
    assert torch.equal(out, expected)
    if grad:
        grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.plain_empty
def test_layout_operator_tells_its_shapes_and_gives_copies():
    from sparse_attn.methods.per_head import _constants, shape_layout

    args, cpu = ((8, 2, 3, 0), 40, 64, (0, 1, 2), True, True), torch.device("cpu")
    _, sizes, text = _constants("s2", args)
    op = torch.ops.sparse_attn.layout_lists.default
    torch.library.opcheck(op, ("s2", text, sizes, True, cpu), test_utils=("test_schema", "test_faketensor"))
    layout = shape_layout("s2", args, cpu, True)
    offsets, indices, bounds, *columns = op("s2", text, sizes, True, cpu)
    assert torch.equal(offsets, layout.blocks.offsets) and torch.equal(bounds, layout.block_bounds(True))
    indices.fill_(0)
    assert layout.blocks.indices.sum() > 0 and all(x.numel() == 0 for x in columns)


class _Layer(torch.nn.Module):
    def forward(self, x):
        return sa.s2_attention(x, x, x, block_size=8, local_blocks=2, vert_stride=2, engine="reference")


@pytest.mark.plain_empty
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_exports_also_where_the_layout_is_new(strict):
    x = make_inputs(heads=2, L=41 + strict, head_dim=16)[0]
    exported = torch.export.export(_Layer(), (x,), strict=strict)
    assert torch.equal(exported.module()(x), _Layer()(x))


@pytest.mark.plain_empty
def test_fake_tensors_leave_the_cache_real():
    x = make_inputs(heads=2, L=47, head_dim=16)[0]
    with FakeTensorMode():
        assert _Layer()(torch.empty(1, 2, 47, 16)).shape == x.shape
    assert _Layer()(x).isfinite().all()
