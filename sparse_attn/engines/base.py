"""The contract between `attend` and the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout, visible_blocks
from sparse_attn.schedule import Schedule


@dataclass(frozen=True, eq=False)
class AttendCall:
    """One attention call, already checked (`sparse_attn.checks`).

    Attributes:
        q: [B, Hq, L, D]; k: [B, Hkv, S, D]; v: [B, Hkv, S, Dv]; one dtype, one device, last stride 1.
        layout: which keys each query block reads; `layout.heads` is 1, Hkv or Hq.
        skip_below: natural log of BLASST's lambda, float32 [B, Hq], or None.
        is_causal: bottom-right aligned.
        scale: multiplies q.k.
        want_kept: also return which tiles were attended.
        needs_grad: the caller will ask for gradients.
        out: [B, Hq, L, Dv], dtype of q, last stride 1: where the CPU engine is to write its output; None: a
            new tensor. Other engines never see one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: SparseLayout
    skip_below: Tensor | None
    is_causal: bool
    scale: float
    want_kept: bool = False
    needs_grad: bool = False
    out: Tensor | None = None

    @property
    def gqa_group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def kept_shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, Lb, Sb]"""
        return (*self.q.shape[:2], self.layout.num_query_blocks, self.layout.num_key_blocks)

    def describe(self) -> str:
        layout = self.layout
        parts = [
            f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, v {tuple(self.v.shape)}",
            f"{self.q.dtype} on {self.q.device}",
            f"blocks {layout.block_m}x{layout.block_n}",
            f"is_causal={self.is_causal}",
        ]
        parts += ["columns"] if layout.columns is not None else []
        parts += ["BLASST skip"] if self.skip_below is not None else []
        parts += ["gradients"] if self.needs_grad else []
        return ", ".join(parts)


class Engine(Protocol):
    """Runs an `AttendCall`. A new backend is one file with one of these and one registry line."""

    name: str

    def why_not(self, call: AttendCall) -> list[str]:
        """Reasons why this call cannot run here, each with its remedy; [] means it can."""
        ...

    def why_off(self) -> list[str]:
        """Reasons why the engine runs nothing on this machine; [] means it is on."""
        ...

    def schedule(self, call: AttendCall) -> Schedule:
        """Row orders and the like, made outside the operator and cached on the layout, which travel
        beside the lists; `Schedule()` where the engine reads none."""
        ...

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns out [B, Hq, L, Dv] in the dtype of q (see `new_out`), lse float32 [B, Hq, L] (float64
        for float64 input; natural log, -inf for a row that attends nothing, whose output is 0),
        and kept uint8 [B, Hq, Lb, Sb] (1 where a listed, visible tile was attended) if
        `call.want_kept`, else None."""
        ...

    def backward(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv in the inputs' dtypes.

        Args:
            lse: as `forward` gave it.
            delta: float32 [B, Hq, L], rowsum(grad_out * out) - grad_lse.
            kept: as `forward` gave it where `call.skip_below` is set, else None.
            grad_out: [B, Hq, L, Dv], any strides.
        """
        ...


def load_library(kind: str) -> str | None:
    """Load the compiled library "cpu" or "cuda". None if it is loaded now, else why not, with the remedy."""
    from sparse_attn import library  # late: `python -m sparse_attn.build` must not import itself twice

    return library.load(kind)


# torch.compile must not trace the search for a file. This is what torch.compiler.assume_constant_result sets;
# calling that would import Dynamo with this module.
load_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def new_out(q: Tensor, value_dim: int) -> Tensor:
    """Uninitialised output [B, Hq, L, Dv] in q's dimension order: a (B, L, H, D) tensor seen through
    `transpose(1, 2)` gives an output of the same memory order, so that transposing back is free."""
    B, H, L, _ = q.shape
    if H > 1 and q.stride(1) < q.stride(2):
        return torch.empty(B, L, H, value_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    return torch.empty(B, H, L, value_dim, dtype=q.dtype, device=q.device)


def listed_tiles(call: AttendCall) -> Tensor:
    """uint8 [B, Hq, Lb, Sb]: the listed, visible tiles; without a skip all of them are attended."""
    layout = call.layout
    mask = layout.block_mask()
    if call.is_causal:
        mask = mask & visible_blocks(layout.L, layout.S, layout.block_m, layout.block_n, layout.device)
    if layout.heads not in (1, call.q.shape[1]):
        mask = mask.repeat_interleave(call.gqa_group, 1)
    return mask.expand(call.kept_shape).to(torch.uint8)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
