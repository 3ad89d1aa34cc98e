"""Compressed rows of ascending indices, built and searched on the device.

An `IndexList` is the CSR half of a boolean matrix: row r holds the numbers
`indices[offsets[r]:offsets[r + 1]]`. Nothing in this file synchronises with the host when a
`capacity` is given, so that every builder can run inside a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class IndexList:
    """Rows of strictly ascending int32 indices.

    Attributes:
        offsets: int64 [rows + 1], ascending, `offsets[0] == 0`.
        indices: int32 [capacity], capacity >= 1. Entries from `offsets[-1]` on are never read.
        group: number of consecutive query blocks that share one row.
    """

    offsets: Tensor
    indices: Tensor
    group: int = 1

    @property
    def rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def capacity(self) -> int:
        return self.indices.numel()

    @property
    def lengths(self) -> Tensor:
        """int64 [rows]: how many indices each row holds."""
        return self.offsets[1:] - self.offsets[:-1]

    @staticmethod
    def from_mask(mask: Tensor, *, group: int = 1, capacity: int | None = None) -> IndexList:
        """Build from a boolean matrix.

        Args:
            mask: bool [rows, width]; the true positions of a row become its indices.
            group: stored on the list.
            capacity: size of `indices`. Given: no host synchronisation, and true positions past
                the capacity are lost (`SparseLayout.check` reports them). None: exact size.
        """
        rows, width = mask.shape
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(-1), 0, out=offsets[1:])
        if capacity is None:
            positions = mask.nonzero()[:, 1].to(torch.int32)
            if positions.numel() == 0:
                positions = positions.new_zeros(1)
            return IndexList(offsets, positions, group)
        capacity = max(capacity, 1)
        rank = torch.cumsum(mask, -1, dtype=torch.int32).sub_(1)
        slot = (offsets[:-1, None] + rank).masked_fill_(~mask, capacity).clamp_(max=capacity)
        indices = torch.zeros(capacity + 1, dtype=torch.int32, device=mask.device)
        numbers = torch.arange(width, dtype=torch.int32, device=mask.device).expand(rows, width)
        indices.scatter_(0, slot.flatten(), numbers.reshape(-1))
        return IndexList(offsets, indices[:capacity], group)

    @staticmethod
    def from_counts(counts: Tensor, indices: Tensor, *, group: int = 1) -> IndexList:
        """Build from padded rows: counts int [rows], indices int [rows, width] ascending."""
        width = indices.shape[-1]
        keep = torch.arange(width, device=counts.device) < counts[:, None]
        offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        flat = indices[keep].to(torch.int32)
        return IndexList(offsets, flat if flat.numel() else flat.new_zeros(1), group)

    def row_of_entry(self) -> Tensor:
        """int64 [capacity]: the row of each entry; `rows` for unused entries."""
        entry = torch.arange(self.capacity, device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), entry, right=True)

    def to_mask(self, width: int) -> Tensor:
        """bool [rows, width], the inverse of `from_mask`."""
        row = self.row_of_entry()
        slot = torch.where(row < self.rows, row * width + self.indices, self.rows * width)
        mask = torch.zeros(self.rows * width + 1, dtype=torch.bool, device=self.offsets.device)
        return mask.index_fill_(0, slot, True)[:-1].view(self.rows, width)

    def lower_bound(self, row: Tensor, value: Tensor, width: int) -> Tensor:
        """How many indices of `row` are below `value`: int64, the shape of `row`.

        Args:
            row: int64 [...], which row to search.
            value: int64 [...], broadcastable to `row`.
            width: an upper bound on a row's length; sets the number of steps.
        """
        low, high = self.offsets[row], self.offsets[row + 1]
        start = low
        for _ in range(max(width, 1).bit_length()):
            middle = (low + high) >> 1
            below = self.indices[middle.clamp(max=self.capacity - 1)] < value
            go_up, active = below & (low < high), low < high
            low = torch.where(go_up, middle + 1, low)
            high = torch.where(active & ~go_up, middle, high)
        return low - start

    def transpose(self, rows_per_group: int, width: int) -> IndexList:
        """Swap rows and indices within each group of `rows_per_group` rows.

        Row `g * rows_per_group + i` holding j becomes row `g * width + j` holding i, ascending.
        """
        row = self.row_of_entry()
        num_groups = self.rows // rows_per_group
        group_number = torch.div(row, rows_per_group, rounding_mode="floor")
        key = torch.where(row < self.rows, group_number * width + self.indices, num_groups * width)
        key, order = torch.sort(key, stable=True)
        bounds = torch.arange(num_groups * width + 1, device=key.device)
        offsets = torch.searchsorted(key, bounds)
        return IndexList(offsets, (row[order] % rows_per_group).to(torch.int32))

    def to(self, device: torch.device | str) -> IndexList:
        return IndexList(self.offsets.to(device), self.indices.to(device), self.group)
