"""What comes of a choice: the attention function of a recipe, and the curve of time against error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sparse_attn.methods.base import Context
from sparse_attn.recipe import LayerPlan, Recipe, run_layer
from sparse_attn.recipe_check import encode_config
from sparse_attn.reuse import LayoutCache
from sparse_attn.search.capture import AttentionFunction, sdpa
from sparse_attn.search.predict import Measured
from sparse_attn.search.solve import Problem, greedy_at_error, solve


def sdpa_layer(
    q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float, **where: int
) -> Tensor:
    return sdpa(q, k, v, is_causal=is_causal, scale=scale)


def recipe_attention(
    recipe: Recipe, phase: str | None = None, *, prompt_len: int | None = None
) -> AttentionFunction:
    """The attention function that runs a recipe in a model: for `patch`, `intercept_sdpa` and `Model.run`.

    Args:
        phase: default: the recipe's only one.
        prompt_len: tokens before the generated ones, for SparseD.

    Returns:
        The function; of a recipe with `num_steps` it must be told `step`, and of passes beside the first of a
        step `branch`. One is for one batch of generations at a time: it keeps the patterns of SparseD.
    """
    has_steps = recipe.num_steps is not None and recipe._phase(phase) == "denoising"
    steps: Sequence[int | None] = range(recipe.num_steps or 0) if has_steps else [None]
    plans = {(n, s): recipe.plan_for(n, phase, s) for n in range(recipe.model.num_layers) for s in steps}
    caches: dict[int, LayoutCache] = {}

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float,
        step: int | None = None, branch: int = 0,
    ) -> Tensor:  # fmt: skip
        context = Context(prompt_len=prompt_len)
        if not has_steps:
            step = None
        elif step is None:
            raise ValueError(
                f"recipe_attention: the recipe is for {recipe.num_steps} denoising steps, and the call tells "
                "none; pass num_steps to intercept_sdpa or CallableModel."
            )
        else:
            cache = caches.setdefault(branch, LayoutCache())
            context = Context(
                step=step, num_steps=recipe.num_steps, prompt_len=prompt_len, cache=cache
            )  # fmt: skip
        out = run_layer(plans[layer, step], q, k, v, is_causal=is_causal, scale=scale, context=context)
        assert isinstance(out, Tensor)
        return out

    return attention


def plans_hash(layers: Sequence[LayerPlan]) -> str:
    """What tells recipes apart when they run: heads, methods and settings."""
    plain = [
        [
            p.layer,
            [[list(g.heads), g.method, encode_config(g.config, {}, "")] for g in p.groups],
            *(p.steps or ()),
        ]
        for p in layers
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def pareto(
    problem: Problem, measured: Measured, spent: float
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Least time at some error budgets, ours and the paper's rule with its penalty of 0.5 and with the best
    penalty of a wide range, epsilon always chosen for the budget."""
    ours, greedy = [], []
    for factor in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0):
        budget = spent * factor
        if budget <= 0 or budget < problem.error.min(1).sum():
            continue
        choice = solve(problem, budget)
        ours.append({"error": problem.error_of(choice), "time_us": problem.time_of(choice)})
        by_penalty = {
            p: problem.time_of(greedy_at_error(problem, measured.mse, measured.density, budget, penalty=p))
            for p in (0.5, *np.logspace(-6, 1, 15).tolist())
        }
        best = min(by_penalty, key=lambda p: by_penalty[p])
        greedy.append(
            {"budget": budget, "paper_us": by_penalty[0.5], "best_us": by_penalty[best], "best_penalty": best}
        )
    return ours, greedy
