"""Which heads are worth drawing, and their pictures as grids of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from sparse_attn.demo.runs import HeadPatterns
from sparse_attn.layout import SparseLayout

SINK_KEYS = 4
GRID = 128


@dataclass(eq=False)
class Picture:
    """One head as grids of at most GRID x GRID cells of equal token counts.

    Attributes:
        title, caption: for people.
        truth: float32 [rows, cols], share of a query's dense attention in the cell, mean over its queries.
        visible: bool [rows, cols], false where no query of the cell may see any of its keys.
        attended: method -> float32 [rows, cols], attended share of the cell's visible pairs.
        kept: method -> float32 [rows, cols], the part of `truth` that lies on attended pairs.
        density: method -> share of visible pairs attended by this head.
    """

    title: str
    caption: str
    truth: Tensor
    visible: Tensor
    attended: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    density: dict[str, float] = field(default_factory=dict)

    def recall(self, name: str) -> float:
        """Share of the head's attention mass that a pattern holds."""
        return (self.kept[name].sum() / self.truth.sum()).item()


@dataclass(eq=False)
class _Pick:
    score: float
    layer: int
    head: int
    caption: str
    num_heads: int
    q: Tensor
    k: Tensor
    scale: float
    patterns: dict[str, SparseLayout]


class HeadPicker:
    """Sees every layer once and keeps, for each kind of attention, the head that shows it best."""

    KINDS = ("sink", "local", "far")

    def __init__(self, samples: int = 64) -> None:
        self.samples = samples
        self.best: dict[str, _Pick] = {}

    def offer(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        scale: float,
        patterns: Mapping[str, SparseLayout | HeadPatterns],
    ) -> None:
        """q: [1, Hq, L, D]; k: [1, Hkv, L, D]; lse: dense, [1, Hq, L]; patterns: method -> layout. Causal."""
        group = q.shape[1] // k.shape[1]
        shares = self._shares(q[0], k[0].repeat_interleave(group, 0), lse[0], scale)
        for kind, share in zip(self.KINDS, shares, strict=True):
            head = int(share.argmax())
            score = share[head].item()
            if kind not in self.best or score > self.best[kind].score:
                caption = ", ".join(
                    f"{s[head]:.0%} {name}"
                    for s, name in zip(shares, ("first tokens", "local", "far"), strict=True)
                )
                self.best[kind] = _Pick(
                    score, layer, head, caption, q.shape[1], q[0, head].clone(), k[0, head // group].clone(),
                    scale, {name: _of_head(x, head) for name, x in patterns.items()},
                )  # fmt: skip

    def _shares(self, q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean attention mass, over sampled queries of the later half, on the first keys, on the nearest
        sixteenth, and on the rest: three float32 [Hq]."""
        L = q.shape[1]
        rows = torch.linspace(L // 2, L - 1, min(self.samples, max(L // 2, 1)), device=q.device).long()
        p = torch.exp(q[:, rows].float() @ k.float().mT * scale - lse[:, rows, None])
        keys = torch.arange(L, device=q.device)
        p = p.masked_fill(keys > rows[:, None], 0.0)
        near = (keys > rows[:, None] - max(L // 16, 1)) & (keys >= SINK_KEYS)
        sink = p[..., :SINK_KEYS].sum(-1).mean(-1)
        local = (p * near).sum(-1).mean(-1)
        return sink, local, 1 - sink - local

    def pictures(self) -> list[Picture]:
        titles = {"sink": "A sink head", "local": "A local head", "far": "A far-reaching head"}
        result = []
        for kind in self.KINDS:
            if kind in self.best:
                pick = self.best[kind]
                result.append(
                    draw_head(
                        f"{titles[kind]}: layer {pick.layer}, head {pick.head}", pick.caption, pick.q, pick.k,
                        pick.scale, pick.patterns, pick.head, pick.num_heads, is_causal=True,
                    )
                )  # fmt: skip
        return result


def _of_head(pattern: SparseLayout | HeadPatterns, head: int) -> SparseLayout:
    """A layout to look the head up in; one with a single head serves for any."""
    return pattern.of_head(head) if isinstance(pattern, HeadPatterns) else pattern


def draw_head(
    title: str,
    caption: str,
    q: Tensor,
    k: Tensor,
    scale: float,
    patterns: dict[str, SparseLayout],
    head: int,
    num_heads: int,
    *,
    is_causal: bool,
) -> Picture:
    """Pool the dense attention of one query head of `num_heads`, and its patterns. q: [L, D]; k: [S, D]."""
    L, S = q.shape[0], k.shape[0]
    cell = ceil(max(L, S) / GRID)
    shape = (ceil(L / cell), ceil(S / cell))
    picture = Picture(title, caption, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    for name, layout in patterns.items():
        per_head = layout.density(is_causal, per_head=True)[0]
        picture.density[name] = per_head[head * len(per_head) // num_heads].item()
        picture.attended[name], picture.kept[name] = torch.zeros(shape), torch.zeros(shape)
    keys = torch.arange(S, device=q.device)
    for r in range(shape[0]):
        queries = torch.arange(r * cell, min((r + 1) * cell, L), device=q.device)
        scores = q[queries].float() @ k.float().mT * scale
        seen = torch.ones_like(scores, dtype=torch.bool)
        if is_causal:
            seen = keys <= queries[:, None] + S - L
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1) / len(queries)
        count = _pool(seen.float(), cell)
        picture.truth[r], picture.visible[r] = _pool(p, cell).cpu(), (count > 0).cpu()
        for name, layout in patterns.items():
            tokens = _token_rows(layout, head, num_heads, queries, is_causal)
            picture.attended[name][r] = (_pool(tokens.float(), cell) / count.clamp(min=1)).cpu()
            picture.kept[name][r] = _pool(p * tokens, cell).cpu()
    return picture


def _token_rows(layout: SparseLayout, head: int, num_heads: int, queries: Tensor, is_causal: bool) -> Tensor:
    """bool [queries, S]: the keys that each of these consecutive queries attends in one query head. (The
    layout may hold one head for all, or one for each group.)"""
    first, last = int(queries[0]), int(queries[-1])
    parts = []
    for i in range(first // layout.block_m, last // layout.block_m + 1):
        rows = layout.token_rows(i, is_causal)[0]
        start = i * layout.block_m
        parts.append(rows[head * len(rows) // num_heads, max(first - start, 0) : last + 1 - start])
    return torch.cat(parts)


def _pool(x: Tensor, cell: int) -> Tensor:
    """[queries, S] -> [ceil(S / cell)], summed."""
    x = torch.nn.functional.pad(x.sum(0), (0, -x.shape[-1] % cell))
    return x.view(-1, cell).sum(-1)
