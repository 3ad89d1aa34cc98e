"""What an attention layer of a patched model does: made from what the user asked for, and from the layer.

The setting lives on the layer itself, as a plain attribute: copies, pickles and moves of a model keep it,
and `torch.compile` sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.checks import MAX_HEAD_DIM
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS, Context, Method
from sparse_attn.methods.base import run
from sparse_attn.recipe import LayerPlan, Recipe, run_layer

DENSE = "dense"
ATTRIBUTE = "_sparse_attn"
# (query, key, value, *, layer, is_causal, scale) -> out [B, Hq, L, Dv]; key heads are not repeated.
AttentionFunction = Callable[..., Tensor]
# "dense", a method's name, a function, or (name, config or dict of options); None is the model's default.
Choice = str | AttentionFunction | tuple[Any, ...] | None


@dataclass(frozen=True, eq=False)
class MethodAttention:
    """A method with its config, as a layer calls it."""

    method: Method
    config: Any
    engine: str | None = None
    _moved: dict[torch.device, Any] = field(default_factory=dict, repr=False)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> Tensor:
        config = self._moved.get(q.device)
        if config is None:
            config = self._moved[q.device] = _on_device(self.config, q.device)
        return run(
            self.method, q, k, v, config, is_causal=is_causal, scale=scale, enable_gqa=True,
            engine=self.engine, context=Context(layer=layer),
        ).out  # fmt: skip

    def __str__(self) -> str:
        return describe(self.method.name, self.config)


def _on_device(config: Any, device: torch.device) -> Any:
    """The config with its tensors on a device: a model may be moved after it was patched."""
    held = {f.name: getattr(config, f.name) for f in fields(config) if f.init} if is_dataclass(config) else {}
    moved = {name: x.to(device) for name, x in held.items() if isinstance(x, (Tensor, SparseLayout))}
    return replace(config, **moved) if moved else config


@dataclass(frozen=True, eq=False)
class PlanAttention:
    """One layer of a recipe: groups of heads with a method each."""

    plan: LayerPlan
    engine: str | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> Tensor:
        out = run_layer(self.plan, q, k, v, is_causal=is_causal, scale=scale, engine=self.engine)
        assert isinstance(out, Tensor)
        return out

    def __str__(self) -> str:
        parts = [f"{ranges(heads)}: {describe(name, config)}" for heads, name, config in self.plan.settings]
        return f"heads {'; '.join(parts)}"


@dataclass(frozen=True, eq=False)
class Setting:
    """What an attention layer does.

    Attributes:
        attention: for calls with two or more queries; None is dense under the layer's own mask.
        decode: for calls with a single query; None is dense.
        on_mask: "dense" or "error", under a mask that is neither causal nor padding.
        window: keys a query of a sliding-window layer sees; a mask it explains is no surprise to warn of.
        reason: why the layer does not run what was asked for the model; empty where it does.
        is_stock: the layer runs the model's own eager attention.
    """

    attention: AttentionFunction | None
    decode: AttentionFunction | None
    on_mask: str
    window: int | None = None
    reason: str = ""
    is_stock: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Setting:
        return self  # nothing in it changes

    @property
    def config(self) -> Any:
        """The method's config where the whole layer runs one method, else None."""
        return getattr(self.attention, "config", None)


def name_of(attention: AttentionFunction | None) -> str:
    """As `explain` shows it: "anchor(theta=9.0)"."""
    if attention is None:
        return DENSE
    if isinstance(attention, (MethodAttention, PlanAttention)):
        return str(attention)
    if hasattr(attention, "label"):
        return attention.label
    return f"function {getattr(attention, '__name__', type(attention).__name__)}"


# -- from what the user asked for ---------------------------------------------------------------------


def attention_of(
    op: str, method: Any, config: Any, engine: str | None, options: Mapping[str, Any]
) -> AttentionFunction | None:
    """The function that layers call; None for "dense".

    Raises:
        ValueError: an unknown method or option, or a bad config.
    """
    if not (isinstance(method, str) or callable(method)):
        raise ValueError(
            f"{op}: a method is {method!r}; pass a name, 'dense', a function, (name, {{options}}), "
            "a Recipe or its file."
        )
    if callable(method):
        if config is not None or options:
            raise ValueError(f"{op}: config and options belong to a method's name, not to a function.")
        return method
    if method == DENSE:
        if config is not None or options:
            raise ValueError(f'{op}: "dense" takes no config and no options.')
        return None
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
    return MethodAttention(chosen, config, engine)


def attention_of_choice(op: str, choice: Choice, engine: str | None) -> AttentionFunction | None:
    """The same of a value of `layers`."""
    method, arguments = (choice[0], choice[1:]) if isinstance(choice, tuple) else (choice, ())
    config = arguments[0] if arguments else None
    if isinstance(config, Mapping):
        return attention_of(op, method, None, engine, config)
    return attention_of(op, method, config, engine, {})


def setting_of(attention: AttentionFunction | None, decode: str | None, on_mask: str) -> Setting:
    return Setting(attention, attention if decode == "sparse" else None, on_mask)


def check_switches(op: str, decode: str | None, on_mask: str) -> None:
    """Raise ValueError unless the two have one of their values."""
    for name, value, other in (("decode", decode, "sparse"), ("on_mask", on_mask, "error")):
        if value not in (DENSE, other) and not (name == "decode" and value is None):
            raise ValueError(f"{op}: {name} is {value!r}; use 'dense' or {other!r}.")


# -- from a recipe --------------------------------------------------------------------------------------


def as_recipe(method: Any) -> Recipe | None:
    """The recipe that a method is, or names by its file (a path, or a string that ends in ".json")."""
    if isinstance(method, Recipe):
        return method
    if isinstance(method, PathLike) or (isinstance(method, str) and method.endswith(".json")):
        if not Path(method).is_file():
            raise ValueError(f"patch: there is no recipe file {str(method)!r}.")
        return Recipe.load(Path(method))
    return None


def settings_of_recipe(
    recipe: Recipe, numbers: Sequence[int], engine: str | None, decode: str | None, on_mask: str
) -> dict[int, Setting]:
    """The setting of each layer number.

    Args:
        decode: None: the recipe's own plans for decoding, dense where it has none. "dense": dense.
            "sparse": its plans for decoding, those for prefill where it has none.

    Raises:
        ValueError: the recipe has no plans for prefill.
    """
    if "prefill" not in recipe.phases:
        raise ValueError(
            f"patch: the recipe has plans for {', '.join(recipe.phases) or 'nothing'} but none for prefill; "
            "a language model's recipe for denoising steps goes to sparse_attn.denoising."
        )
    own_decode = "decode" in recipe.phases and decode != DENSE
    made = {}
    for number in numbers:
        prefill = attention_of_plan(recipe.plan_for(number, "prefill"), engine)
        follows = prefill if decode == "sparse" else None
        if own_decode:
            follows = attention_of_plan(recipe.plan_for(number, "decode"), engine)
        made[number] = Setting(prefill, follows, on_mask)
    return made


def attention_of_plan(plan: LayerPlan, engine: str | None) -> AttentionFunction | None:
    """The plainest function that does what a plan says: dense, one method on the whole layer, or groups."""
    if all(group.method == DENSE for group in plan.groups):
        return None
    first = plan.groups[0]
    if len(plan.groups) == 1 and first.heads == tuple(range(plan.num_heads)):
        return MethodAttention(METHODS[first.method], first.config, engine)
    return PlanAttention(plan, engine)


# -- from the layer -------------------------------------------------------------------------------------


def fit(module: nn.Module, setting: Setting, reason: str = "", name: str = "") -> Setting:
    """The setting as this layer can follow it, with the reason where it cannot.

    Args:
        name: of the layer in its model, which tells cross-attention where its class does not.
        reason: what to say where nothing about the layer stands against the setting.
    """
    window = _window(module)
    stock = _not_plain_softmax(module)
    if stock:
        reason = f"{stock}: runs the model's own eager attention"
        return replace(setting, window=window, reason=reason, is_stock=True)
    if is_cross_attention(module, name):
        return replace(setting, attention=None, decode=None, reason="cross-attention")
    if isinstance(size := getattr(module, "head_dim", None), int) and size > MAX_HEAD_DIM:
        reason = f"heads of size {size}: at most {MAX_HEAD_DIM} is supported"
        return replace(setting, attention=None, decode=None, window=window, reason=reason)
    asked = setting.attention
    if (
        isinstance(asked, MethodAttention)
        and asked.method.causal_only
        and not getattr(module, "is_causal", True)
    ):
        reason = f"{asked.method.name} needs causal attention"
        return replace(setting, attention=None, decode=None, window=window, reason=reason)
    if window is not None:
        some = "" if setting.attention is None else f"{name_of(setting.attention)} up to {window} keys, then "
        return replace(setting, window=window, reason=f"sliding window: {some}dense under the window")
    return replace(setting, reason=reason)


def is_cross_attention(module: nn.Module, name: str) -> bool:
    names = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    told = any(word in names for word in ("cross", "encoder_attn", "encdec"))
    return told or bool(getattr(module, "is_cross_attention", False))


def _window(module: Any) -> int | None:
    """Keys that a query of a sliding-window layer sees; None of a layer without window."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window if isinstance(module.sliding_window, int) else None
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and number is not None and kinds[number] != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) else None


def _not_plain_softmax(module: Any) -> str:
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return f"softcap {module.attn_logit_softcapping:g}"
    if hasattr(module, "has_relative_attention_bias"):
        return "position bias"
    return "attention sinks (s_aux)" if isinstance(getattr(module, "sinks", None), Tensor) else ""


# -- names ----------------------------------------------------------------------------------------------


def describe(method: str, config: Any) -> str:
    """A method with the settings that differ from its defaults: "anchor(theta=9.0)"."""
    if not is_dataclass(config):
        return method
    shown = [
        f"{each.name}={_short(value)}"
        for each in fields(config)
        if each.init and not _is_default(each, value := getattr(config, each.name))
    ]
    return f"{method}({', '.join(shown)})" if shown else method


def _is_default(of: Field, value: Any) -> bool:
    if isinstance(value, Tensor) or of.default is MISSING:
        return False
    return type(value) is type(of.default) and value == of.default


def _short(value: Any) -> str:
    text = f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 7" of 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
