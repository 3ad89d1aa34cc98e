"""The Triton engine (kernels/): any GPU that Triton supports, forward and backward.

With TRITON_INTERPRET=1 it also takes CPU tensors and runs them in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import torch
from torch import Tensor

from sparse_attn.engines.base import AttendCall, listed_tiles, new_out
from sparse_attn.schedule import MergedRows, Schedule, merge_factor, schedule_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_BLOCK = 16
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: a call must not search the disk
COLUMN_SPLITS = 8  # programs that share a column row in the backward


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _on(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class TritonEngine:
    name = "triton"

    def why_off(self) -> list[str]:
        if not HAS_TRITON:
            return ["Triton is not installed; pip install triton"]
        if not torch.cuda.is_available() and not _interprets():
            return ["no GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"]
        return []

    def why_not(self, call: AttendCall) -> list[str]:
        from sparse_attn.kernels.configs import max_block_with_skip

        reasons = self.why_off()
        layout, wanted = call.layout, "cpu" if _interprets() else "cuda"
        if not reasons and call.q.device.type != wanted:
            reasons.append(f"the tensors are on {call.q.device.type}; move them to {wanted}")
        if call.q.dtype not in DTYPES:
            reasons.append(f"dtype {call.q.dtype}; use float16, bfloat16 or float32")
        top = max_block_with_skip(call.q.element_size())
        for name in ("block_m", "block_n"):
            block = getattr(layout, name)
            if block < MIN_BLOCK or block & (block - 1):
                reasons.append(f"{name} is {block}; use a power of two from {MIN_BLOCK}")
            elif call.skip_below is not None and block > top:
                reasons.append(
                    f"{name} is {block} with a BLASST skip, whose vote needs the whole tile at once; "
                    f"use at most {top} for {call.q.dtype}"
                )
        if call.needs_grad and layout.columns is not None and torch.are_deterministic_algorithms_enabled():
            reasons.append(
                "dk and dv of columns are summed with atomics, in no fixed order; "
                "torch.use_deterministic_algorithms(False) allows that"
            )
        return reasons

    def schedule(self, call: AttendCall) -> Schedule:
        return schedule_of(call)

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        with _on(call.q):
            return self._forward(call)

    def _forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        from sparse_attn.kernels.attend_fwd import attend_fwd_kernel
        from sparse_attn.kernels.configs import forward_tile

        q, k, v, layout = call.q, call.k, call.v, call.layout
        B, Hq, L, _ = q.shape
        out = new_out(q, v.shape[-1])
        lse = torch.empty(B, Hq, L, dtype=torch.float32, device=q.device)
        skips = call.skip_below is not None
        kept = None
        if call.want_kept:
            kept = (
                torch.zeros(call.kept_shape, dtype=torch.uint8, device=q.device)
                if skips
                else listed_tiles(call)
            )
        schedule = _schedule(call)
        merged = schedule.merged
        dims = _dims(call)
        use_tma = _can_describe(k) and _can_describe(v)
        tile = forward_tile(*_sizes(call), merged=merged is not None, skips=skips, tma=use_tma)
        lists = _lists(layout.blocks, layout.block_bounds(call.is_causal), merged)
        k_desc = _descriptor(k, tile.block_n, dims["BLOCK_D"]) if use_tma else k
        v_desc = _descriptor(v, tile.block_n, dims["BLOCK_DV"]) if use_tma else v
        skip = call.skip_below if call.skip_below is not None else lse
        grid = (_query_tiles(call, tile.block_m, merged) * B * Hq,)
        attend_fwd_kernel[grid](
            q, k, v, k_desc, v_desc, out, lse, lse if kept is None else kept,
            *lists, *_column_lists(call), _or(schedule.order, lists[1]), skip,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out), *skip.stride()[:2],
            B, Hq, call.gqa_group, L, k.shape[2], layout.num_query_blocks, layout.num_key_blocks,
            *_column_shape(call), *_list_strides(call), _query_span(call), abs(call.scale) or 1.0,
            SIGN=_sign(call.scale), **dims, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HAS_ORDER=schedule.order is not None, MERGED=merged is not None, HAS_SKIP=skips,
            WANT_KEPT=skips and kept is not None, USE_TMA=use_tma, PRECISION=_precision(q),
            NUM_STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return out, lse, kept

    def backward(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        grad_out, lse, delta = grad_out.to(call.q.dtype), lse.contiguous(), delta.float().contiguous()
        with _on(call.q):
            dq = self._backward_dq(call, lse, delta, kept, grad_out)
            return dq, *self._backward_dkdv(call, lse, delta, kept, grad_out)

    def _backward_dq(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> Tensor:
        from sparse_attn.kernels.attend_bwd import attend_bwd_dq_kernel
        from sparse_attn.kernels.configs import dq_tile

        q, k, v, layout = call.q, call.k, call.v, call.layout
        B, Hq, L, _ = q.shape
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        schedule = _schedule(call)
        merged = schedule.merged
        dims = _dims(call)
        use_tma = _can_describe(k) and _can_describe(v)
        tile = dq_tile(*_sizes(call), merged=merged is not None, tma=use_tma)
        lists = _lists(layout.blocks, layout.block_bounds(call.is_causal), merged)
        k_desc = _descriptor(k, tile.block_n, dims["BLOCK_D"]) if use_tma else k
        v_desc = _descriptor(v, tile.block_n, dims["BLOCK_DV"]) if use_tma else v
        grid = (_query_tiles(call, tile.block_m, merged) * B * Hq,)
        attend_bwd_dq_kernel[grid](
            q, k, v, k_desc, v_desc, grad_out, lse, delta, _or(kept, lse), dq,
            *lists, *_column_lists(call), _or(schedule.order, lists[1]),
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad_out), *_strides(dq),
            B, Hq, call.gqa_group, L, k.shape[2], layout.num_query_blocks, layout.num_key_blocks,
            *_column_shape(call), *_list_strides(call), _query_span(call), call.scale,
            **dims, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HAS_ORDER=schedule.order is not None, MERGED=merged is not None, HAS_SKIP=kept is not None,
            USE_TMA=use_tma, PRECISION=_precision(q), NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return dq

    def _backward_dkdv(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        from sparse_attn.kernels.attend_bwd_dkdv import attend_bwd_dkdv_kernel
        from sparse_attn.kernels.configs import dkdv_tile

        q, k, v, layout = call.q, call.k, call.v, call.layout
        B, Hkv, S, _ = k.shape
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        columns = self._backward_columns(call, lse, delta, grad_out) if layout.columns is not None else None
        schedule = _schedule(call)
        merged, order = schedule.t_merged, schedule.t_order
        dims = _dims(call)
        use_tma = _can_describe(q) and _can_describe(grad_out)
        tile = dkdv_tile(*_sizes(call), merged=merged is not None, tma=use_tma)
        lists = _lists(layout.transposed(), layout.transposed_bounds(call.is_causal), merged)
        q_desc = _descriptor(q, tile.block_m, dims["BLOCK_D"]) if use_tma else q
        g_desc = _descriptor(grad_out, tile.block_m, dims["BLOCK_DV"]) if use_tma else grad_out
        tiles = layout.num_key_blocks * max(layout.block_n // tile.block_n, 1)
        if merged is not None:
            tiles = ceil(layout.num_key_blocks / merge_factor(layout.block_n))
        order_heads = 0 if order is None else order.shape[0] // layout.batch
        order_strides = (order_heads if layout.batch > 1 else 0, 1 if order_heads > 1 else 0)
        del dims["BLOCK_C"]
        attend_bwd_dkdv_kernel[(tiles * B * Hkv,)](
            q, k, v, grad_out, q_desc, g_desc, lse, delta, _or(kept, lse), dk, dv,
            *(columns or (dk, dv)), *lists, _or(order, lists[1]),
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad_out), *_strides(dk), *_strides(dv),
            B, Hkv, call.gqa_group, q.shape[2], S, layout.num_query_blocks, layout.num_key_blocks,
            *_list_strides(call), *order_strides, _key_span(call, grad_out), call.scale,
            **dims, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HAS_ORDER=order is not None, MERGED=merged is not None, HAS_SKIP=kept is not None,
            USE_TMA=use_tma, PRECISION=_precision(q), NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return dk, dv

    def _backward_columns(
        self, call: AttendCall, lse: Tensor, delta: Tensor, grad_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the columns add to dk (without the scale) and dv, float32, contiguous."""
        from sparse_attn.kernels.attend_bwd_dkdv import attend_bwd_columns_kernel

        q, k, v, columns = call.q, call.k, call.v, call.layout.columns
        assert columns is not None
        B, Hq, L, _ = q.shape
        dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        dims = _dims(call)
        for name in ("HAS_COLUMNS", "QUERY_BLOCK", "KEY_BLOCK"):
            del dims[name]
        column_rows, group = _column_shape(call)
        attend_bwd_columns_kernel[(B * Hq * column_rows * COLUMN_SPLITS,)](
            q, k, v, grad_out, lse, delta, dk, dv, columns.offsets, columns.indices,
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad_out),
            Hq, call.gqa_group, L, k.shape[2], column_rows, group * call.layout.block_m, COLUMN_SPLITS,
            *_list_strides(call), call.scale,
            **dims, BLOCK_M=min(call.layout.block_m, dims["BLOCK_C"]), PRECISION=_precision(q),
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return dk, dv


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b, -1) in float32, reading each input once: [B, H, L, D] twice -> [B, H, L]."""
    from sparse_attn.kernels.attend_bwd import row_dot_kernel

    B, H, L, D = a.shape
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    out = torch.empty(B, H, L, dtype=torch.float32, device=a.device)
    block_d, rows = max(1 << (D - 1).bit_length(), 16), 32
    with _on(a):
        row_dot_kernel[(ceil(L / rows) * B * H,)](
            a, b, out, *_strides(a), *_strides(b), H, L, D=D, BLOCK_M=rows, BLOCK_D=block_d, num_warps=4
        )
    return out


def _schedule(call: AttendCall) -> Schedule:
    """The one that came through the operator; made here when the engine is called directly."""
    return call.layout._cache.get(("schedule",)) or schedule_of(call)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A kernel argument that the compiled variant does not read still has to be a tensor."""
    return placeholder if tensor is None else tensor


def _dims(call: AttendCall) -> dict[str, Any]:
    """Constants that all kernels share."""
    from sparse_attn.kernels.configs import column_tile

    D, Dv = call.q.shape[-1], call.v.shape[-1]
    block_d, block_dv = (max(1 << (x - 1).bit_length(), 16) for x in (D, Dv))
    return {
        "HEAD_DIM": D,
        "VALUE_DIM": Dv,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_C": column_tile(call.q.element_size(), max(block_d, block_dv)),
        "QUERY_BLOCK": call.layout.block_m,
        "KEY_BLOCK": call.layout.block_n,
        "IS_CAUSAL": call.is_causal,
        "HAS_COLUMNS": call.layout.columns is not None,
    }


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _lists(blocks: Any, bounds: Tensor, merged: MergedRows | None) -> tuple[Tensor, Tensor, Tensor]:
    if merged is not None:
        return merged.offsets, merged.indices, merged.bounds
    return blocks.offsets, blocks.indices, bounds


def _column_lists(call: AttendCall) -> tuple[Tensor, Tensor, Tensor]:
    columns, blocks = call.layout.columns, call.layout.blocks
    if columns is None:
        return blocks.offsets, blocks.indices, blocks.indices
    return columns.offsets, columns.indices, call.layout.column_bounds(call.is_causal)


def _column_shape(call: AttendCall) -> tuple[int, int]:
    """Column rows of one head, and query blocks that share one."""
    columns = call.layout.columns
    group = 1 if columns is None else columns.group
    return ceil(call.layout.num_query_blocks / group), group


def _list_strides(call: AttendCall) -> tuple[int, int, int]:
    """Batch stride, head stride and head divisor of `kernels.softmax.list_group`."""
    layout = call.layout
    per_head = 1 if layout.heads == call.q.shape[1] else call.gqa_group
    return (layout.heads if layout.batch > 1 else 0, 1 if layout.heads > 1 else 0, per_head)


def _query_tiles(call: AttendCall, tile_m: int, merged: MergedRows | None) -> int:
    """Programs of one head."""
    layout = call.layout
    if merged is not None:
        return ceil(layout.num_query_blocks / merge_factor(layout.block_m))
    return layout.num_query_blocks * (layout.block_m // tile_m)


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _precision(q: Tensor) -> str:
    tf32 = q.dtype == torch.float32 and q.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _sizes(call: AttendCall) -> tuple[int, int, int, int]:
    """What the table of tiles goes by: bytes an element, padded head size, block sizes."""
    widest = max(call.q.shape[-1], call.v.shape[-1])
    padded = 1 << (widest - 1).bit_length()
    return call.q.element_size(), padded, call.layout.block_m, call.layout.block_n


L2_BYTES = 32 << 20  # of an H100's 50 MB: what heads that run side by side may stream


def _heads_in_l2(*streamed: Tensor) -> int:
    """How many heads of these tensors fit in the L2 cache together; at least 1."""
    heads = streamed[0].shape[0] * streamed[0].shape[1]
    bytes_per_head = sum(x.numel() for x in streamed) * streamed[0].element_size() // heads
    return min(max(L2_BYTES // bytes_per_head, 1), heads)


def _query_span(call: AttendCall) -> int:
    """How many query heads run side by side (`kernels.softmax.program_place`): those whose keys and
    values share the L2 cache."""
    return _heads_in_l2(call.k, call.v) * call.gqa_group


def _key_span(call: AttendCall, grad_out: Tensor) -> int:
    """How many key heads run side by side for dk and dv. Where rows are alike (a shard's key blocks are
    read by all later queries, the others by a few) all heads start their long rows at once: they walk
    the same tiles in step, so the cache still serves them, and no long row is left for the end."""
    if call.layout.neighbours_alike:
        return call.k.shape[0] * call.k.shape[1]
    return max(_heads_in_l2(call.q, grad_out) // call.gqa_group, 1)


def _can_describe(x: Tensor) -> bool:
    """Whether a tensor can be read through a descriptor: Hopper or later, 16-byte aligned, no repeats."""
    if _interprets() or torch.cuda.get_device_capability(x.device)[0] < 9 or x.data_ptr() % 16:
        return False
    return all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def _descriptor(x: Tensor, rows: int, width: int) -> Any:
    """Reads [rows, width] tiles of a [B, H, length, D] tensor; zeros past its edges."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width])
