"""The configuration and the context with which a case's method selects."""

from __future__ import annotations

from typing import Any

from sparse_attn.bench.cases import ByMethod, Case
from sparse_attn.methods import METHODS, Context

PROMPT_SHARE = 0.9  # SparseD: prompt tokens, the rest is being generated

# Sparse-vDiT: what the heads of `structured_qk(kind="video")` want, by head number modulo 4.
VIDEO_PATTERNS = ("diagonal", "multi_diagonal", "vertical_stripe", "full")


def method_inputs(case: Case) -> tuple[Any, Context]:
    """Config and context of a case whose pattern is `ByMethod`.

    SparseD without a step selects from the case's q and k at once, its own dense pass included; in a
    generation that happens once. Sparse-vDiT gets the case's patterns, or those of
    `VIDEO_PATTERNS`, head by head in turn.

    Raises:
        ValueError: no such method is registered.
    """
    pattern = case.pattern
    assert isinstance(pattern, ByMethod)
    if pattern.method not in METHODS:
        raise ValueError(f"bench: no method {pattern.method!r}; there are {', '.join(METHODS) or 'none'}.")
    options, context = dict(pattern.config), Context()
    if pattern.method == "vdit":
        given = options.get("patterns", VIDEO_PATTERNS)
        options["patterns"] = [given[head % len(given)] for head in range(case.q_heads)]
        options |= {"grid": case.grid, "text_len": case.text_len, "text_first": case.text_first}
    if pattern.method == "sparsed":
        context = Context(prompt_len=int(case.length * PROMPT_SHARE))
    return METHODS[pattern.method].config(**options), context
