"""The search: measure every candidate on every head of a model, then choose.

    model = LanguageModel(loaded, ids)
    found = search(model, Budget(perplexity=0.01), work="llama.search")
    found.recipe.save("llama.recipe.json")

What was measured (`measuring.py`) makes a knapsack (`solve.py`); where the model has a loss, the error budget
is set by trying recipes on it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_attn.recipe import Recipe
from sparse_attn.search.candidates import Candidate
from sparse_attn.search.jobs import Jobs
from sparse_attn.search.measuring import Measuring
from sparse_attn.search.models import Model
from sparse_attn.search.outcome import pareto, plans_hash, recipe_attention, sdpa_layer
from sparse_attn.search.predict import Measured, copies_us, extra_us, plans
from sparse_attn.search.rules import Budget, PaperRule
from sparse_attn.search.solve import Problem, paper_greedy, solve

__all__ = ["Budget", "Found", "Jobs", "PaperRule", "Search", "recipe_attention", "sdpa_layer", "search"]

# How many times the estimated divergence a recipe's measured loss is found to rise; only where a search
# starts. Measured on SmolLM2-135M: 1.3 to 1.9.
FIRST_RATIO = 1.4
TRIALS = 6  # recipes tried on the model for one budget
CLOSE = 0.92  # a recipe that uses this share of its budget is good enough


@dataclass(frozen=True, eq=False)
class Found:
    """What a search gives.

    Attributes:
        recipe: partial where the search was interrupted.
        measured: the numbers behind it. choice: candidate of each head.
        candidates: what was on offer.
        summary: what the report shows, as JSON.
    """

    recipe: Recipe
    measured: Measured
    choice: np.ndarray
    candidates: list[Candidate]
    summary: dict[str, Any]


@dataclass(eq=False)
class Search(Measuring):
    """One search, step by step; `search` runs it.

    Args:
        model, ...: see `Measuring`.
        closed_loop: choose layers in order, each measured behind the chosen ones (`closed.py`).
        curve: also solve for the report's curve of time against error.
    """

    closed_loop: bool = False
    curve: bool = True

    def __post_init__(self) -> None:
        if self.closed_loop and self.model.num_steps is not None:
            raise ValueError(
                "search: the closed loop chooses the layers of one pass in their order; leave it out for a "
                "model that denoises by steps."
            )
        super().__post_init__()

    def choose(self, rule: Budget | PaperRule, *, try_recipes: bool = True) -> Found:
        """The recipe for what has been measured.

        Args:
            rule: a budget, or the paper's rule.
            try_recipes: for a budget of perplexity or agreement: set the error budget by running recipes;
                otherwise (and where not all layers are measured) by the usual ratio of loss to estimate.
        """
        assert self.table is not None
        measured = self.measured()
        has_harm = not np.isnan(measured.harm).any()
        if isinstance(rule, PaperRule):
            weight = "divergence" if has_harm else "head"
            choice = paper_greedy(measured.mse, measured.density, penalty=rule.penalty, epsilon=rule.epsilon)
            trials: list[dict[str, float]] = []
        else:
            by_head = rule.relative_error is not None or self._tries_steps(rule)
            weight = "head" if by_head else "divergence"
            if weight == "divergence" and not has_harm:
                raise ValueError("search: this model gives no gradients; use a budget of relative_error.")
            choice, trials = self._within(rule, measured, weight, try_recipes)
        whole = len(measured.layers) == self._num_plans
        closed: list[dict[str, Any]] = []
        if self.closed_loop and whole and try_recipes and isinstance(rule, Budget):
            from sparse_attn.search.closed import close  # late: it extends this class

            measured, choice, closed = close(self, rule, measured, weight, choice)
        problem = measured.problem(weight)
        recipe = self._recipe(measured, choice, partial=not whole)
        summary = {"weight": weight, "closed_loop": closed} | self._summary(
            rule, measured, problem, choice, trials
        )
        return Found(recipe, measured, choice, self.options, summary)

    def _recipe(self, measured: Measured, choice: np.ndarray, *, partial: bool) -> Recipe:
        layers = plans(measured, self.options, choice, phase=self.model.phase)
        return Recipe(
            self.model.fingerprint, tuple(layers), self.model.calibration_hash, self.model.num_steps, partial
        )

    def _tries_steps(self, rule: Budget) -> bool:
        """Whether a budget of agreement has no gradients: errors are relative, recipes tried on the model."""
        return self.model.num_steps is not None and rule.agreement is not None

    def check_rule(self, rule: Budget | PaperRule) -> None:
        """Raises:
        ValueError: a rule that this search cannot keep, whatever it measures.
        """
        if self.closed_loop and isinstance(rule, PaperRule):
            raise ValueError(
                "search: the closed loop shares a budget out among the layers; the paper's rule has none."
            )
        by_gradient = isinstance(rule, Budget) and (rule.perplexity or rule.divergence)
        if by_gradient and self.model.num_steps is not None:
            raise ValueError(
                "search: a model that denoises by steps gives no gradients; use a budget of relative_error, "
                "or, for a language model, of agreement."
            )

    @property
    def _num_plans(self) -> int:
        return self.model.fingerprint.num_layers * len(self.schedule.ranges)

    def _within(
        self, rule: Budget, measured: Measured, weight: str, try_recipes: bool
    ) -> tuple[np.ndarray, list[dict[str, float]]]:
        problem = measured.problem(weight)
        if rule.perplexity is None and rule.agreement is None:
            budget = rule.divergence if rule.relative_error is None else rule.relative_error**2
            assert budget is not None
            return solve(problem, budget), []
        share = len(measured.layers) / self._num_plans
        if rule.agreement is None:
            assert rule.perplexity is not None
            kind, target = "loss", math.log1p(rule.perplexity)
            first = target / FIRST_RATIO
        else:
            kind, target = "changed", 1 - rule.agreement
            first = target**2
        if not try_recipes or share < 1:
            return solve(problem, share * first), []
        return self._by_trial(problem, measured, kind, target, first)

    def _by_trial(
        self, problem: Problem, measured: Measured, kind: str, target: float, first: float
    ) -> tuple[np.ndarray, list[dict[str, float]]]:
        """The largest error budget found whose recipe costs the model at most `target`.

        Args:
            kind: "loss": nats that the loss rises by; "changed": the share of most likely next tokens that
                change, which grows with the root of the divergence (measured; it needs the sign of a small
                difference to turn).
            first: the error budget to try first.
        """
        self.progress.stage("trying recipes on the model", TRIALS + 1)
        base, power = self._tried(kind, None), 2 if kind == "changed" else 1
        self.progress.advance()
        budget, low, high = first, 0.0, math.inf
        best = np.zeros(len(problem.time), dtype=np.int64)  # dense
        trials = []
        for _ in range(TRIALS):
            choice = solve(problem, budget)
            cost = self._tried(kind, self._recipe(measured, choice, partial=False)) - base
            name = "rise" if kind == "loss" else "changed"
            trials.append({"budget": budget, name: cost, "time_us": problem.time_of(choice)})
            tokens, unit = ("next", " nats") if self.model.num_steps is None else ("masked", "")
            said = f"perplexity {100 * math.expm1(cost):+.2f} %"
            said = said if kind == "loss" else f"{100 * cost:.2f} % of the {tokens} tokens change"
            self.progress.note(f"error budget {budget:.5f}{unit}: {said}")
            self.progress.advance()
            if cost <= target:
                if budget > low:
                    low, best = budget, choice
                if cost >= CLOSE * target:
                    break
            else:
                high = min(high, budget)
            guess = budget * (target * (1 + CLOSE) / 2 / max(cost, target / 8)) ** power
            inside = low < guess < high
            budget = guess if inside else (2 * low if high == math.inf else (low + high) / 2)
        return best, trials

    def _tried(self, kind: str, recipe: Recipe | None) -> float:
        """The model's loss with a recipe, or dense, or the share of next tokens that change; tried once."""
        if kind == "changed" and recipe is None:
            return 0.0
        key = "dense" if recipe is None else plans_hash(recipe.layers)
        key = key if kind == "loss" else f"changed {key}"
        known = self.folder.read_losses()
        if key not in known:
            attention = sdpa_layer
            if recipe is not None:
                attention = recipe_attention(recipe, self.model.phase, prompt_len=self.prompt_len)
            found = self.model.loss(attention) if kind == "loss" else self.model.changed(attention)
            if found is None:
                raise ValueError("search: this model predicts no tokens; use a budget of relative_error.")
            self.folder.write_loss(key, found)
            known = self.folder.read_losses()
        return known[key]

    # -- what the report shows ------------------------------------------------------------------------

    def _summary(
        self,
        rule: Budget | PaperRule,
        measured: Measured,
        problem: Problem,
        choice: np.ndarray,
        trials: list[dict[str, float]],
    ) -> dict[str, Any]:
        assert self.table is not None
        f = self.model.fingerprint
        rows = np.arange(len(choice))
        dense_choice = np.zeros_like(choice)
        layers = plans(measured, self.options, choice, phase=self.model.phase)
        item = 4 if self.dtype() == "float32" else 2
        copies = 0.0
        for n, p in enumerate(layers):
            own = slice(n * measured.heads, (n + 1) * measured.heads)
            moved = copies_us(
                p, self.table, num_kv_heads=f.num_kv_heads, length=self.model.length, head_dim=f.head_dim,
                item=item,
            )  # fmt: skip
            moved += extra_us(p, measured.calls[own], choice[own], f.num_kv_heads)
            copies += float(moved * measured.passes[own.start])
        spent = problem.error_of(choice)
        summary: dict[str, Any] = {
            "rule": {"name": type(rule).__name__, **asdict(rule)},
            "samples": self.model.num_samples,
            "length": self.model.length,
            "seed": self.seed,
            "table": {"device": self.table.device, "threads": self.table.threads, **self.table.made},
            "candidates": [{"label": c.label, **c.plain} for c in self.options],
            "choice": choice.tolist(),
            "layers": measured.layers,
            "phases": measured.phases,
            "schedule": None if self.model.num_steps is None else asdict(self.schedule),
            "heads": measured.heads,
            "error": spent,
            "density": measured.mean(measured.density[rows, choice]),
            "time_us": problem.time_of(choice) + copies,
            "copies_us": copies,
            "dense_time_us": problem.time_of(dense_choice),
            "relative_error": float(np.sqrt(measured.mean(measured.relative[rows, choice] ** 2))),
            "recall": measured.mean(measured.recall[rows, choice]),
            "recall_worst": float(measured.recall_worst[rows, choice].min()),
            "trials": trials,
            "losses": self.folder.read_losses(),
        }
        summary["pareto"], summary["greedy"] = pareto(problem, measured, spent) if self.curve else ([], [])
        return summary


def search(
    model: Model, rule: Budget | PaperRule, *, work: str | Path, jobs: Jobs | None = None, **options: Any
) -> Found:
    """Measure and choose. Ctrl-C gives a partial recipe of the layers that were measured by then.

    Args:
        model: what to search on.
        rule: a budget, or the paper's rule.
        work: folder for measurements; see `Search` for it and for `options`.
        jobs: measure in several processes; the recipe does not depend on how many.

    Raises:
        ValueError: a bad argument, or a model that cannot be searched. KeyboardInterrupt: before any layer
            was measured.
    """
    run = Search(model, work, **options)
    run.check_rule(rule)
    try:
        if jobs is not None and jobs.count > 1:
            shared = {k: v for k, v in options.items() if k not in ("resume", "progress", "closed_loop")}
            total = model.fingerprint.num_layers * model.num_samples * len(run.schedule.moments(0))
            jobs.measure(Path(work), shared, total, run.progress)
        run.measure()
        found = run.choose(rule)
    except KeyboardInterrupt:
        try:
            found = run.choose(rule, try_recipes=False)
        except ValueError:
            raise KeyboardInterrupt from None
        run.progress.note("interrupted: the recipe covers what was measured; go on with --resume")
        run.folder.write_summary(found.summary | {"interrupted": True})
        return found
    run.folder.write_summary(found.summary)
    run.folder.clean()
    return found
