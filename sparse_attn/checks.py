"""Checks of what a user passes in. Every problem of a call is reported at once, with its remedy."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout
from sparse_attn.plan import Plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under `torch.autocast`, cast as `scaled_dot_product_attention` does: all but float64."""
    device = query.device.type if isinstance(query, Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return _cast(query, dtype), _cast(key, dtype), _cast(value, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if castable else x


def check_inputs(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, scale: float | None = None
) -> None:
    """Raise one ValueError that lists everything wrong with query, key and value (as autocast, where
    it is on, will cast them) and with scale."""
    problems = _input_problems(*autocast(query, key, value), enable_gqa)
    _raise(op, problems + _scale_problems(scale))


def check_call(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """Raise one ValueError that lists everything wrong with a call of `attend`."""
    problems = _input_problems(query, key, value, enable_gqa)
    inputs_fit = not problems
    problems += _scale_problems(scale)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            problems.append(f"{name} is {type(flag).__name__}; it must be True or False")
    if not isinstance(plan, Plan):
        problems.append(f"plan is {type(plan).__name__}; it must be a Plan")
    elif not isinstance(plan.layout, SparseLayout):
        problems.append(f"layout is {type(plan.layout).__name__}; it must be a SparseLayout")
    elif inputs_fit:
        problems += _layout_problems(plan.layout, query, key)
        problems += _skip_problems(plan.skip_below, query)
    _raise(op, problems)


def _raise(op: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{op}: " + "; ".join(problems) + ".")


def _input_problems(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[str]:
    tensors = {"query": query, "key": key, "value": value}
    problems = []
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            problems.append(f"{name} is {type(x).__name__}; it must be a torch.Tensor")
        elif x.layout != torch.strided:
            problems.append(f"{name} has layout {x.layout}; it must be dense (pad nested tensors)")
        elif x.dim() != 4:
            problems.append(f"{name} has {x.dim()} dimensions; expected 4: (batch, heads, length, head_dim)")
    if problems:
        return problems
    return _check_shapes(query, key, value, enable_gqa) + _check_kinds(tensors)


def _scale_problems(scale: float | None) -> list[str]:
    if scale is None:
        return []
    if isinstance(scale, Tensor):
        return ["scale is a Tensor; pass a plain number (scale.item()), since no gradient reaches it"]
    if not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
        return [f"scale is {type(scale).__name__}; it must be a number or None (head_dim ** -0.5)"]
    if not abs(scale) < math.inf:
        return [f"scale is {scale}; it must be finite"]
    return []


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[str]:
    problems = []
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        problems.append(
            f"batch sizes differ: query {query.shape[0]}, key {key.shape[0]}, value {value.shape[0]}"
        )
    if query.shape[3] != key.shape[3]:
        problems.append(f"key has head_dim {key.shape[3]} but query has {query.shape[3]}; they must be equal")
    if key.shape[1:3] != value.shape[1:3]:
        problems.append(
            f"key has (heads, length) {tuple(key.shape[1:3])} but value has "
            f"{tuple(value.shape[1:3])}; they must be equal"
        )
    named = (("query", query), ("key", key), ("value", value))
    problems += [
        f"{name} has shape {tuple(x.shape)}; no dimension may be 0" for name, x in named if 0 in x.shape
    ]
    problems += [
        f"{name} has head_dim {x.shape[3]}; at most {MAX_HEAD_DIM} is supported"
        for name, x in named
        if x.shape[3] > MAX_HEAD_DIM
    ]
    q_heads, kv_heads = query.shape[1], key.shape[1]
    if q_heads != kv_heads and not enable_gqa:
        problems.append(
            f"query has {q_heads} heads but key has {kv_heads}; pass enable_gqa=True for "
            "grouped-query attention"
        )
    elif kv_heads and q_heads % kv_heads:
        problems.append(
            f"query has {q_heads} heads, not a multiple of the {kv_heads} key heads; "
            "grouped-query attention needs whole groups"
        )
    return problems


def _check_kinds(tensors: dict[str, Tensor]) -> list[str]:
    problems = []
    dtypes = {name: x.dtype for name, x in tensors.items()}
    if len(set(dtypes.values())) > 1:
        problems.append(f"dtypes differ: {dtypes}; cast them to one (or use torch.autocast)")
    if any(dtype not in DTYPES for dtype in dtypes.values()):
        problems.append(f"dtype {dtypes} is not supported; use float16, bfloat16 or float32")
    devices = {name: str(x.device) for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        problems.append(f"devices differ: {devices}; move them to one")
    problems += [
        f"{name} has stride {x.stride(3)} in its last dimension; it must be 1 (call {name}.contiguous())"
        for name, x in tensors.items()
        if x.shape[3] > 1 and x.stride(3) != 1
    ]
    return problems


def _layout_problems(layout: SparseLayout, query: Tensor, key: Tensor) -> list[str]:
    B, Hq, L = query.shape[:3]
    Hkv, S = key.shape[1:3]
    problems = []
    if (layout.L, layout.S) != (L, S):
        problems.append(
            f"the layout is for L={layout.L}, S={layout.S} but query and key have L={L}, S={S}; "
            "build it for these lengths"
        )
    if layout.batch not in (1, B):
        problems.append(f"the layout has batch {layout.batch}; expected 1 or {B}")
    if layout.heads not in (1, Hq, Hkv):
        problems.append(
            f"the layout has {layout.heads} heads; expected 1, {Hkv} (key heads) or {Hq} (query heads)"
        )
    if layout.device != query.device:
        problems.append(
            f"the layout is on {layout.device} but query is on {query.device}; use layout.to(query.device)"
        )
    return problems


def _skip_problems(skip_below: Tensor | None, query: Tensor) -> list[str]:
    if skip_below is None:
        return []
    if not isinstance(skip_below, Tensor):
        return [f"skip_below is {type(skip_below).__name__}; it must be a float32 tensor [B, Hq] or None"]
    problems = []
    shape = tuple(query.shape[:2])
    if tuple(skip_below.shape) != shape or skip_below.dtype != torch.float32:
        problems.append(
            f"skip_below is {skip_below.dtype} {tuple(skip_below.shape)}; it must be float32 {shape}: "
            "(batch, query heads)"
        )
    if skip_below.device != query.device:
        problems.append(f"skip_below is on {skip_below.device} but query is on {query.device}; move it")
    if skip_below.requires_grad:
        problems.append("skip_below requires grad, but a threshold has no gradient; detach it")
    return problems


def check_finite(op: str, name: str, value: float) -> None:
    """Raise ValueError if a plain number is NaN."""
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{op}: {name} is NaN; pass a number.")
