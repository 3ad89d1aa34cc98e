"""Sparse attention inside Hugging Face models, through transformers' `AttentionInterface`.

The model's code does not change: its attention layers call `attention_forward` with query, key and
value after rotary embedding and cache update. What happens there is decided per model by `enable`::

    import sparse_attn.integrations.transformers as sparse_hf

    with sparse_hf.patched(model, "blasst", threshold_scale=900.0):
        model(input_ids)

What is sparse and what is not, without exceptions that stay silent:

* prefill (more than one query) runs the method. Causal attention does so with left or right padding
  too: each sequence of the batch is cut to its real tokens, so that padding changes neither the pattern
  nor the result;
* decode steps (one query) are dense, or follow the method with `decode="sparse"`;
* any other mask (padding in bidirectional attention, packed sequences, sliding windows, static caches, a
  4-D mask of the user's own) is honoured by dense attention under that mask, with a warning, or refused
  with `on_mask="error"`;
* attention that is not plain softmax (softcap, sinks, position bias) runs the model's own eager code.

`sparse_attn.patch` builds on this: settings by layer, and a table that says all this of one model.

transformers is imported when one of these functions is called, not before.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparse_attn.methods import METHODS, Context
from sparse_attn.methods.base import run

NAME = "sparse_attn"
# (query, key, value, *, layer, is_causal, scale) -> out [B, Hq, L, Dv]; key heads are not repeated.
AttentionFunction = Callable[..., Tensor]


class DenseFallbackWarning(UserWarning):
    """A call ran as dense attention under its mask because no sparse method covers that mask."""


@dataclass(frozen=True, eq=False)
class _Setting:
    """What an attention layer does.

    Attributes:
        attention: None is dense under the layer's own mask.
        method, config: what `attention` runs, for those who ask; config is None of a function.
        window: keys a query of a sliding-window layer sees; a mask it explains is no surprise to warn of.
        reason: why the layer does not run what was asked for the model; empty where it does.
    """

    attention: AttentionFunction | None
    decode: str
    on_mask: str
    method: str = "function"
    config: Any = None
    window: int | None = None
    reason: str = ""


_settings: WeakKeyDictionary[nn.Module, _Setting] = WeakKeyDictionary()
_previous: WeakKeyDictionary[nn.Module, list[tuple[Any, str]]] = WeakKeyDictionary()
# Attention layers whose keys a cache of ours has just taken: that cache runs the attention of the call.
_pending: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def enable(
    model: nn.Module,
    method: str | AttentionFunction,
    config: Any = None,
    *,
    engine: str | None = None,
    decode: str = "dense",
    on_mask: str = "dense",
    **options: Any,
) -> None:
    """Switch a model to a sparse method, until `disable`. Enabling again replaces the method.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface`.
        method: a name of `sparse_attn.methods.METHODS`, or a function
            (query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], *, layer, is_causal, scale)
            -> out [B, Hq, L, Dv].
        config: an instance of the method's config class; instead of it, pass its fields as `options`.
        engine: insist on one engine by name.
        decode: "dense" or "sparse": what calls with a single query do.
        on_mask: "dense" (run masked and dense, and warn) or "error": what happens under a mask that is
            neither causal nor padding.

    Raises:
        ValueError: an unknown method or option, a bad config, or a model without `AttentionInterface`.
    """
    for name, value, allowed in (
        ("decode", decode, ("dense", "sparse")),
        ("on_mask", on_mask, ("dense", "error")),
    ):
        if value not in allowed:
            raise ValueError(f"enable: {name} is {value!r}; use {allowed[0]!r} or {allowed[1]!r}.")
    attention, config = _attention_function("enable", method, config, engine, options)
    setting = _Setting(attention, decode, on_mask, method if isinstance(method, str) else "function", config)
    _register()
    if model not in _previous:
        _switch(model)
    _settings.update(dict.fromkeys(model.modules(), setting))


def disable(model: nn.Module) -> None:
    """Give the model back the attention it had before `enable`. Does nothing where none was enabled."""
    for config, implementation in _previous.pop(model, []):
        config._attn_implementation = implementation
    for module in model.modules():
        _settings.pop(module, None)


@contextmanager
def patched(
    model: nn.Module, method: str | AttentionFunction, config: Any = None, **options: Any
) -> Iterator:
    """`enable` for the length of a `with` block. Takes the arguments of `enable`; yields the model.

    A model that was enabled before gets its earlier setting back.
    """
    before = _settings.get(model)
    enable(model, method, config, **options)
    try:
        yield model
    finally:
        if before is None:
            disable(model)
        else:
            _settings.update(dict.fromkeys(model.modules(), before))


def _attention_function(
    op: str, method: str | AttentionFunction, config: Any, engine: str | None, options: dict[str, Any]
) -> tuple[AttentionFunction, Any]:
    """The function that layers call, and the method's validated config (None of a function)."""
    if callable(method):
        if config is not None or options or engine is not None:
            raise ValueError(
                f"{op}: config, engine and options belong to a method's name, not to a function."
            )
        return method, None
    if method not in METHODS:
        raise ValueError(f"{op}: unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    chosen = METHODS[method]
    if config is not None and options:
        raise ValueError(f"{op}: pass either config or its fields as options, not both.")
    if config is None:
        try:
            config = chosen.config(**options)
        except TypeError as error:  # an option that the config class does not have
            raise ValueError(f"{op}: {method}: {error}") from error
    if not isinstance(config, chosen.config):
        raise ValueError(f"{op}: config is {type(config).__name__}; {method} takes {chosen.config.__name__}.")

    def attention(q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float) -> Tensor:
        return run(
            chosen, q, k, v, config, is_causal=is_causal, scale=scale, enable_gqa=True, engine=engine,
            context=Context(layer=layer),
        ).out  # fmt: skip

    return attention, config


def _register() -> None:
    """Add our name to transformers' two registries. Both are global to the process, and adding a
    name that only enabled models use leaves every other model alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def _switch(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"enable: model is {type(model).__name__}; it must be a transformers PreTrainedModel."
        )
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = list({id(config): config for config in parts}.values())
    before = [(config, config._attn_implementation) for config in configs]
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"enable: {type(model).__name__} does not use transformers' AttentionInterface, so its "
                "attention cannot be replaced from outside; call the sparse_attn operators in its own code."
            )
    except BaseException:  # parts of the model may have switched already
        for config, implementation in before:
            config._attn_implementation = implementation
        raise
    _previous[model] = before


# -- what transformers calls --------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that our attention function will be given; signature of `AttentionMaskInterface`.

    Returns:
        None where the keys are plainly causal (bottom-right aligned) or plainly all visible;
        bool [B, S], true on real tokens, where that holds but for padding;
        bool [B, 1, L, S], true on visible keys, for everything else.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )

    whole_window = local_size is not None and local_size >= kv_length
    plain = whole_window if local_size is not None else mask_function in (None, causal_mask_function)
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    causal = plain and allow_is_causal_skip and ends_together
    bidirectional = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if (bidirectional or causal) and kv_offset == 0:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = None if padding is None else padding[:, :kv_length]
        return None if padding is None or bool(padding.all()) else padding
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function or causal_mask_function,
        attention_mask, local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs,
    )  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; signature of `AttentionInterface`.

    Args:
        query: [B, Hq, L, D]; key and value: [B, Hkv, S, D], not repeated.
        attention_mask: as our `attention_mask` made it, or a 4-D mask of the user's own, bool or additive.

    Returns:
        out [B, L, Hq, Dv], and None for the attention weights, which are never formed.

    Raises:
        ValueError: the model is not enabled, or asks for something no sparse method has.
    """
    setting = _settings.get(module)
    if setting is None:
        raise ValueError(
            f"attn_implementation={NAME!r} needs a method: call sparse_attn.integrations.transformers.enable("
            "model, 'blasst', ...) on this very model (a copy of an enabled model has to be enabled again)."
        )
    if dropout:
        raise ValueError(
            f"{NAME}: dropout is {dropout}; set attention_dropout=0. Or use another attn_implementation."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = getattr(module, "layer_idx", None) or 0
    chosen = setting.attention
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extras:
        return _eager(module, query, key, value, attention_mask, causal, scale, extras, kwargs), None

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert chosen is not None
        return chosen(q, k, v, layer=layer, is_causal=causal, scale=scale)

    if _pending and (cached := _pending.pop(module, None)) is not None:
        out = cached.attend(query, key, value, attention_mask, sparse, scale)
    elif chosen is None or (query.shape[2] == 1 and setting.decode == "dense"):
        out = _dense(query, key, value, attention_mask, causal, scale)
    elif attention_mask is None:
        out = sparse(query, key, value)
    elif causal and attention_mask.dim() == 2 and (spans := _real_tokens(attention_mask)) is not None:
        out = _each_sequence(sparse, query, key, value, spans)
    else:
        _fall_back(setting, attention_mask, key.shape[2])
        out = _dense(query, key, value, attention_mask, causal, scale)
    return out.transpose(1, 2), None


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    extras: list[str],
    kwargs: dict[str, Any],
) -> Tensor:
    """The model's own attention, for what is not plain softmax. Forms the L x S matrix, as it does."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise ValueError(
            f"{NAME}: {', '.join(extras)} is set, so this model's attention is not plain softmax, and "
            f"{type(module).__name__} has no eager_attention_forward to run it; use another "
            "attn_implementation."
        )
    visible = _visible(query.shape[2], key.shape[2], mask, causal, query.device)
    if visible is not None and visible.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        visible = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, hidden)
    return own(module, query, key, value, visible, dropout=0.0, scaling=scale, **kwargs)[0]


def _real_tokens(padding: Tensor) -> list[tuple[int, int]] | None:
    """Per sequence, the half-open range of its real tokens; None if one has holes. Synchronises."""
    count = padding.sum(-1)
    first = padding.to(torch.uint8).argmax(-1)
    position = torch.arange(padding.shape[1], device=padding.device)
    inside = (position >= first[:, None]) & (position < (first + count)[:, None])
    if not torch.equal(inside, padding):
        return None
    return list(zip(first.tolist(), (first + count).tolist(), strict=True))


def _each_sequence(
    sparse: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: list[tuple[int, int]],
) -> Tensor:
    """Run every sequence of the batch on its own real tokens. Padding queries give 0.

    Queries are the last L of the S positions, so query i sits at position i + S - L.
    """
    L, S = query.shape[2], key.shape[2]
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, (first, end) in enumerate(spans):
        rows = slice(max(first - (S - L), 0), end - (S - L))
        if rows.stop <= rows.start:
            continue
        own, keys = slice(b, b + 1), slice(first, end)
        out[own, :, rows] = sparse(query[own, :, rows], key[own, :, keys], value[own, :, keys])
    return out


def _fall_back(setting: _Setting, mask: Tensor, key_length: int) -> None:
    if mask.dim() == 2:
        what = "padding in bidirectional attention, or with holes inside a sequence,"
    else:
        what = f"a {tuple(mask.shape)} mask (packed sequences, a window, a static cache or your own)"
    if setting.on_mask == "error":
        raise ValueError(f"{NAME}: {what} is not covered; pass plain causal input or use on_mask='dense'.")
    if setting.window is not None and mask.dim() == 4 and key_length > setting.window:
        return  # the layer's own window, which `explain` names
    message = f"{NAME}: {what} is outside what sparse methods cover; this call ran dense under that mask."
    warnings.warn(message, DenseFallbackWarning, stacklevel=3)


def _visible(L: int, S: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """A mask of ours with causality and four dimensions (or [L, S]); None where all keys are visible."""
    if mask is not None and mask.dim() == 4:
        return mask
    edge = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L) if causal and L > 1 else None
    if mask is None:
        return edge
    mask = mask[:, None, None, :]
    return mask if edge is None else mask & edge


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`scaled_dot_product_attention` under any mask of ours; queries without any key give 0."""
    L, S = q.shape[2], k.shape[2]
    plain_causal = mask is None and causal and L > 1 and L == S  # SDPA's own is_causal is upper-left aligned
    if not plain_causal:
        mask = _visible(L, S, mask, causal, q.device)
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
