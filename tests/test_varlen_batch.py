"""Sequences over pages that share an engine's call: the bits of their own calls, in as few as can be."""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch

from sparse_attn import SparseLayout, sparse_attention_paged, sparse_attention_varlen, varlen_batch
from sparse_attn.engines import ENGINES

HQ, HKV, D, DV = 4, 2, 32, 24
DECODING = [(1, 300), (1, 1), (1, 128), (1, 129), (1, 37)]
DRAFTS = [(3, 200), (1, 300), (2, 131), (16, 258), (2, 2), (1, 128)]  # speculative decoding
PROMPTS = [(150, 150), (70, 70), (130, 258), (40, 168), (97, 134), (60, 97), (20, 148)]
ODD = [(0, 30), (5, 0), (20, 8)]  # no queries, no keys, more queries than keys
KINDS = {
    "dense": {},
    "blasst": {"method": "blasst", "threshold": 0.3},
    "blasst by head": {
        "method": "blasst", "threshold": torch.tensor([0.0, 0.5, 1.0, 0.1]), "block_m": 64, "block_n": 64,
    },
    "s2": {"method": "s2", "block_size": 32, "local_blocks": 1, "vert_stride": 3, "sink_blocks": 1},
    "s2 by query head": {
        "method": "s2", "block_size": 16, "local_blocks": 2, "vert_stride": 4, "per_query_head": True,
    },
    "anchor": {"method": "anchor", "theta": 2.0, "block_size": 32, "step": 2},
}  # fmt: skip


@pytest.fixture
def together(monkeypatch):
    """Prompts and votes too share calls, as on a GPU."""
    monkeypatch.setattr(varlen_batch, "launches_cost", lambda device: True)


class Batch:
    """Sequences with (queries, keys) in shuffled pages; what is no key of theirs holds NaN."""

    def __init__(self, lengths, page=16, dtype=torch.float32):
        generator = torch.Generator().manual_seed(len(lengths))
        self.q_lens, self.k_lens = (list(x) for x in zip(*lengths, strict=True))
        most = max(-(-S // page) for S in self.k_lens) + 1
        pages = torch.randperm(len(lengths) * most + 1, generator=generator)[1:].view(-1, most)
        cache = torch.full((pages.numel() + 1, HKV, page, D + DV), torch.nan, dtype=dtype).transpose(1, 2)
        self.k_cache, self.v_cache = cache[..., :D], cache[..., D:]
        self.query = (torch.randn(sum(self.q_lens), HQ, D, generator=generator) * 2).to(dtype)
        tokens = torch.randn(sum(self.k_lens), HKV, D + DV, generator=generator).to(dtype)
        self.key, self.value = tokens[..., :D], tokens[..., D:]
        for n, own in enumerate(tokens.split(self.k_lens)):
            at = torch.arange(len(own))
            cache[pages[n, at // page], at % page] = own
        used = torch.tensor(self.k_lens)[:, None]
        self.table = pages.where(torch.arange(most) * page < used, -1).to(torch.int32)
        self.cu_q, self.cu_k = ([0, *accumulate(x)] for x in (self.q_lens, self.k_lens))

    def paged(self, **options):
        how = {"is_causal": True, "enable_gqa": True, "return_lse": True, "engine": "cpu", **options}
        where = {"cu_seqlens_q": self.cu_q, "block_table": self.table, "seqused_k": self.k_lens}
        return sparse_attention_paged(self.query, self.k_cache, self.v_cache, **where, **how)

    def apart(self, **options):
        """One call a sequence, on packed keys."""
        how = {"is_causal": True, "enable_gqa": True, "return_lse": True, "engine": "cpu", **options}
        where = {"cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k}
        return sparse_attention_varlen(self.query, self.key, self.value, **where, **how)

    def check(self, **options):
        for got, own in zip(self.paged(**options), self.apart(**options), strict=True):
            assert torch.equal(got, own)


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize(("kind", "page"), [*((kind, 16) for kind in KINDS), ("blasst", 48), ("s2", 256)])
def test_mixed_batches_give_the_bits_of_calls_of_their_own(kind, page, calls, together, monkeypatch):
    if kind == "s2":
        monkeypatch.setenv("SPARSE_ATTN_DEBUG", "1")  # layouts are checked
    lengths = [*DECODING, *PROMPTS, *ODD, *DRAFTS]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(page)).tolist()
    Batch([lengths[n] for n in order], page).check(**KINDS[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "blasst", "s2"])
def test_any_instruction_set(kind, dtype, calls, together, monkeypatch):
    """Sums on AMX tiles may come in another order."""
    monkeypatch.delenv("SPARSE_ATTN_CPU_ISA")
    batch = Batch([*DECODING, *DRAFTS, *PROMPTS], dtype=dtype)
    near = 4e-6 if dtype == torch.float32 else 2**-7  # of outputs up to 4: a last bit
    for got, own in zip(batch.paged(**KINDS[kind]), batch.apart(**KINDS[kind]), strict=True):
        torch.testing.assert_close(got, own, atol=near, rtol=2**-8 if near > 1e-3 else 0)


def test_bf16(calls, together):
    Batch([*DECODING, *PROMPTS], dtype=torch.bfloat16).check(**KINDS["blasst"])


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "anchor"])
def test_decoding_is_one_call(kind, calls, request):
    if "blasst" in kind:
        request.getfixturevalue("together")
    batch = Batch(DECODING)
    batch.paged(**KINDS[kind])
    assert len(calls) == 1
    if "blasst" not in kind:
        assert calls[0].v.shape[0] == 1  # all keys on one axis, none of them padding but for whole blocks
    calls.clear()
    Batch([(2, 200), (3, 301), (2, 70)]).paged(**KINDS[kind])  # no sequence straddles two units of keys
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize("by_query_head", [False, True])
def test_decoding_leaves_out_the_keys_that_a_head_does_not_need(by_query_head, calls):
    """One of six blocks and the window; with a pattern for each query head one of three for a key head."""
    options = {**KINDS["s2"], "vert_stride": 6, "block_size": 16, "per_query_head": by_query_head}
    batch = Batch([(1, 1000), (2, 700), (1, 9)])
    batch.check(**options)
    most = calls[0].k.shape[2]
    assert len(calls) == 1 + 3 and most < 1709 / (2 if by_query_head else 4)


@pytest.mark.parametrize(("kind", "expected"), [("dense", 2), ("blasst", 2), ("s2", 2), ("anchor", 2)])
def test_prompts_share_calls(kind, expected, calls, together):
    """Dense ones whatever their prefix, but very unequal lengths are not padded to each other; others where
    their prefixes agree in the remainder by 128, which is 0 or 37 here."""
    batch = Batch(PROMPTS)
    batch.paged(**KINDS[kind])
    assert len(calls) == expected < len(PROMPTS)


def test_prompts_and_votes_have_calls_of_their_own_on_a_cpu(calls):
    Batch(PROMPTS).paged(**KINDS["s2"])
    Batch(DECODING).paged(**KINDS["blasst"])
    assert len(calls) == len(PROMPTS) + len(DECODING)


def test_sparse_and_dense_sequences_in_one_batch(calls, together):
    batch, kind = Batch([*DECODING, *PROMPTS]), KINDS["s2"]
    batch.check(**kind, sparse_if=lambda L, S: L > 1)
    calls.clear()
    batch.paged(**kind, sparse_if=lambda L, S: L > 1)
    assert [call.layout.block_n for call in calls].count(128) == 1


def test_without_causality(calls):
    """Decoding shares a call; drafts see all keys, as every query does."""
    batch = Batch([*DECODING, (3, 200), (40, 90)])
    batch.check(is_causal=False)
    calls.clear()
    batch.paged(is_causal=False)
    assert len(calls) == 2


def test_gathered_keys_are_bounded(calls, monkeypatch, together):
    batch = Batch([*DECODING, *PROMPTS])
    expected = batch.paged(**KINDS["s2"])
    num_calls = len(calls)
    calls.clear()
    monkeypatch.setitem(varlen_batch.MAX_BYTES, "cpu", 600 * HKV * (D + DV) * 4)
    assert all(map(torch.equal, batch.paged(**KINDS["s2"]), expected))
    assert len(calls) > num_calls
    assert all(call.k.shape[0] * call.k.shape[2] <= 600 for call in calls)


def test_layouts_of_the_caller(calls, together):
    """A layout for each pair of lengths; one that does not fit is refused with the sequence's number."""

    def layout(L, S):
        return SparseLayout.window(L, S, block_m=32, block_n=32, left=1)

    batch = Batch([*DECODING, *PROMPTS])
    batch.check(layout=layout)
    with pytest.raises(
        ValueError, match=r"sequence 2 \(1 queries, 128 keys\): .*the layout is for L=1, S=64"
    ):
        batch.paged(layout=lambda L, S: layout(L, 64 if S == 128 else S))


def test_the_triton_engine(together):
    if reasons := ENGINES["triton"].why_off():
        pytest.skip("; ".join(reasons))
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the batches are on the CPU, where Triton runs in its interpreter only")
    small = {"blasst": {"block_m": 32, "block_n": 32}, "s2": {}}
    for kind, lengths in (("blasst", [(1, 40), (1, 3)]), ("s2", [(1, 40), (1, 3), (18, 18), (17, 17)])):
        batch, options = Batch(lengths), {**KINDS[kind], **small[kind]}
        out, lse = batch.paged(**options, engine="triton")
        ref_out, ref_lse = batch.apart(**options, engine="reference")
        torch.testing.assert_close(out, ref_out, atol=3e-6, rtol=0)
        torch.testing.assert_close(lse, ref_lse, atol=3e-6, rtol=0)


def test_a_trusted_table_is_not_checked(calls):
    batch = Batch([(1, 40), (1, 20)])
    expected = batch.paged()
    assert all(map(torch.equal, batch.paged(trust_table=True), expected))
    batch.table[1, 1] = len(batch.k_cache)
    with pytest.raises(ValueError, match=r"block_table\[1, 1\] is"):
        batch.paged()
    with pytest.raises(IndexError):  # torch's own; on a GPU an assertion of the device
        batch.paged(trust_table=True)


def test_results_may_be_written_to_a_tensor_of_the_caller(calls):
    batch = Batch([*DECODING, (0, 9), (2, 0), (40, 90)])
    expected = batch.paged(return_lse=False)
    out = torch.full((len(batch.query), 2 * HQ, DV), torch.nan)[:, ::2]
    assert batch.paged(return_lse=False, out=out) is out
    assert torch.equal(out, expected)
    with pytest.raises(
        ValueError, match=r"out is \(47, 4, 16\) torch.float32 on cpu; it must be \(47, 4, 24\)"
    ):
        batch.paged(out=out[..., :16])
