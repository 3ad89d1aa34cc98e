"""SparseD: the schedule, the selection against its literal reference, the cache, bad input."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from references import sparsed as reference

from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context, run
from sparse_attn.methods.sparsed import SPARSED, SparseDConfig, sparsed_attention, sparsed_layout
from sparse_attn.reuse import LayoutCache
from sparse_attn.testing import make_inputs

MODES = ("paper", "repo")


def small(L=100, **how):
    how = {"heads": 2, "head_dim": 16, "dtype": torch.float64, **how}
    return make_inputs(L=L, **how)


def call(q, k, v, cache, step, *, num_steps=10, prompt_len=60, block_size=16, **how):
    return sparsed_attention(
        q,
        k,
        v,
        cache=cache,
        step=step,
        num_steps=num_steps,
        prompt_len=prompt_len,
        block_size=block_size,
        **how,
    )


# -- schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip_ratio", [0.01, 0.07, 0.2, 0.3, 0.5, 1.0], ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 100, 128, 1024], ids=str)
def test_dense_steps(num_steps, skip_ratio, mode) -> None:
    expected = reference.dense_steps(num_steps, skip_ratio, mode)
    switch = SparseDConfig(skip_ratio=skip_ratio, mode=mode).switch_step(num_steps)
    assert list(range(min(switch + 1, num_steps))) == expected


def test_schedule_of_the_published_settings() -> None:
    assert SparseDConfig(mode="repo").switch_step(128) + 1 == 27
    assert SparseDConfig(mode="repo").switch_step(1024) + 1 == 206
    assert SparseDConfig().switch_step(128) + 1 == 26


@pytest.mark.parametrize("num_steps", [1, 3, 7, 50, 128, 1000])
def test_a_pattern_can_be_found_at_any_step(num_steps) -> None:
    for step in range(num_steps):
        assert SparseDConfig().beginning_at(step, num_steps).switch_step(num_steps) == step
        assert SparseDConfig(mode="repo").beginning_at(step, num_steps).switch_step(num_steps) == max(step, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_generation_is_dense_then_reuses_one_pattern(mode) -> None:
    q, k, v = small()
    cache, config = LayoutCache(), SparseDConfig(block_size=16, mode=mode)
    switch = config.switch_step(10)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for step in range(10):
        drift = 0.01 * step
        out = call(q + drift, k, v, cache, step, mode=mode)
        if step < switch:
            assert cache.get(0) is None
        if step == switch:
            pattern = cache.get(0)
            fresh = sparsed_layout(q + drift, k, config, prompt_len=60)
            assert torch.equal(pattern.block_mask(), fresh.block_mask())
        exact = torch.nn.functional.scaled_dot_product_attention(q + drift, k, v)
        if step > switch:
            assert cache.get(0) is pattern
            mask = pattern.to_dense()
            exact = torch.nn.functional.scaled_dot_product_attention(q + drift, k, v, attn_mask=mask)
            assert not torch.allclose(out, dense, atol=1e-3)
        torch.testing.assert_close(out, exact)


def test_no_pattern_is_made_when_no_step_could_use_it() -> None:
    q, k, v = small()
    cache = LayoutCache()
    for step in range(3):
        call(q, k, v, cache, step, num_steps=3, skip_ratio=1.0)
    assert len(cache) == 0


def test_layers_have_their_own_patterns() -> None:
    q, k, v = small()
    cache = LayoutCache()
    for step in range(3):
        for layer in range(2):
            call(q if layer == 0 else q.flip(2), k, v, cache, step, layer=layer)
    assert len(cache) == 2
    assert not torch.equal(cache.get(0).block_mask(), cache.get(1).block_mask())


# -- selection ------------------------------------------------------------------------------------


def assert_same_choice(layout, keep, scores, tolerance) -> None:
    """Equal, or different only between blocks whose scores tie within `tolerance`."""
    got = layout.block_mask()
    if torch.equal(got, keep):
        return
    assert torch.equal(got.sum(-1), keep.sum(-1)), "another number of blocks"
    for b, h, i in (got != keep).any(-1).nonzero().tolist():
        extra = (got & ~keep)[b, h, i].nonzero().flatten().tolist()
        lost = (keep & ~got)[b, h, i].nonzero().flatten().tolist()
        values = scores[b, h, i, extra + lost]
        assert values.max() - values.min() <= tolerance * values.max(), (b, h, i, extra, lost)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("L", "block_size", "prompt_len"),
    [
        (96, 16, 64),  # everything aligned
        (100, 16, 70),  # prompt ends inside a block, ragged last block
        (127, 32, 120),  # only the straddling block holds generated tokens
        (63, 16, 0),  # no prompt
        (63, 16, 63),  # nothing generated
        (200, 16, 5),  # prompt shorter than a block
        (10, 16, 4),  # one block in all
        (1, 16, 1),
        (1, 16, 0),
    ],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("select_ratio", [0.3, 0.05], ids=str)
def test_selection_is_the_literal_one(L, block_size, prompt_len, select_ratio, mode) -> None:
    q, k, _ = small(L, batch=2)
    config = SparseDConfig(select_ratio=select_ratio, block_size=block_size, mode=mode)
    keep, *_ = reference.select(
        q, k, prompt_len=[prompt_len] * 2, select_ratio=select_ratio, block_size=block_size, mode=mode,
        score_scale=0.25,
    )  # fmt: skip
    layout = sparsed_layout(q, k, config, prompt_len=prompt_len).check()
    assert torch.equal(layout.block_mask(), keep)
    by_row = sparsed_layout(q, k, config, prompt_len=torch.tensor([prompt_len] * 2)).check()
    assert torch.equal(by_row.block_mask(), keep)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_kv_head", [False, True], ids=["per_query_head", "per_kv_head"])
def test_selection_with_gqa_and_a_prompt_length_a_row(per_kv_head, mode) -> None:
    q, k, v = small(150, batch=4, heads=6, kv_heads=2)
    prompt_len = [0, 150, 77, 149]
    config = SparseDConfig(0.2, 0.4, 16, mode, per_kv_head=per_kv_head)
    keep, *_ = reference.select(
        q, k, prompt_len=prompt_len, select_ratio=0.4, block_size=16, mode=mode, score_scale=0.25,
        per_kv_head=per_kv_head,
    )  # fmt: skip
    layout = sparsed_layout(q, k, config, prompt_len=torch.tensor(prompt_len)).check()
    assert layout.heads == (2 if per_kv_head else 6)
    assert torch.equal(layout.block_mask(), keep)
    cache, how = LayoutCache(), {"mode": mode, "select_ratio": 0.4, "per_kv_head": per_kv_head}
    for step in range(5):
        out = call(q, k, v, cache, step, prompt_len=torch.tensor(prompt_len), enable_gqa=True, **how)
    mask = keep.repeat_interleave(6 // keep.shape[1], 1)
    mask = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :150, :150]
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("per_kv_head", [False, True], ids=["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("select_mass", [0.5, 0.9, 1.0], ids=str)
def test_selection_by_mass_is_the_literal_one(select_mass, per_kv_head) -> None:
    q, k, _ = small(150, batch=4, heads=6, kv_heads=2)
    prompt_len = [0, 150, 77, 149]
    config = SparseDConfig(block_size=16, select_mass=select_mass, per_kv_head=per_kv_head)
    keep, *_ = reference.select(
        q, k, prompt_len=prompt_len, select_ratio=0.3, block_size=16, mode="paper", score_scale=0.25,
        per_kv_head=per_kv_head, select_mass=select_mass,
    )  # fmt: skip
    layout = sparsed_layout(q, k, config, prompt_len=torch.tensor(prompt_len)).check()
    assert torch.equal(layout.block_mask(), keep)
    for b, length in enumerate(prompt_len):
        one = sparsed_layout(q[b : b + 1], k[b : b + 1], config, prompt_len=length).check()
        assert torch.equal(one.block_mask()[0], keep[b])
    counts = keep.sum(-1)
    assert (counts.min() < counts.max()) == (select_mass < 1), "rows keep what they need, not a fixed count"


def test_mass_of_a_causal_pattern_is_reached_by_every_row_of_blocks() -> None:
    q, k, _ = small(160, heads=3)
    config = SparseDConfig(block_size=16, select_mass=0.8)
    layout = sparsed_layout(q, k, config, prompt_len=160, is_causal=True).check()
    p = (q @ k.mT * 0.25).masked_fill(~torch.ones(160, 160).tril().bool(), -torch.inf).softmax(-1)
    kept = (p * layout.to_dense(True)).sum(-1).view(3, 10, 16).mean(-1)
    assert (kept >= 0.8 - 1e-9).all()
    cheapest = (p * layout.to_dense(True)).view(3, 10, 16, 10, 16).sum((2, 4)) / 16
    least = cheapest.masked_fill(~layout.block_mask()[0], torch.inf).amin(-1)
    assert (kept - least < 0.8).all(), "one block fewer would not do"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selection_in_low_precision_differs_only_at_ties(dtype, mode) -> None:
    q, k, v = small(500, dtype=dtype, head_dim=32)
    cache = LayoutCache()
    for step in range(4):
        call(q, k, v, cache, step, prompt_len=333, mode=mode)
    keep, prompt, generation = reference.select(
        q, k, prompt_len=[333], select_ratio=0.3, block_size=16, mode=mode, score_scale=32**-0.5
    )
    last = reference.first_generation_block(333, 500, 16, 32, mode)
    scores = torch.cat([prompt[..., :last], generation[..., last:]], -1)
    assert_same_choice(cache.get(0), keep, scores, 1e-4 if dtype == torch.float32 else 1e-2)


def test_modes_differ_as_documented() -> None:
    """Generated keys made loud: in repo mode they take the prompt's places and are then erased."""
    q, k, _ = small(160, heads=1)
    k[:, :, 128:] = q[:, :, 32:].mean(2, keepdim=True) * 30
    rows = {}
    for mode in MODES:
        config = SparseDConfig(select_ratio=0.3, block_size=16, mode=mode)
        mask = sparsed_layout(q, k, config, prompt_len=128).block_mask()[0, 0]
        rows[mode] = mask[:, :8].sum(-1), mask[:, 8:].sum(-1)
    assert (rows["paper"][0] == ceil(8 * 0.3)).all() and (rows["paper"][1] == ceil(2 * 0.3)).all()
    assert (rows["repo"][0] <= int(10 * 0.3) + 1).all() and (rows["repo"][0] < 4).any()
    assert (rows["repo"][1] == int(2 * 0.3) + 1).all()


def test_ragged_last_block_is_biased_down_in_repo_mode_only() -> None:
    """One key in the last block, and all keys equal: a fair mean ranks its block with the others."""
    q, k, _ = small(65, heads=1)
    k[...] = k[:, :, :1]
    k[:, :, 64] = k[:, :, 0] + 0.01 * q.mean(2)  # the last key is a little better for the mean query
    q[...] = q.mean(2, keepdim=True)
    chosen = {}
    for mode in MODES:
        config = SparseDConfig(select_ratio=0.2, block_size=16, mode=mode)
        chosen[mode] = sparsed_layout(q, k, config, prompt_len=0).block_mask()[0, 0, :, 4]
    assert chosen["paper"].all() and not chosen["repo"].any()


def test_score_scale_changes_the_ranking_and_is_used_for_both_passes() -> None:
    q, k, _ = small(200, heads=4)
    keep = {}
    for scale in (None, 4**-0.5):
        config = SparseDConfig(block_size=16, score_scale=scale)
        layout = sparsed_layout(q, k, config, prompt_len=130, lse=torch.zeros(1, 4, 200) if scale else None)
        expected, *_ = reference.select(
            q, k, prompt_len=[130], select_ratio=0.3, block_size=16, mode="paper", score_scale=scale or 0.25
        )
        assert torch.equal(layout.block_mask(), expected)
        keep[scale] = expected
    assert not torch.equal(*keep.values())


def test_equal_scores_take_the_lower_block() -> None:
    q = torch.zeros(1, 1, 64, 16)
    layout = sparsed_layout(q, q, SparseDConfig(block_size=8, select_ratio=0.5), prompt_len=32)
    assert layout.block_mask()[0, 0, 0].tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt_len", [0, 5, 64, 99, 100], ids=str)
def test_select_ratio_one_is_dense(prompt_len, mode) -> None:
    q, k, v = small()
    config = SparseDConfig(select_ratio=1.0, block_size=16, mode=mode)
    assert sparsed_layout(q, k, config, prompt_len=prompt_len).density() == 1.0
    cache = LayoutCache()
    for step in range(4):
        out = call(q, k, v, cache, step, prompt_len=prompt_len, mode=mode, select_ratio=1.0)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_causal_never_keeps_hidden_blocks() -> None:
    q, k, _ = small()
    layout = sparsed_layout(q, k, SparseDConfig(block_size=16), prompt_len=60, is_causal=True).check()
    mask = layout.block_mask()
    assert not mask.triu(1).any() and mask[:, :, 1:].any(-1).all()


def test_generic_road_agrees_with_the_operator() -> None:
    q, k, v = small(batch=2)
    config = SparseDConfig(block_size=16)
    ours, theirs = LayoutCache(), LayoutCache()
    for step in range(5):
        out = call(q, k, v, ours, step)
        context = Context(step=step, num_steps=10, prompt_len=60, cache=theirs)
        other = run(SPARSED, q, k, v, config, is_causal=False, context=context)
        torch.testing.assert_close(out, other.out)
    assert torch.equal(ours.get(0).block_mask(), theirs.get(0).block_mask())
    at_once = SPARSED.select(q, k, config, is_causal=False, scale=0.25, context=Context(prompt_len=60))
    assert torch.equal(at_once.layout.block_mask(), ours.get(0).block_mask())


def test_numpy_integers_are_integers() -> None:
    q, k, v = small()
    out = call(q, k, v, LayoutCache(), np.int64(0), num_steps=np.int32(10), prompt_len=np.int64(60))
    assert out.shape == v.shape


def test_gradients_flow_through_a_sparse_step() -> None:
    q, k, v = (x.requires_grad_() for x in small(50))
    cache = LayoutCache()
    for step in range(3):
        out = call(q, k, v, cache, step, prompt_len=20)
    out.sum().backward()
    mask = cache.get(0).to_dense()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = torch.autograd.grad(exact.sum(), (q, k, v))
    for x, grad in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, grad)


@pytest.mark.plain_empty
def test_each_step_compiles_into_one_graph() -> None:
    q, k, v = small(dtype=torch.float32)
    eager, compiled = LayoutCache(), LayoutCache()
    torch._dynamo.reset()
    step_of = torch.compile(call, fullgraph=True, backend="aot_eager")
    for step in range(4):
        torch.testing.assert_close(step_of(q, k, v, compiled, step), call(q, k, v, eager, step))
    assert torch.equal(compiled.get(0).block_mask(), eager.get(0).block_mask())


# -- the cache ------------------------------------------------------------------------------------


def run_to(step, cache, **how):
    tensors = small()
    for s in range(step + 1):
        call(*tensors, cache, s, **how)
    return tensors


def test_step_zero_starts_a_new_generation_of_any_shape() -> None:
    cache = LayoutCache()
    run_to(4, cache)
    old = cache.get(0)
    q, k, v = small(80)
    call(q, k, v, cache, 0, prompt_len=30)
    assert cache.get(0) is None
    call(q, k, v, cache, 1, prompt_len=30)
    assert cache.get(0).L == 80 and old.L == 100


def test_a_repeated_step_is_allowed() -> None:
    cache = LayoutCache()
    tensors = run_to(4, cache)
    call(*tensors, cache, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, "step 3 of layer 0 follows step 4"),
        ({"prompt_len": 61}, "prompt_len was 60 and is now 61"),
        ({"prompt_len": torch.tensor([60])}, "prompt_len was 60 and is now"),
        ({"num_steps": 12}, "num_steps was 10 and is now 12"),
        ({"select_ratio": 0.4}, "configuration was"),
        ({"layer": 1}, "layer 1 has no pattern at step 5: it is found at step 1"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_misuse_of_the_cache_is_an_error(change, message) -> None:
    cache = LayoutCache()
    tensors = run_to(4, cache)
    step = change.pop("step", 5)
    with pytest.raises(ValueError, match=message):
        call(*tensors, cache, step, **change)


def test_another_shape_within_a_generation_is_an_error() -> None:
    cache = LayoutCache()
    run_to(4, cache)
    with pytest.raises(ValueError, match=r"was \(1, 2, 2, 100\) and is now \(1, 2, 2, 90\).*one LayoutCache"):
        call(*small(90), cache, 5)


def test_put_get_reset_size_and_repr() -> None:
    cache = LayoutCache()
    assert cache.nbytes == 0 and len(cache) == 0
    layout = SparseLayout.full(256, 256, block_m=16, block_n=16)
    cache.put(7, layout)
    assert cache.get(7) is layout and cache.get(0) is None
    assert cache.nbytes == 256 * 4 + 17 * 8
    layout.block_bounds(False)
    assert cache.nbytes == 256 * 4 + 17 * 8 + 16 * 2 * 4
    cache.put(8, layout)  # the same tensors are counted once
    assert cache.nbytes == 256 * 4 + 17 * 8 + 16 * 2 * 4
    assert repr(cache) == "LayoutCache(2 of 2 layers hold a pattern, 0.0 MiB)"
    cache.reset()
    assert cache.nbytes == 0 and cache.get(7) is None
    with pytest.raises(ValueError, match="must be a SparseLayout"):
        cache.put(0, "full")


def test_repr_names_the_last_step() -> None:
    cache = LayoutCache()
    run_to(4, cache)
    assert "1 of 1 layers hold a pattern, last step 4" in repr(cache)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"cache": None}, "cache is NoneType; pass a sparse_attn.LayoutCache"),
        ({"step": 10}, "step is 10; it must be between 0 and num_steps - 1 = 9"),
        ({"step": -1}, "step is -1"),
        ({"step": 0.5}, "must be ints"),
        ({"num_steps": None}, "must be ints"),
        ({"prompt_len": 101}, "prompt_len is 101; it must be between 0 and L = 100"),
        ({"prompt_len": -1}, "prompt_len is -1"),
        ({"prompt_len": None}, "prompt_len is None; pass an int"),
        ({"prompt_len": torch.tensor([101])}, r"prompt_len is \[101\]; each must be between"),
        ({"prompt_len": torch.tensor([1, 2])}, r"of shape \(2,\); pass an int or .* of shape \(1,\)"),
        ({"prompt_len": torch.tensor([1.0])}, "prompt_len is torch.float32"),
        ({"skip_ratio": 0.0}, r"skip_ratio is 0.0; it must be in \(0, 1\]"),
        ({"select_ratio": 1.5}, r"select_ratio is 1.5; it must be in \(0, 1\]"),
        ({"select_ratio": float("nan")}, "select_ratio is nan"),
        ({"mode": "other"}, "mode is 'other'; choose one of paper, repo"),
        ({"block_size": 0}, "block_size is 0"),
        ({"score_scale": -1.0}, "score_scale is -1.0"),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_bad_arguments(how, message) -> None:
    q, k, v = small()
    how = {"cache": LayoutCache(), "step": 0, "num_steps": 10, "prompt_len": 60, "block_size": 16, **how}
    with pytest.raises(ValueError, match=f"sparsed_attention: .*{message}"):
        sparsed_attention(q, k, v, **how)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"skip_ratio is 2.*select_ratio is 0.*mode is 'x'"):
        SparseDConfig(2, 0, mode="x")


def test_bad_mass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"select_mass is 1.5.*needs mode='paper'"):
        SparseDConfig(select_mass=1.5, mode="repo")


def test_other_query_length_is_refused_with_the_reason() -> None:
    q, k, v = make_inputs(L=40, S=100)
    with pytest.raises(ValueError, match="length 40 but key has 100; the pattern is one of a whole"):
        call(q, k, v, LayoutCache(), 0, prompt_len=20)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: memory and synchronisation are CUDA's"
)
@pytest.mark.parametrize("mode", MODES)
def test_selection_at_128k_stays_below_a_gibibyte_and_does_not_synchronise(mode) -> None:
    q, k, _ = make_inputs(heads=32, L=131072, head_dim=128, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = sparsed_layout(q, k, SparseDConfig(mode=mode), prompt_len=130000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = layout.blocks.indices.nbytes + layout.blocks.offsets.nbytes
    assert torch.cuda.max_memory_allocated() - before - kept < 2**30
    layout.check()
    assert 0.29 < layout.density() < 0.31
