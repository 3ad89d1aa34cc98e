"""Runs cases: gate, build, check at full size, time everybody in turn, make rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sparse_attn.bench.cases import ByMethod, Case
from sparse_attn.bench.gate import GateError, agrees, check_small, check_spots
from sparse_attn.bench.method_setup import method_inputs
from sparse_attn.bench.problem import Problem, build, make_tensors, select
from sparse_attn.bench.providers import OURS, PROVIDERS, Provider, our_engine, why_no_engine
from sparse_attn.bench.timing import Times, measure, paired_ratio
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS
from sparse_attn.plan import Plan

Row = dict[str, Any]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        device: "cpu" or "cuda".
        engine: insist on one of our engines.
        allow_reference: time the reference engine where no other runs the case.
        budget_s: cases that would start later than this are left out, and listed as such.
        log: gets a line now and then.
        on_rows: gets the rows of each group as soon as they are measured.
    """

    device: str
    engine: str | None = None
    allow_reference: bool = False
    budget_s: float | None = None
    log: Log = print
    on_rows: Callable[[list[Row]], None] = lambda rows: None


@dataclass
class Outcome:
    """What a suite found: rows for the JSONL, wrong results, and what was left out and why."""

    rows: list[Row] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def leave_out(self, what: str, reason: str, log: Log) -> None:
        if reason not in self.absent.values():  # the table at the end has them all
            log(f"  without {what}: {reason}")
        self.absent[what] = reason


def run_cases(cases: Iterable[Case], options: Options) -> Outcome:
    """Measure cases in order; neighbours of one shape share tensors, baselines and rounds.

    A case whose gate is red gives no row of ours, and is listed in `Outcome.red`.
    """
    outcome, start, log = Outcome(), time.perf_counter(), options.log
    for _, group in groupby(cases, key=_tensor_key):
        members = list(group)
        names = ", ".join(case.name for case in members)
        begun = time.perf_counter()
        if options.budget_s is not None and begun - start > options.budget_s:
            outcome.leave_out(names, f"not started: the suite's {options.budget_s:.0f} s were used up", log)
            continue
        num_rows = len(outcome.rows)
        try:
            _run_group(members, options, outcome)
        except torch.OutOfMemoryError as error:
            outcome.leave_out(names, f"out of memory: {str(error).splitlines()[0]}", log)
        options.on_rows(outcome.rows[num_rows:])
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        log(f"{names}: {time.perf_counter() - begun:.1f} s")
    return outcome


def _tensor_key(case: Case) -> tuple:
    shape = (case.q_heads, case.kv_heads, case.length, case.head_dim, case.dtype)
    return (*shape, case.is_causal, case.data, case.grid, case.backward)


@dataclass
class _Entry:
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


def _run_group(cases: list[Case], options: Options, outcome: Outcome) -> None:
    device, log = options.device, options.log
    tensors = make_tensors(cases[0], device)
    entries: list[_Entry] = []
    for case in cases:
        found = _ours(case, tensors, options, outcome)
        if found is not None:
            entries += [found, *_peers(found, outcome, {e.key for e in entries}, log)]
    if not any(e.is_ours for e in entries):
        return
    _ensure_dense_of_ours(entries)
    rounds = min(case.rounds for case in cases)
    outcome.rows += _rows(entries, measure(_forward_runs(entries), device, rounds=rounds), "fwd")
    for entry in entries:
        if isinstance(entry.problem.case.pattern, ByMethod) and entry.is_ours:
            outcome.rows += _method_rows(entry, [e for e in entries if e.is_dense_time], device, rounds)
    if cases[0].backward:
        runs = _backward_runs([e for e in entries if e.provider.has_backward], outcome, log)
        able = [e for e in entries if e.key in runs]
        outcome.rows += _rows(able, measure(runs, device, rounds=max(rounds // 2, 3)), "bwd")


def _ours(
    case: Case, tensors: tuple[Tensor, Tensor, Tensor], options: Options, outcome: Outcome
) -> _Entry | None:
    """Our entry of a case once both gates are green."""
    try:
        problem = build(case, options.device, tensors=tensors, engine=options.engine)
        engine = our_engine(problem, options.engine, allow_reference=options.allow_reference)
        if engine is None:
            outcome.leave_out(case.name, f"no engine to time ({why_no_engine(problem)})", options.log)
            return None
        check_small(case, engine, options.device)
        provider = PROVIDERS[f"ours-{engine}"]
        entry = _Entry(provider, problem, provider.make(problem))
        check_spots(problem, entry.forward(*tensors), provider.name)
        return entry
    except NotImplementedError as error:
        outcome.leave_out(case.name, str(error).splitlines()[0], options.log)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a wrong result, or a crash: either way the case is red, the others go on
        text = str(error) if isinstance(error, GateError) else f"{case.name}: {type(error).__name__}: {error}"
        outcome.red.append(text)
        options.log(f"RED {text}")
    return None


def _peers(ours: _Entry, outcome: Outcome, have: set[str], log: Log) -> list[_Entry]:
    """The peers that run this problem and agree with us on what it computes."""
    problem, found = ours.problem, []
    case, dense_problem = problem.case, _dense(problem)
    tensors = (problem.q, problem.k, problem.v)
    dense_out = None
    for name in case.peers or (n for n, p in PROVIDERS.items() if p not in OURS):
        provider = PROVIDERS[name]
        target = dense_problem if provider.dense else problem
        if provider.dense and name in have:
            continue
        reason = provider.why_not(target)
        if reason is None:
            if provider.dense and dense_out is None:
                dense_out = ours.provider.make(dense_problem)(*tensors)
            want = dense_out if provider.dense else ours.forward(*tensors)
            assert want is not None
            entry, reason = _try_peer(provider, target, want)
            found += [entry] if entry is not None else []
        if reason is not None:
            outcome.leave_out(f"{name} in {case.name}", reason, log)
    return found


def _try_peer(provider: Provider, problem: Problem, want: Tensor) -> tuple[_Entry | None, str | None]:
    """The peer's entry, or the reason why it is left out. Compiles what it compiles."""
    try:
        entry = _Entry(provider, problem, provider.make(problem))
        reason = agrees(entry.forward(problem.q, problem.k, problem.v), want)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # another project's code: any failure of it is a reason
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:200]}"
    return (entry, None) if reason is None else (None, reason)


def _dense(problem: Problem) -> Problem:
    """The same tensors with every block: what a dense provider computes."""
    case, L = problem.case, problem.case.length
    if case.is_dense:
        return problem
    layout = SparseLayout.full(L, L, device=problem.q.device)
    return Problem(case, problem.q, problem.k, problem.v, Plan(layout), 1.0)


def _ensure_dense_of_ours(entries: list[_Entry]) -> None:
    """Our own dense time counts among the dense baselines even where no case of the group is dense."""
    if any(e.is_ours and e.is_dense_time for e in entries):
        return
    first = next(e for e in entries if e.is_ours)
    problem = _dense(first.problem)
    dense = Provider(f"{first.provider.name}-dense", True, lambda _: None, first.provider.make)
    entries.append(_Entry(dense, problem, first.provider.make(problem)))


def _forward_runs(entries: list[_Entry]) -> dict[str, Callable[[], object]]:
    def bind(entry: _Entry) -> Callable[[], object]:
        tensors = (entry.problem.q, entry.problem.k, entry.problem.v)
        return lambda: entry.forward(*tensors)

    return {entry.key: bind(entry) for entry in entries}


def _backward_runs(entries: list[_Entry], outcome: Outcome, log: Log) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {}
    for entry in entries:
        leaves = [x.detach().requires_grad_() for x in (entry.problem.q, entry.problem.k, entry.problem.v)]
        try:
            out = entry.forward(*leaves)
            grad = torch.randn_like(out)
            torch.autograd.grad(out, leaves, grad, retain_graph=True)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0][:200]
            what = f"backward of {entry.provider.name} in {entry.problem.case.name}"
            outcome.leave_out(what, f"{entry.provider.name} backward: {reason}", log)
            continue
        runs[entry.key] = _grad_run(out, leaves, grad)
    return runs


def _grad_run(out: Tensor, leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


# -- rows -----------------------------------------------------------------------------------------


def _rows(entries: list[_Entry], times: dict[str, Times], step: str) -> list[Row]:
    dense = {e.key: times[e.key] for e in entries if e.is_dense_time}
    best = min(dense, key=lambda key: dense[key].median) if dense else None
    rows = []
    for entry in entries:
        mine, problem = times[entry.key], entry.problem
        row = _row(problem.case, entry.provider.name, step, mine, problem.density)
        if entry.provider.dense:
            row["case"] = _dense_name(problem.case)
        row["tflops"] = float(f"{problem.tflops(mine.median, backward=step == 'bwd'):.5g}")
        if best is not None and not entry.provider.dense:
            row["best_dense"] = best.split("/")[-1]
            row["sparse_efficiency"] = round(paired_ratio(dense[best], mine) * problem.density, 4)
        if entry.is_ours:
            others = [e for e in entries if e.provider.dense or e.problem is problem]
            row["speed_vs"] = {
                e.provider.name: round(paired_ratio(times[e.key], mine), 4) for e in others if e is not entry
            }
        rows.append(row)
    return rows


def _dense_name(case: Case) -> str:
    edge = "causal" if case.is_causal else "full"
    return f"dense h{case.q_heads}/{case.kv_heads} s{case.length} d{case.head_dim} {case.dtype} {edge}"


def _row(case: Case, provider: str, step: str, times: Times, density: float) -> Row:
    return {
        "case": case.name,
        "provider": provider,
        "step": step,
        "ms": times.summary(),
        "rounds": len(times.rounds),
        "density": round(density, 6),
        "shape": {
            "q_heads": case.q_heads, "kv_heads": case.kv_heads, "length": case.length,
            "head_dim": case.head_dim, "dtype": case.dtype, "is_causal": case.is_causal, "data": case.data,
        },
    }  # fmt: skip


def _method_rows(entry: _Entry, dense: list[_Entry], device: str, rounds: int) -> list[Row]:
    """Selection, attention and the whole call apart, in one set of rounds with the dense baselines; with
    the whole call, what the method loses against dense attention of the same engine."""
    problem, case = entry.problem, entry.problem.case
    engine = entry.provider.name.removeprefix("ours-")
    tensors = (problem.q, problem.k, problem.v)
    runs: dict[str, Callable[[], object]] = {
        "select": lambda: select(case, problem.q, problem.k),
        "attend": lambda: entry.forward(*tensors),
        "total": lambda: whole_call(problem, engine),
    }
    steps = list(runs)
    times = measure(runs | _forward_runs(dense), device, rounds=rounds)
    rows = [_row(case, entry.provider.name, step, times[step], problem.density) for step in steps]
    best = min(dense, key=lambda e: times[e.key].median)
    total = rows[-1]
    total["best_dense"] = best.provider.name
    total["sparse_efficiency"] = round(paired_ratio(times[best.key], times["total"]) * problem.density, 4)
    total["speed_vs"] = {e.provider.name: round(paired_ratio(times[e.key], times["total"]), 4) for e in dense}
    return [*rows[:-1], total | quality(problem, engine)]


def whole_call(problem: Problem, engine: str) -> Tensor:
    """Check, select, attend and finish, as the method's operator does."""
    from sparse_attn.methods.base import run

    case = problem.case
    assert isinstance(case.pattern, ByMethod)
    config, context = method_inputs(case)
    return run(
        METHODS[case.pattern.method], problem.q, problem.k, problem.v, config, is_causal=case.is_causal,
        enable_gqa=True, engine=engine, context=context,
    ).out  # fmt: skip


def quality(problem: Problem, engine: str) -> Row:
    """Mass recall exp(lse - dense lse), mean and worst hundredth of the rows, and the output's error
    relative to dense attention (Frobenius norms)."""
    sparse, dense = problem.attend(engine), _dense(problem).attend(engine)
    recall = (sparse.lse - dense.lse).double().exp().flatten()
    worst = recall.kthvalue(max(1, recall.numel() // 100)).values
    error = (sparse.out - dense.out).float().norm() / dense.out.float().norm()
    return {
        "mass_recall": {"mean": round(recall.mean().item(), 5), "p1": round(worst.item(), 5)},
        "output_error": round(error.item(), 5),
    }
