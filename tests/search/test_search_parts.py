"""The parts of the search: candidates, capture, measurements, costs and the solver."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is not installed")

from sparse_attn.attend import attend
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS, Context, Method
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import S2Config
from sparse_attn.plan import Plan
from sparse_attn.recipe_check import DenseConfig
from sparse_attn.search import cost_measure
from sparse_attn.search.candidates import Candidate, Shape, default_candidates, distinct, load_candidates
from sparse_attn.search.capture import ShardWriter, intercept_sdpa, query_runs, read_shards, sdpa
from sparse_attn.search.cost import CostTable, SelectRow, TileRow, paper_loss, select_key, shipped_table
from sparse_attn.search.cost_measure import measure_table
from sparse_attn.search.measure import Call, add_scores, dense, run_candidate, score
from sparse_attn.search.solve import Problem, greedy_at_error, paper_greedy, solve

SHAPE = Shape(512, 4, 2, 32)


def make_call(length: int = 512, heads: int = 4, key_heads: int = 2, **changes) -> Call:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, length, 32) for h in (heads, key_heads, key_heads))
    return replace(Call(0, 3 * q, k, v, True, 32**-0.5), **changes)


# -- candidates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
def test_defaults_for_a_gpu_suit_the_hopper_engine(is_causal):
    """Every candidate's tiles: nothing but the missing card speaks against it."""
    shape = Shape(4096, 4, 2, 64, is_causal, (4, 32, 32, 0, False), device="cuda")
    torch.manual_seed(0)
    q, k = (torch.randn(1, h, 4096, 64, dtype=torch.bfloat16) for h in (4, 2))
    for c in default_candidates(shape):
        context = Context(prompt_len=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = c.info.select(q, k, c.config, is_causal=is_causal, scale=0.125, context=context)
        call = AttendCall(q, k, k, plan.layout, plan.skip_below, is_causal, 0.125)
        reasons = ENGINES["hopper"].why_not(call)[len(ENGINES["hopper"].why_off()) :]
        assert reasons == ["it runs on CUDA tensors, and these are on cpu."], c.label


def test_defaults_start_dense_and_hold_every_causal_method():
    found = default_candidates(SHAPE)
    assert found[0].method == "dense"
    assert {c.method for c in found} == {"dense", "s2", "anchor", "blasst"}
    assert len({c.label for c in found}) == len(found)


def test_single_queries_select_on_a_cpu_only():
    """On a GPU that selection runs in plain PyTorch, beside kernels that are far faster."""
    on_cpu, on_gpu = (
        [c for c in default_candidates(replace(SHAPE, device=x)) if c.plain["config"].get("samples")]
        for x in ("cpu", "cuda")
    )
    rules = [(c.config.samples, c.config.theta, c.config.recall) for c in on_cpu]
    assert rules == [(1, 7.0, None), (1, 9.0, None), (2, 12.0, 0.95), (2, 12.0, 0.98)] and not on_gpu
    for pair in (on_cpu[:2], on_cpu[2:]):
        mild, milder = (run_candidate(make_call(), c)[1].lse for c in pair)
        assert (milder >= mild - 1e-5).all() and (milder > mild + 1e-5).any()


def test_bidirectional_models_get_sparsed_and_video_models_vdit():
    bidirectional = replace(SHAPE, is_causal=False)
    assert "sparsed" in {c.method for c in default_candidates(bidirectional)}
    video = replace(bidirectional, length=512, video=(4, 8, 14, 64, False))
    assert {"vdit", "sparsed"} <= {c.method for c in default_candidates(video)}


def test_a_window_reads_the_sink_and_the_nearest_keys():
    call = make_call()
    for c in default_candidates(SHAPE, ["window"])[1:]:
        window, sink = (int(x) for x in c.label.split()[1].split("+"))
        seen = run_candidate(call, c)[0].layout.to_dense(is_causal=True)[0, 0]
        last = seen[-1].nonzero().flatten().tolist()
        assert last[:sink] == list(range(sink))
        assert set(range(512 - window, 512)) <= set(last)
        assert len(last) <= sink + window + c.config.block_size


def test_a_sixth_method_joins_by_itself(monkeypatch):
    @dataclass(frozen=True)
    class NearConfig:
        blocks: int = 2

        @classmethod
        def search_grid(cls, shape):
            return [cls(1), cls(shape.length // 128)]

    near = Method("near", NearConfig, METHODS["s2"].select, METHODS["s2"].op, causal=True)
    monkeypatch.setitem(METHODS, "near", near)
    grid = [c for c in default_candidates(SHAPE) if c.method == "near"]
    assert [c.config for c in grid] == [NearConfig(1), NearConfig(4)]
    monkeypatch.delattr(NearConfig, "search_grid")
    assert [c.config for c in default_candidates(SHAPE) if c.method == "near"] == [NearConfig()]


def test_unknown_names_and_settings_by_head_are_refused():
    with pytest.raises(ValueError, match="unknown method 'flash'"):
        default_candidates(SHAPE, ["flash"])
    with pytest.raises(ValueError, match="settings by head"):
        Candidate("mine", "anchor", AnchorConfig(torch.ones(4)))


def test_own_candidates_from_a_file(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"method": "anchor", "config": {"theta": 2.5}, "label": "mine"}]))
    (mine,) = load_candidates(path)
    assert (mine.label, mine.config.theta) == ("mine", 2.5)
    path.write_text(json.dumps([{"method": "anchor", "config": {"thetta": 2.5}}, {"method": "x"}]))
    with pytest.raises(
        ValueError, match=r"\[0\].config.thetta: anchor has no such setting[\s\S]*\[1\].method"
    ):
        load_candidates(path)


def test_equal_candidates_count_once_and_labels_stay_unique():
    one = Candidate("a", "s2", S2Config(local_blocks=2))
    found = distinct([one, Candidate("b", "s2", S2Config(local_blocks=2)), Candidate("a", "s2", S2Config())])
    assert [c.label for c in found] == ["a", "a #2"]


# -- capture ------------------------------------------------------------------------------------------


def test_sdpa_calls_are_intercepted_and_numbered():
    q, k = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 5, 4)
    seen = []

    def attention(q, k, v, *, layer, is_causal, scale):
        seen.append((layer, is_causal, scale))
        return sdpa(q, k, v, is_causal=is_causal, scale=scale) + 1

    function = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(8, 8, dtype=torch.bool)
    with intercept_sdpa(attention, num_layers=2) as mode:
        plain = function(q, q, q)
        causal = function(q, q, q, is_causal=True, scale=0.3)
        again = function(q, q, q)
        untouched = [function(q, k, k), function(q, q, q, attn_mask=mask), function(q[:, :, :1], q, q)]
    assert seen == [(0, False, 0.5), (1, True, 0.3), (0, False, 0.5)]
    assert mode.count == 3
    torch.testing.assert_close(plain, function(q, q, q) + 1)
    torch.testing.assert_close(causal, function(q, q, q, is_causal=True, scale=0.3) + 1)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(untouched[1], function(q, q, q))


def test_shards_hold_the_calls_and_are_not_written_twice(tmp_path):
    writer = ShardWriter(tmp_path, heads=[1])
    call = make_call(64)
    for layer in (0, 1):
        writer(call.q, call.k, call.v, layer=layer, is_causal=True, scale=0.2)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    writer(call.q, call.k, call.v, layer=1, is_causal=True, scale=0.2)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    found = list(read_shards(tmp_path))
    assert [(sample, shard.call.layer) for sample, shard in found] == [(0, 0), (0, 1)]
    shard = found[0][1]
    assert torch.equal(shard.call.q, call.q[:, 2:]) and torch.equal(shard.call.k, call.k[:, 1:])
    assert shard.call.is_causal and shard.call.scale == 0.2
    torch.testing.assert_close(
        shard.out, sdpa(shard.call.q, shard.call.k, shard.call.v, is_causal=True, scale=0.2)
    )


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate("window", "s2", S2Config(64, 3, 1 << 30, sink_blocks=1, head_shift=0)),
        Candidate("anchor", "anchor", AnchorConfig(2.0, 32, 4)),
        Candidate("blasst", "blasst", BlasstConfig(0.05, None, 64, 64)),
    ],
    ids=lambda c: c.label,
)
def test_sampled_queries_give_what_they_give_in_the_whole(candidate):
    call = make_call(512)
    whole = run_candidate(call, candidate)[1].out
    runs = query_runs(call, 256, run=128)
    assert [r.k.shape[2] for r in runs] == [256, 512]
    for r in runs:
        end = r.k.shape[2]
        torch.testing.assert_close(run_candidate(r, candidate)[1].out, whole[:, :, end - 128 : end])
    assert query_runs(call, None) == [call]


# -- measurements -------------------------------------------------------------------------------------


def test_scores_are_those_of_masked_softmax():
    call = make_call(grad=torch.randn(1, 4, 512, 32))
    candidate = Candidate("window", "s2", S2Config(64, 2, 1 << 30, head_shift=0))
    plan, result = run_candidate(call, candidate)
    scores = score(call, dense(call), plan, result)
    k, v = (x.repeat_interleave(2, 1).double() for x in (call.k, call.v))
    logits = call.q.double() @ k.mT * call.scale
    logits = logits.masked_fill(~torch.ones(512, 512, dtype=torch.bool).tril(), -torch.inf)
    p = logits.softmax(-1)
    seen = plan.layout.to_dense(is_causal=True)
    change = (p * seen / (p * seen).sum(-1, keepdim=True)) @ v - p @ v
    recall = (p * seen).sum(-1)[0]
    expected = {
        "error": change.square().sum((0, 2, 3)),
        "norm": (p @ v).square().sum((0, 2, 3)),
        "harm": (change * call.grad).sum(-1).square().sum((0, 2)) / 2,
        "recall": recall.mean(1),
        "recall_worst": recall.kthvalue(5, 1).values,
        "pairs": seen.sum().expand(4).double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(scores[name]), value, rtol=1e-4, atol=1e-6, check_dtype=False)


def test_dense_has_no_error_and_samples_add_up():
    call = make_call(128)
    plan, result = run_candidate(call, Candidate("dense", "dense", DenseConfig()))
    scores = score(call, dense(call), plan, result)
    assert scores["error"] == [0.0] * 4 and scores["recall"] == [1.0] * 4
    assert scores["pairs"] == scores["visible"] == [128 * 129 / 2] * 4
    worse = scores | {"recall_worst": [0.5] * 4}
    both = add_scores([scores, worse])
    assert (
        both["pairs"] == [128 * 129.0] * 4
        and both["recall"] == [1.0] * 4
        and both["recall_worst"] == [0.5] * 4
    )


def test_skipped_tiles_count_as_not_attended():
    call = make_call()
    call.k[:, :, :32] = call.k[:, :, :32] / 10 + 4 * call.q[:, ::2].mean(2, keepdim=True)
    call.q[:] += 2 * call.q.mean(2, keepdim=True).sign()
    plan, result = run_candidate(call, Candidate("blasst", "blasst", BlasstConfig(0.9, None, 16, 16)))
    scores = score(call, dense(call), plan, result)
    assert result.kept is not None
    assert scores["kept"] == result.kept.sum((0, 2, 3)).tolist()
    assert all(k < v for k, v in zip(scores["kept"], scores["visited"], strict=True))
    layout = SparseLayout.from_dense_mask(result.kept.bool(), block_m=16, block_n=16, L=512, S=512)
    alone = attend(call.q, call.k, call.v, Plan(layout), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(alone.out, result.out)
    share = torch.tensor(scores["pairs"]) / torch.tensor(scores["visible"])
    torch.testing.assert_close(share, layout.density(True, per_head=True)[0].float(), check_dtype=False)


# -- costs --------------------------------------------------------------------------------------------


def table(**changes) -> CostTable:
    tiles = (
        TileRow("blocks", 64, "float32", 64, 64, 0.1, 8.0),
        TileRow("blocks", 64, "float32", 64, 64, 1.0, 6.0),
        TileRow("skipped", 64, "float32", 64, 64, 1.0, 3.0),
        TileRow("columns", 64, "float32", 64, 64, 0.5, 9.0),
    )
    select = (SelectRow("anchor", 64, 1000, 10.0, 5.0), SelectRow("anchor", 64, 4000, 160.0, 5.0))
    return replace(CostTable("test", 1, tiles, select, 20.0, 50.0, {}), **changes)


def test_tile_times_between_and_beyond_rows():
    t = table()
    assert t.tile_us("blocks", 64, "float32", 64, 64, 0.1) == 8.0
    assert t.tile_us("blocks", 64, "float32", 64, 64, 10**-0.5) == pytest.approx(7.0)
    assert t.tile_us("blocks", 64, "float32", 64, 64, 0.01) == 8.0
    assert t.tile_us("blocks", 128, "float32", 32, 64, 1.0) == 6.0  # twice the size, half the queries
    with pytest.raises(ValueError, match="no row for kernel 'blocks' in float16"):
        t.tile_us("blocks", 64, "float16", 64, 64, 1.0)
    assert t.select_us("anchor", 64, 2000) == pytest.approx((40.0, 5.0))
    assert t.select_us("anchor", 128, 2000) == pytest.approx((80.0, 10.0))
    assert t.select_us("sparsed", 64, 2000) is None and t.select_us("s2 block_size=64", 64, 2000) == (
        0.0,
        0.0,
    )


def test_head_times_count_tiles_skips_and_columns():
    scores = {"block_m": [64.0], "block_n": [64.0], "pairs": [100.0], "visible": [100.0], "visited": [10.0],
              "kept": [10.0], "skips": [0.0], "columns": [0.0]}  # fmt: skip
    assert table().head_us(scores, 64, "float32") == [60.0]
    assert table().head_us(scores | {"skips": [1.0], "kept": [4.0]}, 64, "float32") == [4 * 6 + 6 * 3.0]
    assert table().head_us(scores | {"columns": [128.0]}, 64, "float32") == [60 + 2 * 9.0]


def test_tables_survive_their_file(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(table().to_json())
    assert CostTable.load(path).to_json() == table().to_json()
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a cost table"):
        CostTable.load(path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_measured_table_has_every_kernel(tmp_path, monkeypatch, device):
    """With the tiles of either kind of device, which the CPU's engine runs as well."""
    monkeypatch.setitem(cost_measure.WAYS, "cpu", replace(cost_measure.WAYS[device], heads=4, key_heads=2))
    threads = torch.get_num_threads()
    made = measure_table(length=1024, head_dims=(16,), dtypes=(torch.float32,), rounds=1)
    assert torch.get_num_threads() == threads and made.threads == 1
    assert {r.kernel for r in made.tiles} == {"blocks", "skipped", "columns"}
    assert all(r.us >= 0 and 0 < r.density <= 1 for r in made.tiles) and made.call_us > 0
    assert {r.key.split()[0] for r in made.select} == {"anchor", "sparsed"}
    (tmp_path / "t.json").write_text(made.to_json())
    assert CostTable.load(tmp_path / "t.json").to_json() == made.to_json()


def test_no_cost_table_of_a_device_that_is_not_there():
    for device in ("tpu", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match=f"device is '{device}'; use cpu, or cuda where"):
            measure_table(device=device)


def test_the_shipped_table_covers_the_default_candidates():
    t = shipped_table("cpu")
    for c in default_candidates(replace(SHAPE, length=4096, head_dim=64)):
        for kernel in ("blocks", "skipped", "columns"):
            for dtype in ("float32", "bfloat16"):
                assert t.tile_us(kernel, 64, dtype, 64, 64, 0.3) > 0
        known = t.select_us(select_key(c.method, c.config), 64, 4096)
        assert known is not None and (known[0] > 0) == (c.method == "anchor")


def test_selections_of_other_cost_have_other_keys():
    """A recall asks for more passes than a theta does; which theta or recall it is costs nothing."""
    ways = [{"samples": 2, "recall": 0.9}, {"samples": 2, "recall": 0.95}, {"samples": 2}, {"samples": 1}, {}]
    keys = [select_key("anchor", AnchorConfig(9.0, 64, 1, **x)) for x in ways]
    assert keys[0] == keys[1] and len(set(keys)) == 4


# -- choosing -----------------------------------------------------------------------------------------


def random_problem(seed: int, heads: int = 5, candidates: int = 4, call_us: float = 0.7) -> Problem:
    rng = np.random.default_rng(seed)
    time = rng.uniform(0, 5, (heads, candidates))
    error = rng.exponential(size=(heads, candidates)) / (time + 0.1)
    time[:, 0], error[:, 0] = 6.0, 0.0
    return Problem(time, error, np.arange(heads) // 3, call_us * np.arange(1, candidates + 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.05, 0.6, 2.0])
def test_the_solver_finds_the_optimum(seed, budget):
    pytest.importorskip("scipy", reason="scipy is not installed")
    problem = random_problem(seed)
    every = (np.array(x) for x in itertools.product(range(4), repeat=5))
    best = min(problem.time_of(x) for x in every if problem.error_of(x) <= budget)
    found = solve(problem, budget)
    assert problem.error_of(found) <= budget
    assert problem.time_of(found) <= best * 1.001


def test_the_solver_shares_calls():
    pytest.importorskip("scipy", reason="scipy is not installed")
    time = np.array([[9.0, 1.0, 1.1], [9.0, 1.1, 1.0]])
    error = np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    same_layer, two_layers = np.array([0, 0]), np.array([0, 1])
    assert len(set(solve(Problem(time, error, same_layer, np.ones(3)), 2.0).tolist())) == 1
    assert solve(Problem(time, error, two_layers, np.ones(3)), 2.0).tolist() == [1, 2]
    with pytest.raises(ValueError, match="no choice has an error of at most"):
        solve(Problem(time, error + 1, two_layers, np.ones(3)), 0.5)


def test_the_papers_rule():
    mse, density = np.array([[0.0, 0.3, 0.1], [0.0, 2.0, 1.5]]), np.array([[1.0, 0.2, 0.9], [1.0, 0.2, 0.9]])
    assert paper_loss(mse, density, 0.5)[0] == pytest.approx([0.5, 0.4, 0.55])
    assert paper_greedy(mse, density, penalty=0.5, epsilon=1.0).tolist() == [1, 0]
    assert paper_greedy(mse, density, penalty=0.5, epsilon=3.0).tolist() == [1, 2]
    assert paper_greedy(mse, density, penalty=2.0, epsilon=9.0).tolist() == [1, 1]
    assert paper_greedy(mse, density, penalty=0.5, epsilon=0.1).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_rule_at_an_error_is_never_better_than_the_solver(seed):
    pytest.importorskip("scipy", reason="scipy is not installed")
    problem = random_problem(seed, heads=9)
    density = problem.time / 6.0
    greedy = greedy_at_error(problem, problem.error, density, 1.0, penalty=0.1)
    assert problem.error_of(greedy) <= 1.0
    assert problem.time_of(solve(problem, 1.0)) <= problem.time_of(greedy) * 1.001
