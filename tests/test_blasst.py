"""BLASST against a literal reading of its algorithm, and its promises at the edges."""

import math

import pytest
import torch
from references.blasst import blasst
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn as sa
from sparse_attn.engines import ENGINES
from sparse_attn.methods import METHODS
from sparse_attn.methods.blasst import BlasstConfig, select
from sparse_attn.testing_data import structured_qk

ENGINES_ON = [name for name, engine in ENGINES.items() if not engine.why_off()]


def device_of(engine):
    return "cuda" if engine == "triton" and torch.cuda.is_available() else "cpu"


def make(B, Hq, Hkv, L, S, D, dtype=torch.float64, seed=0):
    """Structured logits over `S` keys with queries for the last `L` of them (or more, if L > S)."""
    length = max(L, S)
    q, k = structured_qk(B, Hq, length, max(D, 32), kv_heads=Hkv, seed=seed)
    v = torch.randn(B, Hkv, S, D, generator=torch.Generator().manual_seed(seed + 1))
    return q[:, :, length - L :].to(dtype), k[:, :, :S].to(dtype), v.to(dtype)


CASES = {
    "square": dict(L=64, S=64),
    "causal": dict(L=64, S=64, is_causal=True),
    "causal-ragged": dict(L=75, S=75, is_causal=True),
    "chunk": dict(L=21, S=83, is_causal=True),
    "more-queries-than-keys": dict(L=50, S=30, is_causal=True),
    "ragged-full": dict(L=50, S=83),
    "gqa": dict(L=40, S=61, is_causal=True, Hq=4, Hkv=2),
    "one-query": dict(L=1, S=90, is_causal=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.05, 1.0])
def test_equals_the_literal_algorithm(case, lam):
    case = dict(Hq=2, Hkv=2, is_causal=False) | case
    q, k, v = make(1, case["Hq"], case["Hkv"], case["L"], case["S"], 32)
    blocks = dict(block_m=16, block_n=8)
    out, lse, stats = sa.blasst_attention(
        q, k, v, lam, **blocks, is_causal=case["is_causal"], enable_gqa=True,
        return_lse=True, return_stats=True, engine="reference",
    )  # fmt: skip
    lambdas = [[lam] * case["Hq"]]
    want_out, want_lse, want_kept = blasst(
        q, k, v, lambdas, **blocks, is_causal=case["is_causal"], scale=q.shape[-1] ** -0.5
    )
    plan = select(q, k, BlasstConfig(lam, **blocks), is_causal=case["is_causal"], scale=1.0)
    kept = sa.attend(
        q, k, v, plan, is_causal=case["is_causal"], enable_gqa=True, engine="reference", want_kept=True
    ).kept
    # A tile that nobody sees is not kept in either; lambda = 0 keeps every other.
    assert {tuple(at) for at in kept.nonzero().tolist()} == want_kept
    assert stats.kept.sum() == len(want_kept)
    if lam == 1.0 and case["L"] > 1 and case["S"] > 40:
        assert stats.sparsity.min() > 0, "the case must skip something"
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


def test_per_head_lambdas_skip_by_head():
    q, k, v = make(2, 3, 3, 96, 96, 32)
    lambdas = torch.tensor([[0.0, 0.03, 0.5], [0.5, 0.03, 0.0]])
    blocks = dict(block_m=8, block_n=8)
    out, stats = sa.blasst_attention(q, k, v, lambdas, **blocks, is_causal=True, return_stats=True)
    want, _, kept = blasst(q, k, v, lambdas.tolist(), **blocks, is_causal=True, scale=32**-0.5)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    for b in range(2):
        for h in range(3):
            assert stats.kept[b, h] == sum(at[:2] == (b, h) for at in kept)
    sparsity = stats.sparsity
    assert sparsity[0, 0] == 0 and sparsity[1, 2] == 0
    assert 0 < sparsity[0, 1] < sparsity[0, 2] < 1
    one_row = sa.blasst_attention(q, k, v, lambdas[0], **blocks, is_causal=True)
    assert torch.equal(one_row[0], out[0]) and not torch.equal(one_row[1], out[1])


@pytest.mark.parametrize("engine", ENGINES_ON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_lambda_zero_is_dense_bit_for_bit(engine, dtype, is_causal):
    q, k, v = (x.to(device_of(engine)) for x in make(1, 2, 1, 100, 150, 64, dtype))
    layout = sa.SparseLayout.full(100, 150, block_m=32, block_n=32, device=q.device)
    common = dict(is_causal=is_causal, enable_gqa=True, return_lse=True, engine=engine)
    try:
        dense, dense_lse = sa.sparse_attention(q, k, v, layout, **common)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    out, lse = sa.blasst_attention(q, k, v, 0.0, block_m=32, block_n=32, **common)
    assert torch.equal(out, dense) and torch.equal(lse, dense_lse)


@pytest.mark.parametrize("engine", [name for name in ENGINES_ON if name != "reference"])
@pytest.mark.parametrize("lam", [1e-3, 0.1])
def test_engines_keep_the_same_tiles(engine, lam):
    q, k, v = (x.to(device_of(engine)) for x in make(1, 2, 1, 130, 190, 64, torch.float32, seed=2))
    common = dict(block_m=32, block_n=32, is_causal=True, enable_gqa=True, return_stats=True)
    try:
        out, stats = sa.blasst_attention(q, k, v, lam, **common, engine=engine)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    want, want_stats = sa.blasst_attention(q, k, v, lam, **common, engine="reference")
    assert stats.sparsity.min() > 0
    assert torch.equal(stats.kept, want_stats.kept) and torch.equal(stats.visited, want_stats.visited)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_mass_of_skipped_tiles_is_bounded():
    """Dropped mass of a query <= skipped keys x lambda x kept mass (appendix B of the paper)."""
    q, k, v = make(1, 2, 2, 256, 256, 32)
    lam = 0.01
    blocks = dict(block_m=16, block_n=16)
    _, lse, stats = sa.blasst_attention(
        q, k, v, lam, **blocks, is_causal=True, return_lse=True, return_stats=True
    )
    scores = (q @ k.mT * 32**-0.5).masked_fill(~torch.ones(256, 256).tril().bool(), -math.inf)
    dropped = scores.logsumexp(-1).exp() - lse.exp()
    assert 0.1 < stats.sparsity.mean() < 1
    assert (dropped <= 256 * lam * lse.exp()).all()


def test_threshold_scale_is_lambda_times_key_length():
    q, k, v = make(1, 2, 2, 64, 128, 32, torch.float32)
    blocks = dict(block_m=16, block_n=16, return_stats=True)
    out, stats = sa.blasst_attention(q, k, v, threshold_scale=6.4, **blocks)
    same, same_stats = sa.blasst_attention(q, k, v, 0.05, **blocks)
    other, _ = sa.blasst_attention(q, k, v, threshold_scale=3.2, **blocks)
    assert torch.equal(out, same) and torch.equal(stats.kept, same_stats.kept)
    assert not torch.equal(out, other)
    per_head, _ = sa.blasst_attention(q, k, v, threshold_scale=torch.tensor([6.4, 6.4]), **blocks)
    torch.testing.assert_close(per_head, out)


def test_a_layout_restricts_what_is_visited():
    q, k, v = make(1, 2, 2, 128, 128, 32)
    layout = sa.SparseLayout.window(128, 128, block_m=16, block_n=16, left=2, sink_blocks=1)
    out, stats = sa.blasst_attention(q, k, v, 0.05, layout=layout, is_causal=True, return_stats=True)
    mask = layout.to_dense(True)
    dense = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (stats.visited == mask.view(8, 16, 8, 16).any(3).any(1).sum()).all()
    assert (stats.kept < stats.visited).all() and (out - dense).abs().max() < 0.5
    exact = sa.blasst_attention(q, k, v, 0.0, layout=layout, is_causal=True)
    torch.testing.assert_close(exact, dense, rtol=0, atol=1e-12)


def test_visited_counts_visible_tiles():
    q, k, v = make(1, 1, 1, 40, 70, 32)
    _, stats = sa.blasst_attention(q, k, v, 0.0, block_m=16, block_n=16, is_causal=True, return_stats=True)
    visible = sum(1 for i in range(3) for j in range(5) if j * 16 <= min(i * 16 + 15, 39) + 30)
    assert stats.visited.tolist() == [[visible]] and stats.kept.tolist() == [[visible]]
    assert stats.visited.dtype == stats.kept.dtype == torch.int64


def test_gradients_ignore_skipped_tiles():
    q, k, v = make(1, 1, 1, 32, 32, 32)
    config = BlasstConfig(0.1, block_m=8, block_n=8)
    plan = select(q, k, config, is_causal=True, scale=1.0)
    kept = sa.attend(q, k, v, plan, is_causal=True, want_kept=True, engine="reference").kept
    assert 0 < kept.sum() < 10, "the case must skip something"
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(5))
    out = sa.blasst_attention(*leaves, 0.1, block_m=8, block_n=8, is_causal=True, engine="reference")
    out.backward(grad)
    mask = kept[0, 0].bool().repeat_interleave(8, 0).repeat_interleave(8, 1).tril()
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    scaled_dot_product_attention(*plain, attn_mask=mask).backward(grad)
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_first_call_in_inference_mode_does_not_break_training():
    q, k, v = make(1, 1, 1, 33, 47, 32, torch.float32)
    with torch.inference_mode():
        sa.blasst_attention(q, k, v, 0.01, block_m=16, block_n=16, is_causal=True)
    q = q.clone().requires_grad_()
    sa.blasst_attention(q, k, v, 0.01, block_m=16, block_n=16, is_causal=True).sum().backward()
    assert q.grad.abs().sum() > 0


def test_compiles_whole():
    q, k, v = make(1, 2, 2, 64, 64, 32, torch.float32)

    def f(q, k, v):
        return sa.blasst_attention(q, k, v, 0.01, block_m=16, block_n=16, is_causal=True, engine="reference")

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))


def test_is_registered():
    assert METHODS["blasst"].op is sa.blasst_attention is sa.functional.blasst_attention


NAN = float("nan")
BAD = {
    "neither": (dict(), "exactly one"),
    "both": (dict(threshold=0.1, threshold_scale=10.0), "exactly one"),
    "negative": (dict(threshold=-0.1), "at least 0"),
    "nan": (dict(threshold=NAN), "at least 0"),
    "infinite": (dict(threshold=math.inf, allow_unsafe=True), "finite"),
    "above-one": (dict(threshold=1.5), "allow_unsafe"),
    "scale-above-length": (dict(threshold_scale=900.0), "allow_unsafe"),
    "text": (dict(threshold="0.1"), "str"),
    "integer-tensor": (dict(threshold=torch.tensor([0, 1])), "float tensor"),
    "other-heads": (dict(threshold=torch.tensor([0.1, 0.1, 0.1])), r"expected \[2\]"),
    "other-batch": (dict(threshold=torch.full((3, 2), 0.1)), "batch"),
    "scalar-tensor": (dict(threshold=torch.tensor(0.1)), "heads"),
    "nan-in-tensor": (dict(threshold=torch.tensor([0.1, NAN])), r"\[1\] is nan"),
    "tensor-above-one": (dict(threshold=torch.tensor([0.1, 1.5])), "allow_unsafe"),
    "block": (dict(threshold=0.1, block_n=0), "block_n"),
    "layout": (dict(threshold=0.1, layout="full"), "SparseLayout"),
    "layout-for-others": (dict(threshold=0.1, layout=sa.SparseLayout.full(8, 8)), "L=8"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(arguments, message):
    q, k, v = make(1, 2, 2, 32, 32, 32, torch.float32)
    with pytest.raises(ValueError, match=message) as refusal:
        sa.blasst_attention(q, k, v, **arguments)
    assert "blasst_attention" in str(refusal.value)


def test_bad_inputs_are_refused():
    q, k, v = make(1, 4, 2, 32, 32, 32, torch.float32)
    for wrong in (
        lambda: sa.blasst_attention(q, k, v, 0.1),  # GQA without enable_gqa
        lambda: sa.blasst_attention(q[0], k, v, 0.1, enable_gqa=True),
        lambda: sa.blasst_attention(q[..., :16], k, v, 0.1, enable_gqa=True),
        lambda: sa.blasst_attention(q[:, :, :0], k, v, 0.1, enable_gqa=True),
        lambda: sa.blasst_attention(q.int(), k.int(), v.int(), 0.1, enable_gqa=True),
    ):
        with pytest.raises(ValueError, match="blasst_attention"):
            wrong()


def test_unsafe_lambda_runs_when_asked():
    q, k, v = make(1, 2, 2, 64, 64, 32, torch.float32)
    common = dict(block_m=16, block_n=16, return_stats=True)
    _, at_one = sa.blasst_attention(q, k, v, 1.0, **common)
    out, stats = sa.blasst_attention(q, k, v, 50.0, allow_unsafe=True, **common)
    assert stats.kept.sum() < at_one.kept.sum() and out.isfinite().all()


@pytest.mark.parametrize("name", ["threshold", "threshold_scale"])
def test_the_number_zero_makes_no_skip_rule(name):
    """So that the dense kernels run; a tensor may hold anything, and is not looked at."""
    q, k, _ = make(1, 2, 2, 64, 64, 32, torch.float32)
    plan = select(q, k, BlasstConfig(**{name: 0.0}), is_causal=True, scale=1.0)
    assert plan.skip_below is None
    plan = select(q, k, BlasstConfig(**{name: torch.zeros(2)}), is_causal=True, scale=1.0)
    assert plan.skip_below is not None and bool((plan.skip_below == -torch.inf).all())
