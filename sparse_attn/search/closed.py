"""The closed loop: layers are solved in order, each measured with the patterns of earlier ones switched in.

An open search measures every layer on what the dense model gives it. Here one pass over a sample does this at
each layer: measure all candidates on the queries, keys and values that the chosen patterns let through;
solve the layer and those after it (as they were measured on the dense model) within what is left of the error
budget; keep the layer's choice; go on with its output. Errors are of the layer's own attention, against dense
attention of the same inputs; their weights, the gradients, are the dense model's.

Several samples take turns: a pass ends at the first layer that the others have not measured yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from sparse_attn.recipe_plan import LayerPlan
from sparse_attn.recipe_run import run_layer
from sparse_attn.search.measure import Call
from sparse_attn.search.measuring import Enough
from sparse_attn.search.phases import Moment
from sparse_attn.search.predict import Measured, plans
from sparse_attn.search.rules import Budget
from sparse_attn.search.run import CLOSE, Search
from sparse_attn.search.solve import Problem, solve

ROUNDS = 2  # closed passes for one budget of perplexity or agreement

# The arrays of `Measured` that a layer brings.
_ARRAYS = ("time", "relative", "mse", "harm", "density", "recall", "recall_worst")


@dataclass(eq=False)
class ClosedLoop(Search):
    """One closed pass; its measurements lie in a folder of their own, so that it resumes as a search does.

    Attributes:
        known: what the open search measured; layers are replaced as they are measured anew.
        choice: candidate of every head; that of layers not in `chosen` is provisional.
        chosen: layer -> its plan.
    """

    weight: str = "divergence"
    budget: float = 0.0
    known: Measured = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice = np.zeros(len(self.known.time), dtype=np.int64)
        self.chosen: dict[int, LayerPlan] = {}

    def solve_in_order(self) -> tuple[Measured, np.ndarray]:
        """All layers. May be interrupted anywhere: what is measured is not measured again."""
        layers, samples = self.model.fingerprint.num_layers, range(self.model.num_samples)
        for sample in samples:
            if missing := self._missing(sample):
                self._gradients(sample, [layer for _, layer in missing])
        self.progress.stage("closed loop", layers)
        while len(self.chosen) < layers:
            for sample in samples:
                with contextlib.suppress(Enough):
                    self.model.run(sample, partial(self._measuring, sample, layers - 1))
        self.folder.clean()
        return self.known, self.choice

    def _measuring(  # type: ignore[override]
        self, sample: int, last: int, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """The attention function of a closed pass: every layer runs what was chosen for it."""
        if layer not in self.chosen:
            if not self.folder.has_measure(Moment(sample), layer):
                gradient = self._gradient(sample, layer, q.device)
                call = Call(layer, q, k, v, is_causal, scale, gradient, self.prompt_len)
                self._measure_call(Moment(sample), call)
            if not all(self.folder.has_measure(Moment(s), layer) for s in range(self.model.num_samples)):
                raise Enough
            self._choose(layer)
            self.progress.advance()
        if layer >= last:
            raise Enough
        out = run_layer(self.chosen[layer], q, k, v, is_causal=is_causal, scale=scale)
        assert isinstance(out, Tensor)
        return out

    def _choose(self, layer: int) -> None:
        """Solve this layer and the later ones within what the earlier ones left."""
        own = self.measured([layer])
        rows = slice(layer * own.heads, (layer + 1) * own.heads)
        arrays = {name: getattr(self.known, name).copy() for name in _ARRAYS}
        for name in _ARRAYS:
            arrays[name][rows] = getattr(own, name)
        self.known = replace(self.known, **arrays)
        problem = self.known.problem(self.weight)
        first = rows.start
        spent = problem.error[np.arange(first), self.choice[:first]].sum()
        parts = (problem.time, problem.error, problem.layer, problem.calls)
        rest = Problem(*(x[first:] for x in parts))
        self.choice[first:] = solve(rest, max(self.budget - spent, 0.0))
        made = plans(self.known, self.options, self.choice, phase=self.model.phase)
        self.chosen[layer] = made[layer]


def closed_pass(
    search: Search, measured: Measured, weight: str, budget: float
) -> tuple[Measured, np.ndarray]:
    """Solve all layers in order within an error budget.

    Args:
        search: an open search that has measured every layer; `measured`: what it gives.

    Returns:
        What the layers were measured to do behind the chosen ones, and the choice.
    """
    problem = measured.problem(weight)
    content = [np.float64(budget), problem.time, problem.error, problem.calls[0]]
    key = hashlib.sha256(b"".join(x.tobytes() for x in content)).hexdigest()[:12]
    loop = ClosedLoop(
        search.model, search.folder.path / "closed" / key, search.options, search.table, search.num_queries,
        search.seed, resume=True, is_causal=search.is_causal, video=search.video,
        prompt_len=search.prompt_len, progress=search.progress, weight=weight, budget=budget, known=measured,
    )  # fmt: skip
    loop.folder.write_select_us(search.folder.read_select_us())
    return loop.solve_in_order()


def close(
    search: Search, rule: Budget, measured: Measured, weight: str, choice: np.ndarray
) -> tuple[Measured, np.ndarray, list[dict[str, Any]]]:
    """The closed loop's recipe in place of the open one's.

    A budget of error or divergence takes one pass. One of perplexity or agreement begins with the error that
    the open recipe makes, corrects it at most `ROUNDS` - 1 times by what the model says, and takes the
    fastest recipe that keeps the budget, the open one among them.

    Args:
        choice: of the open search, which keeps the budget.

    Returns:
        What was measured for the recipe, the recipe's choice, and the passes: budget, time_us, and the cost.
    """
    given = rule.divergence if rule.relative_error is None else rule.relative_error**2
    if given is not None:
        after, closed = closed_pass(search, measured, weight, given)
        return after, closed, [{"budget": given, "time_us": after.problem(weight).time_of(closed)}]
    kind = "changed" if rule.perplexity is None else "loss"
    target = 1 - (rule.agreement or 0) if rule.perplexity is None else math.log1p(rule.perplexity)
    budget = measured.problem(weight).error_of(choice)
    if budget == 0:  # no recipe that was tried keeps the budget
        return measured, choice, []
    base, power = search._tried(kind, None), 2 if kind == "changed" else 1
    best = (measured.problem(weight).time_of(choice), measured, choice)
    passes: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        after, closed = closed_pass(search, measured, weight, budget)
        time = after.problem(weight).time_of(closed)
        cost = search._tried(kind, search._recipe(after, closed, partial=False)) - base
        passes.append({"budget": budget, "time_us": time, "rise" if kind == "loss" else "changed": cost})
        search.progress.note(f"closed loop, error budget {budget:.5f}: {100 * cost:+.2f} % ({kind})")
        if cost <= target and time < best[0]:
            best = (time, after, closed)
        if CLOSE * target <= cost <= target:
            break
        budget *= (target * (1 + CLOSE) / 2 / max(cost, target / 8)) ** power
    return best[1], best[2], passes
