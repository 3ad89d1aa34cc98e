"""`attn_implementation="sparse_attn"` when a model is loaded, and `torch.compile`."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from test_transformers_patch import WINDOW, error, logits, table, tiny_model, tokens  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.integrations import padded_graph  # noqa: E402
from sparse_attn.integrations.transformers import NAME, DenseFallbackWarning  # noqa: E402
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_registered():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallbackWarning)
        sa.register()
        yield
        sa.register()


def sparse_logits(model, ids, method: str = "s2", **options) -> torch.Tensor:
    with sa.patched(model, method, **options):
        return logits(model, ids)


def test_a_registered_method(tmp_path: Path) -> None:
    """Loading from a folder; padding is kept, a newer registration counts, a patch goes before it."""
    stock, ids = tiny_model(), tokens(2, 60)
    stock.save_pretrained(tmp_path)
    sa.register("s2", **WINDOW, layers={1: "dense"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    expected = sparse_logits(stock, ids, **WINDOW, layers={1: "dense"})
    assert error(logits(model, ids), expected) < 1e-5
    assert error(expected, logits(stock, ids)) > 1e-2
    assert sa.explain(model).startswith('LlamaForCausalLM, loaded with attn_implementation="sparse_attn":')
    assert table(model)["1"] == ["dense", "dense", "dense", "asked for by `layers`"]

    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    alone = logits(model, ids[1:, 20:])
    assert error(logits(model, ids, **inputs)[1:, 20:], alone) < 1e-4, "padding must not be lost"

    sa.register("s2", vert_stride=1, block_size=16)
    assert error(logits(model, ids), logits(stock, ids)) < 1e-4
    with sa.patched(model, "s2", **WINDOW, layers={1: "dense"}):
        assert error(logits(model, ids), expected) < 1e-5
    assert error(logits(model, ids), logits(stock, ids)) < 1e-4
    sa.register()
    with pytest.raises(ValueError, match=r"needs a method: call sparse_attn.patch"):
        logits(model, ids)


def test_the_method_in_the_config(tmp_path: Path) -> None:
    """It is saved with the model, goes before what is registered, and is what a copy follows."""
    stock, ids = tiny_model(), tokens(1, 60)
    expected = sparse_logits(stock, ids, **WINDOW, layers={0: ("blasst", {"threshold": 0.0})})
    config = copy.deepcopy(stock.config)
    config.sparse_attention_config = {
        "method": "s2", **WINDOW, "layers": {"0": ["blasst", {"threshold": 0.0}]},
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    model.load_state_dict(stock.state_dict())
    model.save_pretrained(tmp_path)
    sa.register("dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    for each in (model, loaded, copy.deepcopy(loaded)):
        assert error(logits(each, ids), expected) < 1e-5
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain, ids), logits(stock, ids)), "without the name it is a plain model"
    loaded.set_attn_implementation("sdpa")
    assert torch.equal(logits(loaded, ids), logits(stock, ids))


def test_a_recipe_in_the_config(tmp_path: Path) -> None:
    stock, ids = tiny_model(), tokens(1, 60)
    s2 = HeadGroup((0, 1, 2, 3), "s2", sa.S2Config(**WINDOW))
    Recipe(Fingerprint.of(stock), (LayerPlan(1, (s2,)),), partial=True).save(tmp_path / "tiny.json")
    stock.config.sparse_attention_config = {"method": str(tmp_path / "tiny.json")}
    stock.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert error(logits(model, ids), sparse_logits(stock, ids, "dense", layers={1: ("s2", WINDOW)})) < 1e-5
    model.config.architectures = None  # as of a model that was never saved
    assert table(model)["1"][0].startswith("s2(")
    other = tiny_model(num_hidden_layers=1)
    other.config.sparse_attention_config = stock.config.sparse_attention_config
    other.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="made for another model: num_layers is 1, the recipe's 2"):
        logits(other, ids)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("nonsense",), {}, "register: unknown method 'nonsense'"),
        (("s2",), {"block_size": 0}, "block_size is 0"),
        (("s2",), {"nonsense": 1}, "register: s2: .*nonsense"),
        (("s2",), {"decode": "maybe"}, "decode is 'maybe'"),
        (("s2",), {"layers": {0: "nonsense"}}, "unknown method"),
        ((), {"theta": 1.0}, "need a method"),
        (("absent.json",), {}, "no recipe file"),
    ],
)
def test_a_bad_registration_changes_nothing(args, options, message) -> None:
    sa.register("dense")
    model, ids = tiny_model(), tokens(1, 20)
    model.set_attn_implementation(NAME)
    before = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        sa.register(*args, **options)
    assert torch.equal(logits(model, ids), before)
    model.config.sparse_attention_config = ["s2"]
    with pytest.raises(ValueError, match="it must be a dict"):
        logits(model, ids)


# -- compile ------------------------------------------------------------------------------------------

METHODS = {
    "s2": WINDOW,
    "anchor": {"theta": -3.0, "block_size": 16, "step": 2},
}


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("method", METHODS)
def test_a_patched_model_compiles_in_one_graph(method: str) -> None:
    model, ids = tiny_model(num_hidden_layers=1), tokens(1, 150)
    stock = logits(model, ids)
    with sa.patched(model, method, **METHODS[method]):
        ours = logits(model, ids)
        assert error(logits(compiled(model), ids), ours) < 1e-5 * ours.abs().max().item()
    assert error(ours, stock) > 1e-3


def test_a_loaded_model_and_a_recipe_compile() -> None:
    model, ids = tiny_model(num_hidden_layers=1), tokens(1, 60)
    groups = (
        HeadGroup((0, 3), "s2", sa.S2Config(**{**WINDOW, "head_shift": None})),
        HeadGroup((1, 2), "dense", DenseConfig(16)),
    )
    recipe = Recipe(Fingerprint.of(model), (LayerPlan(0, groups),))
    expected = sparse_logits(model, ids, recipe)
    sa.register(recipe)
    model.set_attn_implementation(NAME)
    assert error(logits(compiled(model), ids), expected) < 1e-5 * expected.abs().max().item()


def test_a_compiled_fallback_warns_while_it_is_traced() -> None:
    """Without a cache transformers cannot rule out packed sequences in a graph, and makes their mask."""
    model, ids = tiny_model(num_hidden_layers=1), tokens(1, 60)
    stock = logits(model, ids)
    with sa.patched(model, "s2", **WINDOW), pytest.warns(DenseFallbackWarning, match="packed sequences"):
        ours = logits(compiled(model), ids, use_cache=False)
    assert error(ours, stock) < 1e-4


def test_compiled_training() -> None:
    model, ids = tiny_model(num_hidden_layers=1).train(), tokens(1, 60)

    def gradient(run) -> torch.Tensor:
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    with sa.patched(model, "blasst", threshold=0.5, block_m=16, block_n=16):
        eager = gradient(model)
        ours = gradient(compiled(model))
    assert error(ours, eager) < 1e-5 * eager.abs().max().item()


def paddings(ids) -> dict[str, torch.Tensor]:
    masks = {name: torch.ones_like(ids) for name in ("left and right", "none", "other")}
    masks["left and right"][1, :7] = 0
    masks["left and right"][2, 50:] = 0
    masks["other"][0, :20] = 0
    return masks


@pytest.mark.parametrize("method", METHODS)
def test_padding_compiles_into_one_graph(method: str) -> None:
    """One graph for every padding, and for none."""
    model, ids = tiny_model(num_hidden_layers=2), tokens(3, 150)
    with sa.patched(model, method, **METHODS[method], layers={1: "dense"}):
        ours = compiled(model)
        for number, (name, mask) in enumerate(paddings(ids).items()):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                got = logits(ours, ids, attention_mask=mask)
            expected = logits(model, ids, attention_mask=mask)
            assert error(got[mask.bool()], expected[mask.bool()]) < 1e-5 * expected.abs().max().item(), name
    stock = logits(model, ids, attention_mask=mask)
    assert error(stock[mask.bool()], expected[mask.bool()]) > 1e-3


def test_a_mask_with_holes_in_a_graph_is_dense_and_warns() -> None:
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, 20:30] = 0
    stock = logits(model, ids, attention_mask=mask)
    with sa.patched(model, "s2", **WINDOW), pytest.warns(DenseFallbackWarning, match="with holes"):
        ours = logits(compiled(model), ids, attention_mask=mask)
    assert error(ours[mask.bool()], stock[mask.bool()]) < 1e-4


@pytest.mark.parametrize("method", ["s2", "blasst"])
def test_compiled_training_with_padding(method: str) -> None:
    model, ids = tiny_model(num_hidden_layers=2).train(), tokens(3, 60)
    mask = paddings(ids)["left and right"]
    labels = ids.masked_fill(mask == 0, -100)
    options = WINDOW if method == "s2" else {"threshold": 0.5, "block_m": 16, "block_n": 16}

    def gradients(run) -> torch.Tensor:
        model.zero_grad()
        run(ids, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with sa.patched(model, method, **options):
        eager = gradients(model)
        ours = gradients(compiled(model))
    assert error(ours, eager) < 1e-5 * eager.abs().max().item()
    assert error(gradients(model), eager) > 1e-3 * eager.abs().max().item(), "a sparse pattern must show"


def test_the_operator_of_padding_passes_opcheck_and_outlives_no_model() -> None:
    model, ids = tiny_model(num_hidden_layers=1), tokens(3, 60)
    mask = paddings(ids)["left and right"].bool()
    q, k = torch.randn(3, 4, 60, 16, requires_grad=True), torch.randn(3, 2, 60, 16, requires_grad=True)
    with sa.patched(model, "s2", **WINDOW):
        number = padded_graph._number_of(id(model.model.layers[0].self_attn))
        args = (q, k, k.detach(), mask, 0.25, True, number)
        torch.library.opcheck(torch.ops.sparse_attn.padded_attention, args)
        twin = copy.deepcopy(model).model.layers[0].self_attn
        assert padded_graph._number_of(id(twin)) != number
    del model
    gc.collect()
    with pytest.raises(ValueError, match="is gone; compile it again"):
        torch.ops.sparse_attn.padded_attention(*args)


def test_generation_with_a_compiled_static_cache() -> None:
    """Decode steps run compiled; the first prefill is sparse, steps are dense under the cache's mask."""
    model, ids = tiny_model(num_hidden_layers=1), tokens(1, 60)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with sa.patched(model, "s2", **WINDOW):
        dynamic = model.generate(ids, **options)
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, backend="aot_eager")
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, dynamic)
