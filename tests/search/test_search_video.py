"""Searching tiny video transformers of diffusers through `scaled_dot_product_attention`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
import diffusers_models

import sparse_attn as sa
from sparse_attn.methods.sparsed import SparseDConfig
from sparse_attn.recipe import Fingerprint, Recipe, hash_tensors
from sparse_attn.search.candidates import Candidate
from sparse_attn.search.capture import intercept_sdpa
from sparse_attn.search.cost import CostTable, SelectRow, TileRow
from sparse_attn.search.models import CallableModel
from sparse_attn.search.run import Budget, recipe_attention, search

# name -> (model, tokens, (frames, height, width, text tokens, text first))
MODELS = {
    "wan": (diffusers_models.wan, 192, (3, 8, 8, 0, False)),
    "cogvideox": (diffusers_models.cogvideox, 212, (3, 8, 8, 20, True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_video_transformer_gets_a_recipe(name, tmp_path):
    make, length, video = MODELS[name]
    model = make()
    given = diffusers_models.inputs(name, batch=2)

    def run(x):
        with torch.no_grad():
            return model(**x, return_dict=False)[0]

    searched = CallableModel(
        run, [given], Fingerprint.of(model), length=length, phase="denoising",
        calibration_hash=hash_tensors([given["hidden_states"]]),
    )  # fmt: skip
    budget = Budget(relative_error=0.2)
    found = search(searched, budget, work=tmp_path / "w", is_causal=False, video=video)
    assert {"vdit", "sparsed", "s2"} <= {c.method for c in found.candidates}
    assert found.recipe.phases == ["denoising"] and not found.recipe.partial
    assert (
        found.summary["relative_error"] <= 0.2 and found.summary["time_us"] < found.summary["dense_time_us"]
    )
    found.recipe.save(tmp_path / "r.json")
    attention = recipe_attention(Recipe.load(tmp_path / "r.json"))
    dense = run(given)
    with intercept_sdpa(attention, model.config.num_layers) as calls:
        sparse = run(given)
    assert calls.count == model.config.num_layers
    assert 0 < (sparse - dense).norm() / dense.norm() < 0.5


@pytest.mark.parametrize("name", MODELS)
def test_a_denoising_loop_gets_a_recipe_by_phase(name, tmp_path):
    """Guidance in two passes a step. `sa.patch` runs the recipe as the search does, SparseD's steps too."""
    make, length, video = MODELS[name]
    model, given = make(), diffusers_models.inputs(name, batch=1)
    prompts = [given["encoder_hidden_states"], 0.1 * given["encoder_hidden_states"]]

    def denoise(x):
        latents = x["hidden_states"]
        for step in range(5):
            now = {"hidden_states": latents, "timestep": torch.full((1,), 900 - 100 * step)}
            with torch.no_grad():
                a, b = (
                    model(**x | now | {"encoder_hidden_states": p}, return_dict=False)[0] for p in prompts
                )
            latents = latents - 0.2 * (2 * a - b)
        return latents

    searched = CallableModel(
        denoise, [given], Fingerprint.of(model), length=length, num_steps=5, branches=2,
        calibration_hash=hash_tensors([given["hidden_states"]]),
    )  # fmt: skip
    options = [Candidate("sparsed", "sparsed", SparseDConfig(select_ratio=0.5, block_size=32))]
    table = CostTable(
        "made up", 1, (TileRow("blocks", 16, "float32", 16, 16, 1.0, 1.0),),
        (SelectRow("sparsed block_size=32", 16, length, 1.0, 0.0),), 0.0, 0.0, {},
    )  # fmt: skip
    how = {"candidates": options, "table": table, "phases": [2], "curve": False, "is_causal": False}
    found = search(searched, Budget(relative_error=0.3), work=tmp_path / "w", video=video, **how)
    ranges = {(n, steps) for n in range(model.config.num_layers) for steps in ((0, 2), (2, 5))}
    assert {(p.layer, p.steps) for p in found.recipe.layers} == ranges
    used = {(p.steps, g.method) for p in found.recipe.layers for g in p.groups}
    assert ((2, 5), "sparsed") in used and found.summary["relative_error"] <= 0.3
    names = {x.name for x in (tmp_path / "w" / "measures").iterdir()}
    assert "sample0-step004-pass1-layer01.json" in names and len(names) == 8 * model.config.num_layers
    found.recipe.save(tmp_path / "r.json")
    recipe, dense = Recipe.load(tmp_path / "r.json"), denoise(given)
    prompt_len = 20 if name == "cogvideox" else length
    attention = recipe_attention(recipe, prompt_len=prompt_len)
    with intercept_sdpa(attention, model.config.num_layers, num_steps=5, branches=2):
        wanted = denoise(given)
    with sa.patched(model, recipe):
        told = sa.explain(model)
        diffusers_models.assert_near(denoise(given), wanted)
    assert "steps 0-1: " in told and "steps 2-4: " in told
    assert (wanted - dense).norm() / dense.norm() > 1e-3
