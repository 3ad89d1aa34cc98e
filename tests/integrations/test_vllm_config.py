"""What SPARSE_ATTN_VLLM_CONFIG may say, what is refused and how; the plugin's entry point and versions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from sparse_attn.integrations import vllm as plugin
from sparse_attn.integrations.vllm_config import ENV, load_settings
from sparse_attn.methods import METHODS
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import S2Config
from sparse_attn.methods.vdit import VDiTConfig
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe

MODEL = Fingerprint("LlamaForCausalLM", 2, 4, 2, 32, "sha256:" + "0" * 64)


def save_recipe(path: Path, method: str = "anchor", config=None, phases=("prefill",)) -> Path:
    """Heads 0 and 1 by a method, 2 and 3 dense, in layer 1 alone."""
    split = (HeadGroup((0, 1), method, config or AnchorConfig()), HeadGroup((2, 3), "dense", DenseConfig()))
    whole = (HeadGroup((0, 1, 2, 3), "dense", DenseConfig()),)
    layers = [LayerPlan(n, split if n else whole, phase) for phase in phases for n in (0, 1)]
    Recipe(MODEL, tuple(layers)).save(path)
    return path


def test_method_and_layers(monkeypatch):
    given = {
        "method": "anchor",
        "options": {"theta": 9.0},
        "layers": {"0": "dense", "3": {"method": "blasst", "options": {"threshold": 0.001}}},
        "min_keys": 4096,
        "engine": "cpu",
    }
    monkeypatch.setenv(ENV, json.dumps(given))
    settings = load_settings()
    assert settings.rule_for(0) is None
    assert str(settings.rule_for(1)) == "anchor(theta=9.0)"
    assert str(settings.rule_for(3)) == "blasst(threshold=0.001)"
    assert settings.rule_for(1, decode=True) is None
    assert (settings.min_keys, settings.engine, settings.follows_heads) == (4096, "cpu", False)
    sparse = load_settings('{"method": "s2", "decode": "sparse"}')
    assert sparse.rule_for(5, decode=True).config == S2Config() and sparse.follows_heads


@pytest.mark.parametrize("how", ["recipe itself", "file", "json"])
def test_recipes(tmp_path, how):
    path = save_recipe(tmp_path / "tiny.recipe.json")
    if how == "file":
        (tmp_path / "vllm.json").write_text('{"recipe": "tiny.recipe.json", "decode": "sparse"}')
        path = tmp_path / "vllm.json"
    settings = load_settings(json.dumps({"recipe": str(path)}) if how == "json" else str(path))
    assert settings.rule_for(0) is None
    assert str(settings.rule_for(1)) == "2 heads anchor, 2 heads dense"
    assert (settings.rule_for(1, decode=True) is None) == (how != "file")
    with pytest.raises(ValueError, match="layer 2 is outside"):
        settings.rule_for(2)
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 5, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=r"made for another model: .*num_layers is 5"):
        settings.check_model(config | {"num_key_value_heads": 2, "head_dim": 32})


def test_a_recipe_for_decoding(tmp_path):
    path = save_recipe(tmp_path / "tiny.recipe.json", "blasst", BlasstConfig(0.01), ("prefill", "decode"))
    settings = load_settings(json.dumps({"recipe": str(path), "decode": "sparse"}))
    assert settings.rule_for(1, decode=True).plan.phase == "decode"


def test_a_sixth_method_is_reachable(monkeypatch):
    sixth = replace(METHODS["blasst"], name="sixth")
    monkeypatch.setitem(METHODS, "sixth", sixth)
    rule = load_settings('{"method": "sixth", "options": {"threshold": 0.5}}').rule_for(0)
    assert rule.method is sixth and rule.config.threshold == 0.5


BAD = {
    "unset": ("", "is not set; set it to JSON"),
    "no file": ("nowhere.json", "there is no file 'nowhere.json'"),
    "json": ('{"method": ', "not JSON"),
    "unknown key": ('{"method": "blasst", "theta": 1}', "theta: no such setting"),
    "unknown method": ('{"method": "flash"}', "unknown method 'flash'; choose one of dense, blasst"),
    "not causal": ('{"method": "vdit"}', "not made for causal language models: 'vdit'"),
    "bad option": ('{"method": "anchor", "options": {"thta": 1}}', "anchor: .*thta"),
    "bad value": ('{"method": "s2", "options": {"block_size": 0}}', "s2: .*block_size is 0"),
    "options": ('{"method": "s2", "options": [1]}', "options are list"),
    "both": ('{"method": "s2", "recipe": "x"}', "give either method or recipe"),
    "neither": ("{}", "give either method or recipe"),
    "decode": ('{"method": "s2", "decode": "fast"}', "decode: is 'fast'; use 'dense' or 'sparse'"),
    "min_keys": ('{"method": "s2", "min_keys": -1}', "min_keys: is -1"),
    "strict": ('{"method": "s2", "strict": 1}', "strict: is 1"),
    "engine": ('{"method": "s2", "engine": "tpu"}', "unknown engine 'tpu'; choose one of"),
    "layer": ('{"method": "s2", "layers": {"x": "dense"}}', "layers.x: 'x' is no layer number"),
    "layers": ('{"method": "s2", "layers": ["dense"]}', "layers: is list"),
    "layer choice": ('{"method": "s2", "layers": {"1": {"options": {}}}}', "layers.1: expected a meth"),
    "layer method": ('{"method": "s2", "layers": {"1": "sparsed"}}', "layers.1: not made for causal"),
    "no recipe": ('{"recipe": "none.json"}', "recipe: there is no file 'none.json'"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_settings(text, message):
    with pytest.raises(ValueError, match=rf"(?s){ENV}.*{message}"):
        load_settings(text)


def test_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        load_settings('{"method": "flash", "decode": 1, "min_keys": "x", "layers": {"0": 3}}')
    assert all(word in str(error.value) for word in ("flash", "decode", "min_keys", "layers.0"))


@pytest.mark.parametrize(
    ("method", "config", "phases", "message"),
    [
        ("vdit", VDiTConfig("full", (1, 2, 3)), ("prefill",), "runs vdit, not made for causal"),
        ("anchor", None, ("denoising",), "has plans for denoising but none for prefill"),
    ],
    ids=["vdit", "denoising"],
)  # fmt: skip
def test_bad_recipes(tmp_path, method, config, phases, message):
    path = save_recipe(tmp_path / "tiny.recipe.json", method, config, phases)
    with pytest.raises(ValueError, match=message):
        load_settings(str(path))


def test_layers_beyond_the_model():
    settings = load_settings('{"method": "s2", "layers": {"7": "dense"}}')
    with pytest.raises(ValueError, match=r"layers names \[7\]; this model's layers are 0 to 1"):
        settings.check_model({}, num_layers=2)


# -- the plugin ---------------------------------------------------------------------------------------


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["sparse_attn"].partition(":")
    assert getattr(import_module(module), name) is plugin.register


@pytest.mark.parametrize("version", ["0.33", "0.33.0", "0.33.1.post2", "0.33.0.dev3+g1"])
def test_tested_versions(version):
    plugin.check_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.34.0", "0.330.1", "1.33.0", "0.3.3"])
def test_other_versions_are_told(version, monkeypatch):
    with pytest.raises(ValueError, match=f"found vLLM {version}; this adapter was tested with 0.33.x alone"):
        plugin.check_version(version)
    monkeypatch.setenv(plugin.ANY_VERSION, "1")
    plugin.check_version(version)


def test_without_settings_vllm_is_not_even_imported():
    code = (
        "import sys; from sparse_attn.integrations import vllm; vllm.register(); vllm.register();"
        "assert not [m for m in sys.modules if m.partition('.')[0] == 'vllm']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": ""})


PAGE = (Path(__file__).parents[2] / "docs" / "integrations_vllm.md").read_text()


def test_the_example_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.setenv(ENV, "")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(example, "integrations_vllm.md", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["0 dense", "1 anchor(theta=10.0)", "3 blasst(threshold_scale=100.0)"]
    assert "thta" in "".join(printed[3:]) and "decode: is 'fast'" in "".join(printed[3:])


def test_the_settings_on_the_page_are_good():
    (text,) = re.findall(r"export SPARSE_ATTN_VLLM_CONFIG='(.*)'", PAGE)
    assert load_settings(text).min_keys == 8192
