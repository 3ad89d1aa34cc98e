"""The commands, on a tiny model directory and a text file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from typer.testing import CliRunner  # noqa: E402

from sparse_attn.cli import make_app  # noqa: E402
from sparse_attn.recipe import Recipe  # noqa: E402
from sparse_attn.search.calibrate import Calibration  # noqa: E402
from sparse_attn.search.commands import parse_budget  # noqa: E402

TEXT = "In the beginning there was a tokenizer that had learnt nothing but bytes, and it was enough. " * 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of two layers that reads bytes, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: n for n, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def invoke(*words: object):
    return CliRunner().invoke(make_app(), [str(x) for x in words])


def options(directory, tmp_path):
    text = directory / "text.txt"
    return [
        "--text", text, "--out", tmp_path / "r.json", "--tokens", 160, "--methods", "window,blasst",
        "--device", "cpu",
    ]  # fmt: skip


def test_search_writes_a_recipe_and_a_report(directory, tmp_path):
    words = ["search", directory, *options(directory, tmp_path), "--budget", "perplexity=5%"]
    done = invoke(*words, "--held-out", directory / "text.txt")
    assert done.exit_code == 0, done.output
    assert "attended density" in done.output and "held out, text.txt" in done.output
    recipe = Recipe.load(tmp_path / "r.json")
    recipe.check_model(transformers.AutoConfig.from_pretrained(directory), strict=False)
    assert invoke(*words).exit_code == 1  # an earlier search lies there
    again = invoke(*words, "--resume")
    assert again.exit_code == 0, again.output
    closed = invoke(*words, "--resume", "--closed-loop")
    assert closed.exit_code == 0, closed.output
    assert json.loads((tmp_path / "r.search" / "summary.json").read_text())["closed_loop"]
    shown = invoke("report", tmp_path / "r.json", "--no-png")
    assert shown.exit_code == 0 and (tmp_path / "r.html").read_text().count("<button") == 4


def test_the_papers_mode(directory, tmp_path):
    words = ["search", directory, *options(directory, tmp_path), "--mode", "paper", "--epsilon", "0"]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert {g.method for p in Recipe.load(tmp_path / "r.json").layers for g in p.groups} == {"dense"}


def test_a_dry_run_measures_nothing(directory, tmp_path):
    done = invoke("search", directory, *options(directory, tmp_path), "--dry-run")
    assert done.exit_code == 0, done.output
    assert "would measure" in done.output and "window 32+16" in done.output
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def diffusion(directory, tmp_path_factory):
    """The same model, seeing both ways."""
    folder = tmp_path_factory.mktemp("diffusion")
    shutil.copytree(directory, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False, "mask_token_id": 255}))
    return folder


def test_a_diffusion_model_is_searched_by_phase(diffusion, tmp_path):
    words = [
        "search",
        diffusion,
        *options(diffusion, tmp_path),
        "--steps",
        6,
        "--prompt",
        64,
        "--phases",
        "0,2",
    ]
    planned = invoke(*words, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "of 2 heads at 4 passes in 2 phase(s)" in planned.output.replace("\n", " ")
    done = invoke(*words, "--budget", "error=30%")
    assert done.exit_code == 0, done.output
    recipe = Recipe.load(tmp_path / "r.json")
    assert recipe.num_steps == 6 and {p.steps for p in recipe.layers} == {(0, 2), (2, 6)}
    again = invoke(*words, "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "r.search" / "summary.json").read_text())["rule"]["agreement"] == 0.99


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phases", "3"], "this model makes one pass"),
        (["--steps", "6"], "names no mask_token_id; pass --mask-token"),
        (["--steps", "6", "--mask-token", "255"], "attention is causal"),
        (["--steps", "6", "--held-out", "text.txt"], "--held-out tells a perplexity"),
        (["--phases", "early"], "use a number, 4, or the steps"),
        (["--budget", "speed=2"], "use perplexity=1%"),
        (["--mode", "fast"], "use measured or paper"),
        (["--tokens", "1000"], "reads at most 512"),
        (["--methods", "flash"], "unknown method 'flash'"),
        (["--samples", "9"], "pass a longer one"),
        (["--device", "tpu"], "use cpu or cuda"),
        (["--cost-table", "missing.json"], "not a cost table"),
    ],
    ids=lambda x: "".join(x[:4]) if isinstance(x, list) else "",
)
def test_bad_options_say_what_to_do(directory, tmp_path, words, message):
    done = invoke("search", directory, *options(directory, tmp_path), *words)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")


def test_budgets_are_read():
    assert parse_budget("perplexity=1%").perplexity == pytest.approx(0.01)
    assert parse_budget("agreement=99%").agreement == 0.99
    assert parse_budget("error=0.05").relative_error == 0.05
    assert parse_budget(" divergence = 0.01 ").divergence == 0.01


def test_calibrate_writes_the_block_into_the_checkpoint(directory, tmp_path):
    out, recipe = tmp_path / "block.json", tmp_path / "r.json"
    done = invoke(
        "calibrate", directory, "--text", directory / "text.txt", "--lengths", "128,256", "--out", out,
        "--block-m", 16, "--block-n", 16, "--recipe", recipe, "--write", "--target", 0.3,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    block = json.loads(out.read_text())
    config = json.loads((directory / "config.json").read_text())
    assert config["sparse_attention_config"] == block
    found = Calibration.from_block(config)
    assert found.targets == ("LlamaAttention",) and found.target["prefill"] == 0.3
    scale = Recipe.load(recipe).plan_for(1).groups[0].config.threshold_scale
    assert scale == pytest.approx(found.threshold_scale())
    loaded = transformers.AutoConfig.from_pretrained(directory)
    assert Calibration.from_block(loaded.sparse_attention_config).threshold_scale() == pytest.approx(scale)
    Recipe.load(recipe).check_model(loaded, strict=False)
