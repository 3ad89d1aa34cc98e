"""What users type: the names and keywords of the contract, and every bad call refused in one clear
sentence that names the operator, what it got, what it expected and the remedy."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from dataclasses import replace as replace_field

import pytest
import torch

import sparse_attn as sa
from sparse_attn import LayoutCache, Plan, SparseLayout, attend
from sparse_attn.index_list import IndexList
from sparse_attn.testing import make_inputs, masked_attention, random_layout

HAS_GPU = torch.cuda.is_available()
N = 40
SHARED = {"scale": None, "enable_gqa": False, "return_lse": False, "engine": None}


def layout_of(L=N, S=N, **kwargs) -> SparseLayout:
    return SparseLayout.full(L, S, block_m=16, block_n=16, **kwargs)


# One legal call of every operator, on q, k, v of N tokens: name -> keyword arguments.
OPS = {
    "sparse_attention": lambda: {"layout": layout_of()},
    "blasst_attention": lambda: {"threshold": 0.1, "block_m": 16, "block_n": 16},
    "anchor_attention": lambda: {"theta": 12.0, "block_size": 16, "step": 2},
    "s2_attention": lambda: {"block_size": 16, "local_blocks": 1, "vert_stride": 2},
    "sparsed_attention": lambda: {
        "cache": LayoutCache(), "step": 0, "num_steps": 4, "prompt_len": 8, "block_size": 16,
    },
    "vdit_attention": lambda: {"patterns": "diagonal:1", "grid": (2, 4, 4), "text_len": 8, "block_size": 16},
}  # fmt: skip
ops = pytest.mark.parametrize("op", list(OPS))


def call(op, q, k, v, **kwargs):
    return getattr(sa, op)(q, k, v, **(OPS[op]() | kwargs))


# -- the contract ---------------------------------------------------------------------------------

NEEDED = inspect.Parameter.empty
CONTRACT = {
    "blasst_attention": {"threshold": None, "threshold_scale": None, "is_causal": False},
    "anchor_attention": {"theta": 12.0, "block_size": 128, "step": 16},
    "s2_attention": {
        "block_size": 64, "local_blocks": 16, "vert_stride": 8, "sink_blocks": 0, "num_dense_heads": 0,
        "head_shift": None, "head_offset": 0,
    },
    "sparsed_attention": {
        "cache": NEEDED, "step": NEEDED, "num_steps": NEEDED, "prompt_len": NEEDED,
        "skip_ratio": 0.2, "select_ratio": 0.3, "block_size": 128,
    },
    "vdit_attention": {
        "patterns": NEEDED, "grid": NEEDED, "text_len": 0,
        "text_first": False, "skip_value": "zero",
    },
    "sparse_attention": {"layout": NEEDED, "is_causal": False},
}  # fmt: skip


@ops
def test_operator_has_the_keywords_of_the_contract(op):
    parameters = inspect.signature(getattr(sa, op)).parameters
    assert list(parameters)[:3] == ["query", "key", "value"]
    for name, default in (SHARED | CONTRACT[op]).items():
        assert name in parameters, f"{op} has no {name}"
        assert parameters[name].default == default, f"{op}: {name} defaults to {parameters[name].default}"
    assert op in sa.__all__ and getattr(sa.functional, op) is getattr(sa, op)


def test_blasst_takes_its_threshold_by_position_and_sparse_attention_its_layout():
    q, k, v = make_inputs(L=N)
    assert torch.equal(
        sa.blasst_attention(q, k, v, 0.1, block_m=16, block_n=16), call("blasst_attention", q, k, v)
    )
    assert torch.equal(sa.sparse_attention(q, k, v, layout_of()), call("sparse_attention", q, k, v))


def test_layout_builders_have_the_keywords_of_the_contract():
    masks = inspect.signature(SparseLayout.from_dense_mask).parameters
    assert next(iter(masks)) == "mask"
    required = {"block_m", "block_n", "L", "S"}
    assert {n for n, p in masks.items() if p.default is p.empty} == required | {"mask"}
    assert (masks["columns"].default, masks["column_group"].default) == (None, 1)
    assert list(inspect.signature(SparseLayout.full).parameters)[:4] == ["L", "S", "block_m", "block_n"]
    assert "is_causal" in inspect.signature(SparseLayout.density).parameters


@ops
def test_every_operator_returns_out_or_out_and_lse(op):
    q, k, v = make_inputs(L=N, dtype=torch.bfloat16, value_dim=32)
    out = call(op, q, k, v)
    assert (out.shape, out.dtype) == ((1, 2, N, 32), torch.bfloat16)
    again, lse = call(op, q, k, v, return_lse=True)
    assert torch.equal(out, again)
    assert (lse.shape, lse.dtype) == ((1, 2, N), torch.float32)
    # No sparse row can hold more weight than the dense one; more means that a key was counted twice.
    dense = masked_attention(q, k, v)[1]
    assert (lse <= dense + 1e-3).all()


@ops
def test_every_operator_takes_grouped_queries_and_free_strides(op):
    q, k, v = make_inputs(L=N, heads=4, kv_heads=2, strides="blhd")
    out = call(op, q, k, v, enable_gqa=True)
    dense = [x.contiguous() for x in (q, k, v)]
    torch.testing.assert_close(out, call(op, *dense, enable_gqa=True))


@ops
def test_every_operator_hands_its_engine_on(op):
    q, k, v = make_inputs(L=N)
    assert call(op, q, k, v, engine="reference").shape == q.shape
    with pytest.raises(ValueError, match="unknown engine 'warp'"):
        call(op, q, k, v, engine="warp")


@ops
def test_every_operator_has_gradients(op):
    q, k, v = make_inputs(L=N, requires_grad=True)
    call(op, q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


@ops
def test_every_operator_works_under_autocast(op):
    q, k, v = make_inputs(L=N)
    device = q.device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        assert call(op, q, k.bfloat16(), v).dtype == torch.bfloat16


@ops
def test_the_docstring_names_every_argument(op):
    function = getattr(sa, op)
    text = inspect.getdoc(function)
    missing = [name for name in inspect.signature(function).parameters if name not in text]
    assert not missing
    assert "Returns:" in text and "Raises:" in text and ">>>" in text


# -- bad tensors, for every operator --------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A change to legal inputs, and what the message must say: got, expected or remedy."""

    id: str
    change: object  # (q, k, v) -> (q, k, v)
    says: tuple[str, ...]


def integers(q, k, v):
    return q.int(), k.int(), v.int()


BAD_TENSORS = [
    Bad("list", lambda q, k, v: ([1.0], k, v), ("query is list", "must be a torch.Tensor")),
    Bad("none", lambda q, k, v: (q, None, v), ("key is NoneType", "must be a torch.Tensor")),
    Bad("numpy", lambda q, k, v: (q, k, v.numpy()), ("value is ndarray", "must be a torch.Tensor")),
    Bad("rank-3", lambda q, k, v: (q[0], k, v), ("query has 3 dimensions", "expected 4", "head_dim")),
    Bad("rank-5", lambda q, k, v: (q, k, v[None]), ("value has 5 dimensions", "expected 4")),
    Bad("sparse", lambda q, k, v: (q.to_sparse(), k, v), ("query has layout torch.sparse_coo", "dense")),
    Bad("head-dim", lambda q, k, v: (q, k[..., :32], v), ("key has head_dim 32 but query has 64", "equal")),
    Bad("head-dim-0", lambda q, k, v: (q[..., :0], k[..., :0], v), ("no dimension may be 0",)),
    Bad("value-dim-0", lambda q, k, v: (q, k, v[..., :0]), ("value has shape (1, 2, 40, 0)", "may be 0")),
    Bad(
        "head-dim-big",
        lambda q, k, v: (torch.cat([q] * 5, -1), torch.cat([k] * 5, -1), v),
        ("query has head_dim 320", "at most 256"),
    ),
    Bad("batch", lambda q, k, v: (q.expand(2, -1, -1, -1), k, v), ("batch sizes differ: query 2, key 1",)),
    Bad("L-0", lambda q, k, v: (q[:, :, :0], k, v), ("query has shape (1, 2, 0, 64)", "may be 0")),
    Bad("S-0", lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), ("key has shape (1, 2, 0, 64)", "may be 0")),
    Bad("batch-0", lambda q, k, v: (q[:0], k[:0], v[:0]), ("query has shape (0, 2, 40, 64)", "may be 0")),
    Bad("kv-length", lambda q, k, v: (q, k, v[:, :, 1:]), ("key has (heads, length) (2, 40)", "(2, 39)")),
    Bad("kv-heads", lambda q, k, v: (q, k, v[:, :1]), ("value has (1, 40)", "must be equal")),
    Bad(
        "gqa-off",
        lambda q, k, v: (q, k[:, :1], v[:, :1]),
        ("query has 2 heads but key has 1", "enable_gqa=True"),
    ),
    Bad("integers", integers, ("torch.int32", "use float16, bfloat16 or float32")),
    Bad("bool", lambda q, k, v: (q > 0, k > 0, v > 0), ("torch.bool", "use float16")),
    Bad("complex", lambda q, k, v: (q + 0j, k + 0j, v + 0j), ("torch.complex64", "use float16")),
    Bad("dtypes", lambda q, k, v: (q, k.half(), v), ("dtypes differ", "torch.float16", "cast", "autocast")),
    Bad("devices", lambda q, k, v: (q, k.to("meta"), v), ("devices differ", "'key': 'meta'", "move them")),
    Bad(
        "last-stride",
        lambda q, k, v: (q.mT.contiguous().mT, k, v),
        ("query has stride 40 in its last dimension", "query.contiguous()"),
    ),
]


@ops
@pytest.mark.parametrize("bad", BAD_TENSORS, ids=lambda bad: bad.id)
def test_bad_tensors(op, bad):
    q, k, v = make_inputs(L=N)
    with pytest.raises(ValueError) as refusal:
        call(op, *bad.change(q, k, v))
    text = str(refusal.value)
    assert text.startswith(f"{op}: ") and text.endswith(".")
    for part in bad.says:
        assert part in text, text


@ops
def test_heads_that_do_not_divide(op):
    q, _, _ = make_inputs(L=N, heads=5)
    _, k, v = make_inputs(L=N, heads=2)
    with pytest.raises(ValueError, match=rf"{op}: query has 5 heads, not a multiple of the 2 key heads"):
        call(op, q, k, v, enable_gqa=True)


@ops
def test_more_key_heads_than_query_heads(op):
    q, _, _ = make_inputs(L=N, heads=2)
    _, k, v = make_inputs(L=N, heads=4)
    with pytest.raises(ValueError, match=rf"{op}: query has 2 heads, not a multiple of the 4 key heads"):
        call(op, q, k, v, enable_gqa=True)


@ops
@pytest.mark.parametrize(
    "scale, says",
    [
        pytest.param(math.nan, "scale is nan; it must be finite", id="nan"),
        pytest.param(-math.inf, "scale is -inf; it must be finite", id="inf"),
        pytest.param("x", "scale is str; it must be a number or None", id="text"),
        pytest.param(torch.ones(()), "pass a plain number (scale.item())", id="tensor"),
    ],
)
def test_bad_scales(op, scale, says):
    q, k, v = make_inputs(L=N)
    with pytest.raises(ValueError) as refusal:
        call(op, q, k, v, scale=scale)
    assert str(refusal.value).startswith(f"{op}: ") and says in str(refusal.value)


@ops
def test_every_problem_is_reported_at_once(op):
    q, k, v = make_inputs(L=N)
    with pytest.raises(ValueError) as refusal:
        call(op, q.double(), k[..., :32].mT.contiguous().mT, v[:, :1])
    text = str(refusal.value)
    for part in ("dtypes differ", "head_dim 32", "(1, 40)", "key has stride"):
        assert part in text, text


@ops
def test_nan_inputs_do_not_crash_and_do_show(op):
    """Garbage in is not refused (finding it would make the host wait), but never hidden."""
    q, k, v = make_inputs(L=N)
    q[0, 0, 3] = math.nan
    out = call(op, q, k, v)
    assert out[0, 0, 3].isnan().all() and out[0, 1].isfinite().all()


# -- bad arguments of one operator ----------------------------------------------------------------

BAD_ARGUMENTS = [
    ("blasst_attention", {"threshold": -0.1}, ("threshold", "-0.1")),
    ("blasst_attention", {"threshold": 1.5}, ("threshold", "1.5", "allow_unsafe=True")),
    ("blasst_attention", {"threshold": math.nan}, ("threshold", "nan")),
    ("blasst_attention", {"threshold": None}, ("threshold", "threshold_scale")),
    ("blasst_attention", {"threshold_scale": 9.0}, ("threshold", "threshold_scale")),
    ("blasst_attention", {"threshold": None, "threshold_scale": 900.0}, ("threshold_scale", "allow_unsafe")),
    ("blasst_attention", {"threshold": torch.ones(3)}, ("threshold has shape (3,)", "expected [2]")),
    ("blasst_attention", {"threshold": torch.ones(2).int()}, ("dtype torch.int32",)),
    ("blasst_attention", {"block_m": 0}, ("block_m is 0",)),
    ("anchor_attention", {"theta": math.nan}, ("theta is NaN", "pass a number")),
    ("anchor_attention", {"theta": "big"}, ("theta is 'big'", "'auto'")),
    ("anchor_attention", {"theta": torch.ones(3)}, ("theta has shape (3,)", "expected [2]")),
    ("anchor_attention", {"block_size": 0}, ("block_size",)),
    ("anchor_attention", {"step": 0}, ("step",)),
    ("anchor_attention", {"is_causal": False}, ("is_causal=False", "vdit_attention")),
    ("s2_attention", {"block_size": 0}, ("block_size is 0",)),
    ("s2_attention", {"vert_stride": 0}, ("vert_stride is 0",)),
    ("s2_attention", {"num_dense_heads": 3}, ("num_dense_heads is 3",)),
    ("s2_attention", {"head_offset": 4}, ("head_offset is 4", "pass num_heads")),
    ("sparsed_attention", {"cache": None}, ("cache", "LayoutCache")),
    ("sparsed_attention", {"step": 4}, ("step", "4")),
    ("sparsed_attention", {"step": -1}, ("step", "-1")),
    ("sparsed_attention", {"prompt_len": 41}, ("prompt_len", "41", "40")),
    ("sparsed_attention", {"select_ratio": 0.0}, ("select_ratio is 0",)),
    ("sparsed_attention", {"mode": "fast"}, ("mode is 'fast'",)),
    ("vdit_attention", {"grid": (2, 4, 5)}, ("grid", "40")),
    ("vdit_attention", {"grid": (2, 4)}, ("grid",)),
    ("vdit_attention", {"patterns": ["full"] * 3}, ("3", "2")),
    ("vdit_attention", {"patterns": ["round"] * 2}, ("unknown pattern 'round'", "diagonal")),
    ("vdit_attention", {"skip_value": "one"}, ("skip_value",)),
    ("sparse_attention", {"layout": None}, ("layout is NoneType", "SparseLayout")),
    ("sparse_attention", {"layout": layout_of(L=39)}, ("L=39, S=40", "L=40, S=40", "build it")),
    ("sparse_attention", {"layout": layout_of(S=41)}, ("S=41",)),
    ("sparse_attention", {"layout": random_layout("random", N, N, heads=3)}, ("3 heads", "expected 1, 2")),
    ("sparse_attention", {"layout": random_layout("random", N, N, batch=2)}, ("batch 2", "expected 1")),
    ("sparse_attention", {"layout": layout_of().to("meta")}, ("is on meta", "layout.to(query.device)")),
    ("sparse_attention", {"is_causal": "yes"}, ("is_causal is str", "True or False")),
    ("sparse_attention", {"enable_gqa": 1}, ("enable_gqa is int", "True or False")),
]


@pytest.mark.parametrize(
    "op, kwargs, says", BAD_ARGUMENTS,
    ids=[f"{op.split('_')[0]}-{'-'.join(kwargs)}-{i}" for i, (op, kwargs, _) in enumerate(BAD_ARGUMENTS)],
)  # fmt: skip
def test_bad_arguments(op, kwargs, says):
    q, k, v = make_inputs(L=N)
    with pytest.raises(ValueError) as refusal:
        call(op, q, k, v, **kwargs)
    text = str(refusal.value)
    assert op in text
    for part in says:
        assert part in text, text


def test_layout_problems_come_with_the_others():
    q, k, v = make_inputs(L=N)
    with pytest.raises(ValueError) as refusal:
        sa.sparse_attention(
            q, k, v, random_layout("random", 39, N, heads=3, batch=2), scale=math.nan, is_causal=None
        )
    for part in ("L=39", "3 heads", "batch 2", "scale is nan", "is_causal is NoneType"):
        assert part in str(refusal.value)


@pytest.mark.skipif(not HAS_GPU, reason="needs a second device")
def test_a_layout_on_another_device():
    q, k, v = make_inputs(L=N, device="cuda")
    with pytest.raises(ValueError, match=r"layout is on cpu but query is on cuda:0; use layout.to"):
        sa.sparse_attention(q, k, v, layout_of())


SKIP = torch.zeros(1, 2)
BAD_PLANS = [
    (Plan(layout_of(), SKIP[0]), "must be float32 (1, 2)"),
    (Plan(layout_of(), SKIP.double()), "torch.float64"),
    (Plan(layout_of(), SKIP.to("meta")), "skip_below is on meta"),
    (Plan(layout_of(), SKIP.clone().requires_grad_()), "detach it"),
    (Plan(layout_of(), -1.0), "skip_below is float"),
    (layout_of(), "plan is SparseLayout; it must be a Plan"),
    (Plan(None), "layout is NoneType"),
]


@pytest.mark.parametrize("plan, says", BAD_PLANS, ids=[says for _, says in BAD_PLANS])
def test_bad_plans(plan, says):
    q, k, v = make_inputs(L=N)
    with pytest.raises(ValueError) as refusal:
        attend(q, k, v, plan)
    assert str(refusal.value).startswith("attend: ") and says in str(refusal.value)


# -- bad layouts ----------------------------------------------------------------------------------

MASK = torch.ones(1, 1, 3, 3, dtype=torch.bool)
SIZE = {"block_m": 16, "block_n": 16, "L": N, "S": N}
ONE_COLUMN = torch.zeros(1, 1, 3, N, dtype=torch.bool)
ONE_COLUMN[..., 20] = True
BAD_LAYOUTS = {
    "L-0": (lambda: SparseLayout.full(0, N), "L is 0"),
    "S-0": (lambda: SparseLayout.full(N, 0), "S is 0"),
    "block-0": (lambda: SparseLayout.full(N, N, block_m=0), "block_m is 0"),
    "block-negative": (lambda: SparseLayout.full(N, N, block_n=-16), "block_n is -16"),
    "window-block-0": (lambda: SparseLayout.window(N, N, block_m=0, left=1), "block_m is 0"),
    "mask-L-0": (lambda: SparseLayout.from_dense_mask(MASK, **(SIZE | {"L": 0})), "L is 0"),
    "mask-dtype": (lambda: SparseLayout.from_dense_mask(MASK.int(), **SIZE), "dtype torch.int32"),
    "mask-list": (lambda: SparseLayout.from_dense_mask([[True]], **SIZE), "mask is list"),
    "mask-rank": (lambda: SparseLayout.from_dense_mask(MASK[0], **SIZE), "shape (1, 3, 3)"),
    "mask-shape": (lambda: SparseLayout.from_dense_mask(MASK[..., :2], **SIZE), "3, 3]"),
    "column-shape": (
        lambda: SparseLayout.from_dense_mask(MASK, columns=MASK, **SIZE),
        "columns has shape (1, 1, 3, 3)",
    ),
    "column-group-0": (
        lambda: SparseLayout.from_dense_mask(MASK, columns=ONE_COLUMN, column_group=0, **SIZE),
        "column_group is 0",
    ),
    "column-heads": (
        lambda: SparseLayout.from_dense_mask(
            ~MASK.expand(1, 2, 3, 3), columns=ONE_COLUMN.expand(1, 3, 3, N), **SIZE
        ),
        "heads",
    ),
    "column-in-block": (
        lambda: SparseLayout.from_dense_mask(MASK, columns=ONE_COLUMN, **SIZE),
        "column 20 lies inside block 1",
    ),
    "top-k-0": (lambda: SparseLayout.top_k(MASK.float(), 0, **SIZE), "k is 0"),
    "top-k-big": (lambda: SparseLayout.top_k(MASK.float(), 4, **SIZE), "between 1 and 3"),
}


@pytest.mark.parametrize("name", list(BAD_LAYOUTS))
def test_bad_layouts(name):
    build, says = BAD_LAYOUTS[name]
    with pytest.raises(ValueError) as refusal:
        build()
    assert says in str(refusal.value), str(refusal.value)


def broken_layout():
    good = layout_of()
    indices = good.blocks.indices.clone()
    indices[2] = 7
    return replace_field(good, blocks=IndexList(good.blocks.offsets, indices), _cache={})


def test_indices_out_of_range_are_found_by_check():
    with pytest.raises(ValueError, match=r"blocks holds indices in \[0, 7\]; they must lie in \[0, 2\]"):
        broken_layout().check()


def test_the_debug_variable_checks_every_layout(monkeypatch):
    q, k, v = make_inputs(L=N)
    monkeypatch.setenv("SPARSE_ATTN_DEBUG", "1")
    with pytest.raises(ValueError, match="blocks holds indices"):
        sa.sparse_attention(q, k, v, broken_layout())
    assert sa.sparse_attention(q, k, v, layout_of()).shape == q.shape


# -- odd but legal --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 0.0, -2.0, 1e-3], ids=str)
def test_any_finite_scale(scale):
    q, k, v = make_inputs(L=N)
    out = sa.sparse_attention(q, k, v, layout_of(), scale=scale)
    torch.testing.assert_close(out, masked_attention(q, k, v, scale=scale)[0].float(), atol=1e-5, rtol=1e-5)


def test_causal_is_bottom_right_aligned():
    """The last query sees every key and the first sees S - L + 1: not PyTorch's upper-left rule."""
    q, k, v = make_inputs(L=3, S=5)
    layout = SparseLayout.full(3, 5, block_m=16, block_n=16)
    out = sa.sparse_attention(q, k, v, layout, is_causal=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for i in range(3):
        expected = sdpa(q[:, :, i : i + 1], k[:, :, : i + 3], v[:, :, : i + 3])
        torch.testing.assert_close(out[:, :, i : i + 1], expected)
    assert not torch.allclose(out, sdpa(q, k, v, is_causal=True))


def test_queries_that_see_nothing_give_zero_and_minus_infinity():
    q, k, v = make_inputs(L=5, S=3)
    layout = SparseLayout.full(5, 3, block_m=16, block_n=16)
    out, lse = sa.sparse_attention(q, k, v, layout, is_causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -math.inf).all()
    assert out[:, :, 2:].any() and lse[:, :, 2:].isfinite().all()


def test_expanded_heads_need_no_copy():
    """Keys shared by all heads through `expand` have a stride of 0."""
    q, k, v = make_inputs(L=N, heads=4, kv_heads=1)
    wide = [x.expand(-1, 4, -1, -1) for x in (k, v)]
    assert wide[0].stride(1) == 0
    out = sa.sparse_attention(q, *wide, layout_of())
    torch.testing.assert_close(out, sa.sparse_attention(q, k, v, layout_of(), enable_gqa=True))
