"""The CPU engine's forward on AMX tiles: exact to float32, and what tiles cannot hold goes to vectors."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn import Plan, SparseLayout, attend
from sparse_attn.engines import ENGINES
from sparse_attn.testing import check_engine, make_inputs, masked_attention, random_layout

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def instruction_set() -> str:
    return "" if ENGINES["cpu"].why_off() else ENGINES["cpu"].instruction_set()


pytestmark = pytest.mark.skipif(instruction_set() != "amx", reason="this machine has no AMX tiles")


def forward(inputs, plan, isa, monkeypatch, **options):
    monkeypatch.setenv("SPARSE_ATTN_CPU_ISA", isa)
    return attend(*inputs, plan, engine="cpu", **options)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("block", [(24, 20), (64, 64), (300, 200)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_blocks_and_columns(block, dtype):
    """Runs that begin and end anywhere in a group of 32 keys, head sizes that fill no tile."""
    inputs = make_inputs(heads=2, kv_heads=1, L=133, S=401, head_dim=40, value_dim=72, dtype=dtype)
    layout = random_layout("columns", 133, 401, block_m=block[0], block_n=block[1], heads=2)
    check_engine(*inputs, Plan(layout), engine="cpu", is_causal=True)
    check_engine(*inputs, Plan(layout), engine="cpu", scale=-0.3)


@pytest.mark.parametrize("block", [(16, 32), (64, 64), (128, 200)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_a_skip(block):
    """One panel, several, and tiles whose scores are computed twice."""
    q, k, v = make_inputs(heads=2, L=233, S=401, head_dim=64)
    k[:, :, 130:400] *= 0.01
    layout = SparseLayout.full(233, 401, block_m=block[0], block_n=block[1])
    limit = torch.full((1, 2), math.log(0.3))
    got = check_engine(3 * q, k, v, Plan(layout, limit), engine="cpu", is_causal=True)
    listed = check_engine(3 * q, k, v, Plan(layout), engine="cpu", is_causal=True)
    assert 0 < got.kept.sum() < listed.kept.sum(), "the case skips nothing, or everything"


def test_as_exact_as_float32(monkeypatch):
    """Large scores, where a piece of 8 or 16 bits left out would show."""
    q, k, v = make_inputs(heads=2, L=512, S=512, head_dim=128)
    plan, mask = Plan(SparseLayout.full(512, 512)), torch.ones(512, 512, dtype=torch.bool)
    exact, _ = masked_attention(4 * q, k, v, mask)
    errors = []
    for isa in ("amx", "avx512"):
        difference = forward((4 * q, k, v), plan, isa, monkeypatch).out - exact
        errors.append(difference.pow(2).mean().sqrt())
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("number", [math.inf, math.nan, 1e38, 1e-35], ids=["inf", "nan", "large", "small"])
def test_numbers_that_tiles_cannot_hold(where, number, monkeypatch):
    """Their heads (of a query: their blocks) are computed on vectors, the others are not."""
    inputs = make_inputs(heads=2, L=256, S=256, head_dim=64)
    inputs[where][0, 1, 70, 3] = number
    plan = Plan(SparseLayout.full(256, 256, block_m=64))
    tiles, vectors = (forward(inputs, plan, isa, monkeypatch).out for isa in ("amx", "avx512"))
    changed = slice(64, 128) if where == 0 else slice(None)
    torch.testing.assert_close(tiles[:, 1, changed], vectors[:, 1, changed], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(tiles[:, 0], vectors[:, 0]), "the other head was computed on vectors too"


def test_any_number_of_threads_gives_the_same_bits():
    inputs = make_inputs(batch=2, heads=4, kv_heads=2, L=600, S=700, head_dim=32)
    inputs[1][0, 0, 5] = math.inf
    plan = Plan(random_layout("columns", 600, 700, batch=2, heads=4, column_group=3))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(*inputs, plan, engine="cpu", is_causal=True, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].out.nan_to_num(), other.out.nan_to_num())


def test_gradients_have_the_forward_of_vectors(monkeypatch):
    """The backward computes scores again on vectors: they must be the forward's to the last bit."""
    inputs = make_inputs(heads=2, L=256, S=256, head_dim=64)
    plan = Plan(SparseLayout.full(256, 256))
    vectors = forward(inputs, plan, "avx512", monkeypatch)
    trained = forward([x.requires_grad_() for x in inputs], plan, "amx", monkeypatch)
    assert torch.equal(vectors.out, trained.out) and torch.equal(vectors.lse, trained.lse)
