"""The vLLM backend against the real package's classes, on a CPU, with metadata made by hand.

Batches mix decoding, whole prompts, chunks and cached prefixes; the reference is masked softmax in float64.
vLLM's own Triton kernels, which a GPU runs for dense sequences, run here in Triton's interpreter.
"""

from __future__ import annotations

import json

import pytest
import torch

# isort: off
# First: it imports vLLM in a way that keeps its kernels, or skips.
from vllm_batches import ANCHOR, D, H, HKV, MIXED, PREFILLS, S2, SCALE
from vllm_batches import Batch, assert_near, builder_and_layers, save_recipe, transformers, vllm, vllm_config
# isort: on

from vllm.config import AttentionConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import registry

from sparse_attn.integrations import vllm as plugin
from sparse_attn.integrations import vllm_backend as backend
from sparse_attn.integrations.vllm_config import ENV, Heads
from sparse_attn.methods import METHODS
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.s2 import S2Config
from sparse_attn.recipe import Fingerprint, HeadGroup, LayerPlan, Recipe


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def use(monkeypatch, config):
    """use(settings): the builder and the layers' implementation under these settings."""

    def make(settings: dict, **options):
        monkeypatch.setenv(ENV, json.dumps(settings))
        return builder_and_layers(config, **options)

    yield make
    backend.settings.cache_clear()


# -- attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], ids=["BHNC", "BNHC", "HBNC"])
def test_dense_batches_equal_sdpa(use, layout):
    builder, layers = use({"method": "dense", "layers": {"1": "s2"}})
    batch = Batch(MIXED, layout)
    batch.check(batch.run(builder, *layers[0]))


def test_dense_bf16(use):
    builder, layers = use({"method": "dense"})
    batch = Batch(MIXED, dtype=torch.bfloat16)
    batch.check(batch.run(builder, *layers[0]))


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["BHNC", "BNHC"])
@pytest.mark.parametrize(
    ("name", "options", "cls"), [("anchor", ANCHOR, AnchorConfig), ("s2", S2, S2Config)], ids=["anchor", "s2"]
)
def test_prefill_is_sparse_and_decode_dense(use, name, options, cls, layout):
    builder, layers = use({"method": name, "options": options})
    batch = Batch(MIXED, layout)
    out = batch.run(builder, *layers[1])
    batch.check(out, batch.by(name, cls(**options), PREFILLS))
    assert (out.double() - batch.reference()).abs().max() > 0.05  # the method did leave something out


def test_blasst_prefill_and_decode(use):
    """A threshold of 0 skips nothing; a high one changes what is sparse, and with decode also that."""
    batch = Batch(MIXED)
    options = {"threshold": 0.0, "block_m": 32, "block_n": 32}
    builder, layers = use({"method": "blasst", "options": options})
    batch.check(batch.run(builder, *layers[0]))
    options["threshold"] = 0.5
    for decode, unchanged in (("dense", True), ("sparse", False)):
        builder, layers = use({"method": "blasst", "options": options, "decode": decode})
        out, ref = batch.run(builder, *layers[0]), batch.reference()
        assert (out[3:].double() - ref[3:]).abs().max() > 1e-3
        worst = (out[:3].double() - ref[:3]).abs().max()
        assert (worst < 1e-5) == unchanged
    literal = METHODS["blasst"].op(
        batch.q[:1].transpose(0, 1)[None], *(x[0].transpose(0, 1)[None] for x in (batch.k, batch.v)),
        is_causal=True, scale=SCALE, enable_gqa=True, engine="reference", **options,
    )  # fmt: skip
    assert_near(out[:1], literal[0].transpose(0, 1))


def test_layers_may_differ(use):
    builder, layers = use({"method": "s2", "options": S2, "layers": {"0": "dense"}})
    batch = Batch(MIXED)
    batch.check(batch.run(builder, *layers[0]))
    batch.check(batch.run(builder, *layers[1]), batch.by("s2", S2Config(**S2), PREFILLS))


def test_short_sequences_may_stay_dense(use):
    builder, layers = use({"method": "s2", "options": S2, "min_keys": 90, "engine": "reference"})
    batch = Batch(MIXED)
    mask_of = batch.by("s2", S2Config(**S2), [4, 5, 7])
    batch.check(batch.run(builder, *layers[0]), mask_of)


def test_chunks_over_a_cached_prefix_give_what_the_whole_prompt_gives(use):
    """S2's pattern depends on positions alone, so that chunks of whole blocks change nothing."""
    builder, layers = use({"method": "s2", "options": S2})
    whole = Batch([(256, 256)])
    ref = whole.run(builder, *layers[0])
    for first, last in ((0, 96), (96, 160), (160, 256)):
        chunk = Batch([(last - first, last)])
        chunk.q = whole.q[first:last]
        chunk.k, chunk.v = ([x[0][:last]] for x in (whole.k, whole.v))
        assert_near(chunk.run(builder, *layers[0]), ref[first:last])


def test_rows_that_vllm_pads_and_empty_batches(use):
    builder, layers = use({"method": "s2", "options": S2})
    batch = Batch([(1, 20), (1, 1), (0, 1), (0, 1)])
    batch.check(batch.run(builder, *layers[0]))
    assert [x.kind for x in batch.metadata(builder).segments] == ["dense"]


# -- recipes and tensor parallelism -------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, config):
    return save_recipe(tmp_path / "tiny.recipe.json", config)


def mask_of_recipe(batch):
    s2 = batch.by("s2", S2Config(**S2, num_heads=H), PREFILLS)
    anchor = batch.by("anchor", AnchorConfig(**ANCHOR), PREFILLS)

    def mask_of(n, q, k):
        if n not in PREFILLS:
            return None
        full = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
        shards = s2(n, q, k).repeat_interleave(2, dim=1)  # a pattern for each key head
        return torch.cat([shards[:, :1], anchor(n, q[:, 1:2], k[:, :1]), full, shards[:, 3:]], dim=1)

    return mask_of


def test_recipes_run_each_head_by_its_own_method(use, recipe):
    builder, layers = use({"recipe": recipe})
    batch = Batch(MIXED)
    batch.check(batch.run(builder, *layers[0]))
    batch.check(batch.run(builder, *layers[1]), mask_of_recipe(batch))


@pytest.mark.parametrize("what", ["recipe", "s2"])
def test_a_tensor_parallel_rank_follows_the_numbers_of_all_heads(use, recipe, what):
    """Two ranks with one key head each give the two halves of what one with all heads gives."""
    builder, layers = use({"recipe": recipe} if what == "recipe" else {"method": "s2", "options": S2})
    impl, layer = layers[1]
    rules = impl.rules_of(layer.layer_name)
    batch = Batch(MIXED)
    whole = batch.run(builder, impl, layer)
    segment = batch.metadata(builder).segments[-1]
    assert segment.kind == "prefill"
    for rank in (0, 1):
        own = batch.cache[:, rank : rank + 1]
        heads = slice(2 * rank, 2 * rank + 2)
        out = torch.full_like(whole[segment.first :, heads], torch.nan)
        rules["prefill"].attend(
            batch.q[segment.first :, heads], *own.transpose(1, 2).split(D, dim=-1),
            cu_seqlens_q=segment.cu_seqlens_q, block_table=segment.metadata.block_table,
            seqused_k=segment.seqused_k, scale=SCALE, layer=1, engine=None,
            heads=Heads(2, 1, H, HKV, 2 * rank), out=out,
        )  # fmt: skip
        assert_near(out, whole[segment.first :, heads])


def test_ranks_that_share_key_heads(use, config, monkeypatch):
    """Four ranks for two key heads: nothing that differs by head, the rest as ever."""
    monkeypatch.setattr(config.parallel_config, "tensor_parallel_size", 4)
    with pytest.raises(ValueError, match=r"4 tensor-parallel ranks share the model's 2 key heads"):
        use({"method": "s2"})
    builder, layers = use({"method": "blasst", "options": {"threshold": 0.0}})
    batch = Batch(MIXED)
    batch.check(batch.run(builder, *layers[0]))


def test_a_recipe_of_another_model_is_refused(use, tmp_path, config):
    other = transformers.LlamaConfig(
        num_hidden_layers=3, num_attention_heads=H, num_key_value_heads=HKV, head_dim=D,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    plans = [LayerPlan(n, (HeadGroup((0, 1, 2, 3), "s2", S2Config()),)) for n in range(3)]
    Recipe(Fingerprint.of(other), tuple(plans)).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"made for another model: num_layers is 2, the recipe's 3"):
        use({"recipe": str(tmp_path / "other.json")})
    with pytest.raises(ValueError, match=r"layers names \[2\]; this model's layers are 0 to 1"):
        use({"method": "s2", "layers": {"2": "dense"}})


def test_the_fingerprint_is_the_same_inside_vllm(config):
    plain = transformers.AutoConfig.from_pretrained(config.model_config.model)
    assert Fingerprint.of(plain) == Fingerprint.of(config.model_config.hf_config)


# -- what vLLM asks of a backend ------------------------------------------------------------------------


def test_registration(monkeypatch):
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    custom = registry.AttentionBackendEnum.CUSTOM
    monkeypatch.delenv(ENV, raising=False)
    plugin.register()
    assert not custom.is_overridden()
    monkeypatch.setenv(ENV, '{"method": "flash"}')
    with pytest.raises(ValueError, match="unknown method 'flash'"):
        plugin.register()
    monkeypatch.setenv(ENV, '{"method": "s2"}')
    plugin.register()
    plugin.register()  # vLLM may call it several times
    assert custom.get_class() is backend.SparseAttnBackend
    assert registry.AttentionBackendEnum[backend.SparseAttnBackend.get_name()] is custom
    registry.register_backend(custom, "another.package.Backend")
    with pytest.raises(
        ValueError, match=r"CUSTOM is another\.package\.Backend already; leave that plugin out"
    ):
        plugin.register()
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with pytest.raises(ValueError, match=r"found vLLM 0\.34\.0"):
        plugin.register()


def test_the_backend_is_chosen_by_its_name_on_the_command_line(monkeypatch):
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setenv(ENV, '{"method": "s2"}')
    plugin.register()
    chosen = AttentionConfig(backend="CUSTOM").backend
    assert chosen.get_class() is backend.SparseAttnBackend


def test_what_vllm_validates(use):
    use({"method": "s2"})
    asked = {
        "head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16,
        "attn_type": "decoder", "use_mla": False, "has_sink": False, "use_sparse": False,
        "use_mm_prefix": False, "use_per_head_quant_scales": False, "device_capability": None,
    }  # fmt: skip
    validate = backend.SparseAttnBackend.validate_configuration
    assert validate(**asked) == []
    assert validate(**(asked | {"kv_cache_dtype": "fp8"})) == ["kv_cache_dtype not supported"]
    assert validate(**(asked | {"head_size": 512})) == ["head_size not supported"]
    assert validate(**asked, use_batch_invariant=True) == ["batch invariance not supported"]
    assert validate(**asked, use_dcp=True) == ["DCP not supported"]
    assert "device-cpu query lens mismatch" in validate(**asked, use_adaptive_verification=True)[0]


def test_graphs_hold_only_what_vllm_runs(use, config):
    builder, _ = use({"method": "s2"})
    support = type(builder).get_cudagraph_support(config, builder.kv_cache_spec)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.reorder_batch_threshold == 1
    use({"method": "s2", "decode": "sparse"})
    assert type(builder).get_cudagraph_support(config, builder.kv_cache_spec) == AttentionCGSupport.NEVER


def test_the_profiling_run_gives_zeros(use):
    _, ((impl, layer), _) = use({"method": "s2"})
    out = torch.full((3, H, D), torch.nan)
    assert impl.forward(layer, out, out, out, torch.empty(0), None, out).eq(0).all()


def test_draft_heads_are_left_to_vllm(use):
    """Speculative decoding numbers them on from the model's layers."""
    _, ((impl, layer), _) = use({"method": "s2"})
    layer.layer_name = "model.layers.2.self_attn.attn"
    assert impl.rules_of(layer.layer_name)["prefill"] is None and "draft head" in impl.not_covered


@pytest.mark.parametrize(
    ("option", "why"),
    [({"sliding_window": 64}, "a sliding window"), ({"logits_soft_cap": 9.0}, "a soft cap"),
     ({"sinks": torch.zeros(H)}, "attention sinks"), ({"alibi_slopes": [0.5] * H}, "ALiBi")],
    ids=["window", "softcap", "sinks", "alibi"],
)  # fmt: skip
def test_layers_that_no_method_covers_are_left_to_vllm(use, option, why):
    builder, layers = use({"method": "s2"}, **option)
    impl, layer = layers[0]
    assert impl.not_covered == why
    assert impl.rules_of(layer.layer_name) == {"prefill": None, "decode": None, "dense": None}
    with pytest.raises(NotImplementedError, match=f"layer 0 has {why}, which vLLM's Triton kernels run"):
        Batch([(40, 40)]).run(builder, impl, layer)


# -- the kernels that vLLM has itself -------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """As on a GPU: dense sequences go through vLLM's Triton kernels."""
    assert vllm.triton_utils.HAS_TRITON
    monkeypatch.setattr(backend, "runs_vllm_kernels", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))  # chooses tile sizes


FEW = [(1, 20), (1, 33), (40, 70), (9, 20)]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_dense_sequences_run_vllms_kernels_beside_sparse_ones(use, kernels, monkeypatch):
    ran = []
    stock = backend.TritonAttentionImpl.forward

    def counted(self, layer, query, *args):
        ran.append(len(query))
        return stock(self, layer, query, *args)

    monkeypatch.setattr(backend.TritonAttentionImpl, "forward", counted)
    builder, layers = use({"method": "s2", "options": S2, "min_keys": 60, "layers": {"0": "dense"}})
    batch = Batch(FEW, layout := (0, 2, 1, 3))
    for _, layer in layers:
        layer._k_scale = layer._v_scale = torch.ones(())
    kinds = [(x.kind, x.first, x.last) for x in batch.metadata(builder).segments]
    assert kinds == [("dense", 0, 2), ("prefill", 2, 42), ("dense", 42, 51)]
    batch.check(batch.run(builder, *layers[1]), batch.by("s2", S2Config(**S2), [2]))
    assert ran == [2, 9]
    ran.clear()
    batch.check(batch.run(builder, *layers[0]))
    assert ran == [53]  # the whole batch, padding included, in one call
    decode = Batch([(1, 20), (1, 33)], layout)
    assert decode.metadata(builder).segments is None
    decode.check(decode.run(builder, *layers[1]))


@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_lengths_come_from_the_host_where_they_are_exact(use, kernels, decode):
    """vLLM's bound is exact for prompts, and may be too high for sequences that decode: their own tensor
    has the truth."""
    builder, _ = use({"method": "blasst", "options": {"threshold": 0.0}, "decode": decode})
    batch = Batch(FEW)
    common = batch.common()
    common.seq_lens_cpu_upper_bound = torch.tensor(batch.keys) + torch.tensor([3, 3, 0, 0])
    segments = builder.build(0, common).segments
    if decode == "sparse":  # by the rules of prefill
        assert [(x.kind, x.seqused_k) for x in segments] == [("prefill", batch.keys)]
        return
    assert [(x.kind, x.seqused_k) for x in segments] == [("dense", None), ("prefill", [70, 20])]
    assert segments[0].metadata.seq_lens.tolist() == [20, 33]


def test_lengths_are_exact_where_everything_runs_here(use):
    builder, _ = use({"method": "s2"})
    batch = Batch(FEW)
    common = batch.common()
    common.seq_lens_cpu_upper_bound = torch.tensor(batch.keys) + torch.tensor([3, 3, 0, 0])
    assert [x.seqused_k for x in builder.build(0, common).segments] == [[20, 33], [70, 20]]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_layers_with_a_window_run_vllms_kernels(use, kernels):
    builder, layers = use({"method": "s2", "options": S2}, sliding_window=24)
    batch = Batch(FEW[1:3])
    layers[0][1]._k_scale = layers[0][1]._v_scale = torch.ones(())

    def window(n, q, k):
        L, S = q.shape[2], k.shape[2]
        return torch.ones(1, 1, L, S, dtype=torch.bool).triu(S - L - 23)

    batch.check(batch.run(builder, *layers[0]), window)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_bidirectional_batches_run_vllms_kernels(use, kernels):
    builder, _ = use({"method": "s2", "options": S2})
    batch = Batch([(40, 40)])
    common = batch.common()
    common.causal = False
    assert builder.build(0, common).segments is None
