"""What a method is, seen from outside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.checks import check_inputs
from sparse_attn.plan import Plan


@dataclass(frozen=True)
class Context:
    """Where a call sits in its model: what a selector may need beyond q and k.

    Attributes:
        layer: layer number, from 0.
        head_offset: global number of the first query head (tensor parallelism).
        step, num_steps: denoising step, from 0, and their total.
        prompt_len: prompt tokens before the generated ones; an int, or an integer tensor [B].
        cache: a `LayoutCache` owned by the caller.
    """

    layer: int = 0
    head_offset: int = 0
    step: int | None = None
    num_steps: int | None = None
    prompt_len: int | Tensor | None = None
    cache: Any = None


@dataclass(frozen=True)
class Method:
    """A registry entry.

    Attributes:
        name: as users write it.
        config: frozen dataclass; its constructor validates and raises ValueError.
        select: (query, key, config, *, is_causal, scale, context) -> Plan. Sees neither value nor
            softmax; scale is never None. Query and key heads may differ (GQA).
        op: the public operator.
        causal: whether the method is made for causal attention.
        causal_only: it refuses any other.
        by_shape: `select` reads nothing of query and key but their shapes and device, and nothing of the
            context but `head_offset`.
        finish: optional (out, value, config) -> out, run after attention.
        options: names of the config's arguments. causal_default: whether `op` is causal unasked. Both are
            read off here, once, since a compiled graph cannot ask for signatures.
    """

    name: str
    config: type
    select: Callable[..., Plan]
    op: Callable[..., Any]
    causal: bool
    finish: Callable[..., Tensor] | None = None
    causal_only: bool = False
    by_shape: bool = False
    options: tuple[str, ...] = field(init=False, repr=False, compare=False)
    causal_default: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flag = inspect.signature(self.op).parameters.get("is_causal")
        object.__setattr__(self, "options", tuple(inspect.signature(self.config).parameters))
        object.__setattr__(self, "causal_default", flag is not None and flag.default is True)


def run(
    method: Method,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    *,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
    engine: str | None = None,
    want_kept: bool = False,
    context: Context = Context(),
    out: Tensor | None = None,
) -> Attended:
    """Check, select, attend and finish: the road of every method. `out` as `attend` takes it."""
    op = f"{method.name}_attention"
    check_inputs(op, query, key, value, enable_gqa, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    plan = method.select(query, key, config, is_causal=is_causal, scale=scale, context=context)
    result = attend(
        query, key, value, plan, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        engine=engine, want_kept=want_kept, op=op, out=out,
    )  # fmt: skip
    if method.finish is None:
        return result
    return Attended(method.finish(result.out, value, config), result.lse, result.kept)
