"""BLASST calibration: margins against the kernel's own votes, the fit, and Hugging Face's block."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparse_attn.methods.blasst import blasst_attention
from sparse_attn.recipe import Fingerprint, Recipe, run_layer
from sparse_attn.search.calibrate import (
    TRIALS,
    Calibration,
    Fit,
    Sparsities,
    fit,
    recipe_layers,
    sparsity_at,
    tile_margins,
)


def structured(length: int = 256, heads: int = 4, key_heads: int = 2):
    """A sink in the first keys, and blocks of keys of very different size: tiles fall at all lambdas."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, length, 16, generator=generator)
    k, v = (torch.randn(1, key_heads, length, 16, generator=generator) for _ in range(2))
    blocks = length // 16
    order = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(key_heads)])
    sizes = torch.linspace(0.1, 2.4, blocks)[order][None, ..., None]
    k *= sizes.repeat_interleave(16, 2)
    q[..., 0] = 4.0
    k[..., 0] = 0.0
    k[:, :, :4, 0] = 7.0
    return q, k, v


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (1, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_margins_foretell_the_kernels_votes(tile, is_causal):
    q, k, v = structured()
    q = q[:, :, 137 if tile[0] == 1 else 37 :]  # L != S, and a last block that is not full
    scale = 16**-0.5
    margins = tile_margins(q, k, block_m=tile[0], block_n=tile[1], scale=scale, is_causal=is_causal)
    trials = (1e-4, 1e-2, 0.1, 0.5, 0.95)
    shares = sparsity_at(margins, trials)
    found = []
    for n, threshold in enumerate(trials):
        _, stats = blasst_attention(
            q, k, v, threshold, block_m=tile[0], block_n=tile[1], is_causal=is_causal, enable_gqa=True,
            return_stats=True,
        )  # fmt: skip
        # One tile in a thousand may stand on the threshold, where the order of a sum decides.
        near = (margins - math.log(threshold)).abs() < 1e-5
        slack = near.sum((-1, -2)) / stats.visited
        assert ((shares[..., n] - stats.sparsity).abs() <= slack + 1e-6).all()
        found.append(stats.sparsity.mean().item())
    assert found[-1] > 0.15 and found == sorted(found)


def test_the_fit_gets_back_what_made_the_points():
    points = [
        (length, 7.9 * math.exp(8.6 * s) / length, s)
        for length in (4096, 65536)
        for s in (0.2, 0.5, 0.8, 0.95)
    ]
    found = fit(points)
    assert (found.a, found.b) == (pytest.approx(7.9), pytest.approx(8.6))
    assert found.points == 6 and (found.low, found.high) == (0.2, 0.8)
    assert found.threshold_scale(0.5) == pytest.approx(582.2, rel=1e-3)
    with pytest.raises(ValueError, match="only 0 trials"):
        fit([(100, 0.1, 0.95), (100, 0.2, 0.05)])
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        found.threshold_scale(1.0)


def test_a_calibrated_recipe_comes_to_its_target(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    q, k, v = structured()
    seen = Sparsities(block_m=16, block_n=16, decode_queries=4)
    out = seen(q, k, v, layer=0, is_causal=True, scale=0.25)
    assert out.shape == q.shape
    assert {len(seen.points(phase)) for phase in ("prefill", "decode")} == {len(TRIALS)}
    whole = fit(seen.points("prefill"))
    fingerprint = Fingerprint("Toy", 1, 4, 2, 16, "sha256:" + "0" * 64)
    target = 0.6
    layers = recipe_layers(seen, fingerprint, target, per_head=True, whole=whole)
    Recipe(fingerprint, tuple(layers)).save(tmp_path / "r.json")
    plan = Recipe.load(tmp_path / "r.json").plan_for(0)
    scale = plan.groups[0].config.threshold_scale
    _, stats = blasst_attention(
        q,
        k,
        v,
        threshold_scale=scale,
        block_m=16,
        block_n=16,
        is_causal=True,
        enable_gqa=True,
        return_stats=True,
    )
    assert (stats.sparsity - target).abs().max() < 0.12
    assert run_layer(plan, q, k, v, is_causal=True).shape == q.shape


def test_the_block_round_trips_and_has_the_published_form():
    fits = {"prefill": Fit(7.93, 8.61), "decode": Fit(0.12, 9.85)}
    ignore = ("model.layers.0.self_attn",)
    made = Calibration(fits, {"prefill": 0.5, "decode": 0.7}, ("LlamaAttention",), ignore)
    block = json.loads(json.dumps(made.to_block()))
    group = block["config_groups"]["group_0"]
    assert group["algorithm"] == "skip_softmax" and group["targets"] == ["LlamaAttention"]
    assert group["threshold_scale_factor"]["prefill"] == {"a": 7.93, "b": 8.61}
    back = Calibration.from_block({"model_type": "llama", "sparse_attention_config": block})
    assert (
        back.threshold_scale("prefill") == made.threshold_scale("prefill") == pytest.approx(587.2, rel=1e-3)
    )
    assert back.threshold_scale("decode") == made.threshold_scale("decode")
    assert (back.targets, back.ignore) == (made.targets, made.ignore)


def test_blocks_of_other_producers():
    factor = {"formula": "a*exp(b*target_sparsity)", "coefficients": {"a": 2822.62, "b": 4.388}}
    group = {"algorithm": "skip_softmax", "target_sparsity": 0.5, "threshold_scale_factor": factor}
    block = {"config_groups": {"g": group, "n": {"algorithm": "sparse_softmax"}}}
    assert Calibration.from_block(block).threshold_scale() == pytest.approx(2822.62 * math.exp(2.194))
    factor["coefficients"] = {"log_a": math.log(3.0), "b": 2.0}
    assert Calibration.from_block(block).threshold_scale() == pytest.approx(3 * math.e)
    factor["formula"] = "a + b"
    with pytest.raises(ValueError, match="'a \\+ b' is not"):
        Calibration.from_block(block)
    with pytest.raises(ValueError, match="0 groups"):
        Calibration.from_block({})
