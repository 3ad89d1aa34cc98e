"""The cases of the suites under pytest-benchmark: `pytest bench`.

Short by default, so that a change of speed shows in seconds on any machine. Environment:
SPARSE_ATTN_BENCH_LENGTH (tokens, default 512) and SPARSE_ATTN_BENCH_HEADS (key heads, default 2).
Every result is checked before it is timed.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from sparse_attn.bench.cases import ByMethod, Case
from sparse_attn.bench.gate import check_spots
from sparse_attn.bench.problem import Problem, build
from sparse_attn.bench.providers import PROVIDERS, Provider
from sparse_attn.bench.runner import whole_call
from sparse_attn.bench.suites import CASES, method_cases

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = int(os.environ.get("SPARSE_ATTN_BENCH_LENGTH", "512"))
HEADS = int(os.environ.get("SPARSE_ATTN_BENCH_HEADS", "2"))
SUITE = "triton" if DEVICE == "cuda" else "cpu"


def _cases() -> list[Case]:
    """The suite's cases whose pattern is not a method's, shortened."""
    plain = [case for case in CASES[SUITE] if not isinstance(case.pattern, ByMethod)]
    return [case.resized(LENGTH, HEADS) for case in plain]


def _make(case: Case, provider: Provider, backward: bool = False) -> Problem:
    problem = build(replace(case, backward=backward), DEVICE)
    reason = provider.why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    return problem


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p != "ours-reference"])
@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
def test_forward(benchmark, case: Case, provider: str) -> None:
    chosen = PROVIDERS[provider]
    problem = _make(case, chosen)
    forward, tensors = chosen.make(problem), (problem.q, problem.k, problem.v)
    out = forward(*tensors)
    if not chosen.dense or case.is_dense:
        check_spots(problem, out, provider)
    benchmark.extra_info |= {"density": problem.density, "device": DEVICE}
    benchmark(_synchronised, lambda: forward(*tensors))


@pytest.mark.parametrize("case", [c for c in _cases() if not c.is_dense][:2], ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ["ours-triton", "ours-cpu"])
def test_backward(benchmark, case: Case, provider: str) -> None:
    problem = _make(case, PROVIDERS[provider], backward=True)
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = PROVIDERS[provider].make(problem)(*leaves)
    check_spots(problem, out.detach(), provider)
    grad = torch.randn_like(out)
    benchmark(_synchronised, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


@pytest.mark.parametrize(
    "case", method_cases(LENGTH, 2 * HEADS, DEVICE == "cuda"), ids=lambda case: case.name
)
def test_method_with_selection(benchmark, case: Case) -> None:
    provider = PROVIDERS[f"ours-{'triton' if DEVICE == 'cuda' else 'cpu'}"]
    problem = _make(case, provider)
    engine = provider.name.removeprefix("ours-")
    benchmark.extra_info |= {"density": problem.density, "device": DEVICE}
    benchmark(_synchronised, lambda: whole_call(problem, engine))


def _synchronised(call) -> None:
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
