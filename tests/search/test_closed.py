"""The closed loop on a tiny language model: layers chosen in order, each measured behind the chosen ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from test_search_run import killed_until_done, run_search, tiny_language_model

from sparse_attn.search.candidates import Shape, default_candidates
from sparse_attn.search.closed import ClosedLoop
from sparse_attn.search.models import LanguageModel
from sparse_attn.search.predict import Measured
from sparse_attn.search.run import Budget, PaperRule, Search, recipe_attention, sdpa_layer


def inputs_of(model: LanguageModel, attention) -> dict[int, torch.Tensor]:
    """Queries of each layer on the first sample."""
    seen = {}

    def watch(q, k, v, *, layer, is_causal, scale):
        seen[layer] = q.clone()
        return attention(q, k, v, layer=layer, is_causal=is_causal, scale=scale)

    model.run(0, watch)
    return seen


@pytest.mark.parametrize("samples", [1, 2])
def test_a_closed_loop_measures_each_layer_behind_the_chosen_ones(tmp_path, monkeypatch, samples):
    """Queries that candidates were measured on are those of a pass with the recipe itself."""
    calls = {}
    real = Search._measure_layer

    def noting(self, moment, call):
        if self.folder.path.parent.name == "closed" and moment.sample == 0:
            assert call.layer not in calls, "measured once"
            calls[call.layer] = call.q.clone()
        real(self, moment, call)

    monkeypatch.setattr(Search, "_measure_layer", noting)
    model, found = run_search(tmp_path / "w", Budget(divergence=0.01), samples, closed_loop=True)
    dense, own = inputs_of(model, sdpa_layer), inputs_of(model, recipe_attention(found.recipe))
    assert set(calls) == {0, 1, 2}
    for layer, q in calls.items():
        torch.testing.assert_close(q, own[layer], rtol=0, atol=0)
    assert not torch.equal(calls[2], dense[2])
    assert 0 < found.summary["error"] <= 0.01
    assert [x["budget"] for x in found.summary["closed_loop"]] == [0.01]


def test_a_closed_loop_keeps_a_budget_of_perplexity_and_is_no_slower(tmp_path):
    model, alone = run_search(tmp_path / "w")
    _, found = run_search(tmp_path / "w", resume=True, closed_loop=True)
    assert 1 <= len(found.summary["closed_loop"]) <= 2
    rise = model.loss(recipe_attention(found.recipe)) - model.loss(sdpa_layer)
    assert 0 < rise <= np.log1p(0.05) * (1 + 1e-6)
    times = [x.measured.problem("divergence").time_of(x.choice) for x in (found, alone)]
    assert times[0] <= times[1]


def test_a_killed_closed_loop_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    rule = Budget(divergence=0.01)
    _, whole = run_search(tmp_path / "whole", rule, samples=2, closed_loop=True)
    whole.recipe.save(tmp_path / "whole.json")
    run_search(tmp_path / "w", rule, samples=2)
    found = killed_until_done(
        monkeypatch,
        (4, 9, 6, 5),
        lambda: run_search(tmp_path / "w", rule, samples=2, resume=True, closed_loop=True)[1],
        deaths=3,
    )
    found.recipe.save(tmp_path / "resumed.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_closed_layer_gets_what_the_layers_before_it_left(tmp_path, monkeypatch):
    """Of an error budget of 6 the four heads of layer 0 take 4. Behind them a head of layer 1 costs 1.5, not
    the 1 that the dense model showed, so that one fits, and the 0.5 left over fit none of layer 2. Heads of
    later layers save less time: none of an earlier one is dense for their sake."""
    saved, behind = {0: 8.0, 1: 4.0, 2: 1.0}, {0: 1.0, 1: 1.5, 2: 1.0}

    def numbers(errors: dict[int, float]) -> Measured:
        error = np.repeat([[0.0, x] for x in errors.values()], 4, axis=0)
        time = np.repeat([[10.0, 10 - saved[n]] for n in errors], 4, axis=0)
        return Measured(list(errors), 4, time, *[error] * 6, call_us=np.zeros(2))

    model = tiny_language_model()
    options = default_candidates(Shape(model.length, 4, 2, 16), ["window"])[:2]
    loop = ClosedLoop(model, tmp_path / "w", options, budget=6.0, known=numbers(dict.fromkeys(saved, 1.0)))
    monkeypatch.setattr(loop, "measured", lambda layers: numbers({n: behind[n] for n in layers}))
    for layer in saved:
        loop._choose(layer)
    assert loop.choice.reshape(3, 4).sum(1).tolist() == [4, 1, 0]
    assert loop.known.problem("divergence").error_of(loop.choice) == 5.5


def test_the_papers_rule_has_no_closed_loop(tmp_path):
    with pytest.raises(ValueError, match="the paper's rule has none"):
        run_search(tmp_path / "w", PaperRule(), closed_loop=True)
