"""The engine registry, in priority order, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sparse_attn.engines.base import AttendCall, Engine, lse_dtype, new_out
from sparse_attn.engines.cpu import CpuEngine
from sparse_attn.engines.hopper import HopperEngine
from sparse_attn.engines.reference import ReferenceEngine
from sparse_attn.engines.triton import TritonEngine

_PRIORITY: tuple[Engine, ...] = (HopperEngine(), TritonEngine(), CpuEngine(), ReferenceEngine())
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _PRIORITY}

_forced: str | None = None


@contextmanager
def use_engine(name: str | None) -> Iterator[None]:
    """Force one engine for every call inside the block; None lifts an outer choice.

    Example:
        >>> with sparse_attn.use_engine("reference"):
        ...     out = sparse_attn.sparse_attention(q, k, v, layout)
    """
    global _forced
    if name is not None:
        get_engine(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def get_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}.")
    return ENGINES[name]


def _by_priority() -> list[Engine]:
    """The engines that may be taken unasked, in the registry's order. Triton's interpreter comes last: it
    is there to debug kernels, thousands of times slower than the other engines."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return sorted(ENGINES.values(), key=lambda engine: interprets and engine.name == "triton")


def choose(call: AttendCall, name: str | None = None) -> Engine:
    """The first engine that can run the call.

    Args:
        name: an engine to insist on; default: the one of `use_engine`, then of the environment
            variable SPARSE_ATTN_ENGINE, then the first in priority order without a reason against.

    Raises:
        NotImplementedError: no engine can, or the named one cannot; lists the reasons.
    """
    name = name or _forced or os.environ.get("SPARSE_ATTN_ENGINE") or None
    candidates = _by_priority() if name is None else [get_engine(name)]
    refusals = {}
    for engine in candidates:
        reasons = engine.why_not(call)
        if not reasons:
            return engine
        refusals[engine.name] = reasons
    lines = [f"  {name}: {reason}" for name, reasons in refusals.items() for reason in reasons]
    what = "no engine can run this call" if name is None else f"engine {name!r} cannot run this call"
    raise NotImplementedError("\n".join([what, f"  call: {call.describe()}", *lines]))


__all__ = ["ENGINES", "AttendCall", "Engine", "choose", "get_engine", "lse_dtype", "new_out", "use_engine"]
