"""A whole search on a tiny language model: budgets, interruptions, resuming."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from sparse_attn.integrations.patching import patched  # noqa: E402
from sparse_attn.recipe import Fingerprint, Recipe, hash_tensors  # noqa: E402
from sparse_attn.search.candidates import Shape, default_candidates  # noqa: E402
from sparse_attn.search.jobs import Jobs  # noqa: E402
from sparse_attn.search.models import CallableModel, LanguageModel  # noqa: E402
from sparse_attn.search.report import load  # noqa: E402
from sparse_attn.search.report_page import page  # noqa: E402
from sparse_attn.search.run import Budget, PaperRule, Search, recipe_attention, sdpa_layer, search  # noqa: E402

LENGTH = 192


@lru_cache(maxsize=4)
def tiny_language_model(samples: int = 1, check: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    start = torch.zeros(samples + 1, 1, dtype=torch.long)
    # Its own words, so that what changes its predictions raises its loss.
    ids = model.generate(
        start,
        do_sample=True,
        top_k=0,
        max_new_tokens=LENGTH - 1,
        min_new_tokens=LENGTH - 1,
        eos_token_id=None,
    )
    return LanguageModel(model, ids[:samples], check=ids[samples:] if check else None)


def few(model: LanguageModel) -> dict:
    f = model.fingerprint
    shape = Shape(model.length, f.num_heads, f.num_kv_heads, f.head_dim)
    return {"candidates": default_candidates(shape, ["window", "blasst"])}


def run_search(work: Path, rule=Budget(perplexity=0.05), samples: int = 1, **options):  # noqa: B008
    model = tiny_language_model(samples)
    return model, search(model, rule, work=work, **(few(model) | options))


class Killed(BaseException):
    pass


def killed_until_done(monkeypatch, limits, run, deaths: int):
    """What `run` gives when it is at last left alone.

    Args:
        limits: of each run before, the file at which it is killed, counted from 1.
        deaths: so many of them at least must have come that far.
    """
    steps, killed, real = 0, 0, os.replace

    def dying(source, target):
        nonlocal steps
        steps += 1
        if steps == limit:
            raise Killed
        real(source, target)

    for limit in limits:
        steps = 0
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "replace", dying)
            run()
        killed += steps == limit
    assert killed >= deaths
    return run()


# -- budgets ------------------------------------------------------------------------------------------


def test_a_recipe_keeps_its_perplexity_budget_and_runs_in_the_model(tmp_path):
    model, found = run_search(tmp_path / "w")
    path = tmp_path / "recipe.json"
    found.recipe.save(path)
    recipe = Recipe.load(path)
    recipe.check_model(model.model)
    attention = recipe_attention(recipe)
    rise = model.loss(attention) - model.loss(sdpa_layer)
    assert 0 < rise <= np.log1p(0.05) * (1 + 1e-6)
    assert 0 < found.summary["density"] < 1
    with patched(model.model, attention):
        out = model.model(model.ids).logits
    assert torch.isfinite(out).all()
    trials = found.summary["trials"]
    assert trials and all(t["budget"] > 0 for t in trials)


def test_a_recipe_keeps_its_budget_of_next_tokens(tmp_path):
    """Of the tokens that the dense model finds most likely, at most a tenth change; the report says so."""
    model, found = run_search(tmp_path / "w", Budget(agreement=0.9))
    stock = model.model(model.check).logits.argmax(-1)
    with patched(model.model, recipe_attention(found.recipe)):
        changed = (model.model(model.check).logits.argmax(-1) != stock).double().mean().item()
    assert 0 < changed <= 0.1 and found.summary["density"] < 1
    trials = found.summary["trials"]
    assert changed in [pytest.approx(t["changed"]) for t in trials]
    assert model.changed(sdpa_layer) == 0
    found.recipe.save(tmp_path / "r.json")
    assert "changed next tokens" in page(load(tmp_path / "r.json", tmp_path / "w"))
    with pytest.raises(ValueError, match="agreement: below 1"):
        Budget(agreement=1.0)


def test_a_larger_budget_is_never_slower(tmp_path):
    model = tiny_language_model()
    run = Search(model, tmp_path / "w", **few(model))
    run.measure()
    times = [run.choose(Budget(relative_error=e)).summary["time_us"] for e in (0.01, 0.1, 0.5)]
    assert times[0] >= times[1] * 0.999 >= times[2] * 0.998
    errors = [run.choose(Budget(divergence=e)).summary["error"] for e in (0.001, 0.01)]
    assert errors[0] <= 0.001 and errors[1] <= 0.01


def test_the_divergence_foretells_the_loss(tmp_path):
    """The second-order estimate is right to a factor of three for the sum of many heads' small errors."""
    model = tiny_language_model(samples=2)
    run = Search(model, tmp_path / "w", **few(model))
    run.measure()
    found = run.choose(Budget(divergence=0.01))
    base, changed = [], []
    for attention, rows in ((sdpa_layer, base), (recipe_attention(found.recipe), changed)):
        with torch.no_grad(), patched(model.model, attention):
            rows.append(model.model(model.ids).logits.float().log_softmax(-1))
    true = (base[0].exp() * (base[0] - changed[0])).sum(-1).mean().item()
    assert found.summary["error"] / 3 < true < 3 * found.summary["error"]


def test_the_papers_rule_end_to_end(tmp_path):
    _, strict = run_search(tmp_path / "w", PaperRule(penalty=0.5, epsilon=1e-9))
    assert {g.method for p in strict.recipe.layers for g in p.groups} == {"dense"}
    _, loose = run_search(tmp_path / "w", PaperRule(penalty=1e6, epsilon=1e9), resume=True)
    sparsest = loose.measured.density[:, 1:].min(1)
    rows = np.arange(len(loose.choice))
    np.testing.assert_allclose(loose.measured.density[rows, loose.choice], sparsest)


def test_bad_budgets_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="give one of perplexity"):
        Budget(perplexity=0.1, divergence=0.1)
    with pytest.raises(ValueError, match="give one of perplexity"):
        Budget(perplexity=0.0)


# -- interruptions ------------------------------------------------------------------------------------


def test_a_killed_search_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    _, whole = run_search(tmp_path / "whole", samples=2)
    whole.recipe.save(tmp_path / "whole.json")
    found = killed_until_done(
        monkeypatch,
        (2, 5, 9, 1, 4),
        lambda: run_search(tmp_path / "w", samples=2, resume=True)[1],
        deaths=4,
    )
    found.recipe.save(tmp_path / "resumed.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    for a, b in zip(found.measured.harm.ravel(), whole.measured.harm.ravel(), strict=True):
        assert a == b


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    run_search(tmp_path / "w")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "w" / "measures").iterdir()}
    monkeypatch.setattr(LanguageModel, "run", lambda *_: pytest.fail("ran the model again"))
    monkeypatch.setattr(LanguageModel, "loss", lambda *_: pytest.fail("ran the model again"))
    run_search(tmp_path / "w", resume=True)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "w" / "measures").iterdir()}


def test_ctrl_c_leaves_a_usable_partial_recipe(tmp_path):
    model = tiny_language_model()

    class Stop:
        def stage(self, name, total):
            self.name, self.count = name, 0

        def advance(self):
            self.count += 1
            if self.name.startswith("measuring") and self.count == 2:
                raise KeyboardInterrupt

        def note(self, text):
            pass

    found = search(model, Budget(perplexity=0.05), work=tmp_path / "w", progress=Stop(), **few(model))
    assert found.recipe.partial and [p.layer for p in found.recipe.layers] == [0, 1]
    found.recipe.save(tmp_path / "r.json")
    attention = recipe_attention(Recipe.load(tmp_path / "r.json"), "prefill")
    assert np.isfinite(model.loss(attention))
    whole = search(model, Budget(perplexity=0.05), work=tmp_path / "w", resume=True, **few(model))
    assert not whole.recipe.partial


def test_a_folder_of_another_search_is_refused(tmp_path):
    run_search(tmp_path / "w")
    with pytest.raises(ValueError, match="pass --resume"):
        run_search(tmp_path / "w")
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        run_search(tmp_path / "w", seed=3, resume=True)


# -- jobs -----------------------------------------------------------------------------------------------


def make_in_job(rank: int) -> LanguageModel:
    return tiny_language_model(2)


def fail_in_job(rank: int) -> LanguageModel:
    raise RuntimeError(f"no model for rank {rank}")


def test_jobs_give_the_recipe_of_one_process(tmp_path):
    _, alone = run_search(tmp_path / "one", samples=2)
    _, together = run_search(tmp_path / "two", samples=2, jobs=Jobs(2, make_in_job))
    for name, found in (("one", alone), ("two", together)):
        found.recipe.save(tmp_path / f"{name}.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    for path in (tmp_path / "one" / "measures").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "measures" / path.name).read_bytes()


def test_a_part_measures_its_own_layers_alone(tmp_path):
    model = tiny_language_model(2)
    for rank, layers in ((1, {"01"}), (0, {"00", "01", "02"})):
        Search(model, tmp_path / "w", **few(model), part=(rank, 2), resume=rank == 0).measure()
        names = {p.name for p in (tmp_path / "w" / "measures").iterdir()}
        assert names == {f"sample{s}-layer{n}.json" for s in range(2) for n in layers}


def test_a_job_that_fails_says_so_and_leaves_what_was_measured(tmp_path):
    with pytest.raises(ValueError, match=r"process \d of 2 failed .* --resume"):
        run_search(tmp_path / "w", samples=2, jobs=Jobs(2, fail_in_job))
    _, found = run_search(tmp_path / "w", samples=2, resume=True)
    assert not found.recipe.partial
    with pytest.raises(ValueError, match="jobs is 0"):
        Jobs(0, make_in_job)


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_search_run import run_search
run_search(Path(sys.argv[1]))
"""


def test_a_process_killed_by_the_system_resumes_to_the_same_bytes(tmp_path):
    code = _KILLED.format(tests=str(Path(__file__).parent))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the model's own sums depend on it
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "b"], env=os.environ | threads)
    while not list((tmp_path / "b" / "measures").glob("*.json")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    measured = set((tmp_path / "b" / "measures").glob("*.json"))
    times = {p: p.stat().st_mtime_ns for p in measured}
    for name in ("a", "b"):
        run_search(tmp_path / name, resume=True)[1].recipe.save(tmp_path / f"{name}.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert times == {p: p.stat().st_mtime_ns for p in measured}


# -- other models -------------------------------------------------------------------------------------


def test_any_function_that_calls_sdpa_can_be_searched(tmp_path, epyc_times):
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 32, 32) * 0.4

    def function(x):
        for w in weights:
            q, k, v = ((x @ m).unflatten(-1, (2, 16)).transpose(1, 2) for m in w)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x = torch.randn(2, 1, 256, 32)
    fingerprint = Fingerprint("Toy", 2, 2, 2, 16, "sha256:" + "0" * 64)
    model = CallableModel(function, x, fingerprint, length=256, calibration_hash=hash_tensors([x]))
    found = search(model, Budget(relative_error=0.3), work=tmp_path / "w", is_causal=False)
    assert {p.layer for p in found.recipe.layers} == {0, 1}
    assert 0 < found.summary["relative_error"] <= 0.3
    assert any(c.method == "sparsed" for c in found.candidates)
    with pytest.raises(ValueError, match="no gradients"):
        search(model, Budget(perplexity=0.1), work=tmp_path / "w", is_causal=False, resume=True)


def test_the_cost_table_is_that_of_the_models_device(tmp_path, monkeypatch):
    """Not that of the machine: a model may lie on the CPU beside a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    run = Search(tiny_language_model(), tmp_path / "w")
    assert run.table.device_type == "cpu"
    fingerprint = Fingerprint("Toy", 1, 1, 1, 16, "sha256:" + "0" * 64)
    how = {"length": 64, "calibration_hash": "sha256:" + "0" * 64}
    on_meta = CallableModel(print, [{"x": [torch.empty(1, device="meta")]}], fingerprint, **how)
    assert on_meta.device.type == "meta"
    assert CallableModel(print, [7], fingerprint, **how, device="cuda:0").device.type == "cuda"
    with pytest.raises(ValueError, match="no cost table ships for meta"):
        Search(on_meta, tmp_path / "x", candidates=[])


def test_the_summary_is_plain_json(tmp_path):
    run_search(tmp_path / "w")
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert len(summary["choice"]) == 12 and summary["pareto"]
    assert all(g["best_us"] <= g["paper_us"] for g in summary["greedy"])


@pytest.mark.usefixtures("cpu_engine")
def test_a_bidirectional_llama_is_offered_sparsed(tmp_path):
    tiny_language_model.cache_clear()
    model = tiny_language_model()
    for layer in model.model.model.layers:
        layer.self_attn.is_causal = False
    tiny_language_model.cache_clear()
    found = search(model, Budget(relative_error=0.1), work=tmp_path / "w", is_causal=False, prompt_len=64)
    assert "sparsed" in {c.method for c in found.candidates}
    assert 0 < found.summary["relative_error"] <= 0.1 and found.summary["weight"] == "head"
