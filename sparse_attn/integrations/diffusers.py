"""Sparse self-attention in the video transformers of diffusers: Wan, HunyuanVideo, CogVideoX.

    import sparse_attn as sa

    sa.patch(pipe.transformer, "vdit", patterns="diagonal:1", layers={0: "dense"})
    print(sa.explain(pipe.transformer))
    video = pipe(prompt).frames
    sa.unpatch(pipe.transformer)

What changes is the attention among video (and text) tokens; cross-attention keeps its stock processor. The
token grid, the text and the denoising step are read from the transformer's own calls. A dense layer or step
runs the stock processor.

`sparse_attn.patch` and its companions come here for such a model. diffusers is imported when a model of it
is patched, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from typing import Any

from torch import Tensor, nn

from sparse_attn.integrations.diffusers_choice import Chooser
from sparse_attn.integrations.diffusers_processors import (
    CogVideoXProcessor,
    HunyuanProcessor,
    SparseProcessor,
    WanProcessor,
)
from sparse_attn.integrations.diffusers_state import CallState, Family, Tokens
from sparse_attn.recipe import Recipe

TESTED = "0.42"  # our processors do what those of this version do; a later one may change them
_ATTRIBUTE = "_sparse_attn_patch"  # as `patching.py` names its own


# -- the families -------------------------------------------------------------------------------------


def _wan_layers(model: Any) -> list[Any]:
    return [block.attn1 for block in model.blocks]


def _hunyuan_layers(model: Any) -> list[Any]:
    """Blocks with two streams first, as they run."""
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def _cogvideox_layers(model: Any) -> list[Any]:
    return [block.attn1 for block in model.transformer_blocks]


def _read_wan(model: Any, given: Mapping[str, Any]) -> tuple[Tokens, None]:
    _, _, *size = given["hidden_states"].shape
    frames, height, width = (n // p for n, p in zip(size, model.config.patch_size, strict=True))
    return Tokens((frames, height, width)), None


def _read_hunyuan(model: Any, given: Mapping[str, Any]) -> tuple[Tokens, Tensor]:
    _, _, frames, height, width = given["hidden_states"].shape
    p, p_t = model.config.patch_size, model.config.patch_size_t
    grid = (frames // p_t, height // p, width // p)
    return Tokens(grid, given["encoder_hidden_states"].shape[1]), given["encoder_attention_mask"]


def _read_cogvideox(model: Any, given: Mapping[str, Any]) -> tuple[Tokens, None]:
    _, frames, _, height, width = given["hidden_states"].shape
    p, p_t = model.config.patch_size, model.config.patch_size_t or 1
    grid = (frames // p_t, height // p, width // p)
    return Tokens(grid, given["encoder_hidden_states"].shape[1], text_first=True), None


FAMILIES = {
    "WanTransformer3DModel": Family(
        _wan_layers,
        ("WanAttnProcessor",),
        WanProcessor,
        _read_wan,
        ("hidden_states", "timestep", "encoder_hidden_states"),
    ),
    "HunyuanVideoTransformer3DModel": Family(
        _hunyuan_layers,
        ("HunyuanVideoAttnProcessor2_0",),
        HunyuanProcessor,
        _read_hunyuan,
        ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
    ),
    "CogVideoXTransformer3DModel": Family(
        _cogvideox_layers,
        ("CogVideoXAttnProcessor2_0",),
        CogVideoXProcessor,
        _read_cogvideox,
        ("hidden_states", "encoder_hidden_states", "timestep"),
    ),
}


# -- patching -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Patch:
    """What a patched model carries. It has no weights; a deep copy of the model has its own."""

    state: CallState
    stock: list[tuple[Any, Any]]  # each attention module and its stock processor
    told: list[tuple[str, str]]  # what each runs, and why, for `explain`
    hook: Any


def patch(
    model: nn.Module,
    method: str | Recipe | PathLike[str] | Callable[..., Tensor],
    config: Any = None,
    *,
    layers: Mapping[int, Any] | Callable[[int], Any] | None = None,
    engine: str | None = None,
    num_steps: int | None = None,
    any_grid: bool = False,
    strict: bool = True,
    decode: str | None = None,
    on_mask: str = "dense",
    **options: Any,
) -> nn.Module:
    """Switch the self-attention of a video transformer to a sparse method until `unpatch`.

    Args:
        model: a `WanTransformer3DModel`, `HunyuanVideoTransformer3DModel` or
            `CogVideoXTransformer3DModel` (1.0 and 1.5); of a pipeline, its `transformer`.
        method: a name of `sparse_attn.methods.METHODS` that works without causality; or "dense"; or a
            `Recipe` with "denoising" plans, or the path of its file; or a function, as `sparse_attn.patch`
            takes it.
        config: an instance of the method's config class; instead of it, its fields as `options`. Grid and
            text (`grid`, `text_len`, `text_first`, `text_valid`) come from the call.
        layers: what single layers do instead, by number from 0 (of HunyuanVideo, the blocks with two
            streams come first): a dict or a function of the number. Values as in `sparse_attn.patch`.
        engine: insist on one engine by name, in every layer.
        num_steps: denoising steps of a generation (`num_inference_steps`); needed by methods that differ
            by step, as "sparsed" does. Default: the recipe's.
        any_grid: allow a config or recipe that was made for another token grid.
        strict: also compare the hash of the model's config with the recipe's.
        decode, on_mask: of `sparse_attn.patch`; nothing here decodes, and padding of the text is always cut
            off, so that they may only have their defaults.

    Returns:
        The model, which was changed in place.

    Raises:
        ValueError: the model is patched already or not one of those; its processors are not the stock
            ones; an unknown method, layer or option; a recipe of another model; a method that is made for
            causal attention alone. The model is then as it was.

    Example:
        >>> patch(pipe.transformer, "sparsed", num_steps=50, select_ratio=0.3)
    """
    family = _family(model)
    _check_version()
    if is_patched(model):
        raise ValueError(
            f"patch: this {type(model).__name__} is patched already; call sparse_attn.unpatch(model) first."
        )
    if decode is not None or on_mask != "dense":
        raise ValueError("patch: decode and on_mask are for language models; leave them out.")
    modules = family.layers(model)
    _check_processors(model, family, modules)
    chooser = Chooser(model, modules, engine, num_steps, any_grid, strict)
    choices = chooser.choose(method, config, options, layers)
    state = CallState(family, chooser.num_steps)
    held = [(module, module.processor) for module in modules]
    ours = [
        stock if choice.rule is None else family.processor(stock, number, choice.rule, state)
        for number, ((_, stock), choice) in enumerate(zip(held, choices, strict=True))
    ]
    hook = model.register_forward_pre_hook(state.enter, with_kwargs=True)
    for module, processor in zip(modules, ours, strict=True):
        module.processor = processor
    setattr(model, _ATTRIBUTE, _Patch(state, held, [(x.what, x.why) for x in choices], hook))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give the model its stock processors back, and return it.

    Raises:
        ValueError: the model is not patched.
    """
    found = _patch_of(model, "unpatch")
    found.hook.remove()
    for module, stock in found.stock:
        module.processor = stock
    delattr(model, _ATTRIBUTE)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` holds for this model. A deep copy of a patched model is patched too."""
    return hasattr(model, _ATTRIBUTE)


def explain(model: nn.Module) -> str:
    """What each self-attention layer does, and why, as a table; layers that do the same share a line."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        _family(model)  # a pipeline: says what to ask instead
    if not is_patched(model):
        return f"{name} is not patched: every layer runs its stock processor."
    found = _patch_of(model, "explain")
    runs: list[tuple[list[int], str, str]] = []
    for number, (what, why) in enumerate(found.told):
        if runs and runs[-1][1:] == (what, why):
            runs[-1][0].append(number)
        else:
            runs.append(([number], what, why))
    table = [["layers", "self-attention", "why"]]
    for numbers, what, why in runs:
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        first, *rest = what.split("\n")
        table += [[span, first, why], *([["", line, ""] for line in rest])]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([f"{name}, patched:", *lines, "cross-attention: stock", _where(found.state)])


def _where(state: CallState) -> str:
    steps = "steps: not counted" if state.num_steps is None else f"steps: {state.num_steps}"
    if state.tokens is None:
        return f"{steps}; not called yet"
    at = "" if state.num_steps is None else f", step {state.step}, pass {state.pass_number}"
    tokens = state.tokens
    text = "no text" if not tokens.text_len else f"{tokens.text_len} text tokens"
    real = "" if state.real_text is None else f", of which {state.real_text} are real"
    return f"{steps}; last call: grid {tokens.grid}, {text}{real}{at}"


# -- steps --------------------------------------------------------------------------------------------


def set_step(model: nn.Module, step: int) -> None:
    """Tell a patched model that its next calls belong to a denoising step, from 0; for loops of your own.

    Raises:
        ValueError: the model is not patched, or `step` is no step of it.
    """
    state = _patch_of(model, "set_step").state
    if state.num_steps is not None and not 0 <= step < state.num_steps:
        raise ValueError(f"set_step: step is {step}; the model was patched for {state.num_steps} steps.")
    state.set_step(step)


def restart(model: nn.Module) -> None:
    """Forget the steps and patterns of a patched model: after a generation that was broken off."""
    _patch_of(model, "restart").state.restart()


def step_callback(*models: nn.Module) -> Callable[..., dict[str, Any]]:
    """For a pipeline's `callback_on_step_end`: steps are then told, not guessed from the timesteps.

    Needed where a scheduler repeats a timestep within a generation, or does not go down with it.

    Example:
        >>> pipe(prompt, callback_on_step_end=step_callback(pipe.transformer))
    """
    for model in models:
        set_step(model, 0)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        for model in models:
            state = _patch_of(model, "step_callback").state
            if state.num_steps not in (None, pipe.num_timesteps):
                raise ValueError(
                    f"step_callback: the pipeline runs {pipe.num_timesteps} steps, but the model was patched "
                    f"for num_steps={state.num_steps}; patch it for as many."
                )
            state.set_step((step + 1) % pipe.num_timesteps)
        return tensors

    return callback


# -- checks and choices -------------------------------------------------------------------------------


def _check_version() -> None:
    found = import_module("diffusers").__version__
    if found != TESTED and not found.startswith(f"{TESTED}."):
        warnings.warn(
            f"patch: found diffusers {found}; tested with {TESTED}.x. Check once that "
            'patch(model, "vdit", patterns="full") gives what the stock model gives.',
            stacklevel=4,
        )


def _family(model: Any) -> Family:
    family = FAMILIES.get(type(model).__name__)
    if family is not None and isinstance(model, nn.Module):
        return family
    parts = [name for name in ("transformer", "transformer_2") if getattr(model, name, None) is not None]
    if parts and not isinstance(model, nn.Module):
        raise ValueError(
            f"patch: this is a {type(model).__name__}; patch its "
            f"{' and its '.join(f'pipe.{name}' for name in parts)} instead."
        )
    raise ValueError(
        f"patch: {type(model).__name__} is not supported; of diffusers, choose one of {', '.join(FAMILIES)}."
    )


def _patch_of(model: nn.Module, op: str) -> _Patch:
    if not is_patched(model):
        raise ValueError(f"{op}: this {type(model).__name__} is not patched; call sparse_attn.patch first.")
    return getattr(model, _ATTRIBUTE)


def _check_processors(model: Any, family: Family, modules: list[nn.Module]) -> None:
    problems = set()
    for module in modules:
        processor: Any = module.processor
        if isinstance(processor, SparseProcessor):
            problems.add("processors of another patched model: patch a model that shares no layers with it")
        elif type(processor).__name__ not in family.stock:
            problems.add(
                f"{type(processor).__name__} as an attention processor; give it back its {family.stock[0]} "
                "(of CogVideoX: unfuse_qkv_projections)"
            )
        elif getattr(processor, "_parallel_config", None) is not None:
            problems.add("context parallelism on, which splits the sequence; load it without")
    if problems:
        raise ValueError(f"patch: this {type(model).__name__} has {'; '.join(sorted(problems))}.")
