"""`attend`: run a `Plan` on an engine. Every method of the package ends here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.checks import check_inputs, check_layout
from sparse_attn.engines import AttendCall, choose
from sparse_attn.ops import attend_fwd, flatten
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

    Raises:
        ValueError: a bad argument, with the remedy.
        NotImplementedError: no engine can run the call, with every engine's reasons.
    """
    query, key, value = _autocast(query, key, value)
    check_inputs(op, query, key, value, enable_gqa)
    check_layout(op, plan.layout, query, key)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    skips = plan.skip_below is not None
    call = AttendCall(
        query, key, value, plan.layout, plan.skip_below, is_causal, scale,
        want_kept=want_kept or (skips and needs_grad), needs_grad=needs_grad,
    )  # fmt: skip
    out, lse, kept = attend_fwd(*flatten(call, choose(call, engine).name))
    return Attended(out, lse, kept if want_kept else None)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under `torch.autocast`, cast as `scaled_dot_product_attention` does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)
