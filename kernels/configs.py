"""Which tile each kernel uses: a small table, no autotuning.

The forward tile is fixed by the layout's block and the dtype alone, never by speed: with a BLASST skip
the tile *is* the vote group (`Plan`), and a call without a skip uses the same tile so that lambda = 0 is
dense bit for bit. Rows set warps, stages and loads; the backward tiles are free.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_TILE = 128  # 16-bit dtypes; larger layout blocks are walked in sub-tiles
MAX_TILE_FP32 = 64  # fp32 operands: a 128 x 128 tile at D 128 does not fit in shared memory


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, pipeline stages, tensor-descriptor loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False
    warp_specialize: bool = False


def max_tile(itemsize: int) -> int:
    return MAX_TILE_FP32 if itemsize > 2 else MAX_TILE


def forward_tile(itemsize: int, head_dim: int, block_m: int, block_n: int, merged: bool) -> Tile:
    """The forward tile.

    Args:
        itemsize: bytes of an element.
        head_dim: the larger of D and Dv, padded to a power of two.
        block_m, block_n: of the layout.
        merged: several query blocks share a tile (`sparse_attn.schedule`).
    """
    top = max_tile(itemsize)
    tile_m, tile_n = MAX_TILE if merged else min(block_m, top), min(block_n, top)
    if itemsize > 2:
        return Tile(tile_m, tile_n, 4 if tile_m * tile_n <= 2048 else 8, 1)
    wide = tile_m * tile_n * head_dim
    if head_dim > 128:
        return Tile(tile_m, tile_n, 8 if tile_m == 128 else 4, 1 if wide > 128 * 64 * 256 else 2)
    return Tile(tile_m, tile_n, 8 if tile_m == 128 else 4, 2 if tile_n == 128 else 3)


def dq_tile(itemsize: int, head_dim: int, block_m: int, block_n: int, merged: bool) -> Tile:
    """The tile of the dq kernel."""
    if itemsize > 2:
        return Tile(min(block_m, 32), min(block_n, 32), 4, 1)
    tile_m = MAX_TILE if merged else min(block_m, 128 if head_dim <= 128 else 64)
    tile_n = min(block_n, 64 if head_dim <= 128 else 32)
    return Tile(tile_m, tile_n, 8 if tile_m == 128 else 4, 2)


def dkdv_tile(itemsize: int, head_dim: int, block_m: int, block_n: int, merged: bool) -> Tile:
    """The tile of the dk/dv kernel."""
    if itemsize > 2:
        return Tile(min(block_m, 32), min(block_n, 32), 4, 1)
    tile_n = MAX_TILE if merged else min(block_n, 128 if head_dim <= 128 else 64)
    tile_m = min(block_m, 64 if head_dim <= 128 else 32)
    return Tile(tile_m, tile_n, 8 if tile_n == 128 else 4, 2)


def column_tile(itemsize: int, head_dim: int) -> int:
    """How many columns are gathered at once."""
    return 32 if itemsize > 2 or head_dim > 128 else 64
