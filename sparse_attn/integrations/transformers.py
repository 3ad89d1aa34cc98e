"""Sparse attention inside Hugging Face models, through transformers' `AttentionInterface`.

The model's code does not change: its attention layers call `attention_forward` with query, key and
value after rotary embedding and cache update. What happens there is decided by `sparse_attn.patch`, or,
of a model loaded with `attn_implementation="sparse_attn"`, by its config or by `register`.

What is sparse and what is not, without exceptions that stay silent:

* prefill (more than one query) runs the method. It does so with left or right padding too (without
  causality: in self-attention): each sequence of the batch is cut to its real tokens, so that padding
  changes neither the pattern nor the result. So does the first prefill into a static cache, cut to the
  keys that are there;
* decode steps (one query) are dense, or follow the method with `decode="sparse"`;
* any other mask (padding with holes, packed sequences, sliding windows, later calls
  on a static cache, a 4-D mask of the user's own) is honoured by dense attention under that mask, with
  a warning, or refused with `on_mask="error"`;
* attention that is not plain softmax (softcap, sinks, position bias) runs the model's own eager code.

transformers is imported when one of these functions is called, not before.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.integrations.padded_graph import padded_attention
from sparse_attn.integrations.padding import dense, each_sequence, real_tokens, visible
from sparse_attn.integrations.settings import (
    ATTRIBUTE,
    Setting,
    as_recipe,
    attention_of,
    attention_of_choice,
    check_switches,
    fit,
    setting_of,
    settings_of_recipe,
)
from sparse_attn.recipe import Fingerprint, Recipe

NAME = "sparse_attn"
CONFIG = "sparse_attention_config"
PENDING = "_sparse_attn_pending"  # of a layer whose keys an S2Cache has just taken: it runs the call
_LOADED = "_sparse_attn_loaded"


class DenseFallbackWarning(UserWarning):
    """A call ran as dense attention under its mask because no sparse method covers that mask."""


# -- models loaded with attn_implementation="sparse_attn" ----------------------------------------------

_request: Mapping[str, Any] | None = None


def register(method: Any = None, config: Any = None, **options: Any) -> None:
    """Make `attn_implementation="sparse_attn"` known to transformers, and say what it means.

    A model that is loaded with that name follows the attribute `sparse_attention_config` of its config (a
    dict of the arguments below, by name, saved with the model), and without one the method given here, for
    the whole process. Calling again replaces the method; `register()` takes it away.

    Args:
        method, config, options: as in `sparse_attn.patch`: a name, "dense", a function or a recipe, its
            settings, and `layers` (a dict), `engine`, `decode`, `on_mask`, `strict`.

    Raises:
        ValueError: an unknown method or option, or a bad config. A recipe is compared with a model when
            that model is first called.

    Example:
        >>> register("anchor", theta=12.0)
        >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sparse_attn")
    """
    global _request
    if method is None and (config is not None or options):
        raise ValueError("register: config and options need a method.")
    asked = None if method is None else {"method": method, "config": config, **options}
    if asked is not None:
        _read_request("register", asked)
    _register()
    _request = asked


def _register() -> None:
    """Add our name to transformers' two registries. Both are global to the process, and adding a
    name that only enabled models use leaves every other model alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def _read_request(op: str, asked: Mapping[str, Any]) -> tuple[Recipe | None, dict[str, Any], dict[int, Any]]:
    """The recipe or None, the common settings (with the attention of a method), and attention by layer.

    Raises:
        ValueError: something in it is wrong.
    """
    if not isinstance(asked, Mapping) or asked.get("method") is None:
        raise ValueError(
            f'{op}: {CONFIG} is {asked!r}; it must be a dict: {{"method": "anchor", "theta": 9}}.'
        )
    options = dict(asked)
    method, config, layers = options.pop("method"), options.pop("config", None), options.pop("layers", None)
    common = {
        name: options.pop(name, default)
        for name, default in (("engine", None), ("decode", None), ("on_mask", "dense"), ("strict", True))
    }
    check_switches(op, common["decode"], common["on_mask"])
    recipe = _load(str(method)) if isinstance(method, str) and method.endswith(".json") else as_recipe(method)
    if recipe is None:
        common["attention"] = attention_of(op, method, config, common["engine"], options)
    elif config is not None or options:
        raise ValueError(f"{op}: config and options belong to a method's name, not to a recipe.")
    by_layer = {}
    for number, choice in (layers or {}).items():
        choice = tuple(choice) if isinstance(choice, list) else choice  # JSON has no tuples
        by_layer[int(number)] = attention_of_choice(op, choice, common["engine"])
    return recipe, common, by_layer


@lru_cache(maxsize=8)
def _load(path: str) -> Recipe | None:
    """A recipe file, read once for all layers and models."""
    return as_recipe(path)


def _request_of(config: Any) -> Mapping[str, Any] | None:
    own = getattr(config, CONFIG, None)
    return _request if own is None else own


def is_loaded(model: Any) -> bool:
    """Whether a model runs our attention without `patch`, by its config or by `register`."""
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(inner, "_attn_implementation", None) == NAME and _request_of(inner) is not None


def setting_for(module: nn.Module) -> Setting:
    """What a layer does: as patched, or as its config or `register` says.

    Raises:
        ValueError: nobody said.
    """
    setting = getattr(module, ATTRIBUTE, None)
    if setting is None:
        _read_config(id(module))
        setting = getattr(module, _LOADED)[1]
    return setting


def _read_config(address: int) -> None:
    """Make the setting of a layer that was not patched, unless it was made before from the same request.

    Args:
        address: `id` of the layer, which its caller holds: Dynamo hands no module to what it does not trace.
    """
    module: Any = ctypes.cast(address, ctypes.py_object).value
    config = getattr(module, "config", None)
    asked = _request_of(config)
    if asked is None:
        raise ValueError(
            f"attn_implementation={NAME!r} needs a method: call sparse_attn.patch(model, 'anchor', ...), or "
            f"sparse_attn.register('anchor', ...), or set config.{CONFIG} = {{'method': 'anchor', ...}}."
        )
    kept = module.__dict__.get(_LOADED)
    if kept is None or kept[0] is not asked:  # asked anew, or a copy of the model
        setattr(module, _LOADED, (asked, _new_setting(module, config, asked)))


# What makes a setting (a file, a hash) runs while a graph is traced, and is no part of it. This is what
# torch.compiler.assume_constant_result sets; calling it would import Dynamo with this module.
_read_config._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _new_setting(module: Any, config: Any, asked: Mapping[str, Any]) -> Setting:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{NAME}: which layers of an encoder-decoder are cross-attention can only be told from the whole "
            "model; call sparse_attn.patch(model, ...) on it."
        )
    recipe, common, by_layer = _read_request(NAME, asked)
    number = getattr(module, "layer_idx", None)
    if number in by_layer:
        own = setting_of(by_layer[number], common["decode"], common["on_mask"])
        return fit(module, own, "asked for by `layers`")
    if recipe is None:
        return fit(module, setting_of(common["attention"], common["decode"], common["on_mask"]))
    named = getattr(config, "architectures", None)  # absent of a model that was never saved
    fingerprint = Fingerprint.of(config, architecture=None if named else recipe.model.architecture)
    recipe.check_model(fingerprint, strict=common["strict"])
    if not isinstance(number, int):
        raise ValueError(f"{NAME}: {type(module).__name__} carries no layer_idx, which a recipe needs.")
    made = settings_of_recipe(recipe, [number], common["engine"], common["decode"], common["on_mask"])
    return fit(module, made[number])


# -- switching a model --------------------------------------------------------------------------------


def check_is_model(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"patch: model is {type(model).__name__}; it must be a transformers PreTrainedModel."
        )


def switch(model: Any) -> list[tuple[Any, str]]:
    """Let a model call our attention; (config, attention before) of its parts, to undo it with."""
    from transformers import PreTrainedModel

    check_is_model(model)
    _register()
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = list({id(config): config for config in parts}.values())
    before = [(config, config._attn_implementation) for config in configs]
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"patch: {type(model).__name__} does not use transformers' AttentionInterface, so its "
                "attention cannot be replaced from outside; call the sparse_attn operators in its own code, "
                "or use sparse_attn.sdpa_patched where it calls scaled_dot_product_attention."
            )
    except BaseException:  # parts of the model may have switched already
        for config, implementation in before:
            config._attn_implementation = implementation
        raise
    return before


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
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that our attention function will be given; signature of `AttentionMaskInterface`.

    Returns:
        None where the keys are plainly causal (bottom-right aligned) or plainly all visible;
        bool [B, S], true on real tokens, where that holds but for padding;
        bool [end] or [B, end] with end < S where it holds of the first `end` keys, and the others are
        places of a static cache that nothing has been written to;
        bool [B, 1, L, S], true on visible keys, for everything else.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )

    if attention_mask is not None and attention_mask.dim() == 1:
        return attention_mask  # `generate` makes the mask of a static cache before the model makes it again
    end = q_offset + q_length if isinstance(q_offset, int) else -1
    whole_window = local_size is not None and local_size >= end
    plain = whole_window if local_size is not None else mask_function in (None, causal_mask_function)
    causal = plain and allow_is_causal_skip and 0 < end <= kv_offset + kv_length
    bidirectional = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if (bidirectional or causal) and kv_offset == 0:
        length = kv_length if bidirectional else end
        padding = prepare_padding_mask(attention_mask, length, 0)
        padding = None if padding is None else padding[:, :length]
        # A graph cannot branch on it: there the layers' operator finds out whether anything is padding.
        if padding is not None and (torch.compiler.is_compiling() or not bool(padding.all())):
            return padding
        return None if length == kv_length else torch.ones(length, dtype=torch.bool, device=device)
    seen = causal_mask_function if mask_function is None else mask_function  # torch 2.11 traces no `or` here
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, seen, attention_mask, local_size,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device, **kwargs,
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
    setting = setting_for(module)
    if dropout:
        raise ValueError(
            f"{NAME}: dropout is {dropout}; set attention_dropout=0. Or use another attn_implementation."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = getattr(module, "layer_idx", None) or 0
    if attention_mask is not None and attention_mask.dim() < 4:
        end = attention_mask.shape[-1]
        if end < key.shape[2]:  # a static cache that is not full
            key, value = key[:, :, :end], value[:, :, :end]
        attention_mask = None if attention_mask.dim() == 1 else attention_mask
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extras:
        return _eager(module, query, key, value, attention_mask, causal, scale, extras, kwargs), None
    chosen = setting.attention if query.shape[2] > 1 else setting.decode
    in_graph = chosen is not None and torch.compiler.is_compiling() and module.__dict__.get(PENDING) is None
    if in_graph and attention_mask is not None and _can_cut(module, query, key, attention_mask, causal):
        return padded_attention(module, query, key, value, attention_mask, scale, causal), None

    def sparse(q: Tensor, k: Tensor, v: Tensor, **rows: int) -> Tensor:
        assert chosen is not None
        if rows and not getattr(chosen, "wants_rows", False):
            rows = {}
        return chosen(q, k, v, layer=layer, is_causal=causal, scale=scale, **rows)

    if (cached := module.__dict__.get(PENDING)) is not None:
        setattr(module, PENDING, None)
        out = cached.attend(query, key, value, attention_mask, sparse, scale)
    elif chosen is None:
        out = dense(query, key, value, attention_mask, causal, scale)
    elif attention_mask is None:
        out = sparse(query, key, value)
    elif _can_cut(module, query, key, attention_mask, causal) and (spans := real_tokens(attention_mask)):
        out = each_sequence(sparse, query, key, value, spans)
    else:
        _fall_back(setting, attention_mask, key.shape[2])
        out = dense(query, key, value, attention_mask, causal, scale)
    return out.transpose(1, 2), None


def attend_padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, padding: Tensor, scale: float, causal: bool
) -> Tensor:
    """What `padded_attention` runs: the same as without a graph."""
    mask = padding if real_tokens(padding) != [(0, padding.shape[1])] * len(padding) else None
    return attention_forward(module, query, key, value, mask, scaling=scale, is_causal=causal)[0]


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
    seen = visible(query.shape[2], key.shape[2], mask, causal, query.device)
    if seen is not None and seen.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, hidden)
    return own(module, query, key, value, seen, dropout=0.0, scaling=scale, **kwargs)[0]


def _can_cut(module: Any, query: Tensor, key: Tensor, mask: Tensor, causal: bool) -> bool:
    """Whether the mask is padding of queries and keys alike: in causal attention, and in self-attention."""
    config = getattr(module, "config", None)
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    return mask.dim() == 2 and (causal or (query.shape[2] == key.shape[2] and not crosses))


def _fall_back(setting: Setting, mask: Tensor, key_length: int) -> None:
    if mask.dim() == 2:
        what = "padding in bidirectional attention, or with holes inside a sequence,"
    else:
        what = f"a {tuple(mask.shape)} mask (packed sequences, a window, a static cache or your own)"
    if setting.on_mask == "error":
        raise ValueError(f"{NAME}: {what} is not covered; pass plain causal input or use on_mask='dense'.")
    if setting.window is not None and mask.dim() == 4 and key_length > setting.window:
        return  # the layer's own window, which `explain` names
    message = f"{NAME}: {what} is outside what sparse methods cover; this call ran dense under that mask."
    _warn(message)


def _warn(message: str) -> None:
    warnings.warn(message, DenseFallbackWarning, stacklevel=4)


_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # once, while a graph is traced
