"""`LayoutCache`: layouts found at one step of a generation and reused at later ones.

The caller owns the cache: one for each sequence (or batch) being generated. Nothing is kept on
modules or in globals, so two generations cannot see each other's patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from torch import Tensor

from sparse_attn.layout import SparseLayout


@dataclass
class _Entry:
    """What is known of one layer: the last step seen, the call's signature, the layout."""

    step: int = -1
    signature: dict[str, Any] = field(default_factory=dict)
    layout: SparseLayout | None = None


class LayoutCache:
    """One layout a layer, for the length of one generation.

    The life of a layer, as `begin` enforces it:

    * step 0, or a dense step before the last one seen, starts a new generation: the layer's layout
      is dropped, and the shapes may be others than before;
    * within a generation steps only go forward (a step may be repeated), and batch, heads, lengths,
      prompt length and configuration stay the same. Anything else is a mistake that would give a
      wrong pattern without a sound, so it raises ValueError;
    * a sparse step needs the layout that the switch step left.

    Classifier-free guidance runs the model twice a step, on two prompts: use two caches.

    Example:
        >>> cache = LayoutCache()
        >>> for step in range(num_steps):
        ...     out = sparsed_attention(q, k, v, cache=cache, step=step, num_steps=num_steps, prompt_len=900)
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._shared: dict[Hashable, SparseLayout] = {}

    def get(self, layer: int) -> SparseLayout | None:
        """The layer's layout, or None."""
        entry = self._entries.get(layer)
        return None if entry is None else entry.layout

    def put(self, layer: int, layout: SparseLayout) -> None:
        """Set the layer's layout: one just found, or one made by the caller."""
        if not isinstance(layout, SparseLayout):
            raise ValueError(f"LayoutCache.put: got {type(layout).__name__}; it must be a SparseLayout.")
        self._entries.setdefault(layer, _Entry()).layout = layout

    def drop(self, picked: Callable[[Hashable], bool]) -> None:
        """Forget the layers, as their caller numbers them, that `picked` says yes to."""
        self._entries = {layer: entry for layer, entry in self._entries.items() if not picked(layer)}

    def reset(self) -> None:
        """Forget every layer: call it before a new generation that does not start at step 0."""
        self._entries.clear()
        self._shared.clear()

    def begin(
        self,
        layer: int,
        step: int,
        *,
        switch_step: int,
        signature: Mapping[str, Any],
        op: str = "LayoutCache",
    ) -> SparseLayout | None:
        """Enter a step of a layer, as the class docstring says.

        Args:
            layer: layer number.
            step: denoising step, from 0.
            switch_step: the last dense step, whose caller will `put` the layout.
            signature: what must not change within a generation, by name.
            op: the name that error messages start with.

        Returns:
            None on a dense step, else the layout to use.

        Raises:
            ValueError: the step goes back, the signature changed, or there is no layout yet.
        """
        is_dense = step <= switch_step
        entry = self._entries.setdefault(layer, _Entry())
        if is_dense and (step == 0 or step < entry.step):
            entry = self._entries[layer] = _Entry()
        if step < entry.step:
            raise ValueError(
                f"{op}: step {step} of layer {layer} follows step {entry.step}; steps go forward within a "
                "generation. Pass a new LayoutCache, or call cache.reset(), for a new generation."
            )
        changed = [
            f"{name} was {entry.signature[name]} and is now {value}"
            for name, value in signature.items()
            if name in entry.signature and entry.signature[name] != value
        ]
        if changed:
            raise ValueError(
                f"{op}: the call changed in the middle of a generation (layer {layer}, step {step}): "
                f"{'; '.join(changed)}. Use one LayoutCache for each generation."
            )
        if not is_dense and entry.layout is None:
            raise ValueError(
                f"{op}: layer {layer} has no pattern at step {step}: it is found at step {switch_step}, "
                "which this cache has not seen. Run the steps in order with one cache."
            )
        entry.step, entry.signature = step, dict(signature)
        return None if is_dense else entry.layout

    def shared(self, key: Hashable, build: Callable[[], SparseLayout]) -> SparseLayout:
        """A layout that all layers share (the full one of the dense steps), built once."""
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, derived ones (bounds, transposes) included."""
        seen: dict[int, int] = {}
        for layout in [e.layout for e in self._entries.values()] + list(self._shared.values()):
            if layout is not None:
                for tensor in _tensors(layout):
                    storage = tensor.untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def __len__(self) -> int:
        """Layers that hold a layout."""
        return sum(entry.layout is not None for entry in self._entries.values())

    def __repr__(self) -> str:
        steps = sorted({entry.step for entry in self._entries.values() if entry.step >= 0})
        at = f", last step {steps[-1]}" if steps else ""
        size = f"{self.nbytes / 2**20:.1f} MiB"
        return f"LayoutCache({len(self)} of {len(self._entries)} layers hold a pattern{at}, {size})"


def _tensors(held: object) -> list[Tensor]:
    """All tensors in a dataclass, its fields' dataclasses, dicts and tuples."""
    if isinstance(held, Tensor):
        return [held]
    if isinstance(held, dict):
        parts = list(held.values())
    elif isinstance(held, tuple):
        parts = list(held)
    else:
        parts = list(vars(held).values()) if is_dataclass(held) else []
    return [tensor for part in parts for tensor in _tensors(part)]
