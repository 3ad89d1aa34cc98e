"""A good citizen of PyTorch: opcheck, compile, export, autocast, gradients, graphs, and loud refusals."""

from __future__ import annotations

import copy
import cProfile
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn as sa
from sparse_attn import Plan, SparseLayout, attend, sparse_attention, use_engine
from sparse_attn.engines import ENGINES, AttendCall, choose, hopper
from sparse_attn.engines.reference import ReferenceEngine
from sparse_attn.ops import attend_fwd, flatten
from sparse_attn.testing import assert_close, make_inputs, masked_attention, random_layout

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def small(kind="random", *, L=40, S=56, requires_grad=False, **kwargs):
    """A call small enough for opcheck and gradcheck: (q, k, v, layout), GQA of 2, blocks of 16."""
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 8, "device": DEVICE} | kwargs
    q, k, v = make_inputs(L=L, S=S, requires_grad=requires_grad, **sizes)
    return q, k, v, random_layout(kind, L, S, block_m=16, block_n=16, heads=2, device=DEVICE)


def flat(q, k, v, layout, *, causal=True, skip=None, grad=False, engine="reference"):
    call = AttendCall(q, k, v, layout, skip, causal, 0.25, want_kept=skip is not None, needs_grad=grad)
    return flatten(call, engine)


# -- operators ------------------------------------------------------------------------------------


@pytest.mark.plain_empty
@pytest.mark.parametrize("strides", ["contiguous", "blhd", "sliced"])
@pytest.mark.parametrize("kind", ["random", "columns"])
@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
def test_opcheck_forward(kind, strides, grad):
    q, k, v, layout = small(kind, strides=strides, requires_grad=grad)
    torch.library.opcheck(attend_fwd, flat(q, k, v, layout, grad=grad), test_utils=CHECKS)


@pytest.mark.plain_empty
def test_opcheck_forward_with_a_skip():
    q, k, v, layout = small("full", requires_grad=True)
    skip = torch.full(q.shape[:2], -1.0, device=DEVICE)
    torch.library.opcheck(attend_fwd, flat(q, k, v, layout, skip=skip, grad=True), test_utils=CHECKS)


@pytest.mark.plain_empty
@pytest.mark.parametrize("kind", ["random", "columns"])
@pytest.mark.parametrize("skips", [False, True], ids=["noskip", "skip"])
def test_opcheck_backward(kind, skips):
    q, k, v, layout = small(kind, strides="blhd")
    skip = torch.full(q.shape[:2], -1.0, device=DEVICE) if skips else None
    args = flat(q, k, v, layout, skip=skip, grad=True)
    out, lse, kept = attend_fwd(*args)
    grad_out = torch.randn_like(out)
    delta = (grad_out * out).sum(-1)
    attend_bwd = torch.ops.sparse_attn.attend_bwd.default
    torch.library.opcheck(
        attend_bwd, (lse, delta, kept, grad_out, *args), test_utils=("test_schema", "test_faketensor")
    )


def test_forward_never_writes_its_inputs():
    q, k, v, layout = small("columns")
    before = [x.clone() for x in (q, k, v, layout.blocks.indices, layout.columns.indices)]
    sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True)
    after = (q, k, v, layout.blocks.indices, layout.columns.indices)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -- compile and export ---------------------------------------------------------------------------


def value_and_grads(function, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def fresh_compile(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **kwargs)


@pytest.mark.plain_empty
@pytest.mark.parametrize("kind", ["random", "columns"])
def test_compile_fullgraph_forward_and_backward(kind):
    q, k, v, layout = small(kind)

    def run(q, k, v):
        return sparse_attention(
            q, k, v, layout, is_causal=True, enable_gqa=True, return_lse=True, engine="reference"
        )

    compiled = value_and_grads(fresh_compile(run, backend="aot_eager"), (q, k, v))
    eager = value_and_grads(run, (q, k, v))
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])
    for name, got, expected in zip(("dq", "dk", "dv"), compiled[2], eager[2], strict=True):
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.plain_empty
def test_compile_with_inductor():
    """Views around the operator and no arithmetic, so that the case needs no C++ compiler."""
    q, k, v, layout = small()

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sparse_attention(q, k, v, layout, enable_gqa=True, engine="reference")
        return out.transpose(1, 2)

    inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    with torch._inductor.config.patch(compile_threads=1):
        got = fresh_compile(run)(*inputs)
    assert torch.equal(got, run(*inputs)) and got.is_contiguous()


@pytest.mark.plain_empty
def test_compile_takes_the_layout_as_an_argument_and_builds_one_inside():
    q, k, v, layout = small()

    def given(q, k, v, layout):
        return sparse_attention(q, k, v, layout, enable_gqa=True, engine="reference")

    def built(q, k, v):
        layout = SparseLayout.full(q.shape[2], k.shape[2], block_m=16, block_n=16, device=q.device)
        return sparse_attention(q, k, v, layout, enable_gqa=True, engine="reference")

    compiled = fresh_compile(given, backend="aot_eager")
    other = random_layout("random", 40, 56, block_m=16, block_n=16, seed=9, device=DEVICE)
    first, second = compiled(q, k, v, layout), compiled(q, k, v, other)
    assert torch.equal(first, given(q, k, v, layout)) and torch.equal(second, given(q, k, v, other))
    assert not torch.equal(first, second)
    assert torch.equal(fresh_compile(built, backend="aot_eager")(q, k, v), built(q, k, v))


@pytest.mark.plain_empty
def test_compile_with_dynamic_lengths():
    def run(q, k, v):
        layout = SparseLayout.full(q.shape[2], k.shape[2], block_m=16, block_n=16, device=q.device)
        return sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True, engine="reference")

    compiled = fresh_compile(run, backend="aot_eager", dynamic=True)
    for L, S in ((40, 56), (41, 71)):
        q, k, v, _ = small(L=L, S=S)
        assert torch.equal(compiled(q, k, v), run(q, k, v))


@pytest.mark.plain_empty
def test_compile_does_not_trace_the_search_for_a_library(monkeypatch, recwarn):
    """Every engine asks whether it is on while a graph is traced: the answer is a constant, not a search of
    folders. Here the Hopper engine believes that it sees its card."""
    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (9, 0))
    monkeypatch.setattr(hopper, "torch", SimpleNamespace(cuda=cuda, compiler=torch.compiler))
    q, k, v, layout = small(device="cpu")
    layout = layout.to("cpu")

    def run(q, k, v):
        return sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True)

    assert torch.equal(fresh_compile(run, backend="eager")(q, k, v), run(q, k, v))
    assert not [w for w in recwarn if "Dynamo" in str(w.message)]


class OneAttention(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, q, k, v):
        return sparse_attention(q, k, v, self.layout, is_causal=True, enable_gqa=True, engine="reference")


@pytest.mark.plain_empty
@pytest.mark.parametrize("strict", [False, True], ids=["trace", "strict"])
def test_export(strict):
    q, k, v, layout = small("columns")
    program = torch.export.export(OneAttention(layout), (q, k, v), strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.sparse_attn.attend_fwd.default) == 1
    expected = OneAttention(layout)(q, k, v)
    assert type(expected) is torch.Tensor, "exporting left tensors without data in the layout's cache"
    assert torch.equal(program.module()(q, k, v), expected)


def test_meta_tensors_give_shapes():
    q, k, v, layout = small(strides="blhd", dtype=torch.bfloat16)
    meta = [x.to("meta") for x in (q, k, v)]
    real = sparse_attention(q, k, v, layout, enable_gqa=True, return_lse=True, engine="reference")
    fake = sparse_attention(*meta, layout.to("meta"), enable_gqa=True, return_lse=True, engine="reference")
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.plain_empty
@pytest.mark.parametrize("kind", ["random", "columns"])
def test_cuda_graph_capture(kind):
    q, k, v, layout = small(kind, head_dim=64, value_dim=64, dtype=torch.bfloat16)

    def run():
        return sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True, engine="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles the kernel and fills the layout's cache
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, run())


# -- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_casts_as_sdpa_does(dtype):
    q, k, v, layout = small("full", value_dim=16)
    with torch.autocast(DEVICE, dtype=dtype):
        out = sparse_attention(q, k.to(dtype), v, layout, enable_gqa=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert out.dtype == sdpa.dtype == dtype
    cast = [x.to(dtype) for x in (q, k, v)]
    assert torch.equal(out, sparse_attention(*cast, layout, enable_gqa=True))


def test_autocast_gradients_come_back_in_the_inputs_dtype():
    q, k, v, layout = small(requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = sparse_attention(q, k, v, layout, enable_gqa=True)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in grads)


def test_autocast_leaves_float64_alone():
    q, k, v, layout = small(dtype=torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = sparse_attention(q, k, v, layout, enable_gqa=True, engine="reference")
    assert out.dtype == torch.float64


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "columns", "empty_rows"])
@pytest.mark.parametrize("L, S", [(20, 20), (9, 21), (21, 9)], ids=["square", "L<S", "L>S"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_gradcheck(kind, L, S, causal):
    q, k, v = make_inputs(
        heads=4, kv_heads=2, L=L, S=S, head_dim=5, value_dim=3, dtype=torch.float64, requires_grad=True,
        device=DEVICE,
    )  # fmt: skip
    layout = random_layout(kind, L, S, block_m=8, block_n=8, heads=4, density=0.6, device=DEVICE)

    def run(q, k, v):
        out, lse = sparse_attention(
            q, k, v, layout, is_causal=causal, enable_gqa=True, return_lse=True, engine="reference"
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_gradcheck_with_a_skip():
    """Within a region where no vote tips, the skipping function is smooth; its gradient is exact."""
    q, k, v = make_inputs(L=24, S=40, head_dim=5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    layout = SparseLayout.full(24, 40, block_m=8, block_n=8, device=DEVICE)
    plan = Plan(layout, torch.full((1, 2), -0.5, device=DEVICE))

    def run(q, k, v):
        return attend(q, k, v, plan, engine="reference", want_kept=True)

    kept = run(q, k, v).kept
    assert 0 < kept.sum() < kept.numel()
    assert torch.autograd.gradcheck(lambda *x: (run(*x).out, run(*x).lse), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("which", ["out", "lse"])
def test_a_loss_on_one_output_alone(which):
    q, k, v, layout = small("full", requires_grad=True)
    got = attend(q, k, v, Plan(layout), enable_gqa=True)
    exact = dict(zip(("out", "lse"), masked_attention(q, k, v), strict=True))
    grads = torch.autograd.grad(getattr(got, which).sum(), (q, k, v))
    truth = torch.autograd.grad(exact[which].sum(), (q, k, v), allow_unused=True)
    for found, expected in zip(grads, truth, strict=True):
        expected = torch.zeros_like(found) if expected is None else expected.to(found)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_for_one_input_alone(name):
    q, k, v, layout = small()
    inputs = {"q": q, "k": k, "v": v}
    inputs[name].requires_grad_()
    sparse_attention(q, k, v, layout, enable_gqa=True).sum().backward()
    assert inputs[name].grad.abs().sum() > 0
    assert all(x.grad is None for other, x in inputs.items() if other != name)


def test_second_derivatives_raise():
    q, k, v, layout = small(requires_grad=True)
    out = sparse_attention(q, k, v, layout, enable_gqa=True)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"second derivatives are not supported.*create_graph=False"
    ):
        dq.sum().backward()


def test_forward_mode_raises_instead_of_a_zero_tangent():
    q, k, v, layout = small()
    with pytest.raises(NotImplementedError, match="sparse_attention: forward-mode differentiation"):
        torch.func.jvp(
            lambda x: sparse_attention(x, k, v, layout, enable_gqa=True), (q,), (torch.ones_like(q),)
        )


def test_functional_gradients_raise_with_the_remedy():
    q, k, v, layout = small()
    with pytest.raises(NotImplementedError, match=r"func\.grad.* not supported.*torch\.autograd\.grad"):
        torch.func.grad(lambda x: sparse_attention(x, k, v, layout, enable_gqa=True).sum())(q)


def test_no_grad_means_no_graph():
    q, k, v, layout = small(requires_grad=True)
    with torch.no_grad():
        assert not sparse_attention(q, k, v, layout, enable_gqa=True).requires_grad
    assert sparse_attention(q, k, v, layout, enable_gqa=True).requires_grad


def test_a_layout_used_in_inference_mode_serves_training_later():
    q, k, v, layout = small("columns")
    with torch.inference_mode():
        first = sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = sparse_attention(*inputs, layout, is_causal=True, enable_gqa=True)
    out.sum().backward()
    torch.testing.assert_close(first, out)  # a forward without gradients may add in another order
    assert q.grad is not None


def test_vmap_over_the_operator():
    q, k, v, layout = small()
    queries = torch.stack([q, 2 * q])
    batched = torch.func.vmap(lambda x: sparse_attention(x, k, v, layout, enable_gqa=True))(queries)
    assert torch.equal(batched[1], sparse_attention(2 * q, k, v, layout, enable_gqa=True))


# -- what a call costs on the host ----------------------------------------------------------------


class Idle(ReferenceEngine):
    """Computes nothing, so that only the way to an engine is left to measure."""

    name = "idle"

    def why_not(self, call):
        return []

    def forward(self, call):
        kept = torch.zeros(call.kept_shape, dtype=torch.uint8, device=call.q.device)
        lse = torch.zeros(call.q.shape[:3], device=call.q.device)
        return torch.zeros_like(call.q), lse, kept if call.want_kept else None


@pytest.mark.plain_empty
@pytest.mark.parametrize("grad, most", [(False, 105), (True, 240)], ids=["nograd", "grad"])
def test_a_call_takes_few_python_steps(grad, most, monkeypatch):
    """Counted and not timed, so that a busy machine changes nothing: 89 and 205 when this was written,
    115 and 268 with `torch.library.register_autograd` and through the operator at every call."""
    monkeypatch.setitem(ENGINES, "idle", Idle())
    q, k, v, layout = small("columns", value_dim=16, requires_grad=grad)

    def call():
        attend(q, k, v, Plan(layout), is_causal=True, enable_gqa=True, engine="idle")

    call()  # fills the layout's cache
    profile = cProfile.Profile()
    profile.runcall(call)
    steps = sum(entry.callcount for entry in profile.getstats())
    assert 20 < steps <= most, f"{steps} calls of Python and built-in functions"


class Names(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
def test_whoever_watches_sees_the_operator(grad):
    """A call that nothing watches goes to the engine directly; modes and profilers must not notice."""
    q, k, v, layout = small("columns", requires_grad=grad)

    def run():
        return sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True, return_lse=True)

    alone = run()
    with Names() as names:
        watched = run()
    assert names.seen.count("sparse_attn.attend_fwd.default") == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = run()
    assert [event.count for event in profile.key_averages() if event.key == "sparse_attn::attend_fwd"] == [1]
    for other in (watched, profiled):
        assert all(torch.equal(x, y) for x, y in zip(alone, other, strict=True))


# -- the choice of an engine ----------------------------------------------------------------------


class ForwardOnly(ReferenceEngine):
    """A backend without gradients, to see that it is passed over or refused, never used in silence."""

    name = "forward_only"

    def why_not(self, call):
        return ["no backward; call it under torch.no_grad()"] if call.needs_grad else []

    def forward(self, call):
        out, lse, kept = super().forward(call)
        return out + 100, lse, kept


@pytest.fixture
def forward_only(monkeypatch):
    rest = dict(ENGINES)
    monkeypatch.delenv("SPARSE_ATTN_ENGINE", raising=False)
    for name in rest:
        monkeypatch.delitem(ENGINES, name)
    monkeypatch.setitem(ENGINES, "forward_only", ForwardOnly())
    for name, engine in rest.items():
        monkeypatch.setitem(ENGINES, name, engine)


def test_an_engine_without_backward_is_passed_over_or_refused(forward_only):
    q, k, v, layout = small()
    assert sparse_attention(q, k, v, layout, enable_gqa=True).mean() > 50
    q.requires_grad_()
    assert sparse_attention(q, k, v, layout, enable_gqa=True).mean() < 50
    with pytest.raises(NotImplementedError) as error:
        sparse_attention(q, k, v, layout, enable_gqa=True, engine="forward_only")
    for part in ("'forward_only' cannot run this call", "gradients", "no backward; call it under"):
        assert part in str(error.value)
    with torch.no_grad():
        assert sparse_attention(q, k, v, layout, enable_gqa=True, engine="forward_only").mean() > 50


def test_precedence_argument_then_context_then_environment(forward_only, monkeypatch):
    q, k, v, layout = small()

    def chosen(**kwargs):
        call = AttendCall(q, k, v, layout, None, False, 1.0)
        return choose(call, **kwargs).name

    assert chosen() == "forward_only"
    monkeypatch.setenv("SPARSE_ATTN_ENGINE", "reference")
    assert chosen() == "reference"
    with use_engine("forward_only"):
        assert chosen() == "forward_only"
        assert chosen(name="reference") == "reference"
        with use_engine(None):
            assert chosen() == "reference"
    assert chosen() == "reference"


def test_use_engine_ends_when_its_block_raises(forward_only):
    with pytest.raises(RuntimeError, match="inside"), use_engine("reference"):
        raise RuntimeError("inside")
    q, k, v, layout = small()
    assert choose(AttendCall(q, k, v, layout, None, False, 1.0)).name == "forward_only"


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_unknown_engine_is_named_with_the_choices(how, monkeypatch):
    q, k, v, layout = small()
    with pytest.raises(ValueError, match=r"unknown engine 'warp'; choose one of .*reference"):
        if how == "argument":
            sparse_attention(q, k, v, layout, enable_gqa=True, engine="warp")
        elif how == "context":
            with use_engine("warp"):
                pass
        else:
            monkeypatch.setenv("SPARSE_ATTN_ENGINE", "warp")
            sparse_attention(q, k, v, layout, enable_gqa=True)


def test_a_forced_engine_that_cannot_run_raises_with_its_reasons():
    """float64 is the reference's alone, so every other engine must refuse it, and say so."""
    q, k, v, layout = small(dtype=torch.float64)
    for name in set(ENGINES) - {"reference"}:
        with pytest.raises(NotImplementedError) as error:
            sparse_attention(q, k, v, layout, enable_gqa=True, engine=name)
        text = str(error.value)
        assert f"engine {name!r} cannot run this call" in text
        assert "torch.float64" in text and f"  {name}: " in text
    assert sparse_attention(q, k, v, layout, enable_gqa=True).dtype == torch.float64


def test_when_no_engine_can_every_reason_is_listed(forward_only, monkeypatch):
    for name in set(ENGINES) - {"forward_only"}:
        monkeypatch.delitem(ENGINES, name)
    second = ForwardOnly()
    second.name = "second"
    monkeypatch.setitem(ENGINES, "second", second)
    q, k, v, layout = small(requires_grad=True)
    with pytest.raises(NotImplementedError, match="no engine can run this call") as error:
        sparse_attention(q, k, v, layout, enable_gqa=True)
    for part in ("call: q (1, 4, 40, 16)", "  forward_only: no backward", "  second: no backward"):
        assert part in str(error.value)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU Triton compiles")
def test_the_interpreter_runs_only_when_it_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v, layout = small()
    assert choose(AttendCall(q, k, v, layout, None, False, 1.0)).name != "triton"


# -- layouts as objects ---------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_layouts_survive_copy_and_pickle(clone, used):
    q, k, v, layout = small("columns")
    if used:
        sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True)
    other = clone(layout).check()
    assert other.blocks.indices.data_ptr() != layout.blocks.indices.data_ptr()
    assert torch.equal(other.to_dense(True), layout.to_dense(True))
    expected = sparse_attention(q, k, v, layout, is_causal=True, enable_gqa=True)
    assert torch.equal(sparse_attention(q, k, v, other, is_causal=True, enable_gqa=True), expected)


def test_one_layout_serves_causal_and_not():
    """What is cached for one mask must not leak into the other."""
    q, k, v, layout = small()
    for causal in (True, False, True):
        got = attend(q, k, v, Plan(layout), is_causal=causal, enable_gqa=True)
        mask = layout.to_dense(causal)
        truth, plain = (masked_attention(q, k, v, mask, dtype=t) for t in (torch.float64, torch.float32))
        assert_close(got.out, truth[0], plain[0], f"out, causal={causal}")


def test_version_is_a_version():
    assert sa.__version__.count(".") >= 1
