"""The C++ engine for CPUs (csrc/cpu; docs/cpu_engine.md says how it works)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.engines.base import AttendCall, load_library, new_out
from sparse_attn.schedule import Schedule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuEngine:
    """Vectorised, threaded attention over block and column lists, forward and backward.

    All arithmetic is float32 or as exact, whatever the inputs' dtype; the result does not depend on the
    number of threads. Environment: SPARSE_ATTN_CPU_ISA=baseline|avx2|avx512|amx forces an instruction set.
    """

    name = "cpu"

    def why_off(self) -> list[str]:
        reason = load_library("cpu")
        return [] if reason is None else [reason]

    def why_not(self, call: AttendCall) -> list[str]:
        reasons = self.why_off()
        if call.q.device.type != "cpu":
            reasons.append(f"it runs on CPU tensors, and these are on {call.q.device}.")
        if call.q.dtype not in DTYPES:
            reasons.append(f"it takes float32, bfloat16 and float16, not {call.q.dtype}; cast the inputs.")
        return reasons

    def instruction_set(self) -> str:
        """The instruction set in use: "amx", "avx512", "avx2" or "baseline"; "" where the engine is off.

        Raises:
            ValueError: SPARSE_ATTN_CPU_ISA names a set that this machine does not run.
        """
        if self.why_off():
            return ""
        return run_operator("instruction_set")

    def schedule(self, call: AttendCall) -> Schedule:
        return Schedule()

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        out = new_out(call.q, call.v.shape[-1]) if call.out is None else call.out
        lse = torch.empty(call.q.shape[:3], dtype=torch.float32)
        kept = torch.zeros(call.kept_shape, dtype=torch.uint8) if call.want_kept else None
        limits = None if call.skip_below is None else call.skip_below.contiguous()
        run_operator(
            "attend_fwd", *_inputs(call), limits, *_shape(call), out, lse, kept, call.needs_grad
        )  # fmt: skip
        return out, lse, kept

    def backward(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
        lists = call.layout.transposed()
        transposed = (lists.offsets, lists.indices, call.layout.transposed_bounds(call.is_causal))
        saved = (lse.contiguous(), delta.contiguous(), kept, grad_out)
        run_operator("attend_bwd", *saved, *_inputs(call), *transposed, *_shape(call), *grads)
        return grads[0], grads[1], grads[2]


def run_operator(name: str, *args):
    """Call an operator of the library. What it says about a bad call becomes a ValueError.

    Raises:
        ValueError: the layout's lists are not valid, or SPARSE_ATTN_CPU_ISA names no set of this machine.
    """
    try:
        return getattr(torch.ops.sparse_attn_cpu, name)(*args)
    except RuntimeError as error:
        _, marker, words = str(error).partition("cpu engine: ")
        if marker:
            raise ValueError(marker + words) from None
        raise


def _inputs(call: AttendCall) -> tuple[Tensor | None, ...]:
    layout = call.layout
    lists: tuple[Tensor | None, ...] = (
        layout.blocks.offsets, layout.blocks.indices, layout.block_bounds(call.is_causal),
    )  # fmt: skip
    if layout.columns is None:
        return (call.q, call.k, call.v, *lists, None, None, None)
    columns = (layout.columns.offsets, layout.columns.indices, layout.column_bounds(call.is_causal))
    return (call.q, call.k, call.v, *lists, *columns)


def _shape(call: AttendCall) -> tuple[int | bool | float, ...]:
    layout = call.layout
    group = 1 if layout.columns is None else layout.columns.group
    return (
        layout.batch, layout.heads, layout.block_m, layout.block_n, group, call.is_causal, call.scale,
    )  # fmt: skip
