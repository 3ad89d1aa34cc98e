"""From a case to tensors: q, k, v, the plan and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.bench.cases import ByMethod, Case, Columns, Full, Random, Skewed, SkipTo, Strided
from sparse_attn.bench.method_setup import method_inputs
from sparse_attn.layout import SparseLayout, visible_blocks
from sparse_attn.layout_stats import visible_pairs
from sparse_attn.methods import METHODS
from sparse_attn.plan import Plan


@dataclass(frozen=True, eq=False)
class Problem:
    """One case with its data.

    Attributes:
        q: [1, Hq, L, D]; k, v: [1, Hkv, L, D].
        plan: what the pattern or the method's selector picked.
        density: share of the visible pairs that is attended; of a plan with a skip rule, by the
            tiles that the engine kept.
        kept: uint8 [1, Hq, Lb, Sb] of a plan with a skip rule, else None.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    density: float
    kept: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def pairs(self) -> float:
        """Attended (query, key) pairs over all heads."""
        L = self.case.length
        return self.density * visible_pairs(L, L, self.case.is_causal) * self.case.q_heads

    def tflops(self, ms: float, *, backward: bool = False) -> float:
        """On the attended part: 4 D operations a pair, 2.5 times that backward."""
        return 4 * self.case.head_dim * self.pairs * (2.5 if backward else 1) / ms / 1e9

    def attend(self, engine: str | None = None, **options: Any) -> Attended:
        return attend(
            self.q, self.k, self.v, self.plan, is_causal=self.case.is_causal, enable_gqa=True,
            engine=engine, **options,
        )  # fmt: skip


def make_tensors(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a case: independent normal values, or structured q and k."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (1, heads, case.length, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    v = normal(case.kv_heads)
    if case.data == "normal":
        return normal(case.q_heads), normal(case.kv_heads), v
    return *_structured(case, device, dtype, seed), v


def _structured(case: Case, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    from sparse_attn.testing_data import structured_qk

    options: dict[str, Any] = {"kind": case.data, "seed": seed, "device": device, "dtype": dtype}
    if case.data == "video":
        options["grid"] = case.grid
    shape = (1, case.q_heads, case.length, case.head_dim)
    return structured_qk(*shape, kv_heads=case.kv_heads, **options)


def build(
    case: Case,
    device: str,
    *,
    engine: str | None = None,
    seed: int = 0,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Problem:
    """Make a case's tensors (or take those given) and its plan.

    Args:
        engine: which engine counts the tiles that a skip rule keeps; default: the one that is timed.
    """
    q, k, v = make_tensors(case, device, seed) if tensors is None else tensors
    by_votes = isinstance(case.pattern, SkipTo)
    plan = _skip_to(case, q, k, v, engine) if by_votes else select(case, q, k)
    if plan.skip_below is None:
        return Problem(case, q, k, v, plan, plan.layout.density(case.is_causal))
    kept = _kept(Problem(case, q, k, v, plan, 1.0), engine)
    layout = plan.layout
    seen = SparseLayout.from_dense_mask(
        kept.bool(), block_m=layout.block_m, block_n=layout.block_n, L=layout.L, S=layout.S
    )
    return Problem(case, q, k, v, plan, seen.density(case.is_causal), kept)


def _kept(problem: Problem, engine: str | None) -> Tensor:
    from sparse_attn.bench.providers import our_engine

    engine = engine or our_engine(problem, allow_reference=True)
    kept = problem.attend(engine, want_kept=True).kept
    assert kept is not None
    return kept


def select(case: Case, q: Tensor, k: Tensor) -> Plan:
    """The plan of a case's pattern, on the device of q."""
    pattern, L, device = case.pattern, case.length, q.device
    if isinstance(pattern, ByMethod):
        config, context = method_inputs(case)
        return METHODS[pattern.method].select(
            q, k, config, is_causal=case.is_causal, scale=case.head_dim**-0.5, context=context
        )
    if isinstance(pattern, Full):
        return Plan(SparseLayout.full(L, L, block_m=pattern.block_m, block_n=pattern.block_n, device=device))
    if isinstance(pattern, Random):
        scores = _random_scores(case, pattern.block_m, pattern.block_n, device)
        width = max(1, round(pattern.density * scores.shape[-1]))
        blocks = {"block_m": pattern.block_m, "block_n": pattern.block_n}
        return Plan(SparseLayout.top_k(scores, width, L=L, S=L, is_causal=case.is_causal, **blocks))
    if isinstance(pattern, Strided):
        return Plan(
            SparseLayout.strided(
                L, L, heads=case.q_heads, block=pattern.block, local_blocks=pattern.local_blocks,
                stride=pattern.stride, device=device,
            )
        )  # fmt: skip
    if isinstance(pattern, Columns):
        return Plan(_columns(case, pattern, device))
    assert isinstance(pattern, Skewed), f"{case.name}: {pattern} needs values and an engine, see `build`"
    return Plan(_skewed(case, pattern, device))


HALVINGS = 16  # of the interval of ln(lambda): to within 0.001


def _skip_to(case: Case, q: Tensor, k: Tensor, v: Tensor, engine: str | None) -> Plan:
    """Every tile, with the one lambda for all heads that skips the wanted share of the visible ones."""
    pattern, L = case.pattern, case.length
    assert isinstance(pattern, SkipTo)
    layout = SparseLayout.full(L, L, block_m=pattern.block_m, block_n=pattern.block_n, device=q.device)

    def plan(log_lambda: float) -> Plan:
        return Plan(layout, torch.full((1, case.q_heads), log_lambda, device=q.device))

    if pattern.sparsity == 0:
        return plan(pattern.least_log_lambda)
    seen = case.q_heads
    if case.is_causal:
        seen *= int(visible_blocks(L, L, pattern.block_m, pattern.block_n, q.device).sum())
    else:
        seen *= layout.num_query_blocks * layout.num_key_blocks
    low, high = max(-64.0, pattern.least_log_lambda), 8.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        kept = _kept(Problem(case, q, k, v, plan(middle), 1.0), engine)
        skipped = 1 - int(kept.sum(dtype=torch.int64)) / seen
        low, high = (middle, high) if skipped < pattern.sparsity else (low, middle)
    return plan(high)


def _columns(case: Case, pattern: Columns, device: torch.device) -> SparseLayout:
    L, block, group = case.length, pattern.block, pattern.queries // pattern.block
    last = (torch.arange(ceil(L / pattern.queries), device=device) + 1) * pattern.queries
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, case.q_heads, last.numel(), L)
    columns = torch.rand(shape, generator=generator, device=device) < pattern.share
    if case.is_causal:
        columns &= torch.arange(L, device=device) < last[:, None]
    blocks = torch.zeros(1, 1, ceil(L / block), ceil(L / block), dtype=torch.bool, device=device)
    return SparseLayout.from_dense_mask(
        blocks, block_m=block, block_n=block, L=L, S=L, columns=columns, column_group=group
    )


def _random_scores(case: Case, block_m: int, block_n: int, device: torch.device) -> Tensor:
    shape = (1, case.q_heads, ceil(case.length / block_m), ceil(case.length / block_n))
    generator = torch.Generator(device).manual_seed(1)
    return torch.rand(shape, generator=generator, device=device)


def _skewed(case: Case, pattern: Skewed, device: torch.device) -> SparseLayout:
    L, block = case.length, pattern.block
    mask = _random_scores(case, block, block, device) < pattern.share
    row = torch.arange(mask.shape[-2], device=device)[:, None]
    column = torch.arange(mask.shape[-1], device=device)
    mask |= (column == 0) | (row - column < pattern.local_blocks)
    mask &= visible_blocks(L, L, block, block, device)
    return SparseLayout.from_dense_mask(mask, block_m=block, block_n=block, L=L, S=L)
