"""Sparse attention in models that call `scaled_dot_product_attention` themselves.

    with sa.sdpa_patched("anchor", theta=12.0) as report:
        model(x)
    print(report)                  # what ran sparse, what did not and why

While such a block is entered, the function is another one in `torch.nn.functional` and in every module that
imported it by name. That one acts in the thread (or asyncio task) that entered a block, and in the backward
passes that it starts; everywhere else it is PyTorch's own. A call that the method cannot take over exactly
(a mask, dropout, causal attention of unequal lengths, ...) is PyTorch's too, with the reason in the report.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_attn.checks import check_inputs
from sparse_attn.integrations.settings import (
    AttentionFunction,
    MethodAttention,
    as_recipe,
    attention_of,
    attention_of_plan,
    name_of,
)

_ORIGINAL = functional.scaled_dot_product_attention
# The arguments of scaled_dot_product_attention -> out, or None to leave the call to PyTorch.
Handler = Callable[..., Tensor | None]


# -- the report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SdpaCall:
    """Calls that were alike: [B, Hq, L, D] queries on [B, Hkv, S, D] keys."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    is_causal: bool
    reason: str  # why it ran dense; empty where the method ran

    def __str__(self) -> str:
        causal = "causal" if self.is_causal else "full"
        return f"query {list(self.query)} key {list(self.key)} {causal}"


@dataclass
class SdpaReport:
    """What became of the calls in one `sdpa_patched` block.

    Attributes:
        method: as `explain` writes it.
        calls: how often each kind of call came, in the order of their first.
    """

    method: str
    calls: Counter[SdpaCall] = field(default_factory=Counter)

    @property
    def num_sparse(self) -> int:
        return sum(count for call, count in self.calls.items() if not call.reason)

    @property
    def num_dense(self) -> int:
        return sum(self.calls.values()) - self.num_sparse

    @property
    def reasons(self) -> Counter[str]:
        """How many calls ran dense for each reason."""
        found: Counter[str] = Counter()
        for call, count in self.calls.items():
            if call.reason:
                found[call.reason] += count
        return found

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.num_sparse} calls sparse, {self.num_dense} dense"]
        for call, count in self.calls.items():
            lines.append(f"  {count} x {call}: {'dense, ' + call.reason if call.reason else 'sparse'}")
        return "\n".join(lines)


# -- for the length of a block ------------------------------------------------------------------------


@contextmanager
def sdpa_patched(
    method: Any,
    config: Any = None,
    *,
    engine: str | None = None,
    min_length: int = 2,
    num_layers: int | None = None,
    **options: Any,
) -> Iterator[SdpaReport]:
    """Run a method in place of `torch.nn.functional.scaled_dot_product_attention`.

    Taken over are calls without mask and dropout on 4-D tensors of equal query and key length, causal or not.
    All others run as PyTorch runs them. Blocks can be nested: the innermost counts. A backward pass that
    recomputes activations must run inside the block.

    Args:
        method: a name of `sparse_attn.methods.METHODS`; a function (query [B, Hq, L, D], key, value, *,
            layer, is_causal, scale) -> out [B, Hq, L, Dv]; or a `Recipe` (or its file) with plans for
            prefill, whose layers are the calls in their order.
        config: an instance of the method's config class; instead of it, pass its fields as `options`.
        engine: insist on one engine by name; a call that it cannot run then raises.
        min_length: shorter calls stay dense.
        num_layers: calls that are taken over in one pass of the model: layer numbers (which a function or a
            recipe may ask for) start again after so many. Default: that of the recipe; else they never do.

    Yields:
        The report, which fills as calls come.

    Raises:
        ValueError: an unknown method or option, a bad config, or a recipe without plans for prefill.

    Example:
        >>> with sdpa_patched("blasst", threshold=0.001) as report:
        ...     model(x)
    """
    if min_length < 2:
        raise ValueError(f"sdpa_patched: min_length is {min_length}; it must be at least 2.")
    recipe = as_recipe(method)
    if recipe is None:
        by_layer = [attention_of("sdpa_patched", method, config, engine, options)]
        name = name_of(by_layer[0])
    elif config is not None or options:
        raise ValueError("sdpa_patched: config and options belong to a method's name, not to a recipe.")
    else:
        num_layers = num_layers or recipe.model.num_layers
        plans = [recipe.plan_for(n, "prefill") for n in range(recipe.model.num_layers)]
        by_layer = [attention_of_plan(plan, engine) for plan in plans]
        name = f"recipe for {recipe.model.architecture}"
    taken = _TakeOver(by_layer, SdpaReport(name), min_length, num_layers, engine is not None)
    with redirected(taken):
        yield taken.report


class _TakeOver:
    """The handler of one block."""

    def __init__(
        self,
        by_layer: list[AttentionFunction | None],
        report: SdpaReport,
        min_length: int,
        num_layers: int | None,
        insists: bool,
    ) -> None:
        self.by_layer, self.report = by_layer, report
        self.min_length, self.num_layers, self.insists = min_length, num_layers, insists
        self.count = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, causal: bool, scale: Any, gqa: bool
    ) -> Tensor | None:
        reason = why_not(q, k, v, mask, dropout, causal, gqa, self.min_length)
        out = None
        if not reason:
            layer = self.count if self.num_layers is None else self.count % self.num_layers
            self.count += 1
            attention = self.by_layer[layer % len(self.by_layer)]
            out, reason = self._run(attention, q, k, v, layer, causal, scale)
        shapes = ((), ()) if q.is_nested or k.is_nested else (tuple(q.shape), tuple(k.shape))
        self.report.calls[SdpaCall(*shapes, causal, reason)] += 1
        return out

    def _run(
        self,
        attention: AttentionFunction | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        causal: bool,
        scale: Any,
    ) -> tuple[Tensor | None, str]:
        if attention is None:
            return None, "asked for"
        if isinstance(attention, MethodAttention) and attention.method.causal_only and not causal:
            return None, f"{attention.method.name} needs causal attention"
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        try:
            return attention(q, k, v, layer=layer, is_causal=causal, scale=scale), ""
        except NotImplementedError as error:  # no engine can run the call
            if self.insists:
                raise
            return None, " ".join(str(error).split())


def why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, causal: bool, gqa: bool, min_length: int = 2
) -> str:
    """Why a call of `scaled_dot_product_attention` is not plain self-attention over whole sequences."""
    if mask is not None:
        return "it has a mask"
    if dropout:
        return f"dropout {dropout:g}"
    if any(x.is_nested for x in (q, k, v)):
        return "nested tensors"
    if not q.dim() == k.dim() == v.dim() == 4:
        return "its tensors are not 4-D (batch, heads, length, head size)"
    L, S = q.shape[2], k.shape[2]
    if L != S:
        return (
            "causal attention of unequal lengths is aligned upper left"
            if causal
            else "queries and keys differ in length"
        )
    if min_length > L:
        return f"shorter than {min_length}"
    try:
        check_inputs("", q, k, v, gqa)
    except ValueError as error:
        return str(error).removeprefix(": ").rstrip(".")
    return ""


# -- replacing the function ---------------------------------------------------------------------------

_OWN = ("sparse_attn.", "torch._C")  # modules where the function stays what it is
_active: ContextVar[Handler | None] = ContextVar("sparse_attn_sdpa", default=None)
_lock = threading.Lock()
_entered: list[Handler] = []  # of all threads, in order
_places: list[tuple[dict[str, Any], str]] = []  # where the function stood
_fastpath = [True]  # whether nn.MultiheadAttention might take its fused kernel, which calls no function


@contextmanager
def redirected(handler: Handler) -> Iterator[None]:
    """Let `handler` see every call of this thread first, for the length of a block."""
    with _lock:
        if not _entered:
            _install()
        _entered.append(handler)
    try:
        with handled_by(handler):
            yield
    finally:
        with _lock:
            _entered.remove(handler)
            if not _entered:
                _uninstall()


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """The same inside a block of `redirected`, where it costs little."""
    token = _active.set(handler)
    try:
        yield
    finally:
        _active.reset(token)


def _install() -> None:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict) or str(names.get("__name__")).startswith(_OWN):
            continue
        for name, value in list(names.items()):
            if value is _ORIGINAL:
                names[name] = scaled_dot_product_attention
                _places.append((names, name))
    _fastpath[0] = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)


def _uninstall() -> None:
    for names, name in _places:
        if names.get(name) is scaled_dot_product_attention:  # else somebody replaced ours: leave theirs
            names[name] = _ORIGINAL
    _places.clear()
    torch.backends.mha.set_fastpath_enabled(_fastpath[0])


def _handler() -> Handler | None:
    own = _active.get()
    if own is not None:
        return own
    # On a GPU, checkpointed activations are recomputed in a thread of the backward pass, which is not one of
    # Python's and entered no block itself.
    in_backward = _entered and torch._C._current_autograd_node() is not None
    if not in_backward or not isinstance(threading.current_thread(), threading._DummyThread):
        return None
    return _entered[-1] if len(_entered) == 1 else _ambiguous()


def _ambiguous() -> Handler:
    raise RuntimeError(
        "sdpa_patched: a backward pass recomputes attention while several sdpa_patched blocks are entered, "
        "and it cannot be told whose it is; run backward passes in one block at a time."
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What stands in for PyTorch's function while a block is entered; its signature and meaning."""
    handler = _handler()
    if handler is not None:
        # The methods and their engines must not meet themselves.
        token = _active.set(leave_alone)
        try:
            out = handler(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        finally:
            _active.reset(token)
        if out is not None:
            return out
    return _ORIGINAL(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip


def leave_alone(*args: Any) -> None:
    """The handler that leaves every call to PyTorch."""
    return None
