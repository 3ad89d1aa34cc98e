"""Correct first: nothing is reported of an engine that does not give the right answer.

Two checks. At a small size the whole result (out, lse, kept tiles and, where timed, gradients) is held
against float64 masked attention by the rule of `sparse_attn.testing`. At full size, where a dense
mask would not fit, random query blocks are: their rows are computed exactly from the layout alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn.bench.cases import ByMethod, Case
from sparse_attn.bench.problem import Problem, build
from sparse_attn.testing import check_engine, error_report, masked_attention

# The full-size check computes this many query blocks exactly: at least SPOTS, more where they are cheap.
SPOTS, SPOT_SCORES = 6, 1 << 24

# What makes a method keep everything, which must then give dense attention.
KEEP_EVERYTHING = {"anchor": {"theta": float("inf")}, "blasst": {"threshold": 0.0}}


class GateError(RuntimeError):
    """An engine gives a wrong result; the text says where."""


def check_small(case: Case, engine: str, device: str) -> None:
    """Hold an engine against float64 on a short version of the case, and the case's method, where it
    has such a limit, against dense attention at "keep everything".

    Raises:
        GateError: it differs.
    """
    small = case.resized(case.gate_length)
    _check_engine(small, engine, device)
    pattern = case.pattern
    if isinstance(pattern, ByMethod) and pattern.method in KEEP_EVERYTHING:
        limit = {**pattern.config, **KEEP_EVERYTHING[pattern.method]}
        dense = replace(small, pattern=ByMethod(pattern.method, limit), backward=False)
        problem = _check_engine(dense, engine, device)
        if abs(problem.density - 1) > 1e-9:
            raise GateError(f"{case.name}: {limit} reads only {problem.density:.6f} of the visible pairs.")


def _check_engine(case: Case, engine: str, device: str) -> Problem:
    problem = build(case, device, engine=engine, seed=7)
    try:
        check_engine(
            problem.q, problem.k, problem.v, problem.plan, engine=engine, is_causal=case.is_causal,
            grad=case.backward,
        )  # fmt: skip
    except AssertionError as error:
        raise GateError(f"{case.name} on {engine} at length {case.length}: {error}") from error
    return problem


def check_spots(problem: Problem, out: Tensor, name: str) -> None:
    """Hold random query blocks of a full-size result against exact attention over their keys.

    Args:
        out: [1, Hq, L, D].

    Raises:
        GateError: a block differs.
    """
    case, layout = problem.case, problem.plan.layout
    group = case.q_heads // case.kv_heads
    generator = torch.Generator().manual_seed(3)
    parts: list[tuple[Tensor, ...]] = []
    rows_of: list[tuple[int, int]] = []  # head and query of each row that is compared
    total = case.q_heads * layout.num_query_blocks
    count = max(SPOTS, SPOT_SCORES // (layout.block_m * layout.S))
    for spot in torch.randperm(total, generator=generator)[:count].tolist():
        head, block = divmod(spot, layout.num_query_blocks)
        rows = slice(block * layout.block_m, min((block + 1) * layout.block_m, layout.L))
        mask = attended_keys(problem, head, block)[None, None]
        q = problem.q[:, head, None, rows]
        k, v = (x[:, head // group, None] for x in (problem.k, problem.v))
        exact, plain = (
            masked_attention(q, k, v, mask, scale=problem.scale, dtype=dtype)[0]
            for dtype in (torch.float64, q.dtype)
        )
        parts.append((out[:, head, None, rows], exact, plain))
        rows_of += [(head, query) for query in range(rows.start, rows.stop)]
    # One verdict over all spots: the rule measures the largest error by the largest of plain PyTorch.
    report = error_report(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))
    if not report.ok:
        head, query = rows_of[report.where[2]]
        raise GateError(f"{case.name} by {name}, head {head}, query {query}: {report}")


def attended_keys(problem: Problem, head: int, block: int) -> Tensor:
    """bool [m, S]: the keys of one query block of one head, read off the index lists."""
    layout, case = problem.plan.layout, problem.case
    h = 0 if layout.heads == 1 else head * layout.heads // case.q_heads
    row = h * layout.num_query_blocks + block
    tiles = torch.zeros(layout.num_key_blocks, dtype=torch.bool, device=layout.device)
    if problem.kept is not None:
        tiles = problem.kept[0, head, block].bool()
    else:
        tiles[layout.blocks.indices[_row(layout.blocks.offsets, row)].long()] = True
    keys = torch.arange(layout.S, device=layout.device)
    attended = tiles[keys // layout.block_n]
    if layout.columns is not None:
        per_head = -(-layout.num_query_blocks // layout.columns.group)
        row = h * per_head + block // layout.columns.group
        attended[layout.columns.indices[_row(layout.columns.offsets, row)].long()] = True
    first, last = block * layout.block_m, min((block + 1) * layout.block_m, layout.L)
    attended = attended.expand(last - first, -1)
    if not case.is_causal:
        return attended
    queries = torch.arange(first, last, device=layout.device)[:, None]
    return attended & (keys <= queries + layout.S - layout.L)


def _row(offsets: Tensor, row: int) -> slice:
    return slice(int(offsets[row]), int(offsets[row + 1]))


def agrees(got: Tensor, want: Tensor) -> str | None:
    """Whether a peer computes the same thing as ours: None, or by how much it differs.

    A sample of heads; relative Frobenius norm, at most 2 % (16-bit rounding alone gives under 1 %).
    """
    heads = range(0, got.shape[1], max(1, got.shape[1] // 4))
    worst = 0.0
    for head in heads:
        a, b = got[:, head].float(), want[:, head].float()
        worst = max(worst, ((a - b).norm() / b.norm()).item())
    return None if worst <= 0.02 else f"its output differs from ours by {worst:.3f} (relative)"
