"""The definition of right: plain PyTorch in float32 (float64 for float64 input), one query block at
a time, so that the largest buffer is [B, Hq, block_m, S]."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.engines.base import AttendCall, lse_dtype, new_out
from sparse_attn.schedule import Schedule


class ReferenceEngine:
    name = "reference"

    def why_off(self) -> list[str]:
        return []

    def why_not(self, call: AttendCall) -> list[str]:
        return []

    def schedule(self, call: AttendCall) -> Schedule:
        return Schedule()

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = call.q, _per_query_head(call.k, call), _per_query_head(call.v, call)
        out = new_out(q, v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=lse_dtype(q), device=q.device)
        wants_kept = call.want_kept or call.skip_below is not None
        kept = torch.zeros(call.kept_shape, dtype=torch.uint8, device=q.device) if wants_kept else None
        for i, rows in _query_blocks(call):
            scores = _scores(call, q[:, :, rows], k, i)
            if kept is not None:
                kept[:, :, i] = _kept_tiles(call, scores, i)
                scores = _drop_skipped(call, scores, kept[:, :, i], i)
            row_lse = torch.logsumexp(scores, -1)
            p = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0)[..., None])
            v_read = _only_read(v.to(p.dtype), scores)
            out[:, :, rows] = (p @ v_read).to(q.dtype)
            lse[:, :, rows] = row_lse
        return out, lse, kept if call.want_kept else None

    def backward(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = call.q, _per_query_head(call.k, call), _per_query_head(call.v, call)
        dtype = lse_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        dk = torch.zeros(k.shape, dtype=dtype, device=q.device)
        dv = torch.zeros(v.shape, dtype=dtype, device=q.device)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # rows that attend nothing: p = 0
        for i, rows in _query_blocks(call):
            scores = _scores(call, q[:, :, rows], k, i)
            if kept is not None:
                scores = _drop_skipped(call, scores, kept[:, :, i], i)
            p = torch.exp(scores - lse[:, :, rows, None])
            do = grad_out[:, :, rows].to(dtype)
            k_read, v_read = (_only_read(x.to(dtype), scores) for x in (k, v))
            ds = p * (do @ v_read.mT - delta[:, :, rows, None]) * call.scale
            dq[:, :, rows] = ds @ k_read
            dk += ds.mT @ q[:, :, rows].to(dtype)
            dv += p.mT @ do
        shape = (q.shape[0], call.k.shape[1], call.gqa_group)
        dk = dk.view(*shape, *dk.shape[2:]).sum(2)
        dv = dv.view(*shape, *dv.shape[2:]).sum(2)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _query_blocks(call: AttendCall):
    """Yields (i, slice of its queries)."""
    block_m, L = call.layout.block_m, call.layout.L
    for i in range(call.layout.num_query_blocks):
        yield i, slice(i * block_m, min((i + 1) * block_m, L))


def _per_query_head(x: Tensor, call: AttendCall) -> Tensor:
    """[B, Hkv, ...] -> [B, Hq, ...]"""
    return x if call.gqa_group == 1 else x.repeat_interleave(call.gqa_group, 1)


def _heads_of_layout(x: Tensor, call: AttendCall) -> Tensor:
    """[B', H', ...] of the layout -> [B, Hq, ...]"""
    if x.shape[1] not in (1, call.q.shape[1]):
        x = x.repeat_interleave(call.gqa_group, 1)
    return x.expand(*call.q.shape[:2], *x.shape[2:])


def _scores(call: AttendCall, q: Tensor, k: Tensor, i: int) -> Tensor:
    """Scaled logits of one query block against all keys, -inf where not attended: [B, Hq, m, S]."""
    dtype = lse_dtype(q)
    scores = q.to(dtype) @ k.to(dtype).mT * call.scale
    attended = _heads_of_layout(call.layout.token_rows(i, call.is_causal), call)
    return scores.masked_fill(~attended, -torch.inf)


def _only_read(x: Tensor, scores: Tensor) -> Tensor:
    """Keys or values [B, Hq, S, D] with 0 where no query of the block attends: what a layout leaves out
    may hold anything, and 0 * NaN is NaN."""
    unread = (scores == -torch.inf).all(2)
    return x.masked_fill(unread[..., None], 0)


def _kept_tiles(call: AttendCall, scores: Tensor, i: int) -> Tensor:
    """uint8 [B, Hq, Sb]: the tiles of one query block that survive the vote (`Plan`)."""
    layout = call.layout
    listed = _heads_of_layout(layout._cached(("block_mask",), layout.block_mask)[:, :, i], call)
    if call.is_causal:
        last_query = min((i + 1) * layout.block_m, layout.L) - 1
        first_keys = torch.arange(layout.num_key_blocks, device=scores.device) * layout.block_n
        listed = listed & (first_keys <= last_query + layout.S - layout.L)
    if call.skip_below is None:
        return listed.to(torch.uint8)
    kept = torch.zeros_like(listed, dtype=torch.uint8)
    running_max = scores.new_full(scores.shape[:3], -torch.inf)
    limit = call.skip_below.to(scores.dtype)[..., None]
    for j in range(layout.num_key_blocks):
        tile_max = scores[..., j * layout.block_n : (j + 1) * layout.block_n].amax(-1)
        vote = (tile_max < running_max + limit) | (tile_max == -torch.inf)
        keep = listed[..., j] & ~vote.all(-1)
        kept[..., j] = keep
        running_max = torch.where(keep[..., None], running_max.maximum(tile_max), running_max)
    return kept


def _drop_skipped(call: AttendCall, scores: Tensor, kept: Tensor, i: int) -> Tensor:
    """Mask the keys of tiles that were not kept; columns stay."""
    layout = call.layout
    keys = torch.arange(layout.S, device=scores.device)
    attended = kept.bool()[..., keys // layout.block_n]
    if layout.columns is not None:
        columns = layout._cached(("column_mask",), layout.column_mask)
        columns = columns[:, :, i // layout.columns.group]
        attended = attended | _heads_of_layout(columns, call)
    return scores.masked_fill(~attended[:, :, None], -torch.inf)
