"""Queries and keys with the structure of trained attention, made without any weights.

Random normal q and k give flat attention, on which every sparse method looks equally bad. The
tensors here carry what trained heads show: a sink, keys that every query wants, keys that one stretch
of queries wants, and a preference for near positions, all under rotary embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROPE_BASE = 5e5
# What each mechanism adds to a scaled logit (at scale head_dim ** -0.5). Over them lies the product of
# two standard normal vectors, itself a logit of standard deviation 1.
SINK, VERTICAL, STRIPE, LOCAL = 14.0, 7.0, 6.0, 8.0
VERTICALS_PER_1K, SEGMENT, SPANS, SPAN_LENGTH = 10, 256, 6, 12


def structured_qk(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    kind: str = "causal",
    grid: tuple[int, int, int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Structured queries and keys; every head differs, and equal arguments give equal tensors.

    * "causal": sink at key 0; vertical keys that all queries want; for every 256 queries a few spans of
      earlier keys that only they want ("stripes"); near keys. Rotary embedding over the position.
    * "bidirectional": the same, with the spans anywhere and the sink at a random key (diffusion language
      models show such sinks).
    * "video": rotary embedding over (frame, row, column). By head number modulo 4: 0 wants near tokens of
      its own and the neighbouring frames, 1 wants its own place in every frame, 2 wants vertical keys,
      3 wants nothing in particular. Tokens past frames * height * width are text and lie at the origin.

    Args:
        batch, heads, length, head_dim: shape of the queries. head_dim: even, at least 32.
        kv_heads: key heads; default `heads`. The query heads of a group want the same keys.
        grid: (frames, height, width), "video" only; at most `length` tokens.
        seed: of a generator on `device` (numbers differ between CPU and CUDA).
        device, dtype: of the result. The work is done in float32, a head at a time.

    Returns:
        query [B, heads, length, D] and key [B, kv_heads, length, D].

    Raises:
        ValueError: a bad argument.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    _check(heads, kv_heads, head_dim, length, kind, grid)
    generator = torch.Generator(device).manual_seed(seed)
    query = torch.empty(batch, heads, length, head_dim, device=device, dtype=dtype)
    key = torch.empty(batch, kv_heads, length, head_dim, device=device, dtype=dtype)
    group = heads // kv_heads
    angles = _angles(length, head_dim, kind, grid, torch.device(device))
    for b in range(batch):
        for h in range(kv_heads):
            if kind == "video":
                q_add, k = _video_head(h % 4, length, head_dim, generator)
            else:
                q_add, k = _text_head(length, head_dim, kind == "causal", generator)
            key[b, h] = _rotate(k, angles)
            for member in range(h * group, (h + 1) * group):
                query[b, member] = _rotate(_normal(generator, length, head_dim) + q_add, angles)
    return query, key


def _check(heads: int, kv_heads: int, head_dim: int, length: int, kind: str, grid) -> None:
    problems = []
    if kind not in ("causal", "bidirectional", "video"):
        problems.append(f"kind is {kind!r}; use 'causal', 'bidirectional' or 'video'")
    if heads % kv_heads:
        problems.append(f"{heads} heads are not a multiple of {kv_heads} kv_heads")
    if head_dim % 2 or head_dim < 32:
        problems.append(f"head_dim is {head_dim}; it must be even and at least 32")
    if kind == "video" and (grid is None or math.prod(grid) > length):
        problems.append(f"grid is {grid}; 'video' needs (frames, height, width) of at most {length} tokens")
    if problems:
        raise ValueError(f"structured_qk: {'; '.join(problems)}.")


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _angles(length: int, head_dim: int, kind: str, grid, device: torch.device) -> Tensor:
    """[length, head_dim / 2]: the rotation of each pair of dimensions at each position. For video, the
    first half of the pairs turns with the frame, a quarter with the row and a quarter with the column."""
    pairs = head_dim // 2
    position = torch.arange(length, device=device)
    if kind != "video":
        return position[:, None] * ROPE_BASE ** (-torch.arange(pairs, device=device) / pairs)
    frames, height, width = grid
    position = torch.where(position < frames * height * width, position, 0)
    parts = [pairs // 2, pairs // 4, pairs - pairs // 2 - pairs // 4]
    axes = [position // (height * width), position // width % height, position % width]
    steps = [256.0 ** (-torch.arange(n, device=device) / n) for n in parts]
    return torch.cat([axis[:, None] * step for axis, step in zip(axes, steps, strict=True)], 1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def _direction(generator: torch.Generator, head_dim: int, low: float, high: float) -> Tensor:
    """A random vector [head_dim] that lives in the rotary pairs from share `low` to share `high` and has
    squared length sqrt(head_dim): a q and a k that both hold it times sqrt(x) get a logit of x."""
    pairs = head_dim // 2
    inside = torch.zeros(pairs, device=generator.device)
    inside[int(low * pairs) : max(int(high * pairs), int(low * pairs) + 1)] = 1
    vector = _normal(generator, head_dim) * inside.repeat(2)
    return vector / vector.norm() * head_dim**0.25


def _text_head(
    length: int, head_dim: int, is_causal: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the queries of one head share [length, D], and its keys [length, D], before rotation."""
    local = _direction(generator, head_dim, 0.06, 0.31)  # fast pairs: the logit depends on the distance
    globe = _direction(generator, head_dim, 0.85, 1.0)  # slow pairs: it does not
    q = (LOCAL**0.5 * local + SINK**0.5 * globe).repeat(length, 1)
    k = _normal(generator, length, head_dim) + LOCAL**0.5 * local

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=generator.device)

    sink = 0 if is_causal else (draw(1) * length).long()
    k[sink] += SINK**0.5 * globe
    verticals = (draw(max(1, length * VERTICALS_PER_1K // 1024)) * length).long()
    k[verticals] += VERTICAL / SINK**0.5 * globe

    for start in range(SEGMENT if is_causal else 0, length, SEGMENT):
        topic = _direction(generator, head_dim, 0.6, 0.85) * STRIPE**0.5
        q[start : start + SEGMENT] += topic
        reach = start if is_causal else length
        begin = (draw(SPANS) * reach).long()[:, None]
        offset = torch.arange(SPAN_LENGTH, device=generator.device)
        inside = offset < 1 + draw(SPANS, 1) * (SPAN_LENGTH - 1)
        spans = (begin + offset).clamp(max=reach - 1).flatten()
        k.index_add_(0, spans, topic * inside.flatten()[:, None])
    return q, k


def _video_head(
    pattern: int, length: int, head_dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As `_text_head`, for one of the four kinds of video head."""
    k = _normal(generator, length, head_dim)
    if pattern == 3:
        return torch.zeros_like(k), k
    if pattern == 2:
        globe = _direction(generator, head_dim, 0.4, 0.5)  # the slowest frame pairs
        wanted = torch.randperm(length, generator=generator, device=generator.device)[: max(1, length // 64)]
        k[wanted] += 10.0**0.5 * globe
        return (10.0**0.5 * globe).repeat(length, 1), k
    bands = [(0.0, 0.2), (0.5, 0.58), (0.75, 0.83)]  # frame, row, column
    wants = torch.zeros(head_dim, device=generator.device)
    for low, high in bands[pattern:]:
        wants += 5.0**0.5 * _direction(generator, head_dim, low, high)
    return wants.repeat(length, 1), k + wants
