"""Searching by denoising phase: what is measured when, how phases share a budget, and that recipes run."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from test_search_run import killed_until_done, tiny_language_model  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.methods.sparsed import SparseDConfig  # noqa: E402
from sparse_attn.methods.sparsed_layout import sparsed_layout  # noqa: E402
from sparse_attn.recipe import Fingerprint, Recipe  # noqa: E402
from sparse_attn.search.candidates import Candidate  # noqa: E402
from sparse_attn.search.capture import intercept_sdpa, sdpa  # noqa: E402
from sparse_attn.search.cost import CostTable, SelectRow, TileRow  # noqa: E402
from sparse_attn.search.denoising import DenoisingModel  # noqa: E402
from sparse_attn.search.models import CallableModel  # noqa: E402
from sparse_attn.search.phases import Schedule, read_phases, split  # noqa: E402
from sparse_attn.search.predict import Measured, plans  # noqa: E402
from sparse_attn.search.report import draw_png, load  # noqa: E402
from sparse_attn.search.report_page import page  # noqa: E402
from sparse_attn.search.run import Budget, PaperRule, Search, recipe_attention, sdpa_layer, search  # noqa: E402
from sparse_attn.search.solve import solve  # noqa: E402

LENGTH, PROMPT, STEPS, MASK = 128, 32, 6, 63
SELECT_US, WHOLE_US = 40.0, 64.0
# A tile takes a microsecond for each 16 x 16 of its pairs; nothing else takes time but a selection.
TABLE = CostTable(
    "made up", 1, (TileRow("blocks", 16, "float32", 16, 16, 1.0, 1.0),),
    (SelectRow("sparsed block_size=16", 16, LENGTH, SELECT_US, 0.0),), 0.0, 0.0, {},
)  # fmt: skip
SPARSED = [Candidate("sparsed", "sparsed", SparseDConfig(select_ratio=0.4, block_size=16))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take most of the time of such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def tiny_diffusion_model() -> DenoisingModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2, is_causal=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, MASK, (1, LENGTH))
    return DenoisingModel(model, ids, num_steps=STEPS, prompt_len=PROMPT, mask_id=MASK)


def run_search(work, rule=Budget(relative_error=0.15), **options):  # noqa: B008
    how = {"candidates": SPARSED, "table": TABLE, "phases": [2], "curve": False} | options
    return search(tiny_diffusion_model(), rule, work=work, **how)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """(folder, what a search of two phases found, all of whose steps were measured)"""
    folder = tmp_path_factory.mktemp("phases") / "w"
    return folder, run_search(folder, measured_steps=STEPS)


# -- phases ---------------------------------------------------------------------------------------------


def test_phases_divide_the_steps():
    assert split(10, None) == ((0, 10),)
    assert split(10, 4) == ((0, 2), (2, 5), (5, 7), (7, 10))
    assert split(10, [0, 3]) == split(10, (3,)) == ((0, 3), (3, 10))
    assert split(3, 3) == ((0, 1), (1, 2), (2, 3))
    for bad in (0, 11, [10], [-1, 3], -2):
        with pytest.raises(ValueError, match="for 10 denoising steps give a number from 1 to 10"):
            split(10, bad)
    assert read_phases("4") == 4 and read_phases("0,3,12") == [0, 3, 12]
    with pytest.raises(ValueError, match="use a number, 4, or the steps"):
        read_phases("early,late")


def test_measured_steps_reach_from_the_first_to_the_last():
    schedule = Schedule.of(20, 2, [1, 4], 3)
    assert [schedule.measured_steps(n) for n in range(3)] == [[0], [1, 2, 3], [4, 12, 19]]
    assert replace(schedule, measured=1).measured_steps(2) == [12]
    assert [schedule.passes(n) for n in range(3)] == [2, 6, 32] and schedule.all_passes == 40
    names = [x.name for x in schedule.moments(1, 0)]
    assert names == ["sample1-step000", "sample1-step000-pass1"]


# -- numbers --------------------------------------------------------------------------------------------


def test_a_phase_weighs_as_many_steps_as_it_has():
    """A head that is sparse saves 3 a pass and a call costs 1 a pass; both phases have the same errors."""
    time, error = np.tile([[10.0, 7.0]], (4, 1)), np.tile([[0.0, 0.2]], (4, 1))
    schedule = Schedule.of(10, 2, [2], 2)
    arrays = [time, error, *[np.full((4, 2), np.nan)] * 5]
    both = Measured([0, 0], 2, *arrays, call_us=np.ones(2), phases=[0, 1], schedule=schedule)
    problem = both.problem("head")
    np.testing.assert_allclose(problem.error[:, 1], 0.2**2 * np.array([2, 2, 8, 8]) / 20)
    assert problem.error_of(np.ones(4, dtype=int)) == pytest.approx(0.2**2)
    early, late = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])
    dense = problem.time_of(0 * early)
    assert dense == 2 * 10 * (2 * 10 + 1)
    assert [dense - problem.time_of(x) for x in (early, late)] == [2 * 2 * 6, 2 * 8 * 6]
    for budget, best in ((0.2, early), (0.8, late)):  # the later phase where the errors allow it
        assert solve(problem, 0.2**2 * budget).tolist() == best.tolist()


def reference_error(
    model: DenoisingModel, first: int, end: int, config: SparseDConfig
) -> dict[int, torch.Tensor]:
    """|out - dense| / |dense| of each layer's heads over the steps [first, end) of the dense generation, all
    of which read the pattern of the first."""
    layouts, sums = {}, {}

    def attention(q, k, v, *, layer, is_causal, scale, step, branch):
        out = sdpa(q, k, v, is_causal=is_causal, scale=scale)
        if step == first:
            found = sparsed_layout(q, k, config, prompt_len=PROMPT, scale=scale)
            layouts[layer] = found.to_dense()
        if first <= step < end:
            logits = (q @ k.repeat_interleave(2, 1).mT * scale).masked_fill(~layouts[layer], -torch.inf)
            sparse = logits.softmax(-1) @ v.repeat_interleave(2, 1)
            one = torch.stack([x.square().sum((0, 2, 3)) for x in (sparse - out, out)])
            sums[layer] = sums.get(layer, 0) + one
        return out

    model.run(0, attention)
    return {layer: (x[0] / x[1]).sqrt() for layer, x in sums.items()}


def test_a_pattern_of_the_first_step_is_measured_at_the_later_ones(searched):
    """SparseD in the phase of steps 2 to 5: dense and a selection at step 2, its pattern at the others."""
    measured = searched[1].measured
    assert measured.layers == [0, 1, 0, 1] and measured.phases == [0, 0, 1, 1]
    for phase, (first, end) in enumerate(((0, 2), (2, 6))):
        sparse = (end - first - 1) / (end - first)
        wanted = reference_error(tiny_diffusion_model(), first, end, SPARSED[0].config)
        for layer in (0, 1):
            rows = slice(4 * (2 * phase + layer), 4 * (2 * phase + layer) + 4)
            relative = measured.relative[rows, 1]
            np.testing.assert_allclose(relative, sparse**0.5 * wanted[layer].numpy(), rtol=1e-4)
            own = 8 * (1 + 3)  # tiles of 16: a row reads 1 of 2 prompt blocks and 3 of 6 generated ones
            np.testing.assert_allclose(measured.time[rows, 0], WHOLE_US)
            mean = (WHOLE_US + SELECT_US + (end - first - 1) * own) / (end - first)
            np.testing.assert_allclose(measured.time[rows, 1], mean)
            np.testing.assert_allclose(measured.density[rows, 1], 1 - sparse + sparse * own / WHOLE_US)


def test_one_step_leaves_sparsed_nothing_to_gain(tmp_path):
    found = run_search(tmp_path / "w", Budget(relative_error=9.0), phases=[5])
    last = found.measured.phases.index(1) * 4
    np.testing.assert_allclose(found.measured.time[last:, 1], WHOLE_US + SELECT_US)
    np.testing.assert_allclose(found.measured.relative[last:, 1], 0)
    of_last = [p for p in found.recipe.layers if p.steps == (5, 6)]
    assert {g.method for p in of_last for g in p.groups} == {"dense"}
    assert found.summary["density"] < 1


# -- recipes --------------------------------------------------------------------------------------------


def test_plans_carry_their_steps_and_sparsed_begins_with_its_phase(searched):
    _, found = searched
    assert {p.steps for p in found.recipe.layers} == {(0, 2), (2, 6)} and found.recipe.num_steps == STEPS
    assert found.recipe.phases == ["denoising"] and not found.recipe.partial
    groups = [(p.steps[0], g) for p in found.recipe.layers for g in p.groups if g.method == "sparsed"]
    assert {first for first, _ in groups} == {2}  # the first phase is dense: a budget that binds
    assert all(g.config.switch_step(STEPS) == first for first, g in groups)
    assert (
        0 < found.summary["relative_error"] <= 0.15
        and found.summary["time_us"] < found.summary["dense_time_us"]
    )
    for plan in plans(found.measured, found.candidates, found.choice, phase="denoising"):
        assert all(g.relative_error is not None and g.time_us is not None for g in plan.groups)


def test_the_recipe_is_what_the_integration_runs(searched, tmp_path):
    """A sampler under `sa.denoising` writes what the search's own generation writes with the recipe."""
    model, (_, found) = tiny_diffusion_model(), searched
    found.recipe.save(tmp_path / "r.json")
    recipe = Recipe.load(tmp_path / "r.json")
    attention = recipe_attention(recipe, prompt_len=PROMPT)
    written = [model.generate(model.ids, attention) for _ in range(2)]
    assert torch.equal(*written), "a second generation finds its own patterns"
    tokens = model.ids.clone()
    tokens[:, PROMPT:] = MASK
    with torch.no_grad(), sa.denoising(model.model, recipe, num_steps=STEPS, prompt_len=PROMPT) as run:
        for _ in range(STEPS):
            logits = model.model(tokens).logits[0].float()
            logits[:, MASK] = -torch.inf
            likely = logits.log_softmax(-1).max(-1)
            best = likely.values.masked_fill(tokens[0] != MASK, -torch.inf).topk(16).indices
            tokens[0, best] = likely.indices[best]
        assert run.step == STEPS - 1
    assert torch.equal(tokens, written[0])
    assert not torch.equal(tokens, model.generate(model.ids, sdpa_layer))


def test_the_report_has_a_map_for_each_phase(searched, tmp_path):
    work, found = searched
    found.recipe.save(tmp_path / "r.json")
    report = load(tmp_path / "r.json", work)
    assert [title for title, _ in report.phases] == ["denoising, steps 0-1 of 6", "denoising, steps 2-5 of 6"]
    chosen = found.choice.reshape(2, 2, 4)
    for phase, (_, numbers) in enumerate(report.phases):
        for layer, n in enumerate(numbers):
            labels = [report.settings[h.setting][0] for h in report.layers[n][1]]
            assert labels == [found.candidates[c].label for c in chosen[phase, layer]]
            with np.load(work / "maps" / f"phase{phase}-layer{layer:02d}.npz") as maps:
                assert np.array_equal(report.maps[n]["truth"], maps["truth"])
                kept = maps["kept"][chosen[phase, layer], range(4)]
                assert np.array_equal(report.maps[n]["kept"], kept)
    text = page(report)
    assert "6 steps of 1 pass(es), of each phase at most 6 measured" in text
    assert text.count("<table") == 2 and text.count("<h3>") == 2 and text.count("<button") == 16
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw_png(report, tmp_path / "r.png")
    other = replace(
        found.recipe, layers=tuple(p for p in found.recipe.layers if p.steps == (0, 2)), partial=True
    )
    other.save(tmp_path / "part.json")
    assert len(load(tmp_path / "part.json", work).maps) == 2
    plain = replace(other, layers=tuple(replace(p, steps=None) for p in other.layers))
    plain.save(tmp_path / "plain.json")
    with pytest.raises(ValueError, match="belongs to another recipe"):
        load(tmp_path / "plain.json", work)


# -- interruptions --------------------------------------------------------------------------------------


def test_a_killed_search_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """Patterns that a later step needs are found again; what was measured is not measured again."""
    whole = run_search(tmp_path / "whole")
    found = killed_until_done(
        monkeypatch, (3, 7, 5, 2, 4), lambda: run_search(tmp_path / "w", resume=True), deaths=4
    )
    for name, x in (("whole", whole), ("resumed", found)):
        x.recipe.save(tmp_path / f"{name}.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    files = sorted((tmp_path / "whole" / "measures").iterdir())
    assert len(files) == 8  # 2 layers at 2 steps of 2 phases
    for path in files:
        assert path.read_bytes() == (tmp_path / "w" / "measures" / path.name).read_bytes()
    monkeypatch.setattr(DenoisingModel, "run", lambda *_: pytest.fail("ran the model again"))
    run_search(tmp_path / "w", Budget(relative_error=0.3), resume=True)
    with pytest.raises(ValueError, match=r"other settings \(steps\)"):
        run_search(tmp_path / "w", resume=True, phases=[3])


def test_parts_measure_what_one_process_does(tmp_path, searched):
    """As `jobs` shares the layers out."""
    how = {"candidates": SPARSED, "table": TABLE, "phases": [2], "measured_steps": STEPS}
    for rank in (1, 0):
        Search(tiny_diffusion_model(), tmp_path / "w", **how, part=(rank, 2), resume=rank == 0).measure()
    whole = {x.name: x.read_bytes() for x in (searched[0] / "measures").iterdir()}
    assert whole == {x.name: x.read_bytes() for x in (tmp_path / "w" / "measures").iterdir()}


def test_ctrl_c_leaves_the_phases_measured_so_far(tmp_path):
    class Stop:
        def stage(self, name, total):
            self.count, self.total = 0, total

        def advance(self):
            self.count += 1
            if self.count == 3:  # in the second of the two steps of the first phase
                raise KeyboardInterrupt

        def note(self, text):
            pass

    stop = Stop()
    found = run_search(tmp_path / "w", Budget(relative_error=0.5), progress=stop)
    assert stop.total == 8
    assert found.recipe.partial and [(p.layer, p.steps) for p in found.recipe.layers] == [
        (0, (0, 2)),
        (1, (0, 2)),
    ]
    found.recipe.save(tmp_path / "r.json")
    recipe = Recipe.load(tmp_path / "r.json")
    assert recipe.plan_for(1, "denoising", 4).groups[0].method == "dense"
    model = tiny_diffusion_model()
    model.generate(model.ids, recipe_attention(recipe, prompt_len=PROMPT))
    assert not run_search(tmp_path / "w", Budget(relative_error=0.5), resume=True).recipe.partial


# -- other models and rules -----------------------------------------------------------------------------


def test_a_budget_of_tokens_is_kept_over_all_steps(tmp_path):
    model = tiny_diffusion_model()
    found = run_search(tmp_path / "w", Budget(agreement=0.9))
    attention = recipe_attention(found.recipe, prompt_len=PROMPT)
    changed = model.changed(attention)
    assert 0 < changed <= 0.1 and changed in [x["changed"] for x in found.summary["trials"]]
    assert model.changed(sdpa_layer) == 0


def test_one_phase_is_the_default_and_needs_no_ranges(tmp_path):
    found = run_search(tmp_path / "w", PaperRule(penalty=1.0, epsilon=9.0), phases=None)
    assert {p.steps for p in found.recipe.layers} == {None} and found.recipe.num_steps == STEPS
    assert {g.config.skip_ratio for p in found.recipe.layers for g in p.groups} == {1 / STEPS}
    model = tiny_diffusion_model()
    assert model.changed(recipe_attention(found.recipe, prompt_len=PROMPT)) > 0


def toy(passes: int, **how) -> CallableModel:
    """A function of `passes` forward passes through two layers."""

    def function(x):
        for _ in range(2 * passes):
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    fingerprint = Fingerprint("Toy", 2, 2, 2, 16, "sha256:" + "0" * 64)
    return CallableModel(function, [x], fingerprint, length=64, calibration_hash="sha256:" + "0" * 64, **how)


@pytest.mark.parametrize("passes", [5, 7])
def test_a_function_of_other_passes_is_found_out(tmp_path, passes):
    with pytest.raises(ValueError, match=r"as many|it has"):
        search(
            toy(passes, num_steps=3, branches=2), Budget(relative_error=0.1), work=tmp_path / "w",
            is_causal=False, candidates=[], table=TABLE,
        )  # fmt: skip


def test_calls_are_told_their_step_and_branch():
    seen = []

    def attention(q, k, v, *, layer, is_causal, scale, **where):
        seen.append((layer, where["step"], where["branch"]))
        return q

    toy(4, num_steps=2, branches=2).run(0, attention)
    assert seen == [(n, s, b) for s in range(2) for b in range(2) for n in range(2)]
    with pytest.raises(ValueError, match="pass num_layers"), intercept_sdpa(attention, num_steps=2):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": Budget(perplexity=0.01)}, "denoises by steps gives no gradients"),
        ({"closed_loop": True}, "the closed loop chooses the layers of one pass"),
        ({"phases": 7}, "for 6 denoising steps give a number from 1 to 6"),
        ({"measured_steps": 0}, "0 steps of a phase are to be measured"),
    ],
    ids=["perplexity", "closed loop", "phases", "measured steps"],
)
def test_what_steps_do_not_allow_is_said_before_anything_is_measured(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(DenoisingModel, "run", lambda *_: pytest.fail("ran the model"))
    with pytest.raises(ValueError, match=message):
        run_search(tmp_path / "w", **change)


def test_models_that_do_not_denoise_are_refused(tmp_path):
    causal = tiny_language_model()
    with pytest.raises(ValueError, match="this model makes one pass, not denoising steps"):
        Search(causal, tmp_path / "w", phases=2)
    with pytest.raises(ValueError, match="attention is causal"):
        DenoisingModel(causal.model, causal.ids, num_steps=4, prompt_len=8, mask_id=63)
    bidirectional = tiny_diffusion_model()
    with pytest.raises(ValueError, match=r"97 steps and a prompt of 32 of 128 .*mask is token 64 of 64"):
        DenoisingModel(bidirectional.model, bidirectional.ids, num_steps=97, prompt_len=PROMPT, mask_id=64)
    with pytest.raises(ValueError, match="only denoising has steps"):
        toy(2, num_steps=2, phase="prefill")
