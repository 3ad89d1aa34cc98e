"""The search: measure every candidate on every head of a model, then choose.

    model = LanguageModel(loaded, ids)
    found = search(model, Budget(perplexity=0.01), work="llama.search")
    found.recipe.save("llama.recipe.json")

One pass over each calibration sample visits the layers in order; at each, all candidates run on the very
queries, keys and values of the dense model, one layer in memory at a time. The choice then is a knapsack
(`solve.py`), and where the model has a loss, the error budget is set by trying recipes on it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_attn.engines import ENGINES
from sparse_attn.layout_stats import visible_pairs
from sparse_attn.recipe import Recipe
from sparse_attn.search.candidates import Candidate, Shape, default_candidates, distinct
from sparse_attn.search.capture import query_runs, sdpa
from sparse_attn.search.cost import CostTable, select_key, shipped_table
from sparse_attn.search.cost_measure import one_thread, select_us
from sparse_attn.search.jobs import Jobs
from sparse_attn.search.maps import attention_map, pattern_map, save_maps
from sparse_attn.search.measure import Call, add_scores, dense, run_candidate, score
from sparse_attn.search.models import Model
from sparse_attn.search.outcome import pareto, plans_hash, recipe_attention, sdpa_layer
from sparse_attn.search.predict import Measured, collect, copies_us, extra_us, plans
from sparse_attn.search.rules import Budget, PaperRule, Progress, Silent
from sparse_attn.search.solve import Problem, paper_greedy, solve
from sparse_attn.search.work import WorkFolder

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
class Search:
    """One search, step by step; `search` runs it.

    Args:
        model: see `models.Model`.
        work: folder for measurements.
        candidates: default: `default_candidates` for the model's shape. The first must be dense.
        table: default: the one that ships for the model's device.
        num_queries: queries of a sample to measure (`query_runs`); default all.
        seed: of the tokens drawn for the divergence.
        resume: go on with an earlier search in `work`.
        is_causal: whether the model's attention is.
        video: see `Shape`.
        prompt_len: tokens before the generated ones, for SparseD.
        closed_loop: choose layers in order, each measured behind the chosen ones (`closed.py`).
        curve: also solve for the report's curve of time against error.
        part: (rank, size): measure only the layers n with n % size == rank (`jobs.py`).
    """

    model: Model
    work: str | Path
    candidates: Sequence[Candidate] | None = None
    table: CostTable | None = None
    num_queries: int | None = None
    seed: int = 0
    resume: bool = False
    is_causal: bool = True
    video: tuple[int, int, int, int, bool] | None = None
    prompt_len: int = 0
    closed_loop: bool = False
    curve: bool = True
    part: tuple[int, int] = (0, 1)
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        f = self.model.fingerprint
        shape = Shape(
            self.model.length, f.num_heads, f.num_kv_heads, f.head_dim, self.is_causal, self.video,
            self.model.device.type,
        )  # fmt: skip
        given = default_candidates(shape) if self.candidates is None else self.candidates
        self.options = distinct([*default_candidates(shape, []), *given])
        self.table = shipped_table(self.model.device.type) if self.table is None else self.table
        manifest = {
            "model": asdict(f),
            "calibration_hash": self.model.calibration_hash,
            "candidates": [{"label": c.label, **c.plain} for c in self.options],
            "num_queries": self.num_queries,
            "seed": self.seed,
            "prompt_len": self.prompt_len,
            "engines": [name for name, engine in ENGINES.items() if not engine.why_off()],
        }
        self.folder = WorkFolder(self.work, manifest, resume=self.resume)

    # -- measuring ----------------------------------------------------------------------------------

    def measure(self) -> None:
        """All that is not measured yet. May be interrupted anywhere."""
        layers, samples = self.model.fingerprint.num_layers, self.model.num_samples
        missing = {s: self._missing(s) for s in range(samples)}
        for sample in (s for s in range(samples) if missing[s]):
            self._gradients(sample, missing[sample])
            self.progress.stage(f"measuring sample {sample + 1} of {samples}", layers)
            attention = partial(self._measuring, sample, max(missing[sample]))
            with contextlib.suppress(_Enough):
                self.model.run(sample, attention)
            left = self._missing(sample)
            if left:
                raise ValueError(
                    f"search: layers {left[:8]} of the model made no self-attention call that a search "
                    "can see (a sliding window, a mask, their own attention code?)."
                )

    def _is_mine(self, layer: int) -> bool:
        rank, size = self.part
        return layer % size == rank

    def _missing(self, sample: int) -> list[int]:
        """Layers of this search's part that the sample has not measured."""
        layers = range(self.model.fingerprint.num_layers)
        return [n for n in layers if self._is_mine(n) and not self.folder.has_measure(sample, n)]

    def measure_first_layer(self) -> None:
        """For an estimate of the time."""
        with contextlib.suppress(_Enough):
            self.model.run(0, partial(self._measuring, 0, 0))

    def _gradients(self, sample: int, missing: list[int]) -> None:
        if all(self.folder.read_gradient(sample, layer) is not None for layer in missing):
            return
        self.progress.stage(f"gradients of sample {sample + 1}", self.model.fingerprint.num_layers)

        def keep(layer: int, gradient: Tensor) -> None:
            if layer in missing:
                self.folder.write_gradient(sample, layer, gradient)
            self.progress.advance()

        self.model.gradients(sample, keep, self.seed)

    def _measuring(
        self,
        sample: int,
        last: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        """The attention function of a measuring pass: dense, and everything else on the side."""
        if self._is_mine(layer) and not self.folder.has_measure(sample, layer):
            self._measure_call(sample, q, k, v, layer=layer, is_causal=is_causal, scale=scale)
        self.progress.advance()
        if layer >= last:
            raise _Enough
        return sdpa(q, k, v, is_causal=is_causal, scale=scale)

    def _measure_call(
        self, sample: int, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> None:
        gradient = self.folder.read_gradient(sample, layer)
        gradient = None if gradient is None else gradient.to(q.device)
        self._measure_layer(sample, Call(layer, q, k, v, is_causal, scale, gradient, self.prompt_len))
        self.folder.drop_gradient(sample, layer)

    def _measure_layer(self, sample: int, call: Call) -> None:
        if sample == 0 and call.layer == 0:
            self._time_selections(call)
        runs = query_runs(call, self.num_queries)
        references = [dense(run) for run in runs]
        scores, patterns = [], []
        for candidate in self.options:
            parts = []
            for run, reference in zip(runs, references, strict=True):
                plan, result = run_candidate(run, candidate)
                parts.append(score(run, reference, plan, result))
            scores.append(add_scores(parts))
            if sample == 0:
                patterns.append(pattern_map(plan, result, call.q.shape[1]))
        if sample == 0:
            truth = attention_map(runs[-1], references[-1])
            save_maps(self.folder.map_path(call.layer), {"truth": truth, "kept": np.stack(patterns)})
        B, L, S = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        measure = {
            "head_dim": call.q.shape[-1],
            "dtype": str(call.q.dtype).removeprefix("torch."),
            "length": S,
            "batch": B,
            "share": scores[0]["visible"][0] / (B * visible_pairs(L, S, call.is_causal)),
            "has_gradient": call.grad is not None,
            "scores": scores,
        }
        self.folder.write_measure(sample, call.layer, measure)

    def _time_selections(self, call: Call) -> None:
        """Selections that the table does not know are timed once, and kept: a resumed search must not see
        other numbers."""
        assert self.table is not None
        if self.folder.read_select_us():
            return
        kinds = {select_key(c.method, c.config): c for c in self.options}
        unknown = {
            key: c
            for key, c in kinds.items()
            if self.table.select_us(key, call.q.shape[-1], call.k.shape[2]) is None
        }
        with one_thread(call.q.device.type):
            self.folder.write_select_us(select_us(unknown, call, rounds=3))

    def measured(self, layers: Sequence[int] | None = None) -> Measured:
        """What has been measured so far, as arrays: of these layers, by default of all.

        Raises:
            ValueError: nothing has.
        """
        assert self.table is not None
        f = self.model.fingerprint
        found = self.folder.layers(self.model.num_samples, f.num_layers)
        found = {n: samples for n, samples in found.items() if layers is None or n in layers}
        if not found:
            raise ValueError("search: no layer has been measured yet.")
        measures = {n: [self.folder.read_measure(s, n) for s in samples] for n, samples in found.items()}
        threads = torch.get_num_threads() if self.table.device_type == "cpu" else self.table.threads
        return collect(measures, self.options, self.table, self.folder.read_select_us(), num_threads=threads)

    # -- choosing -----------------------------------------------------------------------------------

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
            weight = "head" if rule.relative_error is not None else "divergence"
            if weight == "divergence" and not has_harm:
                raise ValueError("search: this model gives no gradients; use a budget of relative_error.")
            choice, trials = self._within(rule, measured, weight, try_recipes)
        whole = len(measured.layers) == self.model.fingerprint.num_layers
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
        return Recipe(self.model.fingerprint, tuple(layers), self.model.calibration_hash, partial=partial)

    def _within(
        self, rule: Budget, measured: Measured, weight: str, try_recipes: bool
    ) -> tuple[np.ndarray, list[dict[str, float]]]:
        problem = measured.problem(weight)
        if rule.perplexity is None and rule.agreement is None:
            budget = rule.divergence if rule.relative_error is None else rule.relative_error**2
            assert budget is not None
            return solve(problem, budget), []
        share = len(measured.layers) / self.model.fingerprint.num_layers
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
            said = f"perplexity {100 * math.expm1(cost):+.2f} %"
            said = said if kind == "loss" else f"{100 * cost:.2f} % of the next tokens change"
            self.progress.note(f"error budget {budget:.5f} nats: {said}")
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
            attention = sdpa_layer if recipe is None else recipe_attention(recipe, self.model.phase)
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
        item = 4 if self.folder_dtype() == "float32" else 2
        copies = sum(
            copies_us(
                p, self.table, num_kv_heads=f.num_kv_heads, length=self.model.length, head_dim=f.head_dim,
                item=item,
            )
            + extra_us(p, measured, choice, f.num_kv_heads)
            for p in layers
        )  # fmt: skip
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
            "heads": measured.heads,
            "error": spent,
            "density": float(measured.density[rows, choice].mean()),
            "time_us": problem.time_of(choice) + copies,
            "copies_us": copies,
            "dense_time_us": problem.time_of(dense_choice),
            "relative_error": float(np.sqrt((measured.relative[rows, choice] ** 2).mean())),
            "recall": float(measured.recall[rows, choice].mean()),
            "recall_worst": float(measured.recall_worst[rows, choice].min()),
            "trials": trials,
            "losses": self.folder.read_losses(),
        }
        summary["pareto"], summary["greedy"] = pareto(problem, measured, spent) if self.curve else ([], [])
        return summary

    def folder_dtype(self) -> str:
        layer, samples = next(
            iter(self.folder.layers(self.model.num_samples, self.model.fingerprint.num_layers).items())
        )
        return self.folder.read_measure(samples[0], layer)["dtype"]


class _Enough(Exception):
    """Ends a pass after the last layer that was to be measured."""


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
    if run.closed_loop and isinstance(rule, PaperRule):
        raise ValueError(
            "search: the closed loop shares a budget out among the layers; the paper's rule has none."
        )
    try:
        if jobs is not None and jobs.count > 1:
            shared = {k: v for k, v in options.items() if k not in ("resume", "progress", "closed_loop")}
            total = model.fingerprint.num_layers * model.num_samples
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
