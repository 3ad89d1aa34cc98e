"""One line turns sparse attention on in a transformers model, by layer, and says what it does.

    import sparse_attn as sa

    sa.patch(model, "anchor", theta=12.0, layers={0: "dense"})
    print(sa.explain(model))
    sa.unpatch(model)

Everything is checked before the model is touched: `patch` either switches all layers or raises and
leaves the model as it was. What the layers then do with padding, other masks and decode steps is told in
`sparse_attn.integrations.transformers`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from sparse_attn.integrations import transformers as adapter
from sparse_attn.integrations.transformers import AttentionFunction, _Setting

DENSE = "dense"
# "dense", a method's name, a function, or (name, config or dict of options); None is the model's default.
Choice = str | AttentionFunction | tuple[Any, ...] | None
Layers = Mapping[int, Choice] | Callable[[int], Choice]


def patch(
    model: nn.Module,
    method: str | AttentionFunction,
    config: Any = None,
    *,
    layers: Layers | None = None,
    engine: str | None = None,
    decode: str = "dense",
    on_mask: str = "dense",
    **options: Any,
) -> nn.Module:
    """Switch a transformers model to a sparse method until `unpatch`.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface`.
        method: a name of `sparse_attn.methods.METHODS`; or "dense"; or a function
            (query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], *, layer, is_causal, scale)
            -> out [B, Hq, L, Dv].
        config: an instance of the method's config class; instead of it, pass its fields as `options`.
        layers: what single layers do instead, by layer number from 0: a dict, or a function of the
            number. Each value is "dense", a method's name, (name, {options}), (name, config), a function,
            or None for the model's default.
        engine: insist on one engine by name, in every layer.
        decode: "dense" (default) or "sparse": what calls with a single query do.
        on_mask: "dense" (default: run dense under the mask, and warn) or "error": what happens under a
            mask that is neither causal nor padding.

    Returns:
        The model, which was changed in place.

    Raises:
        ValueError: the model is patched already or cannot be patched; an unknown method, layer or option.

    Example:
        >>> patch(model, "s2", local_blocks=8, layers={0: "dense", 1: ("blasst", {"threshold": 0.001})})
    """
    if is_patched(model):
        raise ValueError(
            f"patch: this {type(model).__name__} is patched already; call sparse_attn.unpatch(model) first."
        )
    for name, value in (("decode", decode), ("on_mask", on_mask)):
        other = "sparse" if name == "decode" else "error"
        if value not in ("dense", other):
            raise ValueError(f"patch: {name} is {value!r}; use 'dense' or {other!r}.")

    def setting_of(choice: Choice) -> _Setting:
        chosen, arguments = (choice[0], choice[1:]) if isinstance(choice, tuple) else (choice, ())
        own_config = arguments[0] if arguments else None
        if isinstance(own_config, Mapping):
            return _setting(chosen, None, engine, dict(own_config), decode, on_mask)
        return _setting(chosen, own_config, engine, {}, decode, on_mask)

    default = _setting(method, config, engine, options, decode, on_mask)
    modules = attention_modules(model)
    choices = _choices(layers, sorted({module.layer_idx for _, module in modules}))
    by_layer = {number: setting_of(choice) for number, choice in choices.items()}
    settings = dict.fromkeys(model.modules(), default)
    for _, module in modules:
        own = by_layer.get(module.layer_idx)
        settings[module] = _for_module(module, default if own is None else own, own is not None)
    adapter._register()
    adapter._switch(model)
    adapter._settings.update(settings)
    _warn_if_all_dense([settings[module] for _, module in modules], [default, *by_layer.values()])
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give the model back the attention it had before `patch`, and return it.

    Raises:
        ValueError: the model is not patched. A copy of a patched model is not: patch the copy first.
    """
    if not is_patched(model):
        raise ValueError(
            f"unpatch: this {type(model).__name__} is not patched; call it with the very model that "
            "sparse_attn.patch was given (not a part or a copy of it)."
        )
    adapter.disable(model)
    return model


@contextmanager
def patched(
    model: nn.Module, method: str | AttentionFunction, config: Any = None, **options: Any
) -> Iterator[nn.Module]:
    """`patch` for the length of a `with` block, whatever ends it. Takes the arguments of `patch`."""
    patch(model, method, config, **options)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` (or the adapter's `enable`) holds for this very model."""
    return model in adapter._previous


def attention_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every attention layer, in the model's order: what has a `layer_idx` and scales or
    masks its scores."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and (hasattr(module, "is_causal") or hasattr(module, "scaling"))
    ]


# -- choosing -----------------------------------------------------------------------------------------


def _setting(
    method: Any, config: Any, engine: str | None, options: dict[str, Any], decode: str, on_mask: str
) -> _Setting:
    if method == DENSE and isinstance(method, str):
        if config is not None or options:
            raise ValueError('patch: "dense" takes no config and no options.')
        return _Setting(None, decode, on_mask, DENSE)
    if not (isinstance(method, str) or callable(method)):
        raise ValueError(
            f"patch: a method is {method!r}; pass a name, 'dense', a function, or (name, {{options}})."
        )
    by_name = isinstance(method, str)
    attention, config = adapter._attention_function(
        "patch", method, config, engine if by_name else None, options
    )
    name = method if by_name else f"function {getattr(method, '__name__', type(method).__name__)}"
    return _Setting(attention, decode, on_mask, name, config)


def _choices(layers: Layers | None, numbers: list[int]) -> dict[int, Choice]:
    """The layers that differ from the model's default."""
    if layers is None:
        return {}
    if not numbers:
        raise ValueError("patch: this model's attention layers carry no layer_idx; leave layers out.")
    if callable(layers):
        layers = {number: layers(number) for number in numbers}
    if not isinstance(layers, Mapping):
        raise ValueError(
            f"patch: layers is {type(layers).__name__}; pass a dict or a function of the number."
        )
    unknown = [number for number in layers if number not in numbers]
    if unknown:
        raise ValueError(
            f"patch: layers names {unknown}; this model's layers are {numbers[0]} to {numbers[-1]}."
        )
    return {number: choice for number, choice in layers.items() if choice is not None}


def _for_module(module: nn.Module, setting: _Setting, chosen: bool) -> _Setting:
    """The setting as this layer can follow it, with the reason where it cannot."""
    window = _window(module)
    stock = _not_plain_softmax(module)
    if stock:
        return replace(setting, window=window, reason=f"{stock}: runs the model's own eager attention")
    if "cross" in type(module).__name__.lower() or getattr(module, "is_cross_attention", False):
        return replace(setting, attention=None, method=DENSE, config=None, reason="cross-attention")
    if window is not None:
        reason = "" if setting.attention is None else f"{setting.method} up to {window} keys, then "
        reason = f"sliding window: {reason}dense under the window"
        return replace(setting, window=window, reason=reason)
    return replace(setting, reason="asked for by `layers`" if chosen else "")


def _window(module: nn.Module) -> int | None:
    """Keys that a query of a sliding-window layer sees; None of a layer without window."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window if isinstance(module.sliding_window, int) else None
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":  # type: ignore[index]
        return None
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) else None


def _not_plain_softmax(module: nn.Module) -> str:
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return f"softcap {module.attn_logit_softcapping:g}"
    return "attention sinks (s_aux)" if isinstance(getattr(module, "sinks", None), Tensor) else ""


def _warn_if_all_dense(settings: list[_Setting], asked: list[_Setting]) -> None:
    if not settings or all(x.attention is None for x in asked):
        return
    if all(x.attention is None or _runs_stock(x) for x in settings):
        reasons = ", ".join(sorted({x.reason for x in settings if x.reason}))
        message = f"patch: no layer of this model will be sparse ({reasons}); see sparse_attn.explain(model)."
        warnings.warn(message, adapter.DenseFallbackWarning, stacklevel=3)


def _runs_stock(setting: _Setting) -> bool:
    return setting.reason.endswith("eager attention")


# -- explaining ---------------------------------------------------------------------------------------

NOTES = """\
prefill: calls with two or more queries, also in chunks over a cache. decode: calls with one query.
padding: causal layers cut each sequence to its real tokens, so padding changes neither pattern nor result.
other masks (packed sequences, static cache, a 4-D mask, padding without causality): see the column."""


def explain(model: nn.Module) -> str:
    """What each attention layer of a model does, and why, as a table.

    Layers that do the same share a line. Works on any model; one that is not patched says so.

    Example:
        >>> print(explain(model))
    """
    name = type(model).__name__
    if not is_patched(model):
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", "its own code")
        return f"{name} is not patched: every layer runs stock attention ({implementation})."
    rows: list[list[str]] = []
    numbers: list[list[str]] = []
    for _, module in attention_modules(model):
        row = _row(adapter._settings[module])
        if rows and rows[-1] == row:
            numbers[-1].append(str(module.layer_idx))
        else:
            rows.append(row)
            numbers.append([str(module.layer_idx)])
    head = ["layers", "prefill", "decode", "other masks", "why"]
    table = [head] + [
        [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}", *row]
        for run, row in zip(numbers, rows, strict=True)
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    if not rows:
        lines = ["its attention layers carry no layer_idx: all follow the model's setting."]
    return "\n".join([f"{name}, patched:", *(line.rstrip() for line in lines), NOTES])


def _row(setting: _Setting) -> list[str]:
    """prefill, decode, other masks, why."""
    if _runs_stock(setting):
        return ["stock", "stock", "stock, masked", setting.reason]
    masks = "refused (on_mask)" if setting.on_mask == "error" else "dense, warns"
    if setting.attention is None:
        return [DENSE, DENSE, "dense", setting.reason]
    what = describe(setting.method, setting.config)
    return [what, DENSE if setting.decode == "dense" else what, masks, setting.reason]


def describe(method: str, config: Any) -> str:
    """A method with the settings that differ from its defaults: "anchor(theta=9.0)"."""
    if not is_dataclass(config):
        return method
    shown = [
        f"{field.name}={_short(value)}"
        for field in fields(config)
        if not _is_default(field, value := getattr(config, field.name))
    ]
    return f"{method}({', '.join(shown)})" if shown else method


def _is_default(field: Field, value: Any) -> bool:
    if isinstance(value, Tensor) or field.default is MISSING:
        return False
    return type(value) is type(field.default) and value == field.default


def _short(value: Any) -> str:
    text = f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
