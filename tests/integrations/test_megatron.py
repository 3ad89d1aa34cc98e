"""The Megatron-core adapter: the module alone, called as Megatron calls it.

Inside the real package: test_megatron_real.py.
"""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_attn as sa
from sparse_attn.integrations import megatron_checks
from sparse_attn.integrations.megatron import SparseCoreAttention, is_dense_layer, replace_core_attention
from sparse_attn.methods import METHODS, Method
from sparse_attn.methods.s2 import s2_attention, s2_layout
from sparse_attn.methods.s2 import select as s2_select
from sparse_attn.testing import assert_close, masked_attention

# Megatron's enum, member for member; test_megatron_real.py passes the real one.
Mask = Enum("Mask", "padding causal no_mask padding_causal arbitrary causal_bottom_right")
S2 = {"block_size": 16, "local_blocks": 1, "vert_stride": 4}
HEADS, GROUPS, DIM = 8, 4, 16
PATTERNS = ["full", "skip", "diagonal:1", "full"] * 2


class Group:
    """Rank and size of a process group, without one."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def megatron_config(**changes) -> SimpleNamespace:
    settings = {
        "num_layers": 4, "num_attention_heads": HEADS, "num_query_groups": GROUPS,
        "attention_dropout": 0.0, "context_parallel_size": 1, "tensor_model_parallel_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**(settings | changes))


def core(method: str = "s2", options: dict[str, Any] | None = None, tp=None, cp=None, **changes):
    """A core attention, built with the keywords that Megatron passes."""
    own = ("dense_layers", "engine", "decode", "on_mask", "num_query_groups")
    settings = {name: changes.pop(name) for name in own if name in changes}
    build = {"layer_number": 1, "attn_mask_type": Mask.causal, "attention_type": "self"}
    build |= {name: changes.pop(name) for name in build if name in changes}
    build |= {name: changes.pop(name) for name in ("k_channels", "v_channels") if name in changes}
    groups = SimpleNamespace(tp=tp or Group(0, 1), cp=cp or Group(0, 1))
    method_config = METHODS[method].config(**(S2 if options is None else options))
    if "config_groups" in changes:
        changes["num_query_groups"] = changes.pop("config_groups")
    return SparseCoreAttention(
        config=megatron_config(**changes), **build, cp_comm_type=None, softmax_scale=None,
        pg_collection=groups, method=method, method_config=method_config, **settings,
    )  # fmt: skip


def qkv(L: int, S: int | None = None, batch: tuple[int, ...] = (2,), heads=(HEADS, GROUPS), seed=0):
    """Query, key and value as Megatron lays them out: length first; last, sliced from one projection."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((L, heads[0]), (S or L, heads[1]), (S or L, heads[1]))
    return tuple(torch.randn(n, *batch, h, DIM, generator=generator) for n, h in shapes)


def swap(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def causal_mask(L: int) -> Tensor:
    """As Megatron makes it: True is hidden."""
    return torch.ones(1, 1, L, L, dtype=torch.bool).triu(1)


# -- the module alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 63, 130])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
def test_sbhd_is_masked_attention(L, mask):
    """Length first, groups not repeated, heads joined in order: equal to the definition in float64."""
    q, k, v = qkv(L)
    out = core(engine="reference")(q, k, v, causal_mask(L) if mask else None, attn_mask_type=Mask.causal)
    assert out.shape == (L, 2, HEADS * DIM)
    layout = s2_layout(sa.S2Config(**S2), L, L, num_heads=HEADS, num_kv_heads=GROUPS)
    args = [swap(x) for x in (q, k, v)]
    expected = masked_attention(*args, layout.to_dense(True))[0]
    plain = masked_attention(*args, layout.to_dense(True), dtype=torch.float32)[0]
    assert_close(swap(out.view(L, 2, HEADS, DIM)), expected, plain)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_have_one_devices_pattern(size):
    """Also with more ranks than key heads, where ranks share one."""
    q, k, v = qkv(200)
    whole = core()(q, k, v, None)
    parts = []
    for rank in range(size):
        heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        first = rank * GROUPS // size
        groups = slice(first, first + max(GROUPS // size, 1))
        # As Megatron does: a copy of the config with one group a rank.
        told = max(GROUPS, size)
        module = core(tp=Group(rank, size), config_groups=told, num_query_groups=GROUPS)
        parts.append(module(q[:, :, heads], k[:, :, groups], v[:, :, groups], None))
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-6)
    alike = core(tp=Group(0, size), config_groups=max(GROUPS, size), num_query_groups=GROUPS)
    heads = slice(HEADS - HEADS // size, HEADS)  # the last rank's heads, in the first rank's place
    groups = slice(GROUPS - max(GROUPS // size, 1), GROUPS)
    wrong = alike(q[:, :, heads], k[:, :, groups], v[:, :, groups], None)
    assert (wrong - whole.view(200, 2, HEADS, DIM)[:, :, heads].flatten(2)).abs().max() > 0.1


@pytest.mark.parametrize(
    "method, options",
    [
        ("blasst", {"threshold": torch.tensor([0, 0.9, 0.1, 0.5, 1, 0.3, 0.7, 0]), "block_n": 16}),
        (
            "vdit",
            {"patterns": ["full", "skip", "diagonal:1", "full"] * 2, "grid": (4, 5, 5), "block_size": 16},
        ),
    ],
)
def test_per_head_values_follow_the_global_head(method, options):
    kind = Mask.causal if method == "blasst" else Mask.no_mask
    q, k, v = qkv(100)
    whole = core(method, options, attn_mask_type=kind)(q, k, v, None)
    parts = []
    for rank in range(2):
        heads, groups = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
        module = core(method, options, tp=Group(rank, 2), attn_mask_type=kind)
        parts.append(module(q[:, :, heads], k[:, :, groups], v[:, :, groups], None))
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-6)
    short = {name: x[:6] if name in ("threshold", "patterns") else x for name, x in options.items()}
    with pytest.raises(ValueError, match="6 heads; the model has 8"):
        core(method, short, tp=Group(0, 2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [Mask.causal, Mask.padding_causal, Mask.padding])
def test_thd_is_each_sequence_alone(padded, kind):
    lengths, room = [70, 1, 0, 33], [80, 8, 8, 40]
    places = room if padded else lengths
    total = sum(places) + (5 if padded else 0)
    q, k, v = (x.requires_grad_() for x in qkv(total, batch=()))
    starts = torch.tensor([0, *places]).cumsum(0).to(torch.int32)
    real = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=real, cu_seqlens_kv=real, cp_group=None, local_cp_size=None,
        cu_seqlens_q_padded=starts if padded else None, cu_seqlens_kv_padded=starts if padded else None,
    )  # fmt: skip
    module = core()
    out = module(q, k, v, None, attn_mask_type=kind, packed_seq_params=packed)
    assert out.shape == (total, HEADS * DIM)
    expected = torch.zeros_like(out)
    for start, length in zip(starts.tolist(), lengths, strict=False):
        if length:
            here = slice(start, start + length)
            alone = [x[here, None] for x in (q, k, v)]
            own = Mask.no_mask if kind is Mask.padding else Mask.causal
            expected[here] = module(*alone, None, attn_mask_type=own)[:, 0]
    assert torch.equal(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "number, dense, expected", [(2, 2, True), (3, 2, False), (1, [1, 4], True), (2, [1, 4], False)]
)
def test_dense_layers(number, dense, expected):
    assert is_dense_layer(number, dense) is expected
    module = core(layer_number=number, dense_layers=dense)
    q, k, v = qkv(120)
    out = module(q, k, v, causal_mask(120))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    args = [swap(x) for x in (q, k, v)]
    full = sdpa(*args, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
    assert ((out - full).abs().max() < 1e-5) == expected


@pytest.mark.parametrize("decode", ["sparse", "dense"])
def test_decoding_gives_what_prefill_gave(decode):
    """Megatron's static batching names the step no_mask; key blocks that S2 forgot stay unread."""
    q, k, v = qkv(150)
    module = core(decode=decode)
    step = module(q[-1:], k, v, None, attn_mask_type=Mask.no_mask)
    other = module if decode == "sparse" else core(dense_layers=1)
    torch.testing.assert_close(step, other(q, k, v, None)[-1:], rtol=1e-5, atol=1e-6)
    longer = core(dense_layers=1)(q[-9:], k, v, None, attn_mask_type=Mask.causal_bottom_right)
    torch.testing.assert_close(longer, core(dense_layers=1)(q, k, v, None)[-9:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method, options", [("s2", S2), ("blasst", {"threshold_scale": 20.0})])
def test_recompute_gives_the_same_gradients(method, options):
    """No state: a checkpointed forward is the forward, bit for bit."""
    module = core(method, options).train()

    def gradients(checkpointed: bool) -> list[Tensor]:
        q, k, v = (x.requires_grad_() for x in qkv(96))
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(module, q, k, v, None, use_reentrant=False)
        else:
            out = module(q, k, v, None)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)
    assert not module.state_dict()


def test_value_heads_of_another_size():
    """As in multi-latent attention, for which Megatron also names the sizes."""
    q, k, v = qkv(50, heads=(HEADS, HEADS))
    module = core(k_channels=DIM, v_channels=8)
    out = module(q, k, v[..., :8], None).view(50, 2, HEADS, 8)
    torch.testing.assert_close(out, module(q, k, v, None).view(50, 2, HEADS, DIM)[..., :8])


def document_mask(L: int) -> Tensor:
    mask = causal_mask(L)
    mask[..., L // 2 :, : L // 2] = True
    return mask


def test_masks_are_never_lost():
    q, k, v = qkv(40)
    module = core()
    for mask in (document_mask(40), causal_mask(40).float(), causal_mask(41), ~causal_mask(40)):
        with pytest.raises(ValueError, match="Pack the sequences"):
            module(q, k, v, mask)
    with pytest.raises(ValueError, match="causal_bottom_right"):
        module(q[-3:], k, v, None)
    padding = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    whole = module(q, k, v, padding, attn_mask_type=Mask.padding)  # a batch without padding
    assert torch.equal(whole, module(q, k, v, None, attn_mask_type=Mask.no_mask))
    padding[1, ..., 30:] = True
    trusting = core(on_mask="ignore")
    assert torch.equal(trusting(q, k, v, document_mask(40)), module(q, k, v, None))
    for chosen in (module, trusting):  # a padding mask has no other bearer, so it cannot be ignored
        with pytest.raises(ValueError, match=r"AttnMaskType\.padding"):
            chosen(q, k, v, padding, attn_mask_type=Mask.padding)
        with pytest.raises(ValueError, match="arbitrary"):
            chosen(q, k, v, None, attn_mask_type=Mask.arbitrary)


def test_a_mask_that_layers_share_is_read_once(monkeypatch):
    read = []
    says = megatron_checks._says
    monkeypatch.setattr(megatron_checks, "_says", lambda *args: read.append(args) or says(*args))
    q, k, v = qkv(40)
    mask = causal_mask(40)
    for module in (core(), core()):
        module(q, k, v, mask)
    assert len(read) == 1
    mask[..., 5, 3] = True
    with pytest.raises(ValueError, match="Pack the sequences"):
        core()(q, k, v, mask)
    with torch.inference_mode():
        core()(q, k, v, causal_mask(40))


def test_calls_that_are_refused():
    q, k, v = qkv(40)
    module = core(attention_dropout=0.1)
    assert module.eval()(q, k, v, None).isfinite().all()
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1.*attention_bias") as caught:
        module.train()(q, k, v, None, attention_bias=q)
    assert "layer 1" in str(caught.value)
    with pytest.raises(ValueError, match="query has 8 heads; expected 4"):
        core(tp=Group(0, 2))(q, k, v, None)
    with pytest.raises(ValueError, match="unknown argument sinks"):
        core()(q, k, v, None, sinks=q)
    packed = SimpleNamespace(qkv_format="bshd", cp_group=None, local_cp_size=None)
    with pytest.raises(ValueError, match="qkv_format"):
        core()(q, k, v, None, packed_seq_params=packed)
    packed = SimpleNamespace(qkv_format="thd", cp_group=Group(0, 2), local_cp_size=None)
    with pytest.raises(NotImplementedError, match="context parallelism"):
        core()(q, k, v, None, packed_seq_params=packed)


def test_configs_that_are_refused():
    for changes, text in (
        ({"num_attention_heads": 6, "tp": Group(0, 4)}, "6 heads do not divide over 4"),
        ({"attention_type": "cross"}, "self-attention"),
        ({"softmax_type": "learnable"}, "softmax_type"),
        ({"window_size": (128, 0)}, "window_size"),
        ({"qk_clip": True}, "qk_clip"),
        ({"dense_layers": [0, 5]}, r"\[0, 5\]"),
        ({"dense_layers": True}, "dense_layers"),
        ({"decode": "fast"}, "decode"),
        ({"on_mask": "drop"}, "on_mask"),
        ({"options": S2 | {"num_heads": 4}, "tp": Group(0, 2)}, "num_heads is 4; the model has 8"),
        ({"tp": Group(0, 4)}, "num_query_groups="),  # 4 groups, or fewer and shared by ranks?
    ):
        with pytest.raises(ValueError, match=text):
            core(**changes)
    assert core(tp=Group(0, 4), options=S2 | {"per_query_head": True}).head_offset == 0
    for changes in ({"context_parallel_size": 2}, {"cp": Group(1, 2)}):
        with pytest.raises(NotImplementedError, match="context_parallel_size=1"):
            core(**changes)
    alone = {"layer_number": 1, "attn_mask_type": Mask.causal, "attention_type": "self", "method": "s2"}
    with pytest.raises(ValueError, match="pg_collection"):
        SparseCoreAttention(config=megatron_config(tensor_model_parallel_size=2), **alone)
    with pytest.raises(ValueError, match="unknown method 'dense'"):
        replace_core_attention(SimpleNamespace(), "dense")
    with pytest.raises(ValueError, match="strides"):
        replace_core_attention(SimpleNamespace(), "s2", strides=3)
    with pytest.raises(ValueError, match="no layer of this SimpleNamespace"):
        replace_core_attention(SimpleNamespace(), "s2", **S2)
    with pytest.raises(ValueError, match="no layer of this"):  # a block whose layers have no attention
        replace_core_attention(SimpleNamespace(layer_specs=[SimpleNamespace(submodules=None)]), "s2", **S2)
    assert replace_core_attention(SimpleNamespace(layer_specs=[]), "s2", **S2).layer_specs == []


def test_a_new_method_needs_no_change_here(monkeypatch):
    new = Method("sixth", sa.S2Config, s2_select, s2_attention, causal=True)
    monkeypatch.setitem(METHODS, "sixth", new)
    q, k, v = qkv(80)
    assert torch.equal(core("sixth")(q, k, v, None), core("s2")(q, k, v, None))


def test_without_megatron():
    """The module imports and runs; only the function that makes Megatron's own spec says what it lacks."""
    code = (
        "import sys\n"
        "sys.modules['megatron'] = None\n"
        "import sparse_attn.integrations.megatron as m\n"
        "try: m.get_gpt_layer_sparse_spec('s2')\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pip install megatron-core" in done.stdout
