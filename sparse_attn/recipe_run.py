"""Run a layer whose heads have different settings: one call a group, on that group's heads alone.

Every head gives what it would give if the whole layer ran its setting: S2's shards follow a head's number
in the layer, not in its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn.checks import check_inputs
from sparse_attn.engines import new_out
from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context, run
from sparse_attn.methods.per_head import join_heads
from sparse_attn.methods.s2 import S2Config
from sparse_attn.methods.vdit import VDiTConfig
from sparse_attn.recipe_check import methods

if TYPE_CHECKING:
    from sparse_attn.recipe import LayerPlan

_OP = "run_layer"
_APART = ("dense", "s2", "blasst", "vdit")  # methods whose calls cost no selection: cut as a CPU likes it
Pick = slice | Tensor | tuple[int, ...]  # heads of a tensor: a slice (no copy) or their numbers


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of one method, on heads with equally many query heads for each key head."""

    heads: tuple[int, ...]  # query heads of this rank
    q_pick: Pick
    kv_pick: Pick
    method: str
    config: Any


def run_layer(
    plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    engine: str | None = None,
    context: Context | None = None,
    head_offset: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one layer, every head by its own method.

    Equivalent, head by head h with setting (method, config), to row h of the method run on the layer.
    Key heads are never repeated: a group's query heads go with the key heads that they belong to. What
    a config shares over a key head's queries (anchor's `share_kv_group`, sparsed's `per_kv_head`) is
    shared over those that are in the group.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv]; Hq a multiple of Hkv.
        plan: from `Recipe.plan_for`. It remembers how its heads are cut into calls.
        is_causal: query i sees keys j <= i + S - L.
        scale: multiplies q.k; default D ** -0.5.
        return_lse: also return the natural log-sum-exp, float32 [B, Hq, L].
        engine: insist on an engine by name.
        context: step, prompt length and cache, for the methods that need them; its layer is the plan's.
        head_offset: tensor parallelism: global number of the first query head of this rank, which has
            Hq of the plan's heads in whole key-head groups. Default: the call has all heads.

    Returns:
        out [B, Hq, L, Dv]; with `return_lse`: (out, lse).

    Raises:
        ValueError: a bad argument, or other heads than the plan's. NotImplementedError: no engine can
            run a call.

    Example:
        >>> out = run_layer(recipe.plan_for(layer=3), q, k, v, is_causal=True)
    """
    check_inputs(_OP, query, key, value, True, scale)
    context = replace(context or Context(), layer=plan.layer, head_offset=0)
    calls, place = _calls(plan, query, key, head_offset)
    if plan.steps is not None and context.step == plan.steps[0] and context.cache is not None:
        context.cache.drop(lambda key: _is_of_other_steps(key, plan))
    num_cached = sum(call.method == "sparsed" for call in calls)
    if len(calls) > 1 and query.device.type == "cpu":
        # The engine packs rows that lie far apart: once for the layer instead of once a call.
        key, value = key.contiguous(), value.contiguous()
    layer_out = _shared_out(query, key, value) if len(calls) > 1 else None
    outs, lses = [], []
    for n, call in enumerate(calls):
        k, v = _trim(call, _heads(key, call.kv_pick), _heads(value, call.kv_pick))
        own = context
        if call.method == "sparsed" and (num_cached > 1 or plan.steps is not None):
            # The caller's cache keeps one pattern for each key: each call of the layer needs its own, and so
            # does each range of steps.
            own = replace(context, layer=(plan.layer, plan.steps, n))  # type: ignore[arg-type]
        info = methods()[call.method]
        target = None
        if layer_out is not None and info.finish is None and isinstance(call.q_pick, slice):
            target = layer_out[:, call.q_pick]
        result = run(
            info, _heads(query, call.q_pick), k, v, call.config, is_causal=is_causal, scale=scale,
            enable_gqa=True, engine=engine, context=own, out=target,
        )  # fmt: skip
        if layer_out is not None and target is None:
            for m, head in enumerate(call.heads):
                layer_out[:, head] = result.out[:, m]
        outs.append(result.out)
        lses.append(result.lse)
    out = _in_order(outs, place) if layer_out is None else layer_out
    return (out, _in_order(lses, place)) if return_lse else out


def _is_of_other_steps(key: Any, plan: LayerPlan) -> bool:
    """Whether a key of a cache is this layer's in another range of steps, whose pattern is of no more use."""
    return isinstance(key, tuple) and key[0] == plan.layer and key[1] != plan.steps


def _shared_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The layer's output, for its calls to write their heads into; None where each must give its own."""
    tensors = (query, key, value)
    if query.device.type != "cpu" or any(type(x) is not Tensor for x in tensors):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    return new_out(query, value.shape[-1])


def _in_order(parts: list[Tensor], place: Pick | None) -> Tensor:
    """The parts' heads, joined and put into the layer's order."""
    if isinstance(place, tuple):
        heads = [head for part in parts for head in part.unbind(1)]
        return torch.stack([heads[n] for n in place], 1)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return joined if place is None else _heads(joined, place)


def _heads(x: Tensor, pick: Pick) -> Tensor:
    if isinstance(pick, slice):
        return x[:, pick]
    if isinstance(pick, tuple):
        return torch.stack([x[:, head] for head in pick], 1)
    return x.index_select(1, pick)


def _trim(call: _Call, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out padded text, as `vdit_attention` does."""
    if isinstance(call.config, VDiTConfig) and key.shape[2] == call.config.tokens.L:
        key, value = key[:, :, : call.config.tokens.S], value[:, :, : call.config.tokens.S]
    return key, value


# -- cutting a layer into calls -------------------------------------------------------------------


def _calls(
    plan: LayerPlan, query: Tensor, key: Tensor, head_offset: int | None
) -> tuple[list[_Call], Pick | None]:
    """The calls of a layer, and where each head's result lies among theirs (None: in order). Kept on the
    plan, so that later calls on a GPU copy no head numbers to it."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    place = (num_heads, num_kv_heads, head_offset, query.device)
    if place not in plan._calls:
        first = head_offset or 0
        fits = first >= 0 and first + num_heads <= plan.num_heads
        if not fits or (head_offset is None and num_heads != plan.num_heads):
            what = "" if head_offset is None else f" from head {head_offset} on"
            raise ValueError(
                f"{_OP}: query has {num_heads} heads{what}, but the plan of layer {plan.layer} has "
                f"{plan.num_heads}; pass the recipe of this model (a tensor-parallel rank: head_offset=)."
            )
        with torch.inference_mode(False):  # kept tensors must serve later calls that need gradients
            calls = [
                call
                for heads, method, config in plan.settings
                for call in _cut(plan, heads, method, config, place, first)
            ]
            order = [head for call in calls for head in call.heads]
            where = sorted(range(len(order)), key=order.__getitem__)
            in_order = where == list(range(len(order)))
            plan._calls[place] = (calls, None if in_order else _numbers(where, query.device))
    return plan._calls[place]


def _cut(
    plan: LayerPlan, heads: Sequence[int], method: str, config: Any, place: tuple[Any, ...], first: int
) -> list[_Call]:
    """The calls of one group: key heads with equally many of the group's query heads go together."""
    num_heads, num_kv_heads, _, device = place
    group = num_heads // num_kv_heads
    of_key_head: dict[int, list[int]] = {}  # positions in `heads`, in order of the head
    for position in sorted(range(len(heads)), key=heads.__getitem__):
        if 0 <= heads[position] - first < num_heads:
            of_key_head.setdefault((heads[position] - first) // group, []).append(position)
    if device.type == "cpu" and method in _APART:
        parts_of_group = _side_by_side(heads, of_key_head, group)
    else:
        alike: dict[int, list[int]] = {}
        for positions in of_key_head.values():
            alike.setdefault(len(positions), []).extend(positions)
        parts_of_group = list(alike.values())
    calls = []
    for positions in parts_of_group:
        if isinstance(config, S2Config):
            parts = _s2_parts(config, [heads[p] for p in positions], plan.num_heads, group)
        else:
            parts = [(list(range(len(positions))), _of_heads(config, positions, len(heads), device))]
        for members, own_config in parts:
            own = tuple(heads[positions[m]] - first for m in members)
            own_kv = sorted({h // group for h in own})
            calls.append(_Call(own, _pick(own, device), _pick(own_kv, device), method, own_config))
    return calls


def _side_by_side(heads: Sequence[int], of_key_head: dict[int, list[int]], group: int) -> list[list[int]]:
    """Runs of a group's positions whose heads lie side by side, so that nothing is gathered: whole key heads,
    or neighbours within one. A call more costs a CPU less than copying a head does."""
    runs: list[list[int]] = []
    before_is_whole = False
    for positions in of_key_head.values():
        whole = len(positions) == group
        for n, position in enumerate(positions):
            head = heads[position]
            inside = n > 0 or (whole and before_is_whole)
            if inside and heads[runs[-1][-1]] == head - 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        before_is_whole = whole
    return runs


def _pick(heads: Sequence[int], device: torch.device) -> Pick:
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return slice(heads[0], heads[0] + len(heads))
    return _numbers(heads, device)


def _numbers(heads: Sequence[int], device: torch.device) -> Pick:
    """Numbers as the fastest way to gather takes them: on a CPU `index_select` takes 3 times (of heads that
    lie interleaved) to 10 times (of many heads) as long as `stack`."""
    return tuple(heads) if device.type == "cpu" else torch.tensor(heads, device=device)


def _s2_parts(
    config: S2Config, heads: list[int], num_heads: int, group: int
) -> list[tuple[list[int], S2Config]]:
    """S2 with its shards fixed by the heads' numbers in the layer; dense heads apart."""
    if config.num_heads not in (None, num_heads):
        raise ValueError(
            f"{_OP}: s2's num_heads is {config.num_heads} but the layer has {num_heads}; "
            "set it to that or None."
        )
    num_kv_heads = config.num_kv_heads or num_heads // group
    shifts = config.shifts(num_heads, num_kv_heads)
    if not config.per_query_head:
        shifts = [x for x in shifts for _ in range(num_heads // num_kv_heads)]
    fixed = replace(
        config, head_shift=None, shift_offset=0, num_dense_heads=0, num_kv_heads=None, num_heads=None
    )
    sparse = [n for n, head in enumerate(heads) if shifts[head] is not None]
    dense = [n for n, head in enumerate(heads) if shifts[head] is None]
    parts = [(dense, replace(fixed, vert_stride=1))] if dense else []
    if sparse:
        own = tuple(shifts[heads[n]] for n in sparse)
        # With num_heads given, S2 does not warn that these heads alone do not cover the context.
        parts.append(
            (sparse, replace(fixed, head_shift=own, per_query_head=True, num_heads=len(sparse)))  # type: ignore[arg-type]
        )
    return parts


def _of_heads(config: Any, positions: list[int], num_heads: int, device: torch.device) -> Any:
    """The config for some of its group's heads, its tensors on the device of the call."""
    changes: dict[str, Any] = {}
    whole = positions == list(range(num_heads))
    for name in (f.name for f in fields(config) if f.init):
        value = getattr(config, name)
        if isinstance(value, Tensor):
            changes[name] = value.to(device)[..., positions]
        elif isinstance(value, SparseLayout):
            one_for_all = value.heads == 1 or whole
            changes[name] = (value if one_for_all else _layout_of(value, positions)).to(device)
    if isinstance(config, VDiTConfig):
        patterns = config.patterns
        changes["patterns"] = patterns[0] if config.for_all_heads else tuple(patterns[p] for p in positions)
    return replace(config, **changes) if changes else config


def _layout_of(layout: SparseLayout, heads: list[int]) -> SparseLayout:
    """Some heads of a layout with batch 1."""
    lists: list[IndexList | None] = []
    for rows in (layout.blocks, layout.columns):
        if rows is None:
            lists.append(None)
            continue
        per_head = rows.rows // layout.heads
        parts = []
        for h in heads:
            offsets = rows.offsets[h * per_head : (h + 1) * per_head + 1]
            own = rows.indices[int(offsets[0]) : int(offsets[-1])]
            parts.append(replace(rows, offsets=offsets - offsets[0], indices=own, needed=None))
        lists.append(join_heads(parts, list(range(len(parts)))))
    blocks, columns = lists
    assert blocks is not None
    return SparseLayout(
        blocks, layout.block_m, layout.block_n, layout.L, layout.S, 1, len(heads), columns,
        neighbours_alike=layout.neighbours_alike,
    )  # fmt: skip
