"""The testing kit itself: a kit that lets mistakes pass makes every other test worthless."""

from __future__ import annotations

import pytest
import torch

from sparse_attn import Plan, SparseLayout
from sparse_attn.engines import ENGINES
from sparse_attn.engines.reference import ReferenceEngine
from sparse_attn.testing import (
    LAYOUT_KINDS,
    STRIDES,
    assert_close,
    assert_kept,
    check_engine,
    error_report,
    make_inputs,
    masked_attention,
    plain_gradients,
    random_layout,
    tile_margins,
)

# -- the tolerance rule ---------------------------------------------------------------------------


def test_an_error_is_located():
    ref = torch.linspace(1, 2, 24, dtype=torch.float64).view(2, 3, 4)
    plain = ref.float()
    wrong = plain.clone()
    wrong[1, 0, 2] += 1e-3
    report = error_report(wrong, ref, plain)
    assert not report.ok and report.where == (1, 0, 2) and report.num_bad == 1
    with pytest.raises(AssertionError, match=r"out: worst error 1\.000e-03 .* at \(1, 0, 2\): got 1\."):
        assert_close(wrong, ref, plain, "out")
    assert_close(plain, ref, plain)


def test_twice_the_error_of_plain_pytorch_and_no_more():
    """With a reference of 0 the rounding term vanishes and the factor of two stands alone."""
    ref = torch.zeros(8, dtype=torch.float64)
    plain = torch.full((8,), 1e-3)
    assert_close(torch.full((8,), 1.99e-3), ref, plain)
    assert not error_report(torch.full((8,), 2.01e-3), ref, plain).ok
    assert error_report(torch.full((8,), 3e-3), ref, [plain, 2 * plain]).ok


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_anomalies_are_compared_by_position(what):
    ref = torch.ones(3, 3, dtype=torch.float64)
    ref[1, 1] = what
    here, there, none = ref.float(), ref.float().flip(1).roll(1, 0), torch.ones(3, 3)
    assert error_report(here, ref, here).ok
    assert "is missing in 1 elements, first at (1, 1)" in str(error_report(none, ref, here))
    assert not error_report(there.roll(1, 1), ref, here).ok
    unexpected = error_report(here, none.double(), none)
    assert "is unexpected in 1 elements, first at (1, 1)" in str(unexpected) and not unexpected.ok


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="they must agree"):
        error_report(torch.ones(2), torch.ones(3), torch.ones(3))


# -- the ground truth -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "columns", "empty_rows"])
def test_truth_agrees_with_sdpa_and_logsumexp(kind):
    q, k, v = make_inputs(heads=4, kv_heads=2, L=50, S=70, dtype=torch.float64)
    mask = random_layout(kind, 50, 70, heads=4).to_dense(True)
    out, lse = masked_attention(q, k, v, mask)
    seen = mask.any(-1)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, sdpa.where(seen[..., None], torch.zeros(())))
    scores = q @ k.repeat_interleave(2, 1).mT * 64**-0.5
    expected = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    assert (lse == -torch.inf).eq(~seen).all()


@pytest.mark.parametrize("kind", ["random", "columns", "empty_rows", "one_column"])
def test_plain_gradients_are_those_of_autograd(kind):
    """The algebra of a fused backward, in float64, against autograd through the eager softmax."""
    q, k, v = make_inputs(
        heads=4, kv_heads=2, L=33, S=47, value_dim=24, dtype=torch.float64, requires_grad=True
    )
    mask = random_layout(kind, 33, 47, heads=2).to_dense(True)
    out, lse = masked_attention(q, k, v, mask)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
    expected = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))
    for x, y in zip(plain_gradients((q, k, v), mask, grad_out, grad_lse), expected, strict=True):
        torch.testing.assert_close(x, y)


# -- inputs and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("strides", STRIDES)
def test_inputs_are_seeded_and_differ_only_in_memory(strides):
    kwargs = {"batch": 2, "heads": 4, "kv_heads": 2, "L": 9, "S": 11, "head_dim": 8, "value_dim": 4}
    plain, laid = make_inputs(**kwargs), make_inputs(**kwargs, strides=strides)
    for x, y in zip(plain, laid, strict=True):
        assert torch.equal(x, y) and y.stride(-1) == 1
        assert y.is_contiguous() == (strides == "contiguous")
    assert not torch.equal(plain[0], make_inputs(**kwargs, seed=1)[0])


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("L, S", [(1, 1), (40, 100), (100, 40)])
def test_layouts_are_legal_and_what_their_name_says(kind, L, S):
    layout = random_layout(kind, L, S, block_m=16, block_n=16, heads=3, batch=2)
    rows = layout.to_dense().flatten(0, 2).sum(-1)
    assert layout.to_dense().shape == (2, 3, L, S)
    if kind in ("full", "full_rows"):
        assert (rows == S).any()
    if kind == "empty_rows":
        assert (rows == 0).any()
    if kind == "one_column":
        assert (rows == 1).all()
    assert (layout.columns is not None) == ("column" in kind)


# -- wrong engines must be caught -----------------------------------------------------------------


class Wrong(ReferenceEngine):
    """The reference engine with one mistake in its results."""

    name = "wrong"

    def __init__(self, mistake):
        self.mistake = mistake

    def forward(self, call):
        out, lse, kept = super().forward(call)
        if self.mistake == "out":
            out[..., -1, 0] += 1e-4
        elif self.mistake == "unwritten":
            out[:, :, -1] = torch.nan
        elif self.mistake == "base 2 lse":
            lse = lse * 1.4427
        elif self.mistake == "kept":
            kept[..., -1] = 0
        return out, lse, kept

    def backward(self, call, lse, delta, kept, grad_out):
        grads = list(super().backward(call, lse, delta, kept, grad_out))
        if self.mistake in ("dq", "dk", "dv"):
            grads[("dq", "dk", "dv").index(self.mistake)] *= 1 + 1e-4
        return tuple(grads)


@pytest.mark.parametrize("mistake", ["out", "unwritten", "base 2 lse", "kept", "dq", "dk", "dv", None])
def test_check_engine_catches(mistake, monkeypatch):
    monkeypatch.setitem(ENGINES, "wrong", Wrong(mistake))
    q, k, v = make_inputs(L=40, S=64)
    layout = SparseLayout.full(40, 64, block_m=16, block_n=16)

    def run():
        check_engine(q, k, v, Plan(layout), engine="wrong", is_causal=True, grad=True)

    if mistake is None:
        run()
        return
    named = {"unwritten": "out: NaN is unexpected", "base 2 lse": "lse: worst error"}.get(mistake, mistake)
    with pytest.raises(AssertionError, match=named):
        run()


@pytest.mark.parametrize("flip", ["keep a far tile", "drop a near tile"])
def test_a_wrong_vote_is_caught(flip):
    q, k, _ = make_inputs(L=32, S=96)
    k[:, :, 32:64] *= 0.01
    plan = Plan(SparseLayout.full(32, 96, block_m=32, block_n=32), torch.full((1, 2), -1.5))
    kept = torch.tensor([1, 0, 1], dtype=torch.uint8).expand(1, 2, 1, 3).clone()
    assert_kept(kept, *tile_margins(q * 3, k, plan, kept))
    kept[0, 1, 0, 1 if flip.startswith("keep") else 2] ^= 1
    with pytest.raises(AssertionError, match="1 of 6 votes are wrong"):
        assert_kept(kept, *tile_margins(q * 3, k, plan, kept))
