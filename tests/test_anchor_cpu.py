"""AnchorAttention's selection in C++ against the literal reading of the rules and against PyTorch's lists."""

import math

import pytest
import torch
from references.anchor import anchor, recall_thetas
from test_anchor import CASES, RECALL_CASES, SMALL, TIE, assert_lists_follow, lists_of, make, plan_of

from sparse_attn.engines.cpu import CpuEngine
from sparse_attn.methods import anchor_cpu
from sparse_attn.methods import anchor_select as portable
from sparse_attn.methods.anchor_regions import AnchorRegions
from sparse_attn.methods.anchor_sampled import Sampling

pytestmark = pytest.mark.skipif(bool(CpuEngine().why_off()), reason="the CPU library is not built")


@pytest.fixture(params=["amx", "avx512", "avx2", "baseline"])
def isa(request, monkeypatch):
    """Each instruction set of this machine."""
    monkeypatch.setenv("SPARSE_ATTN_CPU_ISA", request.param)
    try:
        CpuEngine().instruction_set()
    except ValueError as refusal:
        pytest.skip(str(refusal))


def in_torch(monkeypatch, run):
    """What `run` gives where the C++ selection does not run."""
    with monkeypatch.context() as patch:
        patch.setattr(anchor_cpu, "why_not_cpu", lambda *_: ["not asked for"])
        return run()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("reference", ["max", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mean_queries_list_what_the_paper_says(case, reference, dtype):
    case = dict(Hq=2, Hkv=2) | SMALL | case
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"], dtype=dtype)
    shape = {name: case[name] for name in SMALL}
    literal = anchor(
        q, k, block=case["block_size"], step=case["step"], init_blocks=case["init_blocks"],
        scale=32**-0.5, reference=reference,
    )  # fmt: skip
    theta = third_of(literal)
    layout = plan_of(q, k, theta=theta, reference=reference, **shape).layout.check()
    kept, offered = assert_lists_follow(lists_of(layout), literal, theta, TIE)
    assert offered == 0 or 0.2 * offered < kept < 0.6 * offered


def third_of(literal):
    """A theta that keeps about a third of what is offered."""
    gaps = sorted(gap for _, of in literal.values() for gap in of.values())
    return gaps[len(gaps) // 3] + 1e-3 if gaps else 5.0


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("reference", ["max", "lse", "all"])
@pytest.mark.parametrize(("samples", "local_blocks"), [(1, 0), (2, 3), (3, 1)])
def test_sampled_queries_list_what_one_of_them_wants(case, reference, samples, local_blocks):
    case = dict(Hq=2, Hkv=2) | SMALL | case
    shape = {name: case[name] for name in SMALL} | dict(local_blocks=local_blocks)
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"], dtype=torch.float32)
    literal = anchor(
        q, k, block=case["block_size"], step=case["step"], init_blocks=case["init_blocks"],
        local_blocks=local_blocks, scale=32**-0.5, reference=reference, samples=samples,
    )  # fmt: skip
    theta = third_of(literal)
    layout = plan_of(q, k, theta=theta, reference=reference, samples=samples, **shape).layout
    kept, offered = assert_lists_follow(lists_of(layout.check()), literal, theta, TIE)
    assert offered == 0 or 0.2 * offered < kept < 0.6 * offered


@pytest.mark.parametrize("recall", [0.9, 0.99])
@pytest.mark.parametrize("case", RECALL_CASES.values(), ids=RECALL_CASES)
def test_recall_sets_theta_by_what_samples_keep_for_each_other(case, recall, isa):
    case = dict(Hq=2, Hkv=2, step=1, samples=4) | case
    q, k, _ = make(1, case["Hq"], case["Hkv"], case["L"], case["S"], dtype=torch.float32)
    shape = dict(step=case["step"], init_blocks=1, samples=case["samples"], local_blocks=2)
    thetas = recall_thetas(q, k, block=8, scale=32**-0.5, recall=recall, **shape)
    literal = anchor(q, k, block=8, scale=32**-0.5, reference="all", **shape)
    lists = lists_of(plan_of(q, k, block_size=8, recall=recall, **shape).layout.check())
    for at, (_, gaps) in literal.items():
        for j, gap in gaps.items():
            assert (j in lists[at]) == (gap <= thetas[at]) or abs(gap - thetas[at]) < TIE, (at, j)
        assert set(lists[at]) <= gaps.keys()


OPTIONS = {
    "mean": dict(theta=9.0, step=3),
    "mean-auto": dict(theta="auto", step=2, reference="lse"),
    "mean-long-superblock": dict(theta=9.0, step=16),
    "one-sample": dict(theta=7.0, step=1, samples=1, reference="all"),
    "many-samples": dict(theta=9.0, step=4, samples=7),
    "recall": dict(step=1, samples=2, recall=0.95),
    "recall-all": dict(step=2, samples=5, recall=0.98),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lists_are_those_of_pytorch(options, isa, monkeypatch):
    q, k, _ = make(2, 4, 2, 900, 1003, 48, torch.float32)
    config = dict(block_size=24) | options

    def mask(q, k, **more):
        return plan_of(q, k, **config, **more).layout.check().columns.to_mask(1003)

    ours, theirs = mask(q, k), in_torch(monkeypatch, lambda: mask(q, k))
    assert 0 < ours.sum() < 0.95 * ours.numel()
    assert (ours != theirs).sum() <= 2, "more than a tie or two differs"
    assert torch.equal(mask(q, k, share_kv_group=True), ours.view(2, 2, 2, -1, 1003).any(2).flatten(0, 2))
    # Rows far apart, as of (B, L, H, D) memory.
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(mask(*spread), ours)
    halves = [x.bfloat16() for x in (q, k)]
    assert (mask(*halves) != in_torch(monkeypatch, lambda: mask(*halves))).sum() <= 2


@pytest.mark.parametrize("options", [OPTIONS["mean"], OPTIONS["recall"], OPTIONS["one-sample"]])
def test_threads_do_not_change_the_lists(options):
    q, k, _ = make(1, 4, 2, 500, 500, 32, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(plan_of(q, k, block_size=16, **options).layout.columns)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].offsets, found[1].offsets)
    assert torch.equal(found[0].indices, found[1].indices)


@pytest.mark.parametrize("samples", [None, 3])
def test_thetas_by_head_and_capacity(samples):
    q, k, _ = make(2, 3, 3, 96, 102, dtype=torch.float32)
    more = dict(samples=samples, **SMALL)
    theta = torch.tensor([-math.inf, 6.0, math.inf])
    exact = plan_of(q, k, theta=theta, **more).layout.check()
    lists, alone = lists_of(exact), lists_of(plan_of(q, k, theta=6.0, **more).layout)
    regions = AnchorRegions(96, 102, 8, 2, 1)
    for (b, h, g), listed in lists.items():
        assert listed == [[], alone[b, h, g], list(regions.offered_keys(g))][h]
    used = exact.columns.capacity
    roomy = plan_of(q, k, theta=theta, capacity=used + 9, **more).layout.check()
    assert roomy.columns.capacity == used + 9
    assert torch.equal(roomy.columns.offsets, exact.columns.offsets)
    assert torch.equal(roomy.columns.indices[:used], exact.columns.indices)
    short = plan_of(q, k, theta=theta, capacity=used - 5, **more).layout
    assert torch.equal(short.columns.indices, exact.columns.indices[: used - 5])
    with pytest.raises(ValueError, match="capacity"):
        short.check()


def test_anchor_and_mean_queries_are_those_of_pytorch(isa):
    q, k, _ = make(2, 4, 2, 150, 171, 40, torch.float32)
    regions = AnchorRegions(150, 171, 20, 3, 2, 2)
    for reference in ("max", "lse"):
        anchors, mean = anchor_cpu.pooled_anchor(q, k, regions, 0.2, reference)
        want, want_mean = portable.pool_anchor(q.double(), k.double(), regions, 0.2, reference)
        torch.testing.assert_close(anchors.double(), want, rtol=0, atol=2e-5)
        torch.testing.assert_close(mean.double(), 0.2 * want_mean, rtol=0, atol=1e-6)


def test_what_the_library_leaves_to_pytorch():
    q, k, _ = make(1, 1, 1, 64, 64, dtype=torch.float32)
    regions = AnchorRegions(64, 64, 16, 2, 1)
    assert anchor_cpu.why_not_cpu(q, k, regions, None) == []
    assert "float64" in anchor_cpu.why_not_cpu(q.double(), k.double(), regions, None)[0]
    assert "meta" in anchor_cpu.why_not_cpu(q.to("meta"), k.to("meta"), regions, None)[0]
    long = AnchorRegions(1 << 20, 1 << 20, 16, 2, 1)
    assert anchor_cpu.why_not_cpu(q, k, long, Sampling(1, "all", None)) == []
    assert "above" in anchor_cpu.why_not_cpu(q, k, long, Sampling(2, "all", None))[0]
