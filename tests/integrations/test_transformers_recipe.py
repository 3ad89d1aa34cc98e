"""`patch(model, recipe)`: every head its own method, for the model that the recipe was made for alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from test_transformers_patch import error, logits, table, tiny_model, tokens  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.integrations.transformers import NAME  # noqa: E402
from sparse_attn.methods import METHODS  # noqa: E402
from sparse_attn.methods.anchor import AnchorConfig  # noqa: E402
from sparse_attn.methods.base import run  # noqa: E402
from sparse_attn.methods.blasst import BlasstConfig  # noqa: E402
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe  # noqa: E402

S2 = sa.S2Config(block_size=16, local_blocks=1, vert_stride=2)
ANCHOR = AnchorConfig(theta=0.5, block_size=16, step=2)
BLASST = BlasstConfig(threshold=0.5, block_m=16, block_n=16)
# Layer 0 mixes methods over both key heads, layer 1 runs one method; heads 0, 1 share a key head.
MIXED = (((0, 3), "s2", S2), ((1,), "anchor", ANCHOR), ((2,), "dense", DenseConfig(16)))
MIXED_SHOWN = (
    "heads 0, 3: s2(block_size=16, local_blocks=1, vert_stride=2); 1: anchor(theta=0.5, block_size=16, "
    "step=2); 2: dense(block_size=16)"
)
WHOLE = (((0, 1, 2, 3), "blasst", BLASST),)


def plan(layer: int, groups, phase: str = "prefill") -> LayerPlan:
    return LayerPlan(layer, tuple(HeadGroup(*group) for group in groups), phase)


def recipe_for(model, *plans: LayerPlan, **settings) -> Recipe:
    return Recipe(Fingerprint.of(model), plans or (plan(0, MIXED), plan(1, WHOLE)), **settings)


def by_head(q, k, v, *, layer, is_causal, scale):
    """What the recipe means: each method on the whole layer, and each head's row taken from its own."""
    out = torch.empty_like(q)
    for heads, name, config in MIXED if layer == 0 else WHOLE:
        how = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
        if name == "dense":
            whole = sa.sparse_attention(q, k, v, sa.SparseLayout.full(q.shape[2], k.shape[2]), **how)
        else:
            whole = run(METHODS[name], q, k, v, config, **how).out
        out[:, list(heads)] = whole[:, list(heads)]
    return out


def test_each_head_runs_its_method() -> None:
    """Alone, padded on either side, in chunks, and in generation."""
    model, ids = tiny_model(), tokens(2, 70)
    recipe, stock = recipe_for(model), logits(model, ids)
    right = torch.ones_like(ids)
    right[1, 50:] = 0
    said = {}

    def everything() -> list[torch.Tensor]:
        cache = transformers.DynamicCache()
        first = logits(model, ids[:, :40], past_key_values=cache)
        said[len(said)] = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        return [
            logits(model, ids),
            logits(model, ids, attention_mask=right)[right.bool()],
            logits(model, ids, attention_mask=right.flip(1))[right.flip(1).bool()],
            first,
            logits(model, ids[:, 40:], past_key_values=cache),
        ]

    with sa.patched(model, by_head):
        expected = everything()
    with sa.patched(model, recipe):
        ours = everything()
    for mine, other in zip(ours, expected, strict=True):
        assert error(mine, other) < 1e-4
    assert torch.equal(said[0], said[1])
    assert error(ours[0], stock) > 1e-2, "the recipe must show"


def test_a_file_and_what_explain_says(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 70)
    path = tmp_path / "tiny.recipe.json"
    recipe_for(model, plan(0, MIXED), partial=True).save(path)
    for given in (str(path), path):
        with sa.patched(model, given):
            lines = sa.explain(model).splitlines()
            assert lines[0] == f"LlamaForCausalLM, patched with the recipe {path}:"
            rows = table(model)
            sparse = logits(model, ids)
    assert rows["0"][0] == MIXED_SHOWN
    assert rows["1"] == ["dense", "dense", "dense"], "a partial recipe leaves the layer dense"
    with sa.patched(model, by_head, layers={1: "dense"}):
        assert error(logits(model, ids), sparse) < 1e-4
    with sa.patched(model, Recipe.load(path), layers={1: ("blasst", BLASST)}):
        assert "asked for by `layers`" in table(model)["1"]
        mixed = logits(model, ids)
    with sa.patched(model, by_head):
        assert error(logits(model, ids), mixed) < 1e-4


def test_decode_plans_are_followed() -> None:
    """Single queries follow the phase "decode", or stay dense, or follow prefill where one asks for it."""
    model, ids = tiny_model(), tokens(1, 70)
    both = recipe_for(model, *(plan(n, WHOLE) for n in (0, 1)), *(plan(n, MIXED, "decode") for n in (0, 1)))
    prefill = recipe_for(model, *(plan(n, WHOLE) for n in (0, 1)))

    def last(recipe: Recipe, **how) -> torch.Tensor:
        cache = transformers.DynamicCache()
        with sa.patched(model, recipe, **how):
            logits(model, ids[:, :-1], past_key_values=cache)
            return logits(model, ids[:, -1:], past_key_values=cache)

    dense, own = last(prefill), last(both)
    assert error(dense, own) > 1e-3
    sparse = last(prefill, decode="sparse")
    assert error(dense, sparse) > 1e-4
    with sa.patched(model, both):
        assert table(model)["0-1"][:2] == ["blasst(threshold=0.5, block_m=16, block_n=16)", MIXED_SHOWN]
    with sa.patched(model, both, decode="dense"):
        assert table(model)["0-1"][1] == "dense"


def test_a_recipe_for_another_model_leaves_the_model_alone(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 30)
    before, stock = model.config._attn_implementation, logits(model, ids)
    recipe = recipe_for(model)
    other = recipe_for(tiny_model(num_hidden_layers=3), *(plan(n, WHOLE) for n in range(3)))
    denoising = Recipe(Fingerprint.of(model), (plan(0, WHOLE, "denoising"), plan(1, WHOLE, "denoising")))
    sibling = replace(recipe, model=replace(recipe.model, config_hash="sha256:" + "0" * 64))
    for bad, message in (
        (other, "made for another model: num_layers is 2, the recipe's 3"),
        (recipe_for(tiny_model("qwen3")), "architecture is LlamaForCausalLM, the recipe's Qwen3ForCausalLM"),
        (sibling, "config_hash.*strict=False"),
        (denoising, "plans for denoising but none for prefill"),
        (str(tmp_path / "absent.json"), "no recipe file"),
    ):
        with pytest.raises(ValueError, match=message):
            sa.patch(model, bad)
        assert model.config._attn_implementation == before
        assert torch.equal(logits(model, ids), stock)
    with pytest.raises(ValueError, match="belong to a method's name, not to a recipe"):
        sa.patch(model, recipe, theta=2.0)
    model.draft = transformers.LlamaModel(model.config)
    with pytest.raises(
        ValueError, match=r"model.layers.0.self_attn and draft.layers.0.self_attn are both layer 0"
    ):
        sa.patch(model, recipe)
    del model.draft
    with sa.patched(model, sibling, strict=False):
        assert model.config._attn_implementation == NAME


def test_windows_and_sinks_keep_their_rules() -> None:
    """A mixed model follows the recipe in its full layer alone; one with sinks warns and stays stock."""
    model, ids = tiny_model("gemma3-mixed"), tokens(1, 70)
    with sa.patched(model, recipe_for(model)):
        assert table(model)["0"][-1].startswith("sliding window: heads 0, 3: s2")
        ours = logits(model, ids)
    with sa.patched(model, by_head):
        assert error(ours, logits(model, ids)) < 1e-4 * ours.abs().max().item()
    model = tiny_model("gpt-oss-sinks")
    stock = logits(model, ids)
    with pytest.warns(UserWarning, match=r"attention sinks \(s_aux\)"):
        sa.patch(model, recipe_for(model))
    assert error(logits(model, ids), stock) < 1e-4 * stock.abs().max().item()


def test_s2_in_a_recipe_drops_keys() -> None:
    """A layer of one method is that method: S2Cache frees its keys, and decodes as a full cache does."""
    model, ids = tiny_model(), tokens(1, 90)
    s2 = (((0, 1, 2, 3), "s2", S2),)
    sa.patch(model, recipe_for(model, plan(0, s2), plan(1, MIXED)), decode="sparse")
    full = model.generate(ids, max_new_tokens=4, do_sample=False)
    cache = sa.S2Cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), full)
    assert cache.report().dropping == (True, False)
    sa.unpatch(model)
    other = (((0, 1, 2, 3), "s2", replace(S2, local_blocks=2)),)
    plans = [plan(n, s2) for n in (0, 1)] + [plan(n, other, "decode") for n in (0, 1)]
    sa.patch(model, recipe_for(model, *plans))
    with pytest.raises(ValueError, match="another pattern than prefill"):
        sa.S2Cache(model)


def test_training_with_a_recipe() -> None:
    """Gradients equal those of the attention that the recipe means."""
    model, ids = tiny_model().train(), tokens(1, 60)

    def gradient(method) -> torch.Tensor:
        model.zero_grad()
        with sa.patched(model, method, engine="reference" if isinstance(method, Recipe) else None):
            model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    ours, expected = gradient(recipe_for(model)), gradient(by_head)
    assert error(ours, expected) < 1e-4 * expected.abs().max().item()
