"""What the vLLM adapter adds to a layer's call, on a CPU. Needs vLLM 0.33 and transformers.

    python -m sparse_attn.bench.vllm_overhead OUT.jsonl

Microseconds of one thread's own processor time, the least of many, of `SparseAttnImpl.forward` where nothing
is done in place of `sparse_attention_paged`. "dense beside sparse" is a batch whose decoding
vLLM's kernels would run on a GPU; their place is taken likewise. Cutting a batch into runs, once for
all layers, is measured with vLLM's own metadata, which is measured alone too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sparse_attn.bench.run import stamp
from sparse_attn.bench.timing import cpu_us
from sparse_attn.integrations.vllm_config import ENV

HEADS, KEY_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
DECODING, PROMPTS = [(1, 500 + 37 * n) for n in range(32)], [(200, 200), (300, 812)]


def vllm_config(folder: str) -> Any:
    import transformers
    from vllm.config import CompilationConfig, ModelConfig, VllmConfig
    from vllm.config.device import DeviceConfig

    transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    model = ModelConfig(
        model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
        enforce_eager=True,
    )  # fmt: skip
    plain = CompilationConfig(mode=0, custom_ops=["none"])
    return VllmConfig(model_config=model, device_config=DeviceConfig("cpu"), compilation_config=plain)


def metadata_of(sequences: list[tuple[int, int]]) -> Any:
    """As vLLM's model runner gives it."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    new, keys = zip(*sequences, strict=True)
    starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    pages = max(-(-S // PAGE) for S in keys)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(keys, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(keys, dtype=torch.int32), num_reqs=len(new),
        num_actual_tokens=sum(new), max_query_len=max(new), max_seq_len=max(keys),
        block_table_tensor=torch.zeros(len(new), pages, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64),
    )  # fmt: skip


def measure(config: Any, sequences: list[tuple[int, int]], as_on_gpu: bool) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from sparse_attn.integrations import vllm_backend as backend
    from sparse_attn.integrations import vllm_config as rules

    decode = "dense" if as_on_gpu else "sparse"
    os.environ[ENV] = json.dumps({"method": "s2", "decode": decode})
    backend.settings.cache_clear()
    name = "model.layers.0.self_attn.attn"
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=KEY_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
    )
    with set_current_vllm_config(config):
        builder = backend.SparseAttnMetadataBuilder(spec, [name], config, torch.device("cpu"))
        impl = backend.SparseAttnImpl(HEADS, HEAD_DIM, 0.1, KEY_HEADS, None, None, "auto")
    layer, common = SimpleNamespace(layer_name=name), metadata_of(sequences)
    query = torch.randn(common.num_actual_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    out, cache = torch.empty_like(query), torch.zeros(8, KEY_HEADS, PAGE, 2 * HEAD_DIM, dtype=torch.bfloat16)
    stock = backend.TritonAttentionMetadataBuilder.build
    with (
        mock.patch.object(rules, "sparse_attention_paged", lambda *args, **how: None),
        mock.patch.object(backend, "runs_vllm_kernels", lambda tensor: as_on_gpu),
        mock.patch.object(backend.TritonAttentionImpl, "forward", lambda *args: None),
    ):
        metadata = builder.build(0, common)
        row = {
            "runs": len(metadata.segments),
            "layer_us": cpu_us(
                lambda: impl.forward(layer, query, None, None, cache, metadata, out), repeats=100
            ),
            "metadata_us": cpu_us(lambda: builder.build(0, common), 20, 100),
            "vllms_own_metadata_us": cpu_us(lambda: stock(builder, 0, common), 20, 100),
        }
    return row


@torch.inference_mode()
def main(path: str) -> None:
    torch.set_num_threads(1)
    import vllm

    cases = {
        "decoding": (DECODING, False),
        "prompts": (PROMPTS, False),
        "decoding and prompts": ([*DECODING, *PROMPTS], False),
        "dense beside sparse": ([*DECODING, *PROMPTS], True),
    }
    with tempfile.TemporaryDirectory() as folder, Path(path).open("a") as file:
        config = vllm_config(folder)
        for name, (sequences, as_on_gpu) in cases.items():
            row = {"batch": name, "sequences": len(sequences), **measure(config, sequences, as_on_gpu)}
            print(name, row)
            file.write(json.dumps(row | {"vllm": vllm.__version__} | stamp()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
