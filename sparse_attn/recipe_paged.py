"""Run a layer of a recipe over pages: one call for each group of heads, of all sequences together.

Letters as in `varlen`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from sparse_attn.methods.base import Context
from sparse_attn.methods.blasst import full_layout
from sparse_attn.recipe_check import DenseConfig, methods
from sparse_attn.recipe_plan import LayerPlan
from sparse_attn.recipe_run import _calls, _heads
from sparse_attn.varlen import Each
from sparse_attn.varlen_batch import DENSE_BLOCK, PagedCall, attend_paged
from sparse_attn.varlen_checks import Lengths, check_paged, first

_OP = "run_layer_paged"


def run_layer_paged(
    plan: LayerPlan,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Lengths,
    block_table: Tensor,
    seqused_k: Lengths,
    is_causal: bool,
    scale: float | None = None,
    engine: str | None = None,
    head_offset: int | None = None,
    trust_table: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one layer over pages, every head by its own method. Inference only.

    Equivalent to `run_layer` on each sequence's keys. Key heads of a group that chooses by shape alone (S2,
    dense) are read where one of the group's heads needs them.

    Args:
        plan: from `Recipe.plan_for`; its methods need no cache of layouts.
        query: [T, Hq, D] float16, bfloat16 or float32, the last stride 1.
        k_cache: [num_pages, page_size, Hkv, D]; v_cache: [num_pages, page_size, Hkv, Dv].
        cu_seqlens_q: [N + 1]; block_table: int [N, max_pages]; seqused_k: [N]; trust_table: default False:
            as `sparse_attention_paged` takes them.
        is_causal: query i of a sequence sees its keys j <= i + S - L.
        scale: multiplies q.k; default D ** -0.5.
        engine: insist on an engine by name.
        head_offset: tensor parallelism, as in `run_layer`.
        out: [T, Hq, Dv] in the query's dtype: write the result there. Default: a new tensor.

    Returns:
        out [T, Hq, Dv].

    Raises:
        ValueError: a bad argument, or other heads than the plan's. NotImplementedError: no engine can run a
            call, or an input requires grad.
    """
    whole = check_paged(
        _OP, query, k_cache, v_cache, cu_seqlens_q, block_table, seqused_k, True, scale, trust_table, out
    )
    query = whole.query
    calls, _ = _calls(plan, query, first(k_cache).transpose(1, 2), head_offset)
    group = query.shape[1] // k_cache.shape[2]
    if out is None:
        out = query.new_empty(*query.shape[:2], v_cache.shape[3])
    for own in calls:
        each = _each(own.method, own.config, whole, plan.layer, is_causal, scale, engine)
        target = out[:, own.q_pick] if isinstance(own.q_pick, slice) else None
        part = replace(whole, query=_heads(query, own.q_pick), out=target)
        kv_heads = sorted({head // group for head in own.heads})
        result, _ = attend_paged(each, _with_key_heads(part, kv_heads))
        if isinstance(own.q_pick, Tensor):
            out.index_copy_(1, own.q_pick, result)
        elif target is None:
            for n, head in enumerate(own.heads):
                out[:, head] = result[:, n]
    return out


def _each(
    method: str,
    config: Any,
    call: PagedCall,
    layer: int,
    is_causal: bool,
    scale: float | None,
    engine: str | None,
) -> Each:
    """How the sequences of one group of heads are attended."""
    count = len(call.q_lens)
    if isinstance(config, DenseConfig):
        size, device = config.block_size, call.query.device
        every = None if size == DENSE_BLOCK else lambda L, S: full_layout(L, S, size, size, device)
        return Each(_OP, count, None, None, every, None, None, is_causal, scale, True, engine, {})
    context = Context(layer=layer)
    return Each(
        _OP, count, methods()[method], config, None, None, context, is_causal, scale, True, engine, {}
    )


def _with_key_heads(call: PagedCall, heads: list[int]) -> PagedCall:
    """The call on some key heads; those that lie side by side are a view of the caches."""
    if heads != list(range(heads[0], heads[-1] + 1)):
        return replace(call, kv_heads=heads)
    k_cache, v_cache = (x[:, :, heads[0] : heads[-1] + 1] for x in call.caches)
    return replace(call, caches=(k_cache, v_cache))
