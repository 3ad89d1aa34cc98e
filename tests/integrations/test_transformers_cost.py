"""What the adapter adds to a layer's call: few microseconds, one view, no synchronisation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from test_transformers_patch import WINDOW, logits, tiny_model, tokens  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.bench.timing import cpu_us  # noqa: E402
from sparse_attn.integrations.transformers import attention_forward  # noqa: E402

LIMIT_US = 20


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine are no cost of the adapter."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def ops(call: Callable) -> Counter[str]:
    call()  # layouts are made once
    with Count() as count:
        call()
    return count.ops


def layer_call(model, mask=None, q_length: int = 64) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    """A call as transformers' own layers make it, and its tensors."""
    module = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, q_length, 16), torch.randn(1, 2, 64, 16)
    how = {"dropout": 0.0, "scaling": 0.25, "sliding_window": None}
    return lambda: attention_forward(module, q, k, k, mask, **how), (q, k)


def nothing(q, k, v, *, layer, is_causal, scale):
    return q


def test_time_beyond_the_attention() -> None:
    """Against a function that computes nothing."""
    model = tiny_model()
    with torch.no_grad(), sa.patched(model, nothing):
        call, (q, k) = layer_call(model)
        added = cpu_us(call) - cpu_us(lambda: nothing(q, k, k, layer=0, is_causal=True, scale=0.25))
    assert added < LIMIT_US, f"{added:.1f} us"


def test_operators_that_padding_adds() -> None:
    """For each sequence views of its tokens, and one copy of its output; no mask is formed or read again."""
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[:, :5] = False
    model = tiny_model()
    with torch.no_grad(), sa.patched(model, nothing):
        found = ops(layer_call(model, mask)[0])
    views = ("aten::slice", "aten::transpose", "aten::alias", "aten::view")
    assert {name: n for name, n in found.items() if name not in views} == {
        "aten::new_zeros": 1,
        "aten::copy_": 1,
    }


def test_dense_costs_little_more_than_pytorchs_function() -> None:
    model = tiny_model()
    with torch.no_grad(), sa.patched(model, "dense"):
        call, (q, k) = layer_call(model, q_length=1)
        dense = torch.nn.functional.scaled_dot_product_attention
        added = cpu_us(call) - cpu_us(lambda: dense(q, k, k, scale=0.25, enable_gqa=True))
    assert added < LIMIT_US, f"{added:.1f} us"


@pytest.mark.usefixtures("cpu_engine")
def test_operators_beyond_those_of_the_method() -> None:
    """One: the transpose that transformers' layout of the output needs."""
    model = tiny_model()
    with torch.no_grad(), sa.patched(model, "s2", **WINDOW):
        call, (q, k) = layer_call(model)
        how = {"is_causal": True, "scale": 0.25, "enable_gqa": True}
        assert ops(call) - ops(lambda: sa.s2_attention(q, k, k, **WINDOW, **how)) == {"aten::transpose": 1}


def test_padding_is_read_once_for_all_layers() -> None:
    """Each reading of a tensor's value waits for a GPU; layers after the first read none."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    reads = {}
    for layers in (1, 4):
        model = tiny_model(num_hidden_layers=layers)
        with sa.patched(model, "s2", **WINDOW):
            found = ops(lambda model=model: logits(model, tokens(2, 60), attention_mask=mask))
        reads[layers] = sum(found[f"aten::{name}"] for name in ("_local_scalar_dense", "equal", "is_nonzero"))
    assert reads[1] == reads[4] > 0
