"""Small pictures of what heads attend to, and of what each candidate keeps, for the report."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from sparse_attn.attend import Attended
from sparse_attn.layout import SparseLayout
from sparse_attn.plan import Plan
from sparse_attn.recipe_files import write_whole
from sparse_attn.scoring import block_mass
from sparse_attn.search.measure import Call

GRID = 32  # cells a side
LOWEST = 1e-4  # of a query's mass in a cell: drawn white at and below this


def attention_map(call: Call, reference: Attended) -> np.ndarray:
    """uint8 [heads, GRID, GRID]: the attention mass that a query gives to a cell, on a logarithmic scale, in
    the first sequence of the batch."""
    m, n = -(-call.q.shape[2] // GRID), -(-call.k.shape[2] // GRID)
    mass = block_mass(
        call.q[:1], call.k[:1], reference.lse[:1], block_m=m, block_n=n, scale=call.scale,
        is_causal=call.is_causal,
    )  # fmt: skip
    level = (mass[0].cpu() / m / LOWEST).clamp(min=1).log() / -math.log(LOWEST)
    return _fit((level.clamp(0, 1) * 255).round()).to(torch.uint8).numpy()


def _fit(grid: Tensor) -> Tensor:
    """Pad to GRID x GRID: short sequences have fewer cells."""
    return torch.nn.functional.pad(grid, (0, GRID - grid.shape[-1], 0, GRID - grid.shape[-2]))


def pattern_map(plan: Plan, result: Attended, heads: int) -> np.ndarray:
    """uint8 [heads, GRID, GRID]: the share of a cell's pairs on a candidate's lists."""
    layout = plan.layout
    blocks = layout.block_mask()[:1] if result.kept is None else result.kept[:1].bool()
    share = adaptive_avg_pool2d(blocks.float(), (GRID, GRID))
    if layout.columns is not None:
        share = share + _columns(layout)
    share = share[0]
    share = share if share.shape[0] == heads else share.repeat_interleave(heads // share.shape[0], 0)
    return (share.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _columns(layout: SparseLayout) -> Tensor:
    mask = layout.column_mask()
    assert mask is not None
    return adaptive_avg_pool2d(mask[:1].float(), (GRID, GRID))


def save_maps(path: Path, maps: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **maps)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())
