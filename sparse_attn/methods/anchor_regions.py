"""Where AnchorAttention's anchor lies, and what remains for its lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList


@dataclass(frozen=True)
class AnchorRegions:
    """The geometry of one call, in plain numbers.

    Query i stands at key position i + shift, shift = S - L. Superblock g holds the queries from
    `g * step * block` on; its first query stands at p. Then, in key blocks:

    * the first `init_blocks`, as far as they lie before the rest;
    * from `first_local(g)` = p // block - local_blocks up to the diagonal;
    * what lies between the two is offered to the list of the superblock, and lies wholly before p.

    Attributes:
        L, S: query and key length. block: `block_size`. step, init_blocks, local_blocks: as in
            `anchor_attention`.
    """

    L: int
    S: int
    block: int
    step: int
    init_blocks: int
    local_blocks: int = 1

    @property
    def shift(self) -> int:
        return self.S - self.L

    @property
    def num_query_blocks(self) -> int:
        return -(-self.L // self.block)

    @property
    def num_superblocks(self) -> int:
        return -(-self.num_query_blocks // self.step)

    def first_local(self, g: int) -> int:
        """First key block of the neighbourhood of superblock g."""
        return max((g * self.step * self.block + self.shift) // self.block - self.local_blocks, 0)

    def init_end(self, g: int) -> int:
        """End of the first key blocks, before the neighbourhood, of superblock g."""
        return min(self.init_blocks, self.first_local(g))

    def offered_keys(self, g: int) -> range:
        """The key positions that superblock g may list."""
        return range(self.init_end(g) * self.block, self.first_local(g) * self.block)

    @property
    def offered(self) -> int:
        """Keys offered, summed over the superblocks."""
        return sum(len(self.offered_keys(g)) for g in range(self.num_superblocks))

    def query_blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (query block, its superblock, its first query, one past its last)."""
        for i in range(self.num_query_blocks):
            yield i, i // self.step, i * self.block, min((i + 1) * self.block, self.L)

    def offered_per_query_block(self, device: torch.device) -> Tensor:
        """int64 [Lb]: how many keys the superblock of each query block is offered."""
        first_local, init_end = self._edges(device)
        return (first_local - init_end) * self.block

    def _edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`first_local` and `init_end` of the superblock of each query block: int64 [Lb]."""
        superblock = torch.arange(self.num_query_blocks, device=device) // self.step
        position = superblock * self.step * self.block + self.shift
        at = torch.div(position, self.block, rounding_mode="floor")
        first_local = (at - self.local_blocks).clamp(min=0)
        return first_local, first_local.clamp(max=self.init_blocks)

    def block_list(self, copies: int, device: torch.device) -> tuple[IndexList, Tensor]:
        """The anchor as block rows, once for each of `copies` heads, and its `block_bounds(True)`.
        Remembered from call to call."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing:
            # What is made here belongs to the graph (traced tensors; memory that only a replay fills).
            return self._block_list(copies, device)
        return _remembered_block_list(self, copies, device)

    def _block_list(self, copies: int, device: torch.device) -> tuple[IndexList, Tensor]:
        first_local, init_end = self._edges(device)
        first_query = torch.arange(self.num_query_blocks, device=device) * self.block
        last_query = (first_query + self.block - 1).clamp(max=self.L - 1)
        end = torch.div(last_query + self.shift, self.block, rounding_mode="floor") + 1
        # Leading blocks that every query of the row sees whole: the causal edge cuts none of them.
        whole = torch.div(first_query + self.shift + 1, self.block, rounding_mode="floor")
        count = init_end + (end - first_local).clamp(min=0)
        uncut = (init_end + (whole - first_local).clamp(min=0)).minimum(count)

        total = sum(self._row_length(i, g, stop) for i, g, _, stop in self.query_blocks())
        starts = torch.zeros(self.num_query_blocks + 1, dtype=torch.int64, device=device)
        torch.cumsum(count, 0, out=starts[1:])
        entry = torch.arange(max(total, 1), device=device)
        row = torch.searchsorted(starts[1:].contiguous(), entry, right=True).clamp(max=len(count) - 1)
        within = entry - starts[row]
        jump = torch.where(within < init_end[row], 0, first_local[row] - init_end[row])
        indices = (within + jump).to(torch.int32)

        head = torch.arange(copies, device=device)[:, None] * total
        offsets = torch.cat([(head + starts[:-1]).flatten(), head[-1] + starts[-1:]])
        bounds = torch.stack([uncut, count], -1).to(torch.int32)
        return IndexList(offsets, indices.repeat(copies)), bounds.repeat(copies, 1)

    def _row_length(self, i: int, g: int, stop: int) -> int:
        end = (stop - 1 + self.shift) // self.block + 1
        return self.init_end(g) + max(end - self.first_local(g), 0)


@lru_cache(maxsize=16)
def _remembered_block_list(
    regions: AnchorRegions, copies: int, device: torch.device
) -> tuple[IndexList, Tensor]:
    # Tensors made under inference_mode could not serve a later call that needs gradients.
    with torch.inference_mode(False):
        return regions._block_list(copies, device)
