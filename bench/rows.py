"""Rows from times: what a suite writes down of each provider on each case."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_attn.bench.cases import Case, SkipTo
from sparse_attn.bench.problem import Problem
from sparse_attn.bench.providers import OURS, Provider, passed_over
from sparse_attn.bench.timing import Times, paired_best_ratio, paired_ratio

Row = dict[str, Any]


@dataclass
class Entry:
    """One provider on one problem."""

    provider: Provider
    problem: Problem
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]

    @property
    def key(self) -> str:
        name = self.provider.name
        return name if self.provider.dense else f"{self.problem.case.name}/{name}"

    @property
    def is_ours(self) -> bool:
        """Ours on the case's own pattern (our dense baseline is a dense provider like any other)."""
        return self.provider in OURS

    @property
    def is_dense_time(self) -> bool:
        return self.provider.dense or (self.is_ours and self.problem.case.is_dense)


def make_rows(entries: list[Entry], times: dict[str, Times], step: str) -> list[Row]:
    """One row for each entry that was timed; ours also say how they compare with the others."""
    entries = [e for e in entries if e.key in times]
    dense = {e.key: times[e.key] for e in entries if e.is_dense_time}
    best = min(dense, key=lambda key: dense[key].median) if dense else None
    own_dense = [times[e.key] for e in entries if e.is_dense_time and e.provider.name.startswith("ours")]
    rows = []
    for entry in entries:
        mine, problem = times[entry.key], entry.problem
        row = one_row(problem.case, entry.provider.name, step, mine, problem.density)
        if entry.provider.dense:
            row["case"] = dense_name(problem.case)
        row["tflops"] = float(f"{problem.tflops(mine.median, backward=step == 'bwd'):.5g}")
        if best is not None and not entry.provider.dense:
            row["best_dense"] = best.split("/")[-1]
            row["sparse_efficiency"] = round(paired_ratio(dense[best], mine) * problem.density, 4)
        if entry.is_ours:
            if refused := passed_over(problem, entry.provider.name.removeprefix("ours-")):
                row["passed_over"] = refused
            others = [e for e in entries if e.provider.dense or e.problem is problem]
            row["speed_vs"] = {
                e.provider.name: round(paired_ratio(times[e.key], mine), 4) for e in others if e is not entry
            }
            row["tflops_vs"] = {
                e.provider.name: round(paired_ratio(times[e.key], mine) * problem.density, 4)
                for e in entries if e.is_dense_time and e is not entry
            }  # fmt: skip
            if own_dense:
                fastest = min(own_dense, key=lambda x: x.median)
                row["own_efficiency"] = round(paired_ratio(fastest, mine) * problem.density, 4)
            row |= _against_rivals(problem.case, mine, {e.provider.name: times[e.key] for e in others})
            if isinstance(problem.case.pattern, SkipTo) and problem.case.pattern.sparsity > 0:
                assert problem.plan.skip_below is not None
                row["ln_lambda"] = problem.plan.skip_below.flatten()[0].item()
        rows.append(row)
    return rows


def _against_rivals(case: Case, mine: Times, others: dict[str, Times]) -> Row:
    """The fastest rival of each round against ours, and which rivals were there."""
    if not case.rivals:
        return {}
    timed = [name for name in case.rivals if name in others]
    row: Row = {"rivals": {"timed": timed, "absent": [name for name in case.rivals if name not in timed]}}
    if timed:
        row["speed_vs_rivals"] = round(paired_best_ratio([others[name] for name in timed], mine), 4)
    return row


def dense_name(case: Case) -> str:
    """What rows of dense baselines have for a case: the shape."""
    edge = "causal" if case.is_causal else "full"
    return f"dense h{case.q_heads}/{case.kv_heads} s{case.length} d{case.head_dim} {case.dtype} {edge}"


def one_row(case: Case, provider: str, step: str, times: Times, density: float) -> Row:
    """The part that every row has."""
    return {
        "case": case.name,
        "provider": provider,
        "step": step,
        "ms": times.summary(),
        "rounds": len(times.rounds),
        **({"host_us": round(statistics.median(times.host_us), 1)} if times.host_us else {}),
        "density": round(density, 6),
        "shape": {
            "q_heads": case.q_heads, "kv_heads": case.kv_heads, "length": case.length,
            "head_dim": case.head_dim, "dtype": case.dtype, "is_causal": case.is_causal, "data": case.data,
        },
    }  # fmt: skip
