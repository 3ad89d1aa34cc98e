"""Every engine against float64 masked attention: layout kinds, dtypes, odd sizes, head groups, strides,
skips and gradients. A new engine is tested here as soon as it is in the registry.

The cases cover the parameters pairwise instead of in full; each id says what is special about it.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from sparse_attn import Plan, SparseLayout, attend
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.engines.triton import HAS_TRITON
from sparse_attn.testing import (
    assert_close,
    check_engine,
    kept_mask,
    make_inputs,
    masked_attention,
    random_layout,
    tile_margins,
)

HAS_GPU = torch.cuda.is_available()
COMPLETE = ("reference", "cpu", "triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One call; `layout_heads` says whose heads the layout has: "1", "kv" or "q"."""

    id: str
    kind: str = "random"
    L: int = 127
    S: int = 127
    heads: int = 2
    kv_heads: int = 2
    D: int = 64
    Dv: int | None = None
    dtype: torch.dtype = F32
    causal: bool = False
    block: tuple[int, int] = (32, 32)
    strides: str = "contiguous"
    batch: int = 1
    layout_heads: str = "1"
    layout_batch: int = 1
    scale: float | None = None
    slow: bool = False  # too much work for an interpreter

    def inputs(self, device):
        return make_inputs(
            batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, L=self.L, S=self.S, head_dim=self.D,
            value_dim=self.Dv, dtype=self.dtype, strides=self.strides, device=device,
        )  # fmt: skip

    def layout(self, device) -> SparseLayout:
        heads = {"1": 1, "kv": self.kv_heads, "q": self.heads}[self.layout_heads]
        return random_layout(
            self.kind, self.L, self.S, block_m=self.block[0], block_n=self.block[1],
            batch=self.layout_batch, heads=heads, device=device,
        )  # fmt: skip


KINDS = [
    Case("full-f32", "full"),
    Case("full-bf16-causal-gqa4", "full", heads=4, kv_heads=1, dtype=BF16, causal=True, D=128),
    Case("window-f16-causal", "window", L=200, S=200, dtype=F16, causal=True, block=(64, 64)),
    Case("strided-bf16-causal-heads", "strided", L=200, S=200, dtype=BF16, causal=True, layout_heads="q"),
    Case("random-f32-causal-kvheads", "random", heads=6, kv_heads=2, causal=True, layout_heads="kv"),
    Case("random-f16-batch2-bcast", "random", batch=2, dtype=F16, D=32),
    Case("random-bf16-batch2-own", "random", batch=2, layout_batch=2, layout_heads="q", dtype=BF16),
    Case("emptyrows-f32", "empty_rows", layout_heads="q", causal=True),
    Case("emptyrows-bf16-gqa3", "empty_rows", heads=3, kv_heads=1, dtype=BF16, block=(16, 64)),
    Case("fullrows-f16-causal", "full_rows", dtype=F16, causal=True, block=(64, 16)),
    Case("onecolumn-f32", "one_column", causal=True),
    Case("onecolumn-bf16-heads", "one_column", dtype=BF16, layout_heads="q", D=128),
    Case("columns-f32-causal", "columns", causal=True, L=150, S=170),
    Case("columns-f16-gqa8-kvheads", "columns", heads=16, kv_heads=2, layout_heads="kv", dtype=F16, L=63),
    Case("columns-bf16-batch-heads", "columns", batch=2, layout_batch=2, layout_heads="q", dtype=BF16),
    Case("onlycolumns-bf16-causal", "only_columns", dtype=BF16, causal=True, layout_heads="q"),
]
SIZES = [
    Case("L1-S1", "full", L=1, S=1, heads=8, kv_heads=8),
    Case("L1-S127-decode-gqa8", L=1, S=127, heads=8, kv_heads=1, dtype=BF16, causal=True),
    Case("L63-S1-causal-mostly-blind", "full", L=63, S=1, causal=True, dtype=F16),
    Case("L63-S127-causal", L=63, S=127, causal=True, dtype=F16),
    Case("L127-S63-causal-blind-rows", "full", L=127, S=63, causal=True),
    Case("L127-S63-columns-causal", "columns", L=127, S=63, causal=True, dtype=BF16),
    Case("L1000-S127", L=1000, S=127, causal=False, block=(128, 64), dtype=BF16, D=32),
    Case("L127-S1000-causal-gqa2", L=127, S=1000, heads=2, kv_heads=1, causal=True, block=(64, 128), D=32),
    Case("L1000-S1000-causal", L=1000, S=1000, causal=True, dtype=F16, block=(128, 128), slow=True),
    Case("L1-S4097", L=1, S=4097, heads=4, kv_heads=2, dtype=F16, block=(16, 64), slow=True),
    Case("L63-S4097-columns", "columns", L=63, S=4097, dtype=BF16, causal=True, block=(16, 64), slow=True),
    Case("L4097-S63", L=4097, S=63, block=(64, 32), slow=True),
    Case(
        "L1000-S4097-causal",
        L=1000,
        S=4097,
        heads=1,
        kv_heads=1,
        dtype=BF16,
        causal=True,
        block=(64, 64),
        slow=True,
    ),
]
SHAPES = [
    Case("D32-f32", D=32, causal=True),
    Case("D80-f16", D=80, dtype=F16, causal=True),
    Case("D80-f32-columns", "columns", D=80),
    Case("D96-bf16", D=96, dtype=BF16),
    Case("D128-f32-packed", D=128, strides="packed", causal=True),
    Case("D192-Dv128-bf16-mla", D=192, Dv=128, dtype=BF16, causal=True),
    Case("D256-f16", D=256, dtype=F16, L=63, S=100),
    Case("D64-Dv32-f32-columns", "columns", Dv=32, causal=True),
    Case("D32-Dv96-f16", D=32, Dv=96, dtype=F16),
    Case("blhd-bf16-gqa4", strides="blhd", heads=4, kv_heads=1, dtype=BF16, causal=True),
    Case("blhd-f32-columns", "columns", strides="blhd", layout_heads="q"),
    Case("sliced-f16-batch2", strides="sliced", batch=2, dtype=F16),
    Case("sliced-f32-causal-columns", "columns", strides="sliced", causal=True, L=63),
    Case("sliced-bf16-D80-ragged", strides="sliced", D=80, L=100, S=90, dtype=BF16),
    Case("scale-large", scale=1.5, causal=True),
    Case("scale-negative", scale=-0.3, dtype=BF16),
    Case("block-16x128", block=(16, 128), dtype=BF16, causal=True),
    Case("block-128x16", block=(128, 16), causal=True),
    Case("block-128x128-f16-D128", block=(128, 128), D=128, L=150, S=260, dtype=F16, causal=True),
]
GRAD_IDS = [
    "full-f32", "full-bf16-causal-gqa4", "window-f16-causal", "random-f32-causal-kvheads",
    "random-bf16-batch2-own", "emptyrows-f32", "emptyrows-bf16-gqa3", "fullrows-f16-causal", "onecolumn-f32",
    "columns-f32-causal", "columns-bf16-batch-heads", "onlycolumns-bf16-causal",
    "L1-S1", "L1-S127-decode-gqa8", "L63-S1-causal-mostly-blind", "L127-S63-causal-blind-rows",
    "L127-S63-columns-causal", "L127-S1000-causal-gqa2", "L1000-S1000-causal", "D32-f32", "D80-f16",
    "D80-f32-columns", "D192-Dv128-bf16-mla", "D256-f16", "D32-Dv96-f16", "blhd-bf16-gqa4",
    "sliced-f32-causal-columns", "sliced-bf16-D80-ragged", "scale-negative", "block-16x128", "block-128x16",
]  # fmt: skip
ALL = KINDS + SIZES + SHAPES
BY_ID = {case.id: case for case in ALL}


def by_id(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture(params=list(ENGINES))
def engine(request) -> str:
    """The name of every engine that is on; the others skip with their own reason, or fail where this
    machine has all that they need."""
    name = request.param
    reasons = ENGINES[name].why_off()
    if reasons:
        text = f"{name}: {'; '.join(reasons)}"
        assert not is_expected(name), f"{text} (`make install` builds the compiled engines)"
        pytest.skip(text)
    return name


def is_expected(engine: str) -> bool:
    """Whether an engine that is off means that something is broken: the reference runs anywhere, Triton
    where it is installed (without a GPU conftest.py switches its interpreter on), and the CPU engine
    where there is a compiler for it and no GPU takes its place."""
    if engine == "cpu":
        has_compiler = any(shutil.which(x) for x in (os.environ.get("CXX", "c++"), "g++", "clang++"))
        return has_compiler and not HAS_GPU and os.environ.get("SPARSE_ATTN_BUILD") != "none"
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return engine == "reference" or (engine == "triton" and HAS_TRITON and (HAS_GPU or interprets))


def device_of(engine: str) -> str:
    return "cuda" if HAS_GPU and engine != "cpu" else "cpu"


def set_up(engine: str, case: Case, grad: bool = False, skip: bool = False):
    """Inputs and layout of a case; skips what an interpreter cannot finish."""
    if case.slow and engine == "triton" and not HAS_GPU:
        pytest.skip("too large for Triton's interpreter")
    q, k, v = case.inputs(device_of(engine))
    layout = case.layout(device_of(engine))
    rule = torch.zeros(q.shape[:2], device=q.device) if skip else None
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    call = AttendCall(q, k, v, layout, rule, case.causal, scale, want_kept=True, needs_grad=grad)
    skip_if_refused(engine, call)
    return q, k, v, layout


def skip_if_refused(engine: str, call: AttendCall) -> None:
    """A backend under construction may refuse calls, with reasons; the complete ones take all of them."""
    reasons = ENGINES[engine].why_not(call)
    if reasons:
        text = f"{engine}: {'; '.join(reasons)}"
        assert engine not in COMPLETE, f"{text} ({call.describe()})"
        pytest.skip(text)


@by_id(ALL)
def test_forward(engine, case):
    q, k, v, layout = set_up(engine, case)
    check_engine(q, k, v, Plan(layout), engine=engine, is_causal=case.causal, scale=case.scale)


@by_id([BY_ID[name] for name in GRAD_IDS])
def test_backward(engine, case):
    q, k, v, layout = set_up(engine, case, grad=True)
    check_engine(q, k, v, Plan(layout), engine=engine, is_causal=case.causal, scale=case.scale, grad=True)


# -- the BLASST skip ------------------------------------------------------------------------------

SKIPS = [
    Case("full-f32", "full", L=100, S=200),
    Case("full-bf16-causal", "full", L=160, S=160, dtype=BF16, causal=True),
    Case("full-f16-causal-L<S", "full", L=70, S=200, dtype=F16, causal=True, D=128),
    Case("full-f32-causal-L>S-blind-rows", "full", L=200, S=130, causal=True),
    Case("random-f32-gqa3-kvheads", "random", L=70, S=220, heads=6, kv_heads=2, layout_heads="kv"),
    Case("emptyrows-bf16", "empty_rows", L=70, S=220, dtype=BF16, layout_heads="q", batch=2),
    Case("columns-f32-causal", "columns", L=100, S=200, causal=True, layout_heads="q"),
    Case("block-16x64-f16-padding-rows", "full", L=40, S=300, block=(16, 64), dtype=F16),
    Case("block-64x16-bf16-padding-rows", "full", L=65, S=120, block=(64, 16), dtype=BF16, D=80),
]


def skipping(q, k, case: Case, layout: SparseLayout):
    """Inputs in which whole key blocks are faint, and a per-head rule: some tiles fall, some stay."""
    generator = torch.Generator().manual_seed(5)
    strength = torch.ones(layout.num_key_blocks)
    strength[1::2] = 0.1
    k = k * strength.repeat_interleave(layout.block_n)[: case.S, None].to(k)
    # Half of the tiles lag far behind the running maximum, the others come near it.
    threshold = torch.rand(q.shape[:2], generator=generator) * 0.2 + 0.1
    return q * 2, k, Plan(layout, threshold.log().to(q.device))


@by_id(SKIPS)
def test_skip_votes_and_output(engine, case):
    q, k, v, layout = set_up(engine, case, skip=True)
    q, k, plan = skipping(q, k, case, layout)
    got = check_engine(q, k, v, plan, engine=engine, is_causal=case.causal)
    # The case means something: tiles were dropped and kept, hardly any by a hair.
    margin, slack = tile_margins(q, k, plan, got.kept, is_causal=case.causal)
    listed, kept = ~margin.isnan(), got.kept.bool()
    assert 0.05 < (kept.sum() / listed.sum()).item() < 0.95
    clear = (margin[listed].abs() > slack).all()
    if clear:  # no vote is within rounding of the other outcome
        other = attend(
            q, k, v, plan, is_causal=case.causal, enable_gqa=True, engine="reference", want_kept=True
        )
        assert torch.equal(got.kept, other.kept)
    else:
        assert (margin[listed].abs() <= slack).sum() <= 0.01 * listed.sum()


@by_id(SKIPS)
def test_skip_backward_uses_the_kept_tiles(engine, case):
    q, k, v, layout = set_up(engine, case, grad=True, skip=True)
    q, k, plan = skipping(q, k, case, layout)
    check_engine(q, k, v, plan, engine=engine, is_causal=case.causal, grad=True)


@by_id([SKIPS[1], SKIPS[3], SKIPS[4], SKIPS[6]])
def test_lambda_zero_is_dense_bit_for_bit(engine, case):
    q, k, v, layout = set_up(engine, case, skip=True)
    no_skip = torch.full(q.shape[:2], -torch.inf, device=q.device)
    results = [
        attend(q, k, v, plan, is_causal=case.causal, enable_gqa=True, engine=engine, want_kept=True)
        for plan in (Plan(layout), Plan(layout, no_skip))
    ]
    for name in ("out", "lse"):
        assert torch.equal(*(getattr(r, name) for r in results)), f"{name} differs"
    # A tile whose every query is blind is visible to none, so both agree on it as well.
    assert torch.equal(results[0].kept, results[1].kept)


def test_lambda_one_keeps_only_tiles_that_raise_the_maximum(engine):
    """Hand-made: every query equals e0, so tile j's maximum is its key's first component."""
    block, heights = 16, [3.0, 1.0, 5.0, 5.0, 4.0, 6.0]
    q = torch.zeros(1, 1, block, 32, device=device_of(engine))
    q[..., 0] = 1
    k = torch.zeros(1, 1, block * len(heights), 32, device=q.device)
    k[0, 0, :, 0] = torch.tensor(heights).repeat_interleave(block)
    layout = SparseLayout.full(block, k.shape[2], block_m=block, block_n=block, device=q.device)
    plan = Plan(layout, torch.zeros(1, 1, device=q.device))
    skip_if_refused(engine, AttendCall(q, k, k, layout, plan.skip_below, False, 1.0, want_kept=True))
    got = attend(q, k, torch.randn_like(k), plan, scale=1.0, engine=engine, want_kept=True)
    # 5 after 5 is not *below* the running maximum: kept. 1 and 4 are dropped.
    assert got.kept.flatten().tolist() == [1, 0, 1, 1, 0, 1]
    expected = 16 * sum(math.exp(x) for x in (3, 5, 5, 6))
    torch.testing.assert_close(got.lse, torch.full_like(got.lse, math.log(expected)))


def test_one_dissenting_query_keeps_the_tile_for_all(engine):
    block = 16
    q = torch.zeros(1, 1, block, 32, device=device_of(engine))
    q[..., 0] = 1
    q[0, 0, 3, 1] = 1  # only query 3 sees the second component
    k = torch.zeros(1, 1, 2 * block, 32, device=q.device)
    k[0, 0, :block, 0], k[0, 0, block:, 1] = 8, 20
    plan = Plan(
        SparseLayout.full(block, 2 * block, block_m=block, block_n=block, device=q.device),
        torch.full((1, 1), -2.0, device=q.device),
    )
    v = torch.randn_like(k)
    skip_if_refused(engine, AttendCall(q, k, v, plan.layout, plan.skip_below, False, 1.0, want_kept=True))
    got = attend(q, k, v, plan, scale=1.0, engine=engine, want_kept=True)
    assert got.kept.flatten().tolist() == [1, 1]
    dense = attend(q, k, v, Plan(plan.layout), scale=1.0, engine=engine)
    assert torch.equal(got.out, dense.out)
    q[0, 0, 3, 1] = 0
    assert attend(q, k, v, plan, scale=1.0, engine=engine, want_kept=True).kept.flatten().tolist() == [1, 0]


# -- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_full_layout_is_sdpa(engine, dtype, causal):
    case = Case("sdpa", "full", L=130, S=130, heads=4, kv_heads=2, dtype=dtype, causal=causal)
    q, k, v, layout = set_up(engine, case)
    got = attend(q, k, v, Plan(layout), is_causal=causal, enable_gqa=True, engine=engine)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = sdpa(q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True)
    assert_close(got.out, exact, sdpa(q, k, v, is_causal=causal, enable_gqa=True).to(dtype), "out")


@by_id([BY_ID["random-bf16-batch2-own"], BY_ID["columns-f32-causal"], BY_ID["D192-Dv128-bf16-mla"]])
def test_two_runs_agree_bit_for_bit(engine, case):
    q, k, v, layout = set_up(engine, case, grad=True)

    def run():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        got = attend(*inputs, Plan(layout), is_causal=case.causal, enable_gqa=True, engine=engine)
        return got.out, got.lse, *torch.autograd.grad(got.out.float().square().sum(), inputs)

    names = ["out", "lse", "dq", "dk", "dv"]
    if engine == "triton" and HAS_GPU and layout.columns is not None:
        names = names[:3]  # dk and dv of columns add with atomics; deterministic mode refuses them
    for name, first, second in zip(names, run(), run(), strict=False):
        assert torch.equal(first, second), f"{name} differs between two runs"


@pytest.mark.parametrize("kind", ["random", "columns"])
def test_a_broadcast_layout_equals_the_repeated_one(engine, kind):
    """heads = 1, Hkv and Hq, batch = 1 and B: the same pattern written out gives the same bits."""
    case = Case("broadcast", kind, batch=2, heads=4, kv_heads=2, causal=True, L=70, S=100)
    q, k, v, narrow = set_up(engine, case)
    mask, columns = narrow.block_mask(), narrow.column_mask()
    outs = []
    for batch, heads in ((1, 1), (1, 2), (2, 4), (2, 1)):
        wide = SparseLayout.from_dense_mask(
            mask.expand(batch, heads, -1, -1),
            block_m=narrow.block_m, block_n=narrow.block_n, L=narrow.L, S=narrow.S,
            columns=None if columns is None else columns.expand(batch, heads, -1, -1),
            column_group=1 if narrow.columns is None else narrow.columns.group,
        )  # fmt: skip
        outs.append(attend(q, k, v, Plan(wide), is_causal=True, enable_gqa=True, engine=engine).out)
    assert all(torch.equal(outs[0], x) for x in outs[1:])


def test_a_shared_layout_row_serves_the_right_heads(engine):
    """With heads = Hkv, query head h reads row h // group; here the two key heads share nothing."""
    case = Case("kv", heads=6, kv_heads=2, L=64, S=64)
    q, k, v, _ = set_up(engine, case)
    mask = torch.tensor([[True, False], [False, True]], device=q.device)[None, :, None].expand(1, 2, 2, 2)
    layout = SparseLayout.from_dense_mask(mask, block_m=32, block_n=32, L=64, S=64)
    got = attend(q, k, v, Plan(layout), enable_gqa=True, engine=engine, want_kept=True).kept
    assert got[0, :, 0].tolist() == [[1, 0]] * 3 + [[0, 1]] * 3


def test_the_order_of_a_list_does_not_matter(engine):
    case = Case("order", L=100, S=200, layout_heads="q")
    q, k, v, layout = set_up(engine, case)
    counts, indices = layout.to_count_index()
    backwards = indices.clone()
    for row, count in zip(backwards.flatten(0, 2), counts.flatten().tolist(), strict=True):
        row[:count] = row[:count].flip(0)
    size = {"block_m": layout.block_m, "block_n": layout.block_n, "L": layout.L, "S": layout.S}
    outs = [
        attend(q, k, v, Plan(SparseLayout.from_count_index(counts, x, **size)), engine=engine).out
        for x in (indices, backwards)
    ]
    assert not torch.equal(indices, backwards)
    assert torch.equal(*outs)


def test_entries_past_a_row_are_never_read(engine):
    """Spare capacity holds numbers that would crash or change the result if an engine used them."""
    case = Case("spare", "columns", L=100, S=150, causal=True)
    q, k, v, exact = set_up(engine, case)
    assert exact.columns is not None
    spare = [
        replace(rows, indices=torch.cat([rows.indices, torch.full_like(rows.indices, 2**31 - 1)]))
        for rows in (exact.blocks, exact.columns)
    ]
    roomy = SparseLayout(spare[0], 32, 32, 100, 150, columns=spare[1])
    outs = [attend(q, k, v, Plan(x), is_causal=True, engine=engine) for x in (exact, roomy)]
    assert torch.equal(outs[0].out, outs[1].out) and torch.equal(outs[0].lse, outs[1].lse)


def test_keys_outside_the_layout_have_no_influence(engine):
    """NaN and infinity in keys and values that no query reads must stay there."""
    case = Case("nan", "window", L=128, S=128, causal=True)
    q, k, v, _ = set_up(engine, case, grad=True)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=q.device)
    mask[..., 2] = True
    layout = SparseLayout.from_dense_mask(mask, block_m=32, block_n=32, L=128, S=128)
    check_engine(q, k, v, Plan(layout), engine=engine, is_causal=True, grad=True)

    def run(k, v):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        got = attend(*inputs, Plan(layout), is_causal=True, engine=engine)
        return got.out, got.lse, *torch.autograd.grad(got.out.sum(), inputs)

    clean = run(k, v)
    k[:, :, :64], v[:, :, :64] = torch.nan, torch.inf
    k[:, :, 96:], v[:, :, 96:] = torch.inf, torch.nan
    for name, first, second in zip(("out", "lse", "dq", "dk", "dv"), clean, run(k, v), strict=True):
        assert torch.equal(first, second), f"{name} changed"


def test_large_logits_do_not_overflow(engine):
    case = Case("large", "full", L=64, S=100, dtype=F32, scale=30.0)
    q, k, v, layout = set_up(engine, case)
    got = attend(q, k, v, Plan(layout), scale=30.0, engine=engine)
    out, lse = masked_attention(q, k, v, scale=30.0)
    assert lse.max() > 500
    plain = masked_attention(q, k, v, scale=30.0, dtype=F32)
    assert_close(got.out, out, plain[0], "out")
    assert_close(got.lse, lse, plain[1], "lse")


def test_heads_shared_through_expand(engine):
    """A head stride of 0, in the queries as well."""
    case = Case("expand", "columns", L=40, S=70, heads=1, kv_heads=1, causal=True)
    q, k, v, layout = set_up(engine, case, grad=True)
    wide = [x.expand(2, 3, -1, -1) for x in (q, k, v)]
    check_engine(*wide, Plan(layout), engine=engine, is_causal=True, grad=True)


def test_output_keeps_the_memory_order_of_the_query(engine):
    case = Case("order", "full", L=40, S=40, heads=4, kv_heads=4, strides="blhd")
    q, k, v, layout = set_up(engine, case)
    out = attend(q, k, v, Plan(layout), engine=engine).out
    assert out.transpose(1, 2).is_contiguous()


def test_kept_mask_matches_the_layout():
    """The kit's own mask of kept tiles, against `to_dense`, where every tile is kept."""
    layout = random_layout("columns", 70, 90, heads=2)
    tiles = layout.block_mask().to(torch.uint8)
    for causal in (False, True):
        assert torch.equal(kept_mask(layout, tiles, causal), layout.to_dense(causal))
