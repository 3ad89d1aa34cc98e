"""The operators behind every call, registered with PyTorch: `sparse_attn::attend_fwd` and
`sparse_attn::attend_bwd` (with its helper `sparse_attn::row_dot`).

Their schemas hold only tensors and plain values: a layout travels as its flat parts, so that
`torch.compile`, `torch.export` and CUDA graphs see fixed arity and nothing opaque. Inside, the parts
become an `AttendCall` again and the engine that was chosen at the call runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.engines import ENGINES, AttendCall, lse_dtype, new_out
from sparse_attn.engines.triton import row_dot as triton_row_dot
from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.schedule import NUM_FLAT, Schedule

NAMESPACE = "sparse_attn"

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor indices, Tensor bounds, "
    "Tensor? column_offsets, Tensor? column_indices, Tensor? column_bounds, "
    "Tensor? t_offsets, Tensor? t_indices, Tensor? t_bounds, Tensor? skip_below, "
    "Tensor? order, Tensor? m_offsets, Tensor? m_indices, Tensor? m_bounds, "
    "Tensor? t_order, Tensor? tm_offsets, Tensor? tm_indices, Tensor? tm_bounds, "
    "int batch, int heads, int block_m, int block_n, int column_group, bool alike, bool full, "
    "bool is_causal, float scale, bool want_kept, str engine"
)
_NUM_TENSORS = 13 + NUM_FLAT
torch.library.define(f"{NAMESPACE}::attend_fwd", f"({_CALL}) -> (Tensor, Tensor, Tensor)")
torch.library.define(f"{NAMESPACE}::row_dot", "(Tensor a, Tensor b) -> Tensor")
torch.library.define(
    f"{NAMESPACE}::attend_bwd",
    f"(Tensor lse, Tensor delta, Tensor kept, Tensor grad_out, {_CALL}) -> (Tensor, Tensor, Tensor)",
)


def flatten(call: AttendCall, engine: str) -> tuple[Any, ...]:
    """The arguments of `attend_fwd`. The transposed list is made only where gradients need it, and of
    the schedule only what the engine reads."""
    layout, causal = call.layout, call.is_causal
    columns: tuple[Any, ...] = (None, None, None)
    transposed: tuple[Any, ...] = (None, None, None)
    if layout.columns is not None:
        columns = (layout.columns.offsets, layout.columns.indices, layout.column_bounds(causal))
    if call.needs_grad:
        lists = layout.transposed()
        transposed = (lists.offsets, lists.indices, layout.transposed_bounds(causal))
    blocks = (layout.blocks.offsets, layout.blocks.indices, layout.block_bounds(causal))
    group = 1 if layout.columns is None else layout.columns.group
    shape = (layout.batch, layout.heads, layout.block_m, layout.block_n, group)
    known = (layout.neighbours_alike, layout.is_full)
    rule = (causal, call.scale, call.want_kept, engine)
    schedule = ENGINES[engine].schedule(call)
    tensors = (*blocks, *columns, *transposed, call.skip_below, *schedule.flat())
    return (call.q, call.k, call.v, *tensors, *shape, *known, *rule)


def _unflatten(args: tuple[Any, ...]) -> tuple[AttendCall, str]:
    q, k, v, offsets, indices, bounds, c_offsets, c_indices, c_bounds = args[:9]
    t_offsets, t_indices, t_bounds, skip_below = args[9:13]
    schedule = Schedule.from_flat(args[13:_NUM_TENSORS])
    batch, heads, block_m, block_n, group, alike, full, *rule = args[_NUM_TENSORS:]
    is_causal, scale, want_kept, engine = rule
    columns = None if c_offsets is None else IndexList(c_offsets, c_indices, group)
    cache: dict[Any, Any] = {("block_bounds", is_causal): bounds, ("schedule",): schedule}
    if columns is not None:
        cache["column_bounds", is_causal] = c_bounds
    if t_offsets is not None:
        cache[("transposed",)] = IndexList(t_offsets, t_indices)
        cache["transposed_bounds", is_causal] = t_bounds
    layout = SparseLayout(
        IndexList(offsets, indices), block_m, block_n, q.shape[2], k.shape[2], batch, heads, columns,
        cache, alike, full,
    )  # fmt: skip
    needs_grad = t_offsets is not None
    return AttendCall(q, k, v, layout, skip_below, is_causal, scale, want_kept, needs_grad), engine


def _attend_fwd(*args):
    call, engine = _unflatten(args)
    out, lse, kept = ENGINES[engine].forward(call)
    return out, lse, call.q.new_empty(0, dtype=torch.uint8) if kept is None else kept


def _attend_fwd_fake(*args):
    call, _ = _unflatten(args)
    out, lse = new_out(call.q, call.v.shape[-1]), call.q.new_empty(call.q.shape[:3], dtype=lse_dtype(call.q))
    kept_shape = call.kept_shape if call.want_kept else (0,)
    return out, lse, call.q.new_empty(kept_shape, dtype=torch.uint8)


def _attend_bwd(lse, delta, kept, grad_out, *args):
    call, engine = _unflatten(args)
    kept = kept if call.skip_below is not None else None
    return ENGINES[engine].backward(call, lse, delta, kept, grad_out)


def _attend_bwd_fake(lse, delta, kept, grad_out, *args):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in args[:3])


def _below_autograd(keyset, args):
    with torch._C._AutoDispatchBelowAutograd():
        return attend_fwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _AttendFwd(torch.autograd.Function):
    """What `torch.library.register_autograd` makes, without its walk over the schema at every call: for
    as many arguments as these that costs 0.5 ms of Python, more than many a kernel runs."""

    @staticmethod
    def forward(ctx, keyset, *args):
        output = _below_autograd(keyset, args)
        ctx.save_for_backward(*args[:_NUM_TENSORS], *output)
        ctx.plain = args[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse, _grad_kept):
        *tensors, out, lse, kept = ctx.saved_tensors
        if grad_out is None:  # the loss is on lse alone
            grad_out = torch.zeros_like(out)
        delta = torch.ops.sparse_attn.row_dot.default(grad_out, out)
        if grad_lse is not None:
            delta = delta - grad_lse
        grads = torch.ops.sparse_attn.attend_bwd.default(lse, delta, kept, grad_out, *tensors, *ctx.plain)
        return None, *grads, *[None] * (_NUM_TENSORS - 3 + len(ctx.plain))


def _attend_fwd_autograd(keyset, *args):
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:3]):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "sparse_attn: torch.func.grad, vjp and jacrev are not supported, nor vmap over inputs that "
                "require grad; use backward or torch.autograd.grad."
            )
        return _AttendFwd.apply(keyset, *args)
    return _below_autograd(keyset, args)


def _row_dot(a, b):
    """sum(a * b, -1) in float32 (float64 for float64): one pass on the GPU, where PyTorch makes four."""
    if a.is_cuda and a.dtype != torch.float64 and not ENGINES["triton"].why_off():
        return triton_row_dot(a, b)
    return (a.to(lse_dtype(a)) * b.to(lse_dtype(a))).sum(-1)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "sparse_attn: second derivatives are not supported; differentiate once (create_graph=False), or "
        "use torch.nn.functional.scaled_dot_product_attention with a mask."
    )


for _name, _impl, _fake in (
    ("attend_fwd", _attend_fwd, _attend_fwd_fake),
    ("attend_bwd", _attend_bwd, _attend_bwd_fake),
    ("row_dot", _row_dot, lambda a, b: a.new_empty(a.shape[:3], dtype=lse_dtype(a))),
):
    torch.library.impl(f"{NAMESPACE}::{_name}", ("CPU", "CUDA"), _impl)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
attend_fwd = torch.ops.sparse_attn.attend_fwd.default
_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")  # what it registers lives as long as this object
_fragment.impl("attend_fwd", _attend_fwd_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd(f"{NAMESPACE}::attend_bwd", _no_second_derivative)


def run(call: AttendCall, engine: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and kept of a call: through the operator or, where nothing could tell the difference,
    from the engine itself, which spares two turns through the dispatcher."""
    if call.needs_grad or _is_watched(call):
        return attend_fwd(*flatten(call, engine))
    return ENGINES[engine].forward(call)


def _is_watched(call: AttendCall) -> bool:
    """Whether something transforms, traces or times operators, or a tensor is not a plain one."""
    return (
        torch.compiler.is_compiling()
        or not all(type(x) in _PLAIN for x in (call.q, call.k, call.v, call.layout.blocks.offsets))
        or call.q.device.type not in ("cpu", "cuda")
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


_PLAIN = (Tensor, torch.nn.Parameter)
