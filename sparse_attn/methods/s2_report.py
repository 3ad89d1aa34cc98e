"""What an S2 pattern covers and saves, for `S2Config.validate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparse_attn.layout import SparseLayout

if TYPE_CHECKING:
    from sparse_attn.methods.s2 import S2Config


@dataclass(frozen=True)
class S2Report:
    """Properties of a pattern at one length; `print` it.

    Attributes:
        config, num_heads, num_kv_heads, length, is_causal: what was asked.
        missing_residues: classes j mod vert_stride of key blocks that, once outside the local window,
            no head reads.
        kv_cache_efficient: once a query block of a key head does not read a key block, no later one
            does, so that its keys and values can be freed (DKernel's condition P[i, j] <= P[i-1, j]).
            False without causality: nothing can be freed.
        kept_per_head: share of the keys that each query head reads at the last position: what a cache
            of its own would keep.
        kept_per_kv_head: the same for each key head, over the union of its query heads.
        density_per_head: attended (query, key) pairs over the pairs of dense attention, a query head.
    """

    config: S2Config
    num_heads: int
    num_kv_heads: int
    length: int
    is_causal: bool
    missing_residues: tuple[int, ...]
    kv_cache_efficient: bool
    kept_per_head: tuple[float, ...]
    kept_per_kv_head: tuple[float, ...]
    density_per_head: tuple[float, ...]

    @property
    def union_complete(self) -> bool:
        """Whether every (visible) key is read by at least one head."""
        return not self.missing_residues

    @property
    def density(self) -> float:
        return sum(self.density_per_head) / self.num_heads

    @property
    def kv_kept(self) -> float:
        """Share of the whole layer's keys and values that must be kept at the last position."""
        return sum(self.kept_per_kv_head) / self.num_kv_heads

    def __str__(self) -> str:
        c = self.config
        covers = "yes"
        if self.missing_residues:
            covers = f"NO: blocks j with j mod {c.vert_stride} in {list(self.missing_residues)} are lost"
        efficient = "yes" if self.kv_cache_efficient else "NO: no key block can be freed"
        kept = self.kept_per_kv_head
        return "\n".join(
            [
                f"S2 pattern: block {c.block_size}, local {c.local_blocks}, stride {c.vert_stride}, "
                f"sinks {c.sink_blocks}, dense key heads {c.num_dense_heads}",
                f"  {self.num_heads} query heads, {self.num_kv_heads} key heads, {self.length} tokens, "
                f"{'causal' if self.is_causal else 'bidirectional'}, one pattern a "
                f"{'query' if c.per_query_head else 'key'} head",
                f"  union over heads covers every key  {covers}",
                f"  KV-cache efficient                 {efficient}",
                f"  KV kept, mean over key heads       {self.kv_kept:.1%}  "
                f"({min(kept):.1%} to {max(kept):.1%})",
                f"  KV read, mean over query heads     {sum(self.kept_per_head) / self.num_heads:.1%}",
                f"  density                            {self.density:.4f}  "
                f"({1 / self.density:.1f}x fewer pairs than dense)",
            ]
        )


def report(
    config: S2Config, num_heads: int, num_kv_heads: int | None, length: int, is_causal: bool
) -> S2Report:
    """See `S2Config.validate`."""
    from sparse_attn.methods.s2 import _head_list, missing_residues

    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if length < 1:
        raise ValueError(f"s2_attention: length is {length}; it must be at least 1.")
    shifts = config.shifts(num_heads, num_kv_heads)
    size, cpu = config.block_size, torch.device("cpu")
    layouts = {}
    for shift in dict.fromkeys(shifts):
        rows = _head_list(config, length, length, shift, is_causal, cpu)
        layouts[shift] = SparseLayout(rows, size, size, length, length)
    per_query_head = [shifts[h * len(shifts) // num_heads] for h in range(num_heads)]
    group = num_heads // num_kv_heads
    groups = [per_query_head[n * group : (n + 1) * group] for n in range(num_kv_heads)]
    density = {shift: layout.density(is_causal) for shift, layout in layouts.items()}
    efficient = is_causal and all(is_kv_cache_efficient(layout) for layout in layouts.values())
    return S2Report(
        config, num_heads, num_kv_heads, length, is_causal,
        missing_residues=tuple(missing_residues(config, shifts, length, is_causal)),
        kv_cache_efficient=efficient,
        kept_per_head=tuple(_kept([layouts[x]]) for x in per_query_head),
        kept_per_kv_head=tuple(_kept([layouts[x] for x in set(members)]) for members in groups),
        density_per_head=tuple(density[x] for x in per_query_head),
    )  # fmt: skip


def _kept(layouts: list[SparseLayout]) -> float:
    """Share of the keys that the last query block of any of these one-head layouts reads."""
    first = layouts[0]
    read = set()
    for layout in layouts:
        offsets = layout.blocks.offsets
        read |= set(layout.blocks.indices[offsets[-2] : offsets[-1]].tolist())
    return sum(min(first.block_n, first.S - j * first.block_n) for j in read) / first.S


def is_kv_cache_efficient(layout: SparseLayout) -> bool:
    """Whether, going down a column of the block mask below the diagonal, a key block that is not read
    is never read again: then a cache can free it (DKernel's condition).

    If every pattern of a group of query heads has the property, so has their union.

    Args:
        layout: L == S, square blocks, no columns; entries above the diagonal are ignored.

    Raises:
        ValueError: another layout.
    """
    if layout.L != layout.S or layout.block_m != layout.block_n or layout.columns is not None:
        raise ValueError(
            "is_kv_cache_efficient: needs a layout with L == S, block_m == block_n and no columns."
        )
    rows, width = layout.blocks, layout.num_key_blocks
    row = rows.row_of_entry()[: int(rows.offsets[-1])]
    index = rows.indices[: row.numel()].long()
    below = index < row % layout.num_query_blocks
    row, index = row[below] - 1, index[below]
    found = rows.lower_bound(row, index + 1, width) > rows.lower_bound(row, index, width)
    return bool(found.all())
