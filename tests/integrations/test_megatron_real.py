"""The Megatron-core adapter inside the real package, on CPU, on one and on two ranks.

All of it runs in two processes of their own, since Megatron keeps its process groups in global variables.
"""

from __future__ import annotations

import re
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

if find_spec("megatron") is None or find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

S2 = {"block_size": 16, "local_blocks": 1, "vert_stride": 2}
LENGTH, VOCAB = 80, 64


def start(rank: int, size: int, store: str) -> None:
    """Megatron on gloo. It asks for the current CUDA device to place rotary tables: name the CPU."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    use_tensor_parallel(1)


def use_tensor_parallel(size: int) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)


def gpt_config(size: int = 1, groups: int = 2, **changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": groups,
            "tensor_model_parallel_size": size, "use_cpu_initialization": True, "attention_dropout": 0.0,
            "hidden_dropout": 0.0, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
            "bias_activation_fusion": False, "gradient_accumulation_fusion": False,
            "init_method_std": 0.3,  # sharp attention, so that a wrong pattern shows
        } | changes
    )  # fmt: skip


def gpt(spec: Any, config: Any = None):
    """The same weights for every call: with CPU initialisation ranks cut one random matrix."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(0)
    return GPTModel(
        config=config or gpt_config(), transformer_layer_spec=spec, vocab_size=VOCAB,
        max_sequence_length=LENGTH, position_embedding_type="rope", parallel_output=False,
    )  # fmt: skip


def tokens(batch: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(length).expand(batch, -1)


def causal_mask(length: int = LENGTH) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks found: `work`, run once for all tests of this file."""
    path = str(tmp_path_factory.mktemp("megatron"))
    mp.spawn(_rank, (path,), nprocs=2)
    return [torch.load(f"{path}/result{rank}") for rank in range(2)]


def _rank(rank: int, path: str) -> None:
    start(rank, 2, f"{path}/store")
    torch.save(work(rank), f"{path}/result{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def work(rank: int) -> dict[str, Any]:
    """Half of the roads on each rank, which works for itself; then one device's training step on each,
    and the same on both together."""
    errors = {}
    for road in ROADS[rank::2]:
        try:
            globals()[road]()
        except Exception:
            errors[road] = traceback.format_exc()
        else:
            errors[road] = ""
    return {"errors": errors, "alone": train_step(0, 1), "together": train_step(rank, 2)}


# -- tensor parallelism ---------------------------------------------------------------------------


VARIANTS = {  # groups, and S2's settings
    "a shard each": (2, {}),
    "all alike": (2, {"head_shift": 0}),
    "one group, shared by ranks": (1, {"per_query_head": True}),
}


def train_step(rank: int, size: int) -> dict[str, Tensor]:
    """Logits, and the gradient of a weight that no rank splits."""
    from sparse_attn.integrations.megatron import get_gpt_layer_sparse_spec

    use_tensor_parallel(size)
    result = {}
    for name, (groups, options) in VARIANTS.items():
        if name == "all alike" and size > 1:
            continue  # only there to show that shards matter
        spec = get_gpt_layer_sparse_spec("s2", num_query_groups=groups, **(S2 | options))
        model = gpt(spec, gpt_config(size, groups)).train()
        core = model.decoder.layers[0].self_attention.core_attention
        assert (core.head_offset, core.num_heads) == (rank * 4 // size, 4 // size)
        logits = model(*tokens(), causal_mask())
        logits.square().mean().backward()
        result[name] = logits.detach()
        result[name + ", gradient"] = model.decoder.layers[0].input_layernorm.weight.grad
    return result


def test_two_ranks_give_what_one_gives(results):
    for result in results:
        alone = result["alone"]
        assert len(result["together"]) == 4
        for name, got in result["together"].items():
            torch.testing.assert_close(got, alone[name], rtol=2e-4, atol=2e-5)
        # and the shards do differ from head to head
        assert (alone["a shard each"] - alone["all alike"]).abs().max() > 0.1


# -- one rank: every road into the module ---------------------------------------------------------


ROADS = (
    "dense_is_dense", "block_spec", "recompute", "packed", "static_inference", "checkpoint", "refusals",
    "page_example",
)  # fmt: skip


@pytest.mark.parametrize("road", ROADS)
def test_every_road_into_the_module(results, road):
    error = (results[0]["errors"] | results[1]["errors"])[road]
    assert error == "", error


def sdpa_core(**kwargs):
    """An attention of a few lines, against which dense layers are held."""

    class Core(torch.nn.Module):
        softmax_offset = None

        def forward(self, query, key, value, attention_mask, **kwargs):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            keep = ~attention_mask
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
            return out.permute(2, 0, 1, 3).flatten(2)

    return Core()


def local_spec():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec()


@torch.no_grad()
def dense_is_dense():
    """Dense by layer number, dense by the method's own setting, and hybrid in between."""
    from sparse_attn.integrations.megatron import replace_core_attention

    spec = local_spec()
    before = spec.submodules.self_attention.submodules.core_attention
    plain = local_spec()
    plain.submodules.self_attention.submodules.core_attention = sdpa_core
    inputs = (*tokens(), causal_mask())
    expected = gpt(plain)(*inputs)

    def logits(**options):
        return gpt(replace_core_attention(spec, **options))(*inputs)

    for options in (
        {"method": "s2", "dense_layers": 1, **S2},
        {"method": "s2", "block_size": 16, "vert_stride": 1},
        {"method": "blasst", "threshold": 0.0},
    ):
        torch.testing.assert_close(logits(**options), expected, rtol=2e-4, atol=2e-5)
    differ = [(logits(method="s2", dense_layers=n, **S2) - expected).abs().max() for n in (None, 2, [1])]
    assert min(differ) > 0.1, differ
    assert spec.submodules.self_attention.submodules.core_attention is before


def block_spec():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sparse_attn.integrations.megatron import replace_core_attention

    block = get_gpt_decoder_block_spec(gpt_config(), use_transformer_engine=False)
    spec = replace_core_attention(block, "s2", dense_layers=[2], **S2)
    assert isinstance(spec.layer_specs[0].submodules.self_attention.submodules.core_attention, ModuleSpec)
    cores = [layer.self_attention.core_attention for layer in gpt(spec).decoder.layers]
    assert [core.is_dense for core in cores] == [False, True]
    with torch.no_grad():
        assert gpt(spec)(*tokens(), None).isfinite().all()


def s2_spec(**options):
    from sparse_attn.integrations.megatron import get_gpt_layer_sparse_spec

    return get_gpt_layer_sparse_spec("s2", use_transformer_engine=False, **(S2 | options))


def recompute():
    """Selective recompute of core_attn. Megatron's checkpoint saves the CUDA random state, of which
    there is none here: PyTorch's own, reentrant like Megatron's, takes its place."""
    from megatron.core import tensor_parallel
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    real = tensor_parallel.checkpoint
    calls = []

    def counted(function, distribute, *args):
        calls.append(1)
        return torch_checkpoint(function, *args, use_reentrant=True)

    tensor_parallel.checkpoint = counted
    try:
        grads = []
        for changes in ({}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}):
            model = gpt(s2_spec(), gpt_config(**changes)).train()
            model(*tokens(), causal_mask()).square().mean().backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
    finally:
        tensor_parallel.checkpoint = real
    assert len(calls) == 2  # both layers of the second model
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@torch.no_grad()
def packed():
    """Two sequences in one row, through Megatron's own packing, give what each gives alone."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = gpt(s2_spec()).eval()
    cu = torch.tensor([0, 50, LENGTH], dtype=torch.int32)
    layer = model.decoder.layers[0].self_attention
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=50, max_seqlen_kv=50
    )
    hidden = torch.randn(LENGTH, 1, 64, generator=torch.Generator().manual_seed(2))
    out, _ = layer(hidden, None, packed_seq_params=params)
    for first, end in ((0, 50), (50, LENGTH)):
        alone, _ = layer(hidden[first:end], None)
        torch.testing.assert_close(out[first:end], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def static_inference():
    """Prefill and steps over Megatron's static cache give the logits of one forward."""
    from megatron.core.inference.contexts import StaticInferenceContext

    model = gpt(s2_spec()).eval()
    ids, places = tokens()
    whole = model(ids, places, causal_mask())
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=LENGTH)
    got = []
    for first, end in ((0, 70), *((n, n + 1) for n in range(70, LENGTH))):
        mask = causal_mask()[..., first:end, :end]
        here = slice(first, end)
        got.append(
            model(ids[:, here], places[:, here], mask, inference_context=context, runtime_gather_output=True)
        )
        context.sequence_len_offset += end - first
    last = got[0].shape[1]
    torch.testing.assert_close(torch.cat(got, 1), whole[:, -(last + LENGTH - 70) :], rtol=1e-4, atol=1e-5)


def checkpoint():
    """A distributed checkpoint names nothing of ours."""
    state = gpt(s2_spec()).sharded_state_dict()
    assert state and not any("core_attention" in name for name in state), list(state)


def refusals():
    model = gpt(s2_spec(), gpt_config(attention_dropout=0.1)).train()
    document = causal_mask()
    document[..., 40:, :40] = True
    for mask, text in ((causal_mask(), "attention_dropout is 0.1"), (document, "Pack the sequences")):
        with pytest.raises(ValueError, match=text):
            model(*tokens(), mask)
        model.eval()
    with pytest.raises(ValueError, match="softmax_type"):
        gpt(s2_spec(), gpt_config(softmax_type="off-by-one"))
    with pytest.raises(NotImplementedError, match="context parallelism"):
        gpt(s2_spec(), gpt_config(context_parallel_size=2))


def page_example():
    """The example of docs/integrations_megatron.md, as it stands."""
    page = Path(__file__).parents[2] / "docs" / "integrations_megatron.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(example, str(page), "exec"), names)
    layers = names["model"].decoder.layers
    assert "layer 1: s2, query heads 0..3" in repr(layers[0]) and "layer 2: dense" in repr(layers[1])
    assert names["model"](*tokens(), causal_mask()).isfinite().all()
