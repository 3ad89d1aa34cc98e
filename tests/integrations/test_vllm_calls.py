"""How a vLLM batch becomes calls of an engine, and what the adapter adds to them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

# isort: off
# First: it imports vLLM in a way that keeps its kernels, or skips.
from vllm_batches import ANCHOR, H, HKV, MIXED, PAGE, S2
from vllm_batches import Batch, builder_and_layers, save_recipe, vllm_config
# isort: on

from test_transformers_cost import LIMIT_US, ops

from sparse_attn import varlen_batch
from sparse_attn.bench.timing import cpu_us
from sparse_attn.integrations import vllm_backend as backend
from sparse_attn.integrations import vllm_config as vllm_config_module
from sparse_attn.integrations.vllm_config import ENV
from sparse_attn.methods.s2 import S2Config, s2_layout
from sparse_attn.varlen import Each


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def use(monkeypatch, config):
    """use(settings): the builder and the layers' implementation under these settings."""

    def make(settings: dict):
        monkeypatch.setenv(ENV, json.dumps(settings))
        return builder_and_layers(config)

    yield make
    backend.settings.cache_clear()


@pytest.fixture
def recipe(tmp_path, config):
    return save_recipe(tmp_path / "tiny.recipe.json", config)


# -- several sequences in one call of an engine -----------------------------------------------------------

DECODING = [(1, 40), (1, 1), (1, 333), (1, 90), (1, 128)]
BLASST = {"threshold": 0.5, "block_m": 32, "block_n": 32}
SETTINGS = {
    "dense": {"method": "dense", "layers": {"1": "s2"}},
    "blasst": {"method": "blasst", "options": BLASST, "decode": "sparse"},
    "s2": {"method": "s2", "options": S2, "decode": "sparse"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_of_decoding_is_one_call_a_layer(use, name, calls, monkeypatch):
    """On a CPU where BLASST votes only if that is told to be a GPU: rows are added."""
    if name == "blasst":
        monkeypatch.setattr(varlen_batch, "launches_cost", lambda device: True)
    builder, layers = use(SETTINGS[name])
    Batch(DECODING).run(builder, *layers[0])
    assert len(calls) == 1


def test_a_step_of_decoding_is_one_call_for_each_group_of_a_recipe(use, recipe, calls):
    """S2 and dense heads; AnchorAttention chooses for each sequence from its own keys."""
    builder, layers = use({"recipe": recipe, "decode": "sparse"})
    Batch(DECODING).run(builder, *layers[1])
    assert len(calls) == 2 + 1 + len(DECODING)  # heads 0 and 3 lie apart: two calls on a CPU


@pytest.mark.parametrize("name", [*SETTINGS, "anchor", "recipe"])
def test_sharing_calls_changes_nothing(use, name, calls, monkeypatch, recipe):
    """Bit for bit, with prompts together as on a GPU or alone as on a CPU."""
    more = {"anchor": {"method": "anchor", "options": ANCHOR}, "recipe": {"recipe": recipe}}
    builder, layers = use((SETTINGS | more)[name])
    batch, outs, counts = Batch([*DECODING, (60, 60), *MIXED, (75, 75)]), [], []
    for alone, shared in ((True, False), (False, False), (False, True)):
        with monkeypatch.context() as patch:
            patch.setattr(varlen_batch, "launches_cost", lambda device, shared=shared: shared)
            if alone:
                patch.setattr(Each, "can_join", False)
            calls.clear()
            outs.append(batch.run(builder, *layers[name == "recipe"]).clone())
            counts.append(len(calls))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert counts[0] >= counts[1] > counts[2]
    assert (counts[0] > counts[1]) == (name != "blasst")


@pytest.mark.parametrize("unread", [torch.nan, 3e30])
def test_pages_that_no_head_needs_are_not_read(use, calls, unread):
    """Of S2 a decoding step and a chunk, by key head. Results never show what such pages hold; that they are
    not copied shows in what the engine is given, where nan is also what was never written."""
    builder, layers = use({"method": "s2", "options": S2 | {"vert_stride": 4}, "decode": "sparse"})
    batch = Batch([(1, 400), (1, 259), (40, 300)])
    expected = batch.run(builder, *layers[0]).clone()
    calls.clear()
    num_poisoned = 0
    for n, (L, S) in enumerate(zip(batch.new, batch.keys, strict=True)):
        layout = s2_layout(S2Config(**S2 | {"vert_stride": 4}), L, S, num_heads=H, num_kv_heads=HKV)
        read = layout.to_dense()[0].any(1)  # [HKV, S]
        for head, page in itertools.product(range(HKV), range(S // PAGE)):
            if not read[head, page * PAGE : (page + 1) * PAGE].any():
                batch.cache[batch.table[n, page], head] = unread
                num_poisoned += 1
    assert num_poisoned > 20
    impl, layer = layers[0]
    out = torch.empty_like(expected)
    impl.forward(layer, batch.q, None, None, batch.cache, batch.metadata(builder), out)
    assert torch.equal(out, expected)
    assert calls and not any((x == unread).any() for call in calls for x in (call.k, call.v))


# -- what the adapter adds -------------------------------------------------------------------------------


@pytest.fixture
def no_attention(monkeypatch):
    for module in (backend, vllm_config_module):
        monkeypatch.setattr(module, "sparse_attention_paged", lambda query, *args, **how: query)


def layer_call(use, batch, decode):
    """A layer's call as vLLM makes it, on metadata that serves all layers; and how many runs it has."""
    builder, ((impl, layer), _) = use({"method": "s2", "options": S2, "decode": decode})
    metadata, out = batch.metadata(builder), torch.empty_like(batch.q)
    return lambda: impl.forward(layer, batch.q, None, None, batch.cache, metadata, out), metadata.segments


def test_operators_of_a_layer_call_beyond_the_attention(use, no_attention):
    """Views of queries and output for each of several runs; those of the cache are kept, nothing is copied.
    Sequences that decode are a run of their own only where their rules differ."""
    for decode, runs, slices in (("sparse", 1, 0), ("dense", 2, 4)):
        call, segments = layer_call(use, Batch([(1, 50), (40, 40)]), decode)
        assert len(segments) == runs
        assert ops(call) == ({"aten::slice": slices} if slices else {})


def test_time_of_a_layer_call_beyond_the_attention(use, no_attention):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call, _ = layer_call(use, Batch([(1, 50), (1, 20), (40, 40), (33, 70)]), "sparse")
    with torch.inference_mode():
        added = cpu_us(call)
    torch.set_num_threads(threads)
    assert added < LIMIT_US, f"{added:.1f} us"
