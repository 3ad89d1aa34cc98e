"""Batches of padded sequences, cut to their real tokens, and dense attention under the masks of the adapters.

A mask is None (plainly causal, or all visible), bool [B, S] of real tokens, or [B, 1, L, S] bool or additive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_SPANS = "_sparse_attn_spans"


def real_tokens(padding: Tensor) -> list[tuple[int, int]] | None:
    """Per sequence, the half-open range of its real tokens; None if one has holes.

    Reading them synchronises, and the layers of a forward pass share their mask, so that it keeps them.
    """
    if not hasattr(padding, _SPANS):
        setattr(padding, _SPANS, _read_spans(padding))
    return getattr(padding, _SPANS)


def _read_spans(padding: Tensor) -> list[tuple[int, int]] | None:
    count = padding.sum(-1)
    first = padding.to(torch.uint8).argmax(-1)
    position = torch.arange(padding.shape[1], device=padding.device)
    inside = (position >= first[:, None]) & (position < (first + count)[:, None])
    if not torch.equal(inside, padding):
        return None
    return list(zip(first.tolist(), (first + count).tolist(), strict=True))


def each_sequence(
    sparse: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: list[tuple[int, int]],
) -> Tensor:
    """Run every sequence of the batch on its own real tokens. Padding queries give 0.

    Queries are the last L of the S positions, so query i sits at position i + S - L.

    Args:
        sparse: (q, k, v, row=, first=) -> out: the sequence's number, and its first real position.
    """
    L, S = query.shape[2], key.shape[2]
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, (first, end) in enumerate(spans):
        rows = slice(max(first - (S - L), 0), end - (S - L))
        if rows.stop <= rows.start:
            continue
        own, keys = slice(b, b + 1), slice(first, end)
        out[own, :, rows] = sparse(
            query[own, :, rows], key[own, :, keys], value[own, :, keys], row=b, first=first
        )
    return out


def visible(L: int, S: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """A mask of ours with causality and four dimensions (or [L, S]); None where all keys are visible."""
    if mask is not None and mask.dim() == 4:
        return mask
    edge = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L) if causal and L > 1 else None
    if mask is None:
        return edge
    mask = mask[:, None, None, :]
    return mask if edge is None else mask & edge


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`scaled_dot_product_attention` under any mask of ours; queries without any key give 0."""
    L, S = q.shape[2], k.shape[2]
    plain_causal = mask is None and causal and L > 1 and L == S  # SDPA's own is_causal is upper-left aligned
    if not plain_causal:
        mask = visible(L, S, mask, causal, q.device)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
