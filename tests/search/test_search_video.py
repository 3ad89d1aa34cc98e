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

from sparse_attn.recipe import Fingerprint, Recipe, hash_tensors
from sparse_attn.search.capture import intercept_sdpa
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
