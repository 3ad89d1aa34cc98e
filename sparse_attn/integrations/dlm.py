"""Diffusion language models: SparseD by denoising step, for the length of one generation.

    with sa.denoising(model, num_steps=64, prompt_len=900, select_ratio=0.3) as run:
        for _ in range(64):
            logits = model(x).logits           # each forward pass of the model is a step
            ...                                # unmask some tokens of x
    print(run)

The sampler does not change: `run` counts the model's forward passes, keeps one pattern for each layer (and
branch of the guidance, and row of a padded batch) in caches that end with the block, and tells each layer
where the prompt ends. A model of transformers is reached through its attention interface; remote code that
calls `scaled_dot_product_attention`, as LLaDA's and Dream's does, by the class of its layers (`modules=`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.integrations.padding import dense, each_sequence, real_tokens
from sparse_attn.integrations.patching import patched
from sparse_attn.integrations.sdpa import handled_by, leave_alone, redirected, why_not
from sparse_attn.integrations.settings import MethodAttention, as_recipe, attention_of
from sparse_attn.methods import Context
from sparse_attn.methods.base import run as run_method
from sparse_attn.methods.sparsed import SparseDConfig, sparsed_attention
from sparse_attn.recipe import Recipe, run_layer
from sparse_attn.reuse import LayoutCache

PHASE = "denoising"
OP = "denoising"


class Denoising:
    """One generation: its steps, its prompt lengths, and the patterns found on the way.

    Made by `denoising`; the arguments are described there.

    Attributes:
        num_steps: denoising steps of the generation.
        branches: forward passes in a step.
        reasons: how many calls ran dense though a method was asked for, by the reason.
    """

    def __init__(
        self,
        num_steps: int,
        prompt_len: int | Sequence[int] | Tensor,
        attention: MethodAttention | Recipe,
        branches: int,
        dense_layers: Collection[int],
        engine: str | None,
    ) -> None:
        for name, value in (("num_steps", num_steps), ("branches", branches)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{OP}: {name} is {value!r}; it must be a positive int.")
        if isinstance(attention, Recipe) and attention.num_steps not in (None, num_steps):
            raise ValueError(
                f"{OP}: num_steps is {num_steps}, but the recipe was made for {attention.num_steps}; "
                "generate with that many, or search again."
            )
        self.num_steps, self.branches = int(num_steps), int(branches)
        self.reasons: Counter[str] = Counter()
        self._attention, self._engine = attention, engine
        self._dense_layers = frozenset(dense_layers)
        self._paddings: tuple[Tensor | None, Tensor | None] = (None, None)
        self.restart(prompt_len)

    # -- steps ------------------------------------------------------------------------------------------

    def restart(self, prompt_len: int | Sequence[int] | Tensor) -> None:
        """Begin another generation with as many steps: step 0, no patterns."""
        self._prompt_len = _prompt_lengths(prompt_len)
        self._caches: dict[tuple[int, int | None], LayoutCache] = {}
        self._forwards, self._counts, self._at = 0, True, (-1, 0)

    @property
    def step(self) -> int:
        """Of the forward pass that runs or ran last, from 0; -1 before the first."""
        return self._at[0]

    def set_step(self, step: int, branch: int = 0) -> None:
        """Say which step and branch the next forward passes belong to; from now on they are not counted.

        For samplers whose forward passes are not one a step: those that cache, retry or stop early.
        """
        if not (0 <= step < self.num_steps and 0 <= branch < self.branches):
            raise ValueError(
                f"{OP}: step {step}, branch {branch} is outside {self.num_steps} steps of {self.branches}."
            )
        self._counts, self._at = False, (step, branch)

    def _enter_forward(self, *_: Any) -> None:
        self._paddings = (None, None)
        if not self._counts:
            return
        if self._forwards == self.num_steps * self.branches:
            raise ValueError(
                f"{OP}: forward pass {self._forwards + 1} comes after the last of {self.num_steps} steps of "
                f"{self.branches} branches; pass the sampler's steps over all its blocks as num_steps, "
                "branches=2 for guidance in two passes, call restart() for another generation, or set_step()."
            )
        self._at = divmod(self._forwards, self.branches)
        self._forwards += 1

    # -- attention --------------------------------------------------------------------------------------

    wants_rows = True  # the adapter names the row of a padded batch, and what was cut off before it

    @property
    def label(self) -> str:
        """As `explain` shows it."""
        if isinstance(self._attention, Recipe):
            return "recipe by step"
        return f"{self._attention} by step"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        is_causal: bool = False,
        scale: float | None = None,
        row: int | None = None,
        first: int = 0,
    ) -> Tensor:
        """Attention of one layer at the current step: the hook for code of one's own.

        Args:
            query: [B, Hq, L, D]; key: [B, Hkv, L, D]; value: [B, Hkv, L, Dv]; after rotary embedding.
            layer: number, from 0.
            row: the sequence of the batch that this call is for, cut to its real tokens (B is 1).
            first: padding tokens that were cut off before it.

        Returns:
            out [B, Hq, L, Dv].

        Raises:
            ValueError: no step has begun, other lengths than the generation began with, L != S, ...
        """
        step, branch = self._at
        if step < 0:
            raise ValueError(
                f"{OP}: no step has begun: the sampler calls another module than the one that was given. "
                "Give that one to denoising(), or call set_step()."
            )
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        if layer in self._dense_layers:
            return dense(query, key, value, None, is_causal, scale)
        cache = self._caches.setdefault((branch, row), LayoutCache())
        prompt_len = self._prompt_of(query.shape[0], row, first)
        how: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "engine": self._engine}
        attention = self._attention
        context = Context(
            layer=layer, step=step, num_steps=self.num_steps, prompt_len=prompt_len, cache=cache
        )
        if isinstance(attention, Recipe):
            out = run_layer(attention.plan_for(layer, PHASE, step), query, key, value, context=context, **how)
        elif isinstance(
            attention.config, SparseDConfig
        ):  # which takes the pattern's normaliser from the pass
            out = sparsed_attention(
                query, key, value, cache=cache, step=step, num_steps=self.num_steps, prompt_len=prompt_len,
                layer=layer, enable_gqa=True, **asdict(attention.config), **how,
            )  # fmt: skip
        else:
            out = run_method(
                attention.method, query, key, value, attention.config, enable_gqa=True, context=context, **how
            ).out
        assert isinstance(out, Tensor)
        return out

    def _prompt_of(self, batch: int, row: int | None, first: int) -> int | Tensor:
        given = self._prompt_len
        if isinstance(given, int):
            return given - first
        if row is not None:
            return int(given[row % given.numel()]) - first
        if batch % given.numel():
            raise ValueError(
                f"{OP}: prompt_len has {given.numel()} entries, but the batch has {batch} rows; give one a "
                "row (guidance in one pass may repeat the whole batch)."
            )
        return given.repeat(batch // given.numel())

    # -- calls of scaled_dot_product_attention --------------------------------------------------------------

    def _take_over(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        dropout: float,
        causal: bool,
        scale: Any,
        gqa: bool,
    ) -> Tensor | None:
        """What `sdpa` hands to a layer of remote code."""
        reason = why_not(q, k, v, None, dropout, causal, gqa)
        padding = None if reason or mask is None else self._padding_of(mask, q.shape[0])
        if not reason and mask is not None and padding is None:
            reason = "its mask is not one of padding"
        spans = None
        if padding is not None and not bool(padding.all()):
            spans = real_tokens(padding)
            reason = "padding inside a sequence" if spans is None else ""
        if reason:
            self.reasons[reason] += 1
            return None

        def attention(q: Tensor, k: Tensor, v: Tensor, row: int | None = None, first: int = 0) -> Tensor:
            return self(q, k, v, layer=layer, is_causal=causal, scale=scale, row=row, first=first)

        return attention(q, k, v) if spans is None else each_sequence(attention, q, k, v, spans)

    def _padding_of(self, mask: Tensor, batch: int) -> Tensor | None:
        """bool [B, L], true on real tokens, of a mask [B, 1, 1 or L, L], bool or additive; None of others.

        The layers of a forward pass share their mask, so that it is read once.
        """
        if self._paddings[0] is not mask:
            self._paddings = (mask, _padding_of(mask, batch))
        return self._paddings[1]

    def __repr__(self) -> str:
        held = sum(len(cache) for cache in self._caches.values())
        size = sum(cache.nbytes for cache in self._caches.values()) / 2**20
        lines = [f"{self.label}: step {self.step} of {self.num_steps}, {held} patterns held ({size:.1f} MiB)"]
        lines += [f"  {count} calls dense: {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)


@contextmanager
def denoising(
    model: nn.Module,
    method: Any = "sparsed",
    config: Any = None,
    *,
    num_steps: int,
    prompt_len: int | Sequence[int] | Tensor,
    branches: int = 1,
    modules: str | Sequence[nn.Module] | None = None,
    dense_layers: Collection[int] = (),
    engine: str | None = None,
    strict: bool = True,
    **options: Any,
) -> Iterator[Denoising]:
    """Run a diffusion language model sparse, by step, for the length of a `with` block.

    Args:
        model: the module whose forward pass is a step of the sampler.
        method: "sparsed" (default), another name of `sparse_attn.methods.METHODS`, or a `Recipe` (or its
            file) with plans for the phase "denoising".
        config: an instance of the method's config class; instead of it, pass its fields as `options`.
        num_steps: steps of the *whole* generation (semi-autoregressive sampling: over all blocks).
        prompt_len: positions before the generated ones, padding on the left included; an int, or one a row.
            Where guidance runs both halves in one batch, those of the first half are enough.
        branches: forward passes in a step: 2 for guidance that runs the model twice. Each has its patterns.
        modules: for remote code that calls `scaled_dot_product_attention`: the layers in their order, one
            call each, or the name of their class ("LLaDALlamaBlock", "DreamSdpaAttention"). Default: a
            transformers model with an attention interface.
        dense_layers: numbers of layers that stay dense at all steps.
        engine: insist on one engine by name.
        strict: whether a recipe's fingerprint includes the hash of the model's config.

    Yields:
        The `Denoising`, which tells the step, and can be called by code of one's own (`Denoising.__call__`).

    Raises:
        ValueError: a bad argument, a recipe for another model, or a model that cannot be reached. In the
            block: more forward passes than steps, or lengths that change within the generation.

    Example:
        >>> with denoising(model, num_steps=64, prompt_len=ids.shape[1], skip_ratio=0.2) as run:
        ...     sample(model, ids)
    """
    recipe = as_recipe(method)
    if recipe is None:
        attention: Any = attention_of(OP, method, config, engine, options)
        if not isinstance(attention, MethodAttention):
            raise ValueError(f"{OP}: method is {method!r}; pass a method's name, a Recipe or its file.")
    elif config is not None or options:
        raise ValueError(f"{OP}: config and options belong to a method's name, not to a recipe.")
    elif PHASE not in recipe.phases:
        raise ValueError(f"{OP}: the recipe has plans for {', '.join(recipe.phases)} but none for {PHASE}.")
    else:
        recipe.check_model(model, strict=strict)
        attention = recipe
    run = Denoising(num_steps, prompt_len, attention, branches, dense_layers, engine)
    with ExitStack() as stack:
        if modules is None:
            stack.enter_context(patched(model, run))
        else:
            stack.enter_context(redirected(leave_alone))
            stack.enter_context(_wrapped(_layers(model, modules), run))
        hook = model.register_forward_pre_hook(run._enter_forward)
        stack.callback(hook.remove)
        yield run


def _layers(model: nn.Module, modules: str | Sequence[nn.Module]) -> list[nn.Module]:
    if not isinstance(modules, str):
        return list(modules)
    found = [module for module in model.modules() if type(module).__name__ == modules]
    if not found:
        raise ValueError(f"{OP}: {type(model).__name__} has no module of class {modules!r}.")
    return found


@contextmanager
def _wrapped(layers: list[nn.Module], run: Denoising) -> Iterator[None]:
    """Each layer's forward pass hands its calls of scaled_dot_product_attention to `run`."""
    if any(isinstance(layer.__dict__.get("forward"), _Forward) for layer in layers):
        raise ValueError(f"{OP}: these modules are in another denoising block already; leave it first.")
    before = [layer.__dict__.get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        layer.forward = _Forward(layer.forward, partial(run._take_over, number))
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


class _Forward:
    """A layer's forward pass under a handler."""

    def __init__(self, forward: Any, handler: Any) -> None:
        self.forward, self.handler = forward, handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with handled_by(self.handler):
            return self.forward(*args, **kwargs)


def _prompt_lengths(given: Any) -> int | Tensor:
    """An int, or an int64 tensor [B] on the CPU."""
    if isinstance(given, Integral) and not isinstance(given, bool):
        return int(given)
    lengths = torch.as_tensor(given).cpu()
    if lengths.dim() == 0 and not lengths.is_floating_point():
        return int(lengths)
    if lengths.dim() != 1 or not lengths.numel() or lengths.is_floating_point():
        raise ValueError(f"{OP}: prompt_len is {given!r}; it must be an int, or ints, one a row.")
    return lengths.long()


def _padding_of(mask: Tensor, batch: int) -> Tensor | None:
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch):
        return None
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = visible[:, 0].any(-2)  # [B, L]: keys that some query sees
    rows = seen[:, :, None] if visible.shape[-2] > 1 else seen.new_ones(1, 1, 1)
    # Queries that are padding may see all, or nothing.
    if not bool((visible[:, 0] == seen[:, None, :])[rows.expand(*visible[:, 0].shape)].all()):
        return None
    return seen.expand(batch, -1)
