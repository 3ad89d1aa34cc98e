"""The benchmark of the Hopper engine, as far as it runs without a GPU: cases, bars, peers and timing."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, pairwise, permutations

import pytest
import torch

from sparse_attn.bench import providers, runner
from sparse_attn.bench.cases import Bar, Case, Columns, Random, SkipTo
from sparse_attn.bench.problem import build
from sparse_attn.bench.providers import PROVIDERS
from sparse_attn.bench.report import judge, print_verdicts
from sparse_attn.bench.run import CannotRun, chosen, run_suite
from sparse_attn.bench.runner import Options, run_cases
from sparse_attn.bench.suites import BARS, CASES
from sparse_attn.bench.timing import Times, measure, order_of_round, paired_best_ratio
from sparse_attn.layout import SparseLayout

TINY = Case("tiny", 2, 1, 200, 32, Random(0.4, 32, 32), "float32", rounds=3, gate_length=150)
QUIET = Options("cpu", engine="reference", log=lambda text: None)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The problems are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- cases and bars -------------------------------------------------------------------------------


def test_bars_are_those_promised():
    lists = {128: {128: [1.05, 1.05, 1.10, 1.15], 64: [1.10] * 4}, 64: {128: [1.25] * 4, 64: [1.20] * 4}}
    want = {
        (f"lists{block}-d{dim}-{density:g}", "speed_vs_rivals"): least
        for block, dims in lists.items()
        for dim, limits in dims.items()
        for density, least in zip((0.5, 0.25, 0.1, 0.05), limits, strict=True)
    }
    own = {0.5: 0.97, 0.25: 0.95, 0.1: 0.92, 0.05: 0.88}
    want |= {(f"lists128-d128-{density:g}", "own_efficiency"): least for density, least in own.items()}
    want |= {(case.name, "speed_vs_rivals"): 1.0 for case in CASES["hopper"] if case.name.startswith("dense")}
    want |= {
        ("skewed", "speed_vs_rivals"): 1.05, ("columns", "own_efficiency"): 0.85,
        ("columns", "tflops_vs.fa3-page1"): 1.05, ("blasst-0", "own_efficiency"): 0.99,
        ("blasst-0.54", "speed_vs.fa3"): 1.22, ("blasst-0.83", "speed_vs.fa3"): 1.5,
        ("blasst-0.94", "speed_vs.fa3"): 1.65, ("s2-s32768", "speed_vs.sdpa-flash"): 22.1,
        ("s2-s131072", "speed_vs.sdpa-flash"): 50, ("vdit-s119056", "own_efficiency"): 0.92,
    }  # fmt: skip
    anchor = sorted(bar.at_least for bar in BARS["hopper"] if bar.case == "anchor-s131072")
    assert anchor == [2.2, 2.33]
    rest = [bar for bar in BARS["hopper"] if bar.case != "anchor-s131072"]
    assert {(bar.case, bar.metric): bar.at_least for bar in rest} == want and len(rest) == len(want)


def test_every_peer_of_a_bar_is_a_provider():
    cases = {case.name: case for case in CASES["hopper"]}
    for case in cases.values():
        assert set(case.peers) | set(case.rivals) <= set(PROVIDERS), case.name
    for bar in BARS["hopper"]:
        case, (metric, _, peer) = cases[bar.case], bar.metric.partition(".")
        assert metric != "speed_vs_rivals" or case.rivals
        assert not peer or peer in case.peers, f"{bar.name}: {peer} is not timed"


def test_the_video_recipe_has_its_density():
    case = next(case for case in CASES["hopper"] if case.name == "vdit-s119056")
    assert len(case.pattern.config["patterns"]) == case.q_heads == 24
    tensors = (torch.empty(1, 24, case.length, 1, dtype=torch.bfloat16),) * 3
    assert build(case, "cpu", tensors=tensors).density == pytest.approx(0.32, abs=0.005)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_columns_are_a_share_of_what_a_group_sees(is_causal):
    case = replace(TINY, length=330, pattern=Columns(0.25, 64, 32), is_causal=is_causal)
    layout = build(case, "cpu").plan.layout.check()
    assert layout.columns.group == 2 and layout.blocks.offsets[-1] == 0
    columns = layout.column_mask()
    for group in range(columns.shape[2]):
        seen = min((group + 1) * 64, 330) if is_causal else 330
        assert not columns[:, :, group, seen:].any()
        assert columns[:, :, group, :seen].float().mean() == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_lambda_is_found_for_a_sparsity(sparsity):
    case = replace(TINY, pattern=SkipTo(sparsity, 16, 16), is_causal=True, length=300, data="causal")
    problem = build(case, "cpu", engine="reference")
    seen = case.q_heads * 19 * 20 / 2
    assert 1 - problem.kept.sum().item() / seen == pytest.approx(sparsity, abs=0.01)
    (row,) = [r for r in run_cases([replace(case, peers=("sdpa",))], QUIET).rows if r["case"] == "tiny"]
    assert ("ln_lambda" in row) == (sparsity > 0) and row.get("ln_lambda", -1) < 0
    assert row["density"] == pytest.approx(problem.density, abs=1e-5)


def test_cases_run_short():
    """Every pattern, grouping, gate and bar of the suite works, shrunk, on the reference engine."""
    cases = {}
    for case in CASES["hopper"]:
        kind = (case.pattern, case.is_causal) if not case.name.startswith("lists") else case.name[:8]
        cases.setdefault(str(kind), case)
    short = [
        replace(case.resized(260, 1), rounds=3, gate_length=200, peers=("sdpa",), rivals=("sdpa",))
        for case in cases.values()
    ]
    outcome = run_cases(short, QUIET)
    assert not outcome.red
    ours = [row for row in outcome.rows if row["provider"] == "ours-reference"]
    found = {row["case"]: row for row in ours if row["step"] == "fwd"}
    assert set(found) == {case.name for case in short}
    for case in short:
        if not case.is_dense:
            assert found[case.name]["own_efficiency"] > 0 and found[case.name]["tflops_vs"]["sdpa"] > 0
        assert found[case.name]["rivals"] == {"timed": ["sdpa"], "absent": []}


def test_rows_say_why_an_earlier_engine_did_not_run():
    rows = run_cases([replace(TINY, peers=("sdpa",))], QUIET).rows
    (row,) = [row for row in rows if row["provider"] == "ours-reference"]
    assert "hopper" in row["passed_over"] and "reference" not in row["passed_over"]
    assert all("passed_over" not in row for row in rows if row["provider"] == "sdpa")


def test_only_picks_cases_by_their_first_letters():
    names = [case.name for case in chosen(CASES["hopper"], "dense-d64, s2")]
    assert names == ["dense-d64-full-s16384", "dense-d64-causal-s16384", "s2-s32768", "s2-s131072"]
    with pytest.raises(ValueError, match=r"no case starts with sw; there are dense-d128"):
        chosen(CASES["hopper"], "s2,sw")


def test_a_suite_in_parts_adds_to_its_file(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    options = {"engine": "reference", "device": "cpu", "out": str(out)}
    assert run_suite("smoke", only="smoke-full", **options) == 0
    first = out.read_text()
    assert run_suite("smoke", only="smoke-d", **options) == 0
    assert out.read_text().startswith(first) and "smoke-d0.25" in out.read_text()
    with pytest.raises(CannotRun, match="hopper needs a CUDA device"):
        run_suite("hopper", device="cpu")
    capsys.readouterr()


# -- peers ----------------------------------------------------------------------------------------


def test_a_peer_that_breaks_while_timed_is_left_out(monkeypatch):
    calls = []

    def breaks(problem):
        def forward(q, k, v):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("misaligned address")
            return PROVIDERS["sdpa"].make(problem)(q, k, v)

        return forward

    monkeypatch.setitem(PROVIDERS, "fa3", replace(PROVIDERS["sdpa"], name="fa3", make=breaks))
    outcome = run_cases([replace(TINY, rivals=("sdpa", "fa3"))], QUIET)
    assert len(calls) == 3 and outcome.absent == {"fa3": "RuntimeError: misaligned address"}
    (row,) = [row for row in outcome.rows if row["provider"] == "ours-reference"]
    assert row["rivals"] == {"timed": ["sdpa"], "absent": ["fa3"]} and row["speed_vs_rivals"] > 0
    assert not outcome.red


def test_a_lost_gpu_ends_the_suite_and_keeps_its_rows(monkeypatch):
    def lost(problem):
        raise runner.DeviceLost("the GPU was lost to RuntimeError: illegal address")

    broken = replace(PROVIDERS["sdpa"], name="fa3", make=PROVIDERS["sdpa"].make, why_not=lost)
    monkeypatch.setitem(PROVIDERS, "fa3", broken)
    kept = []
    cases = [TINY, replace(TINY, name="b", group="b", peers=("fa3",)), replace(TINY, name="c", group="c")]
    options = replace(QUIET, on_rows=kept.extend)
    outcome = run_cases([replace(case, peers=case.peers or ("sdpa",)) for case in cases], options)
    assert {row["case"] for row in kept if row["provider"] == "ours-reference"} == {"tiny"}
    assert outcome.absent["b"] == outcome.absent["c"] == "the GPU was lost to RuntimeError: illegal address"


def test_a_bar_on_rivals_needs_all_of_them(capsys):
    row = {"case": "c", "provider": "ours-hopper", "step": "fwd", "speed_vs_rivals": 1.3}
    bars = [Bar("b", "c", "speed_vs_rivals", "how", at_least=least) for least in (1.2, 1.4)]
    whole, part = ({**row, "rivals": {"timed": ["fa3"], "absent": x}} for x in ([], ["fa4"]))
    assert [(v.word, v.met) for v in judge(bars, [whole])] == [("met", True), ("SHORT", False)]
    want = [("met, without fa4", False), ("SHORT, without fa4", False)]
    assert [(v.word, v.met) for v in judge(bars, [whole, part])] == want
    print_verdicts(judge(bars, [whole]))
    assert "hopper" in capsys.readouterr().out


def test_causal_lists_are_split_at_the_diagonal():
    case = replace(TINY, pattern=Random(0.4, 32, 32), is_causal=True)
    layout = build(case, "cpu").plan.layout
    size = {"block_m": 32, "block_n": 32, "L": 200, "S": 200}
    parts = [SparseLayout.from_count_index(*lists, **size) for lists in providers._edge_and_rest(layout)]
    edge, rest = (part.block_mask() for part in parts)
    assert torch.equal(edge | rest, layout.block_mask() & torch.ones(7, 7, dtype=torch.bool).tril())
    assert edge.sum() > 0 and rest.sum() > 0
    assert torch.equal(edge, edge & torch.eye(7, dtype=torch.bool)) and not (edge & rest).any()


def test_path_files_of_unpacked_peers_are_read(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "nvidia_cutlass_dsl_packages.pth").write_text(f"{inside}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    providers._read_path_files.cache_clear()
    assert providers._missing("no_such_peer") == "no_such_peer is not installed"
    assert str(inside) in sys.path
    sys.path.remove(str(inside))


# -- timing ---------------------------------------------------------------------------------------


def test_the_best_of_several_is_taken_round_by_round():
    ours, one, other = Times([1.0, 2.0, 4.0]), Times([2.0, 9.0, 8.0]), Times([9.0, 4.0, 12.0])
    assert paired_best_ratio([one, other], ours) == 2
    assert paired_best_ratio([one], ours) == 2


def test_a_run_that_raises_is_dropped_or_ends_the_measurement():
    def broken():
        raise OSError("gone")

    dropped = []
    runs = {"good": lambda: None, "bad": broken}
    times = measure(runs, "cpu", rounds=3, drop=lambda name, error: dropped.append((name, str(error))))
    assert dropped == [("bad", "gone")] and set(times) == {"good"} and len(times["good"].rounds) == 3
    assert times["good"].host_us == []
    with pytest.raises(OSError, match="gone"):
        measure(runs, "cpu", rounds=3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_run_follows_every_other_equally_often(count):
    rounds = [order_of_round(count, number) for number in range(count * (1 + count % 2))]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    pairs = Counter(pair for order in rounds for pair in pairwise(order))
    assert set(pairs) == set(permutations(range(count), 2)) and len(set(pairs.values())) <= 1


def test_rounds_run_in_that_order():
    called: list[int] = []
    measure({str(n): partial(called.append, n) for n in range(4)}, "cpu", rounds=4)
    wanted = [*range(4), *chain.from_iterable(order_of_round(4, number) for number in range(4))]
    assert [n for n, _ in groupby(called)] == [n for n, _ in groupby(wanted)]


@NEEDS_GPU
def test_the_gpu_does_not_wait_for_the_host():
    x = torch.zeros(1, device="cuda")

    def slow_to_launch():
        time.sleep(1e-3)
        x.add_(1)

    times = measure({"x": slow_to_launch}, "cuda", rounds=5)["x"]
    assert times.median < 0.3, "milliseconds of the GPU, of which the host spent 1"
    assert min(times.host_us) > 900
