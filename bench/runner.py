"""Runs cases: gate, build, check at full size, time everybody in turn, make rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from sparse_attn.bench.cases import ByMethod, Case
from sparse_attn.bench.gate import GateError, agrees, check_small, check_spots
from sparse_attn.bench.method_setup import method_inputs
from sparse_attn.bench.problem import Problem, build, make_tensors, select
from sparse_attn.bench.providers import OURS, PROVIDERS, Provider, our_engine, why_no_engine
from sparse_attn.bench.rows import Entry, Row, make_rows, one_row
from sparse_attn.bench.timing import Times, measure, paired_ratio
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS
from sparse_attn.plan import Plan

METHOD_STEPS = ("select", "attend", "total")  # of a method: alone, alone, and its whole call

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
    """What a suite found: rows for the JSONL, wrong results, what was left out and why, and why nothing
    more could be measured."""

    rows: list[Row] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    lost: str | None = None

    def leave_out(self, what: str, reason: str, log: Log) -> None:
        if reason not in self.absent.values():  # the table at the end has them all
            log(f"  without {what}: {reason}")
        self.absent[what] = reason


class DeviceLost(RuntimeError):
    """The GPU answers no more: nothing after an illegal access in the same process can be believed."""


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
            if outcome.lost is not None:
                raise DeviceLost(outcome.lost)
            _run_group(members, options, outcome)
        except torch.OutOfMemoryError as error:
            outcome.leave_out(names, f"out of memory: {str(error).splitlines()[0]}", log)
        except DeviceLost as error:
            outcome.lost = str(error)
            outcome.leave_out(names, outcome.lost, log)
            continue
        options.on_rows(outcome.rows[num_rows:])
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        log(f"{names}: {time.perf_counter() - begun:.1f} s")
    return outcome


def _tensor_key(case: Case) -> tuple:
    shape = (case.q_heads, case.kv_heads, case.length, case.head_dim, case.dtype)
    return (*shape, case.is_causal, case.data, case.grid, case.backward, case.group)


def _run_group(cases: list[Case], options: Options, outcome: Outcome) -> None:
    device, log = options.device, options.log
    tensors = make_tensors(cases[0], device)
    entries: list[Entry] = []
    for case in cases:
        found = _ours(case, tensors, options, outcome)
        if found is not None:
            entries += [found, *_peers(found, outcome, {e.key for e in entries}, log)]
    if not any(e.is_ours for e in entries):
        return
    _ensure_dense_of_ours(entries, options, outcome)
    rounds = min(case.rounds for case in cases)

    def drop(key: str, error: Exception) -> None:
        _dropped(key, error, outcome, log)

    timed = partial(measure, device=device, drop=drop)
    outcome.rows += make_rows(entries, timed(_forward_runs(entries), rounds=rounds), "fwd")
    for entry in entries:
        if isinstance(entry.problem.case.pattern, ByMethod) and entry.is_ours:
            dense = [e for e in entries if e.is_dense_time and e.key not in outcome.absent]
            outcome.rows += _method_rows(entry, dense, partial(timed, rounds=rounds))
    if cases[0].backward:
        runs = _backward_runs([e for e in entries if e.provider.has_backward], outcome, log)
        outcome.rows += make_rows(entries, timed(runs, rounds=max(rounds // 2, 3)), "bwd")


def _dropped(key: str, error: Exception, outcome: Outcome, log: Log) -> None:
    """A run that had worked raised while it was timed."""
    reason = _reason(error)
    if key in METHOD_STEPS or key.split("/")[-1].startswith("ours"):
        outcome.red.append(f"{key}: {reason}")
        log(f"RED {key}: {reason}")
    else:
        outcome.leave_out(key, reason, log)


def _reason(error: Exception) -> str:
    """One line of an exception.

    Raises:
        DeviceLost: the GPU does not work any more.
    """
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0][:200]}"
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        raise DeviceLost(f"the GPU was lost to {reason}") from error
    return reason


def _ours(
    case: Case, tensors: tuple[Tensor, Tensor, Tensor], options: Options, outcome: Outcome
) -> Entry | None:
    """Our entry of a case once both gates are green."""
    try:
        problem = build(case, options.device, tensors=tensors, engine=options.engine)
        engine = our_engine(problem, options.engine, allow_reference=options.allow_reference)
        if engine is None:
            outcome.leave_out(case.name, f"no engine to time ({why_no_engine(problem)})", options.log)
            return None
        check_small(case, engine, options.device)
        provider = PROVIDERS[f"ours-{engine}"]
        entry = Entry(provider, problem, provider.make(problem))
        check_spots(problem, entry.forward(*tensors), provider.name)
        return entry
    except NotImplementedError as error:
        outcome.leave_out(case.name, str(error).splitlines()[0], options.log)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a wrong result, or a crash: either way the case is red, the others go on
        text = str(error) if isinstance(error, GateError) else f"{case.name}: {_reason(error)}"
        outcome.red.append(text)
        options.log(f"RED {text}")
    return None


def _peers(ours: Entry, outcome: Outcome, have: set[str], log: Log) -> list[Entry]:
    """The peers that run this problem and agree with us on what it computes."""
    problem, found = ours.problem, []
    case, dense_problem = problem.case, _dense(problem)
    tensors = (problem.q, problem.k, problem.v)
    dense_out = None
    everyone = () if case.rivals else tuple(n for n, p in PROVIDERS.items() if p not in OURS)
    for name in dict.fromkeys((*case.peers, *case.rivals)) or everyone:
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


def _try_peer(provider: Provider, problem: Problem, want: Tensor) -> tuple[Entry | None, str | None]:
    """The peer's entry, or the reason why it is left out. Compiles what it compiles."""
    try:
        entry = Entry(provider, problem, provider.make(problem))
        reason = agrees(entry.forward(problem.q, problem.k, problem.v), want)
    except Exception as error:  # another project's code: any failure of it is a reason
        reason = _reason(error)
    return (entry, None) if reason is None else (None, reason)


def _dense(problem: Problem) -> Problem:
    """The same tensors with every block: what a dense provider computes."""
    case, L = problem.case, problem.case.length
    if case.is_dense:
        return problem
    layout = SparseLayout.full(L, L, device=problem.q.device)
    return Problem(case, problem.q, problem.k, problem.v, Plan(layout), 1.0)


def _ensure_dense_of_ours(entries: list[Entry], options: Options, outcome: Outcome) -> None:
    """Our own dense time counts among the dense baselines even where no case of the group is dense: that
    of the first engine that can, which may not be the one that runs the case."""
    if any(e.is_ours and e.is_dense_time for e in entries):
        return
    first = next(e for e in entries if e.is_ours)
    problem = _dense(first.problem)
    engine = our_engine(problem, options.engine, allow_reference=options.allow_reference)
    fastest = PROVIDERS[f"ours-{engine}"] if engine else first.provider
    for provider in dict.fromkeys((fastest, first.provider)):
        dense = Provider(f"{provider.name}-dense", True, lambda _: None, provider.make)
        want = first.provider.make(problem)(problem.q, problem.k, problem.v)
        entry, reason = _try_peer(dense, problem, want)
        if entry is not None:
            entries.append(entry)
            return
        outcome.red.append(f"{dense.name} beside {first.key}: {reason}")


def _forward_runs(entries: list[Entry]) -> dict[str, Callable[[], object]]:
    def bind(entry: Entry) -> Callable[[], object]:
        tensors = (entry.problem.q, entry.problem.k, entry.problem.v)
        return lambda: entry.forward(*tensors)

    return {entry.key: bind(entry) for entry in entries}


def _backward_runs(entries: list[Entry], outcome: Outcome, log: Log) -> dict[str, Callable[[], object]]:
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


# -- methods --------------------------------------------------------------------------------------


def _method_rows(entry: Entry, dense: list[Entry], timed: Callable[..., dict[str, Times]]) -> list[Row]:
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
    times = timed(runs | _forward_runs(dense))
    steps = [step for step in runs if step in times]
    rows = [one_row(case, entry.provider.name, step, times[step], problem.density) for step in steps]
    dense = [e for e in dense if e.key in times]
    if "total" not in times or not dense:
        return rows
    best = min(dense, key=lambda e: times[e.key].median)
    total = rows[-1]
    total["best_dense"] = best.provider.name
    total["sparse_efficiency"] = round(paired_ratio(times[best.key], times["total"]) * problem.density, 4)
    total["speed_vs"] = {e.provider.name: round(paired_ratio(times[e.key], times["total"]), 4) for e in dense}
    total["tflops_vs"] = {name: round(gain * problem.density, 4) for name, gain in total["speed_vs"].items()}
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
