"""Packed and paged inputs: every sequence gets what masked attention over its own keys gives, and the
very bits that it gets in a call of its own."""

from __future__ import annotations

import math
import re
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from peak_bytes import PeakBytes

import sparse_attn as sa
from sparse_attn import (
    LayoutCache,
    SparseDConfig,
    SparseLayout,
    sparse_attention_paged,
    sparse_attention_varlen,
)
from sparse_attn.engines import ENGINES
from sparse_attn.methods import METHODS, Context
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.blasst import full_layout
from sparse_attn.methods.s2 import S2Config, s2_layout
from sparse_attn.testing import assert_close, kept_mask, masked_attention, orders
from sparse_attn.varlen_pages import needed_pages

# Ragged on purpose: no queries, no keys, decoding, a whole prompt, a chunk over a longer cache, and more
# queries than keys.
Q_LENS = (5, 0, 1, 40, 33, 7, 1, 20)
K_LENS = (5, 9, 50, 40, 70, 0, 1, 12)
HQ, HKV, D, DV = 4, 2, 16, 24
METHOD_CONFIGS = {
    "blasst": {"threshold": 0.8, "block_m": 2, "block_n": 4},
    "anchor": {"theta": 1.0, "block_size": 8, "step": 2},
    "s2": {"block_size": 8, "local_blocks": 1, "vert_stride": 2},
}
methods = pytest.mark.parametrize("method", list(METHOD_CONFIGS))


@pytest.fixture(params=["reference", "cpu"])
def engine(request) -> str:
    reasons = ENGINES[request.param].why_off()
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def cumulative(lengths) -> list[int]:
    return [0, *accumulate(lengths)]


def packed(q_lens=Q_LENS, k_lens=K_LENS, dtype=torch.float32, requires_grad=False, seed=0):
    """query [T, Hq, D], key [Tk, Hkv, D] and value [Tk, Hkv, Dv]; key and value as one fused projection
    gives them, so that neither is contiguous."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(q_lens), HQ, D, generator=generator).to(dtype)
    fused = torch.randn(sum(k_lens), HKV, D + DV, generator=generator).to(dtype)
    key, value = fused[..., :D], fused[..., D:]
    return [x.detach().requires_grad_(requires_grad) for x in (query, key, value)]


def each(query, key, value, q_lens=Q_LENS, k_lens=K_LENS):
    """Yields (number, slice of T, q, k, v), the last three as (1, H, length, dim), of each sequence."""
    spans = zip(pairwise(cumulative(q_lens)), pairwise(cumulative(k_lens)), strict=True)
    for n, ((a, b), (c, d)) in enumerate(spans):
        views = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        yield n, slice(a, b), *views


def causal_mask(L, S):
    return torch.ones(1, 1, L, S, dtype=torch.bool).tril(S - L)


def check_sequence(out, lse, q, k, v, mask):
    """out [L, Hq, Dv] and lse [Hq, L] of one sequence against masked attention."""
    L, S = q.shape[2], k.shape[2]
    if L == 0:
        assert out.shape[:2] == (0, HQ)
        return
    if S == 0:
        assert (out == 0).all() and (lse == -torch.inf).all()
        return
    mask = torch.ones(1, 1, L, S, dtype=torch.bool) if mask is None else mask
    ref_out, ref_lse = masked_attention(q, k, v, mask)
    # So few elements that the yardstick is plain PyTorch in several orders of summation.
    plain = [masked_attention(*inputs, m, dtype=q.dtype) for inputs, m, _, _ in orders((q, k, v), mask)]
    plain_out, plain_lse = zip(*plain, strict=True)
    assert_close(out.transpose(0, 1)[None], ref_out, plain_out, "out")
    assert_close(lse[None], ref_lse, plain_lse, "lse")


# -- packed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_equals_masked_attention(engine, is_causal, dtype):
    tensors = packed(dtype=dtype)
    out, lse = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=torch.tensor(cumulative(K_LENS)),
        is_causal=is_causal, enable_gqa=True, return_lse=True, engine=engine,
    )  # fmt: skip
    assert out.shape == (sum(Q_LENS), HQ, DV) and out.dtype == dtype
    assert lse.shape == (HQ, sum(Q_LENS)) and lse.dtype == torch.float32
    for _, span, q, k, v in each(*tensors):
        mask = causal_mask(q.shape[2], k.shape[2]) if is_causal else None
        check_sequence(out[span], lse[:, span], q, k, v, mask)


def test_triton_engine_runs():
    reasons = ENGINES["triton"].why_off()
    if reasons:
        pytest.skip("; ".join(reasons))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lens = ((3, 0, 17), (9, 4, 17))
    tensors = [x.to(device) for x in packed(*lens)]
    out, lse = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(lens[0]), cu_seqlens_k=cumulative(lens[1]),
        layout=lambda L, S: SparseLayout.full(L, S, block_m=16, block_n=16, device=device),
        is_causal=True, enable_gqa=True, return_lse=True, engine="triton",
    )  # fmt: skip
    for _, span, q, k, v in each(*(x.cpu() for x in tensors), *lens):
        check_sequence(out[span].cpu(), lse[:, span].cpu(), q, k, v, causal_mask(q.shape[2], k.shape[2]))


def test_layout_is_made_once_for_each_pair_of_lengths(engine):
    lens = ((30, 12, 30, 30), (30, 40, 30, 41))
    tensors = packed(*lens)
    made = {}

    def layout(L, S):
        assert (L, S) not in made, "made twice"
        made[L, S] = SparseLayout.window(L, S, block_m=8, block_n=8, left=1)
        return made[L, S]

    out, lse = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(lens[0]), cu_seqlens_k=cumulative(lens[1]), layout=layout,
        is_causal=True, enable_gqa=True, return_lse=True, engine=engine,
    )  # fmt: skip
    assert set(made) == {(30, 30), (12, 40), (30, 41)}
    for _, span, q, k, v in each(*tensors, *lens):
        mask = made[q.shape[2], k.shape[2]].to_dense(True)
        check_sequence(out[span], lse[:, span], q, k, v, mask)


def method_mask(method, q, k, v, engine):
    """bool [1, H, L, S]: what the method's selector (and, for BLASST, the vote) keeps for one sequence."""
    config = METHODS[method].config(**METHOD_CONFIGS[method])
    scale = q.shape[-1] ** -0.5
    plan = METHODS[method].select(q, k, config, is_causal=True, scale=scale, context=Context())
    if plan.skip_below is None:
        return plan.layout.to_dense(True)
    result = sa.attend(q, k, v, plan, is_causal=True, enable_gqa=True, engine=engine, want_kept=True)
    return kept_mask(plan.layout, result.kept, True)


@methods
def test_method_reads_what_its_selector_names(method, engine):
    tensors = packed()
    out, lse = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(K_LENS), method=method,
        is_causal=True, enable_gqa=True, return_lse=True, engine=engine, **METHOD_CONFIGS[method],
    )  # fmt: skip
    dropped = 0
    for _, span, q, k, v in each(*tensors):
        mask = None
        if q.shape[2] and k.shape[2]:
            mask = method_mask(method, q, k, v, engine)
            dropped += (causal_mask(q.shape[2], k.shape[2]) & ~mask).sum().item()
        check_sequence(out[span], lse[:, span], q, k, v, mask)
    assert dropped > 100, "a test in which the method drops nothing says little"


@methods
def test_a_sequence_gets_the_bits_of_its_own_call(method, engine):
    tensors = packed()
    options = {"enable_gqa": True, "engine": engine, "scale": 0.4} | METHOD_CONFIGS[method]
    out = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(K_LENS), method=method, **options
    )
    for _, span, q, k, v in each(*tensors):
        if q.shape[2] and k.shape[2]:
            alone = getattr(sa, f"{method}_attention")(q, k, v, **options)
            assert torch.equal(out[span], alone[0].transpose(0, 1))


@pytest.mark.parametrize("method", [None, "anchor", "s2", "blasst"])
def test_gradients(method, engine):
    """As masked attention of each sequence alone; keys that no query reads get 0."""
    tensors = packed(requires_grad=True)
    options = {} if method is None else {"method": method, **METHOD_CONFIGS[method]}
    out, lse = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(K_LENS), is_causal=True,
        enable_gqa=True, return_lse=True, engine=engine, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (torch.randn(x.shape, generator=generator) for x in (out, lse))
    grad_lse[lse == -torch.inf] = 0
    grads = torch.autograd.grad([out, lse], tensors, [grad_out, grad_lse])
    references = {}
    for dtype in (torch.float64, torch.float32):
        copies = [x.detach().to(dtype).requires_grad_() for x in tensors]
        loss = torch.zeros((), dtype=dtype)
        for _, span, q, k, v in each(*copies):
            if not q.shape[2] or not k.shape[2]:
                continue
            L, S = q.shape[2], k.shape[2]
            plain = [x.detach().float() for x in (q, k, v)]
            mask = causal_mask(L, S) if method is None else method_mask(method, *plain, engine)
            mask = mask.repeat_interleave(HQ // mask.shape[1], 1)
            seen = mask.any(-1)
            # Queries that see nothing are left out: softmax of nothing has no gradient to compare with.
            one = masked_attention(q, k, v, mask | ~mask.any(-1, keepdim=True), dtype=dtype)
            loss = loss + (one[0] * seen[..., None] * grad_out[span].transpose(0, 1).to(dtype)).sum()
            loss = loss + (one[1].to(dtype) * seen * grad_lse[:, span].to(dtype)).sum()
        references[dtype] = torch.autograd.grad(loss, copies)
    for name, got, ref, plain in zip("qkv", grads, *references.values(), strict=True):
        assert_close(got, ref, plain, f"grad of {name}")
    unread = slice(5, 14)  # the keys of sequence 1, which has no queries
    assert (grads[1][unread] == 0).all() and (grads[2][unread] == 0).all()


def test_seqused_k_cuts_a_sequence(engine):
    room = (20, 20, 20)
    q_lens, used = (3, 1, 8), (20, 7, 0)
    query, key, value = packed(q_lens, room)
    key[27:40], value[27:40], value[40:] = torch.nan, torch.nan, torch.nan  # never to be read
    out, lse = sparse_attention_varlen(
        query, key, value, cu_seqlens_q=cumulative(q_lens), cu_seqlens_k=cumulative(room),
        seqused_k=torch.tensor(used, dtype=torch.int32), is_causal=True, enable_gqa=True, return_lse=True,
        engine=engine,
    )  # fmt: skip
    for n, span, q, k, v in each(query, key, value, q_lens, room):
        k, v = k[:, :, : used[n]], v[:, :, : used[n]]
        check_sequence(out[span], lse[:, span], q, k, v, causal_mask(q.shape[2], used[n]))


def test_sparse_if_keeps_the_others_dense():
    tensors, chosen = packed(), []

    def sparse_if(L, S):
        chosen.append((L, S))
        return L > 1

    cu = {"cu_seqlens_q": cumulative(Q_LENS), "cu_seqlens_k": cumulative(K_LENS), "enable_gqa": True}
    s2 = {"method": "s2", **METHOD_CONFIGS["s2"]}
    mixed = sparse_attention_varlen(*tensors, **cu, **s2, sparse_if=sparse_if)
    sparse = sparse_attention_varlen(*tensors, **cu, **s2)
    dense = sparse_attention_varlen(*tensors, **cu, is_causal=True)
    assert chosen == [(5, 5), (1, 50), (40, 40), (33, 70), (1, 1), (20, 12)]
    decode = slice(5, 6)
    assert torch.equal(mixed[decode], dense[decode]) and not torch.equal(sparse[decode], dense[decode])
    rest = torch.arange(len(mixed)) != 5
    assert torch.equal(mixed[rest], sparse[rest]) and not torch.equal(sparse[rest], dense[rest])


def test_is_causal_defaults_to_that_of_the_method_s_own_operator():
    tensors = packed((20,), (20,))
    cu = {"cu_seqlens_q": [0, 20], "cu_seqlens_k": [0, 20], "enable_gqa": True}

    def attend(**kwargs):
        return sparse_attention_varlen(*tensors, **cu, **kwargs)

    s2 = {"method": "s2", **METHOD_CONFIGS["s2"]}
    assert torch.equal(attend(**s2), attend(**s2, is_causal=True))
    assert not torch.equal(attend(**s2), attend(**s2, is_causal=False))
    blasst = {"method": "blasst", **METHOD_CONFIGS["blasst"]}
    assert torch.equal(attend(**blasst), attend(**blasst, is_causal=False))
    assert torch.equal(attend(), attend(is_causal=False))


def test_config_object_and_registry_entry():
    tensors = packed()
    cu = {"cu_seqlens_q": cumulative(Q_LENS), "cu_seqlens_k": cumulative(K_LENS), "enable_gqa": True}
    by_name = sparse_attention_varlen(*tensors, **cu, method="anchor", **METHOD_CONFIGS["anchor"])
    config = AnchorConfig(**METHOD_CONFIGS["anchor"])
    assert torch.equal(
        by_name, sparse_attention_varlen(*tensors, **cu, method=METHODS["anchor"], config=config)
    )


def test_each_sequence_has_its_own_context_and_cache():
    """SparseD with one cache a sequence: the pattern found at one step serves that sequence later."""
    lens = (24, 40)
    tensors = packed(lens, lens)
    caches = [LayoutCache(), LayoutCache()]
    config = SparseDConfig(block_size=8, skip_ratio=0.25)

    def at(step):
        contexts = [
            Context(step=step, num_steps=4, prompt_len=8 * (n + 1), cache=cache)
            for n, cache in enumerate(caches)
        ]
        return sparse_attention_varlen(
            *tensors, cu_seqlens_q=cumulative(lens), cu_seqlens_k=cumulative(lens), method="sparsed",
            config=config, context=contexts, enable_gqa=True,
        )  # fmt: skip

    outs = [at(step) for step in range(3)]
    for n, span, q, k, v in each(*tensors, lens, lens):
        cache = LayoutCache()
        for step in range(3):
            alone = sa.sparsed_attention(
                q, k, v, cache=cache, step=step, num_steps=4, prompt_len=8 * (n + 1), block_size=8,
                skip_ratio=0.25, enable_gqa=True,
            )  # fmt: skip
            torch.testing.assert_close(outs[step][span], alone[0].transpose(0, 1))
    assert not torch.allclose(outs[0], outs[2]), "the last step is meant to be sparse"


@pytest.mark.usefixtures("cpu_engine")
def test_autocast():
    tensors = packed()
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention_varlen(
            *tensors, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(K_LENS), enable_gqa=True
        )
    half = [x.bfloat16() for x in tensors]
    expected = sparse_attention_varlen(
        *half, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(K_LENS), enable_gqa=True
    )
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("lens", [((), ()), ((0, 0), (3, 0)), ((2,), (0,))], ids=str)
def test_nothing_to_attend_still_has_gradients(lens):
    q_lens, k_lens = lens
    tensors = packed(q_lens, k_lens, requires_grad=True)
    out, lse = sparse_attention_varlen(
        *tensors, cu_seqlens_q=cumulative(q_lens), cu_seqlens_k=cumulative(k_lens), enable_gqa=True,
        return_lse=True,
    )  # fmt: skip
    assert out.shape == (sum(q_lens), HQ, DV) and lse.shape == (HQ, sum(q_lens))
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert (tensors[0].grad == 0).all()


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 127), (1, 128), (1, 129), (1, 300), (3, 130), (5, 5)])
def test_decoding_takes_the_bounds_of_the_full_layout(L, S, engine):
    query, key, value = packed((L,), (S,))
    layout, full = full_layout(L, S, 128, 128, query.device), SparseLayout.full(L, S).check()
    for is_causal in (False, True):
        assert torch.equal(layout.block_bounds(is_causal), full.block_bounds(is_causal))
        out, lse = sparse_attention_varlen(
            query, key, value, cu_seqlens_q=[0, L], cu_seqlens_k=[0, S], is_causal=is_causal, enable_gqa=True,
            return_lse=True, engine=engine,
        )  # fmt: skip
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        check_sequence(out, lse, q, k, v, causal_mask(L, S) if is_causal else None)


@pytest.mark.plain_empty
def test_compiles_with_lengths_in_a_list():
    """Into one graph, which is for these lengths; lengths in a tensor break the graph and still run."""
    tensors, options = packed((20, 30), (20, 30)), {"enable_gqa": True, **METHOD_CONFIGS["s2"]}

    def attend(tensors, ends):
        return sparse_attention_varlen(*tensors, cu_seqlens_q=ends, cu_seqlens_k=ends, method="s2", **options)

    expected = attend(tensors, [0, 20, 50])
    whole = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(whole(tensors, [0, 20, 50]), expected)
    broken = torch.compile(attend, backend="eager")
    assert torch.equal(broken(tensors, torch.tensor([0, 20, 50])), expected)


# -- paged ----------------------------------------------------------------------------------------

PAGE = 16
LAYOUTS = ("plain", "heads first", "combined", "combined, pages apart")


def empty_cache(kind, num_pages, dim=D):
    """k_cache and v_cache, (num_pages, PAGE, Hkv, D) views of NaN-filled memory of one kind."""
    if kind == "plain":
        return torch.full((2, num_pages, PAGE, HKV, dim), torch.nan).unbind()
    if kind == "heads first":
        return torch.full((2, num_pages, HKV, PAGE, dim), torch.nan).transpose(2, 3).unbind()
    if kind == "combined":  # vLLM's logical order, laid out by heads
        kv = torch.full((num_pages, HKV, PAGE, 2 * dim), torch.nan)
    else:  # the same logical order with tokens before heads, and another layer's page between two
        kv = torch.full((num_pages, 2, PAGE, HKV, 2 * dim), torch.nan)[:, 1].transpose(1, 2)
    return kv[..., :dim].transpose(1, 2), kv[..., dim:].transpose(1, 2)


def paged(kind, key, value, k_lens, spare=3, seed=0):
    """The tokens of `key` and `value` [Tk, Hkv, D] in shuffled pages: (k_cache, v_cache, block_table)."""
    counts = [math.ceil(n / PAGE) for n in k_lens]
    order = torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(seed)).tolist()
    k_cache, v_cache = empty_cache(kind, len(order))
    table = torch.full((len(k_lens), max(counts) + 1), -1, dtype=torch.int32)
    starts = cumulative(k_lens)
    for n, count in enumerate(counts):
        for i in range(count):
            table[n, i] = page = order.pop()
            here = slice(starts[n] + i * PAGE, min(starts[n] + (i + 1) * PAGE, starts[n + 1]))
            k_cache[page, : here.stop - here.start] = key[here]
            v_cache[page, : here.stop - here.start] = value[here]
    return k_cache, v_cache, table


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("method", [None, *METHOD_CONFIGS])
def test_pages_give_what_packed_keys_give(kind, method, on_vectors):
    """Decoding, chunks over a prefix and a whole prompt in one call; what lies past a sequence's end, in
    pages of nobody and in unused entries of the table is never read."""
    query, key, value = packed()
    value = value[..., :D]
    k_cache, v_cache, table = paged(kind, key, value, K_LENS)
    options = {} if method is None else {"method": method, **METHOD_CONFIGS[method]}
    options |= {"is_causal": True, "enable_gqa": True, "return_lse": True}
    out, lse = sparse_attention_paged(
        query, k_cache, v_cache, cu_seqlens_q=cumulative(Q_LENS), block_table=table,
        seqused_k=torch.tensor(K_LENS), **options,
    )  # fmt: skip
    expected = sparse_attention_varlen(
        query, key, value, cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(K_LENS), **options
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_pages_against_masked_attention(engine):
    query, key, value = packed()
    value = value[..., :D]
    k_cache, v_cache, table = paged("combined", key, value, K_LENS)
    out, lse = sparse_attention_paged(
        query, k_cache, v_cache, cu_seqlens_q=cumulative(Q_LENS), block_table=table.long(),
        seqused_k=list(K_LENS), is_causal=True, enable_gqa=True, return_lse=True, engine=engine,
    )  # fmt: skip
    for _, span, q, k, v in each(query, key, value):
        check_sequence(out[span], lse[:, span], q, k, v, causal_mask(q.shape[2], k.shape[2]))


def test_chunks_over_pages_give_the_whole_prefill():
    """A prompt prefilled in chunks reads, chunk by chunk, what one call over all of it reads."""
    query, key, value = packed((64,), (64,))
    value = value[..., :D]
    k_cache, v_cache, table = paged("plain", key, value, (64,))
    s2 = {"method": "s2", **METHOD_CONFIGS["s2"], "enable_gqa": True}
    whole = sparse_attention_varlen(query, key, value, cu_seqlens_q=[0, 64], cu_seqlens_k=[0, 64], **s2)
    chunks = [
        sparse_attention_paged(
            query[a:b], k_cache, v_cache, cu_seqlens_q=[0, b - a], block_table=table, seqused_k=[b], **s2
        )
        for a, b in pairwise((0, 24, 32, 63, 64))
    ]
    torch.testing.assert_close(torch.cat(chunks), whole)


S2_CONFIGS = {
    "by key head": S2Config(32, 1, 4, head_shift=1),
    "sinks, blocks below a page": S2Config(8, 2, 8, sink_blocks=2, head_shift=5),
    "by query head": S2Config(16, 1, 8, per_query_head=True),
    "one head dense": S2Config(64, 1, 3, num_dense_heads=1),
    "odd blocks": S2Config(24, 1, 5),
    "all alike": S2Config(32, 1, 4, head_shift=0),
}


UNREAD = 3e30  # not nan, which what was never written holds too


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize("name", S2_CONFIGS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_pages_that_no_query_head_needs_are_not_read(kind, name, engine, on_vectors, monkeypatch):
    """Of each key head: what such pages hold is in no key or value that an engine is given, be it of one
    sequence (the reference engine) or of several (the CPU engine)."""
    q_lens, k_lens, config = (1, 40, 1), (500, 300, 259), S2_CONFIGS[name]
    query, key, value = packed(q_lens, k_lens)
    value = value[..., :D]
    k_cache, v_cache, table = paged(kind, key, value, k_lens)
    unread = 0
    for n, (L, S) in enumerate(zip(q_lens, k_lens, strict=True)):
        layout = s2_layout(config, L, S, num_heads=HQ, num_kv_heads=HKV)
        seen = layout.to_dense()[0].any(1)  # [heads of the layout, S]
        seen = seen.expand(HKV, -1) if layout.heads == 1 else seen.view(HKV, -1, S).any(1)
        num_pages = math.ceil(S / PAGE)
        expected = torch.nn.functional.pad(seen, (0, num_pages * PAGE - S)).view(HKV, -1, PAGE).any(-1)
        assert torch.equal(needed_pages(layout, HKV, PAGE)[0], expected)
        for head, page in (~expected).nonzero().tolist():
            k_cache[table[n, page], :, head] = v_cache[table[n, page], :, head] = UNREAD
            unread += 1
    assert unread > 10
    options = {"method": "s2", "config": config, "enable_gqa": True, "return_lse": True, "engine": engine}
    expected = sparse_attention_varlen(
        query, key, value, cu_seqlens_q=cumulative(q_lens), cu_seqlens_k=cumulative(k_lens), **options
    )
    forward, given = type(ENGINES[engine]).forward, []

    def seen_by_engine(self, call):
        given.extend((call.k, call.v))
        return forward(self, call)

    monkeypatch.setattr(type(ENGINES[engine]), "forward", seen_by_engine)
    out = sparse_attention_paged(
        query, k_cache, v_cache, cu_seqlens_q=cumulative(q_lens), block_table=table,
        seqused_k=list(k_lens), **options,
    )  # fmt: skip
    assert given and not any((x == UNREAD).any() for x in given)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.plain_empty
@pytest.mark.parametrize("kind", LAYOUTS)
def test_only_one_sequence_s_pages_are_copied(kind):
    query = torch.randn(2, HQ, D)
    table = torch.tensor([[7, 3999], [11, 5]])
    with PeakBytes() as memory:
        k_cache, v_cache = (x.fill_(1) for x in empty_cache(kind, 4000))
        sparse_attention_paged(
            query, k_cache, v_cache, cu_seqlens_q=[0, 1, 2], block_table=table, seqused_k=[30, 20],
            enable_gqa=True, engine="reference",
        )  # fmt: skip
    cache = k_cache.untyped_storage().nbytes()
    assert cache <= memory.peak < 1.1 * cache


def test_pages_refuse_gradients():
    query, key, value = packed((4,), (4,))
    k_cache, v_cache, table = paged("plain", key, value[..., :D], (4,))
    rest = {"cu_seqlens_q": [0, 4], "block_table": table, "seqused_k": [4], "enable_gqa": True}
    query.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"pages have no backward.*no_grad"):
        sparse_attention_paged(query, k_cache, v_cache, **rest)
    with torch.no_grad():
        assert sparse_attention_paged(query, k_cache, v_cache, **rest).isfinite().all()


# -- bad calls ------------------------------------------------------------------------------------

T, TK = 8, 10
BAD_PACKED = {
    "cu that starts late": ({"cu_seqlens_q": [1, 4, T]}, "cu_seqlens_q .* must start with 0"),
    "cu that falls": ({"cu_seqlens_k": [0, 6, 4, TK]}, "cu_seqlens_k falls from 6 to 4 at entry 2"),
    "cu that ends early": ({"cu_seqlens_k": [0, 4, 9]}, "ends at 9 but key has 10 tokens"),
    "cu of floats": ({"cu_seqlens_q": torch.tensor([0.0, T])}, "cu_seqlens_q is torch.float32"),
    "cu with two dimensions": ({"cu_seqlens_q": torch.tensor([[0, T]])}, "must be int32 or int64 with 1"),
    "cu of no kind": ({"cu_seqlens_q": 8}, "cu_seqlens_q must be an integer tensor or a list of ints"),
    "empty cu": ({"cu_seqlens_q": []}, "N \\+ 1 entries"),
    "other number of sequences": ({"cu_seqlens_k": [0, TK]}, "cu_seqlens_q has 2 sequences but cu_seqlens_k"),
    "seqused too long": ({"seqused_k": [5, 6]}, "seqused_k\\[0\\] is 5; sequence 0 has 4 keys"),
    "seqused of others": ({"seqused_k": [4]}, "cu_seqlens_q has 2 sequences but seqused_k has 1"),
    "padded query": ({"query": torch.randn(2, T, HQ, D)}, "query has 4 dimensions; expected 3"),
    "no tensor": ({"key": [1.0]}, "key is list; it must be a torch.Tensor"),
    "value of another length": ({"value": torch.randn(TK + 1, HKV, D)}, "key has 10 tokens but value has 11"),
    "other head size": ({"key": torch.randn(TK, HKV, D + 1)}, "key has head_dim 17 but query has 16"),
    "groups not allowed": ({"enable_gqa": False}, "pass enable_gqa=True"),
    "unknown method": ({"method": "sparse"}, "unknown method 'sparse'; choose one of blasst"),
    "unknown option": ({"method": "s2", "theta": 1.0}, "s2 has no option theta; it has block_size"),
    "option without method": ({"theta": 1.0}, "theta given without a method"),
    "config without method": ({"config": AnchorConfig()}, "config given without a method"),
    "config of another method": ({"method": "s2", "config": AnchorConfig()}, "AnchorConfig; s2 takes"),
    "config and options": ({"method": "anchor", "config": AnchorConfig(), "theta": 1.0}, "either config or"),
    "method and layout": ({"method": "s2", "layout": SparseLayout.full}, "either a method or a layout"),
    "one layout for all": ({"layout": SparseLayout.full(4, 4)}, "must be a function"),
    "layout of other lengths": ({"layout": lambda L, S: SparseLayout.full(3, 3)}, "sequence 0 \\(3 quer"),
    "not causal": ({"method": "anchor", "is_causal": False}, "sequence 0 .*made for causal"),
    "threshold too large": ({"method": "blasst", "threshold_scale": 5.0}, "sequence 0 .*above 1"),
    "context without method": ({"context": Context()}, "context is read by methods alone"),
    "one cache for all": ({"method": "sparsed", "context": Context(cache=LayoutCache())}, "belongs to one"),
    "other number of contexts": ({"method": "s2", "context": [Context()]}, "1 contexts for 2 sequences"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_PACKED))
def test_bad_packed_calls(case):
    change, message = BAD_PACKED[case]
    good = {
        "query": torch.randn(T, HQ, D), "key": torch.randn(TK, HKV, D), "value": torch.randn(TK, HKV, D),
        "cu_seqlens_q": [0, 3, T], "cu_seqlens_k": [0, 4, TK], "enable_gqa": True,
    }  # fmt: skip
    assert sparse_attention_varlen(**good).shape == (T, HQ, D)
    with pytest.raises(ValueError, match=r"^sparse_attention_varlen: .*" + message):
        sparse_attention_varlen(**(good | change))


def test_no_engine_names_the_sequence():
    q, k, v = packed((3,), (3,))
    q, k, v = (x.double() for x in (q, k, v))
    with pytest.raises(NotImplementedError, match=r"sequence 0 \(3 queries, 3 keys\): .*'cpu'"):
        sparse_attention_varlen(
            q, k, v, cu_seqlens_q=[0, 3], cu_seqlens_k=[0, 3], enable_gqa=True, engine="cpu"
        )


BAD_PAGED = {
    "page out of range": ({"block_table": torch.tensor([[0, 1], [2, 4]])}, "\\[1, 1\\] is 4; .* 0 .. 3"),
    "page not set": ({"block_table": torch.tensor([[-1, 1], [2, 3]])}, "block_table\\[0, 0\\] is -1"),
    "too many tokens": ({"seqused_k": [33, 20]}, "seqused_k\\[0\\] is 33; .*0 .. 32 tokens \\(2 pages of 16"),
    "negative": ({"seqused_k": torch.tensor([4, -1])}, "seqused_k\\[1\\] is -1"),
    "lengths of others": ({"seqused_k": [4]}, "2 sequences but seqused_k has 1"),
    "lengths of floats": ({"seqused_k": [4.0, 5.0]}, "seqused_k must be an integer tensor or a list of ints"),
    "table of others": ({"block_table": torch.tensor([[0, 1]])}, "2 sequences but block_table has 1"),
    "table of floats": ({"block_table": torch.zeros(2, 2)}, "block_table is torch.float32"),
    "flat table": ({"block_table": torch.tensor([0, 1])}, "block_table has 1 dimensions; expected 2"),
    "caches that differ": ({"v_cache": torch.randn(4, 8, HKV, D)}, "must be equal"),
    "flat cache": ({"k_cache": torch.randn(64, HKV, D)}, "k_cache has 3 dimensions; expected 4"),
    "other dtype": ({"query": torch.randn(T, HQ, D).half()}, "dtypes differ"),
    "unknown method": ({"method": "sparse"}, "unknown method 'sparse'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_PAGED))
def test_bad_paged_calls(case):
    change, message = BAD_PAGED[case]
    good = {
        "query": torch.randn(T, HQ, D), "k_cache": torch.randn(4, PAGE, HKV, D),
        "v_cache": torch.randn(4, PAGE, HKV, D), "cu_seqlens_q": [0, 3, T], "enable_gqa": True,
        "block_table": torch.tensor([[0, -1], [2, 3]]), "seqused_k": [4, 20],
    }  # fmt: skip
    assert sparse_attention_paged(**good).shape == (T, HQ, D)
    with pytest.raises(ValueError, match=r"^sparse_attention_paged: .*" + message):
        sparse_attention_paged(**(good | change))


# -- the page -------------------------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs" / "varlen.md"


def test_examples_of_the_page_run():
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert len(examples) >= 2
    for number, code in enumerate(examples):
        exec(compile(code, f"docs/varlen.md example {number}", "exec"), {})
