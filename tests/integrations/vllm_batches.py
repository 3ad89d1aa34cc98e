"""Batches as vLLM's model runner makes them, and the config of a tiny model. Imports vLLM, or skips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")


def import_vllm():
    """vLLM replaces its kernels by nothing where it finds no GPU; Triton's interpreter needs none."""
    driver = triton.backends.backends["nvidia"].driver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "is_active", staticmethod(lambda: True))
        import vllm.triton_utils

    return vllm


pytest.importorskip("vllm", reason="vllm is not installed")
vllm = import_vllm()
if not vllm.__version__.startswith("0.33"):
    pytest.skip(f"vllm {vllm.__version__} is not the tested 0.33", allow_module_level=True)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vllm.config import (  # noqa: E402
    CompilationConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.device import DeviceConfig  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from sparse_attn.integrations import vllm_backend as backend  # noqa: E402
from sparse_attn.methods import METHODS, Context  # noqa: E402
from sparse_attn.methods.anchor import AnchorConfig  # noqa: E402
from sparse_attn.methods.s2 import S2Config  # noqa: E402
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe  # noqa: E402
from sparse_attn.testing import assert_close  # noqa: E402

H, HKV, D, PAGE = 4, 2, 32, 16
SCALE = 0.2
ANCHOR = {"theta": 3.0, "block_size": 32, "step": 2}
S2 = {"block_size": 32, "local_blocks": 1, "vert_stride": 2}
LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": H, "num_key_value_heads": HKV, "head_dim": D, "max_position_embeddings": 4096,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


def vllm_config(folder: Path) -> VllmConfig:
    """vLLM's config of a Llama with two layers, whose transformers config is saved in `folder`."""
    transformers.LlamaConfig(**LLAMA).save_pretrained(folder)
    model = ModelConfig(
        model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32",
        max_model_len=2048, enforce_eager=True,
    )  # fmt: skip
    # Without vLLM's compiled kernels its layers run as they are written in Python.
    plain = CompilationConfig(mode=0, custom_ops=["none"])
    return VllmConfig(model_config=model, device_config=DeviceConfig("cpu"), compilation_config=plain)


def builder_and_layers(config, **options):
    """The builder, and implementation and layer of two layers, under the settings of the environment;
    `options` of the layers are as vLLM gives them."""
    backend.settings.cache_clear()
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=HKV, head_size=D, dtype=torch.float32)
    names = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
    stock = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(config):
        builder = backend.SparseAttnBackend.get_builder_cls()(spec, names, config, torch.device("cpu"))
        impls = [
            backend.SparseAttnBackend.get_impl_cls()(H, D, SCALE, HKV, **(stock | options)) for _ in names
        ]
    return builder, list(zip(impls, [SimpleNamespace(layer_name=name) for name in names], strict=True))


def save_recipe(path: Path, config) -> str:
    """Layer 0 dense; in layer 1 heads 0 and 3 by S2, 1 by AnchorAttention, 2 dense."""
    groups = (
        HeadGroup((0, 3), "s2", S2Config(**S2)),
        HeadGroup((1,), "anchor", AnchorConfig(**ANCHOR)),
        HeadGroup((2,), "dense", DenseConfig()),
    )
    whole = (HeadGroup((0, 1, 2, 3), "dense", DenseConfig()),)
    made = Recipe(Fingerprint.of(config.model_config.hf_config), (LayerPlan(0, whole), LayerPlan(1, groups)))
    made.save(path)
    return str(path)


class Batch:
    """Sequences with (new tokens, all tokens), their keys in shuffled pages, and the output of a layer.

    `layout` permutes the physical order of the cache's dimensions (pages, heads, slots, content)."""

    def __init__(self, sequences, layout=(0, 1, 2, 3), dtype=torch.float32, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.new = [new for new, _ in sequences]
        self.keys = [keys for _, keys in sequences]
        most = max(-(-keys // PAGE) for keys in self.keys) + 1
        order = torch.randperm(len(sequences) * most + 3, generator=self.generator).to(torch.int32)
        self.table = order[: len(sequences) * most].view(len(sequences), most)
        shape = (len(order), HKV, PAGE, 2 * D)
        back = [layout.index(n) for n in range(4)]
        self.cache = torch.full([shape[n] for n in layout], torch.nan, dtype=dtype).permute(back)
        self.q = self.random(sum(self.new), H, D, dtype=dtype) * 3
        self.k = [self.random(keys, HKV, D, dtype=dtype) for keys in self.keys]
        self.v = [self.random(keys, HKV, D, dtype=dtype) for keys in self.keys]
        self.starts = torch.tensor([0, *self.new]).cumsum(0).to(torch.int32)

    def random(self, *shape, dtype):
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def slots(self, n: int, first: int, last: int) -> torch.Tensor:
        position = torch.arange(first, last)
        return self.table[n, position // PAGE].long() * PAGE + position % PAGE

    def metadata(self, builder):
        return builder.build(0, self.common())

    def common(self):
        new_slots = [
            self.slots(n, S - L, S) for n, (L, S) in enumerate(zip(self.new, self.keys, strict=True))
        ]
        return CommonAttentionMetadata(
            query_start_loc=self.starts, query_start_loc_cpu=self.starts,
            seq_lens=torch.tensor(self.keys, dtype=torch.int32), num_reqs=len(self.new),
            num_actual_tokens=int(self.starts[-1]), max_query_len=max(self.new), max_seq_len=max(self.keys),
            block_table_tensor=self.table, slot_mapping=torch.cat([*new_slots, torch.tensor([-1, -1])]),
        )  # fmt: skip

    def run(self, builder, impl, layer, padding=2):
        """Old keys are in the cache; the new ones are written as vLLM does, before attention."""
        metadata = self.metadata(builder)
        for n, (L, S) in enumerate(zip(self.new, self.keys, strict=True)):
            old = self.slots(n, 0, S - L)
            impl.do_kv_cache_update(layer, self.k[n][: S - L], self.v[n][: S - L], self.cache, old)
        new_k, new_v = (
            torch.cat(
                [x[S - L :] for x, L, S in zip(of, self.new, self.keys, strict=True)] + [of[0][:padding]]
            )
            for of in (self.k, self.v)
        )
        impl.do_kv_cache_update(layer, new_k, new_v, self.cache, metadata.slot_mapping)
        q = torch.cat([self.q, self.q[:padding]])
        out = torch.full((len(q), H, D), torch.nan, dtype=self.q.dtype)
        result = impl.forward(layer, q, new_k, new_v, self.cache, metadata, out)
        assert result is out and out[len(self.q) :].isnan().all()  # padding is left alone
        return out[: len(self.q)]

    def reference(self, mask_of=lambda n, q, k: None, dtype=torch.float64):
        """Masked SDPA; `mask_of(n, q, k)` gives what sequence n reads, bool [1, heads, L, S], or None."""
        parts = []
        for n, (L, S) in enumerate(zip(self.new, self.keys, strict=True)):
            q = self.q[self.starts[n] : self.starts[n + 1]].transpose(0, 1)[None]
            k, v = (x[n].transpose(0, 1)[None] for x in (self.k, self.v))
            mask = torch.ones(L, S, dtype=torch.bool).tril(S - L)
            own = mask_of(n, q, k)
            if own is not None:
                mask = mask & own.repeat_interleave(H // own.shape[1], dim=1)
            out = torch.nn.functional.scaled_dot_product_attention(
                q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, scale=SCALE, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    def check(self, out, mask_of=lambda n, q, k: None):
        assert_close(out, self.reference(mask_of), self.reference(mask_of, self.q.dtype))

    def by(self, name, config, sparse):
        """The mask of a method's layout on the sequences numbered in `sparse`."""

        def mask_of(n, q, k):
            if n not in sparse:
                return None
            plan = METHODS[name].select(q, k, config, is_causal=True, scale=SCALE, context=Context())
            return plan.layout.to_dense(True)

        return mask_of


MIXED = [(1, 40), (1, 1), (0, 5), (1, 333), (200, 200), (70, 231), (33, 33), (2, 90)]  # (new, all) tokens
PREFILLS = [4, 5, 6, 7]


def assert_near(out, ref):
    """Equal but for the order of additions."""
    torch.testing.assert_close(out, ref, atol=2e-6 * float(ref.abs().max()), rtol=0)
