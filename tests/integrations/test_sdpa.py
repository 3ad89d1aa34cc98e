"""`sdpa_patched`: the plain calls run the method, all others are PyTorch's, and nothing stays behind."""

from __future__ import annotations

import _thread
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as by_name
from torch.utils.checkpoint import checkpoint

import sparse_attn as sa
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe

ORIGINAL = functional.scaled_dot_product_attention
WINDOW = {"block_size": 16, "local_blocks": 1, "vert_stride": 2}


def qkv(
    length: int = 60, heads: int = 4, kv_heads: int | None = None, size: int = 8, **kind
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    return [torch.randn(2, h, length, size, **kind) for h in shapes]


def ours(q, k, v, **how):
    return sa.s2_attention(q, k, v, **WINDOW, **how)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ({}, {}),
        ({}, {"is_causal": True, "scale": 0.5}),
        ({"kv_heads": 2}, {"is_causal": True, "enable_gqa": True}),
        ({"dtype": torch.bfloat16}, {"is_causal": True}),
    ],
)
def test_plain_calls_run_the_method(kind, how) -> None:
    """However the caller got hold of the function; positional or by keyword."""
    q, k, v = qkv(**kind)
    expected = ours(q, k, v, **{"is_causal": False, **how})
    dense = ORIGINAL(q, k, v, **how)
    with sa.sdpa_patched("s2", **WINDOW) as report:
        results = [functional.scaled_dot_product_attention(q, k, v, **how), by_name(q, k, value=v, **how)]
    for result in results:
        assert torch.equal(result, expected)
    assert (expected - dense).abs().max() > 1e-2
    assert (report.num_sparse, report.num_dense) == (2, 0)
    assert torch.equal(by_name(q, k, v, **how), dense)


OTHERS = {
    "it has a mask": ({}, {"attn_mask": torch.ones(60, 60, dtype=torch.bool).tril()}),
    "queries and keys differ in length": ({"short": "q"}, {}),
    "causal attention of unequal lengths is aligned upper left": ({"short": "k"}, {"is_causal": True}),
    "its tensors are not 4-D (batch, heads, length, head size)": ({"flat": True}, {}),
    "shorter than 2": ({"length": 1}, {}),
    "query has 4 heads but key has 1": ({"kv_heads": 1}, {}),
    "query has head_dim 300": ({"size": 300}, {}),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_calls_are_pytorchs(reason: str) -> None:
    kind, how = dict(OTHERS[reason][0]), OTHERS[reason][1]
    short, flat = kind.pop("short", ""), kind.pop("flat", False)
    q, k, v = qkv(**kind)
    q = q[:, :, :1] if short == "q" else q
    k, v = (k[:, :, :7], v[:, :, :7]) if short == "k" else (k, v)
    if flat:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    with sa.sdpa_patched("s2", **WINDOW) as report:
        result = by_name(q, k, v, **how)
    assert torch.equal(result, ORIGINAL(q, k, v, **how))
    assert report.num_dense == 1 and next(iter(report.reasons)).startswith(reason)
    assert f"0 calls sparse, 1 dense\n  1 x query {list(q.shape)} key {list(k.shape)}" in str(report)


def test_dropout_nested_fp64_and_causality_alone() -> None:
    q, k, v = qkv()
    with sa.sdpa_patched("anchor", theta=12.0, block_size=16, step=2) as report:
        torch.manual_seed(1)
        dropped = by_name(q, k, v, dropout_p=0.5)
        bidirectional = by_name(q, k, v)
        nested = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (3, 5)])
        by_name(nested, nested, nested)
    torch.manual_seed(1)
    assert torch.equal(dropped, ORIGINAL(q, k, v, dropout_p=0.5))
    assert torch.equal(bidirectional, ORIGINAL(q, k, v))
    assert set(report.reasons) == {"dropout 0.5", "anchor needs causal attention", "nested tensors"}


def test_what_no_engine_runs() -> None:
    """Dense with the engines' reason; an engine that was insisted on raises."""
    q, k, v = qkv(dtype=torch.float64)
    with sa.use_engine("cpu"), sa.sdpa_patched("blasst", threshold=0.0) as report:
        result = by_name(q, k, v)
    assert torch.equal(result, ORIGINAL(q, k, v))
    assert re.match("engine 'cpu' cannot run this call.*float64", next(iter(report.reasons)))
    with sa.sdpa_patched("blasst", threshold=0.0, engine="cpu"), pytest.raises(NotImplementedError):
        by_name(q, k, v)


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, which has a fused path that calls no function, and a direct call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        y = self.layer(x).unflatten(-1, (4, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(y, y, y, is_causal=True)


def test_multihead_attention_and_gradients() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 60, 32)
    with torch.no_grad():
        stock = model(x)
        with sa.sdpa_patched("blasst", threshold=0.0) as report:
            assert (model(x) - stock).abs().max() < 1e-5
    assert report.num_sparse == 2
    assert torch.backends.mha.get_fastpath_enabled()

    def gradient(recompute: bool = False) -> torch.Tensor:
        model.zero_grad()
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        out.square().sum().backward()
        return model.layer.self_attn.in_proj_weight.grad.clone()

    dense = gradient()
    with sa.sdpa_patched("s2", **WINDOW):
        plain, again = gradient(), gradient(recompute=True)
    assert (plain - again).abs().max() < 1e-5 * plain.abs().max()
    assert (plain - dense).abs().max() > 1e-3 * plain.abs().max()


def test_backward_in_a_thread_that_is_not_pythons() -> None:
    """Where a GPU's backward pass recomputes: it follows the one block that is entered, or says it cannot."""
    q, k, v = (x.requires_grad_() for x in qkv())
    results = []

    def backward(out, done) -> None:
        try:
            out.sum().backward()
            results.append(q.grad)
        except RuntimeError as error:
            results.append(error)
        q.grad = None
        done.set()

    def run() -> None:
        out, done = checkpoint(lambda: by_name(q, k, v), use_reentrant=False), threading.Event()
        _thread.start_new_thread(backward, (out, done))
        assert done.wait(30)

    expected = torch.autograd.grad(ours(q, k, v, is_causal=False).sum(), q)[0]
    dense = torch.autograd.grad(ORIGINAL(q, k, v).sum(), q)[0]
    assert (expected - dense).abs().max() > 1e-3
    with sa.sdpa_patched("s2", **WINDOW):
        run()
        with sa.sdpa_patched("s2", **WINDOW):
            run()
    assert (results[0] - expected).abs().max() < 1e-5
    assert "run backward passes in one block at a time" in str(results[1])


# -- where it acts ------------------------------------------------------------------------------------


def test_threads_keep_apart() -> None:
    """Two threads with a block each, one without, entering and leaving in any order."""
    q, k, v = qkv()
    wanted = {
        "s2": ours(q, k, v, is_causal=False),
        "blasst": sa.blasst_attention(q, k, v, 0.5),
        "none": ORIGINAL(q, k, v),
    }
    options = {"s2": WINDOW, "blasst": {"threshold": 0.5}}
    wrong, barrier = [], threading.Barrier(3)

    def work(name: str, turns: int) -> None:
        barrier.wait()
        for _ in range(turns):
            if name == "none":
                result = functional.scaled_dot_product_attention(q, k, v)
            else:
                with sa.sdpa_patched(name, **options[name]):
                    result = functional.scaled_dot_product_attention(q, k, v)
            if not torch.equal(result, wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=x) for x in (("s2", 9), ("blasst", 6), ("none", 40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert functional.scaled_dot_product_attention is ORIGINAL


def test_nesting_exceptions_and_later_imports() -> None:
    q, k, v = qkv()
    late = types.ModuleType("imported_late")
    with pytest.raises(RuntimeError, match="inside"), sa.sdpa_patched("blasst", threshold=0.5) as outer:
        with sa.sdpa_patched("s2", **WINDOW) as inner:
            assert torch.equal(by_name(q, k, v), ours(q, k, v, is_causal=False))
        by_name(q, k, v)
        late.attention = functional.scaled_dot_product_attention
        raise RuntimeError("inside")
    assert (inner.num_sparse, outer.num_sparse) == (1, 1)
    assert functional.scaled_dot_product_attention is ORIGINAL
    assert sys.modules[__name__].by_name is ORIGINAL
    assert torch.equal(late.attention(q, k, v), ORIGINAL(q, k, v)), "bound inside a block, harmless outside"


def test_somebody_elses_patch_stays() -> None:
    def theirs(*args, **kwargs):
        return ORIGINAL(*args, **kwargs)

    try:
        with sa.sdpa_patched("blasst", threshold=0.5):
            functional.scaled_dot_product_attention = theirs
        assert functional.scaled_dot_product_attention is theirs
        assert by_name is ORIGINAL
    finally:
        functional.scaled_dot_product_attention = ORIGINAL


def test_compiled_code_follows_the_block() -> None:
    q, k, v = qkv()
    run = torch.compile(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v) * 2, backend="eager")
    dense = ORIGINAL(q, k, v) * 2
    assert (run(q, k, v) - dense).abs().max() < 1e-5
    with sa.sdpa_patched("s2", **WINDOW) as report:
        assert (run(q, k, v) - ours(q, k, v, is_causal=False) * 2).abs().max() < 1e-5
    assert report.num_sparse == 1
    assert (run(q, k, v) - dense).abs().max() < 1e-5


# -- functions, recipes, bad calls --------------------------------------------------------------------


def test_layers_of_a_function_and_of_a_recipe() -> None:
    q, k, v = qkv()
    seen = []

    def attention(q, k, v, *, layer, is_causal, scale):
        seen.append((layer, is_causal, scale))
        return by_name(q, k, v)  # PyTorch's: a function does not meet itself

    with sa.sdpa_patched(attention, num_layers=2):
        for _ in range(3):
            result = by_name(q, k, v)
    assert seen == [(n, False, 8**-0.5) for n in (0, 1, 0)]
    assert torch.equal(result, ORIGINAL(q, k, v))

    s2 = HeadGroup((1, 2, 3), "s2", sa.S2Config(**WINDOW))
    groups = (HeadGroup((0,), "dense", DenseConfig()), s2)
    recipe = Recipe(
        Fingerprint("Mine", 2, 4, 4, 8, "sha256:" + "0" * 64), (LayerPlan(1, groups),), partial=True
    )
    with sa.sdpa_patched(recipe) as report:
        first, second, third = (by_name(q, k, v) for _ in range(3))
    assert torch.equal(first, ORIGINAL(q, k, v)) and torch.equal(third, first)
    sparse = ours(q, k, v, is_causal=False)
    assert (second[:, 1:] - sparse[:, 1:]).abs().max() < 1e-6
    assert (second[:, 0] - first[:, 0]).abs().max() < 1e-5
    assert report.reasons == {"asked for": 2}


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("nonsense",), {}, "sdpa_patched: unknown method 'nonsense'"),
        (("s2",), {"nonsense": 1}, "sdpa_patched: s2: .*nonsense"),
        (("s2",), {"min_length": 0}, "min_length is 0"),
        ((7,), {}, "a method is 7"),
        (("absent.json",), {}, "no recipe file"),
    ],
)
def test_bad_arguments_change_nothing(args, options, message) -> None:
    with pytest.raises(ValueError, match=message), sa.sdpa_patched(*args, **options):
        pass
    assert functional.scaled_dot_product_attention is ORIGINAL


def test_the_example_of_the_page_runs(capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations_sdpa.md").read_text()
    exec(
        compile(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], "example", "exec"),
        {"__name__": "x"},
    )
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.strip() not in page] == []
    assert printed.count("\n") == 3
