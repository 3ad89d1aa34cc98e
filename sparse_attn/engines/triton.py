"""The Triton engine (kernels/)."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.engines.base import AttendCall


class TritonEngine:
    name = "triton"

    def why_off(self) -> list[str]:
        return ["not built"]

    def why_not(self, call: AttendCall) -> list[str]:
        return self.why_off()

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
        raise NotImplementedError

    def backward(
        self, call: AttendCall, lse: Tensor, delta: Tensor, kept: Tensor | None, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError
