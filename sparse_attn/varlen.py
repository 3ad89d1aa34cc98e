"""Packed and paged inputs: ragged sequences side by side, without padding.

Each sequence is attended as its own call of the ordinary road (`methods.base.run`, `attend`), so that
every engine and every method takes part, and a sequence gets the very result that it gets alone. The
price is one selection and one launch a sequence; docs/varlen.md says when that matters.

Letters: N sequences, T query and Tk key tokens of all sequences together, L and S those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.checks import autocast, check_inputs
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS, Context, Method
from sparse_attn.methods.base import run
from sparse_attn.methods.blasst import full_layout
from sparse_attn.plan import Plan
from sparse_attn.varlen_batch import attend_paged
from sparse_attn.varlen_checks import (
    Lengths,
    check_paged,
    check_tensors,
    first,
    lengths_between,
    same_count,
    to_host,
)

LayoutOf = Callable[[int, int], SparseLayout]


def sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    seqused_k: Lengths | None = None,
    method: str | Method | None = None,
    config: Any = None,
    layout: LayoutOf | None = None,
    sparse_if: Callable[[int, int], bool] | None = None,
    context: Context | Sequence[Context] | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    engine: str | None = None,
    **method_config: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of N packed sequences, each over its own keys.

    Equivalent to::

        for n in range(N):
            a, b = cu_seqlens_q[n : n + 2]
            c, d = cu_seqlens_k[n : n + 2]
            q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
            out[a:b] = anchor_attention(q, k, v, **method_config)[0].transpose(0, 1)  # or another

    Nothing is copied but the result. Gradients flow as in those calls.

    Args:
        query: [T, Hq, D] float16, bfloat16 or float32; strides free while the last is 1.
        key: [Tk, Hkv, D]. value: [Tk, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 or int64, or lists: sequence n has the queries
            cu_seqlens_q[n] .. cu_seqlens_q[n+1] - 1. They start at 0, never fall and end at T and Tk.
            Tensors on a GPU are read once a call, all together, which makes the host wait.
        seqused_k: [N], of each sequence only so many first keys take part; default all.
        method: name of a method ("blasst", "anchor", "s2", ...) or a registry entry.
        config: the method's config object; or pass its fields as further keywords.
        layout: without a method, (L, S) -> `SparseLayout` with batch 1; called once for each pair of
            lengths. Without either, attention is dense.
        sparse_if: with a method or layout, (L, S) -> whether a sequence uses it; the others are
            dense. Default: all do. `lambda L, S: L > 1` keeps decoding dense.
        context: what a selector needs beyond query and key (`methods.Context`), one for all sequences
            or one each (a cache belongs to one sequence).
        is_causal: query i of a sequence sees its keys j <= i + S - L, **bottom-right aligned**, so that
            chunked prefill and prefix caches work. Default: as the method's own operator, else False.
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the natural log-sum-exp, float32 [Hq, T].
        engine: insist on an engine by name.

    Returns:
        out [T, Hq, Dv], or (out, lse). Queries of a sequence without keys give 0 and -inf.

    Raises:
        ValueError: a bad argument; of one sequence, with its number and lengths.
        NotImplementedError: no engine can run the call.

    Example:
        >>> q = torch.randn(900, 8, 64)
        >>> out = sparse_attention_varlen(
        ...     q, q, q, cu_seqlens_q=[0, 100, 900], cu_seqlens_k=[0, 100, 900], method="anchor", theta=12.0
        ... )
    """
    op = "sparse_attention_varlen"
    check_tensors(op, 3, "(tokens, heads, head_dim)", query=query, key=key, value=value)
    if len(key) != len(value):
        raise ValueError(f"{op}: key has {len(key)} tokens but value has {len(value)}; they must be equal.")
    q, k, v = (first(x).transpose(0, 1)[None] for x in (query, key, value))
    check_inputs(op, q, k, v, enable_gqa, scale)
    query, key, value = autocast(query, key, value)
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if seqused_k is not None:
        given["seqused_k"] = seqused_k
    host = to_host(op, query.device, given)
    q_lens = lengths_between(op, "cu_seqlens_q", host["cu_seqlens_q"], len(query), "query")
    k_lens = lengths_between(op, "cu_seqlens_k", host["cu_seqlens_k"], len(key), "key")
    same_count(op, q_lens, cu_seqlens_k=k_lens)
    used = host.get("seqused_k", k_lens)
    same_count(op, q_lens, seqused_k=used)
    for n, (most, S) in enumerate(zip(k_lens, used, strict=True)):
        if not 0 <= S <= most:
            raise ValueError(f"{op}: seqused_k[{n}] is {S}; sequence {n} has {most} keys.")
    each = Each(
        op, len(q_lens), method, config, layout, sparse_if, context, is_causal, scale, enable_gqa, engine,
        method_config,
    )  # fmt: skip
    # One `split`, since a slice for each sequence would give each its own gradient of all T tokens.
    keys, values = key.split(k_lens), value.split(k_lens)
    out, lse = _attend_all(
        each, query, q_lens, used, value.shape[-1], lambda n: (keys[n][: used[n]], values[n][: used[n]])
    )
    return (out, lse) if return_lse else out


def sparse_attention_paged(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Lengths,
    block_table: Tensor,
    seqused_k: Lengths,
    method: str | Method | None = None,
    config: Any = None,
    layout: LayoutOf | None = None,
    sparse_if: Callable[[int, int], bool] | None = None,
    context: Context | Sequence[Context] | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    engine: str | None = None,
    trust_table: bool = False,
    out: Tensor | None = None,
    **method_config: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of N packed query sequences over keys that lie in pages, as in vLLM. Inference only.

    Sequence n reads the first seqused_k[n] tokens of pages block_table[n, 0], block_table[n, 1], ...
    Its pages are gathered for its call and freed after it; nothing else of the cache is copied. Of a method
    that chooses by shape alone (S2) a key head's pages are read only where one of its query heads needs them.
    Sequences that can be attended together share a call of an engine: see docs/varlen.md.

    Args:
        query: [T, Hq, D] float16, bfloat16 or float32; strides free while the last is 1.
        k_cache: [num_pages, page_size, Hkv, D]; v_cache: [num_pages, page_size, Hkv, Dv]; any strides
            with a last stride of 1. vLLM's combined [num_pages, Hkv, page_size, 2 * D] is
            `kv[..., :D].transpose(1, 2)` and `kv[..., D:].transpose(1, 2)`.
        cu_seqlens_q: [N + 1], see `sparse_attention_varlen`.
        block_table: int32 or int64 [N, max_pages] on the device of the cache. Entries past a sequence's
            last page are never read and may be anything.
        seqused_k: [N] int32 or int64, or a list: keys of each sequence, those of its new tokens, which
            must already be in the cache, included. 0 is legal.
        method, config, layout, sparse_if, context, is_causal, scale, enable_gqa, return_lse, engine:
            as in `sparse_attention_varlen`.
        trust_table: leave out the check that the table names pages of the cache; where lengths are lists,
            nothing then makes the host wait for a GPU. Default False.
        out: [T, Hq, Dv] in the query's dtype, any strides: write the result there. Default: a new tensor.

    Returns:
        out [T, Hq, Dv], or (out, lse) with lse float32 [Hq, T].

    Raises:
        ValueError: a bad argument. NotImplementedError: no engine can run the call, or an input
            requires grad (pages have no backward).

    Example:
        >>> k_cache, v_cache = torch.randn(2, 10, 16, 2, 64)  # 10 pages of 16 tokens
        >>> out = sparse_attention_paged(
        ...     torch.randn(1, 8, 64), k_cache, v_cache, cu_seqlens_q=[0, 1], seqused_k=[20],
        ...     block_table=torch.tensor([[7, 3]]), is_causal=True, enable_gqa=True,
        ... )
    """
    op = "sparse_attention_paged"
    call = check_paged(
        op, query, k_cache, v_cache, cu_seqlens_q, block_table, seqused_k, enable_gqa, scale, trust_table, out
    )
    each = Each(
        op, len(call.q_lens), method, config, layout, sparse_if, context, is_causal, scale, enable_gqa,
        engine, method_config,
    )  # fmt: skip
    result, lse = attend_paged(each, call)
    return (result, lse) if return_lse else result


# -- one sequence after the other -----------------------------------------------------------------


@dataclass
class Each:
    """How every sequence of a call is attended."""

    op: str
    num_sequences: int
    method: str | Method | None
    config: Any
    layout: LayoutOf | None
    sparse_if: Callable[[int, int], bool] | None
    context: Context | Sequence[Context] | None
    is_causal: bool | None
    scale: float | None
    enable_gqa: bool
    engine: str | None
    method_config: dict[str, Any]
    _layouts: dict[tuple[int, int], SparseLayout] = field(default_factory=dict)
    _sparse: dict[tuple[int, int], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method = _method(self.op, self.method, self.layout)
        self.config = _config(self.op, self.method, self.config, self.method_config)
        if self.is_causal is None:
            self.is_causal = self.method is not None and self.method.causal_default
        self._check_context()

    def _check_context(self) -> None:
        context = self.context
        if context is not None and self.method is None:
            raise ValueError(f"{self.op}: context is read by methods alone; pass a method, or no context.")
        if isinstance(context, Context):
            if context.cache is not None and self.num_sequences > 1:
                raise ValueError(
                    f"{self.op}: one context with a cache for {self.num_sequences} sequences; a cache "
                    "belongs to one sequence: pass a list of contexts, one each."
                )
        elif context is not None and len(context) != self.num_sequences:
            raise ValueError(
                f"{self.op}: {len(context)} contexts for {self.num_sequences} sequences; pass one, or "
                "one each."
            )

    @property
    def can_join(self) -> bool:
        """Whether the results of a sequence are what `attend` makes of its plan, and need no cache."""
        if isinstance(self.context, Sequence) or (
            self.context is not None and self.context.cache is not None
        ):
            return False
        return not (isinstance(self.method, Method) and self.method.finish is not None)

    def is_dense(self, L: int, S: int) -> bool:
        if self.method is None and self.layout is None:
            return True
        if self.sparse_if is None:
            return False
        if (L, S) not in self._sparse:
            self._sparse[L, S] = bool(self.sparse_if(L, S))
        return not self._sparse[L, S]

    def plan_by_shape(self, shape: tuple[Any, ...], remember: bool) -> Plan | None:
        """`plan` of a sequence where it can be told before the keys are read, from (Hq, Hkv, L, S, D, dtype,
        device).

        Args:
            remember: from call to call, as the layers of a model ask for the same ones.
        """
        method = self.method
        if not isinstance(method, Method):
            return self.plan(0, *_shaped(*shape))
        if not method.by_shape:
            return None
        how = (bool(self.is_causal), self.scale, self._context(0).head_offset)
        if remember and type(self.config).__hash__ not in (None, object.__hash__):
            return _remembered_plan(method, self.config, how, shape)
        return _plan_of_shape(method, self.config, how, shape)

    def plan(self, n: int, q: Tensor, k: Tensor) -> Plan:
        """What sequence n reads; q [1, Hq, L, D], k [1, Hkv, S, D]."""
        L, S = q.shape[2], k.shape[2]
        if self.is_dense(L, S):
            return Plan(full_layout(L, S, 128, 128, q.device))
        if self.layout is not None:
            if (L, S) not in self._layouts:
                self._layouts[L, S] = self.layout(L, S)
            return Plan(self._layouts[L, S])
        assert isinstance(self.method, Method)
        scale = q.shape[-1] ** -0.5 if self.scale is None else float(self.scale)
        return self.method.select(
            q, k, self.config, is_causal=self.is_causal, scale=scale, context=self._context(n)
        )

    def _context(self, n: int) -> Context:
        context = self.context[n] if isinstance(self.context, Sequence) else self.context
        return Context() if context is None else context

    def attend(self, n: int, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """q [1, Hq, L, D], k [1, Hkv, S, D], v [1, Hkv, S, Dv] of sequence n."""
        L, S = q.shape[2], k.shape[2]
        options: dict[str, Any] = {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
            "engine": self.engine,
        }
        try:
            if isinstance(self.method, Method) and not self.is_dense(L, S):
                return run(self.method, q, k, v, self.config, context=self._context(n), **options)
            return attend(q, k, v, self.plan(n, q, k), **options)
        except (ValueError, NotImplementedError) as error:
            raise self.named(error, n, L, S) from error

    def named(self, error: Exception, n: int, L: int, S: int) -> Exception:
        """The error of one sequence, saying which."""
        kind = ValueError if isinstance(error, ValueError) else NotImplementedError
        return kind(f"{self.op}: sequence {n} ({L} queries, {S} keys): {error}")


def _shaped(
    heads: int, num_kv_heads: int, L: int, S: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Query and key of these shapes, without memory of their own."""
    like = torch.empty(1, dtype=dtype, device=device)
    return like.expand(1, heads, L, dim), like.expand(1, num_kv_heads, S, dim)


def _plan_of_shape(method: Method, config: Any, how: tuple[Any, ...], shape: tuple[Any, ...]) -> Plan:
    is_causal, scale, head_offset = how
    q, k = _shaped(*shape)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    context = Context(head_offset=head_offset)
    return method.select(q, k, config, is_causal=is_causal, scale=scale, context=context)


_remembered_plan = lru_cache(maxsize=1024)(_plan_of_shape)


def _attend_all(
    each: Each,
    query: Tensor,
    q_lens: list[int],
    k_lens: list[int],
    value_dim: int,
    keys_of: Callable[[int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, Dv] and lse float32 [Hq, T]; `keys_of(n)` gives k [S, Hkv, D] and v [S, Hkv, Dv]."""
    heads = query.shape[1]
    # The empty slice gives the result a gradient (of 0) where no sequence is attended at all.
    outs = [query[:0, :, :1].expand(0, heads, value_dim)] if not any(map(min, q_lens, k_lens)) else []
    lses = [query.new_empty((heads, 0), dtype=torch.float32)]
    for n, q in enumerate(query.split(q_lens)):
        if q_lens[n] and k_lens[n]:
            k, v = keys_of(n)
            result = each.attend(n, *(x.transpose(0, 1)[None] for x in (q, k, v)))
            outs.append(result.out[0].transpose(0, 1))
            lses.append(result.lse[0])
        elif q_lens[n]:
            outs.append(query.new_zeros(q_lens[n], heads, value_dim))
            lses.append(query.new_full((heads, q_lens[n]), -torch.inf, dtype=torch.float32))
    return torch.cat(outs), torch.cat(lses, 1)


# -- method and config ----------------------------------------------------------------------------


def _method(op: str, method: str | Method | None, layout: LayoutOf | None) -> Method | None:
    if layout is not None and not callable(layout):
        raise ValueError(
            f"{op}: layout is {type(layout).__name__}; it must be a function (L, S) -> SparseLayout, since "
            "sequences differ in length."
        )
    if method is None or isinstance(method, Method):
        found = method
    elif method in METHODS:
        found = METHODS[method]
    else:
        raise ValueError(f"{op}: unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if found is not None and layout is not None:
        raise ValueError(f"{op}: pass either a method or a layout, not both.")
    return found


def _config(op: str, method: Method | None, config: Any, options: dict[str, Any]) -> Any:
    """The config object of the method."""
    if method is None:
        given = [*options, *(["config"] if config is not None else [])]
        if given:
            raise ValueError(f"{op}: {', '.join(given)} given without a method; pass method= as well.")
        return None
    if config is None:
        unknown = [name for name in options if name not in method.options]
        if unknown:
            raise ValueError(
                f"{op}: {method.name} has no option {', '.join(unknown)}; it has {', '.join(method.options)}."
            )
        return method.config(**options)
    if options:
        raise ValueError(f"{op}: pass either config or its fields ({', '.join(options)}), not both.")
    if not isinstance(config, method.config):
        raise ValueError(
            f"{op}: config is {type(config).__name__}; {method.name} takes {method.config.__name__}."
        )
    return config
