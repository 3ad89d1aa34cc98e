"""From what a user asks of a video transformer to a rule for each layer, all of it checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

from sparse_attn.integrations.diffusers_rules import (
    GEOMETRY,
    PHASE,
    FunctionRule,
    MethodRule,
    RecipeRule,
    Rule,
)
from sparse_attn.integrations.settings import DENSE, as_recipe, describe
from sparse_attn.methods import METHODS, Method
from sparse_attn.recipe import Fingerprint, Recipe
from sparse_attn.recipe_check import by_head_problems

STOCK = "stock"


class Choice(NamedTuple):
    """What a layer runs: a rule, or None for its stock processor; in words; and why, if not by default."""

    rule: Rule | None
    what: str
    why: str = ""


@dataclass
class Chooser:
    """Makes the choices of one model. Fields as the arguments of `patch`; `num_steps` may come from a
    recipe."""

    model: Any
    modules: list[Any]
    engine: str | None
    num_steps: int | None
    any_grid: bool
    strict: bool

    def choose(self, method: Any, config: Any, options: dict[str, Any], layers: Any) -> list[Choice]:
        """The choice of every layer.

        Raises:
            ValueError: anything that `patch` refuses.
        """
        if self.num_steps is not None and not (isinstance(self.num_steps, int) and self.num_steps > 0):
            raise ValueError(f"patch: num_steps is {self.num_steps!r}; it must be an int of at least 1.")
        numbers = range(len(self.modules))
        recipe = as_recipe(method)
        if recipe is None:
            choices = [self._of_method(method, config, options)] * len(numbers)
        else:
            if config is not None or options:
                raise ValueError("patch: config and options belong to a method's name, not to a recipe.")
            self._check_recipe(recipe)
            choices = [self._of_recipe(recipe, number) for number in numbers]
        for number, other in _by_layer(layers, len(numbers)).items():
            chosen, *arguments = other if isinstance(other, tuple) else (other,)
            own = arguments[0] if arguments else None
            by_name = dict(own) if isinstance(own, Mapping) else {}
            choice = self._of_method(chosen, None if isinstance(own, Mapping) else own, by_name)
            choices[number] = choice._replace(why="asked for by `layers`")
        return choices

    def _of_method(self, method: Any, config: Any, options: dict[str, Any]) -> Choice:
        if not (isinstance(method, str) or callable(method)):
            raise ValueError(
                f"patch: a method is {method!r}; pass a name, 'dense', a function, (name, {{options}}), "
                "a Recipe or its file."
            )
        if callable(method) or method == DENSE:
            if config is not None or options:
                raise ValueError(f"patch: config and options belong to a method's name, not to {method!r}.")
            if callable(method):
                name = getattr(method, "__name__", type(method).__name__)
                return Choice(FunctionRule(method), f"function {name}")
            return Choice(None, STOCK)
        if method not in METHODS:
            raise ValueError(
                f"patch: unknown method {method!r}; choose one of {DENSE}, {', '.join(METHODS)}."
            )
        _refuse_causal(METHODS[method])
        made = _config(METHODS[method], config, options)
        self._check_config(method, made(grid=(1, 1, 1)) if callable(made) else made)
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        what = describe(method, config) if config is not None else f"{method}({shown})" if shown else method
        return Choice(MethodRule(METHODS[method], made, self.engine, self.any_grid), what)

    def _of_recipe(self, recipe: Recipe, layer: int) -> Choice:
        plans = [x for x in recipe.layers if (x.phase, x.layer) == (PHASE, layer)]
        if all(group.method == DENSE for plan in plans for group in plan.groups):
            return Choice(None, STOCK, "" if plans else "the recipe has no plan for it")
        lines = []
        for plan in plans:
            heads = ", ".join(f"{len(group.heads)} heads {group.method}" for group in plan.groups)
            when = "" if plan.steps is None else f"steps {plan.steps[0]}-{plan.steps[1] - 1}: "
            lines.append(when + heads)
        return Choice(RecipeRule(recipe, layer, self.engine, self.any_grid), "\n".join(lines))

    # -- checks -----------------------------------------------------------------------------------------

    def _check_recipe(self, recipe: Recipe) -> None:
        if PHASE not in recipe.phases:
            raise ValueError(
                f"patch: the recipe has plans for {', '.join(recipe.phases) or 'nothing'} but none for "
                f"{PHASE}; a recipe for a language model goes to that model."
            )
        recipe.check_model(Fingerprint.of(self.model, num_layers=len(self.modules)), strict=self.strict)
        if recipe.num_steps is not None and self.num_steps not in (None, recipe.num_steps):
            raise ValueError(
                f"patch: num_steps is {self.num_steps}, but the recipe was made for {recipe.num_steps} "
                "denoising steps; generate with that many, or search again."
            )
        self.num_steps = recipe.num_steps or self.num_steps
        groups = [group for plan in recipe.layers if plan.phase == PHASE for group in plan.groups]
        for group in groups:
            if group.method != DENSE:
                _refuse_causal(METHODS[group.method])
                self._check_steps(group.method, group.config)

    def _check_config(self, method: str, config: Any) -> None:
        if problems := by_head_problems(config, self.modules[0].heads):
            raise ValueError(f"patch: {method}: {'; '.join(problems)}.")
        self._check_steps(method, config)

    def _check_steps(self, method: str, config: Any) -> None:
        if hasattr(config, "switch_step") and self.num_steps is None:
            raise ValueError(
                f"patch: {method} differs by denoising step; pass num_steps=num_inference_steps."
            )


def _refuse_causal(method: Method) -> None:
    if method.causal_only:
        others = ", ".join(x.name for x in METHODS.values() if not x.causal_only)
        raise ValueError(
            f"patch: {method.name} is made for causal attention, which a video transformer has not; choose "
            f"one of {others}."
        )


def _by_layer(layers: Any, num_layers: int) -> dict[int, Any]:
    """The layers that differ from the model's default."""
    if callable(layers):
        layers = {number: layers(number) for number in range(num_layers)}
    if not isinstance(layers, (Mapping, type(None))):
        raise ValueError(
            f"patch: layers is {type(layers).__name__}; pass a dict or a function of the number."
        )
    unknown = [number for number in layers or {} if number not in range(num_layers)]
    if unknown:
        raise ValueError(f"patch: layers names {unknown}; this model's layers are 0 to {num_layers - 1}.")
    return {number: choice for number, choice in (layers or {}).items() if choice is not None}


def _config(method: Method, config: Any, options: dict[str, Any]) -> Any:
    """The config object; where its class wants a grid and none was given, a function of `grid=`."""
    cls = method.config
    if config is not None and options:
        raise ValueError("patch: pass either config or its fields as options, not both.")
    if config is not None and not isinstance(config, cls):
        raise ValueError(f"patch: config is {type(config).__name__}; {method.name} takes {cls.__name__}.")
    if config is not None:
        return config
    names = {x.name for x in fields(cls)} & set(GEOMETRY)
    if given := sorted(names & set(options)):
        raise ValueError(
            f"patch: {', '.join(given)} given, but the model's own calls tell a {method.name} layer that; "
            "leave it out."
        )
    try:
        if "grid" not in names:
            return cls(**options)
        cls(grid=(1, 1, 1), **options)
    except TypeError as error:  # an option that the config class does not have
        raise ValueError(f"patch: {method.name}: {error}") from error
    return partial(cls, **options)
