"""Patching video transformers: what is refused, copies, `explain`, and `torch.compile`."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers_models import MODELS, assert_near, call, generate, inputs  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.integrations import diffusers as video  # noqa: E402
from sparse_attn.methods import METHODS, Method  # noqa: E402
from sparse_attn.methods import blasst as blasst_module  # noqa: E402
from sparse_attn.methods.anchor import AnchorConfig  # noqa: E402
from sparse_attn.methods.blasst import BlasstConfig  # noqa: E402

PATTERNS = ("diagonal:0.3", "vertical_stripe:first_frame")


# -- patch, unpatch, copies ---------------------------------------------------------------------------


def test_patch_dispatches_by_model_and_explains():
    model = MODELS["hunyuan"]()
    sa.patch(model, "vdit", patterns="diagonal:1", layers={0: "dense", 3: ("blasst", {"threshold": 1e-3})})
    lines = sa.explain(model).split("\n")
    assert lines[0] == "HunyuanVideoTransformer3DModel, patched:"
    assert re.fullmatch(r"0 +stock +asked for by `layers`", lines[2])
    assert re.fullmatch(r"1-2 +vdit\(patterns='diagonal:1'\)", lines[3])
    assert re.fullmatch(r"3 +blasst\(threshold=0.001\) +asked for by `layers`", lines[4])
    assert lines[-1] == "steps: not counted; not called yet"
    call(model, inputs("hunyuan"))
    assert "grid (3, 8, 8), 20 text tokens, of which [20, 13] are real" in sa.explain(model)
    sa.unpatch(model)
    assert "not patched" in sa.explain(model)
    assert not model._forward_pre_hooks and not hasattr(model, "_sparse_attn_patch")


REFUSED = [
    ("anchor", {}, "anchor is made for causal attention"),
    ("flash", {}, "unknown method 'flash'"),
    (7, {}, "a method is 7"),
    ("vdit", {"patterns": "full", "grid": (1, 2, 3)}, "grid given, but the model's own calls"),
    ("vdit", {"patterns": "full", "width": 3}, "vdit: .*width"),
    ("vdit", {"patterns": ["full"] * 3}, "2 heads|has 3"),
    ("sparsed", {}, "pass num_steps"),
    ("sparsed", {"num_steps": 0}, "num_steps is 0"),
    ("dense", {"theta": 1.0}, "belong to a method's name"),
    ("blasst", {"threshold": 0.1, "layers": {9: "dense"}}, r"layers names \[9\]; this model's layers"),
    ("blasst", {"threshold": 0.1, "layers": {2: "anchor"}}, "made for causal attention"),
    ("blasst", {"threshold": 0.1, "config": AnchorConfig()}, "either config or its fields"),
    ("blasst", {"config": AnchorConfig()}, "takes BlasstConfig"),
    ("none.json", {}, "there is no recipe file"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "message"), REFUSED)
def test_bad_requests_leave_the_model_as_it_was(method, options, message):
    model = MODELS["wan"]()
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=message):
        sa.patch(model, method, **options)
    assert model.attn_processors == before and not model._forward_pre_hooks
    assert not video.is_patched(model)


def test_patching_twice_and_unpatching_nothing():
    model = MODELS["wan"]()
    with pytest.raises(ValueError, match="unpatch: this WanTransformer3DModel is not patched"):
        sa.unpatch(model)
    sa.patch(model, "blasst", threshold=0.1)
    with pytest.raises(ValueError, match="patched already"):
        sa.patch(model, "blasst", threshold=0.1)
    other = MODELS["wan"]()
    with pytest.raises(RuntimeError, match="on purpose"), sa.patched(other, "blasst", threshold=0.1):
        raise RuntimeError("on purpose")
    assert not video.is_patched(other)


def test_other_models_and_processors_are_refused():
    tiny = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"UNet2DModel is not supported.*choose one of Wan"):
        sa.patch(tiny, "blasst", threshold=0.1)
    model = MODELS["cogvideox"]()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="FusedCogVideoXAttnProcessor2_0 as an attention processor"):
        sa.patch(model, "blasst", threshold=0.1)
    model.unfuse_qkv_projections()
    sa.patch(model, "blasst", threshold=0.1)


def test_a_pipeline_is_refused_with_the_remedy():
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=MODELS["cogvideox"]()
    )
    for refused in (lambda: sa.patch(pipe, "blasst", threshold=0.1), lambda: sa.explain(pipe)):
        with pytest.raises(ValueError, match=r"CogVideoXPipeline; patch its pipe\.transformer instead"):
            refused()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_patched_on_its_own(duplicate):
    model = MODELS["wan"]()
    video.patch(model, "sparsed", num_steps=5, skip_ratio=0.2, block_size=16)
    ref = generate(model, "wan", passes=1)
    twin = duplicate(model)
    call(model, inputs("wan", timestep=950))  # the state of the one does not move the other
    assert twin._sparse_attn_patch.state.step == 4 and model._sparse_attn_patch.state.step == 0
    out = generate(twin, "wan", passes=1)
    assert all(torch.equal(a, b) for a, b in zip(out, ref, strict=True))
    video.unpatch(model)
    assert video.is_patched(twin)
    video.unpatch(twin)
    assert not twin._forward_pre_hooks
    assert torch.equal(call(twin, inputs("wan")), call(model, inputs("wan")))


def test_dtype_and_backend_may_change_between_generations():
    model = MODELS["wan"]()
    video.patch(model, "vdit", patterns=PATTERNS, block_size=16, layers={0: "dense"})
    ref = call(model, inputs("wan"))
    model.set_attention_backend("_native_math")
    assert all(p._attention_backend is not None for p in model.attn_processors.values())
    assert_near(call(model, inputs("wan")), ref)
    model.reset_attention_backend()
    model.to(torch.bfloat16)
    assert_near(call(model, inputs("wan", dtype=torch.bfloat16)).float(), ref, torch.bfloat16)


def test_a_call_that_the_processors_cannot_place_is_refused():
    model = MODELS["wan"]()
    video.patch(model, "vdit", patterns="full")
    with pytest.raises(ValueError, match="call the patched transformer itself"):
        model.blocks[0].attn1(torch.randn(1, 192, 24))
    call(model, inputs("wan"))
    with pytest.raises(ValueError, match="layer 0 attends 100 tokens"):
        model.blocks[0].attn1(torch.randn(1, 100, 24))
    with pytest.raises(NotImplementedError, match="context parallelism splits the sequence"):
        model.blocks[0].attn1.processor._parallel_config = object()


def test_a_sixth_method_is_reachable(monkeypatch):
    calls = []

    def select(query, key, config, *, is_causal, scale, context):
        calls.append(context.layer)
        return blasst_module.select(query, key, config, is_causal=is_causal, scale=scale, context=context)

    sixth = Method("sixth", BlasstConfig, select, sa.blasst_attention, causal=True)
    monkeypatch.setitem(METHODS, "sixth", sixth)
    model = MODELS["wan"]()
    ref = call(model, inputs("wan"))
    sa.patch(model, "sixth", threshold=0.0)
    assert_near(call(model, inputs("wan")), ref)
    assert calls == [0, 1, 2]


# -- torch.compile --------------------------------------------------------------------------------------


@pytest.mark.plain_empty
@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_compiled_blocks_serve_all_layers_and_steps(name):
    """As many graphs as the stock model has, each whole, though layers differ, text is masked and steps
    change."""

    def compiled(model):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in model.modules():
            if type(block).__name__.endswith("TransformerBlock") or type(block).__name__ == "CogVideoXBlock":
                block.compile(fullgraph=True, backend="eager")
        out = generate(model, name, steps=3, passes=1)
        return out, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    # As stock models have: a graph for each kind of block, and one where its input's strides change.
    stock_graphs = compiled(MODELS[name]())[1] if name == "wan" else {"hunyuan": 3, "cogvideox": 2}[name]
    options = {"num_steps": 3, "skip_ratio": 0.5, "select_ratio": 0.3, "block_size": 16}
    layers = {1: ("vdit", {"patterns": PATTERNS, "block_size": 16})}
    model, twin = MODELS[name](), MODELS[name]()
    video.patch(model, "sparsed", **options, layers=layers)
    video.patch(twin, "sparsed", **options, layers=layers)
    out, graphs = compiled(model)
    assert graphs == stock_graphs > 0
    for a, b in zip(out, generate(twin, name, steps=3, passes=1), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("rule", ["vdit", "function"])
def test_the_operator_of_compiled_graphs(rule):
    """opcheck, also where a user's function returns its very argument."""
    model = MODELS["wan"]()
    if rule == "vdit":
        video.patch(model, "vdit", patterns=PATTERNS, block_size=16)
    else:
        video.patch(model, lambda q, k, v, *, layer, is_causal, scale: v)
    call(model, inputs("wan"))
    q, k, v = torch.randn(3, 2, 192, 2, 12).transpose(2, 3)  # [B, H, N, D], as the processors hold them
    number = model.blocks[1].attn1.processor.number
    torch.library.opcheck(torch.ops.sparse_attn.video_attention.default, (q, k, v, 0.3, number))


@pytest.mark.plain_empty
def test_compiled_whole():
    model, given = MODELS["hunyuan"](), inputs("hunyuan")
    video.patch(model, "vdit", patterns=PATTERNS, block_size=16)
    ref = call(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_near(call(compiled, given), ref)
    shorter = given | {"encoder_attention_mask": given["encoder_attention_mask"].clone()}
    shorter["encoder_attention_mask"][:, 5:] = False
    out = call(compiled, shorter)
    assert_near(out, call(model, shorter))
    assert (out - ref).abs().max() > 1e-4


# -- the page -------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "integrations_diffusers.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(example, "integrations_diffusers.md", "exec"), {"__name__": "page"})
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 6 and set(printed) <= {line.strip() for line in page.splitlines()}
