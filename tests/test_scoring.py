"""Pooled block scores against the whole softmax in float64, in portable PyTorch and in Triton."""

from __future__ import annotations

import os
from math import ceil

import pytest
import torch

from sparse_attn.functional import sparse_attention
from sparse_attn.layout import SparseLayout
from sparse_attn.scoring import _CHUNK, block_mass, block_sizes, row_lse
from sparse_attn.testing import make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_of(q, k, scale, is_causal, key_range):
    """float64 [B, Hq, L, S], -inf where masked."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    L, S = q.shape[2], k.shape[2]
    s = q @ k.mT * scale
    key = torch.arange(S, device=q.device)
    if is_causal:
        s = s.masked_fill(key > torch.arange(L, device=q.device)[:, None] + S - L, -torch.inf)
    if key_range is not None:
        start, end = (torch.as_tensor(x, device=q.device).view(-1, 1, 1, 1) for x in key_range)
        s = s.masked_fill((key < start) | (key >= end), -torch.inf)
    return s


def expected_mass(s, lse, block_m, block_n):
    p = torch.where(s == -torch.inf, 0.0, torch.exp(s - lse[..., None].double()))
    L, S = p.shape[2:]
    Lb, Sb = ceil(L / block_m), ceil(S / block_n)
    mass = torch.zeros(*p.shape[:2], Lb, Sb, dtype=torch.float64, device=p.device)
    for i in range(Lb):
        for j in range(Sb):
            rows, cols = slice(i * block_m, (i + 1) * block_m), slice(j * block_n, (j + 1) * block_n)
            mass[:, :, i, j] = p[:, :, rows, cols].sum((2, 3))
    return mass


SHAPES = {
    "one": {"L": 1, "S": 1},
    "ragged": {"L": 63, "S": 63},
    "long_keys": {"L": 63, "S": 127},
    "long_queries": {"L": 127, "S": 63},
    "gqa": {"L": 65, "S": 65, "heads": 6, "kv_heads": 2},
    "batch": {"L": 40, "S": 70, "batch": 2},
}
RANGES = {"all": None, "head": (0, 33), "tail": (17, 10**6), "middle": (16, 48), "empty": (5, 5)}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("key_range", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mass_and_lse_are_the_softmax_of_the_range(shape, key_range, is_causal) -> None:
    q, k, _ = make_inputs(**shape, head_dim=32, dtype=torch.float64)
    if key_range is not None:
        key_range = tuple(min(x, k.shape[2]) for x in key_range)
    s = logits_of(q, k, 0.3, is_causal, key_range)
    how = {"scale": 0.3, "is_causal": is_causal, "key_range": key_range}
    lse = row_lse(q, k, **how)
    torch.testing.assert_close(lse, s.logsumexp(-1))
    for block_m, block_n in ((16, 16), (32, 8), (10, 48)):
        mass = block_mass(q, k, block_m=block_m, block_n=block_n, **how)
        torch.testing.assert_close(mass, expected_mass(s, lse, block_m, block_n))
        visible_queries = (s > -torch.inf).any(-1).sum(-1)
        torch.testing.assert_close(mass.sum((2, 3)), visible_queries.double())


def test_dense_lse_of_attend_normalises_every_row() -> None:
    q, k, v = make_inputs(L=100, S=130, heads=4, kv_heads=2, head_dim=64)
    layout = SparseLayout.full(100, 130, block_m=32, block_n=32)
    _, lse = sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True, return_lse=True)
    mass = block_mass(q, k, lse, block_m=32, block_n=32, scale=0.125, is_causal=True)
    sizes = torch.tensor([32.0, 32.0, 32.0, 4.0])
    torch.testing.assert_close(mass.sum(-1), sizes.expand(1, 4, 4))
    assert mass.dtype == torch.float32


def test_range_per_row_of_the_batch() -> None:
    q, k, _ = make_inputs(batch=3, L=70, head_dim=16, dtype=torch.float64)
    start, end = torch.tensor([0, 20, 64]), torch.tensor([64, 64, 70])
    s = logits_of(q, k, 0.25, False, (start, end))
    mass = block_mass(q, k, block_m=16, block_n=16, scale=0.25, key_range=(start, end))
    torch.testing.assert_close(mass, expected_mass(s, s.logsumexp(-1), 16, 16))


def test_per_kv_head_sums_the_group() -> None:
    q, k, _ = make_inputs(batch=2, heads=6, kv_heads=2, L=50, head_dim=16)
    how = {"block_m": 16, "block_n": 16, "scale": 0.25}
    apart = block_mass(q, k, **how)
    shared = block_mass(q, k, per_kv_head=True, **how)
    torch.testing.assert_close(shared, apart.view(2, 2, 3, 4, 4).sum(2))


def test_block_sizes_are_cut_at_the_ends() -> None:
    sizes = block_sizes(70, 33, 32, 16)
    assert sizes.tolist() == [[512, 512, 32], [512, 512, 32], [96, 96, 6]]


def test_several_chunks_agree_with_one(monkeypatch) -> None:
    q, k, _ = make_inputs(heads=2, L=300, S=290, head_dim=16, dtype=torch.float64)
    how = {"block_m": 16, "block_n": 32, "scale": 0.25, "is_causal": True, "key_range": (40, 280)}
    one = block_mass(q, k, **how)
    monkeypatch.setattr("sparse_attn.scoring._CHUNK", 64 * 64)
    torch.testing.assert_close(block_mass(q, k, **how), one)
    assert _CHUNK > 300 * 290  # that `one` was one chunk a head


def test_strided_inputs_autocast_and_grad_do_not_change_the_scores() -> None:
    q, k, _ = make_inputs(L=65, head_dim=32)
    how = {"block_m": 32, "block_n": 32, "scale": 0.2}
    plain = block_mass(q, k, **how)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = block_mass(*strided, **how)
    assert not other.requires_grad
    torch.testing.assert_close(other, plain)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_kernels_agree_with_float64(shape, is_causal, dtype) -> None:
    pool = triton_kernels()
    assert pool.fits(torch.empty(1, 1, 1, 24, dtype=dtype, device=DEVICE), 64, 16)
    q, k, _ = make_inputs(**shape, head_dim=24, dtype=dtype, device=DEVICE, strides="blhd")
    B, S = q.shape[0], k.shape[2]
    start = torch.arange(B, dtype=torch.int32, device=DEVICE) * 7
    end = torch.full((B,), S, dtype=torch.int32, device=DEVICE)
    s = logits_of(q, k, 0.2, is_causal, (start, end))
    lse = pool.row_lse(q, k, 0.2, is_causal, start, end)
    torch.testing.assert_close(lse, s.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
    for block_m, block_n in ((16, 32), (64, 16)):
        mass = pool.block_mass(q, k, lse, block_m, block_n, 0.2, is_causal, start, end)
        expected = expected_mass(s, s.logsumexp(-1), block_m, block_n)
        torch.testing.assert_close(mass, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3], ids=str)
def test_triton_kernels_take_any_scale(scale) -> None:
    pool = triton_kernels()
    q, k, _ = make_inputs(L=40, head_dim=16, device=DEVICE)
    bounds = [torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (3, 33)]
    s = logits_of(q, k, 1.0, True, bounds)
    s = torch.where(s == -torch.inf, s, s * scale)
    lse = pool.row_lse(q, k, scale, True, *bounds)
    torch.testing.assert_close(lse, s.logsumexp(-1).float())
    mass = pool.block_mass(q, k, lse, 16, 16, scale, True, *bounds)
    torch.testing.assert_close(mass, expected_mass(s, s.logsumexp(-1), 16, 16).float())


def triton_kernels():
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    from sparse_attn.kernels import pool

    return pool


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: scoring.py picks the kernels by device")
@pytest.mark.parametrize(
    ("block", "head_dim", "dtype", "is_causal"),
    [
        (16, 64, torch.bfloat16, False),
        (32, 128, torch.bfloat16, True),
        (64, 128, torch.float32, True),
        (128, 128, torch.bfloat16, False),
        (128, 256, torch.bfloat16, True),
        (128, 256, torch.float32, False),  # too wide for the kernels: the portable road
        (48, 64, torch.bfloat16, False),  # not a power of two: the portable road
    ],
    ids=str,
)
def test_gpu_road_agrees_with_the_portable_one(block, head_dim, dtype, is_causal) -> None:
    q, k, _ = make_inputs(batch=2, heads=4, kv_heads=2, L=1000, head_dim=head_dim, dtype=dtype)
    how = {"block_m": block, "block_n": block, "scale": head_dim**-0.5, "is_causal": is_causal}
    bounds = (torch.tensor([0, 300]), torch.tensor([777, 1000]))
    expected = block_mass(q, k, key_range=bounds, **how)
    on_gpu = block_mass(q.cuda(), k.cuda(), key_range=tuple(x.cuda() for x in bounds), **how)
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: memory and synchronisation are CUDA's")
def test_memory_and_no_synchronisation_at_128k() -> None:
    q, k, _ = make_inputs(heads=32, kv_heads=8, L=131072, head_dim=128, dtype=torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mass = block_mass(q, k, block_m=128, block_n=128, scale=128**-0.5, key_range=(130000, 131072))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2**28
    torch.testing.assert_close(mass.sum(-1), torch.full_like(mass[..., 0], 128.0), rtol=1e-4, atol=0)
