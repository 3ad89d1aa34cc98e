"""A layer of a recipe over pages: what `run_layer` gives for each sequence, in few calls."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from sparse_attn import varlen_batch
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import S2Config, s2_layout
from sparse_attn.recipe import DenseConfig, HeadGroup, LayerPlan, run_layer
from sparse_attn.recipe_paged import run_layer_paged
from sparse_attn.varlen_pages import needed_pages

HQ, HKV, D, PAGE = 8, 4, 32, 16
UNREAD = 3e30  # not nan, which what was never written holds too
S2 = S2Config(32, 1, 4)
THRESHOLDS = torch.tensor([0.2, 0.6])
MIXED = (
    HeadGroup((0, 5), "s2", S2),
    HeadGroup((1, 2, 3), "dense", DenseConfig()),
    HeadGroup((4,), "anchor", AnchorConfig(theta=2.0, block_size=32, step=2)),
    HeadGroup((6, 7), "blasst", BlasstConfig(threshold=THRESHOLDS, block_m=64, block_n=64)),
)
DECODING = [(1, 300), (1, 65), (1, 128)]
PROMPTS = [(80, 80), (120, 120), (40, 168)]


class Batch:
    def __init__(self, lengths):
        generator = torch.Generator().manual_seed(0)
        self.q_lens, self.k_lens = (list(x) for x in zip(*lengths, strict=True))
        most = max(-(-S // PAGE) for S in self.k_lens)
        self.table = torch.randperm(len(lengths) * most, generator=generator).view(-1, most)
        self.cache = torch.full((len(lengths) * most, HKV, PAGE, 2 * D), torch.nan)
        self.query = torch.randn(sum(self.q_lens), HQ, D, generator=generator) * 2
        self.tokens = [torch.randn(S, HKV, 2 * D, generator=generator) for S in self.k_lens]
        for n, own in enumerate(self.tokens):
            at = torch.arange(len(own))
            self.cache[self.table[n, at // PAGE], :, at % PAGE] = own

    def paged(self, plan, **options):
        ends = [0, *accumulate(self.q_lens)]
        return run_layer_paged(
            plan, self.query, *self.cache.transpose(1, 2).split(D, -1), cu_seqlens_q=ends,
            block_table=self.table, seqused_k=self.k_lens, is_causal=True, **options,
        )  # fmt: skip

    def apart(self, plan, **options):
        parts = []
        for q, tokens in zip(self.query.split(self.q_lens), self.tokens, strict=True):
            k, v = (x.transpose(0, 1)[None] for x in tokens.split(D, -1))
            out = run_layer(plan, q.transpose(0, 1)[None], k, v, is_causal=True, **options)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize("shared", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_every_head_gets_what_run_layer_gives(calls, shared, monkeypatch):
    monkeypatch.setattr(varlen_batch, "launches_cost", lambda device: shared)
    plan, batch = LayerPlan(0, MIXED), Batch([*DECODING, *PROMPTS])
    assert torch.equal(batch.paged(plan), batch.apart(plan))


def test_a_step_of_decoding_is_one_call_a_group(calls, monkeypatch):
    """On a CPU a group's heads are cut into runs that lie side by side: here of one key head each, and of two
    where it has whole ones."""
    monkeypatch.setattr(varlen_batch, "launches_cost", lambda device: True)  # of BLASST
    groups = (HeadGroup((0, 1, 2, 3), "s2", S2), HeadGroup((4, 5), "dense", DenseConfig()), MIXED[3])
    Batch(DECODING).paged(LayerPlan(0, groups))
    assert sorted(call.k.shape[1] for call in calls) == [1, 1, 2]


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize("kinds", ["decoding", "prompts"])
def test_pages_that_no_head_of_a_group_needs_are_not_read(calls, kinds, monkeypatch):
    """What they hold is in no key or value that the engine is given. Key heads 0 and 1 run one S2, 2 and 3
    another."""
    monkeypatch.setattr(varlen_batch, "launches_cost", lambda device: True)
    other = S2Config(16, 2, 8, sink_blocks=1)
    plan = LayerPlan(0, (HeadGroup((0, 1, 2, 3), "s2", S2), HeadGroup((4, 5, 6, 7), "s2", other)))
    lengths = [(1, 500), (1, 259), (1, 300)] if kinds == "decoding" else [(20, 404), (40, 424), (24, 280)]
    batch = Batch(lengths)
    expected, unread = batch.apart(plan), 0
    calls.clear()
    for n, (L, S) in enumerate(lengths):
        for config, heads in ((S2, (0, 1)), (other, (2, 3))):
            layout = s2_layout(config, L, S, num_heads=HQ, num_kv_heads=HKV)
            for head in heads:
                pages = (~needed_pages(layout, HKV, PAGE)[0, head]).nonzero()[:, 0]
                batch.cache[batch.table[n, pages], head] = UNREAD
                unread += len(pages)
    assert unread > 50
    assert torch.equal(batch.paged(plan), expected)
    assert calls and not any((x == UNREAD).any() for call in calls for x in (call.k, call.v))


def test_ranks_of_tensor_parallelism(calls):
    """A rank with one half of the heads gives that half."""
    plan, batch = LayerPlan(0, MIXED), Batch(DECODING)
    whole = batch.paged(plan)
    for offset in (0, 4):
        rank = Batch(DECODING)
        rank.query = batch.query[:, offset : offset + 4]
        rank.cache = batch.cache[:, offset // 2 : offset // 2 + 2]
        assert torch.equal(rank.paged(plan, head_offset=offset), whole[:, offset : offset + 4])


def test_bad_calls(calls):
    batch = Batch(DECODING)
    with pytest.raises(ValueError, match=r"run_layer.*has 8 heads, but the plan of layer 0 has 4"):
        batch.paged(LayerPlan(0, (HeadGroup((0, 1, 2, 3), "s2", S2),)))
    batch.table[1, 0] = 4000
    with pytest.raises(ValueError, match=r"^run_layer_paged: block_table\[1, 0\] is 4000"):
        batch.paged(LayerPlan(0, MIXED))
