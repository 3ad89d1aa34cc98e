"""One row of the table on one layer's queries, keys and values: selection and attention, timed apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.engines import AttendCall, choose
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import Context
from sparse_attn.methods.base import Method
from sparse_attn.plan import Plan
from sparse_attn.recipe_check import methods
from sparse_attn.recipe_plan import LayerPlan
from sparse_attn.recipe_run import _calls, _heads, _in_order, _layout_of, _trim


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    """Layouts of a layer whose heads run different methods: (query heads, their layout) of each call."""

    parts: list[tuple[tuple[int, ...], SparseLayout]]

    def density(self, is_causal: bool, per_head: bool = True) -> Tensor:
        """float32 [1, Hq], as `SparseLayout.density` gives it."""
        found: dict[int, Tensor] = {}
        for heads, layout in self.parts:
            own = layout.density(is_causal, per_head=True)[0]
            found |= {head: own[n * len(own) // len(heads)] for n, head in enumerate(heads)}
        return torch.stack([found[head] for head in sorted(found)])[None]

    def of_head(self, head: int) -> SparseLayout:
        """What one query head reads: a layout of a single head."""
        heads, layout = next(part for part in self.parts if head in part[0])
        if layout.heads == 1:
            return layout
        return _layout_of(layout, [heads.index(head) * layout.heads // len(heads)])


@dataclass(eq=False)
class Run:
    """What came of it.

    Attributes:
        pattern: what was attended, less tiles that a skip rule dropped.
        result: of all heads; its `kept` is not for use.
        select_s, attend_s: seconds; the second includes gathering heads and putting them back.
        engines: names of those that ran.
    """

    pattern: SparseLayout | HeadPatterns
    result: Attended
    select_s: float
    attend_s: float
    engines: set[str] = field(default_factory=set)


def run_method(
    method: Method, config: Any, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
) -> Run:
    """One method in every head. q: [B, Hq, L, D]; k, v: [B, Hkv, S, D]."""
    select_s, plan = timed(
        lambda: method.select(q, k, config, is_causal=is_causal, scale=scale, context=Context(layer=layer)),
        q.device,
    )
    skips = plan.skip_below is not None
    attend_s, result = timed(
        lambda: attend(q, k, v, plan, is_causal=is_causal, scale=scale, enable_gqa=True, want_kept=skips),
        q.device,
    )
    engines = {engine_of(q, k, plan, is_causal, scale)}
    return Run(attended_layout(plan, result), result, select_s, attend_s, engines)


def run_recipe(layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> Run:
    """`recipe.run_layer`, its selections timed apart: the same calls in the same order. Batch 1."""
    select_s, done, context = 0.0, [], Context(layer=layer.layer)

    def attend_all() -> tuple[Tensor, Tensor]:
        nonlocal select_s
        calls, place = _calls(layer, q, k, None)
        keys, values = k, v
        if len(calls) > 1 and q.device.type == "cpu":  # packed once, as `run_layer` does
            keys, values = k.contiguous(), v.contiguous()
        for call in calls:
            info = methods()[call.method]
            own_q, own_k = _heads(q, call.q_pick), _heads(keys, call.kv_pick)
            own_k, own_v = _trim(call, own_k, _heads(values, call.kv_pick))
            select = partial(
                info.select, own_q, own_k, call.config, is_causal=is_causal, scale=scale, context=context
            )
            seconds, plan = timed(select, q.device)
            select_s += seconds
            result = attend(
                own_q, own_k, own_v, plan, is_causal=is_causal, scale=scale, enable_gqa=True,
                want_kept=plan.skip_below is not None,
            )  # fmt: skip
            if info.finish is not None:
                out = info.finish(result.out, own_v, call.config)
                result = Attended(out, result.lse, result.kept)
            done.append((call.heads, own_q, own_k, plan, result))
        results = [x[-1] for x in done]
        return _in_order([x.out for x in results], place), _in_order([x.lse for x in results], place)

    seconds, (out, lse) = timed(attend_all, q.device)
    pattern = HeadPatterns([(heads, attended_layout(plan, result)) for heads, _, _, plan, result in done])
    engines = {engine_of(own_q, own_k, plan, is_causal, scale) for _, own_q, own_k, plan, _ in done}
    return Run(pattern, Attended(out, lse, None), select_s, seconds - select_s, engines)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what the function returned."""
    _wait(device)
    start = time.perf_counter()
    value = function()
    _wait(device)
    return time.perf_counter() - start, value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attended_layout(plan: Plan, result: Attended) -> SparseLayout:
    """What was really attended: the plan's layout less the tiles that its skip rule dropped."""
    layout = plan.layout
    if plan.skip_below is None or result.kept is None:
        return layout
    return SparseLayout.from_dense_mask(
        result.kept.bool(), block_m=layout.block_m, block_n=layout.block_n, L=layout.L, S=layout.S
    )


def engine_of(q: Tensor, k: Tensor, plan: Plan, is_causal: bool, scale: float) -> str:
    """The engine that `attend` takes for this call."""
    return choose(AttendCall(q, k, k, plan.layout, plan.skip_below, is_causal, scale)).name
