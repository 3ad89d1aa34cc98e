"""Lists of single keys, collected from boolean matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList


class ListFiller:
    """Collects boolean matrices [G, S] as rows of one `IndexList`."""

    def __init__(self, width: int, capacity: int | None, device: torch.device):
        self.capacity = capacity
        self.numbers = torch.arange(width, dtype=torch.int32, device=device)
        self.counts: list[Tensor] = []
        self.parts: list[Tensor] = []
        if capacity is not None:
            self.used = torch.zeros((), dtype=torch.int64, device=device)
            self.indices = torch.zeros(capacity + 1, dtype=torch.int32, device=device)

    def append(self, mask: Tensor) -> None:
        self.counts.append(mask.sum(-1))
        if self.capacity is None:
            self.parts.append(mask.nonzero()[:, 1].to(torch.int32))
            return
        # Positions past the capacity, and the places of what is not listed, fall on the spare entry.
        slot = torch.cumsum(mask.flatten(), 0) + (self.used - 1)
        slot = slot.masked_fill_(~mask.flatten(), self.capacity).clamp_(max=self.capacity)
        self.indices.scatter_(0, slot, self.numbers.expand_as(mask).reshape(-1))
        self.used += self.counts[-1].sum()

    def finish(self, group: int) -> IndexList:
        counts = torch.cat(self.counts)
        offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        if self.capacity is not None:
            return IndexList(offsets, self.indices[:-1], group)
        indices = torch.cat(self.parts)
        return IndexList(offsets, indices if indices.numel() else self.numbers[:1], group)


def work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
