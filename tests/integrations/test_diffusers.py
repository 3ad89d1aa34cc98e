"""Video transformers of diffusers: exact where dense, the paper's patterns where not, reversible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers_models import (  # noqa: E402
    GRIDS,
    LAYERS,
    MODELS,
    TEXT,
    assert_near,
    call,
    generate,
    image_to_video,
    inputs,
    pipeline,
)

import sparse_attn as sa  # noqa: E402
from sparse_attn.integrations import diffusers as video  # noqa: E402
from sparse_attn.methods.anchor import AnchorConfig  # noqa: E402
from sparse_attn.methods.sparsed import SparseDConfig  # noqa: E402
from sparse_attn.methods.vdit import VDiTConfig, vdit_layout  # noqa: E402
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe  # noqa: E402

PATTERNS = ("diagonal:0.3", "vertical_stripe:first_frame")


def masked_stock(monkeypatch, mask_of) -> list[int]:
    """Make the stock processors' self-attention dense under the mask that `mask_of(number of the call)`
    gives, bool [1, H, N, N] or None: an independent reference. Returns the lengths that were seen."""
    stock, seen = F.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, **options):
        if query.shape[2] == key.shape[2] and query.shape[2] > 30:  # not the text refiner of HunyuanVideo
            own = mask_of(len(seen))
            seen.append(query.shape[2])
            if own is not None:
                own = own if attn_mask is None else own & attn_mask
                # A query of padding may be left without keys; nothing reads what it gives.
                attn_mask = own | ~own.any(-1, keepdim=True)
        return stock(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    return seen


@pytest.fixture(params=list(MODELS))
def name(request) -> str:
    return request.param


# -- exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_full_pattern_equals_stock(name, dtype):
    model, given = MODELS[name]().to(dtype), inputs(name, dtype=dtype)
    if "image_rotary_emb" in given:
        given["image_rotary_emb"] = tuple(x.float() for x in given["image_rotary_emb"])
    ref = call(model, given)
    video.patch(model, "vdit", patterns="full", block_size=32)
    assert_near(call(model, given), ref, dtype)
    video.unpatch(model)
    assert torch.equal(call(model, given), ref)


def test_dense_is_the_stock_processor_bit_for_bit(name):
    model, given = MODELS[name](), inputs(name)
    ref = call(model, given)
    video.patch(model, "dense")
    assert torch.equal(call(model, given), ref)
    assert all(type(p).__module__.startswith("diffusers.") for p in model.attn_processors.values())


def test_patterns_equal_stock_under_their_masks(name, monkeypatch):
    """Layer by layer: rotary embedding, norms, padding of the text, and that the layers are in order."""
    model, given, text = MODELS[name](), inputs(name), TEXT[name]
    dense = call(model, given)
    config = VDiTConfig(PATTERNS, GRIDS[name], text, text_first=name.startswith("cog"), block_size=16)
    mask = vdit_layout(config).to_dense()
    chosen = {0: "dense", 1: ("vdit", config)}
    video.patch(model, ("vdit"), patterns=PATTERNS[::-1], block_size=16, layers=chosen)
    out = call(model, given)
    video.unpatch(model)

    def mask_of(number: int):
        return {0: None, 1: mask}.get(number, mask.flip(1))

    seen = masked_stock(monkeypatch, mask_of)
    ref = call(model, given)
    assert len(seen) == LAYERS[name]
    assert_near(out, ref)
    assert (out - dense).abs().max() > 100 * (out - ref).abs().max()  # the patterns do leave something out


def test_rows_of_a_batch_are_independent(name):
    """Classifier-free guidance in one batch, with prompts of different lengths: each row as alone."""
    model, given = MODELS[name](), inputs(name)
    video.patch(model, "vdit", patterns=PATTERNS, block_size=16)
    out = call(model, given)
    for row in range(2):
        alone = {key: x if key == "image_rotary_emb" else x[row : row + 1] for key, x in given.items()}
        assert_near(out[row : row + 1], call(model, alone))


@pytest.mark.parametrize("name", ["wan", "wan with a time for each token", "hunyuan"])
def test_image_to_video_variants(name, monkeypatch):
    """Wan's image tokens stay in cross-attention; HunyuanVideo's blocks that replace the first frame's."""
    model, given = image_to_video(name)
    patterns = VDiTConfig(PATTERNS, (3, 8, 8), 20 * (name == "hunyuan"), block_size=16)
    ref = call(model, given)
    video.patch(model, "vdit", patterns="full", block_size=32)
    assert_near(call(model, given), ref)
    video.unpatch(model)
    video.patch(model, "vdit", patterns)
    out = call(model, given)
    video.unpatch(model)
    mask = vdit_layout(patterns).to_dense()
    seen = masked_stock(monkeypatch, lambda number: mask)
    assert_near(out, call(model, given))
    assert len(seen) == 2


def test_other_methods_run(name):
    model, given = MODELS[name](), inputs(name)
    ref = call(model, given)
    video.patch(model, "blasst", threshold=0.0, block_m=32, block_n=32)
    assert_near(call(model, given), ref)
    video.unpatch(model)
    video.patch(model, "s2", block_size=16, local_blocks=2, vert_stride=2)  # two heads, two shards
    assert (call(model, given) - ref).abs().max() > 1e-4
    video.unpatch(model)
    video.patch(model, lambda q, k, v, *, layer, is_causal, scale: F.scaled_dot_product_attention(q, k, v))
    assert_near(call(model, given), ref)


def test_fused_projections_and_gradients():
    model, given = MODELS["wan"](), inputs("wan")
    video.patch(model, "vdit", patterns=PATTERNS, block_size=16)
    ref = call(model, given)
    loss = model(**given, return_dict=False)[0].square().sum()
    loss.backward()
    norms = [block.attn1.to_k.weight.grad.norm() for block in model.blocks]
    assert all(n.isfinite() and n > 0 for n in norms)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(**given, return_dict=False)[0].square().sum().backward()
    again = [block.attn1.to_k.weight.grad.norm() for block in model.blocks]
    torch.testing.assert_close(again, norms)
    model.fuse_qkv_projections()
    assert_near(call(model, given), ref)


# -- steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_sparsed_is_dense_first_and_then_keeps_a_pattern_for_each_pass(name):
    model = MODELS[name]()
    dense = generate(model, name)
    video.patch(model, "sparsed", num_steps=5, skip_ratio=0.4, select_ratio=0.3, block_size=16)
    both = generate(model, name)
    for n in range(4):  # two dense steps of two passes
        assert_near(both[n], dense[n])
    for n in range(4, 10):
        assert (both[n] - dense[n]).abs().max() > 1e-3
    state = model._sparse_attn_patch.state
    assert (state.step, state.pass_number) == (4, 1)
    again = generate(model, name)  # a second generation starts over by itself
    assert all(torch.equal(a, b) for a, b in zip(again, both, strict=True))
    video.unpatch(model)
    # The passes do not see each other's patterns: the first alone gives the same.
    video.patch(model, "sparsed", num_steps=5, skip_ratio=0.4, select_ratio=0.3, block_size=16)
    alone = generate(model, name, passes=1)
    assert all(torch.equal(a, b) for a, b in zip(alone, both[::2], strict=True))


def test_sparsed_with_every_block_kept_equals_stock(name):
    model = MODELS[name]()
    ref = [call(model, inputs(name, timestep=t)) for t in (900, 500, 100)]
    video.patch(model, "sparsed", num_steps=3, skip_ratio=0.1, select_ratio=1.0, block_size=16)
    for t, expected in zip((900, 500, 100), ref, strict=True):
        assert_near(call(model, inputs(name, timestep=t)), expected)


def test_steps_can_be_told():
    model = MODELS["wan"]()
    video.patch(model, "sparsed", num_steps=3, block_size=16)
    state = model._sparse_attn_patch.state
    for step in (0, 1, 2):
        video.set_step(model, step)
        for number in (0, 1):
            call(model, inputs("wan", timestep=500))  # a scheduler that repeats its timesteps
            assert (state.step, state.pass_number) == (step, number)
    with pytest.raises(ValueError, match="set_step: step is 3; the model was patched for 3 steps"):
        video.set_step(model, 3)
    video.restart(model)
    call(model, inputs("wan", timestep=100))
    assert (state.step, state.pass_number) == (0, 0)


def test_too_many_steps_are_refused():
    model = MODELS["wan"]()
    video.patch(model, "sparsed", num_steps=2, block_size=16)
    with pytest.raises(ValueError, match=r"denoising step 2 \(from 0\), but the model was patched for"):
        generate(model, "wan", steps=3, passes=1)


def test_pipeline_with_a_callback_and_guidance():
    """A whole Wan pipeline: two passes a step, the callback at each step's end."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=MODELS["wan"](), transformer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    prompts = {
        "prompt_embeds": inputs("wan")["encoder_hidden_states"][:1],
        "negative_prompt_embeds": torch.zeros(1, 12, 16),
    }

    def run(**more):
        return pipe(
            **prompts, height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=5.0,
            output_type="latent", generator=torch.Generator().manual_seed(0), **more,
        ).frames  # fmt: skip

    dense = run()
    model = pipe.transformer
    seen = []

    def watch(q, k, v, *, layer, is_causal, scale):
        seen.append((layer, model._sparse_attn_patch.state.step, model._sparse_attn_patch.state.pass_number))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    expected = [(layer, step, number) for step in range(4) for number in range(2) for layer in range(3)]
    video.patch(model, watch, num_steps=4)
    assert_near(run(), dense)  # by the timesteps
    assert seen == expected
    seen.clear()
    callback = video.step_callback(model)
    for _ in range(2):
        assert_near(run(callback_on_step_end=callback), dense)
    assert seen == expected * 2
    video.unpatch(model)
    video.patch(model, watch, num_steps=6)
    with pytest.raises(ValueError, match=r"pipeline runs 4 steps, but the model was patched for num_steps=6"):
        run(callback_on_step_end=video.step_callback(model))
    video.unpatch(model)
    with sa.patched(model, "sparsed", num_steps=4, skip_ratio=0.25, select_ratio=0.4, block_size=8):
        sparse = run()
    assert (sparse - dense).abs().max() > 1e-4
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("name", [x for x in MODELS if not x.startswith("wan")])
def test_pipelines_with_text_among_the_tokens(name):
    """HunyuanVideo with a masked prompt, and CogVideoX with both prompts of the guidance in one batch."""
    pipe, given = pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    model, seen = pipe.transformer, []

    def run():
        return pipe(
            **given, num_inference_steps=3, output_type="latent", generator=torch.manual_seed(0)
        ).frames

    def watch(q, k, v, *, layer, is_causal, scale):
        state = model._sparse_attn_patch.state
        seen.append((state.step, state.pass_number, layer, q.shape[0], q.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    dense = run()
    with sa.patched(model, watch, num_steps=3):
        assert_near(run(), dense)
    batch, grid = (1, (3, 8, 8)) if name == "hunyuan" else (2, GRIDS[name])
    tokens = grid[0] * grid[1] * grid[2] + (13 if name == "hunyuan" else 20)
    assert seen == [(step, 0, layer, batch, tokens) for step in range(3) for layer in range(LAYERS[name])]
    with sa.patched(model, "sparsed", num_steps=3, skip_ratio=0.3, select_ratio=0.4, block_size=16):
        assert (run() - dense).abs().max() > 1e-4


# -- recipes ------------------------------------------------------------------------------------------


def recipe_for(model, name, plans=None, **options) -> Recipe:
    """Head 0 dense and head 1 a diagonal, but for layer 0, which is dense, unless `plans` are given."""
    config = VDiTConfig("diagonal:0.3", GRIDS[name], TEXT[name], name.startswith("cog"), block_size=16)
    split = (HeadGroup((0,), "dense", DenseConfig()), HeadGroup((1,), "vdit", config))
    whole = (HeadGroup((0, 1), "dense", DenseConfig()),)
    layers = plans or [LayerPlan(n, split if n else whole, "denoising") for n in range(LAYERS[name])]
    return Recipe(Fingerprint.of(model, num_layers=LAYERS[name]), tuple(layers), **options)


def test_a_recipe_equals_stock_under_its_masks(name, monkeypatch, tmp_path):
    model, given = MODELS[name](), inputs(name)
    recipe = recipe_for(model, name)
    recipe.save(tmp_path / "tiny.recipe.json")
    video.patch(model, tmp_path / "tiny.recipe.json")
    out = call(model, given)
    video.unpatch(model)
    patterns = ("full", "diagonal:0.3")
    config = VDiTConfig(patterns, GRIDS[name], TEXT[name], text_first=name.startswith("cog"), block_size=16)
    mask = vdit_layout(config).to_dense()
    masked_stock(monkeypatch, lambda number: mask if number else None)
    assert_near(out, call(model, given))


def test_a_recipe_by_steps():
    model, name = MODELS["wan"](), "wan"
    dense = generate(model, name, steps=4, passes=1)
    config = VDiTConfig("diagonal:0.3", GRIDS[name], block_size=16)
    plans = [
        LayerPlan(layer, (HeadGroup((0, 1), *setting),), "denoising", steps)
        for layer in range(3)
        for steps, setting in (
            ((0, 2), ("dense", DenseConfig())),
            ((2, 3), ("vdit", config)),
            ((3, 4), ("sparsed", SparseDConfig(0.25, 1.0, 16))),
        )
    ]
    recipe = recipe_for(model, name, plans, num_steps=4)
    video.patch(model, recipe)
    told = video.explain(model)
    assert "steps 0-1: 2 heads dense" in told and "steps 2-2: 2 heads vdit" in told
    out = []
    for step in range(3):
        out.append(call(model, inputs(name, timestep=900 - 100 * step)))
    assert torch.equal(out[0], dense[0]) and torch.equal(out[1], dense[1])
    assert (out[2] - dense[2]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has no pattern at step 3: it is found at step 0"):
        call(model, inputs(name, timestep=600))


def one_layer(method: str, config, phase: str = "denoising"):
    """A recipe for two heads of the first layer alone."""
    plan = LayerPlan(0, (HeadGroup((0, 1), method, config),), phase)
    return lambda model: recipe_for(model, "wan", [plan], partial=True)


MISFITS = {
    "other model": (lambda m: recipe_for(MODELS["cogvideox"](), "cogvideox"), "made for another model"),
    "prefill": (one_layer("dense", DenseConfig(), "prefill"), "plans for prefill but none for denoising"),
    "anchor": (one_layer("anchor", AnchorConfig()), "anchor is made for causal attention"),
    "no steps": (one_layer("sparsed", SparseDConfig()), "sparsed differs by denoising step; pass num_steps"),
}


@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
def test_recipes_that_do_not_fit_are_refused(make, message):
    model = MODELS["wan"]()
    with pytest.raises(ValueError, match=message):
        video.patch(model, make(model))
    assert not video.is_patched(model)


def test_another_grid_is_refused_unless_asked_for():
    model, given = MODELS["wan"](), inputs("wan")
    config = VDiTConfig("diagonal:0.3", (3, 4, 8), block_size=16)
    video.patch(model, "vdit", config)
    with pytest.raises(ValueError, match=r"token grid of \(3, 8, 8\).*made for \(3, 4, 8\)"):
        call(model, given)
    video.unpatch(model)
    video.patch(model, "vdit", config, any_grid=True)
    out = call(model, given)
    video.unpatch(model)
    video.patch(model, "vdit", patterns="diagonal:0.3", block_size=16)
    assert torch.equal(out, call(model, given))
