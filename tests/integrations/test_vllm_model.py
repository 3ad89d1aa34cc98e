"""vLLM's own Llama on the backend, on a CPU: the logits of transformers, dense and sparse.

The model runner is this file: it keeps the pages and makes the metadata of each step, for several requests
at once, with chunked prefill and a shared prefix.
"""

from __future__ import annotations

import json

import pytest
import torch

# isort: off
# First: it imports vLLM in a way that keeps its kernels, or skips.
from vllm_batches import D, HKV, LLAMA, PAGE, CommonAttentionMetadata, transformers, vllm_config
# isort: on

from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import attention as vllm_attention

import sparse_attn as sa
from sparse_attn.integrations import vllm_backend as backend
from sparse_attn.integrations.vllm_config import ENV
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import S2Config
from sparse_attn.recipe import Fingerprint, HeadGroup, LayerPlan, Recipe

S2 = {"block_size": 16, "local_blocks": 1, "vert_stride": 2}


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 12  # attention sharp enough for errors to show
    return model


class Runner:
    """vLLM's model with `stock`'s weights, its pages, and steps of batches."""

    def __init__(self, config, stock):
        from vllm.model_executor.models.llama import LlamaForCausalLM

        self.config = config
        with set_current_vllm_config(config):
            self.model = LlamaForCausalLM(vllm_config=config)
            self.model.load_weights(stock.state_dict().items())
        self.layers = config.compilation_config.static_forward_context
        for layer in self.layers.values():
            layer.kv_cache = torch.zeros(64, HKV, PAGE, 2 * D)
        spec = next(iter(self.layers.values())).get_kv_cache_spec(config)
        builder = backend.SparseAttnBackend.get_builder_cls()
        self.builder = builder(spec, list(self.layers), config, torch.device("cpu"))

    def step(self, requests):
        """Logits [new tokens, vocabulary] of each request (ids so far, cached tokens, its pages)."""
        new = [len(ids) - cached for ids, cached, _ in requests]
        starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
        position = torch.cat([torch.arange(cached, len(ids)) for ids, cached, _ in requests])
        slots = torch.cat(
            [
                torch.tensor([pages[p // PAGE] * PAGE + p % PAGE for p in range(cached, len(ids))])
                for ids, cached, pages in requests
            ]
        )
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, num_reqs=len(requests),
            seq_lens=torch.tensor([len(ids) for ids, _, _ in requests], dtype=torch.int32),
            num_actual_tokens=sum(new), max_query_len=max(new), max_seq_len=max(len(x[0]) for x in requests),
            block_table_tensor=torch.tensor([pages for _, _, pages in requests], dtype=torch.int32),
            slot_mapping=slots,
        )  # fmt: skip
        metadata = dict.fromkeys(self.layers, self.builder.build(0, common))
        where = dict.fromkeys(self.layers, slots)
        ids = torch.cat([torch.tensor(ids[cached:]) for ids, cached, _ in requests])
        with (
            torch.no_grad(),
            set_current_vllm_config(self.config),
            set_forward_context(metadata, self.config, slot_mapping=where),
        ):
            return self.model.compute_logits(self.model(ids, position)).split(new)


@pytest.fixture
def run_with(monkeypatch, tmp_path, stock):
    """run_with(settings) -> Runner, in a world of one process, which is taken down after the test."""
    store = f"file://{tmp_path}/store"
    parallel_state.init_distributed_environment(1, 0, store, 0, backend="gloo")

    def make(settings):
        monkeypatch.setenv(ENV, settings if isinstance(settings, str) else json.dumps(settings))
        backend.settings.cache_clear()
        # The platform of a CPU has no say in backends; a GPU's takes what the command line names.
        monkeypatch.setattr(vllm_attention, "get_attn_backend", lambda *a, **k: backend.SparseAttnBackend)
        config = vllm_config(tmp_path)
        with set_current_vllm_config(config):
            parallel_state.ensure_model_parallel_initialized(1, 1)
        return Runner(config, stock)

    yield make
    backend.settings.cache_clear()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


FIRST, SECOND = list(range(0, 12)), [*range(0, 3), *range(20, 29)]  # the first three pages are shared


@pytest.fixture(scope="module")
def prompts():
    """Two prompts of 150 and 90 tokens that begin with the same 48."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(0, 128, (150,), generator=generator).tolist()
    return first, first[:48] + torch.randint(0, 128, (42,), generator=generator).tolist()


def serve(runner, prompts, num_new=5):
    """Logits of all tokens of both requests: chunks of 64, the second one on the first's cached prefix,
    in batches that also decode; then greedy tokens."""
    first, second = (list(x) for x in prompts)
    a, b = [], []
    a += runner.step([(first[:64], 0, FIRST)])
    a += runner.step([(first[:128], 64, FIRST)])
    one, two = runner.step([(first, 128, FIRST), (second, 48, SECOND)])
    a, b = [*a, one], [two]
    for _ in range(num_new):
        for ids, logits in ((first, a), (second, b)):
            ids.append(int(logits[-1][-1].argmax()))
        one, two = runner.step([(first, len(first) - 1, FIRST), (second, len(second) - 1, SECOND)])
        a, b = [*a, one], [*b, two]
    return (first, torch.cat(a)), (second, torch.cat(b))


def expected(model, ids, prompt_len):
    """transformers' logits: the prompt at once, then token by token."""
    with torch.no_grad():
        out = model(torch.tensor([ids[:prompt_len]]), use_cache=True)
        logits = [out.logits[0]]
        for n in range(prompt_len, len(ids)):
            out = model(torch.tensor([ids[n : n + 1]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    return torch.cat(logits)


def check(runner, prompts, model):
    """The first request's logits from its first token on, the second's from token 48 on."""
    for (ids, logits), prompt, cached in zip(serve(runner, prompts), prompts, (0, 48), strict=True):
        ref = expected(model, ids, len(prompt))[cached:]
        torch.testing.assert_close(logits, ref, atol=2e-5 * float(ref.abs().max()), rtol=0)


def test_dense_equals_transformers(run_with, stock, prompts):
    runner = run_with({"method": "blasst", "options": {"threshold": 0.0}})
    assert type(next(iter(runner.layers.values())).impl) is backend.SparseAttnImpl
    check(runner, prompts, stock)


def test_s2_equals_transformers_patched_alike(run_with, stock, prompts):
    runner = run_with({"method": "s2", "options": S2, "layers": {"0": "dense"}})
    with torch.no_grad():
        dense = stock(torch.tensor([prompts[0]])).logits
        with sa.patched(stock, "s2", **S2, layers={0: "dense"}):
            assert (stock(torch.tensor([prompts[0]])).logits - dense).abs().max() > 1e-2
            check(runner, prompts, stock)


def test_decoding_may_follow_s2_too(run_with, stock, prompts):
    """As a model that was trained with it needs."""
    runner = run_with({"method": "s2", "options": S2, "decode": "sparse"})
    with sa.patched(stock, "s2", **S2, decode="sparse"):
        check(runner, prompts, stock)


def test_a_recipe_serves_transformers_and_vllm(run_with, stock, prompts, tmp_path):
    """One file, made for the transformers model, gives the same in both."""
    groups = (
        HeadGroup((0, 1), "s2", S2Config(**S2)),
        HeadGroup((2, 3), "blasst", BlasstConfig(threshold=0.0)),
    )
    recipe = Recipe(Fingerprint.of(stock), tuple(LayerPlan(n, groups) for n in (0, 1)))
    recipe.save(tmp_path / "tiny.recipe.json")
    runner = run_with(str(tmp_path / "tiny.recipe.json"))
    with sa.patched(stock, recipe):
        check(runner, prompts, stock)
