"""Layouts that depend on shapes alone: one list for each distinct head, joined, and kept in a cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout


def join_heads(lists: Sequence[IndexList], list_of_head: Sequence[int]) -> IndexList:
    """The rows of every head, one head after the other.

    Args:
        lists: the distinct lists, all on one device; entries past a list's end are left out.
        list_of_head: for each head, which of `lists` it takes.
    """
    used = [int(rows.offsets[-1]) for rows in lists]
    lengths = torch.cat([lists[n].lengths for n in list_of_head])
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    indices = torch.zeros(
        max(sum(used[n] for n in list_of_head), 1), dtype=torch.int32, device=lengths.device
    )
    start = 0
    for n in list_of_head:
        indices[start : start + used[n]] = lists[n].indices[: used[n]]
        start += used[n]
    return IndexList(offsets, indices, lists[0].group)


class LayoutLru:
    """A thread-safe cache of layouts, least recently used first out, bounded by their bytes.

    A bound on bytes rather than on entries: a video model holds one small layout a layer, a language
    model one large layout for all layers.

    Args:
        max_bytes: what the cached layouts may hold together, with the lists that engines derived
            from them. The newest entry always stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._layouts: OrderedDict[Hashable, SparseLayout] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._layouts)

    def clear(self) -> None:
        with self._lock:
            self._layouts.clear()

    def get(self, key: Hashable, build: Callable[[], SparseLayout]) -> SparseLayout:
        """The layout of `key`, built on the first call.

        The tensors are made outside inference mode, so that a layout first used for inference serves
        training later. Under a fake tensor mode (tracing) nothing is cached.
        """
        if type(torch.empty(0)) is not Tensor:
            return build()
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
                return self._layouts[key]
        with torch.inference_mode(False):
            layout = build()
        with self._lock:
            self._layouts[key] = layout
            sizes = {name: _num_bytes(held) for name, held in self._layouts.items()}
            while len(self._layouts) > 1 and sum(sizes.values()) > self.max_bytes:
                del sizes[self._layouts.popitem(last=False)[0]]
        return layout


def _num_bytes(held: object) -> int:
    """Bytes of the tensors in a layout, its lists, or whatever an engine derived from them."""
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    if is_dataclass(held):
        return sum(_num_bytes(getattr(held, f.name)) for f in fields(held))
    if isinstance(held, dict):
        return sum(_num_bytes(x) for x in held.values())
    if isinstance(held, (tuple, list)):
        return sum(_num_bytes(x) for x in held)
    return 0
