"""Checks of packed and paged inputs, and the one place where their lengths come to the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparse_attn.checks import autocast, check_inputs
from sparse_attn.varlen_batch import PagedCall

Lengths = Tensor | Sequence[int]


def check_tensors(op: str, dims: int, shape: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{op}: {name} is {type(x).__name__}; it must be a torch.Tensor.")
        if x.dim() != dims:
            raise ValueError(f"{op}: {name} has {x.dim()} dimensions; expected {dims}: {shape}.")


def check_out(op: str, out: Tensor, query: Tensor, value_dim: int) -> None:
    wanted = f"{(*query.shape[:2], value_dim)} {query.dtype} on {query.device}"
    given = type(out).__name__
    if isinstance(out, Tensor):
        given = f"{tuple(out.shape)} {out.dtype} on {out.device}"
    if given != wanted:
        raise ValueError(f"{op}: out is {given}; it must be {wanted}.")


def first(x: Tensor) -> Tensor:
    """The first token or page, for checks of all that does not depend on their number."""
    return x[:1] if len(x) else x.new_empty((1, *x.shape[1:]))


def _is_vector(x: object) -> bool:
    if isinstance(x, Tensor):
        return x.dim() == 1 and x.dtype in (torch.int32, torch.int64)
    return isinstance(x, Sequence) and all(type(n) is int for n in x)


def to_host(op: str, device: torch.device, given: dict[str, Lengths]) -> dict[str, list[int]]:
    """Integer vectors as lists. Those on an accelerator come over together: one synchronisation."""
    lists, away = {}, {}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            if not _is_vector(x):
                raise ValueError(f"{op}: {name} must be an integer tensor or a list of ints.")
            lists[name] = list(x)
            continue
        if not _is_vector(x):
            raise ValueError(
                f"{op}: {name} is {x.dtype} {tuple(x.shape)}; it must be int32 or int64 with 1 dimension."
            )
        if x.device.type == "cpu":
            lists[name] = x.tolist()
        elif x.device == device:
            away[name] = x.to(torch.int64)
        else:
            raise ValueError(f"{op}: {name} is on {x.device} but query is on {device}; move it.")
    if away:
        flat = iter(torch.cat(list(away.values())).tolist())
        lists |= {name: [next(flat) for _ in range(len(x))] for name, x in away.items()}
    return lists


def lengths_between(op: str, name: str, ends: list[int], total: int, of: str) -> list[int]:
    """The lengths between cumulative ones, checked."""
    if not ends or ends[0] != 0:
        raise ValueError(f"{op}: {name} is {ends[:1]}...; it must start with 0 and have N + 1 entries.")
    lengths = [b - a for a, b in pairwise(ends)]
    if any(n < 0 for n in lengths):
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(
            f"{op}: {name} falls from {ends[at]} to {ends[at + 1]} at entry {at + 1}; it must never fall."
        )
    if ends[-1] != total:
        raise ValueError(
            f"{op}: {name} ends at {ends[-1]} but {of} has {total} tokens; they must be equal "
            f"(slice {of}[:{ends[-1]}] where its tail is padding)."
        )
    return lengths


def same_count(op: str, q_lens: list[int], **others: list[int]) -> None:
    for name, x in others.items():
        if len(x) != len(q_lens):
            raise ValueError(
                f"{op}: cu_seqlens_q has {len(q_lens)} sequences but {name} has {len(x)}; they must agree."
            )


def paged_lengths(
    op: str,
    query: Tensor,
    cache: Tensor,
    cu_seqlens_q: Lengths,
    block_table: Tensor,
    seqused_k: Lengths,
    trust_table: bool,
) -> tuple[list[int], list[int]]:
    """Query and key lengths, with the block table checked in the same synchronisation."""
    check_tensors(op, 2, "(sequences, max_pages)", block_table=block_table)
    if block_table.dtype not in (torch.int32, torch.int64) or block_table.device != cache.device:
        raise ValueError(
            f"{op}: block_table is {block_table.dtype} on {block_table.device}; it must be int32 or int64 "
            f"on {cache.device}, where the cache is."
        )
    num_pages, page_size = cache.shape[:2]
    N, max_pages = block_table.shape
    given: dict[str, Lengths] = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k}
    if not trust_table and _is_vector(seqused_k) and len(seqused_k) == N and block_table.numel():
        used_tokens = torch.as_tensor(seqused_k).to(block_table.device, non_blocking=True)
        read = torch.arange(max_pages, device=block_table.device) * page_size < used_tokens[:, None]
        wrong = read & ((block_table < 0) | (block_table >= num_pages))
        found = torch.where(wrong.any(), wrong.flatten().to(torch.uint8).argmax(), -1)
        given["block_table"] = found[None]
    host = to_host(op, query.device, given)
    q_lens = lengths_between(op, "cu_seqlens_q", host["cu_seqlens_q"], len(query), "query")
    used = host["seqused_k"]
    same_count(op, q_lens, seqused_k=used, block_table=[0] * N)
    for n, S in enumerate(used):
        if not 0 <= S <= max_pages * page_size:
            raise ValueError(
                f"{op}: seqused_k[{n}] is {S}; block_table has room for 0 .. {max_pages * page_size} tokens "
                f"({max_pages} pages of {page_size})."
            )
    at = host.get("block_table", [-1])[0]
    if at >= 0:
        raise ValueError(
            f"{op}: block_table[{at // max_pages}, {at % max_pages}] is "
            f"{int(block_table.flatten()[at])}; page numbers lie in 0 .. {num_pages - 1}."
        )
    return q_lens, used


def check_paged(
    op: str,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Lengths,
    block_table: Tensor,
    seqused_k: Lengths,
    enable_gqa: bool,
    scale: float | None,
    trust_table: bool,
    out: Tensor | None,
) -> PagedCall:
    """The checked call of `op`; arguments as `sparse_attention_paged`."""
    check_tensors(op, 3, "(tokens, heads, head_dim)", query=query)
    check_tensors(op, 4, "(num_pages, page_size, heads, head_dim)", k_cache=k_cache, v_cache=v_cache)
    if k_cache.shape[:2] != v_cache.shape[:2]:
        raise ValueError(
            f"{op}: k_cache has (num_pages, page_size) {tuple(k_cache.shape[:2])} but v_cache has "
            f"{tuple(v_cache.shape[:2])}; they must be equal."
        )
    k, v = (first(x).transpose(1, 2) for x in (k_cache, v_cache))
    check_inputs(op, first(query).transpose(0, 1)[None], k, v, enable_gqa, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, k_cache, v_cache)):
        raise NotImplementedError(
            f"{op}: an input requires grad, but pages have no backward; call it under torch.no_grad(), "
            "or train with sparse_attention_varlen."
        )
    query = autocast(query, k, v)[0]  # the cache stays as it is: `attend` casts the pages that it is given
    lengths = paged_lengths(op, query, k_cache, cu_seqlens_q, block_table, seqused_k, trust_table)
    if out is not None:
        check_out(op, out, query, v_cache.shape[3])
    return PagedCall(query, (k_cache, v_cache), block_table, *lengths, out=out)
