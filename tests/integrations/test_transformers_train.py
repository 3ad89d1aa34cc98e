"""Training a patched model: gradients of all weights equal those of eager attention under the pattern."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from references import blasst as blasst_reference  # noqa: E402
from references import s2 as s2_reference  # noqa: E402
from test_transformers_patch import error, tiny_model, tokens  # noqa: E402

import sparse_attn as sa  # noqa: E402

LENGTH = 48
S2 = {"block_size": 8, "local_blocks": 1, "vert_stride": 2}
BLASST = {"threshold": 1.0, "block_m": 8, "block_n": 8}


@torch.no_grad()
def s2_mask(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, Hq, L, L] by the definition, query by query."""
    config, (heads, kv_heads, L) = sa.S2Config(**S2), (q.shape[1], k.shape[1], q.shape[2])
    shifts = s2_reference.shift_rule(config, heads, kv_heads)
    masks = [torch.tensor(s2_reference.token_mask(config, shift, L, L, True)) for shift in shifts]
    return torch.stack(masks).repeat_interleave(heads // kv_heads, 0)[None].expand(q.shape[0], -1, -1, -1)


@torch.no_grad()
def blasst_mask(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The tiles that the paper's loop keeps, before the causal edge."""
    lambdas = [[BLASST["threshold"]] * q.shape[1]] * q.shape[0]
    sizes = {"block_m": BLASST["block_m"], "block_n": BLASST["block_n"]}
    _, _, kept = blasst_reference.blasst(q, k, k, lambdas, **sizes, is_causal=True, scale=scale)
    mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for b, h, i, j in kept:
        mask[b, h, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = True
    return mask.tril()


class Eager:
    """Softmax of the whole matrix under a method's mask, differentiated by PyTorch."""

    def __init__(self, mask_of) -> None:
        self.mask_of = mask_of
        self.density: list[float] = []

    def __call__(self, q, k, v, *, layer, is_causal, scale):
        mask = self.mask_of(q, k, scale)
        self.density.append((mask.sum() / torch.ones_like(mask).tril().sum()).item())
        group = q.shape[1] // k.shape[1]
        logits = q @ k.repeat_interleave(group, 1).mT * scale
        return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


METHODS = {"s2": (S2, s2_mask), "blasst": (BLASST, blasst_mask)}


def gradients(model, ids: Tensor, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, use_cache=False, **inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@contextmanager
def checkpointed(model, on: bool) -> Iterator[None]:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    yield
    if on:
        model.gradient_checkpointing_disable()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_eager_attention(method: str, recompute: bool, padded: bool) -> None:
    options, mask_of = METHODS[method]
    model, ids, eager = tiny_model().train(), tokens(2, LENGTH), Eager(mask_of)
    inputs = {"labels": ids.clone()}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, 37:] = 0
        inputs["labels"][1, 37:] = -100
    stock = gradients(model, ids, **inputs)
    with sa.patched(model, eager):
        expected = gradients(model, ids, **inputs)
    assert min(eager.density) < 0.95, "the pattern leaves something out"
    with sa.patched(model, method, **options), checkpointed(model, recompute):
        ours = gradients(model, ids, **inputs)
    for name, grad in ours.items():
        scale = expected[name].abs().max().item()
        assert grad.isfinite().all() and error(grad, expected[name]) < 2e-4 * scale, name
    name = "model.layers.0.self_attn.q_proj.weight"
    assert error(ours[name], stock[name]) > 1e-2 * stock[name].abs().max().item()


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(method: str) -> None:
    """Some steps of AdamW in bfloat16 autocast on one batch lower the loss."""
    model, ids = tiny_model().train(), tokens(2, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    with sa.patched(model, method, **METHODS[method][0]):
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_method_of_a_model_that_is_trained_with_dropout_says_so() -> None:
    model, ids = tiny_model(attention_dropout=0.1).train(), tokens(1, LENGTH)
    with sa.patched(model, "s2", **S2):
        with pytest.raises(ValueError, match=r"dropout is 0\.1; set attention_dropout=0"):
            model(ids, labels=ids)
        model.eval()
        assert model(ids, labels=ids).loss.isfinite()
