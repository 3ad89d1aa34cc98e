"""What the adapter of video transformers adds to a layer's attention where padding of the text is cut off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed, and the counters lie beside it")

sys.path.insert(0, str(Path(__file__).parent))
from test_transformers_cost import ops

from sparse_attn.integrations.diffusers_processors import SparseProcessor
from sparse_attn.integrations.diffusers_rules import FunctionRule
from sparse_attn.integrations.diffusers_state import CallState, Family, Tokens


def processor(lengths: list[int], text_len: int = 8) -> SparseProcessor:
    """One whose rows have so many real text tokens, and whose attention computes nothing."""
    mask = torch.arange(text_len) < torch.tensor(lengths)[:, None]
    family = Family(
        lambda model: [], (), SparseProcessor, lambda m, given: (Tokens((1, 4, 4), text_len), mask), ()
    )
    state = CallState(family)
    state.enter(torch.nn.Identity(), (), {})
    return SparseProcessor(None, 0, FunctionRule(lambda q, k, v, **how: q), state)


def call_of(lengths: list[int]):
    made = processor(lengths)
    x = torch.randn(len(lengths), 24, 2, 8).transpose(1, 2)  # as a projection of (B, N, H * D) gives it
    return lambda: made.attend(x, x, x, 0.1), x


@torch.no_grad()
def test_cutting_slices_thrice_and_pads_once():
    call, x = call_of([5])
    counted = ops(call)
    assert counted == {"aten::slice": 3, "aten::transpose": 1, "aten::constant_pad_nd": 1}
    out = call()
    assert out.is_contiguous() and out.shape == (1, 24, 2, 8)  # heads and channels join without a copy
    assert torch.equal(out[:, :21], x.transpose(1, 2)[:, :21]) and not out[:, 21:].any()
    assert ops(call_of([8])[0]) == {"aten::transpose": 1}


@torch.no_grad()
def test_rows_that_lie_together_are_not_gathered():
    call, x = call_of([5, 5, 8, 2])
    assert "aten::index" not in ops(call)
    apart, y = call_of([5, 8, 5, 2])
    for own, tensor, lengths in ((call, x, (5, 5, 8, 2)), (apart, y, (5, 8, 5, 2))):
        out = own()
        for row, n in enumerate(lengths):
            assert torch.equal(out[row, : 16 + n], tensor[row, :, : 16 + n].transpose(0, 1))
            assert not out[row, 16 + n :].any()
