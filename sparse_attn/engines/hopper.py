"""The Hopper engine (csrc/hopper; docs/hopper_forward.md says how it works): sm_90a, forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.engines.base import AttendCall, listed_tiles, load_library, new_out
from sparse_attn.schedule import (
    MergedRows,
    Schedule,
    first_row,
    full_rows,
    merged_pairs,
    paired_rounds,
    refined,
    row_order,
)

DTYPES = (torch.float16, torch.bfloat16)
KEY_BLOCKS = {64: (128, 64, 16), 128: (128, 64, 16), 256: (64, 16)}  # of the kernels of a head size
STAGES = {64: 128, 128: 128, 256: 64}  # keys that a warpgroup multiplies at once
# At head size 64 three warpgroups are faster than two (S16384 on an H200: full 582 TFLOPS for 543, causal 524
# for 517), on tiles of 192 queries, which are no layout's: where all rows read the same keys, and are many.
TALL_TILE, TALL_LEAST_TILES = 192, 4 * 132
# Keys and values worked on together; an H100 has 50 MB of L2, in two halves. At 16, 20, 24 and 32 MiB a
# density of 0.05 gives 709, 709, 709 and 677 TFLOPS (H24 S32768 D128).
L2_BYTES = 20 << 20


class HopperEngine:
    """Block lists, columns and the BLASST skip on TMA and wgmma: a producer, two consumer warpgroups (or
    three), a persistent grid."""

    name = "hopper"

    def why_off(self) -> list[str]:
        if not torch.cuda.is_available():
            return ["no GPU is visible to torch."]
        capability = torch.cuda.get_device_capability()
        if capability != (9, 0):
            return [
                f"it is for compute capability 9.0 (H100, H200, GH200), not {capability[0]}.{capability[1]}."
            ]
        reason = load_library("cuda")
        return [] if reason is None else [reason]

    def why_not(self, call: AttendCall) -> list[str]:
        reasons = self.why_off()
        if call.q.device.type != "cuda":
            reasons.append(f"it runs on CUDA tensors, and these are on {call.q.device}.")
        if call.q.dtype not in DTYPES:
            reasons.append(f"it takes float16 and bfloat16, not {call.q.dtype}.")
        dims = (call.q.shape[-1], call.v.shape[-1])
        if dims[0] != dims[1] or dims[0] not in KEY_BLOCKS:
            reasons.append(
                f"it takes head_dim 64, 128 and 256, the same for key and value, not {dims[0]} and {dims[1]}."
            )
        else:
            reasons += _layout_reasons(call)
        if call.needs_grad:
            reasons.append("it has no backward yet.")
        if call.scale <= 0:
            reasons.append(f"it needs a positive scale, not {call.scale}.")
        for name, x in (("query", call.q), ("key", call.k), ("value", call.v)):
            if x.is_cuda and not _copy_engine_takes(x):  # a traced graph cannot ask for a storage offset
                reasons.append(
                    f"{name} has strides {x.stride()} or an address that are not multiples of 16 bytes."
                )
        return reasons

    def schedule(self, call: AttendCall) -> Schedule:
        causal = call.is_causal
        block_m, block_n = _tile(call)
        if _is_dense(call):
            return full_rows(call.layout, causal, block_m, block_n)
        layout = refined(call.layout, block_n)
        order, merged = row_order(layout, causal), None
        if block_m == 64 and call.skip_below is not None:
            merged = merged_pairs(layout, causal, order)
        elif block_m == 64:
            merged = paired_rounds(layout, causal, order, STAGES[call.q.shape[-1]] // block_n)
        elif layout is not call.layout:
            merged = MergedRows(layout.blocks.offsets, layout.blocks.indices, layout.block_bounds(causal))
        return Schedule(order=order, merged=merged)

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        layout = call.layout
        B, Hq, L, D = call.q.shape
        out = new_out(call.q, D)
        lse = torch.empty(B, Hq, L, dtype=torch.float32, device=call.q.device)
        schedule = layout._cache.get(("schedule",)) or self.schedule(call)
        lists = schedule.merged
        blocks = (
            (layout.blocks.offsets, layout.blocks.indices)
            if lists is None
            else (lists.offsets, lists.indices)
        )
        bounds = layout.block_bounds(call.is_causal) if lists is None else lists.bounds
        columns: tuple[Tensor | None, ...] = (None, None, None)
        group = 1
        if layout.columns is not None:
            columns = (layout.columns.offsets, layout.columns.indices, layout.column_bounds(call.is_causal))
            group = layout.columns.group
        skip_below = None if call.skip_below is None else call.skip_below.contiguous()
        kept = None
        if call.want_kept and call.skip_below is not None:
            kept = torch.zeros(call.kept_shape, dtype=torch.uint8, device=call.q.device)
        tile = _tile(call)
        heads_at_once = max(L2_BYTES // (call.k.shape[2] * D * 4), 1) * call.gqa_group
        q, k, v = (_aligned(x) for x in (call.q, call.k, call.v))
        with torch.cuda.device(q.device):
            torch.ops.sparse_attn_hopper.attend_fwd(
                q, k, v, *blocks, bounds, schedule.order, *columns, skip_below,
                torch.zeros(1, dtype=torch.int32, device=q.device), out, lse, kept,
                layout.batch, layout.heads, *tile, group, first_row(L, tile[0]) if _is_dense(call) else 0,
                min(heads_at_once, B * Hq), call.is_causal, call.scale,
            )  # fmt: skip
        if call.want_kept and kept is None:
            kept = listed_tiles(call)
        return out, lse, kept

    def backward(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("the hopper engine has no backward; why_not says so before the forward.")


def _is_dense(call: AttendCall) -> bool:
    """Whether all queries read all keys, so that the tiles need not be the layout's."""
    return call.layout.is_full and call.skip_below is None and call.layout.columns is None


def _tile(call: AttendCall) -> tuple[int, int]:
    """Queries and keys of the blocks that the kernel works on: the layout's, its key blocks cut where they
    are none of the kernel's. No keys where they cannot be cut so."""
    head_dim = call.q.shape[-1]
    if _is_dense(call):
        tiles = call.q.shape[0] * call.q.shape[1] * -(-call.layout.L // TALL_TILE)
        is_tall = head_dim == 64 and tiles >= TALL_LEAST_TILES
        return TALL_TILE if is_tall else 128, STAGES[head_dim]
    keys = (n for n in KEY_BLOCKS[head_dim] if call.layout.block_n % n == 0)
    return call.layout.block_m, next(keys, 0)


def _layout_reasons(call: AttendCall) -> list[str]:
    layout, head_dim = call.layout, call.q.shape[-1]
    if _is_dense(call):
        return []
    block_m, block_n = _tile(call)
    given = f"{layout.block_m}x{layout.block_n}"
    reasons = []
    if block_m not in (64, 128) or not block_n:
        reasons.append(f"it takes blocks of 64 or 128 queries and a multiple of 16 keys, not {given}.")
    skips = call.skip_below is not None
    if skips and (head_dim > 128 or layout.block_n != 128):
        reasons.append(
            f"its BLASST skip takes head_dim 64 and 128 and blocks of 128 keys, not {head_dim} and {given}."
        )
    if layout.columns is not None and (skips or head_dim > 128 or block_m != 128 or block_n < 64):
        reasons.append(
            "it reads column lists at head_dim 64 and 128 beside blocks of 128 queries and a multiple of 64 "
            "keys, without a BLASST skip."
        )
    return reasons


def _copy_engine_takes(x: Tensor) -> bool:
    """Whether a tensor map can describe [B, H, N, D]: 16-byte address and strides, nothing expanded.
    A trace knows no address: `_aligned` sees to it when the call runs."""
    step = 16 // x.element_size()
    strides = [(size, stride) for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    is_aligned = torch.compiler.is_compiling() or x.device.type != "cuda" or x.storage_offset() % step == 0
    return is_aligned and all(stride > 0 and stride % step == 0 for _, stride in strides)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where a compiled graph brought an address that is no multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
