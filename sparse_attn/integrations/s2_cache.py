"""`S2Cache`: a key-value cache that frees the keys which no query will read again.

In S2-Attention (arXiv 2407.17678) a key block that has left a head's local window and belongs neither to
its shard nor to the sinks is never read again by that head: going down a column of the causal pattern, a
block may switch off but never on. With one pattern a key head, its keys and values can then be freed. A
head that keeps a window of `local_blocks` and every `vert_stride`-th of N blocks holds about
local_blocks + (N - local_blocks) / vert_stride of them.

    sa.patch(model, "s2", local_blocks=4, vert_stride=8, decode="sparse")
    cache = sa.S2Cache(model)
    model.generate(ids, past_key_values=cache)
    print(cache.report())

Storage: key heads with the same pattern (the same shift, or the same shifts in their group of query heads)
keep the same positions, so that each such class is one plain tensor [B, heads of the class, kept, D]:
nothing is padded, and attention over it is dense. Memory falls each time the sequence enters a new block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

try:
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
except ImportError as error:
    raise ImportError("sparse_attn.S2Cache needs transformers 5; pip install 'transformers>=5'.") from error

from sparse_attn.integrations import transformers as adapter
from sparse_attn.integrations.padding import dense
from sparse_attn.integrations.patching import attention_modules, is_patched
from sparse_attn.integrations.settings import ATTRIBUTE, Setting
from sparse_attn.methods.s2 import S2Config, _local_shifts

Shifts = tuple[int | None, ...]


@dataclass(frozen=True)
class S2CacheReport:
    """What a cache holds. Bytes are those of the storages behind its tensors, not computed from shapes.

    Attributes:
        length: tokens seen.
        held_bytes: by layer, what keys, values and (in S2 layers) positions occupy.
        full_bytes: by layer, what keys and values of all tokens would occupy.
        dropping: by layer, whether it drops keys.
    """

    length: int
    held_bytes: tuple[int, ...]
    full_bytes: tuple[int, ...]
    dropping: tuple[bool, ...]

    @property
    def fraction(self) -> float:
        """Bytes held as a part of a full cache; 1 of an empty one."""
        return sum(self.held_bytes) / sum(self.full_bytes) if sum(self.full_bytes) else 1.0

    def __str__(self) -> str:
        mib = 1 / (1 << 20)
        lines = [
            f"S2Cache after {self.length} tokens: {sum(self.held_bytes) * mib:.2f} MiB held, "
            f"{sum(self.full_bytes) * mib:.2f} MiB in a full cache ({100 * self.fraction:.1f} %)"
        ]
        for number, (held, full) in enumerate(zip(self.held_bytes, self.full_bytes, strict=True)):
            kind = "drops" if self.dropping[number] else "keeps all"
            lines.append(f"  layer {number}: {held * mib:.2f} of {full * mib:.2f} MiB, {kind}")
        return "\n".join(lines)


@dataclass
class _HeadClass:
    """Key heads that keep the same positions.

    Attributes:
        shifts: the distinct shifts of their query heads; None is a dense head.
        kv_heads: int64 [n] and q_heads: int64 [n * group], in the order of the tensors.
        keys, values: [B, n, kept, D or Dv].
        positions: int64 [kept], ascending.
    """

    shifts: Shifts
    kv_heads: Tensor
    q_heads: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


class S2CacheLayer(CacheLayerMixin):
    """One layer that drops keys. `update` only hands the new keys on; `attend`, called by the attention
    function with the query, runs attention over what is kept and stores what will be read again."""

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, module: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.config: S2Config = setting.config
        self.classes: list[_HeadClass] = []
        self.length = 0
        self._module = ref(module)
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # -- what the model calls --

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announce the keys of new tokens [B, Hkv, L, D]; they are stored when `attend` has used them.

        Raises:
            ValueError: the model is no longer patched as it was when the cache was made.
        """
        module = self._module()
        if module is None or getattr(module, ATTRIBUTE, None) is not self.setting:
            raise ValueError(
                "S2Cache: the model was unpatched or patched anew since this cache was made, and keys are "
                "gone that it may now read; make a new sparse_attn.S2Cache(model) and start from the prompt."
            )
        self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        setattr(module, adapter.PENDING, self)
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sparse: Callable[[Tensor, Tensor, Tensor], Tensor],
        scale: float,
    ) -> Tensor:
        """Attention of one call, [B, Hq, L, Dv].

        Args:
            query: [B, Hq, L, D]; key, value: the very tensors that `update` returned.
            mask: must be None: padding would move each sequence's blocks.
            sparse: (q, k, v) -> out by the layer's method, used where the cache is empty.
        """
        new, self._new = self._new, None
        if new is None or new[0] is not key or new[1] is not value:
            raise ValueError(
                "S2Cache: this model changes keys or values between cache and attention, so that the cache "
                "cannot follow them; use transformers' DynamicCache."
            )
        if mask is not None:
            raise ValueError(
                "S2Cache: the call has padding or another mask; pass prompts of one length without padding "
                "(or one prompt at a time), or use transformers' DynamicCache."
            )
        if self.length == 0:
            out = sparse(query, key, value) if query.shape[2] > 1 else None
            self.classes = self._make_classes(query.shape[1], key, value)
        else:
            out = None
            for c in self.classes:
                c.keys = torch.cat([c.keys, key[:, c.kv_heads]], 2)
                c.values = torch.cat([c.values, value[:, c.kv_heads]], 2)
                c.positions = torch.cat([c.positions, self._positions(key)])
        if out is None:
            out = self._attend_kept(query, value.shape[-1], scale)
        self.length += key.shape[2]
        self._drop()
        return out

    # -- keeping --

    def _positions(self, key: Tensor) -> Tensor:
        return torch.arange(self.length, self.length + key.shape[2], device=key.device)

    def _make_classes(self, num_heads: int, key: Tensor, value: Tensor) -> list[_HeadClass]:
        num_kv_heads = key.shape[1]
        group = num_heads // num_kv_heads
        pattern = _local_shifts(self.config, num_heads, num_kv_heads, 0)
        if self.config.vert_stride == 1:
            pattern = [None] * len(pattern)
        by_query = pattern if self.config.per_query_head else [x for x in pattern for _ in range(group)]
        members: dict[Shifts, list[int]] = {}
        for head in range(num_kv_heads):
            members.setdefault(tuple(by_query[head * group : (head + 1) * group]), []).append(head)
        made = []
        for shifts, heads in members.items():
            queries = [head * group + n for head in heads for n in range(group)]
            kv_heads = torch.tensor(heads, device=key.device)
            q_heads = torch.tensor(queries, device=key.device)
            made.append(
                _HeadClass(
                    shifts, kv_heads, q_heads, key[:, kv_heads], value[:, kv_heads], self._positions(key)
                )
            )
        return made

    def _reads(self, shift: int | None, positions: Tensor, block: Tensor | int) -> Tensor:
        """Whether a query in key block `block` reads the keys at `positions`, but for the causal edge."""
        config, key_block = self.config, positions // self.config.block_size
        distance = block - key_block
        if shift is None:
            return torch.ones_like(distance, dtype=torch.bool)
        shard = (key_block + shift) % config.vert_stride == 0
        return (distance < config.local_blocks) | (key_block < config.sink_blocks) | shard

    def _drop(self) -> None:
        """Free what the next query, and so every later one, reads in no head of a class."""
        block = self.length // self.config.block_size
        for c in self.classes:
            kept = torch.stack([self._reads(x, c.positions, block) for x in set(c.shifts)]).any(0)
            chosen = kept.nonzero()[:, 0]
            if chosen.numel() < kept.numel():  # index_select copies, so that the old storage goes
                c.keys, c.values = c.keys.index_select(2, chosen), c.values.index_select(2, chosen)
                c.positions = c.positions[chosen]

    def _attend_kept(self, query: Tensor, head_size: int, scale: float) -> Tensor:
        """The definition of the pattern, to the token, over the kept keys; queries follow `length`."""
        L = query.shape[2]
        at = torch.arange(self.length, self.length + L, device=query.device)[:, None]
        out = query.new_empty(*query.shape[:3], head_size)
        for c in self.classes:
            mask = None
            alike = len(set(c.shifts)) == 1
            if L > 1 or not alike:  # one query of one pattern reads all that is kept
                rows = [self._reads(x, c.positions[None], at // self.config.block_size) for x in c.shifts]
                mask = torch.stack(rows[:1] if alike else rows * len(c.kv_heads)) & (c.positions <= at)
            q = query[:, c.q_heads]
            out[:, c.q_heads] = dense(q, c.keys, c.values, None if mask is None else mask[None], False, scale)
        return out

    # -- the rest of transformers' interface --

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.classes, self.length, self._new = [], 0, None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "S2Cache: keys that a shorter sequence would read again are gone, so it cannot be cropped "
                "(assisted decoding does); use transformers' DynamicCache."
            )

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for c in self.classes:
            c.keys, c.values = change(c.keys), change(c.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def held_bytes(self) -> int:
        return _storage_bytes(x for c in self.classes for x in (c.keys, c.values, c.positions))

    def full_bytes(self) -> int:
        """Bytes of keys and values, were all `length` tokens kept."""
        return sum(
            x.shape[0] * x.shape[1] * self.length * x.shape[3] * x.element_size()
            for c in self.classes
            for x in (c.keys, c.values)
        )


class S2Cache(Cache):
    """A transformers cache whose S2 layers free the keys that no head of a group will read again.

    Decoding with it equals decoding with a full cache under the same pattern. Layers that do not run S2
    (dense ones, sliding windows) keep what transformers' `DynamicCache` keeps. Prompts of a batch must have
    one length, without padding. A later chunk of a prompt is read by the token-exact definition of the
    pattern, through PyTorch's attention under a mask of chunk x kept keys; the first chunk runs on the
    method's engine.

    Args:
        model: patched with S2 and `decode="sparse"`, in all or some layers.

    Raises:
        ValueError: the model is not patched so. ImportError: transformers is missing.

    Example:
        >>> sparse_attn.patch(model, "s2", local_blocks=4, vert_stride=8, decode="sparse")
        >>> cache = S2Cache(model)
        >>> model.generate(ids, past_key_values=cache)
        >>> print(cache.report())
    """

    def __init__(self, model: Any) -> None:
        if not is_patched(model):
            raise ValueError(
                'S2Cache: patch the model first: sparse_attn.patch(model, "s2", decode="sparse").'
            )
        layers = list(DynamicCache(config=model.config).layers)
        dropping = [x for x in attention_modules(model) if self._drops(getattr(x[1], ATTRIBUTE))]
        if not dropping:
            raise ValueError(
                "S2Cache: no layer of this model runs S2 over all keys, so none could be freed; patch it "
                "with 's2', or use transformers' DynamicCache."
            )
        for name, module in dropping:
            setting = getattr(module, ATTRIBUTE)
            if getattr(setting.decode, "config", None) != setting.config:
                raise ValueError(
                    "S2Cache: decode steps of this model are dense, or follow another pattern than prefill, "
                    'and read keys that would be gone; patch it with decode="sparse".'
                )
            if not 0 <= module.layer_idx < len(layers) or isinstance(layers[module.layer_idx], S2CacheLayer):
                raise ValueError(f"S2Cache: {name} does not belong to one plain stack of decoder layers.")
            layers[module.layer_idx] = S2CacheLayer(module, setting)
        super().__init__(layers=layers)

    @staticmethod
    def _drops(setting: Setting) -> bool:
        keeps_plan = setting.window is None and not setting.is_stock
        return isinstance(setting.config, S2Config) and keeps_plan

    def report(self) -> S2CacheReport:
        """Memory held now, measured, beside that of a full cache."""
        held, full = [], []
        length = self.get_seq_length()
        for layer in self.layers:
            if isinstance(layer, S2CacheLayer):
                held.append(layer.held_bytes())
                full.append(layer.full_bytes())
            else:
                pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
                tensors = [x for x in pair if x is not None and x.numel()]
                held.append(_storage_bytes(tensors))
                full.append(sum(x.numel() // x.shape[2] * length * x.element_size() for x in tensors))
        dropping = tuple(isinstance(layer, S2CacheLayer) for layer in self.layers)
        return S2CacheReport(length, tuple(held), tuple(full), dropping)


def _storage_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages behind tensors: a view of a larger one counts the whole of it."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
