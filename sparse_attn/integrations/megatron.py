"""Sparse attention as the core attention of Megatron-core models.

A Megatron layer is built from a spec, and the attention proper is one entry of it, `core_attention`::

    from sparse_attn.integrations.megatron import get_gpt_layer_sparse_spec

    spec = get_gpt_layer_sparse_spec("s2", block_size=64, local_blocks=16, vert_stride=8, dense_layers=2)
    model = GPTModel(config=config, transformer_layer_spec=spec, ...)

What a call does, without exceptions that stay silent:

* `sbhd` and packed `thd` inputs run the method (`thd`: on each sequence by itself); key heads are not
  repeated; per-head patterns go by *global* head, so that all tensor-parallel ranks together have the
  pattern of one device;
* layers named by `dense_layers` run dense attention;
* a mask that says anything but the layer's mask type, an attention bias, dropout in training, a window,
  attention sinks, logit clipping, cross-attention and context parallelism are refused.

Megatron's dynamic-batching inference calls no core attention at all, so that it stays dense.

The module keeps nothing between calls, so that recomputation gives the same again. megatron is imported
by `get_gpt_layer_sparse_spec` alone, when it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.integrations.megatron_checks import (
    NO_CONTEXT_PARALLEL,
    OP,
    check_alignment,
    check_settings,
    for_rank,
    is_dense_layer,
    on_device,
    refuse_config,
    refuse_context_parallel,
    refuse_unknown_groups,
    resolve,
    says,
    spans,
    tensor_rank,
)
from sparse_attn.methods import Context
from sparse_attn.methods.base import run


class SparseCoreAttention(nn.Module):
    """The core attention of one layer; Megatron builds it with its own keywords.

    Args:
        config: the `TransformerConfig`.
        layer_number: from 1, counted over all pipeline stages.
        attn_mask_type: an `AttnMaskType`; calls may name another one.
        attention_type: "self"; "cross" is refused.
        attention_dropout: default `config.attention_dropout`; in training it must be 0.
        softmax_scale: multiplies q.k; default D ** -0.5.
        cp_comm_type, k_channels, v_channels: accepted, since Megatron passes them, and not needed.
        pg_collection: its `tp` gives this rank's heads. None: there must be a single rank.
        method: a name of `sparse_attn.methods.METHODS`.
        method_config: an instance of the method's config class; None: its defaults.
        dense_layers: which layers are dense: an int n (every n-th, as `window_attn_skip_freq` counts), or a
            list of layer numbers, from 1; None: no layer.
        engine: insist on one engine by name, in sparse layers.
        decode: "sparse" or "dense": what calls with a single query do.
        on_mask: "check": compare a given attention_mask with what the mask type says, which makes the host
            wait for the device; "ignore": trust the mask type, as Transformer Engine does.
        num_query_groups: key heads of the whole model; default `config.num_query_groups`. Needed only
            where Megatron hides it (see Raises).

    Raises:
        ValueError: a bad argument, or a config that asks for what no method has; all problems at once.
            Also where the number of key heads decides the pattern but cannot be known: for fewer groups
            than tensor-parallel ranks Megatron hands over a copy of the config with one group a rank.
        NotImplementedError: context parallelism.
    """

    # Megatron looks at these on any core attention.
    softmax_offset = None
    current_max_attn_logits = None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        *,
        method: str,
        method_config: Any = None,
        dense_layers: int | Sequence[int] | None = None,
        engine: str | None = None,
        decode: str = "sparse",
        on_mask: str = "check",
        num_query_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.method, method_config = resolve(method, method_config, {})
        check_settings(dense_layers, decode, on_mask, config.num_layers)
        rank, size = tensor_rank(config, pg_collection)
        refuse_context_parallel(config, pg_collection)
        refuse_config(config, layer_number, attention_type, size)
        self.config = config
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.engine, self.decode, self.on_mask = engine, decode, on_mask
        self.is_dense = is_dense_layer(layer_number, dense_layers)
        self.num_heads = config.num_attention_heads // size  # of this rank
        self.head_offset = rank * self.num_heads
        if not self.is_dense and size > 1:
            heads = range(self.head_offset, self.head_offset + self.num_heads)
            groups = config.num_query_groups if num_query_groups is None else num_query_groups
            if num_query_groups is None and groups == size:
                refuse_unknown_groups(method_config, size)
            method_config = for_rank(method_config, config.num_attention_heads, groups, heads)
        self.method_config = method_config

    def extra_repr(self) -> str:
        what = "dense" if self.is_dense else self.method.name
        last = self.head_offset + self.num_heads - 1
        return f"layer {self.layer_number}: {what}, query heads {self.head_offset}..{last}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **extra: Any,
    ) -> Tensor:
        """Attention of this rank's heads; signature of Megatron's `CoreAttentionInterface`.

        Args:
            query: [L, B, Hq, D]; key: [S, B, Hkv, D]; value: [S, B, Hkv, Dv]; packed: [T, H, D].
            attention_mask: bool, True where a key is *hidden*, broadcastable to [B, 1, L, S]; or None.
            attn_mask_type: default: the module's own. `causal` needs L == S, where all alignments agree;
                `causal_bottom_right` takes any lengths.
            packed_seq_params: with `qkv_format="thd"`, tokens of sequence n lie from
                `cu_seqlens_q_padded[n]` on, as many as `cu_seqlens_q` says. The rest gives 0.

        Returns:
            [L, B, Hq * Dv]; packed: [T, Hq * Dv].

        Raises:
            ValueError: the call asks for what no method has, with the remedy.
        """
        self._refuse_call(query, attention_bias, packed_seq_params, extra)
        kind = (self.attn_mask_type if attn_mask_type is None else attn_mask_type).name
        if getattr(packed_seq_params, "qkv_format", None) == "thd":
            return self._packed(query, key, value, attention_mask, kind, packed_seq_params)
        L, S = query.shape[0], key.shape[0]
        if L == 1 and kind == "no_mask" and self.attn_mask_type.name == "causal":
            kind = "causal_bottom_right"  # a decoding step, which sees every key either way
        self._check_mask(attention_mask, kind, L, S)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v, "causal" in kind)
        return out.permute(2, 0, 1, 3).reshape(L, query.shape[1], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        """q [B, Hq, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, Hq, L, Dv]."""
        if self.is_dense or (q.shape[2] == 1 and self.decode == "dense"):
            return _dense(q, k, v, is_causal, self.softmax_scale)
        config = on_device(self.method_config, q.device)
        context = Context(layer=self.layer_number - 1, head_offset=self.head_offset)
        return run(
            self.method, q, k, v, config, is_causal=is_causal, scale=self.softmax_scale, enable_gqa=True,
            engine=self.engine, context=context,
        ).out  # fmt: skip

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str, packed: Any
    ) -> Tensor:
        """Each sequence by itself. Reads the sequence lengths, so the host waits for the device."""
        if kind == "arbitrary" or (mask is not None and self.on_mask == "check"):
            raise ValueError(
                f"{OP}: packed sequences (thd) come with an attention_mask or AttnMaskType.arbitrary; "
                'cu_seqlens alone separates them: pass no mask, or on_mask="ignore" where it says no more.'
            )
        rows = spans(packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
        cols = spans(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded)
        out = query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])
        for here, there in zip(rows, cols, strict=True):
            L, S = here.stop - here.start, there.stop - there.start
            if L == 0 or S == 0:
                continue
            check_alignment(kind, L, S)
            q, k, v = query[here], key[there], value[there]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out[here] = self._attend(q, k, v, "causal" in kind)[0].transpose(0, 1)
        return out.flatten(1)

    def _refuse_call(self, query: Tensor, bias: Tensor | None, packed: Any, extra: dict[str, Any]) -> None:
        problems = []
        if self.training and self.dropout > 0:
            problems.append(
                f"attention_dropout is {self.dropout} in training; set config.attention_dropout=0"
            )
        if query.shape[-2] != self.num_heads:
            problems.append(
                f"query has {query.shape[-2]} heads; expected {self.num_heads}, this rank's share of "
                f"config.num_attention_heads={self.config.num_attention_heads}"
            )
        if bias is not None:
            problems.append("attention_bias is given; sparse methods have none: pass None")
        layout = getattr(packed, "qkv_format", None)
        if layout not in (None, "sbhd", "thd"):
            problems.append(f"qkv_format is {layout!r}; use 'sbhd' or 'thd'")
        problems += [f"unknown argument {name}" for name, x in extra.items() if x is not None]
        if problems:
            raise ValueError(f"{OP}, layer {self.layer_number}: " + "; ".join(problems) + ".")
        group = getattr(packed, "cp_group", None)
        if (getattr(packed, "local_cp_size", None) or 1) > 1 or (group is not None and group.size() > 1):
            raise NotImplementedError(NO_CONTEXT_PARALLEL)

    def _check_mask(self, mask: Tensor | None, kind: str, L: int, S: int) -> None:
        """Refuse what the mask type does not say. A padding type says nothing yet, so its mask counts."""
        check_alignment(kind, L, S)
        if kind == "arbitrary":
            raise ValueError(f"{OP}: AttnMaskType.arbitrary is not covered; use causal or no_mask.")
        if mask is None or (self.on_mask == "ignore" and "padding" not in kind):
            return
        if not says(mask, "causal" in kind, L, S):
            raise ValueError(
                f"{OP}: the {tuple(mask.shape)} attention_mask hides other keys than AttnMaskType.{kind} "
                "does (padding, document boundaries or a pattern of your own), which sparse methods would "
                'lose. Pack the sequences instead (PackedSeqParams with qkv_format="thd"), or, where the '
                'mask is really unneeded, pass None or build the spec with on_mask="ignore".'
            )


def _dense(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention`, bottom-right aligned."""
    L, S = q.shape[2], k.shape[2]
    mask = None
    if is_causal and 1 < L != S:
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    sdpa: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
    return sdpa(
        q, k, v, attn_mask=mask, is_causal=is_causal and mask is None and L > 1, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


# -- specs ----------------------------------------------------------------------------------------


def get_gpt_layer_sparse_spec(
    method: str,
    config: Any = None,
    *,
    dense_layers: int | Sequence[int] | None = None,
    engine: str | None = None,
    decode: str = "sparse",
    on_mask: str = "check",
    num_query_groups: int | None = None,
    use_transformer_engine: bool | None = None,
    layer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Megatron's spec of a GPT layer, with sparse core attention.

    Args:
        method: a name of `sparse_attn.methods.METHODS`.
        config: an instance of the method's config class; instead of it, pass its fields as `options`.
        dense_layers, engine, decode, on_mask, num_query_groups: see `SparseCoreAttention`.
        use_transformer_engine: take the other parts of the layer from
            `get_gpt_layer_with_transformer_engine_spec` (True) or `get_gpt_layer_local_spec` (False);
            default: whether transformer_engine is installed.
        layer_options: arguments of that function, e.g. `{"qk_layernorm": True}`.

    Returns:
        A `ModuleSpec` for `GPTModel(transformer_layer_spec=...)`.

    Raises:
        ValueError: an unknown method, option or setting. ImportError: megatron-core is not installed.

    Example:
        >>> spec = get_gpt_layer_sparse_spec("blasst", threshold_scale=900.0, dense_layers=[1])
    """
    try:
        from megatron.core.models.gpt import gpt_layer_specs
    except ImportError as error:
        raise ImportError(
            "get_gpt_layer_sparse_spec needs megatron-core: `pip install megatron-core`."
        ) from error
    if use_transformer_engine is None:
        use_transformer_engine = find_spec("transformer_engine") is not None
    name = "with_transformer_engine" if use_transformer_engine else "local"
    spec = getattr(gpt_layer_specs, f"get_gpt_layer_{name}_spec")(**dict(layer_options or {}))
    return replace_core_attention(
        spec, method, config, dense_layers=dense_layers, engine=engine, decode=decode, on_mask=on_mask,
        num_query_groups=num_query_groups, **options,
    )  # fmt: skip


def replace_core_attention(
    spec: Any,
    method: str,
    config: Any = None,
    *,
    dense_layers: int | Sequence[int] | None = None,
    engine: str | None = None,
    decode: str = "sparse",
    on_mask: str = "check",
    num_query_groups: int | None = None,
    **options: Any,
) -> Any:
    """A copy of a Megatron spec in which every self-attention has sparse core attention.

    Args:
        spec: the `ModuleSpec` of a layer, or the `TransformerBlockSubmodules` of a block (what
            `get_gpt_decoder_block_spec` gives). Layers without a `core_attention` stay as they are.

    The other arguments are those of `get_gpt_layer_sparse_spec`. The given spec is not changed.

    Raises:
        ValueError: an unknown method, option or setting; or no layer has a `core_attention`.
    """
    _, config = resolve(method, config, options)
    check_settings(dense_layers, decode, on_mask, None)
    params = {
        "method": method, "method_config": config, "dense_layers": dense_layers, "engine": engine,
        "decode": decode, "on_mask": on_mask, "num_query_groups": num_query_groups,
    }  # fmt: skip
    spec = copy.deepcopy(spec)
    block = spec if hasattr(spec, "layer_specs") else getattr(spec, "submodules", None)
    layers = getattr(block, "layer_specs", [spec])
    replaced = 0
    for layer in layers or []:
        attention = getattr(getattr(layer, "submodules", None), "self_attention", None)
        parts: Any = getattr(attention, "submodules", None)
        if getattr(parts, "core_attention", None) is not None:
            # `type(layer)` is Megatron's ModuleSpec: no import of Megatron is needed.
            parts.core_attention = type(layer)(module=SparseCoreAttention, params=dict(params))
            replaced += 1
    if not replaced and layers != []:  # a pipeline stage may have no layer
        raise ValueError(
            f"replace_core_attention: no layer of this {type(spec).__name__} has a "
            "self_attention.submodules.core_attention; pass the spec of a transformer layer or block."
        )
    return spec
