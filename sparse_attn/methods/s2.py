"""S2-Attention (arXiv 2407.17678): a local window plus one strided shard of the context a head.

With key blocks of B tokens, a query whose position lies in key block c reads key block j of head h when

    j <= c  and  (c - j < local_blocks  or  j < sink_blocks  or  (j + shift(h)) mod vert_stride == 0)

(drop `j <= c` and take |c - j| without causality). The shards of different heads are different, so
that together they cover the context, while each head reads and keeps a small part of it. The pattern
is a closed form of shapes: it is built once, without a mask, and cached.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context, Method, run
from sparse_attn.methods.per_head import join_heads, register_maker, shape_layout
from sparse_attn.plan import Plan

_CHUNK = 1 << 20  # list entries computed at once, to bound the memory of a build

# A stride that no sequence reaches: of the shard only key block 0 is left, which is a sink.
NO_SHARD = 1 << 30


@dataclass(frozen=True)
class S2Config:
    """The pattern of one attention layer.

    Attributes:
        block_size: tokens in a block of queries and of keys.
        local_blocks: key blocks of the local window, the query's own block among them; >= 1.
        vert_stride: every vert_stride-th key block belongs to a head's shard; 1 is dense.
        sink_blocks: first key blocks that every head reads.
        num_dense_heads: this many last key heads are dense.
        head_shift: how shift(h) follows the *global* pattern head h of H (see `per_query_head`):
            None: h when H >= vert_stride, else floor(h * vert_stride / H), the even spread;
            an int s: h * s; "dkernel": h * max(1, vert_stride // query heads), as DKernel does;
            a tuple of H ints: the shifts themselves.
        shift_offset: added to every shift. DKernel's default is 0; Phi-3-small was trained with 1.
        per_query_head: False: one pattern a key head, shared by its group of query heads, which is
            what saves keys and values; True: one pattern a query head (Phi-3-small).
        num_heads, num_kv_heads: global number of query and key heads, over all tensor-parallel
            ranks; default: those of the call.

    Raises:
        ValueError: a value out of range; all of them at once.
    """

    block_size: int = 64
    local_blocks: int = 16
    vert_stride: int = 8
    sink_blocks: int = 0
    num_dense_heads: int = 0
    head_shift: int | str | tuple[int, ...] | None = None
    shift_offset: int = 0
    per_query_head: bool = False
    num_heads: int | None = None
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.head_shift, list):
            object.__setattr__(self, "head_shift", tuple(self.head_shift))
        lowest = {"block_size": 1, "local_blocks": 1, "vert_stride": 1, "sink_blocks": 0}
        lowest |= {"num_dense_heads": 0, "num_heads": 1, "num_kv_heads": 1}
        problems = []
        for name, at_least in lowest.items():
            value = getattr(self, name)
            if value is None and name in ("num_heads", "num_kv_heads"):
                continue
            if not _is_int(value) or value < at_least:
                problems.append(f"{name} is {value!r}; it must be an integer of at least {at_least}")
        if not _is_int(self.shift_offset):
            problems.append(f"shift_offset is {self.shift_offset!r}; it must be an integer")
        shift = self.head_shift
        listed = isinstance(shift, tuple) and all(_is_int(x) for x in shift)
        if not (shift is None or _is_int(shift) or shift == "dkernel" or listed):
            problems.append(
                f'head_shift is {shift!r}; pass None, an integer, "dkernel" or one integer a pattern head'
            )
        if problems:
            raise ValueError("s2_attention: " + "; ".join(problems) + ".")

    def shifts(self, num_heads: int, num_kv_heads: int | None = None) -> list[int | None]:
        """The shift of every global pattern head, in [0, vert_stride); None for a dense head.

        Args:
            num_heads, num_kv_heads: global query and key heads. There are `num_heads` patterns with
                `per_query_head`, else `num_kv_heads`.

        Raises:
            ValueError: the heads do not fit each other or this config.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"s2_attention: {num_heads} query heads are not a multiple of {num_kv_heads} key heads."
            )
        if self.num_dense_heads > num_kv_heads:
            raise ValueError(
                f"s2_attention: num_dense_heads is {self.num_dense_heads}, but there are only "
                f"{num_kv_heads} key heads."
            )
        count = num_heads if self.per_query_head else num_kv_heads
        raw = self._raw_shifts(count, num_heads)
        shifts: list[int | None] = [(x + self.shift_offset) % self.vert_stride for x in raw]
        num_dense = self.num_dense_heads * (count // num_kv_heads)
        return shifts[: count - num_dense] + [None] * num_dense

    def _raw_shifts(self, count: int, num_heads: int) -> list[int]:
        stride, rule = self.vert_stride, self.head_shift
        if isinstance(rule, tuple):
            if len(rule) != count:
                raise ValueError(
                    f"s2_attention: head_shift has {len(rule)} shifts; expected {count}, one a pattern head."
                )
            return list(rule)
        if isinstance(rule, str):  # "dkernel": always by query heads, even where patterns go by key heads
            return [h * max(1, stride // num_heads) for h in range(count)]
        if rule is not None:
            return [h * rule for h in range(count)]
        return [h if count >= stride else h * stride // count for h in range(count)]

    def validate(
        self, num_heads: int, num_kv_heads: int | None = None, length: int = 8192, *, is_causal: bool = True
    ):
        """What this pattern does at a length: coverage, KV saving, density. See `S2Report`.

        Args:
            num_heads, num_kv_heads: global query and key heads.
            length: tokens.

        Example:
            >>> print(S2Config().validate(32, 8, 32768))
        """
        from sparse_attn.methods.s2_report import report

        return report(self, num_heads, num_kv_heads, length, is_causal)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def s2_layout(
    config: S2Config,
    L: int,
    S: int,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_offset: int = 0,
    is_causal: bool = True,
    device: torch.device | str | None = None,
) -> SparseLayout:
    """The layout of one call, from the cache where its shape was seen before.

    A query at key position p = i + S - L lies in key block floor(p / block_size). A query block reads
    what any of its queries reads by the definition above: where S - L is a multiple of `block_size`
    (full prefill, aligned chunks, and one-token decoding at any length) this is the definition to the
    token; where a query block straddles two key blocks, its later queries also see the one key block
    that has just left their window. No query ever misses a key.

    Args:
        L, S: query and key length in tokens.
        num_heads, num_kv_heads: query and key heads *of this call* (this rank).
        head_offset: global number of this call's first query head.

    Returns:
        A layout with 1 head where all patterns are alike, else `num_kv_heads` of them, or
        `num_heads` with `config.per_query_head`.

    Raises:
        ValueError: the heads do not fit each other or the config.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    device = torch.get_default_device() if device is None else torch.device(device)
    shifts = _local_shifts(config, num_heads, num_kv_heads, head_offset)
    if config.vert_stride == 1:
        shifts = [None]
    if len(set(shifts)) == 1:
        shifts = shifts[:1]
    pattern = (config.block_size, config.local_blocks, config.vert_stride, config.sink_blocks)
    sees_all_heads = config.num_heads is None
    args = (pattern, L, S, tuple(shifts), is_causal, sees_all_heads)
    return shape_layout("s2", args, device, is_causal)


def _local_shifts(config: S2Config, num_heads: int, num_kv_heads: int, head_offset: int) -> list[int | None]:
    """The shifts of this call's pattern heads, chosen by global head number."""
    all_heads = config.num_heads
    if all_heads is None:
        if head_offset:
            raise ValueError(
                f"s2_attention: head_offset is {head_offset} but num_heads is not given; pass num_heads, "
                "the query heads of all ranks together, which the shifts depend on."
            )
        all_heads = num_heads
    if not 0 <= head_offset <= all_heads - num_heads:
        raise ValueError(
            f"s2_attention: query heads {head_offset}..{head_offset + num_heads - 1} do not lie within "
            f"num_heads={all_heads}."
        )
    group = num_heads // num_kv_heads
    all_kv_heads = config.num_kv_heads or max(all_heads // group, 1)
    shifts = config.shifts(all_heads, all_kv_heads)
    if config.per_query_head:
        return shifts[head_offset : head_offset + num_heads]
    all_group = all_heads // all_kv_heads
    if all_group % group or head_offset % group:
        raise ValueError(
            f"s2_attention: groups of {group} query heads from head_offset={head_offset} on do not "
            f"lie within the model's groups of {all_group} (num_heads={all_heads}, "
            f"num_kv_heads={all_kv_heads})."
        )
    # A rank may hold a part of a group (fewer key heads than ranks): the query head decides.
    return [shifts[(head_offset + n * group) // all_group] for n in range(num_kv_heads)]


def _build(
    pattern: tuple[int, int, int, int],
    L: int,
    S: int,
    shifts: Sequence[int | None],
    is_causal: bool,
    sees_all_heads: bool,
    *,
    device: torch.device,
) -> SparseLayout:
    """Makes what `s2_layout` gives; `pattern` is the first four settings of an `S2Config`."""
    config = S2Config(*pattern)
    if sees_all_heads and config.vert_stride > 1 and len(shifts) > 1:
        _warn_of_gaps(config, S, shifts, is_causal)
    distinct = list(dict.fromkeys(shifts))
    lists = [_head_list(config, L, S, shift, is_causal, device) for shift in distinct]
    blocks = join_heads(lists, [distinct.index(x) for x in shifts])
    size = config.block_size
    return SparseLayout(blocks, size, size, L, S, 1, len(shifts), neighbours_alike=True)


register_maker("s2", _build, max_bytes=256 << 20)


def _head_list(
    config: S2Config, L: int, S: int, shift: int | None, is_causal: bool, device: torch.device
) -> IndexList:
    """One head's list from closed forms: a row is at most four arithmetic runs (sinks, shard, window,
    shard), so that nothing is larger than the list itself and a chunk of temporaries."""
    size, Lb, Sb = config.block_size, ceil(L / config.block_size), ceil(S / config.block_size)
    first_query = torch.arange(Lb, device=device) * size
    last_query = (first_query + size - 1).clamp(max=L - 1)
    first = torch.div(first_query + S - L, size, rounding_mode="floor")
    last = torch.div(last_query + S - L, size, rounding_mode="floor")
    end = (last + 1).clamp(min=0) if is_causal else torch.full_like(last, Sb)
    zero = torch.zeros_like(end)
    if shift is None:
        return _from_runs([(zero, 1, end)])
    sink_end = end.clamp(max=config.sink_blocks)
    left = (first - config.local_blocks + 1).maximum(sink_end).minimum(end)
    right = end if is_causal else (last + config.local_blocks).maximum(left).minimum(end)
    gaps = ((sink_end, left), (right, end))
    shard = [_shard_run(low, high, shift, config.vert_stride) for low, high in gaps]
    return _from_runs([(zero, 1, sink_end), shard[0], (left, 1, right - left), shard[1]])


def _shard_run(low: Tensor, high: Tensor, shift: int, stride: int) -> tuple[Tensor, int, Tensor]:
    """The run of block numbers j in [low, high) with (j + shift) % stride == 0."""
    start = low + (-shift - low) % stride
    return start, stride, torch.div(high - start + stride - 1, stride, rounding_mode="floor").clamp(min=0)


def _from_runs(runs: list[tuple[Tensor, int, Tensor]]) -> IndexList:
    """Rows made of consecutive arithmetic runs: (start int64 [rows], step, count int64 [rows])."""
    counts = torch.stack([count for _, _, count in runs], -1)
    ends = counts.cumsum(-1)
    offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(ends[:, -1], 0, out=offsets[1:])
    total = int(offsets[-1])
    indices = torch.zeros(max(total, 1), dtype=torch.int32, device=counts.device)
    for begin in range(0, total, _CHUNK):
        entry = torch.arange(begin, min(begin + _CHUNK, total), device=counts.device)
        row = torch.searchsorted(offsets[1:], entry, right=True)
        rank = entry - offsets[row]
        value = torch.zeros_like(rank)
        for n, (start, step, count) in enumerate(runs):
            at = rank - (ends[row, n] - count[row])
            value = torch.where(at >= 0, start[row] + at * step, value)  # later runs overwrite earlier ones
        indices[begin : begin + entry.numel()] = value.to(torch.int32)
    return IndexList(offsets, indices)


def _warn_of_gaps(config: S2Config, S: int, shifts: Sequence[int | None], is_causal: bool) -> None:
    missing = missing_residues(config, shifts, S, is_causal)
    if missing:
        warnings.warn(
            f"s2_attention: no head reads key blocks with number mod {config.vert_stride} in {missing} "
            "once they leave the local window; use vert_stride <= the number of pattern heads, "
            "per_query_head=True or num_dense_heads.",
            stacklevel=2,
        )


def missing_residues(
    config: S2Config, shifts: Sequence[int | None], length: int, is_causal: bool
) -> list[int]:
    """Residues mod `vert_stride` of key blocks that some later (or, without causality, some) query
    block reads in no head, in a sequence of `length` tokens."""
    if None in shifts:
        return []
    read = {-x % config.vert_stride for x in shifts if x is not None}
    num_blocks = ceil(length / config.block_size)
    outside = num_blocks - config.local_blocks  # blocks below this one leave the last block's window
    far = set(range(config.sink_blocks, outside))
    if not is_causal:
        far |= set(range(max(config.sink_blocks, config.local_blocks), num_blocks))
    return sorted({j % config.vert_stride for j in far} - read)


def select(
    query: Tensor, key: Tensor, config: S2Config, *, is_causal: bool, scale: float, context: Context
) -> Plan:
    """The plan of one call; reads only shapes, the device and `context.head_offset`."""
    layout = s2_layout(
        config,
        query.shape[2],
        key.shape[2],
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_offset=context.head_offset,
        is_causal=is_causal,
        device=query.device,
    )
    return Plan(layout)


def s2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 64,
    local_blocks: int = 16,
    vert_stride: int = 8,
    sink_blocks: int = 0,
    num_dense_heads: int = 0,
    head_shift: int | str | tuple[int, ...] | None = None,
    shift_offset: int = 0,
    per_query_head: bool = False,
    head_offset: int = 0,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    engine: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """S2-Attention (arXiv 2407.17678): local window plus one strided shard of the context a head.

    A query in key block c reads key block j of head h when `j <= c` and (`c - j < local_blocks` or
    `j < sink_blocks` or `(j + shift(h)) % vert_stride == 0`), then the causal edge cuts inside block c.
    Models must be trained with the pattern. `S2Config(...).validate(Hq, Hkv, length)` says what it
    covers and saves.

    Args:
        query: [B, Hq, L, D] float16, bfloat16 or float32; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv].
        block_size: tokens a block, 64 by default.
        local_blocks: window in key blocks, the query's own among them; default 16.
        vert_stride: every vert_stride-th key block is in a head's shard; default 8; 1 is dense.
        sink_blocks: first key blocks read by every head; default 0.
        num_dense_heads: this many last key heads are dense; default 0.
        head_shift, shift_offset, per_query_head: how the shards differ from head to head; see
            `S2Config`. Phi-3-small is `head_shift=1, shift_offset=1, per_query_head=True`.
        head_offset: global number of the first query head of this call (tensor parallelism); it needs
            `num_heads`.
        num_heads, num_kv_heads: global query and key heads; default: those of this call.
        is_causal: query i sees keys j <= i + S - L, **bottom-right aligned**; default True. False: a
            symmetric window.
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the natural log-sum-exp, float32 [B, Hq, L].
        engine: insist on an engine by name.

    Returns:
        out [B, Hq, L, Dv], or (out, lse).

    Raises:
        ValueError: a bad argument. NotImplementedError: no engine can run the call.

    Example:
        >>> q = torch.randn(1, 8, 4096, 64)
        >>> out = s2_attention(q, q, q, block_size=64, local_blocks=4, vert_stride=8)
    """
    config = S2Config(
        block_size, local_blocks, vert_stride, sink_blocks, num_dense_heads, head_shift, shift_offset,
        per_query_head, num_heads, num_kv_heads,
    )  # fmt: skip
    result = run(
        S2, query, key, value, config, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        engine=engine, context=Context(head_offset=head_offset),
    )  # fmt: skip
    return (result.out, result.lse) if return_lse else result.out


S2 = Method("s2", S2Config, select, s2_attention, causal=True, by_shape=True)
