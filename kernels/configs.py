"""Which tile each kernel uses: a small table, no autotuning.

The forward tile is fixed by the layout's block and the dtype alone, never by speed: with a BLASST skip
the block *is* the vote group (`Plan`), and a call without a skip walks the same tiles so that lambda = 0
is dense bit for bit. Rows set warps and stages; the backward tiles are free.

The numbers in the comments are TFLOPS of executed matrix products on one H100 80GB HBM3 (torch 2.11,
Triton 3.6), bf16, random 128 x 128 lists of density 0.25 unless said; the run is in docs/perf_log.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_attn.schedule import MERGED_TILE

MAX_TILE = 128  # 16-bit dtypes; larger layout blocks are walked in sub-tiles
MAX_TILE_FP32 = 64  # fp32 operands: a 128 x 128 tile at D 128 does not fit in shared memory
MAX_KEYS = 64  # keys of a tile; a block of 128 keys is two sub-tiles


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def max_block_with_skip(itemsize: int) -> int:
    """The largest block that a BLASST vote can cover: the scores of the whole block are held at once."""
    return MAX_TILE_FP32 if itemsize > 2 else MAX_TILE


def forward_tile(
    itemsize: int, head_dim: int, block_m: int, block_n: int, *, merged: bool, skips: bool, tma: bool
) -> Tile:
    """The forward tile.

    Args:
        itemsize: bytes of an element.
        head_dim: the larger of D and Dv, padded to a power of two.
        block_m, block_n: of the layout.
        merged: several query blocks share a tile (`sparse_attn.schedule`).
        skips: with a BLASST skip.
        tma: loads go through tensor descriptors (Hopper and later).
    """
    top = max_block_with_skip(itemsize)
    tile_m, tile_n = MERGED_TILE if merged else min(block_m, top), min(block_n, MAX_KEYS)
    if itemsize > 2:
        return Tile(tile_m, tile_n, 4 if tile_m * tile_n <= 2048 else 8, 1)
    if tile_m < 128:
        # Three stages at D 128 are 112 KB: two programs an SM, which hide each other's softmax.
        return Tile(tile_m, tile_n, 4, 3 if head_dim <= 128 else 2)
    if skips:  # two score tiles are live; 1 stage: 240 TFLOPS against 421, 3: 420 (causal, S 16384)
        return Tile(tile_m, tile_n, 8, 2 if head_dim <= 128 else 1)
    if head_dim > 128:  # 486; 64 x 64, 4 warps: 356; 1 stage: 336
        return Tile(tile_m, tile_n, 8, 2)
    if head_dim <= 64 or not tma:  # D 64: 381; 4 warps, 2 stages: 342; 3 stages: 369
        return Tile(tile_m, tile_n, 8, 3)
    # D 128: 537. Two programs of 4 warps an SM. 8 warps, one program: 441; 128 keys, 8 warps: 489. Without
    # descriptors the addresses do not fit in the registers beside a 128 x 128 accumulator.
    return Tile(tile_m, tile_n, 4, 2)


def dq_tile(itemsize: int, head_dim: int, block_m: int, block_n: int, *, merged: bool, tma: bool) -> Tile:
    """The tile of the dq kernel."""
    if itemsize > 2:  # FMA products: 32 x 32 spills nine times as much at D 128 (by the compiler's report)
        return Tile(min(block_m, 32), min(block_n, 16), 4, 1)
    tile_m = MERGED_TILE if merged else min(block_m, 128)
    if head_dim > 128:  # 128 x 32: 433; 64 x 32, 4 warps: 322; 64 x 64: 311
        return Tile(tile_m, min(block_n, 32), 8 if tile_m == 128 else 4, 2)
    if tile_m == 128:  # 627; 2 stages: 550; 64 rows, 4 warps: 609; 128 keys: 544
        return Tile(tile_m, min(block_n, 64), 8, 3 if tma else 2)
    return Tile(tile_m, min(block_n, 64), 4, 2)


def dkdv_tile(itemsize: int, head_dim: int, block_m: int, block_n: int, *, merged: bool, tma: bool) -> Tile:
    """The tile of the dk/dv kernel."""
    if itemsize > 2:  # as for dq
        return Tile(min(block_m, 32), min(block_n, 16), 4, 1)
    tile_n = MERGED_TILE if merged else min(block_n, 64)
    if head_dim > 128:  # two 64 x 256 accumulators: 206; 4 warps: 82; 64 queries, 1 stage: 169
        return Tile(min(block_m, 32), tile_n, 8 if tile_n == 64 else 4, 2)
    # D 128: 579; 128 keys, 8 warps: 533. D 64: 434; 2 stages: 412; 128 keys, 8 warps: 375.
    return Tile(min(block_m, 64), tile_n, 4, 3 if head_dim <= 64 and tma else 2)


def column_tile(itemsize: int, head_dim: int) -> int:
    """How many columns are gathered at once."""
    return 32 if itemsize > 2 or head_dim > 128 else 64
