"""`patch`, `unpatch`, `patched`, `explain`: exact where dense, by layer, reversible, and never by halves."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import sparse_attn as sa  # noqa: E402
from sparse_attn.integrations.transformers import NAME, DenseFallbackWarning  # noqa: E402
from sparse_attn.methods import METHODS, Method  # noqa: E402
from sparse_attn.methods import blasst as blasst_module  # noqa: E402

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "gemma": ("Gemma", {}),
    "phi3": ("Phi3", {}),
    # Eager: transformers up to 5.17 took SDPA for it, which silently leaves the softcap out.
    "gemma2-softcap": (
        "Gemma2",
        {"sliding_window": 16, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "gemma3-mixed": ("Gemma3Text", {"sliding_window": 16, "layer_types": MIXED}),
    "gpt-oss-sinks": ("GptOss", {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip


def tiny_model(family: str = "llama", **changes) -> transformers.PreTrainedModel:
    """Two layers, 4 query heads on 2 key heads, random weights with attention sharp enough to show errors."""
    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings | changes))
    head = {"Gemma3Text": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 20
            if parameter_name.endswith("qkv_proj.weight"):  # queries and keys, not values
                parameter[: -SIZES["num_key_value_heads"] * SIZES["head_dim"]] *= 20
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, **inputs) -> torch.Tensor:
    return model(ids, **inputs).logits


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


WINDOW = {"block_size": 16, "local_blocks": 1, "vert_stride": 2, "head_shift": 1}  # sparse from 33 tokens on


@pytest.fixture(autouse=True)
def no_surprise_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallbackWarning)
        yield


# -- exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_dense_equals_stock(family: str) -> None:
    """Logits of a padded batch, and what generation says."""
    model, ids = tiny_model(family), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    generate = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    stock, said = logits(model, ids, **inputs), model.generate(ids, **generate)
    with sa.patched(model, "dense"):
        ours, ours_said = logits(model, ids, **inputs), model.generate(ids, **generate)
    real = mask.bool()
    assert error(ours[real], stock[real]) < 1e-4 * stock[real].abs().max().item()
    assert torch.equal(ours_said, said)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "phi3"])
def test_a_full_layout_through_an_engine_equals_stock(family: str) -> None:
    model, ids = tiny_model(family), tokens(1, 50)
    stock = logits(model, ids)
    with sa.patched(model, "s2", vert_stride=1, block_size=16, engine="reference"):
        ours = logits(model, ids)
    assert error(ours, stock) < 1e-4 * stock.abs().max().item()
    with sa.patched(model, "s2", **WINDOW):
        assert error(logits(model, ids), stock) > 1e-2, "a sparse pattern must show"


def test_bert_with_cross_attention() -> None:
    """Bidirectional layers with padding equal stock; cross-attention never runs a method."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    encoder = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=2)).eval()
    decoder = transformers.BertLMHeadModel(
        transformers.BertConfig(**sizes, num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    ).eval()
    with torch.no_grad():
        for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
            if name.endswith(("query.weight", "key.weight")):
                parameter *= 20
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0

    @torch.no_grad()
    def hidden() -> torch.Tensor:
        return encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()]

    stock = hidden()
    with sa.patched(encoder, "dense"):
        assert error(hidden(), stock) < 1e-4
    memory, calls = torch.randn(2, 13, 64), []

    def record(q, k, v, *, layer, is_causal, scale):
        calls.append((q.shape[2], k.shape[2]))
        return sa.s2_attention(q, k, v, vert_stride=1, is_causal=is_causal, scale=scale)

    stock = logits(decoder, ids, encoder_hidden_states=memory)
    with sa.patched(decoder, record):
        assert error(logits(decoder, ids, encoder_hidden_states=memory), stock) < 1e-4
        assert sa.explain(decoder).splitlines()[3].endswith("cross-attention")
    assert calls == [(40, 40)]


def test_layers_follow_their_own_settings() -> None:
    """All layers dense but one equals what an attention function that knows the layer gives."""
    model, ids = tiny_model(num_hidden_layers=3), tokens(1, 60)
    stock = logits(model, ids)

    def only_middle(q, k, v, *, layer, is_causal, scale):
        if layer == 1:
            return sa.s2_attention(q, k, v, **WINDOW, is_causal=is_causal, scale=scale, enable_gqa=True)
        return sa.s2_attention(q, k, v, vert_stride=1, is_causal=is_causal, scale=scale, enable_gqa=True)

    with sa.patched(model, only_middle):
        expected = logits(model, ids)
    assert error(expected, stock) > 1e-2
    for layers in (
        {1: ("s2", WINDOW)},
        {1: ("s2", sa.S2Config(**WINDOW))},
        lambda number: ("s2", WINDOW) if number == 1 else None,
    ):
        with sa.patched(model, "dense", layers=layers):
            assert error(logits(model, ids), expected) < 1e-4
    with sa.patched(model, "s2", **WINDOW, layers={0: "dense", 2: "dense"}):
        assert error(logits(model, ids), expected) < 1e-4


def test_another_dtype_midway() -> None:
    model, ids = tiny_model(), tokens(1, 50)
    sa.patch(model, "s2", vert_stride=1, block_size=16)
    model.to(torch.bfloat16)
    ours = logits(model, ids)
    sa.unpatch(model)
    assert error(ours, logits(model, ids)) < 0.05 * ours.abs().max().item()


def test_another_device_midway(monkeypatch) -> None:
    """Tensors of a config follow the model."""
    seen = []

    def select(query, key, config, **rest):
        seen.append(
            (query.device.type, config.threshold.device.type, config.layout.blocks.offsets.device.type)
        )
        raise NotImplementedError("seen enough")

    moving = Method("moving", blasst_module.BlasstConfig, select, blasst_module.blasst_attention, causal=True)
    monkeypatch.setitem(METHODS, "moving", moving)
    model, ids = tiny_model(), tokens(1, 128)
    config = {"threshold": torch.full((4,), 0.5), "layout": sa.SparseLayout.full(128, 128)}
    with sa.patched(model, "moving", **config):
        for device in ("cpu", "meta"):
            with pytest.raises(NotImplementedError, match="seen enough"):
                logits(model.to(device), ids.to(device))
    assert seen == [("cpu",) * 3, ("meta",) * 3]


def test_a_sixth_method_needs_no_change(monkeypatch) -> None:
    """What is in the registry is reachable by name, with its own config."""
    seen = []

    def select(query, key, config, **rest):
        seen.append(config.threshold)
        return blasst_module.select(query, key, config, **rest)

    sixth = Method("sixth", blasst_module.BlasstConfig, select, blasst_module.blasst_attention, causal=True)
    monkeypatch.setitem(METHODS, "sixth", sixth)
    model, ids = tiny_model(), tokens(1, 40)
    stock = logits(model, ids)
    with sa.patched(model, "dense", layers={1: ("sixth", {"threshold": 0.0})}):
        assert "sixth(threshold=0.0)" in sa.explain(model)
        assert error(logits(model, ids), stock) < 1e-4
    assert seen == [0.0]


# -- reversible, never by halves ----------------------------------------------------------------------


def test_unpatch_restores() -> None:
    model, ids = tiny_model(), tokens(1, 60)
    before, stock = model.config._attn_implementation, logits(model, ids)
    assert sa.patch(model, "s2", **WINDOW) is model
    assert model.config._attn_implementation == NAME
    assert not torch.equal(logits(model, ids), stock)
    assert sa.unpatch(model) is model
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, ids), stock)


def test_patched_restores_after_an_exception() -> None:
    model, ids = tiny_model(), tokens(1, 60)
    stock = logits(model, ids)
    with pytest.raises(RuntimeError, match="inside"), sa.patched(model, "s2", **WINDOW):
        raise RuntimeError("inside")
    assert torch.equal(logits(model, ids), stock)
    with sa.patched(model, "dense"):
        sa.unpatch(model)  # leaving a block whose model was unpatched inside is no error


def test_patching_twice_and_unpatching_nothing() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="not patched"):
        sa.unpatch(model)
    sa.patch(model, "dense")
    with pytest.raises(ValueError, match=r"patched already.*unpatch\(model\) first"):
        sa.patch(model, "blasst", threshold=0.0)
    with pytest.raises(ValueError, match="not a part of it"):
        sa.unpatch(model.model)
    with pytest.raises(ValueError, match="model that it belongs to is patched already"):
        sa.patch(model.model, "dense")
    assert "dense" in sa.explain(model)
    sa.unpatch(model)
    sa.patch(model.model, "dense")
    with pytest.raises(ValueError, match="patch: model is patched already"):
        sa.patch(model, "dense")
    sa.unpatch(model.model)


def test_a_copy_and_a_pickle_stay_patched() -> None:
    model, ids = tiny_model(), tokens(1, 60)
    stock = logits(model, ids)
    sa.patch(model, "s2", **WINDOW)
    sparse, file = logits(model, ids), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin, ids), sparse)
        sa.unpatch(twin)
        assert torch.equal(logits(twin, ids), stock)
    assert torch.equal(logits(model, ids), sparse), "a copy's unpatching is its own"


BAD = {
    "unknown method": (("nonsense",), {}, "patch: unknown method 'nonsense'; choose one of blasst"),
    "unknown option": (("s2",), {"nonsense": 1}, "patch: s2: .*nonsense"),
    "bad option": (("s2",), {"block_size": 0}, "block_size is 0"),
    "options of dense": (("dense",), {"theta": 1.0}, "takes no config"),
    "wrong config": (("s2", object()), {}, "config is object"),
    "no method": ((7,), {}, "a method is 7"),
    "bad decode": (("dense",), {"decode": "maybe"}, "decode is 'maybe'"),
    "bad on_mask": (("dense",), {"on_mask": "hide"}, "on_mask is 'hide'; use 'dense' or 'error'"),
    "no such layer": (("dense",), {"layers": {2: "dense"}}, r"layers names \[2\].*are 0 to 1"),
    "bad layer method": (("dense",), {"layers": {1: ("nonsense", {})}}, "unknown method"),
    "bad layer option": (("dense",), {"layers": {1: ("s2", {"block_size": 0})}}, "block_size is 0"),
    "layers of a wrong type": (("dense",), {"layers": ["dense"]}, "layers is list"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD)
def test_a_bad_call_leaves_the_model_alone(args, options, message) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    before, stock = model.config._attn_implementation, logits(model, ids)
    with pytest.raises(ValueError, match=message):
        sa.patch(model, *args, **options)
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, ids), stock)
    sa.patch(model, "dense")  # and nothing keeps it from being patched


def test_a_switch_that_fails_halfway_is_undone(monkeypatch) -> None:
    model = tiny_model()
    before = model.config._attn_implementation

    def half(self, name):
        self.config._attn_implementation = name
        raise RuntimeError("halfway")

    monkeypatch.setattr(type(model), "set_attn_implementation", half)
    with pytest.raises(RuntimeError, match="halfway"):
        sa.patch(model, "dense")
    assert model.config._attn_implementation == before
    assert "not patched" in sa.explain(model)


def test_not_a_transformers_model() -> None:
    with pytest.raises(ValueError, match="PreTrainedModel"):
        sa.patch(torch.nn.Linear(2, 2), "dense")
    assert "not patched" in sa.explain(torch.nn.Linear(2, 2))


# -- explain ------------------------------------------------------------------------------------------


def table(model) -> dict[str, list[str]]:
    """The rows of `explain` by their first column, split at double spaces."""
    lines = sa.explain(model).splitlines()
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_explain_says_what_each_layer_does() -> None:
    model = tiny_model(num_hidden_layers=4)
    assert sa.explain(model) == "LlamaForCausalLM is not patched: every layer runs stock attention (sdpa)."
    sa.patch(model, "anchor", theta=9.0, layers={0: "dense", 3: ("s2", {"local_blocks": 4})}, decode="sparse")
    rows = table(model)
    assert rows["layers"] == ["prefill", "decode", "other masks", "why"]
    assert rows["0"] == ["dense", "dense", "dense", "asked for by `layers`"]
    assert rows["1-2"] == ["anchor(theta=9.0)", "anchor(theta=9.0)", "dense, warns"]
    assert rows["3"][0] == "s2(local_blocks=4)"
    sa.unpatch(model)
    sa.patch(model, "anchor", theta=9.0, on_mask="error")
    assert table(model)["0-3"] == ["anchor(theta=9.0)", "dense", "refused (on_mask)"]


def test_window_layers_are_explained_and_quiet() -> None:
    """A mixed model: sparse in the full layer, dense under the window in the other, without a warning."""
    model, ids = tiny_model("gemma3-mixed"), tokens(1, 60)
    stock = logits(model, ids)
    calls = []

    def record(q, k, v, *, layer, is_causal, scale):
        calls.append((layer, q.shape[2]))
        return sa.s2_attention(q, k, v, vert_stride=1, is_causal=is_causal, scale=scale, enable_gqa=True)

    with sa.patched(model, record):
        assert error(logits(model, ids), stock) < 1e-4 * stock.abs().max().item()
        assert calls == [(1, 60)]
        assert table(model)["0"][-1] == (
            "sliding window: function record up to 16 keys, then dense under the window"
        )
        packed = torch.tensor([[*range(8), *range(7)]])
        with pytest.warns(DenseFallbackWarning):  # a mask that the window does not explain still warns
            logits(model, ids[:, :15], position_ids=packed, use_cache=False)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma2-softcap", "softcap 5: runs"), ("gpt-oss-sinks", r"attention sinks \(s_aux\): runs")],
)
def test_softcap_and_sinks_stay_stock_and_say_so(family: str, reason: str) -> None:
    model, ids = tiny_model(family), tokens(1, 60)
    stock = logits(model, ids)
    with pytest.warns(DenseFallbackWarning, match=f"no layer of this model will be sparse .*{reason}"):
        sa.patch(model, "blasst", threshold=1.0, block_m=16, block_n=16)
    assert error(logits(model, ids), stock) < 1e-4 * stock.abs().max().item()
    assert table(model)["0-1"][:3] == ["stock", "stock", "stock, masked"]


# -- import -------------------------------------------------------------------------------------------


def test_names_are_lazy() -> None:
    """Naming the adapter's functions imports no transformers; calling them does."""
    code = (
        "import sys, sparse_attn as sa\n"
        "assert 'sparse_attn.integrations.patching' not in sys.modules\n"
        "sa.patch, sa.unpatch, sa.patched, sa.explain\n"
        "assert 'transformers' not in sys.modules and 'patch' in dir(sa)\n"
        "try: sa.nonsense\n"
        "except AttributeError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "has no attribute 'nonsense'" in done.stdout


# -- the page ------------------------------------------------------------------------------------------


PAGE = (Path(__file__).parents[2] / "docs" / "integrations_transformers.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(4))
def test_examples_of_the_page_run(number: int, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(EXAMPLES[number], f"example {number}", "exec"), {"__name__": "page"})
    finally:
        sa.register()
    printed = capsys.readouterr().out.splitlines()
    shown = {line.strip() for line in PAGE.splitlines()}
    if number == 0:  # the table on the page is what is printed
        assert len(printed) == 8 and {line.strip() for line in printed[:5]} <= shown
    elif number == 1:
        assert printed[0] == "LlamaForCausalLM, patched with the recipe tiny.recipe.json:"
        assert "heads 0-3, 6: s2" in printed[2] and printed[3].split()[:2] == ["1", "dense"]
    elif number == 2:
        assert printed[0].split()[:2] == ["0-1", "anchor"] and printed[1].split()[:2] == [
            "1",
            "s2(local_blocks=2)",
        ]
    else:
        held = [float(line.split()[2]) / float(line.split()[4]) for line in printed[1:]]
        assert held[0] == 1.0 and max(held[1:]) < 0.5
