"""AnchorAttention: the selector against a literal reading of the paper, the two sentinels, the edges."""

import math

import pytest
import torch
from references.anchor import anchor, recall_thetas
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn as sa
from sparse_attn import layout_bounds
from sparse_attn.methods import METHODS, anchor_sampled
from sparse_attn.methods import anchor_select as portable
from sparse_attn.methods.anchor import AnchorConfig, select
from sparse_attn.methods.anchor_regions import AnchorRegions
from sparse_attn.testing_data import structured_qk

TIE = 1e-4  # two float32 routes to a gap of about 10 may differ by this much

# block_size, step and init_blocks are small so that short inputs have many superblocks.
SMALL = dict(block_size=8, step=2, init_blocks=1)
CASES = {
    "square": dict(L=96, S=96),
    "ragged": dict(L=91, S=91),
    "last-superblock-of-one-query": dict(L=81, S=81),
    "chunk": dict(L=32, S=96),
    "chunk-off-the-grid": dict(L=35, S=102),
    "one-query": dict(L=1, S=77),
    "more-queries-than-keys": dict(L=60, S=41),
    "short": dict(L=5, S=5),
    "gqa": dict(L=70, S=83, Hq=4, Hkv=2),
    "no-init": dict(L=64, S=64, init_blocks=0),
    "three-init": dict(L=96, S=96, init_blocks=3),
    "step-1": dict(L=64, S=64, step=1),
    "one-superblock": dict(L=64, S=64, step=16),
}


def make(B, Hq, Hkv, L, S, D=32, dtype=torch.float64, seed=0):
    """Structured logits over `S` keys with queries for the last `L` of them (or more, if L > S)."""
    length = max(L, S)
    q, k = structured_qk(B, Hq, length, D, kv_heads=Hkv, seed=seed)
    v = torch.randn(B, Hkv, S, D, generator=torch.Generator().manual_seed(seed + 1))
    return q[:, :, length - L :].to(dtype), k[:, :, :S].to(dtype), v.to(dtype)


def plan_of(q, k, scale=None, **config):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return select(q, k, AnchorConfig(**config), is_causal=True, scale=scale)


def lists_of(layout):
    """{(b, h, row): list of columns}"""
    offsets, indices = layout.columns.offsets.tolist(), layout.columns.indices.tolist()
    G = layout.columns.rows // (layout.batch * layout.heads)
    rows = range(layout.columns.rows)
    return {
        (r // (layout.heads * G), r // G % layout.heads, r % G): indices[offsets[r] : offsets[r + 1]]
        for r in rows
    }


def assert_lists_follow(lists, literal, theta, tie):
    """Every key is listed as its gap says; only within `tie` of theta may it be either way. Returns how
    many keys were listed, and how many were offered."""
    for at, (_, gaps) in literal.items():
        limit = theta[at[1]] if isinstance(theta, list) else theta
        listed = set(lists[at])
        assert listed <= gaps.keys(), f"{at}: listed but never offered: {sorted(listed - gaps.keys())}"
        for j, gap in gaps.items():
            assert (j in listed) == (gap <= limit) or abs(gap - limit) < tie, (at, j, gap, limit)
    return sum(map(len, lists.values())), sum(len(gaps) for _, gaps in literal.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("reference", ["max", "lse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_lists_are_those_of_the_paper(case, reference, dtype):
    case = dict(Hq=2, Hkv=2) | SMALL | case
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"], dtype=dtype)
    shape = {name: case[name] for name in SMALL}
    literal = anchor(
        q, k, block=case["block_size"], step=case["step"], init_blocks=case["init_blocks"],
        scale=32**-0.5, reference=reference,
    )  # fmt: skip
    gaps = sorted(gap for _, of in literal.values() for gap in of.values())
    theta = gaps[len(gaps) // 3] + 1e-3 if gaps else 5.0  # keeps about a third
    layout = plan_of(q, k, theta=theta, reference=reference, **shape).layout.check()
    tie = 1e-9 if dtype == torch.float64 else TIE
    kept, offered = assert_lists_follow(lists_of(layout), literal, theta, tie)
    assert offered == 0 or 0.2 * offered < kept < 0.6 * offered
    for (_, _, g), (anchor_of, _) in literal.items():  # the blocks are the anchor, exactly
        for i, seen in anchor_of.items():
            blocks = torch.zeros(case["S"], dtype=torch.bool)
            for j in seen:
                blocks[j] = True
            rows = layout.blocks.to_mask(layout.num_key_blocks)[i // layout.block_m]
            keys = rows.repeat_interleave(layout.block_n)[: case["S"]]
            keys &= torch.arange(case["S"]) <= i + case["S"] - case["L"]
            assert torch.equal(keys, blocks), (g, i)


SAMPLED_CASES = {
    name: CASES[name]
    for name in ("square", "ragged", "last-superblock-of-one-query", "chunk-off-the-grid", "one-query", "gqa",
                 "more-queries-than-keys", "three-init", "step-1")
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLED_CASES.values(), ids=SAMPLED_CASES)
@pytest.mark.parametrize("reference", ["max", "lse", "all"])
@pytest.mark.parametrize("local_blocks", [0, 3])
def test_sampled_queries_list_what_one_of_them_wants(case, reference, local_blocks):
    case = dict(Hq=2, Hkv=2) | SMALL | case
    shape = {name: case[name] for name in SMALL} | dict(local_blocks=local_blocks)
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"])
    literal = anchor(
        q, k, block=case["block_size"], step=case["step"], init_blocks=case["init_blocks"],
        local_blocks=local_blocks, scale=32**-0.5, reference=reference, samples=3,
    )  # fmt: skip
    gaps = sorted(gap for _, of in literal.values() for gap in of.values())
    theta = gaps[len(gaps) // 3] + 1e-6 if gaps else 5.0
    layout = plan_of(q, k, theta=theta, reference=reference, samples=3, **shape).layout
    kept, offered = assert_lists_follow(lists_of(layout.check()), literal, theta, 1e-9)
    assert offered == 0 or 0.2 * offered < kept < 0.6 * offered
    assert torch.equal(layout.block_bounds(True), layout_bounds.block_bounds(layout, True))
    assert torch.equal(layout.column_bounds(True), layout_bounds.column_bounds(layout, True))


@pytest.mark.parametrize("local_blocks", [0, 2, 5])
@pytest.mark.parametrize("case", ["ragged", "chunk-off-the-grid", "gqa"])
def test_wider_neighbourhood_under_the_published_rule(case, local_blocks):
    case = dict(Hq=2, Hkv=2) | CASES[case]
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"])
    literal = anchor(q, k, block=8, step=2, init_blocks=1, local_blocks=local_blocks, scale=32**-0.5)
    layout = plan_of(q, k, theta=8.0, local_blocks=local_blocks, **SMALL).layout.check()
    kept, offered = assert_lists_follow(lists_of(layout), literal, 8.0, 1e-9)
    assert 0 < kept < offered
    for i in range(case["L"]):
        seen = layout.to_dense(True)[0, 0, i].nonzero().flatten().tolist()
        assert set(seen) >= literal[0, 0, i // 16][0][i]


RECALL_CASES = {
    "square": dict(L=160, S=160),
    "ragged": dict(L=149, S=149),
    "chunk-off-the-grid": dict(L=67, S=150),
    "gqa-step-2": dict(L=150, S=150, Hq=4, Hkv=2, step=2),
    "one-sample": dict(L=100, S=100, samples=1),
    "one-query": dict(L=1, S=77),
}


@pytest.mark.parametrize("recall", [0.95, 0.99])
@pytest.mark.parametrize("case", RECALL_CASES.values(), ids=RECALL_CASES)
def test_recall_sets_theta_by_what_samples_keep_for_each_other(case, recall, monkeypatch):
    case = dict(Hq=2, Hkv=2, step=1, samples=4) | case
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"])
    shape = dict(step=case["step"], init_blocks=1, samples=case["samples"], local_blocks=2)
    thetas = recall_thetas(q, k, block=8, scale=32**-0.5, recall=recall, **shape)
    literal = anchor(q, k, block=8, scale=32**-0.5, reference="all", **shape)
    config = dict(block_size=8, recall=recall, **shape)
    for chunk in (1 << 20, 700, 1):  # all superblocks at once, a few, one by one
        monkeypatch.setattr(anchor_sampled, "_CHUNK_CPU", chunk)
        lists = lists_of(plan_of(q, k, **config).layout.check())
        for at, (_, gaps) in literal.items():
            want = [j for j, gap in gaps.items() if gap <= thetas[at] + 1e-12]
            assert lists[at] == want, at
    if case["samples"] > 1 and case["L"] > 1:
        assert len(set(thetas.values())) > 1
    else:  # nobody can speak for a sample that is alone: the anchor reaches the share, or nothing does
        assert set(thetas.values()) <= {0.0, math.inf}


def test_later_queries_do_not_change_earlier_lists():
    q, k, _ = make(1, 2, 2, 160, 160)
    config = dict(block_size=8, step=1, samples=4, recall=0.97)
    whole = lists_of(plan_of(q, k, **config).layout)
    part = lists_of(plan_of(q[:, :, :120], k[:, :, :120], **config).layout)
    assert all(whole[at] == part[at] for at in part) and any(part.values())


def test_recall_rises_with_what_is_asked_and_is_about_reached():
    q, k, v = make(1, 4, 2, 512, 512, dtype=torch.float32)
    config = dict(block_size=16, step=1, samples=4, enable_gqa=True, return_lse=True)
    means = []
    for recall in (0.7, 0.9, 0.98):
        _, lse = sa.anchor_attention(q, k, v, recall=recall, **config)
        means.append(torch.exp(lse - dense_lse(q, k)).mean().item())
    assert means == sorted(means) and means[0] > 0.65 and means[1] > 0.85 and 0.95 < means[2] < 1


def test_sampled_options_keep_the_sentinels():
    q, k, v = make(2, 4, 2, 91, 110)
    common = dict(samples=4, **SMALL, enable_gqa=True)
    causal = torch.ones(91, 110).tril(19).bool()
    dense = scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    out = sa.anchor_attention(q, k, v, theta=math.inf, **common)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    for nothing in (dict(), dict(samples=None)):
        columns = plan_of(q, k, theta=-math.inf, **SMALL, **(dict(samples=4) | nothing)).layout.columns
        assert columns.offsets[-1] == 0
    own = lists_of(plan_of(q, k, theta=3.0, samples=4, **SMALL).layout)
    shared = lists_of(plan_of(q, k, theta=3.0, samples=4, share_kv_group=True, **SMALL).layout)
    for (b, kv, g), listed in shared.items():
        assert listed == sorted({*own[b, 2 * kv, g], *own[b, 2 * kv + 1, g]})
    auto = lists_of(plan_of(q, k, theta="auto", eps=0.5, samples=4, **SMALL).layout)
    per_head = torch.tensor([-math.inf, 3.0, 3.0, math.inf], dtype=torch.float64)
    by_head = lists_of(plan_of(q, k, theta=per_head, samples=4, **SMALL).layout)
    for b, h, g in own:
        offered = AnchorRegions(91, 110, 8, 2, 1).offered_keys(g)
        want = {0: [], 1: own[b, 1, g], 2: own[b, 2, g], 3: list(offered)}[h]
        assert by_head[b, h, g] == want
        if offered:
            alone = plan_of(q, k, theta=math.log(len(offered) / 0.5), samples=4, **SMALL).layout
            assert auto[b, h, g] == lists_of(alone)[b, h, g]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_infinite_theta_is_dense_and_minus_infinite_is_sink_and_local(case):
    case = dict(Hq=2, Hkv=2) | SMALL | case
    L, S = case["L"], case["S"]
    q, k, v = make(2, case["Hq"], case["Hkv"], L, S)
    shape = {name: case[name] for name in SMALL} | dict(enable_gqa=True)
    causal = torch.arange(S) <= torch.arange(L)[:, None] + S - L
    sees = causal.any(1)  # a query that sees nothing gives 0, where PyTorch gives NaN
    dense = scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    out, lse, stats = sa.anchor_attention(
        q, k, v, theta=math.inf, **shape, return_lse=True, return_stats=True
    )
    torch.testing.assert_close(out[:, :, sees], dense[:, :, sees], rtol=0, atol=1e-12)
    assert (out[:, :, ~sees] == 0).all()
    assert stats.kept.shape == (2, case["Hq"]) and (stats.kept == stats.offered).all()
    scores = (q @ k.repeat_interleave(case["Hq"] // case["Hkv"], 1).mT) * 32**-0.5
    want = scores.masked_fill(~causal, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, want, rtol=0, atol=1e-12)

    span = case["block_size"] * case["step"]
    superblock = torch.arange(L) // span
    local_from = ((superblock * span + S - L) // case["block_size"] - 1) * case["block_size"]
    near = torch.arange(S) >= local_from[:, None]
    near |= torch.arange(S) < case["init_blocks"] * case["block_size"]
    dense = scaled_dot_product_attention(q, k, v, attn_mask=near & causal, enable_gqa=True)
    out = sa.anchor_attention(q, k, v, theta=-math.inf, **shape)
    torch.testing.assert_close(out[:, :, sees], dense[:, :, sees], rtol=0, atol=1e-12)


def test_output_is_exact_attention_over_anchor_and_lists():
    q, k, v = make(1, 2, 1, 90, 110, dtype=torch.float32)
    out, lse, stats = sa.anchor_attention(
        q, k, v, theta=6.0, **SMALL, enable_gqa=True, return_lse=True, return_stats=True
    )
    literal = anchor(q, k, block=8, step=2, init_blocks=1, scale=32**-0.5)
    assert stats.ratio.min() > 0.05 and stats.ratio.max() < 0.95
    for (b, h, _), (anchor_of, gaps) in literal.items():
        listed = [j for j, gap in gaps.items() if gap <= 6.0]
        for i, seen in anchor_of.items():
            keys = sorted(seen) + listed
            p = (q[b, h, i].double() @ k[b, 0, keys].double().T * 32**-0.5).softmax(-1)
            torch.testing.assert_close(out[b, h, i].double(), p @ v[b, 0, keys].double(), atol=2e-5, rtol=0)
    dense = scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(90, 110).tril(20).bool(), enable_gqa=True
    )
    assert (out - dense).abs().max() > 1e-4, "the lists must leave something out"
    recall = torch.exp(lse - dense_lse(q, k))
    assert recall.max() < 1 + 1e-5, "a key was counted twice"


def dense_lse(q, k):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    causal = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    return scores.masked_fill(~causal, -math.inf).logsumexp(-1)


def test_theta_per_head():
    q, k, _ = make(2, 3, 3, 96, 96)
    literal = anchor(q, k, block=8, step=2, init_blocks=1, scale=32**-0.5)
    few = sorted(gap for at, (_, gaps) in literal.items() if at[1] == 0 for gap in gaps.values())[20]
    theta = torch.tensor([few + 1e-3, few + 1, math.inf], dtype=torch.float64)
    for given in (theta, theta.expand(2, 3), theta[None]):
        lists = lists_of(plan_of(q, k, theta=given, **SMALL).layout)
        assert_lists_follow(lists, literal, theta.tolist(), 1e-9)
    lengths = [sum(len(lists[b, h, g]) for b in range(2) for g in range(6)) for h in range(3)]
    assert 0 < lengths[0] < lengths[1] < lengths[2]


def test_lse_reference_keeps_fewer():
    q, k, _ = make(1, 2, 2, 96, 96)
    most = lists_of(plan_of(q, k, theta=6.0, **SMALL).layout)
    fewer = lists_of(plan_of(q, k, theta=6.0, reference="lse", **SMALL).layout)
    assert all(set(fewer[at]) <= set(most[at]) for at in most)
    assert sum(map(len, fewer.values())) < sum(map(len, most.values()))


def test_auto_theta_follows_the_keys_on_offer():
    q, k, _ = make(1, 2, 2, 96, 96)
    lists = lists_of(plan_of(q, k, theta="auto", eps=0.5, **SMALL).layout)
    literal = anchor(q, k, block=8, step=2, init_blocks=1, scale=32**-0.5)
    kept = 0
    for at, (_, gaps) in literal.items():
        want = [j for j, gap in gaps.items() if gap <= math.log(len(gaps) / 0.5)]
        assert lists[at] == want
        kept += len(want)
    assert 0 < kept < sum(len(gaps) for _, gaps in literal.values())


def test_group_shares_the_union():
    q, k, v = make(2, 4, 2, 70, 83)
    own = lists_of(plan_of(q, k, theta=5.0, **SMALL).layout)
    layout = plan_of(q, k, theta=5.0, share_kv_group=True, **SMALL).layout.check()
    assert layout.heads == 2
    shared = lists_of(layout)
    for (b, kv, g), listed in shared.items():
        assert listed == sorted({*own[b, 2 * kv, g], *own[b, 2 * kv + 1, g]})
    assert any(own[b, h, g] != shared[b, h // 2, g] for b, h, g in own)
    _, lse, stats = sa.anchor_attention(
        q, k, v, theta=5.0, share_kv_group=True, **SMALL, enable_gqa=True, return_lse=True, return_stats=True
    )
    assert stats.kept.shape == (2, 2)
    alone = sa.anchor_attention(q, k, v, theta=5.0, **SMALL, enable_gqa=True, return_lse=True)[1]
    assert (lse >= alone - 1e-12).all() and (lse > alone + 1e-9).any()


def test_capacity_gives_the_same_lists():
    q, k, _ = make(2, 2, 2, 91, 91)
    exact = plan_of(q, k, theta=5.0, **SMALL).layout
    used = exact.columns.capacity
    roomy = plan_of(q, k, theta=5.0, capacity=used + 50, **SMALL).layout.check()
    assert roomy.columns.capacity == used + 50
    assert torch.equal(roomy.columns.offsets, exact.columns.offsets)
    assert torch.equal(roomy.columns.indices[:used], exact.columns.indices)
    with pytest.raises(ValueError, match="capacity"):
        plan_of(q, k, theta=5.0, capacity=used - 1, **SMALL).layout.check()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bounds_set_ahead_are_what_the_layout_would_find(case):
    case = dict(Hq=2, Hkv=2) | SMALL | case
    q, k, _ = make(2, case["Hq"], case["Hkv"], case["L"], case["S"])
    layout = plan_of(q, k, theta=5.0, **{name: case[name] for name in SMALL}).layout
    assert torch.equal(layout.block_bounds(True), layout_bounds.block_bounds(layout, True))
    assert torch.equal(layout.column_bounds(True), layout_bounds.column_bounds(layout, True))
    regions = AnchorRegions(case["L"], case["S"], *(case[name] for name in SMALL))
    columns = plan_of(q, k, theta=math.inf, **{name: case[name] for name in SMALL}).layout.columns
    assert columns.offsets[-1] == regions.offered * 2 * case["Hq"]


def test_density_is_that_of_the_mask():
    q, k, _ = make(1, 2, 2, 91, 91)
    layout = plan_of(q, k, theta=5.0, **SMALL).layout
    mask = layout.to_dense(True)
    assert layout.density(is_causal=True) == pytest.approx(mask.sum().item() / (2 * 91 * 92 / 2))


def test_selection_in_16_bit_autocast_compares_in_float32():
    q, k, _ = make(1, 2, 2, 96, 96, dtype=torch.float32)
    plain = lists_of(plan_of(q, k, theta=5.0, **SMALL).layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lists_of(plan_of(q, k, theta=5.0, **SMALL).layout) == plain


def test_gradients_reach_the_inputs_through_attention_only():
    q, k, v = make(1, 1, 1, 40, 40)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    try:
        out = sa.anchor_attention(*leaves, theta=5.0, **SMALL, engine="reference")
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    out.backward(grad)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = plan_of(q, k, theta=5.0, **SMALL).layout.to_dense(True)
    scaled_dot_product_attention(*plain, attn_mask=mask).backward(grad)
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_first_call_in_inference_mode_does_not_break_training():
    q, k, v = make(1, 1, 1, 43, 43, dtype=torch.float32)
    with torch.inference_mode():
        sa.anchor_attention(q, k, v, theta=5.0, **SMALL)
    q = q.clone().requires_grad_()
    sa.anchor_attention(q, k, v, theta=5.0, **SMALL, engine="reference").sum().backward()
    assert q.grad.abs().sum() > 0


KERNEL_CASES = {
    "fp32": dict(L=140, S=140, dtype=torch.float32),
    "bf16-gqa-chunk": dict(L=75, S=150, Hq=2, Hkv=1, dtype=torch.bfloat16, step=3),
    "fp16-lse-shared": dict(L=150, S=150, Hq=2, Hkv=1, dtype=torch.float16, reference="lse", share=True),
    "two-init-D48": dict(L=90, S=133, D=48, dtype=torch.bfloat16, init_blocks=2),
    "no-local": dict(L=140, S=150, dtype=torch.float32, local_blocks=0),
    "three-local": dict(L=150, S=171, dtype=torch.float32, local_blocks=3),
}


@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_triton_selection_gives_the_portable_lists(case):
    kernels = pytest.importorskip("sparse_attn.kernels.anchor_select")
    case = dict(Hq=1, Hkv=1, D=32, step=2, init_blocks=1, reference="max", share=False, local_blocks=1) | case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"], case["D"], case["dtype"])
    q, k = q.to(device), k.to(device)
    regions = AnchorRegions(case["L"], case["S"], 16, case["step"], case["init_blocks"], case["local_blocks"])
    scale = case["D"] ** -0.5
    anchor, mean = portable.pool_anchor(q, k, regions, scale, case["reference"])
    ours, parts = kernels.pool_anchor(q, k, regions, scale, case["reference"])
    torch.testing.assert_close(ours, anchor, rtol=0, atol=2e-5)
    torch.testing.assert_close(parts.float().sum(0), mean, rtol=0, atol=5e-6)

    def masks(theta):
        return [
            portable.fill_columns(mean, k, anchor - theta - x, regions, scale, case["share"], None).to_mask(
                case["S"]
            )
            for x in (-TIE, TIE)
        ]

    for theta in (13.0, math.inf):
        least, most = masks(theta)
        lists = kernels.fill_columns(parts, k, ours - theta, regions, scale, case["share"], None)
        found = lists.to_mask(case["S"])
        assert (least <= found).all() and (found <= most).all()
        assert found.sum() > 0 and (theta == math.inf or found.sum() < 0.9 * regions.offered * case["Hq"])
    used = int(lists.offsets[-1])
    roomy = kernels.fill_columns(parts, k, ours - theta, regions, scale, case["share"], used + 3)
    assert roomy.capacity == used + 3 and torch.equal(roomy.indices[:used], lists.indices[:used])
    short = kernels.fill_columns(parts, k, ours - theta, regions, scale, case["share"], used - 3)
    assert torch.equal(short.indices, lists.indices[: used - 3])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(theta="auto", reference="lse", share_kv_group=True),
        dict(theta=4.0, samples=4, reference="all", local_blocks=2),
    ],
)
def test_gpu_output_is_that_of_the_reference(shape):
    q, k, v = (x.cuda() for x in make(1, 4, 2, 1000, 1500, 64, torch.float32))
    common = dict(block_size=64, step=4, enable_gqa=True, return_stats=True) | dict(theta=7.0) | shape
    out, stats = sa.anchor_attention(q, k, v, **common)
    want, want_stats = sa.anchor_attention(*(x.cpu() for x in (q, k, v)), **common, engine="reference")
    assert (stats.kept.cpu() - want_stats.kept).abs().max() <= 2, "more than ties differ"
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=2e-3)


@needs_gpu
def test_a_cuda_graph_holds_selection_and_attention():
    q, k, v = (x.cuda() for x in make(1, 2, 2, 1500, 1500, 64, torch.bfloat16))
    q2, k2, v2 = (x.cuda() for x in make(1, 2, 2, 1500, 1500, 64, torch.bfloat16, seed=9))

    def call():
        return sa.anchor_attention(q, k, v, theta=7.0, block_size=64, step=4, capacity=60_000)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for x, new in ((q, q2), (k, k2), (v, v2)):
        x.copy_(new)
    graph.replay()
    assert torch.equal(out, call())


def test_strided_inputs_select_the_same():
    q, k, v = make(2, 2, 2, 64, 64, dtype=torch.float32)
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = sa.anchor_attention(*spread, theta=5.0, **SMALL)
    torch.testing.assert_close(out, sa.anchor_attention(q, k, v, theta=5.0, **SMALL), atol=1e-6, rtol=0)


@pytest.mark.plain_empty
@pytest.mark.parametrize("capacity", [None, 4000])
def test_compiles_whole(capacity):
    q, k, v = make(1, 2, 2, 91, 91, dtype=torch.float32)

    def f(q, k, v):
        return sa.anchor_attention(q, k, v, theta=5.0, **SMALL, capacity=capacity, engine="reference")

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))


@pytest.mark.plain_empty
def test_selection_passes_opcheck():
    q, k, _ = make(1, 2, 1, 40, 60, dtype=torch.float32)
    arguments = (q, k, torch.full((2, 1), 6.0), 0.0, 8, 2, 1, 1, 32**-0.5, "max", None, None, False)
    for capacity in (None, 500):
        torch.library.opcheck(torch.ops.sparse_attn.anchor_columns.default, (*arguments, capacity))
    arguments = (q, k, None, 6.0, 8, 2, 1, 2, 32**-0.5, "all", 3, 0.8, False, None)
    torch.library.opcheck(torch.ops.sparse_attn.anchor_columns.default, arguments)


def test_kernels_say_that_samples_are_not_theirs():
    q, _, _ = make(1, 1, 1, 64, 64, dtype=torch.float32)
    regions = AnchorRegions(64, 64, 16, 2, 1)
    assert not any("samples" in x for x in portable.why_not_kernels(q, regions, 1.0))
    assert any("samples" in x for x in portable.why_not_kernels(q, regions, 1.0, samples=4))


def test_is_registered():
    assert METHODS["anchor"].op is sa.anchor_attention is sa.functional.anchor_attention


BAD = {
    "nan": (dict(theta=math.nan), "NaN"),
    "text": (dict(theta="best"), "auto"),
    "none": (dict(theta=None), "NoneType"),
    "integer-tensor": (dict(theta=torch.tensor([1, 2])), "float tensor"),
    "nan-in-tensor": (dict(theta=torch.tensor([1.0, math.nan])), "NaN"),
    "other-heads": (dict(theta=torch.tensor([1.0, 2.0, 3.0])), r"expected \[2\]"),
    "block_size": (dict(block_size=0), "block_size"),
    "step": (dict(step=0), "step"),
    "init_blocks": (dict(init_blocks=-1), "init_blocks"),
    "reference": (dict(reference="mean"), "'max' or 'lse'"),
    "eps": (dict(theta="auto", eps=0.0), "eps"),
    "not-causal": (dict(is_causal=False), "causal"),
    "capacity": (dict(capacity=0), "capacity"),
    "local_blocks": (dict(local_blocks=-1), "local_blocks"),
    "samples": (dict(samples=0), "samples"),
    "all-pooled": (dict(reference="all"), "needs samples"),
    "recall-pooled": (dict(recall=0.9), "recall needs samples"),
    "recall-one": (dict(recall=1.0, samples=4), "between 0 and 1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(arguments, message):
    q, k, v = make(1, 2, 2, 32, 32, dtype=torch.float32)
    with pytest.raises(ValueError, match=message) as refusal:
        sa.anchor_attention(q, k, v, **arguments)
    assert "anchor_attention" in str(refusal.value)


def test_bad_inputs_are_refused():
    q, k, v = make(1, 4, 2, 32, 32, dtype=torch.float32)
    for wrong in (
        lambda: sa.anchor_attention(q, k, v),  # GQA without enable_gqa
        lambda: sa.anchor_attention(q[0], k, v, enable_gqa=True),
        lambda: sa.anchor_attention(q[..., :16], k, v, enable_gqa=True),
        lambda: sa.anchor_attention(q[:, :, :0], k, v, enable_gqa=True),
        lambda: sa.anchor_attention(q.int(), k.int(), v.int(), enable_gqa=True),
    ):
        with pytest.raises(ValueError, match="anchor_attention"):
            wrong()
