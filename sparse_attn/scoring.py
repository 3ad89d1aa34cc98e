"""Pooled block scores: how much attention each key block receives from each query block.

Selectors rank key blocks by these scores. They come from the queries, the keys and the log-sum-exp of
each row, one tile at a time: no L x S matrix is ever stored. On a GPU the Triton kernels of
`kernels/pool.py` do the work; the code below is the portable form and the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import ceil

import torch
from torch import Tensor

from sparse_attn.engines.base import lse_dtype

KeyRange = tuple[int | Tensor, int | Tensor]
_CHUNK = 1 << 21  # logits held at once by the portable code: 8 MiB, which stays in a CPU's cache


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool = False,
    key_range: KeyRange | None = None,
    per_kv_head: bool = False,
) -> Tensor:
    """Sum of attention probabilities in each (query block, key block) tile.

    Equivalent, at L x S memory, to::

        p = exp(scale * q @ k.mT - lse[..., None])        # 0 where masked or outside key_range
        mass[b, h, i, j] = p[b, h, rows of block i, keys of block j].sum()

    With `lse` over all keys, a row of the result sums to the number of its queries. Divide by
    `block_sizes` for the mean of a tile.

    Args:
        q: [B, Hq, L, D], any floating dtype; k: [B, Hkv, S, D]. Hq is a multiple of Hkv.
        lse: [B, Hq, L], natural log of the normaliser of each row: the dense `lse` of `attend`, or any
            other. None: the log-sum-exp over the keys of `key_range` alone. Rows of -inf give 0.
        block_m, block_n: queries and keys in a block.
        scale: multiplies q.k.
        is_causal: query i sees keys j <= i + S - L.
        key_range: (start, end), token positions: only keys start <= j < end count. Each is an int or
            an integer tensor [B]. Default: all keys.
        per_kv_head: sum over the query heads that share a key head.

    Returns:
        float32 [B, Hq or Hkv, Lb, Sb] (float64 for float64 input).

    The portable code holds about 40 MiB beside the result. The Triton kernels take block sizes of 16, 32,
    64 and 128, and float32 up to a head size of 128; where they run, a `key_range` that lies on the GPU
    is read there, without a host synchronisation.
    """
    if lse is None:
        lse = row_lse(q, k, scale=scale, is_causal=is_causal, key_range=key_range)
    if _has_kernel(q, block_m, block_n):
        from sparse_attn.kernels.pool import block_mass as kernel

        start, end = _range_tensors(key_range, q.shape[0], k.shape[2], q.device)
        mass = kernel(q, k, lse, block_m, block_n, scale, is_causal, start, end)
    else:
        mass = _block_mass(q, k, lse, block_m, block_n, scale, is_causal, key_range)
    if per_kv_head:
        mass = mass.unflatten(1, (k.shape[1], -1)).sum(2)
    return mass


@torch.no_grad()
def row_lse(
    q: Tensor, k: Tensor, *, scale: float, is_causal: bool = False, key_range: KeyRange | None = None
) -> Tensor:
    """Natural log-sum-exp of each query's scaled logits over the keys of `key_range`.

    Args: as `block_mass`.

    Returns:
        float32 [B, Hq, L] (float64 for float64 input); -inf for a query that sees none of those keys.
    """
    if _has_kernel(q, 16, 16):
        from sparse_attn.kernels.pool import row_lse as kernel

        start, end = _range_tensors(key_range, q.shape[0], k.shape[2], q.device)
        return kernel(q, k, scale, is_causal, start, end)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=lse_dtype(q), device=q.device)
    for tile in _tiles(q, k, 1, 1, scale, is_causal, key_range):
        part = lse[tile.batch, tile.heads, tile.queries]
        torch.logaddexp(part, tile.logits.logsumexp(-1), out=part)
    return lse


def block_sizes(L: int, S: int, block_m: int, block_n: int, device=None) -> Tensor:
    """float32 [Lb, Sb]: (query, key) pairs in each tile, cut at the ends of the sequences."""
    rows = _sizes(L, block_m, device)
    return (rows[:, None] * _sizes(S, block_n, device)).float()


def _sizes(length: int, block: int, device) -> Tensor:
    first = torch.arange(ceil(length / block), device=device) * block
    return (length - first).clamp(max=block)


# -- portable code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """Logits [group, queries, keys] of one key head, -inf where masked or out of range."""

    batch: int
    heads: slice
    queries: slice
    keys: slice
    logits: Tensor


def _block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    key_range: KeyRange | None,
) -> Tensor:
    B, Hq, L, _ = q.shape
    shape = (B, Hq, ceil(L / block_m), ceil(k.shape[2] / block_n))
    mass = torch.zeros(shape, dtype=lse_dtype(q), device=q.device)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # rows without a key: p = exp(-inf) = 0
    for tile in _tiles(q, k, block_m, block_n, scale, is_causal, key_range):
        p = tile.logits.sub_(lse[tile.batch, tile.heads, tile.queries, None]).exp_()
        pad = (0, -p.shape[2] % block_n, 0, -p.shape[1] % block_m)
        if any(pad):
            p = torch.nn.functional.pad(p, pad)
        pooled = p.unflatten(2, (-1, block_n)).sum(-1).unflatten(1, (-1, block_m)).sum(2)
        i, j = tile.queries.start // block_m, tile.keys.start // block_n
        mass[tile.batch, tile.heads, i : i + pooled.shape[1], j : j + pooled.shape[2]] = pooled
    return mass


def _tiles(
    q: Tensor,
    k: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    key_range: KeyRange | None,
) -> Iterator[_Tile]:
    """Walk all visible logits in tiles of whole blocks (`_CHUNK` entries, at least one block)."""
    (B, Hq, L, _), (Hkv, S) = q.shape, k.shape[1:3]
    group, dtype, shift = Hq // Hkv, lse_dtype(q), S - L
    width = min(-(-S // block_n), max(_CHUNK // (group * max(block_m, 64) * block_n), 1)) * block_n
    height = max(_CHUNK // (group * width * block_m), 1) * block_m
    for b, (start, end) in enumerate(_range_ints(key_range, B, S)):
        for h in range(Hkv):
            heads = slice(h * group, (h + 1) * group)
            for top in range(0, L, height):
                queries = slice(top, min(top + height, L))
                rows = q[b, heads, queries].to(dtype) * scale
                stop = min(end, queries.stop + shift) if is_causal else end
                for left in range(start // block_n * block_n, stop, width):
                    keys = slice(left, min(left + width, stop))
                    with torch.autocast(q.device.type, enabled=False):
                        logits = rows @ k[b, h, keys].to(dtype).mT
                    if left < start:
                        logits[..., : start - left] = -torch.inf
                    if is_causal and keys.stop > top + shift + 1:
                        _mask_future(logits, top + shift - left)
                    yield _Tile(b, heads, queries, keys, logits)


def _mask_future(logits: Tensor, shift: int) -> None:
    """Set logits[:, x, y] to -inf where y > x + shift."""
    x = torch.arange(logits.shape[1], device=logits.device)[:, None]
    y = torch.arange(logits.shape[2], device=logits.device)
    logits.masked_fill_(y > x + shift, -torch.inf)


# -- key ranges and the choice of kernel ----------------------------------------------------------


def _range_ints(key_range: KeyRange | None, B: int, S: int) -> list[tuple[int, int]]:
    start, end = (0, S) if key_range is None else key_range
    bounds = [x.tolist() if isinstance(x, Tensor) else [x] * B for x in (start, end)]
    return [(max(a, 0), min(b, S)) for a, b in zip(*bounds, strict=True)]


def _range_tensors(key_range: KeyRange | None, B: int, S: int, device) -> tuple[Tensor, Tensor]:
    """int32 [B] start and end on the device; `torch.full` and a cast do not synchronise."""

    def bound(x: int | Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return x.to(device=device, dtype=torch.int32).clamp(0, S)
        return torch.full((B,), min(max(x, 0), S), dtype=torch.int32, device=device)

    start, end = (0, S) if key_range is None else key_range
    return bound(start), bound(end)


def _has_kernel(q: Tensor, block_m: int, block_n: int) -> bool:
    if not q.is_cuda or not _has_triton():
        return False
    from sparse_attn.kernels.pool import fits

    return fits(q, block_m, block_n)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
