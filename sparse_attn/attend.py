"""`attend`: run a `Plan` on an engine. Every method of the package ends here."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn.checks import autocast, check_call
from sparse_attn.engines import AttendCall, Engine, choose
from sparse_attn.ops import run
from sparse_attn.plan import Plan


@dataclass(frozen=True, eq=False)
class Attended:
    """What `attend` gives back.

    Attributes:
        out: [B, Hq, L, Dv], the inputs' dtype.
        lse: float32 [B, Hq, L], natural log of the sum of exponentials over the attended keys;
            -inf where there are none.
        kept: uint8 [B, Hq, Lb, Sb], 1 where a listed, visible tile was attended; None unless asked.
    """

    out: Tensor
    lse: Tensor
    kept: Tensor | None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    engine: str | None = None,
    want_kept: bool = False,
    op: str = "attend",
    out: Tensor | None = None,
) -> Attended:
    """Masked attention over the keys that `plan` names, with a skip rule if it has one.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv]. float16, bfloat16 or
            float32; any strides with a last stride of 1. D and Dv up to 256.
        is_causal: query i sees keys j <= i + S - L (bottom-right aligned).
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        engine: insist on one engine by name.
        want_kept: also return which tiles were attended.
        op: the name that error messages start with.
        out: [B, Hq, L, Dv] in the inputs' dtype, last stride 1: write the output there, which the CPU engine
            does in place (heads of a larger tensor). No gradients, no torch.compile.

    Raises:
        ValueError: a bad argument, with the remedy; with SPARSE_ATTN_DEBUG=1 in the environment also
            a layout that breaks an invariant (`SparseLayout.check`, which synchronises).
        NotImplementedError: no engine can run the call, with every engine's reasons; or the inputs
            carry tangents of forward-mode differentiation.
    """
    query, key, value = autocast(query, key, value)
    check_call(op, query, key, value, plan, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    _refuse_tangents(op, query, key, value)
    if os.environ.get("SPARSE_ATTN_DEBUG") == "1":
        plan.layout.check()
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    skips = plan.skip_below is not None
    call = AttendCall(
        query, key, value, plan.layout, plan.skip_below, is_causal, scale,
        want_kept=want_kept or (skips and needs_grad), needs_grad=needs_grad,
    )  # fmt: skip
    chosen = choose(call, engine)
    if out is not None:
        return _attend_into(op, out, call, chosen)
    result, lse, kept = run(call, chosen.name)
    return Attended(result, lse, kept if want_kept else None)


def _attend_into(op: str, out: Tensor, call: AttendCall, engine: Engine) -> Attended:
    shape = (*call.q.shape[:3], call.v.shape[-1])
    if out.shape != shape or out.dtype != call.q.dtype or out.stride(-1) != 1 or call.needs_grad:
        raise ValueError(
            f"{op}: out must be {shape} in {call.q.dtype} with a last stride of 1, without gradients; "
            f"got {tuple(out.shape)} in {out.dtype}, strides {out.stride()}."
        )
    if engine.name == "cpu":
        _, lse, kept = engine.forward(replace(call, out=out))
        return Attended(out, lse, kept)
    result, lse, kept = run(call, engine.name)
    return Attended(out.copy_(result), lse, kept if call.want_kept else None)


def _refuse_tangents(op: str, *tensors: Tensor) -> None:
    """An operator without a forward-mode rule would return a tangent of zero, silently."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{op}: forward-mode differentiation (torch.func.jvp, forward_ad) is not supported; "
            "use reverse mode (backward, torch.autograd.grad)."
        )
