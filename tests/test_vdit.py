"""Sparse-vDiT: patterns against their literal reference, the operator against masked attention."""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_bytes import PeakBytes
from references import vdit as reference

import sparse_attn as sa
from sparse_attn.methods import METHODS
from sparse_attn.methods.vdit import VDiTConfig, diagonal_width, vdit_densities, vdit_layout
from sparse_attn.methods.vdit_patterns import (
    Diagonal,
    Full,
    MultiDiagonal,
    Skip,
    Union,
    VerticalStripe,
    parse_pattern,
)
from sparse_attn.testing import assert_close, make_inputs, masked_attention, plain_gradients

ALL_KINDS = [
    "full", "skip", "diagonal:0.5", "multi_diagonal:3t,stride=2", "vertical_stripe:first_frame",
    "vertical_stripe:5,single", "diagonal:4t + vertical_stripe:columns=0/33",
]  # fmt: skip


def expected_layout(config):
    """The reference's masks: blocks bool [H, Lb, Sb], columns bool [H, Lb, S]."""
    pairs = [reference.head_masks(x, config) for x in config.patterns]
    S = config.tokens.S
    singles = [[[k in row for k in range(S)] for row in rows] for _, rows in pairs]
    return torch.tensor([blocks for blocks, _ in pairs]), torch.tensor(singles)


def check_layout(config):
    layout = vdit_layout(config).check()
    blocks, columns = expected_layout(config)
    assert torch.equal(layout.block_mask()[0].expand_as(blocks), blocks)
    found = layout.column_mask()
    assert (found is None) == (not any("single" in str(x) for x in config.patterns))
    if found is not None:
        assert torch.equal(found[0].expand_as(columns), columns)
    return layout


# -- the patterns ---------------------------------------------------------------------------------

lags = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)
width = st.one_of(
    st.tuples(st.floats(0.01, 3), st.just("frames")), st.tuples(st.integers(1, 20), st.just("tokens"))
)
banded = st.one_of(
    width.map(lambda x: Diagonal(*x)),
    st.builds(
        lambda w, stride, last: MultiDiagonal(*w, stride=stride, max_lag=last),
        width, st.integers(1, 3), st.one_of(st.none(), st.integers(0, 3)),
    ),
    st.builds(lambda w, numbers: MultiDiagonal(*w, lags=numbers), width, lags),
)  # fmt: skip
stripes = st.builds(
    VerticalStripe,
    columns=st.one_of(st.just("first_frame"), st.integers(1, 9), st.just((0,)), st.just((1, 0))),
    single=st.booleans(),
)
some_pattern = st.one_of(
    st.just(Full()), st.just(Skip()), banded, stripes,
    st.lists(st.one_of(banded, stripes), min_size=2, max_size=3).map(lambda x: Union(tuple(x))),
)  # fmt: skip


@st.composite
def some_config(draw):
    text_len, text_first = draw(st.integers(0, 9)), draw(st.booleans())
    valid = None if text_first else draw(st.one_of(st.none(), st.integers(0, text_len)))
    grid = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    if grid == (1, 1, 1):
        grid = (2, 1, 1)  # column 1 must exist
    patterns = draw(st.lists(some_pattern, min_size=1, max_size=3))
    size = draw(st.sampled_from([1, 2, 5, 8, 16, 128]))
    return VDiTConfig(tuple(patterns), grid, text_len, text_first, valid, size)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(config=some_config())
def test_layout_equals_the_literal_patterns(config):
    check_layout(config)


@pytest.mark.parametrize("text_first", [False, True], ids=["text_last", "text_first"])
@pytest.mark.parametrize("text_len", [0, 5, 16, 23])
@pytest.mark.parametrize("grid", [(5, 3, 4), (2, 7, 5), (1, 6, 6)], ids=str)
def test_ragged_shapes_and_frame_edges_inside_blocks(grid, text_len, text_first):
    patterns = [x.replace("0/33", "0/31") for x in ALL_KINDS]
    layout = check_layout(VDiTConfig(patterns, grid, text_len, text_first, block_size=16))
    text_blocks = expected_layout(
        VDiTConfig("vertical_stripe:1,single", grid, text_len, text_first, None, 16)
    )
    assert text_blocks[0].any() == (text_len > 0), "without text a single-key stripe reads no block"
    assert layout.heads == len(patterns)


def test_a_band_worked_by_hand():
    """3 frames of 4 tokens, blocks of 2: a band of half-width 1 is the diagonal itself."""
    config = VDiTConfig(
        ("multi_diagonal:1t", "multi_diagonal:1t,stride=2", "diagonal:2t"), (3, 2, 2), block_size=2
    )
    rows = [vdit_layout(config).draw(head=h).split("\n") for h in range(3)]
    assert rows[0] == ["#.#.#.", ".#.#.#", "#.#.#.", ".#.#.#", "#.#.#.", ".#.#.#"]
    assert rows[1] == ["#...#.", ".#...#", "..#...", "...#..", "#...#.", ".#...#"]
    assert rows[2] == ["##....", "###...", ".###..", "..###.", "...###", "....##"]


def test_text_is_dense_both_ways_and_skip_ignores_it():
    config = VDiTConfig(("diagonal:1t", "skip"), (4, 2, 2), text_len=4, text_first=True, block_size=4)
    layout = vdit_layout(config)
    assert layout.draw(head=0).split("\n") == ["#####", "##...", "#.#..", "#..#.", "#...#"]
    assert layout.draw(head=1).split("\n") == ["....."] * 5
    assert vdit_densities(config) == [13 / 25, 0]


def test_padded_text_is_never_a_key():
    config = VDiTConfig(("diagonal:0.5",), (2, 3, 3), text_len=10, text_valid=3, block_size=8)
    layout = check_layout(config)
    assert (layout.L, layout.S) == (28, 21)


def test_equal_patterns_share_one_head_and_the_cache():
    one = VDiTConfig("diagonal:0.5", (2, 3, 3))
    assert vdit_layout(VDiTConfig(("diagonal:0.5",) * 4, (2, 3, 3))) is vdit_layout(one)
    assert vdit_layout(one).heads == 1
    assert vdit_densities(VDiTConfig(("diagonal:0.5",) * 4, (2, 3, 3))) == vdit_densities(one) * 4
    assert vdit_layout(one) is not vdit_layout(VDiTConfig("diagonal:0.5", (2, 3, 3), text_len=1))


def test_diagonal_width_gives_the_density_asked_for():
    grid, text = (33, 45, 80), 256
    frames = diagonal_width(0.25, 33, 3600, text)
    assert frames == pytest.approx(4.3487, abs=1e-4)
    (density,) = vdit_densities(VDiTConfig(Diagonal(frames), grid, text))
    assert density == pytest.approx(0.25, abs=0.003)  # blocks of 128 round the edges outward
    with pytest.raises(ValueError, match=r"must lie above 0\.0043"):
        diagonal_width(0.004, 33, 3600, text)


def test_a_real_model_needs_little_more_than_its_layout():
    from sparse_attn.methods.vdit import _build

    patterns = ["full"] * 4 + ["diagonal:4.35"] * 8 + ["multi_diagonal:0.05"] * 8 + ["skip"] * 2
    patterns += ["vertical_stripe:first_frame", "vertical_stripe:256,single"]
    config = VDiTConfig(patterns, (33, 45, 80), text_len=256)
    with PeakBytes() as memory:
        layout = _build(tuple(map(str, config.patterns)), astuple(config.tokens), device=torch.device("cpu"))
    lists = (layout.blocks.offsets, layout.blocks.indices, layout.columns.offsets, layout.columns.indices)
    size = sum(x.nbytes for x in lists)
    assert layout.heads == 24 and memory.peak > size > 2e7
    assert memory.peak - size < 130e6


# -- specifications -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pattern=some_pattern)
def test_strings_and_dicts_come_back_as_the_same_pattern(pattern):
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(json.loads(json.dumps(pattern.to_dict()))) == pattern
    assert hash(parse_pattern(str(pattern))) == hash(pattern)


@pytest.mark.parametrize(
    "text,pattern",
    [
        ("full", Full()),
        ("skip", Skip()),
        ("diagonal", Diagonal(1.0)),
        ("diagonal:0.5", Diagonal(0.5)),
        (" diagonal:192t ", Diagonal(192, "tokens")),
        ("multi_diagonal", MultiDiagonal(0.0625)),
        ("multi_diagonal:64t, stride=2, max_lag=8", MultiDiagonal(64, "tokens", 2, 8)),
        ("multi_diagonal:64t,lags=8/0/1", MultiDiagonal(64, "tokens", lags=(0, 1, 8))),
        ("vertical_stripe", VerticalStripe()),
        ("vertical_stripe:64,single", VerticalStripe(64, single=True)),
        ("vertical_stripe:columns=4/0", VerticalStripe((0, 4))),
        ("diagonal:2+vertical_stripe:first_frame", Union((Diagonal(2), VerticalStripe()))),
        ({"pattern": "multi_diagonal", "width": 0.1, "lags": [0, 2]}, MultiDiagonal(0.1, lags=(0, 2))),
    ],
    ids=str,
)
def test_documented_forms(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "spec,message",
    [
        ("diag:2", "unknown pattern 'diag' in 'diag:2'; choose one of full, skip, diagonal"),
        ("", "unknown pattern ''"),
        ("union", "union: nothing is not a union"),
        ("diagonal:x", "cannot read 'x' in pattern 'diagonal:x'"),
        ("diagonal:0.5,1", "cannot read '1'"),
        ("full:3", "cannot read '3'"),
        ("diagonal:0", r"width is 0.0; it must be a positive number"),
        ("diagonal:nan", "width is nan"),
        ("diagonal:2.5t", "2.5 tokens; it must be a whole number"),
        ("diagonal:2,stride=2", "diagonal has no setting 'stride'"),
        ("skip:single", "skip has no setting 'single'"),
        ("multi_diagonal:1,stride=0", "stride is 0"),
        ("multi_diagonal:1,max_lag=-1", "max_lag is -1"),
        ("multi_diagonal:1,lags=0/1,stride=2", "either lags or stride and max_lag"),
        ("vertical_stripe:0", "columns is 0"),
        ("vertical_stripe:columns=-1", r"columns is \(-1,\)"),
        ("full + diagonal:1", r"full \+ diagonal:1 is not a union"),
        ({"width": 2}, "unknown pattern None"),
        ({"pattern": "diagonal", "unit": "pixels"}, "unit is 'pixels'"),
        ({"pattern": "vertical_stripe", "single": 1}, "single is 1"),
        (7, "pattern 7 is int"),
    ],
    ids=str,
)
def test_bad_patterns_raise_one_clear_error(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(spec)


# -- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "grid,text,kv_heads",
    [
        ((3, 4, 5), {"text_len": 7}, 7),
        ((3, 4, 5), {"text_len": 9, "text_first": True}, 1),
        ((2, 5, 5), {"text_len": 12, "text_valid": 5}, 7),
        ((4, 3, 4), {}, 7),
    ],
    ids=["text_last", "text_first_gqa", "padded_text", "video_only"],
)
def test_operator_equals_masked_attention(grid, text, kv_heads, dtype):
    config = VDiTConfig(ALL_KINDS, grid, block_size=8, **text)
    L, S = config.tokens.L, config.tokens.S
    q, k, v = make_inputs(
        batch=2, heads=7, kv_heads=kv_heads, L=L, head_dim=16, value_dim=24, dtype=dtype, strides="blhd"
    )
    out, lse = sa.vdit_attention(
        q, k, v, patterns=ALL_KINDS, grid=grid, block_size=8, enable_gqa=kv_heads != 7, return_lse=True,
        engine="reference", **text,
    )  # fmt: skip
    blocks, columns = expected_layout(config)
    mask = blocks.repeat_interleave(8, 1)[:, :L].repeat_interleave(8, 2)[:, :, :S]
    mask = (mask | columns.repeat_interleave(8, 1)[:, :L])[None]
    k, v = k[:, :, :S], v[:, :, :S]
    truth = masked_attention(q, k, v, mask)
    assert_close(out, truth[0], masked_attention(q, k, v, mask, dtype=dtype)[0], "out")
    assert_close(lse, truth[1], masked_attention(q, k, v, mask, dtype=torch.float32)[1], "lse")
    assert (out[:, 1] == 0).all() and (lse[:, 1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_skip_value_mean_is_uniform_attention(dtype):
    q, k, v = make_inputs(batch=2, heads=4, kv_heads=2, L=24, head_dim=16, dtype=dtype)
    args = {"grid": (2, 2, 5), "text_len": 4, "text_valid": 2, "block_size": 8, "enable_gqa": True}
    patterns = ["diagonal:1", "skip", "full", "skip"]
    zero, zero_lse = sa.vdit_attention(q, k, v, patterns=patterns, return_lse=True, **args)
    mean, mean_lse = sa.vdit_attention(q, k, v, patterns=patterns, skip_value="mean", return_lse=True, **args)
    assert torch.equal(mean[:, ::2], zero[:, ::2]) and torch.equal(mean_lse, zero_lse)
    for h, kv in ((1, 0), (3, 1)):
        expected = v[:, kv, :22].double().mean(1, keepdim=True).expand(-1, 24, -1)
        plain = v[:, kv, :22].float().mean(1, keepdim=True).to(dtype).expand(-1, 24, -1)
        assert_close(mean[:, h], expected, plain, f"head {h}")
    alone = sa.vdit_attention(q, k, v, patterns="skip", skip_value="mean", **args)
    assert torch.equal(alone[:, 1], mean[:, 1]) and torch.equal(alone[:, 2], mean[:, 3])


@pytest.mark.parametrize("skip_value", ["zero", "mean"])
def test_gradients_of_mixed_heads(skip_value):
    q, k, v = make_inputs(heads=4, L=40, head_dim=16, requires_grad=True)
    patterns = ["full", "multi_diagonal:2t", "vertical_stripe:2", "skip"]
    out = sa.vdit_attention(
        q, k, v, patterns=patterns, grid=(3, 3, 4), text_len=4, block_size=8, skip_value=skip_value,
        engine="reference",
    )  # fmt: skip
    mask = vdit_layout(VDiTConfig(patterns, (3, 3, 4), 4, block_size=8)).to_dense()
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(out, (q, k, v), grad_out)
    none = torch.zeros(1, 4, 40)
    truth, plain = (
        plain_gradients((q, k, v), mask, grad_out, none, dtype=x) for x in (torch.float64, torch.float32)
    )
    if skip_value == "mean":
        for grads in (truth, plain):
            grads[2][:, 3] = grad_out[:, 3].to(grads[2].dtype).sum(1, keepdim=True) / 40
    for name, x, ref, base in zip(("dq", "dk", "dv"), found, truth, plain, strict=True):
        assert_close(x, ref, base, name)


def test_all_full_is_dense():
    q, k, v = make_inputs(heads=3, L=45, head_dim=16)
    dense = sa.sparse_attention(q, k, v, sa.SparseLayout.full(45, 45, block_m=8, block_n=8))
    out = sa.vdit_attention(q, k, v, patterns="full", grid=(2, 4, 5), text_len=5, block_size=8)
    assert torch.equal(out, dense)


def test_registry_entry():
    method = METHODS["vdit"]
    assert method.op is sa.vdit_attention and method.config is sa.VDiTConfig and not method.causal


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args,message",
    [
        ({"grid": (2, 3, 4)}, "grid 2x3x4 holds 24 video tokens, with 0 text tokens 24, but query has 30"),
        ({"grid": (2, 3, 4), "text_len": 5}, "with 5 text tokens 29, but query has 30"),
        ({"grid": (2, 15)}, r"grid is \(2, 15\); expected \(frames, height, width\)"),
        ({"grid": (2, 3.0, 5)}, "grid is"),
        ({"grid": (30, 1, 0)}, "grid is"),
        ({"patterns": ["full"] * 3}, "patterns has 3 entries but query has 4 heads; pass one a head"),
        ({"patterns": ["full"]}, "patterns has 1 entries but query has 4 heads; pass one a head"),
        ({"patterns": []}, "patterns is empty"),
        ({"patterns": ["full", "full", "full", "ful"]}, "unknown pattern 'ful'"),
        ({"patterns": "vertical_stripe:columns=30"}, r"column 30 lies outside the 30 video tokens"),
        ({"text_len": -1}, "text_len is -1"),
        ({"text_valid": 1}, "text_valid is 1; it must lie between 0 and text_len=0"),
        ({"grid": (5, 5, 1), "text_len": 5, "text_valid": 4, "text_first": True}, "put the text last"),
        ({"block_size": 0, "skip_value": "one"}, "block_size is 0.*skip_value is 'one'"),
        ({"patterns": "skip", "skip_value": "mean", "is_causal": True}, "is the mean over all keys"),
        ({"grid": (2, 3, 4), "patterns": ["full"] * 2}, "holds 24 .*; patterns has 2 entries"),
    ],
    ids=str,
)
def test_bad_arguments_raise_one_clear_error(args, message):
    q = torch.randn(1, 4, 30, 16)
    with pytest.raises(ValueError, match=message):
        sa.vdit_attention(q, q, q, **({"patterns": "full", "grid": (2, 3, 5)} | args))


def test_other_lengths_of_keys_are_refused():
    q, k = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 20, 16)
    with pytest.raises(ValueError, match="key has 20 tokens and query 30; this is self-attention"):
        sa.vdit_attention(q, k, k, patterns="full", grid=(2, 3, 5))
    with pytest.raises(ValueError, match="key must have 28 less 2 of padded text"):
        sa.vdit_attention(q, k, k, patterns="full", grid=(5, 5, 1), text_len=5, text_valid=3)
    with pytest.raises(ValueError, match="vdit_attention: key has 3 dimensions"):
        sa.vdit_attention(q, q[0], q, patterns="full", grid=(5, 5, 1), text_len=5, text_valid=3)


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.plain_empty
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_compiles_into_one_graph_with_its_layout(grad):
    def call(q):
        return sa.vdit_attention(
            q, q, q, patterns=ALL_KINDS, grid=(3, 4, 5), text_len=9, text_valid=4, block_size=8,
            skip_value="mean", engine="reference",
        ) * 2  # fmt: skip

    q, _, _ = make_inputs(heads=7, L=69, head_dim=16, requires_grad=grad)
    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(q)
    expected = call(q)
    assert torch.equal(out, expected)
    if grad:
        found, wanted = (torch.autograd.grad(x.sum(), q)[0] for x in (out, expected))
        assert torch.equal(found, wanted)


def test_names_may_be_written_as_in_the_paper():
    assert parse_pattern("multi-diagonal:64t") == parse_pattern("multi_diagonal:64t")
    assert parse_pattern({"pattern": "vertical-stripe"}) == parse_pattern("vertical_stripe")
