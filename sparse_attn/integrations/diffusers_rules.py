"""What one self-attention layer of a video transformer does: a method, a recipe's plans, or a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor

from sparse_attn.integrations.diffusers_state import Tokens
from sparse_attn.methods import Context, Method
from sparse_attn.methods.base import run
from sparse_attn.recipe import HeadGroup, LayerPlan, Recipe, run_layer

PHASE = "denoising"
# Fields of a method's config that the model knows better than the user; they are filled in by the call.
GEOMETRY = ("grid", "text_len", "text_first", "text_valid")


class Rule(Protocol):
    """What a layer runs.

    `is_dense(step)`: whether it leaves that step to the stock attention. `attend`: q, k, v [B, H, N, D] of
    real tokens alone, which `tokens` describes -> out [B, H, N, D].
    """

    def is_dense(self, step: int) -> bool: ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, context: Context, scale: float
    ) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class MethodRule:
    """One method for all heads.

    Attributes:
        config: an instance of the method's config class, or a function of `grid=` that makes one, where the
            class wants a grid that was not given.
        any_grid: run a config on another grid than it was made for.
    """

    method: Method
    config: Any
    engine: str | None = None
    any_grid: bool = False
    _fitted: dict[Tokens, Any] = field(default_factory=dict)

    def is_dense(self, step: int) -> bool:
        return False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, context: Context, scale: float
    ) -> Tensor:
        if tokens not in self._fitted:
            config = self.config(grid=tokens.grid) if callable(self.config) else self.config
            self._fitted[tokens] = fit(config, tokens, self.any_grid)
        return run(
            self.method, q, k, v, self._fitted[tokens], is_causal=False, scale=scale, engine=self.engine,
            context=context,
        ).out  # fmt: skip


@dataclass(frozen=True, eq=False)
class FunctionRule:
    """A function (q, k, v, *, layer, is_causal, scale) -> out, as `sparse_attn.patch` takes it."""

    function: Callable[..., Tensor]

    def is_dense(self, step: int) -> bool:
        return False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, context: Context, scale: float
    ) -> Tensor:
        return self.function(q, k, v, layer=context.layer, is_causal=False, scale=scale)


@dataclass(frozen=True, eq=False)
class RecipeRule:
    """A method for each head, by range of steps."""

    recipe: Recipe
    layer: int
    engine: str | None = None
    any_grid: bool = False
    _fitted: dict[tuple[Tokens, int], LayerPlan] = field(default_factory=dict)

    def plan(self, step: int | None) -> LayerPlan:
        return self.recipe.plan_for(self.layer, PHASE, step)

    def is_dense(self, step: int) -> bool:
        plan = self.plan(step if self.recipe.num_steps is not None else None)
        return all(group.method == "dense" for group in plan.groups)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, context: Context, scale: float
    ) -> Tensor:
        plan = self.plan(context.step if self.recipe.num_steps is not None else None)
        place = (tokens, -1 if plan.steps is None else plan.steps[0])
        if place not in self._fitted:
            groups = [self._fit(group, tokens) for group in plan.groups]
            self._fitted[place] = LayerPlan(plan.layer, tuple(groups), plan.phase, plan.steps)
        out = run_layer(
            self._fitted[place], q, k, v, is_causal=False, scale=scale, engine=self.engine, context=context
        )
        assert isinstance(out, Tensor)
        return out

    def _fit(self, group: HeadGroup, tokens: Tokens) -> HeadGroup:
        return HeadGroup(group.heads, group.method, fit(group.config, tokens, self.any_grid))


def fit(config: Any, tokens: Tokens, any_grid: bool) -> Any:
    """The config with the geometry of a call, where its class has such fields.

    The text is always that of the call, since its length changes with the prompt.

    Raises:
        ValueError: made for another grid, unless `any_grid`.
    """
    names = {x.name for x in fields(config)} & set(GEOMETRY)
    if not names:
        return config
    made_for = getattr(config, "grid", tokens.grid)
    if made_for != tokens.grid and not any_grid:
        raise ValueError(
            f"sparse_attn: this call has a token grid of {tokens.grid} (frames, height, width), but the "
            f"{type(config).__name__} was made for {made_for}; generate at that size, search again for this "
            "one, or patch with any_grid=True (patterns in frames scale with the grid, those in tokens and "
            "columns do not)."
        )
    geometry = {
        "grid": tokens.grid,
        "text_len": tokens.text_len,
        "text_first": tokens.text_first,
        "text_valid": None,  # padding has been cut off
    }
    changes: dict[str, Any] = {name: geometry[name] for name in names}
    if getattr(config, "for_all_heads", False):  # vdit: a pattern that is not in a list
        changes["patterns"] = config.patterns[0]
    return replace(config, **changes)
