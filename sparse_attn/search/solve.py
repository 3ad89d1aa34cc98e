"""Choosing a candidate for every head: least time under one error budget for the whole model.

A multiple-choice knapsack: each head takes one candidate, times and errors add up over heads and layers.
What makes it more than a sum is that heads of a layer with the same settings share a call, so that each
(layer, candidate) in use costs a call once. SciPy's branch and bound (HiGHS) solves it to a thousandth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_attn.search.cost import paper_loss

GAP = 1e-3  # relative distance to the optimum at which the solver may stop


@dataclass(frozen=True, eq=False)
class Problem:
    """Heads by candidates.

    Attributes:
        time: float64 [heads, candidates], microseconds.
        error: float64 [heads, candidates], at least 0; those of a choice are added up.
        layer: int [heads].
        call_us: float64 [candidates], or [heads, candidates] where layers differ: microseconds of one more
            call.
    """

    time: np.ndarray
    error: np.ndarray
    layer: np.ndarray
    call_us: np.ndarray

    @property
    def calls(self) -> np.ndarray:
        """`call_us` as [heads, candidates]."""
        return np.broadcast_to(self.call_us, self.time.shape)

    def time_of(self, choice: np.ndarray) -> float:
        """Microseconds of a choice, calls included."""
        pairs, first = np.unique(np.stack([self.layer, choice]), axis=1, return_index=True)
        return float(self.time[np.arange(len(choice)), choice].sum() + self.calls[first, pairs[1]].sum())

    def error_of(self, choice: np.ndarray) -> float:
        return float(self.error[np.arange(len(choice)), choice].sum())


def solve(problem: Problem, budget: float) -> np.ndarray:
    """The cheapest choice whose errors add up to at most `budget`.

    Returns:
        int64 [heads], candidate numbers.

    Raises:
        ValueError: scipy is missing, or no choice meets the budget.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise ValueError("search: the solver needs scipy; pip install scipy") from None
    least = problem.error.min(1).sum()
    if least > budget:
        raise ValueError(f"search: no choice has an error of at most {budget:g}; the least is {least:g}.")
    heads, candidates = np.nonzero(_useful(problem, budget))
    layers = problem.layer[heads]
    pairs, first, pair_of = np.unique(
        np.stack([layers, candidates]), axis=1, return_index=True, return_inverse=True
    )
    n, g = len(heads), pairs.shape[1]
    pair_of = pair_of.reshape(-1)
    unit = max(problem.time.max(), 1e-12)
    cost = np.concatenate([problem.time[heads, candidates], problem.calls[heads[first], pairs[1]]]) / unit
    rows = np.arange(n)
    one_each = csr_array((np.ones(n), (heads, rows)), shape=(problem.time.shape[0], n + g))
    scale = max(budget, 1e-300)
    total = csr_array((problem.error[heads, candidates] / scale, (np.zeros(n, int), rows)), shape=(1, n + g))
    # x <= y: a head's choice opens the call of its layer and candidate.
    opens = csr_array(
        (np.concatenate([np.ones(n), -np.ones(n)]), (np.tile(rows, 2), np.concatenate([rows, n + pair_of]))),
        shape=(n, n + g),
    )
    found = milp(
        cost,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(total, -np.inf, 1 - 1e-9),
            LinearConstraint(opens, -np.inf, 0),
        ],
        integrality=np.concatenate([np.ones(n), np.zeros(g)]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise ValueError(f"search: the solver gave up: {found.message}")
    choice = np.zeros(problem.time.shape[0], dtype=np.int64)
    taken = found.x[:n] > 0.5
    choice[heads[taken]] = candidates[taken]
    return choice


def _useful(problem: Problem, budget: float) -> np.ndarray:
    """bool [heads, candidates]: false where another candidate is at least as good in both, even if it has
    to open a call of its own; or where the error alone exceeds the budget."""
    time, error = problem.time, problem.error
    better_time = (time + problem.calls)[:, :, None] <= time[:, None, :]  # [heads, by, which]
    better_error = error[:, :, None] <= error[:, None, :]
    same = (time[:, :, None] == time[:, None, :]) & (error[:, :, None] == error[:, None, :])
    first = np.arange(time.shape[1])[:, None] < np.arange(time.shape[1])[None]
    beaten = (better_time & better_error & (~same | first)).any(1)
    useful = ~beaten & (error <= budget)
    useful[np.arange(len(time)), error.argmin(1)] = True
    return useful


def paper_greedy(
    mse: np.ndarray, density: np.ndarray, *, penalty: float, epsilon: float, full: int = 0
) -> np.ndarray:
    """The paper's rule, head by head: the candidate of least L_i = MSE + penalty * (1 - S_i), or full
    attention where every L_i is above epsilon (Sparse-vDiT, section 4.2).

    Args:
        mse, density: float64 [heads, candidates]; column `full` is full attention, not one of the modes.

    Returns:
        int64 [heads].
    """
    loss = paper_loss(mse, density, penalty)
    loss[:, full] = np.inf
    choice = loss.argmin(1)
    return np.where(loss.min(1) > epsilon, full, choice)


def greedy_at_error(
    problem: Problem, mse: np.ndarray, density: np.ndarray, budget: float, *, penalty: float, full: int = 0
) -> np.ndarray:
    """The paper's rule with the epsilon that makes it fastest at an error of at most `budget`.

    The rule's choice for a head does not depend on epsilon, only whether the head is full does: every
    epsilon worth trying is one head's least loss.
    """
    loss = paper_loss(mse, density, penalty)
    loss[:, full] = np.inf
    best = np.full(len(loss), full)
    for epsilon in np.sort(loss.min(1)):
        choice = paper_greedy(mse, density, penalty=penalty, epsilon=float(epsilon), full=full)
        if problem.error_of(choice) <= budget and problem.time_of(choice) < problem.time_of(best):
            best = choice
    return best
