"""Padded batches inside compiled graphs: a layer's attention as one operator.

Which tokens of a batch are real is data, on which a graph cannot branch. So where a graph is traced and the
mask may hide padding, `transformers.attention_forward` becomes the operator `sparse_attn::padded_attention`,
which runs that very function when the graph runs. Its backward runs it again, with gradients.
"""

from __future__ import annotations

import ctypes
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sparse_attn.checks import autocast

_NUMBER = "_sparse_attn_number"
_numbers = count()
_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def _number_of(address: int) -> int:
    """The number of a layer, given the `id` of it, which the caller holds. A copy has a number of its own."""
    module: Any = ctypes.cast(address, ctypes.py_object).value
    number = module.__dict__.get(_NUMBER)
    if number is None or _layers.get(number) is not module:
        number = next(_numbers)
        setattr(module, _NUMBER, number)
        _layers[number] = module
    return number


# As what `transformers._read_config` is, and for the same reason.
_number_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def padded_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, is_causal: bool
) -> Tensor:
    """The layer's attention as an operator of the graph that is being traced.

    Args:
        q: [B, Hq, L, D]; k, v: [B, Hkv, S, D and Dv].
        padding: bool [B, S], true on real tokens.

    Returns:
        [B, L, Hq, Dv]
    """
    number = _number_of(id(module))
    q, k, v = autocast(q, k, v)
    return torch.ops.sparse_attn.padded_attention(q, k, v, padding, scale, is_causal, number)


def _run(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, is_causal: bool, number: int
) -> Tensor:
    from sparse_attn.integrations.transformers import attend_padded  # which imports this module

    module = _layers.get(number)
    if module is None:
        raise ValueError(
            "sparse_attn: the model that this graph was compiled or exported from is gone; compile it again."
        )
    return attend_padded(module, q, k, v, padding, scale, is_causal)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, is_causal: bool, number: int
) -> Tensor:
    out = _run(q, k, v, padding, scale, is_causal, number).contiguous()
    # A function of the user's may hand back what it was given; an operator must not.
    return out.clone() if any(out.data_ptr() == x.data_ptr() for x in (q, k, v)) else out


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, is_causal: bool, number: int
) -> Tensor:
    B, H, L, _ = q.shape
    return q.new_empty(B, L, H, v.shape[-1])


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, is_causal: bool, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    with _above_autograd(), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        grads = torch.autograd.grad(_run(q, k, v, padding, scale, is_causal, number), (q, k, v), grad)
    return tuple(x.contiguous() for x in grads)  # type: ignore[return-value]


def _above_autograd() -> Any:
    """Operators are dispatched below autograd, which this switches on again for what runs inside."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradOther", "ADInplaceOrView"):  # AutogradCPU stands for every device
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, is_causal: bool, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, padding, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, padding)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.sparse_attn.padded_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads, None, None, None, None)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor padding, float scale, bool is_causal, int layer"
torch.library.define("sparse_attn::padded_attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.impl("sparse_attn::padded_attention", "CompositeExplicitAutograd", _forward)
torch.library.register_fake("sparse_attn::padded_attention", _forward_fake)
torch.library.register_autograd("sparse_attn::padded_attention", _autograd_backward, setup_context=_save)
torch.library.define(
    "sparse_attn::padded_attention_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl("sparse_attn::padded_attention_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("sparse_attn::padded_attention_backward", _backward_fake)
