"""Compressed rows of ascending indices, built and searched on the device.

An `IndexList` is the CSR half of a boolean matrix: row r holds the numbers
`indices[offsets[r]:offsets[r + 1]]`. Nothing in this file synchronises with the host when a
`capacity` is given, so that every builder can run inside a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 22  # mask elements or entries handled at once, to bound the memory of 64-bit slots


@dataclass(frozen=True, eq=False)
class IndexList:
    """Rows of strictly ascending int32 indices.

    Attributes:
        offsets: int64 [rows + 1], ascending, `offsets[0] == 0`.
        indices: int32 [capacity], capacity >= 1. Entries from `offsets[-1]` on are never read.
        group: number of consecutive query blocks that share one row.
        needed: int64 [], how many entries the builder wanted to store, where it was given a capacity:
            more than `capacity` means that entries were lost, which `SparseLayout.check` reports.
    """

    offsets: Tensor
    indices: Tensor
    group: int = 1
    needed: Tensor | None = None

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
            capacity: size of `indices`. Given: no host synchronisation; true positions past the
                capacity are lost from the end (`SparseLayout.check` reports it), and no offset points
                past the memory. None: exact size.
        """
        rows, width = mask.shape
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(-1), 0, out=offsets[1:])
        needed = None if capacity is None else offsets[-1].clone()
        capacity = max(int(offsets[-1]) if capacity is None else capacity, 1)
        # One more slot takes what does not count, so that nothing depends on how much that is.
        indices = torch.zeros(capacity + 1, dtype=torch.int32, device=mask.device)
        step = max(_CHUNK // max(width, 1), 1)
        numbers = torch.arange(width, dtype=torch.int32, device=mask.device)
        for start in range(0, rows, step):
            part = mask[start : start + step]
            slot = torch.cumsum(part, -1).add_(offsets[start : start + part.shape[0], None] - 1)
            slot.masked_fill_(~part, capacity).clamp_(max=capacity)
            indices.scatter_(0, slot.flatten(), numbers.expand(part.shape).reshape(-1))
        return IndexList(offsets.clamp_(max=capacity), indices[:capacity], group, needed)

    @staticmethod
    def from_counts(counts: Tensor, indices: Tensor, *, group: int = 1) -> IndexList:
        """Build from padded rows; synchronises.

        Args:
            counts: integer [rows], how many leading entries of a row count.
            indices: integer [rows, width], ascending in each row as far as they count.
            group: stored on the list.
        """
        width = indices.shape[-1]
        keep = torch.arange(width, device=counts.device) < counts[:, None]
        offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(keep.sum(-1), 0, out=offsets[1:])
        flat = indices[keep].to(torch.int32)
        return IndexList(offsets, flat if flat.numel() else flat.new_zeros(1), group)

    def row_of_entry(self, start: int = 0, stop: int | None = None) -> Tensor:
        """int64 [stop - start]: the row of each entry from `start` to `stop` (default: all of them);
        `rows` for unused entries."""
        stop = self.capacity if stop is None else stop
        entry = torch.arange(start, stop, device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), entry, right=True)

    def rows_between(self, start: int, stop: int) -> IndexList:
        """Rows start .. stop - 1 as a list of their own (shares memory; synchronises)."""
        first, last = self.offsets[start], self.offsets[stop]
        indices = self.indices[int(first) : int(last)]
        if not indices.numel():
            indices = self.indices.new_zeros(1)
        return IndexList(self.offsets[start : stop + 1] - first, indices, self.group)

    def to_mask(self, width: int) -> Tensor:
        """bool [rows, width], the inverse of `from_mask`."""
        spare = self.rows * width  # takes the unused entries
        mask = torch.zeros(spare + 1, dtype=torch.bool, device=self.offsets.device)
        for start in range(0, self.capacity, _CHUNK):
            stop = min(start + _CHUNK, self.capacity)
            row = self.row_of_entry(start, stop)
            mask.index_fill_(
                0, torch.where(row < self.rows, row * width + self.indices[start:stop], spare), True
            )
        return mask[:-1].view(self.rows, width)

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
        needed = None if self.needed is None else self.needed.to(device)
        return IndexList(self.offsets.to(device), self.indices.to(device), self.group, needed)

    def __repr__(self) -> str:
        shared = f", each shared by {self.group} query blocks" if self.group > 1 else ""
        return f"IndexList({self.rows} rows{shared}, room for {self.capacity} entries, {self.offsets.device})"
