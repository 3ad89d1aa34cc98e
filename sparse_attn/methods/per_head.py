"""Layouts that depend on shapes alone: one list for each distinct head, joined, and kept in a cache.

Under `torch.compile` such a layout is a constant of the graph. It enters as the result of an operator,
`sparse_attn::layout_lists`, whose arguments name the builder and its arguments as text: a graph that is
saved and loaded in another process finds or builds the same layout there.
"""

from __future__ import annotations

import ast
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout

MAX_LAYOUTS = 256


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

    The bound is one of bytes, since a video model holds one small layout a layer, a language model one
    large layout for all layers. At most `MAX_LAYOUTS` stay in any case: decoding makes one a token.

    Args:
        max_bytes: what the cached layouts may hold together, with the lists that engines derived
            from them. The newest entry always stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._layouts: OrderedDict[Hashable, SparseLayout] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._layouts)

    def clear(self) -> None:
        with self._lock:
            self._layouts.clear()
            self._sizes.clear()

    def get(self, key: Hashable, build: Callable[[], SparseLayout]) -> SparseLayout:
        """The layout of `key`, built on the first call.

        The tensors are made outside inference mode, so that a layout first used for inference serves
        training later, and outside any tracing, so that they are real.
        """
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
                return self._layouts[key]
        with torch.inference_mode(False), _disable_current_modes(), torch._C.DisableTorchFunction():
            layout = build()
        with self._lock:
            if self._layouts:
                # By now the engines have derived their lists from the one used last: measure it again.
                used_last = next(reversed(self._layouts))
                self._sizes[used_last] = _num_bytes(self._layouts[used_last])
            self._layouts[key], self._sizes[key] = layout, _num_bytes(layout)
            while len(self) > 1 and (len(self) > MAX_LAYOUTS or sum(self._sizes.values()) > self.max_bytes):
                del self._sizes[self._layouts.popitem(last=False)[0]]
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


# -- constants of compiled graphs -----------------------------------------------------------------

_MAKERS: dict[str, tuple[Callable[..., SparseLayout], LayoutLru]] = {}


def register_maker(name: str, build: Callable[..., SparseLayout], max_bytes: int) -> None:
    """Make `shape_layout(name, ...)` known.

    Args:
        build: (*args, device) -> layout, where args are plain literals (numbers, strings, None, tuples).
        max_bytes: bound on what its cached layouts hold.
    """
    _MAKERS[name] = (build, LayoutLru(max_bytes))


def shape_layout(name: str, args: tuple[Any, ...], device: torch.device, is_causal: bool) -> SparseLayout:
    """The layout that a registered builder makes of `args`, from its cache where it was made before.

    Args:
        is_causal: how the layout will be attended; in a compiled graph the bounds for it come along.
    """
    if not torch.compiler.is_compiling() and type(torch.empty(0)) is Tensor:
        return _make(name, args, device)
    # Traced by Dynamo, by export, or under a fake tensor mode.
    shape, sizes, text = _constants(name, args)
    block_m, block_n, L, S, heads, group, alike = shape
    offsets, indices, bounds, *column_parts = torch.ops.sparse_attn.layout_lists(
        name, text, sizes, is_causal, device
    )
    cache: dict[Any, Any] = {("block_bounds", is_causal): bounds}
    columns = None
    if group:
        columns = IndexList(column_parts[0], column_parts[1], group)
        cache[("column_bounds", is_causal)] = column_parts[2]
    blocks = IndexList(offsets, indices)
    return SparseLayout(blocks, block_m, block_n, L, S, 1, heads, columns, cache, alike)


def _make(name: str, args: tuple[Any, ...], device: torch.device) -> SparseLayout:
    build, cache = _MAKERS[name]
    return cache.get((args, device), lambda: build(*args, device=device))


def _constants(name: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int], str]:
    """What a graph must know of a layout: its shape, the sizes of its tensors, its arguments as text."""
    layout = _make(name, args, torch.device("cpu"))
    columns = layout.columns
    shape = (
        layout.block_m, layout.block_n, layout.L, layout.S, layout.heads,
        0 if columns is None else columns.group, layout.neighbours_alike,
    )  # fmt: skip
    sizes = [layout.blocks.rows, layout.blocks.capacity]
    sizes += [0, 0] if columns is None else [columns.rows, columns.capacity]
    return shape, sizes, repr(args)


# What torch.compiler.assume_constant_result sets; calling it would import Dynamo with this module.
_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


torch.library.define(
    "sparse_attn::layout_lists",
    "(str name, str args, int[] sizes, bool is_causal, Device device)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _layout_lists(name, args, sizes, is_causal, device):
    layout = _make(name, ast.literal_eval(args), device)
    parts = [layout.blocks.offsets, layout.blocks.indices, layout.block_bounds(is_causal)]
    if layout.columns is not None:
        parts += [layout.columns.offsets, layout.columns.indices, layout.column_bounds(is_causal)]
    parts += [torch.empty(0, dtype=x.dtype, device=device) for x in parts[: 6 - len(parts)]]
    # A graph may reuse or overwrite what an operator returns; the cached tensors must stay as they are.
    return tuple(x.clone() for x in parts)


def _layout_lists_fake(name, args, sizes, is_causal, device):
    parts = []
    for rows, capacity in (sizes[:2], sizes[2:]):
        parts += [torch.empty(rows + 1 if capacity else 0, dtype=torch.int64, device=device)]
        parts += [torch.empty(capacity, dtype=torch.int32, device=device)]
        parts += [torch.empty((rows, 2) if capacity else 0, dtype=torch.int32, device=device)]
    return tuple(parts)


torch.library.impl("sparse_attn::layout_lists", "CompositeExplicitAutograd", _layout_lists)
torch.library.register_fake("sparse_attn::layout_lists", _layout_lists_fake)
