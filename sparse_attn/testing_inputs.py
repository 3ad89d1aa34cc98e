"""Seeded inputs and layouts for tests and benchmarks (the first part of `sparse_attn.testing`)."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout

STRIDES = ("contiguous", "blhd", "sliced", "packed")
LAYOUT_KINDS = (
    "full", "window", "strided", "random", "empty_rows", "full_rows", "one_column", "columns", "only_columns",
)  # fmt: skip


def make_inputs(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    L: int = 127,
    S: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    strides: str = "contiguous",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal query [B, Hq, L, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv].

    Args:
        kv_heads: default `heads`. S: default L. value_dim: default `head_dim`.
        strides: how the tensors lie in memory. "contiguous"; "blhd": (B, L, H, D) seen through
            `transpose(1, 2)`; "sliced": a window of a larger NaN-filled tensor, so that a read out of
            bounds shows; "packed": as "blhd" with padding between heads, as in a fused projection.
        requires_grad: make all three leaves that require gradients.

    Raises:
        ValueError: unknown `strides`.
    """
    kv_heads, S = kv_heads or heads, S or L
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, L, head_dim), (batch, kv_heads, S, head_dim)]
    shapes.append((batch, kv_heads, S, value_dim or head_dim))
    made = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        made.append(with_strides(x, strides).requires_grad_(requires_grad))
    return made[0], made[1], made[2]


def with_strides(x: Tensor, strides: str) -> Tensor:
    """The same numbers, laid out in memory as `make_inputs` names it; the last stride stays 1."""
    B, H, length, dim = x.shape
    if strides == "contiguous":
        return x.contiguous()
    if strides == "blhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        room = x.new_full((B, H + 1, length + 3, dim + 8), torch.nan)
        room[:, :H, 2 : length + 2, :dim] = x
        return room[:, :H, 2 : length + 2, :dim]
    if strides == "packed":
        room = x.new_full((B, length, H, 2 * dim), torch.nan)
        room[..., :dim] = x.transpose(1, 2)
        return room[..., :dim].transpose(1, 2)
    raise ValueError(f"with_strides: unknown strides {strides!r}; choose one of {', '.join(STRIDES)}.")


def random_layout(
    kind: str,
    L: int,
    S: int,
    *,
    block_m: int = 32,
    block_n: int = 32,
    batch: int = 1,
    heads: int = 1,
    density: float = 0.4,
    column_group: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SparseLayout:
    """A seeded layout of one kind, already checked.

    Args:
        kind: "full", "window" (causal, one block to the left), "strided" (S2), "random" (each block
            with probability `density`), "empty_rows" and "full_rows" (random with about half of the
            rows empty, or full), "one_column" (no blocks, one key a row), "columns" (random blocks
            and, over the rest, random columns shared by `column_group` query blocks),
            "only_columns" (as "columns", without blocks).
        batch, heads: B' and H' of the layout. "full" and "window" repeat one pattern over them.

    Raises:
        ValueError: unknown kind.
    """
    Lb, Sb = ceil(L / block_m), ceil(S / block_n)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(batch, heads, *shape, generator=generator)

    size = {"block_m": block_m, "block_n": block_n, "L": L, "S": S}
    mask, columns = draw(Lb, Sb) < density, None
    some_rows = draw(Lb, 1) < 0.5
    some_rows[..., -1, :] = True  # the last row is always of the named kind, even where Lb == 1
    if kind == "full":
        mask = torch.ones_like(mask)
    elif kind == "window":
        window = SparseLayout.window(L, S, block_m=block_m, block_n=block_n, left=1)
        mask = window.block_mask().expand_as(mask)
    elif kind == "strided":
        position = torch.arange(Lb)[:, None] * block_m // block_n - torch.arange(Sb)
        head = torch.arange(heads)[:, None, None]
        mask = ((position >= 0) & (position < 2)) | ((torch.arange(Sb) + head) % 3 == 0)
        mask = mask.expand(batch, heads, Lb, Sb)
    elif kind == "empty_rows":
        mask = mask & ~some_rows
    elif kind == "full_rows":
        mask = mask | some_rows
    elif kind == "one_column":
        mask = torch.zeros_like(mask)
        key = torch.randint(S, (batch, heads, ceil(Lb / column_group), 1), generator=generator)
        columns = torch.zeros(*key.shape[:3], S, dtype=torch.bool).scatter_(3, key, True)
    elif kind in ("columns", "only_columns"):
        mask = mask if kind == "columns" else torch.zeros_like(mask)
        columns = _free_of_blocks(draw(ceil(Lb / column_group), S) < 0.3, mask, block_n, column_group)
    elif kind != "random":
        raise ValueError(f"random_layout: unknown kind {kind!r}; choose one of {', '.join(LAYOUT_KINDS)}.")
    layout = SparseLayout.from_dense_mask(mask, columns=columns, column_group=column_group, **size)
    return layout.to(device).check()


def _free_of_blocks(columns: Tensor, mask: Tensor, block_n: int, group: int) -> Tensor:
    """Leave out the columns inside a block that any query block of the group reads (invariant 4)."""
    rows, S = columns.shape[2:]
    padded = torch.nn.functional.pad(mask, (0, 0, 0, rows * group - mask.shape[2]))
    read = padded.unflatten(2, (rows, group)).any(3)
    return columns & ~read[..., torch.arange(S) // block_n]
