"""Recipes: files and back, complaints with their place, and layers of mixed groups against masked SDPA."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_attn.attend import attend
from sparse_attn.cli import make_app
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS, Context
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import NO_SHARD, S2Config, s2_attention
from sparse_attn.methods.sparsed import SparseDConfig
from sparse_attn.methods.sparsed_layout import sparsed_layout
from sparse_attn.methods.vdit import VDiTConfig, vdit_layout
from sparse_attn.recipe import (
    DenseConfig,
    Fingerprint,
    HeadGroup,
    LayerPlan,
    Recipe,
    hash_config,
    hash_tensors,
    run_layer,
    validate,
)
from sparse_attn.recipe_check import decode_config, encode_config, schema
from sparse_attn.recipe_command import setting_text
from sparse_attn.reuse import LayoutCache
from sparse_attn.testing import assert_close, kept_mask, make_inputs, masked_attention

HASH = "sha256:" + "0" * 64
MODEL = Fingerprint("LlamaForCausalLM", 2, 6, 2, 64, HASH)
S2 = S2Config(32, 1, 4, sink_blocks=1)
ANCHOR = AnchorConfig(1.0, block_size=16, step=2)
GRID = {"grid": (3, 4, 5), "text_len": 7, "block_size": 16}


def layout_for(heads: int, L: int = 150) -> SparseLayout:
    seed = torch.Generator().manual_seed(heads)
    blocks = torch.rand(1, heads, 10, 10, generator=seed) < 0.5
    columns = (torch.rand(1, heads, 10, 160, generator=seed) < 0.2) & ~blocks.repeat_interleave(16, -1)
    size = {"block_m": 16, "block_n": 16, "L": L, "S": L}
    return SparseLayout.from_dense_mask(blocks, columns=columns[..., :L], **size)


def make_recipe(**changes) -> Recipe:
    """Two layers, three phases, tensors and layouts in configs, settings of every method."""
    theta = torch.tensor([1.0, 2.5, torch.inf])
    kept = BlasstConfig(threshold=0.0, layout=layout_for(2))
    layers = []
    for n in range(2):
        error = {"relative_error": (0.01, 0.02, 0.03), "mass_recall": (0.9, 0.95, 1.0)}
        times = {"time_us": (2.0, 3.0, 5.0), "dense_time_us": (10.0, 10.0, 10.0)}
        mixed = HeadGroup((0, 2, 5), "anchor", AnchorConfig(theta, 16, 2), **error, **times)
        others = (mixed, HeadGroup((1, 4), "blasst", kept), HeadGroup((3,), "s2", S2))
        layers.append(LayerPlan(n, others))
        layers.append(LayerPlan(n, (HeadGroup(tuple(range(6)), "dense", DenseConfig(64)),), "decode"))
        patterns = ["full", "multi_diagonal:3t,lags=0/2", "skip", "vertical_stripe:columns=0/17"]
        video = VDiTConfig(patterns, **GRID)
        one = VDiTConfig("diagonal:0.5", **GRID)
        early = (HeadGroup(tuple(range(6)), "sparsed", SparseDConfig(block_size=16)),)
        late = (HeadGroup((0, 1, 2, 3), "vdit", video), HeadGroup((4, 5), "vdit", one))
        layers += [LayerPlan(n, late, "denoising", (10, 50)), LayerPlan(n, early, "denoising", (0, 10))]
    settings = {"calibration_hash": HASH, "num_steps": 50} | changes
    return Recipe(MODEL, tuple(layers), **settings)


def plain_recipe() -> dict:
    """One good recipe as JSON, without tensors."""
    groups = [
        {
            "heads": [0, 1, 2],
            "method": "anchor",
            "config": {"theta": 12.0},
            "expected": {"time_us": [1, 2, 3]},
        },
        {"heads": [3, 4, 5], "method": "s2", "config": {"block_size": 32}},
    ]
    layers = [{"layer": n, "phase": "prefill", "groups": copy.deepcopy(groups)} for n in range(2)]
    model = {"architecture": "X", "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
    return {
        "schema_version": 1, "created_by": "test", "model": {**model, "config_hash": HASH}, "layers": layers,
    }  # fmt: skip


# -- files ------------------------------------------------------------------------------------------


def test_a_saved_recipe_loads_as_it_was(tmp_path):
    recipe, path = make_recipe(), tmp_path / "a.json"
    recipe.save(path)
    again = Recipe.load(path)
    (plain, tensors), (plain_again, tensors_again) = recipe.to_dict(), again.to_dict()
    assert plain == plain_again and tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensors[x], tensors_again[x]) for x in tensors)
    assert again.phases == ["prefill", "decode", "denoising"]
    theta = again.settings_for(1, "prefill")[0].config.theta
    assert theta.tolist() == [1.0, 2.5, torch.inf]
    layout = again.settings_for(1, "prefill")[1].config.layout
    assert torch.equal(layout.to_dense(True), layout_for(2).to_dense(True))
    assert again.settings_for(0, "denoising", 10)[0].config.patterns[1].lags == (0, 2)
    # The same recipe gives the same bytes, whichever order its plans and groups came in.
    shuffled = replace(recipe, layers=tuple(replace(x, groups=x.groups[::-1]) for x in recipe.layers[::-1]))
    (tmp_path / "b").mkdir()
    shuffled.save(tmp_path / "b/a.json")
    for name in ("a.json", "a.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.json", "a.safetensors", "b"]


CONFIGS = {
    "dense": [DenseConfig(), DenseConfig(32)],
    "blasst": [BlasstConfig(threshold_scale=900.0), BlasstConfig(0.0, block_m=64)],
    "anchor": [AnchorConfig(), AnchorConfig("auto"), AnchorConfig(float("-inf")), AnchorConfig(capacity=99)],
    "s2": [S2Config(), S2Config(head_shift=(1, 2, 3)), S2Config(head_shift="dkernel", num_heads=6)],
    "sparsed": [SparseDConfig(), SparseDConfig(mode="repo", score_scale=0.5)],
    "vdit": [
        VDiTConfig("multi_diagonal:64t,stride=2", **GRID),
        VDiTConfig(["diagonal:2 + vertical_stripe:first_frame", "skip"], **GRID, skip_value="mean"),
    ],
}


@pytest.mark.parametrize("method", ["dense", *METHODS])
def test_configs_of_every_method_survive_json(method):
    for config in CONFIGS[method]:
        plain = json.loads(json.dumps(encode_config(config, {}, ""), allow_nan=False))
        found, problems = decode_config(method, plain, {}, "config")
        assert problems == []
        assert {f: getattr(found, f) for f in vars(config)} == vars(config)


def test_a_missing_or_another_tensor_file_is_refused(tmp_path):
    path, file = tmp_path / "a.json", tmp_path / "a.safetensors"
    make_recipe().save(path)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"a\.json: tensors\.hash: .*not the file"):
        Recipe.load(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"tensors\.file: .*is missing"):
        Recipe.load(path)
    path.write_text(path.read_text().replace("a.safetensors", "../a.safetensors"))
    with pytest.raises(ValueError, match=r"tensors\.file: '\.\./a\.safetensors' does not have the form"):
        Recipe.load(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "\xff", '{"schema_version": 1}'], ids=["cut", "list", "bytes", "short"]
)
def test_what_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json: "):
        Recipe.load(path)


# -- complaints -------------------------------------------------------------------------------------


def config_of(plain, layer=1, group=1):
    return plain["layers"][layer]["groups"][group]["config"]


def set_group(plain, **values):
    plain["layers"][1]["groups"][1].update(values)


BAD = {
    "no model": (lambda p: p.pop("model"), "model: required, but absent"),
    "unknown key": (lambda p: p.update(colour=1), "colour: unknown key"),
    "head count type": (
        lambda p: p["model"].update(num_heads="6"),
        "model.num_heads: expected integer, got string",
    ),
    "bool for int": (
        lambda p: p["model"].update(num_heads=True),
        "model.num_heads: expected integer, got bool",
    ),
    "hash": (lambda p: p["model"].update(config_hash="md5:1"), "model.config_hash: 'md5:1' does not have"),
    "phase": (
        lambda p: p["layers"][1].update(phase="train"),
        "layers[1].phase: 'train' is not one of prefill",
    ),
    "layer": (lambda p: p["layers"][1].update(layer=2), "layers[1].layer: 2 is outside 0..1"),
    "no groups": (lambda p: p["layers"][1].update(groups=[]), "layers[1].groups: has 0 entries; expected at"),
    "method": (lambda p: set_group(p, method="magic"), "layers[1].groups[1].method: unknown method 'magic'"),
    "config key": (
        lambda p: config_of(p).update(theta=1),
        "layers[1].groups[1].config.theta: s2 has no such setting",
    ),
    "config type": (
        lambda p: config_of(p).update(block_size=32.5),
        "layers[1].groups[1].config.block_size: expected int, got 32.5",
    ),
    "config value": (
        lambda p: config_of(p, 0, 0).update(theta="most"),
        "layers[0].groups[0].config.theta: anchor_attention:",
    ),
    "config range": (
        lambda p: config_of(p).update(vert_stride=0),
        "layers[1].groups[1].config.vert_stride: s2_attention: vert",
    ),
    "config pair": (
        lambda p: set_group(p, method="blasst", config={"threshold": -1}),
        "layers[1].groups[1].config.threshold: blasst_attention: threshold is -1",
    ),
    "required setting": (
        lambda p: set_group(p, method="vdit", config={"patterns": "full"}),
        "layers[1].groups[1].config.grid: required by vdit",
    ),
    "pattern": (
        lambda p: set_group(p, method="vdit", config={"patterns": "zigzag", "grid": [1, 2, 3]}),
        "layers[1].groups[1].config.patterns: vdit_attention: unknown pattern 'zigzag'",
    ),
    "patterns by head": (
        lambda p: set_group(p, method="vdit", config={"patterns": ["full", "skip"], "grid": [1, 2, 3]}),
        "layers[1].groups[1].config.patterns: has 2 patterns for 3 heads",
    ),
    "config flag": (
        lambda p: config_of(p).update(per_query_head=1),
        "layers[1].groups[1].config.per_query_head: expected bool, got 1",
    ),
    "config layout": (
        lambda p: set_group(p, method="blasst", config={"threshold": 0.0, "layout": "x"}),
        "layers[1].groups[1].config.layout: expected SparseLayout | None, got 'x'",
    ),
    "layout parts": (
        lambda p: set_group(p, method="blasst", config={"threshold": 0.0, "layout": {"layout": {"L": 0}}}),
        "layers[1].groups[1].config.layout: layout.blocks: required, but absent; layout.block_m: req",
    ),
    "huge model": (
        lambda p: p["model"].update(num_heads=10**15),
        "layers[0].groups: heads 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, ... are in no group",
    ),
    "huge head": (
        lambda p: set_group(p, heads=[3, 4, 10**15]),
        "layers[1].groups: heads 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, ... are in no group",
    ),
    "no tensor": (
        lambda p: config_of(p, 0, 0).update(theta={"tensor": "x"}),
        "layers[0].groups[0].config.theta: tensor 'x' is not in the recipe's",
    ),
    "head twice": (
        lambda p: set_group(p, heads=[2, 3, 4, 5]),
        "layers[1].groups[1].heads: head 2 is covered twice, also by",
    ),
    "head left out": (lambda p: set_group(p, heads=[4, 5]), "layers[1].groups: heads 3 are in no group"),
    "last head left out": (lambda p: set_group(p, heads=[3, 4]), "layers[1].groups: heads 5 are in no group"),
    "too many heads": (
        lambda p: set_group(p, heads=[3, 4, 5, 6]),
        "layers[1].groups: cover heads 0..6, but the model has 6",
    ),
    "recall": (
        lambda p: set_group(p, expected={"mass_recall": [0.5, 1.2, 1]}),
        "layers[1].groups[1].expected.mass_recall[1]: 1.2 is out of range",
    ),
    "expected count": (
        lambda p: set_group(p, expected={"time_us": [1]}),
        "layers[1].groups[1].expected.time_us: has 1 numbers",
    ),
    "layer left out": (lambda p: p["layers"].pop(), "layers: prefill has no plan for layers 1"),
    "layer twice": (lambda p: p["layers"][1].update(layer=0), "layers[1]: layer 0 has another plan"),
    "steps of prefill": (lambda p: p["layers"][1].update(steps=[0, 3]), "layers[1].steps: only denoising"),
    "steps backwards": (
        lambda p: p["layers"][1].update(phase="denoising", steps=[3, 3]),
        "layers[1].steps: [3, 3] is no range",
    ),
    "steps of nothing": (
        lambda p: p["layers"][1].update(phase="denoising", steps=[0, 3]),
        "layers[1].steps: the recipe has no num",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_complaint_names_the_place(case):
    spoil, expected = BAD[case]
    plain = plain_recipe()
    assert validate(plain) == []
    spoil(plain)
    problems = validate(plain)
    assert any(x.startswith(expected) for x in problems), problems
    with pytest.raises(ValueError, match=re.escape(expected)):
        Recipe.from_dict(plain)


def test_all_complaints_come_at_once():
    plain = plain_recipe()
    config_of(plain, 0, 1).update(theta=1)
    config_of(plain, 1, 0).update(theta="most")
    set_group(plain, method="magic")
    assert len(validate(plain)) == 3


def test_a_newer_schema_is_refused_before_anything_else():
    plain = {"schema_version": 2, "created_by": "sparse_attn 9.0", "new": {}}
    (problem,) = validate(plain)
    assert problem.startswith("schema_version: 2, written by sparse_attn 9.0") and "Upgrade" in problem
    assert validate({**plain_recipe(), "schema_version": 0})


def test_our_reading_of_the_schema_is_that_of_jsonschema():
    jsonschema = pytest.importorskip("jsonschema", reason="needs the jsonschema package")
    from sparse_attn.recipe_check import schema_problems

    jsonschema.Draft202012Validator.check_schema(schema())
    judge = jsonschema.Draft202012Validator(schema())
    verdicts = set()
    for spoil, _ in BAD.values():
        plain = plain_recipe()
        assert judge.is_valid(plain)
        spoil(plain)
        verdicts.add(judge.is_valid(plain))
        assert judge.is_valid(plain) == (schema_problems(plain, schema()) == [])
    assert verdicts == {True, False}


# -- models -----------------------------------------------------------------------------------------

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "hidden_size": 384, "rope_theta": 1e4, "dtype": "bfloat16",
}  # fmt: skip


def test_fingerprint_of_a_config():
    found = Fingerprint.of(LLAMA)
    assert found == replace(MODEL, config_hash=hash_config(LLAMA))
    assert Fingerprint.of({**LLAMA, "dtype": "float32", "_name_or_path": "x"}) == found
    assert Fingerprint.of({**LLAMA, "rope_theta": 5e5}) != found
    wan = {
        "_class_name": "WanTransformer3DModel",
        "num_layers": 30,
        "num_attention_heads": 12,
        "attention_head_dim": 128,
    }
    assert Fingerprint.of(wan) == Fingerprint("WanTransformer3DModel", 30, 12, 12, 128, hash_config(wan))
    with pytest.raises(ValueError, match="does not tell num_heads, num_kv_heads"):
        Fingerprint.of({"_class_name": "X", "num_layers": 3, "head_dim": 4})


def test_fingerprint_of_a_transformers_model():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        hidden_size=384, intermediate_size=8, vocab_size=11,
    )  # fmt: skip
    found = Fingerprint.of(config)
    assert found == replace(MODEL, config_hash=found.config_hash)
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    assert Fingerprint.of(model) == found


def test_another_model_is_refused():
    recipe = replace(make_recipe(), model=Fingerprint.of(LLAMA))
    recipe.check_model(LLAMA)
    with pytest.raises(
        ValueError, match=r"num_kv_heads is 6, the recipe's 2; config_hash .*search on this model"
    ):
        recipe.check_model({**LLAMA, "num_key_value_heads": 6})
    with pytest.raises(ValueError, match=r"config_hash is .*strict=False"):
        recipe.check_model({**LLAMA, "rope_theta": 5e5})
    recipe.check_model({**LLAMA, "rope_theta": 5e5}, strict=False)
    with pytest.raises(ValueError, match="architecture is X"):
        recipe.check_model({**LLAMA, "architectures": ["X"]}, strict=False)


def test_hash_of_calibration_data_sees_numbers_shapes_and_types():
    x = torch.arange(6)
    hashes = {hash_tensors([y]) for y in (x, x.view(2, 3), x.int(), x.flip(0))}
    assert len(hashes) == 4 and hash_tensors([x.clone()]) in hashes
    assert re.fullmatch("sha256:[0-9a-f]{64}", hash_tensors([x.bfloat16()]))


# -- groups and settings ----------------------------------------------------------------------------


def test_equal_settings_share_a_group():
    groups = (
        HeadGroup((5,), "s2", S2Config(32), relative_error=(0.5,), time_us=(5.0,)),
        HeadGroup((4,), "s2", S2Config(64)),
        HeadGroup((3, 0), "s2", S2Config(32), relative_error=(0.3, 0.0), time_us=(3.0, 0.0)),
        HeadGroup((1,), "anchor", AnchorConfig(2.0), mass_recall=(0.9,)),
        HeadGroup((2,), "anchor", AnchorConfig(2.0)),
    )
    found = LayerPlan(0, groups).groups
    assert [x.heads for x in found] == [(0, 3, 5), (1, 2), (4,)]
    assert found[0].relative_error == (0.0, 0.3, 0.5) and found[0].time_us == (0.0, 3.0, 5.0)
    assert found[1].mass_recall is None  # known for one of the two only
    one_each = VDiTConfig(["full", "skip"], **GRID)
    apart = (HeadGroup((3, 1), "vdit", one_each), HeadGroup((0, 2), "vdit", one_each))
    assert [x.heads for x in LayerPlan(0, apart).groups] == [(0, 2), (3, 1)]


def test_groups_of_bad_make_are_refused():
    with pytest.raises(ValueError, match="takes S2Config"):
        HeadGroup((0,), "s2", AnchorConfig())
    with pytest.raises(ValueError, match=r"config.theta: has shape \(3,\).*\[2\]"):
        HeadGroup((0, 1), "anchor", AnchorConfig(torch.ones(3)))
    with pytest.raises(ValueError, match=r"config.layout: is a layout for batch 1 and 2 heads"):
        HeadGroup((0, 1, 2), "blasst", BlasstConfig(0.0, layout=layout_for(2)))
    with pytest.raises(ValueError, match="head 0 is covered twice"):
        LayerPlan(0, (HeadGroup((0, 0), "s2", S2),))


def test_settings_by_phase_and_step():
    recipe = make_recipe()
    assert [x.heads for x in recipe.settings_for(0, "prefill")] == [(0, 2, 5), (1, 4), (3,)]
    assert [x.method for x in recipe.settings_for(1, "denoising", 9)] == ["sparsed"]
    assert [x.method for x in recipe.settings_for(1, "denoising", 10)] == ["vdit", "vdit"]
    for message, call in {
        "no phase was given": (0,),
        "no phase 'train'": (0, "train"),
        r"layer 2 is outside 0\.\.1": (2, "prefill"),
        r"step 50 is outside 0\.\.49": (0, "denoising", 50),
        "differs by step": (0, "denoising"),
    }.items():
        with pytest.raises(ValueError, match=message):
            recipe.settings_for(*call)


def test_a_partial_recipe_leaves_the_rest_dense():
    whole = make_recipe()
    some = [x for x in whole.layers if x.phase == "denoising" and x.layer == 1 and x.steps == (0, 10)]
    with pytest.raises(
        ValueError, match=r"no plan for layers 0; .*\n.*layer 1 has no plan for some denoising steps"
    ):
        replace(whole, layers=tuple(some))
    part = replace(whole, layers=tuple(some), partial=True)
    assert [x.method for x in part.settings_for(1, "denoising", 3)] == ["sparsed"]
    for layer, step in ((1, 10), (0, 3)):
        assert part.settings_for(layer, "denoising", step) == [((0, 1, 2, 3, 4, 5), "dense", DenseConfig())]
    overlapping = (*some, replace(some[0], steps=(9, 50)))
    with pytest.raises(
        ValueError, match=r"layers\[1\]: layer 1 has another plan for the same denoising steps"
    ):
        replace(whole, layers=overlapping, partial=True)


# -- running a layer --------------------------------------------------------------------------------


def s2_mask(config: S2Config, head: int, num_heads: int, L: int) -> torch.Tensor:
    """S2's definition, token by token, for key head `head` of `num_heads`."""
    shift = head if num_heads >= config.vert_stride else head * config.vert_stride // num_heads
    c = torch.arange(L)[:, None] // config.block_size
    j = torch.arange(L)[None] // config.block_size
    near = (c - j < config.local_blocks) | (j < config.sink_blocks)
    return (near | ((j + shift) % config.vert_stride == 0)) & (torch.arange(L)[:, None] >= torch.arange(L))


def check_heads(plan, inputs, masks, *, is_causal, **options):
    """Every head against plain attention over its own mask, by the rule of the engines' tests."""
    q, k, v = inputs
    out, lse = run_layer(plan, q, k, v, is_causal=is_causal, return_lse=True, **options)
    mask = torch.stack(masks)[None]
    reference, lse_reference = masked_attention(q, k, v, mask)
    plain, lse_plain = masked_attention(q, k, v, mask, dtype=q.dtype)
    assert_close(out, reference, plain, "out")
    assert_close(lse, lse_reference, lse_plain, "lse")


@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (6, 1)], ids=["gqa1", "gqa3", "gqa6"])
def test_mixed_causal_groups_equal_masked_attention_head_by_head(heads, kv_heads):
    L = 150
    q, k, v = inputs = make_inputs(heads=heads, kv_heads=kv_heads, L=L, head_dim=32, seed=1)
    thetas = torch.tensor([0.5, 2.0])  # for heads 5 and 2, in this order
    own, blasst = layout_for(2), BlasstConfig(0.9, block_m=4, block_n=4)
    plan = LayerPlan(
        3,
        (
            HeadGroup((0, 4), "s2", S2),
            HeadGroup((5, 2), "anchor", AnchorConfig(thetas, block_size=16, step=2)),
            HeadGroup((1,), "blasst", blasst),
            HeadGroup((3,), "dense", DenseConfig(32)),
        ),
    )
    masks = []
    for h in range(6):
        kv = h // (heads // kv_heads)
        one = (q[:, h : h + 1], k[:, kv : kv + 1], v[:, kv : kv + 1])
        if h in (0, 4):
            mask = s2_mask(S2, kv, kv_heads, L)
        elif h in (5, 2):
            config = AnchorConfig(0.5 if h == 5 else 2.0, block_size=16, step=2)
            picked = METHODS["anchor"].select(*one[:2], config, is_causal=True, scale=32**-0.5)
            mask = picked.layout.to_dense(True)[0, 0]
        elif h == 1:
            picked = METHODS["blasst"].select(*one[:2], blasst, is_causal=True, scale=32**-0.5)
            kept = attend(*one, picked, is_causal=True, want_kept=True).kept
            mask = kept_mask(picked.layout, kept, True)[0, 0]
            assert 0 < mask.sum() < L * (L + 1) // 2
        else:
            mask = torch.ones(L, L, dtype=torch.bool).tril()
        masks.append(mask)
    check_heads(plan, inputs, masks, is_causal=True)
    # Uneven groups of one layout a head: key heads with two, one and no query heads of the group.
    uneven = LayerPlan(
        0, (HeadGroup((4, 0), "blasst", BlasstConfig(0.0, layout=own)), HeadGroup((1, 2, 3, 5), "s2", S2))
    )
    masks = [s2_mask(S2, h // (heads // kv_heads), kv_heads, L) for h in range(6)]
    masks[4], masks[0] = own.to_dense(True)[0]
    check_heads(uneven, inputs, masks, is_causal=True)


def test_mixed_video_groups_equal_masked_attention_head_by_head():
    L = 67
    q, k, v = inputs = make_inputs(batch=2, heads=6, kv_heads=2, L=L, head_dim=32, seed=2)
    of_head = {5: "diagonal:0.5", 0: "full", 3: "vertical_stripe:columns=0/17,single", 1: "multi_diagonal:2t"}
    of_head |= {2: "multi_diagonal:2t", 4: "skip"}
    plan = LayerPlan(
        0,
        (
            HeadGroup((5, 0, 3), "vdit", VDiTConfig([of_head[h] for h in (5, 0, 3)], **GRID)),
            HeadGroup((1, 2), "vdit", VDiTConfig(of_head[1], **GRID)),
            HeadGroup((4,), "vdit", VDiTConfig("skip", **GRID)),
        ),
        "denoising",
    )
    masks = [vdit_layout(VDiTConfig(of_head[h], **GRID)).to_dense(False)[0, 0] for h in range(6)]
    check_heads(plan, inputs, masks, is_causal=False)
    # Padded text is no key, whether or not the caller passes it.
    config = VDiTConfig("full", **GRID | {"text_valid": 3})
    padded = LayerPlan(0, (HeadGroup(tuple(range(6)), "vdit", config),), "denoising")
    short = run_layer(padded, q, k[:, :, :63], v[:, :, :63], is_causal=False)
    assert torch.equal(run_layer(padded, q, k, v, is_causal=False), short)


def test_sparsed_groups_keep_their_own_patterns_in_one_cache():
    L, prompt = 96, 40
    q, k, v = make_inputs(heads=6, kv_heads=2, L=L, head_dim=32, seed=3)
    configs = {(0, 3, 4): SparseDConfig(0.5, 0.3, 16), (1, 2, 5): SparseDConfig(0.5, 0.6, 16)}
    plan = LayerPlan(1, tuple(HeadGroup(h, "sparsed", c) for h, c in configs.items()), "denoising")
    cache, dense = LayoutCache(), [torch.ones(L, L, dtype=torch.bool)] * 6
    masks = list(dense)
    for heads, config in configs.items():
        for h in heads:
            one = (q[:, h : h + 1], k[:, h // 3 : h // 3 + 1])
            masks[h] = sparsed_layout(*one, config, prompt_len=prompt).to_dense()[0, 0]
    assert masks[0].sum() < masks[1].sum() < L * L
    for step in range(4):
        context = Context(step=step, num_steps=4, prompt_len=prompt, cache=cache)
        expected = dense if step < 2 else masks
        check_heads(plan, (q, k, v), expected, is_causal=False, context=context)


def test_each_range_of_steps_finds_its_own_pattern_and_frees_the_one_before():
    """Other heads run SparseD in the second range than in the first; each begins dense. Twice over."""
    L, heads = 64, {(0, 2): (0, 1, 2), (2, 5): (1, 3)}
    plans = {}
    for steps, own in heads.items():
        config = SparseDConfig(select_ratio=0.4, block_size=16).beginning_at(steps[0], 5)
        rest = tuple(h for h in range(4) if h not in own)
        groups = (HeadGroup(own, "sparsed", config), HeadGroup(rest, "dense", DenseConfig()))
        plans |= dict.fromkeys(range(*steps), LayerPlan(1, groups, "denoising", steps))
    cache, held = LayoutCache(), []
    for step in [*range(5)] * 2:
        plan, masks = plans[step], [torch.ones(L, L, dtype=torch.bool)] * 4
        (sparse,) = (group for group in plan.groups if group.method == "sparsed")
        q, k, _ = make_inputs(heads=4, kv_heads=2, L=L, head_dim=32, seed=plan.steps[0])
        for h in sparse.heads if step > plan.steps[0] else ():
            one = (q[:, h : h + 1], k[:, h // 2 : h // 2 + 1])
            masks[h] = sparsed_layout(*one, sparse.config, prompt_len=20).to_dense()[0, 0]
        inputs = make_inputs(heads=4, kv_heads=2, L=L, head_dim=32, seed=step)
        context = Context(step=step, num_steps=5, prompt_len=20, cache=cache)
        check_heads(plan, inputs, masks, is_causal=False, context=context)
        held.append(len(cache))
    assert held == [2, 2, 1, 1, 1] * 2  # one a call: key head 0 has two of its heads in it, key head 1 one


@pytest.mark.parametrize("per_query_head", [False, True], ids=["kv", "query"])
def test_s2_heads_keep_their_shards_when_the_layer_is_cut(per_query_head):
    """Whatever the groups and ranks, with dense heads and shifts of their own."""
    q, k, v = make_inputs(heads=8, kv_heads=4, L=200, head_dim=32, seed=4)
    config = S2Config(16, 1, 4, num_dense_heads=1, shift_offset=1, per_query_head=per_query_head)
    whole = s2_attention(
        q, k, v, **{x: getattr(config, x) for x in vars(config)}, is_causal=True, enable_gqa=True
    )
    plan = LayerPlan(
        0, (HeadGroup((0, 3, 5, 7), "s2", config), HeadGroup((1, 2, 4, 6), "dense", DenseConfig()))
    )
    out = run_layer(plan, q, k, v, is_causal=True)
    torch.testing.assert_close(out[:, [0, 3, 5, 7]], whole[:, [0, 3, 5, 7]], rtol=1e-5, atol=1e-6)
    ranks = [
        run_layer(
            plan,
            q[:, n : n + 4],
            k[:, n // 2 : n // 2 + 2],
            v[:, n // 2 : n // 2 + 2],
            is_causal=True,
            head_offset=n,
        )
        for n in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(ranks, 1), out, rtol=1e-5, atol=1e-6)


def test_another_number_of_heads_is_refused():
    plan = LayerPlan(0, (HeadGroup((0, 1, 2), "s2", S2),))
    for heads, offset in ((2, None), (4, None), (2, 2)):
        q, k, v = make_inputs(heads=heads, L=32, head_dim=32)
        with pytest.raises(ValueError, match=f"query has {heads} heads.*layer 0 has 3"):
            run_layer(plan, q, k, v, is_causal=True, head_offset=offset)


def test_gradients_reach_every_head():
    plan = LayerPlan(0, (HeadGroup((0, 3), "s2", S2), HeadGroup((2, 1), "dense", DenseConfig(32))))
    q, k, v = inputs = make_inputs(heads=4, kv_heads=2, L=70, head_dim=32, requires_grad=True)
    with torch.inference_mode():  # what a plan keeps from here must not stop gradients later
        run_layer(plan, *(x.detach() for x in inputs), is_causal=True)
    run_layer(plan, q, k, v, is_causal=True).square().sum().backward()
    found = [x.grad.clone() for x in inputs]
    mask = torch.ones(1, 4, 70, 70, dtype=torch.bool).tril()
    for h in (0, 3):
        mask[0, h] = s2_mask(S2, h // 2, 2, 70)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    narrow = [x.detach().requires_grad_() for x in inputs]
    masked_attention(*wide, mask)[0].square().sum().backward()
    masked_attention(*narrow, mask, dtype=torch.float32)[0].square().sum().backward()
    for got, x, y in zip(found, wide, narrow, strict=True):
        assert_close(got, x.grad, y.grad, "gradient")


# -- the command ------------------------------------------------------------------------------------


def test_show_draws_layers_and_heads(tmp_path):
    path = tmp_path / "a.json"
    make_recipe().save(path)
    result = CliRunner().invoke(make_app(), ["recipe", "show", str(path)], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "LlamaForCausalLM: 2 layers x 6 heads (2 key heads), head size 64" in lines[0]
    prefill = lines.index(next(x for x in lines if x.startswith("prefill")))
    assert re.match(r"\s*0\s+ABACBA\s+-\s+-\s+-\s+-", lines[prefill + 2]), lines[prefill + 2]
    late = lines.index(next(x for x in lines if x.startswith("denoising, steps 10-49 of 50")))
    assert re.match(r"\s*1\s+EEEEFF ", lines[late + 3]), lines[late + 3]
    assert any(
        "C  s2 block_size=32 local_blocks=1 vert_stride=4 sink_blocks=1  (2 heads)" in x for x in lines
    )

    result = CliRunner().invoke(make_app(), ["recipe", "show", str(path), "--json"])
    assert json.loads(result.output)["layers"][0]["heads"] == "ABACBA"


def test_show_tells_error_and_speed(tmp_path):
    path = tmp_path / "a.json"
    numbers = {"relative_error": (0.01, 0.02, 0.005), "mass_recall": (0.9, 0.95, 0.99)}
    numbers |= {"time_us": (2.0, 3.0, 5.0), "dense_time_us": (8.0, 8.0, 9.0)}
    plan = LayerPlan(0, (HeadGroup((0, 1, 2), "s2", S2, **numbers),))
    Recipe(Fingerprint("X", 1, 3, 3, 64, HASH), (plan,)).save(path)
    output = CliRunner().invoke(make_app(), ["recipe", "show", str(path)], env={"COLUMNS": "100"}).output
    assert re.search(r"0\s+AAA\s+2\.00%\s+0\.9000\s+10\.0\s+2\.50x", output), output
    assert "all layers: 10.0 us, dense 25.0 us: 2.50x" in output


def test_show_weighs_the_steps_of_a_range(tmp_path):
    """2 of 20 us at one step, 5 of 20 us at each of the other four."""
    path, plans = tmp_path / "a.json", []
    for steps, time in (((0, 1), 2.0), ((1, 5), 5.0)):
        group = HeadGroup((0, 1), "dense", DenseConfig(), time_us=(time / 2,) * 2, dense_time_us=(10.0, 10.0))
        plans.append(LayerPlan(0, (group,), "denoising", steps))
    Recipe(Fingerprint("X", 1, 2, 2, 64, HASH), tuple(plans), num_steps=5).save(path)
    output = CliRunner().invoke(make_app(), ["recipe", "show", str(path)], env={"COLUMNS": "100"}).output
    assert "denoising, step 0 of 5" in output and "denoising, steps 1-4 of 5" in output
    assert "all layers: 5.0 us, dense 20.0 us: 4.00x" in output
    assert "all layers and steps: 22.0 us, dense 100.0 us: 4.55x" in output


def test_show_of_a_bad_file_is_one_message(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**plain_recipe(), "schema_version": 7}))
    for file, message in ((path, "schema_version: 7"), (tmp_path / "b.json", "No such file")):
        result = CliRunner().invoke(make_app(), ["recipe", "show", str(file)])
        assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


# -- the page in docs -------------------------------------------------------------------------------


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/recipes.md", "exec"), names)
    assert names["out"].isfinite().all() and "(1, 2) anchor AnchorConfig(theta=9.0" in capsys.readouterr().out


def test_the_docs_name_every_key_of_the_schema():
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    layer = schema()["properties"]["layers"]["items"]
    group = layer["properties"]["groups"]["items"]
    parts = (schema(), schema()["properties"]["model"], layer, group, group["properties"]["expected"])
    keys = {key for part in parts for key in part["properties"]} - {"layers"}
    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_a_window_is_called_one():
    config = S2Config(block_size=64, local_blocks=9, vert_stride=NO_SHARD, sink_blocks=1, head_shift=0)
    assert setting_text(HeadGroup((0,), "s2", config)) == "s2 window 512+64, blocks of 64"
