"""AnchorAttention: every query block reads the anchor (first blocks and neighbourhood) whole, and of all
other keys those that come near the anchor's best logit (arXiv 2505.23520).

The regions are those of the authors' first kernel, the ones for which the list runs over the *exact*
complement of the anchor; their later kernels count some keys twice and read others never.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.checks import check_inputs
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.anchor_regions import AnchorRegions
from sparse_attn.methods.anchor_select import select_columns
from sparse_attn.methods.base import Context, Method
from sparse_attn.plan import Plan

_OP = "anchor_attention"


@dataclass(frozen=True, eq=False)
class AnchorConfig:
    """What AnchorAttention needs to know; arguments as in `anchor_attention`.

    Raises:
        ValueError: a bad argument.
    """

    theta: float | str | Tensor = 12.0
    block_size: int = 128
    step: int = 16
    init_blocks: int = 1
    reference: str = "max"
    eps: float = 0.01
    share_kv_group: bool = False
    capacity: int | None = None
    local_blocks: int = 1
    samples: int | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        problems = _problems_of_theta(self.theta)
        least_of = {
            "block_size": 1,
            "step": 1,
            "init_blocks": 0,
            "capacity": 1,
            "local_blocks": 0,
            "samples": 1,
        }
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name} is {value}; it must be at least {least}")
        problems += _problems_of_rule(self.samples, self.reference, self.recall)
        if not 0 < self.eps < 1:
            problems.append(f"eps is {self.eps}; it must lie between 0 and 1")
        if problems:
            raise ValueError(f"{_OP}: {'; '.join(problems)}.")

    def regions(self, L: int, S: int) -> AnchorRegions:
        return AnchorRegions(L, S, self.block_size, self.step, self.init_blocks, self.local_blocks)


def _problems_of_rule(samples: int | None, reference: str, recall: float | None) -> list[str]:
    problems = []
    if reference not in ("max", "lse", "all"):
        problems.append(f"reference is {reference!r}; use 'max' or 'lse', or, with samples, 'all'")
    elif reference == "all" and samples is None:
        problems.append("reference='all' needs samples=4 or so: a mean query has no softmax of its own")
    if recall is not None:
        if not 0 < recall < 1:
            problems.append(f"recall is {recall}; it must lie between 0 and 1")
        if samples is None:
            problems.append("recall needs samples=4 or so, the queries that it is measured on")
    return problems


def _problems_of_theta(theta: Any) -> list[str]:
    if isinstance(theta, str):
        return [] if theta == "auto" else [f"theta is {theta!r}; use a number, a tensor or 'auto'"]
    if not isinstance(theta, Tensor):
        if isinstance(theta, bool) or not isinstance(theta, (int, float)):
            return [f"theta is {type(theta).__name__}; use a number, a float tensor or 'auto'"]
        return ["theta is NaN; pass a number"] if math.isnan(theta) else []
    if not theta.is_floating_point() or theta.dim() not in (1, 2):
        return [
            f"theta is a {theta.dtype} tensor of shape {tuple(theta.shape)}; it must be a float tensor "
            "[heads] or [batch, heads]"
        ]
    can_look = theta.device.type == "cpu" and not torch.compiler.is_compiling()
    return ["theta holds NaN; pass numbers"] if can_look and theta.isnan().any() else []


@dataclass(frozen=True, eq=False)
class AnchorStats:
    """How many single keys the identification kept.

    Attributes:
        kept: int64 [B, H'], entries of the column lists of a head (H' = Hq, or Hkv where a group shares).
        offered: keys outside the anchor, summed over the superblocks of a head.
    """

    kept: Tensor
    offered: int

    @property
    def ratio(self) -> Tensor:
        """float32 [B, H']: kept / offered; 0 where nothing was offered. The anchor is not in it:
        `layout.density(is_causal=True)` counts everything."""
        return self.kept / max(self.offered, 1)


def select(
    query: Tensor,
    key: Tensor,
    config: AnchorConfig,
    *,
    is_causal: bool,
    scale: float,
    context: Context | None = None,
) -> Plan:
    """Anchor blocks and identified columns as a layout.

    Raises:
        ValueError: not causal, or a theta tensor for other heads.
    """
    if not is_causal:
        raise ValueError(
            f"{_OP}: is_causal=False; the method is made for causal prefill (its anchor is what came "
            "before). Use sparsed_attention or vdit_attention for bidirectional models."
        )
    L, S = query.shape[2], key.shape[2]
    regions = config.regions(L, S)
    theta = _theta(config, query, regions)
    reference = config.reference if config.recall is None else "all"
    columns = select_columns(
        query, key, regions, theta, scale, reference, config.samples, config.recall, config.share_kv_group,
        config.capacity,
    )  # fmt: skip
    heads = columns.rows // (query.shape[0] * regions.num_superblocks)
    blocks, bounds = regions.block_list(query.shape[0] * heads, query.device)
    shape = (config.block_size, config.block_size, L, S, query.shape[0], heads)
    layout = SparseLayout(blocks, *shape, columns=columns)
    # Both follow from the regions; to search the lists for them would cost more than the selection.
    layout._cache["block_bounds", True] = bounds
    layout._cache["column_bounds", True] = _column_bounds(layout)
    return Plan(layout)


def _theta(config: AnchorConfig, query: Tensor, regions: AnchorRegions) -> Tensor | float:
    """Broadcastable to [B, Hq, Lb]."""
    theta = config.theta
    if isinstance(theta, str):
        # Each dropped key weighs at most exp(-theta) of the anchor, and `offered` keys can be dropped,
        # so that theta = ln(offered / eps) bounds the dropped mass by eps of the kept mass.
        offered = regions.offered_per_query_block(query.device).clamp(min=1)
        return torch.log(offered / config.eps)
    if not isinstance(theta, Tensor):
        return float(theta)
    if theta.shape[-1] != query.shape[1] or (theta.dim() == 2 and theta.shape[0] not in (1, query.shape[0])):
        raise ValueError(
            f"{_OP}: theta has shape {tuple(theta.shape)}; expected [{query.shape[1]}] or "
            f"[{query.shape[0]}, {query.shape[1]}] (batch, query heads)."
        )
    if theta.device != query.device:
        raise ValueError(f"{_OP}: theta is on {theta.device} but query is on {query.device}; move it there.")
    return theta[..., None]


def _column_bounds(layout: SparseLayout) -> Tensor:
    """int32 [rows, 2] as `SparseLayout.column_bounds`: columns end before a superblock begins, so that
    each of its queries sees all of them."""
    assert layout.columns is not None
    lengths = layout.columns.lengths.to(torch.int32).view(
        -1, layout.columns.rows // layout.batch // layout.heads
    )
    rows = lengths[:, :, None].expand(-1, -1, layout.columns.group).flatten(1)[:, : layout.num_query_blocks]
    return rows.reshape(-1, 1).expand(-1, 2).contiguous()


def anchor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    theta: float | str | Tensor = 12.0,
    block_size: int = 128,
    step: int = 16,
    init_blocks: int = 1,
    reference: str = "max",
    eps: float = 0.01,
    share_kv_group: bool = False,
    capacity: int | None = None,
    local_blocks: int = 1,
    samples: int | None = None,
    recall: float | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_stats: bool = False,
    engine: str | None = None,
) -> Any:
    """Causal prefill attention over an anchor and the stripes near it (AnchorAttention, arXiv 2505.23520).

    `step` blocks of `block_size` queries form a superblock. Its anchor is the first `init_blocks` key
    blocks, the `local_blocks` before the superblock, and the superblock itself up to the diagonal. With
    x_a(i) = max over the anchor of scale * q_i . k_j, a key j outside the anchor is read by the whole
    superblock if, for one of its query blocks::

        mean_i(x_a(i)) - scale * mean_i(q_i) . k_j <= theta

    With `samples` it is read if for one of the sampled queries i, each by itself,
    x_a(i) - scale * q_i . k_j <= theta (an extension; docs/methods_anchor.md has what it gains).
    Attention over anchor and stripes is then exact. theta = inf is dense attention, theta = -inf sink
    and neighbourhood alone. Any L and S; for L != S (a chunk of a prompt) superblocks count from the
    chunk's first query, and where S - L is no multiple of `block_size` the block "before" grows to
    whole key blocks.

    Args:
        query: [B, Hq, L, D] float16, bfloat16 or float32; strides free while the last is 1.
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv].
        theta: in units of scaled logits (natural log): a number, a float tensor [Hq] or [B, Hq], or
            "auto": ln(n / eps) for the n keys that a superblock is offered.
        block_size: queries pooled together, and keys in a block; default 128.
        step: query blocks that share a list; default 16.
        init_blocks: first key blocks that every query reads; default 1.
        reference: "max", or "lse": x_a is the anchor's log-sum-exp, which keeps fewer keys at equal
            theta; with `samples` also "all": the log-sum-exp of all keys that the query sees.
        eps: for theta="auto", the share of mass that dropped keys may hold; default 0.01.
        share_kv_group: the query heads of a key head share the union of their lists; default each
            has its own.
        capacity: entries set aside for all lists together, so that the host need not wait to learn
            their number (CUDA graphs). What does not fit is lost; `layout.check()` tells. Default: as
            many as are needed.
        local_blocks: key blocks before a superblock that its queries read whole; default 1.
        samples: how many queries of a block identify keys, each by itself; default None: their mean does.
        recall: with `samples`, instead of theta: the share of attention mass to keep. Each head's theta
            follows from what the lists of some sampled queries keep for the others.
        is_causal: must be True; query i sees keys j <= i + S - L, **bottom-right aligned**.
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the log-sum-exp, float32 [B, Hq, L].
        return_stats: also return `AnchorStats`.
        engine: insist on an engine for the attention: "triton", "cpu" or "reference".

    Returns:
        out [B, Hq, L, Dv]; with `return_lse` and `return_stats` a tuple (out, lse, stats), less what was
        not asked for.

    Raises:
        ValueError: a bad argument. NotImplementedError: no engine can run the call.

    Example:
        >>> out = anchor_attention(q, k, v, theta=12.0)
    """
    config = AnchorConfig(
        theta, block_size, step, init_blocks, reference, eps, share_kv_group, capacity, local_blocks,
        samples, recall,
    )  # fmt: skip
    check_inputs(_OP, query, key, value, enable_gqa, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    plan = select(query, key, config, is_causal=is_causal, scale=scale)
    result = attend(
        query, key, value, plan, is_causal=True, scale=scale, enable_gqa=enable_gqa, engine=engine, op=_OP
    )
    if not (return_lse or return_stats):
        return result.out
    parts: list[Any] = [result.out]
    if return_lse:
        parts.append(result.lse)
    if return_stats:
        parts.append(_stats(plan.layout, config.regions(query.shape[2], key.shape[2])))
    return tuple(parts)


def _stats(layout: SparseLayout, regions: AnchorRegions) -> AnchorStats:
    assert layout.columns is not None
    lengths = layout.columns.lengths.view(layout.batch, layout.heads, -1)
    return AnchorStats(lengths.sum(-1), regions.offered)


ANCHOR = Method("anchor", AnchorConfig, select, anchor_attention, causal=True, causal_only=True)
