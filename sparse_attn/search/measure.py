"""What each candidate does to one layer: its error, its recall and its work, head by head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.layout import SparseLayout
from sparse_attn.layout_stats import attended_pairs, visible_pairs
from sparse_attn.methods.base import Context
from sparse_attn.plan import Plan
from sparse_attn.recipe_check import DenseConfig
from sparse_attn.search.candidates import Candidate

WORST = 0.01  # of the rows of a head

# The numbers kept of a head under a candidate; lists with one entry a head. All but the recalls are sums,
# so that samples add up.
SUMS = ("error", "norm", "harm", "count", "queries", "pairs", "visible", "visited", "kept", "columns")
Scores = dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a model.

    Attributes:
        layer: number, from 0.
        q: [B, Hq, L, D]; k: [B, Hkv, S, D]; v: [B, Hkv, S, Dv].
        is_causal: query i sees keys j <= i + S - L.
        scale: multiplies q.k.
        grad: [B, Hq, L, Dv] gradient of the log-likelihood by this layer's attention output, or None.
        prompt_len: tokens before the generated ones, where a method wants to know.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool
    scale: float
    grad: Tensor | None = None
    prompt_len: int | None = None


def select(call: Call, candidate: Candidate) -> Plan:
    """The pattern of these very queries and keys, whatever the step."""
    context = Context(layer=call.layer, prompt_len=call.prompt_len)
    with warnings.catch_warnings():
        # S2 warns where one layer's heads do not cover the context; a recipe mixes methods anyway.
        warnings.simplefilter("ignore")
        return candidate.info.select(
            call.q, call.k, candidate.config, is_causal=call.is_causal, scale=call.scale, context=context
        )


def run_candidate(call: Call, candidate: Candidate, plan: Plan | None = None) -> tuple[Plan, Attended]:
    """Select, attend and finish, as `methods.base.run` does, keeping the plan.

    Args:
        plan: found earlier; default: `select` it.
    """
    info = candidate.info
    plan = select(call, candidate) if plan is None else plan
    result = attend(
        call.q, call.k, call.v, plan, is_causal=call.is_causal, scale=call.scale, enable_gqa=True,
        want_kept=plan.skip_below is not None, op=f"search: {candidate.label}",
    )  # fmt: skip
    if info.finish is not None:
        out = info.finish(result.out, call.v, candidate.config)
        result = Attended(out, result.lse, result.kept)
    return plan, result


def dense(call: Call) -> Attended:
    """The reference of all errors: full attention on the same engine as the candidates."""
    return run_candidate(call, Candidate("dense", "dense", DenseConfig()))[1]


def score(call: Call, reference: Attended, plan: Plan, result: Attended) -> Scores:
    """The numbers of one candidate, each a list with one entry a query head.

    Returns:
        error: sum of |out - dense|^2; norm: sum of |dense|^2; count, queries: numbers and queries
            in the sums.
        harm: with `call.grad` g: the sum over the queries of (g . (out - dense))^2 / 2, the second-order
            estimate of the Kullback-Leibler divergence, in nats, that this head's error alone gives the
            model's predictions (diagonal Fisher information); without, 0.
        recall: mean over the queries of exp(lse - dense lse), the share of the attention mass that was
            attended; recall_worst: what all but the worst 1 % of the queries exceed.
        pairs, visible: attended (query, key) pairs, and those of dense attention.
        visited, kept: tiles listed and visible, and those of them that were not skipped.
        columns: (query block, single key) entries.
        block_m, block_n, skips: the tile, and whether there is a skip rule.
    """
    difference = result.out.float() - reference.out.float()
    sizes = difference.square().sum((0, 2, 3), dtype=torch.float64)
    scores: dict[str, Tensor] = {
        "error": sizes,
        "norm": reference.out.float().square().sum((0, 2, 3), dtype=torch.float64),
        "count": torch.full_like(sizes, difference[:, 0].numel()),
        "queries": torch.full_like(sizes, difference.shape[0] * difference.shape[2]),
        "harm": torch.zeros_like(sizes),
    }
    if call.grad is not None:
        change = torch.einsum("bhld,bhld->bhl", difference, call.grad.float())
        scores["harm"] = change.square().sum((0, 2), dtype=torch.float64) / 2
    recall = torch.exp(result.lse - reference.lse).nan_to_num(1.0).transpose(0, 1).flatten(1)
    scores["recall"] = recall.double().mean(1)
    worst = max(int(recall.shape[1] * WORST), 1)
    scores["recall_worst"] = recall.kthvalue(worst, dim=1).values
    heads = call.q.shape[1]
    batch = call.q.shape[0]
    scores |= {name: _by_head(x, heads) * batch for name, x in work(call, plan, result).items()}
    layout, ones = plan.layout, torch.ones_like(sizes)
    tile = {"block_m": layout.block_m, "block_n": layout.block_n, "skips": int(plan.skip_below is not None)}
    scores |= {name: ones * x for name, x in tile.items()}
    visible = visible_pairs(call.q.shape[2], call.k.shape[2], call.is_causal)
    scores["visible"] = torch.full_like(sizes, batch * visible)
    return {name: x.tolist() for name, x in scores.items()}


def work(call: Call, plan: Plan, result: Attended) -> dict[str, Tensor]:
    """How much a plan made the engine do: float64 [B', H'] by name, see `score`."""
    layout = plan.layout
    visible = layout.block_bounds(call.is_causal)[:, 1].view(layout.batch, layout.heads, -1)
    visited = visible.sum(-1).double()
    numbers = {"visited": visited, "kept": visited, "columns": torch.zeros_like(visited)}
    numbers["pairs"] = attended_pairs(attended_layout(plan, result), call.is_causal)
    if result.kept is not None:
        numbers["kept"] = result.kept.sum((-1, -2)).double()
    if layout.columns is not None:
        seen = layout.column_bounds(call.is_causal)[:, 1].view(layout.batch, layout.heads, -1)
        numbers["columns"] = seen.sum(-1).double()
    return numbers


def attended_layout(plan: Plan, result: Attended) -> SparseLayout:
    """The plan's layout less the tiles that its skip rule dropped (without columns, which it never drops)."""
    layout = plan.layout
    if plan.skip_below is None or result.kept is None or layout.columns is not None:
        return layout
    return SparseLayout.from_dense_mask(
        result.kept.bool(), block_m=layout.block_m, block_n=layout.block_n, L=layout.L, S=layout.S
    )


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B', H'] -> [heads]: the mean over the batch; a shared row counts for each of its heads."""
    x = x.double().mean(0)
    return x if x.numel() == heads else x.repeat_interleave(heads // x.numel())


def add_scores(parts: list[Scores]) -> Scores:
    """Several samples as one: sums are added, the mean recall averaged, the worst recall the worst."""
    if len(parts) == 1:
        return parts[0]
    total: dict[str, Any] = {}
    for name in parts[0]:
        rows = torch.tensor([part[name] for part in parts], dtype=torch.float64)
        if name in SUMS:
            total[name] = rows.sum(0).tolist()
        else:
            total[name] = (rows.mean(0) if name == "recall" else rows.min(0).values).tolist()
    return total
