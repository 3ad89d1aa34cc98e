"""One line turns sparse attention on in a transformers model, by layer, and says what it does.

    import sparse_attn as sa

    sa.patch(model, "anchor", theta=12.0, layers={0: "dense"})     # or sa.patch(model, "model.recipe.json")
    print(sa.explain(model))
    sa.unpatch(model)

Everything is checked before the model is touched: `patch` either switches all layers or raises and
leaves the model as it was. What the layers then do with padding, other masks and decode steps is told in
`sparse_attn.integrations.transformers`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn

from sparse_attn.integrations import transformers as adapter
from sparse_attn.integrations.settings import (
    ATTRIBUTE,
    DENSE,
    AttentionFunction,
    Choice,
    Setting,
    as_recipe,
    attention_of,
    attention_of_choice,
    check_switches,
    fit,
    is_cross_attention,
    name_of,
    setting_of,
    settings_of_recipe,
)
from sparse_attn.recipe import Recipe

Layers = Mapping[int, Choice] | Callable[[int], Choice]
_RECORD = "_sparse_attn_patch"


@dataclass(frozen=True)
class _Patch:
    """What `unpatch` needs, kept on the model: each config with its attention before; the recipe's name."""

    before: list[tuple[Any, str]]
    source: str = ""


def patch(
    model: nn.Module,
    method: str | AttentionFunction | Recipe | PathLike[str],
    config: Any = None,
    *,
    layers: Layers | None = None,
    engine: str | None = None,
    decode: str | None = None,
    on_mask: str = "dense",
    strict: bool = True,
    **options: Any,
) -> nn.Module:
    """Switch a transformers model to a sparse method, or to a recipe, until `unpatch`.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface`; or a video transformer
            of diffusers, see `sparse_attn.integrations.diffusers.patch`.
        method: a name of `sparse_attn.methods.METHODS`; or "dense"; or a function
            (query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], *, layer, is_causal, scale)
            -> out [B, Hq, L, Dv]; or a `Recipe`, or the path of its file (a string ends in ".json").
        config: an instance of the method's config class; instead of it, pass its fields as `options`.
        layers: what single layers do instead, by layer number from 0: a dict, or a function of the
            number. Each value is "dense", a method's name, (name, {options}), (name, config), a function,
            or None for the model's default.
        engine: insist on one engine by name, in every layer.
        decode: what calls with a single query do: "dense" or "sparse". Default: dense, but for a recipe
            with plans for the phase "decode", which are then followed.
        on_mask: "dense" (default: run dense under the mask, and warn) or "error": what happens under a
            mask that is neither causal nor padding.
        strict: whether a recipe's fingerprint includes the hash of the model's config.

    Returns:
        The model, which was changed in place.

    Raises:
        ValueError: the model is patched already or cannot be patched; an unknown method, layer or option;
            a recipe for another model, or without plans for prefill.

    Example:
        >>> patch(model, "s2", local_blocks=8, layers={0: "dense", 1: ("blasst", {"threshold": 0.001})})
    """
    if video := _video_adapter(model):
        return video.patch(
            model, method, config, layers=layers, engine=engine, decode=decode, on_mask=on_mask,
            strict=strict, **options,
        )  # fmt: skip
    _check_unpatched(model)
    check_switches("patch", decode, on_mask)
    recipe = as_recipe(method)
    modules = attention_modules(model)
    numbers = sorted({module.layer_idx for _, module in modules})
    if recipe is None:
        default = setting_of(attention_of("patch", method, config, engine, options), decode, on_mask)
        by_default = dict.fromkeys(numbers, default)
    else:
        if config is not None or options:
            raise ValueError("patch: config and options belong to a method's name, not to a recipe.")
        adapter.check_is_model(model)
        recipe.check_model(model, strict=strict)
        _check_one_stack(modules, recipe)
        default = setting_of(None, decode, on_mask)  # of layers that carry no number: none, by the check
        by_default = settings_of_recipe(recipe, numbers, engine, decode, on_mask)
    by_layer = {
        number: setting_of(attention_of_choice("patch", choice, engine), decode, on_mask)
        for number, choice in _choices(layers, numbers).items()
    }
    settings: dict[nn.Module, Setting] = dict.fromkeys(model.modules(), default)
    for name, module in modules:
        own = by_layer.get(module.layer_idx)
        why = "" if own is None else "asked for by `layers`"
        settings[module] = fit(module, own or by_default[module.layer_idx], why, name)
    before = adapter.switch(model)
    for module, setting in settings.items():
        setattr(module, ATTRIBUTE, setting)
    setattr(model, _RECORD, _Patch(before, "" if recipe is None else _source(method)))
    asked = [default, *by_default.values(), *by_layer.values()]
    _warn_if_all_dense([settings[module] for _, module in modules], asked)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give the model back the attention it had before `patch`, and return it.

    Raises:
        ValueError: the model is not patched.
    """
    if video := _video_adapter(model):
        return video.unpatch(model)
    if not is_patched(model):
        raise ValueError(
            f"unpatch: this {type(model).__name__} is not patched; call it with the model that "
            "sparse_attn.patch was given, or a copy of it (not a part of it)."
        )
    for config, implementation in getattr(model, _RECORD).before:
        config._attn_implementation = implementation
    delattr(model, _RECORD)
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)
    return model


@contextmanager
def patched(
    model: nn.Module,
    method: str | AttentionFunction | Recipe | PathLike[str],
    config: Any = None,
    **options: Any,
) -> Iterator[nn.Module]:
    """`patch` for the length of a `with` block, whatever ends it. Takes the arguments of `patch`."""
    patch(model, method, config, **options)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` holds for this very model, or for the one that it is a copy of."""
    return _RECORD in model.__dict__


def _video_adapter(model: Any) -> Any:
    """The adapter of diffusers, for a model of it (or a pipeline, which it refuses), else None."""
    if all(cls.__module__.partition(".")[0] != "diffusers" for cls in type(model).__mro__):
        return None
    from sparse_attn.integrations import diffusers

    return diffusers


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


def _check_unpatched(model: nn.Module) -> None:
    if is_patched(model):
        raise ValueError(
            f"patch: this {type(model).__name__} is patched already; call sparse_attn.unpatch(model) first."
        )
    for name, module in model.named_modules():
        if is_patched(module) or ATTRIBUTE in module.__dict__:
            what = name or "the model that it belongs to"
            raise ValueError(f"patch: {what} is patched already; call sparse_attn.unpatch on that first.")


def _check_one_stack(modules: list[tuple[str, Any]], recipe: Recipe) -> None:
    """A recipe numbers the layers of one stack."""
    names: dict[int, str] = {}
    for name, module in modules:
        if is_cross_attention(module, name):
            continue
        if module.layer_idx in names:
            raise ValueError(
                f"patch: {names[module.layer_idx]} and {name} are both layer {module.layer_idx}; a recipe is "
                "for one stack of layers: sparse_attn.patch the part of the model that it is for."
            )
        names[module.layer_idx] = name
    if sorted(names) != list(range(recipe.model.num_layers)):
        raise ValueError(
            f"patch: the recipe has layers 0 to {recipe.model.num_layers - 1}, but the attention layers of "
            f"this {type(modules[0][1]).__name__ if modules else 'model'} are numbered {sorted(names)}."
        )


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


def _source(method: Any) -> str:
    return f"a recipe of {method.created_by}" if isinstance(method, Recipe) else f"the recipe {method}"


def _warn_if_all_dense(settings: list[Setting], asked: list[Setting]) -> None:
    if not settings or all(x.attention is None for x in asked):
        return
    if all(x.attention is None or x.is_stock for x in settings):
        reasons = ", ".join(sorted({x.reason for x in settings if x.reason}))
        message = f"patch: no layer of this model will be sparse ({reasons}); see sparse_attn.explain(model)."
        warnings.warn(message, adapter.DenseFallbackWarning, stacklevel=3)


# -- explaining ---------------------------------------------------------------------------------------

NOTES = """\
prefill: calls with two or more queries, also in chunks over a cache. decode: calls with one query.
padding: each sequence is cut to its real tokens, so padding changes neither pattern nor result.
other masks (packed sequences, a 4-D mask, padding with holes): see the column."""


def explain(model: nn.Module) -> str:
    """What each attention layer of a model does, and why, as a table.

    Layers that do the same share a line. Works on any model; one that is not patched says so.

    Example:
        >>> print(explain(model))
    """
    if video := _video_adapter(model):
        return video.explain(model)
    name = type(model).__name__
    loaded = not is_patched(model) and adapter.is_loaded(model)
    if not is_patched(model) and not loaded:
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", "its own code")
        return f"{name} is not patched: every layer runs stock attention ({implementation})."
    modules = attention_modules(model)
    stacks = [re.sub(r"\.\d+\..*", "", name) for name, _ in modules]
    rows: list[tuple[str, list[str]]] = []
    numbers: list[list[str]] = []
    for stack, (_, module) in zip(stacks, modules, strict=True):
        row = (stack, _row(adapter.setting_for(module)))
        if rows and rows[-1] == row:
            numbers[-1].append(str(module.layer_idx))
        else:
            rows.append(row)
            numbers.append([str(module.layer_idx)])
    head = ["layers", "prefill", "decode", "other masks", "why"]
    table = [head] + [
        [(f"{stack} " if len(set(stacks)) > 1 else "") + "-".join(dict.fromkeys((run[0], run[-1]))), *row]
        for run, (stack, row) in zip(numbers, rows, strict=True)
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    if not rows:
        lines = ["its attention layers carry no layer_idx: all follow the model's setting."]
    return "\n".join([f"{name}, {_how(model, loaded)}:", *(line.rstrip() for line in lines), NOTES])


def _how(model: nn.Module, loaded: bool) -> str:
    if loaded:
        return f'loaded with attn_implementation="{adapter.NAME}"'
    source = getattr(model, _RECORD).source
    return f"patched with {source}" if source else "patched"


def _row(setting: Setting) -> list[str]:
    """prefill, decode, other masks, why."""
    if setting.is_stock:
        return ["stock", "stock", "stock, masked", setting.reason]
    masks = "refused (on_mask)" if setting.on_mask == "error" else "dense, warns"
    if setting.attention is None and setting.decode is None:
        return [DENSE, DENSE, "dense", setting.reason]
    return [name_of(setting.attention), name_of(setting.decode), masks, setting.reason]
