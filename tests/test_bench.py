"""The benchmark harness: the numbers it forms, and that it refuses to report wrong results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sparse_attn.bench import memory, runner
from sparse_attn.bench.cases import SHAPES, Bar, ByMethod, Case, Full, Random, Skewed, Strided
from sparse_attn.bench.gate import GateError, agrees, attended_keys, check_small, check_spots
from sparse_attn.bench.memory import layout_bytes, measure_case, memory_bars, peak_memory
from sparse_attn.bench.problem import build
from sparse_attn.bench.providers import PROVIDERS
from sparse_attn.bench.report import judge, lookup, plot, print_rows, print_verdicts, read_rows
from sparse_attn.bench.run import run_suite, show_file
from sparse_attn.bench.runner import Options, run_cases
from sparse_attn.bench.suites import BARS, CASES, method_cases
from sparse_attn.bench.timing import Times, measure, paired_ratio, quantile
from sparse_attn.engines import get_engine
from sparse_attn.methods import METHODS

TINY = Case("tiny", 2, 1, 200, 32, Random(0.4, 32, 32), "float32", rounds=3, gate_length=150)
QUIET = Options("cpu", engine="reference", log=lambda text: None)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The problems are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", list(CASES))
def test_every_bar_has_its_case(suite):
    cases = {case.name: case for case in CASES[suite]}
    assert len(cases) == len(CASES[suite]), "two cases have one name"
    for bar in BARS[suite]:
        assert bar.case in cases
        if bar.step == "bwd":
            assert cases[bar.case].backward
        if bar.step in ("select", "total"):
            assert isinstance(cases[bar.case].pattern, ByMethod)


def test_bars_are_those_promised():
    cpu = BARS["cpu"]
    assert sorted({(b.metric, b.at_least) for b in cpu}) == [
        ("sparse_efficiency", 0.75), ("sparse_efficiency", 0.85), ("speed_vs.sdpa", 0.9),
    ]  # fmt: skip
    assert len(cpu) == 12
    triton = {(b.case, b.step): b.at_least or b.at_most for b in BARS["triton"]}
    assert triton == {
        ("block-sparse-d0.25", "fwd"): 1.05, ("block-sparse-d0.1", "fwd"): 1.05,
        ("s2-s32768", "fwd"): 430, ("s2-s32768", "bwd"): 300, ("anchor-s32768", "total"): 6.37,
    }  # fmt: skip


def test_bar_needs_one_limit():
    with pytest.raises(ValueError, match="exactly one"):
        Bar("x", "c", "ms.median", "how")
    with pytest.raises(ValueError, match="exactly one"):
        Bar("x", "c", "ms.median", "how", at_least=1, at_most=2)


def test_video_shapes_hold_their_grids():
    for name, shape in SHAPES.items():
        if shape.grid is not None:
            frames, height, width = shape.grid
            assert frames * height * width + shape.text_len == shape.length, name


def test_resized_keeps_the_groups_and_the_grid():
    small = Case("x", 32, 8, 32768, 128).resized(1000)
    assert (small.q_heads, small.kv_heads, small.length) == (8, 2, 1000)
    video = [case for case in method_cases(700, 4, False) if case.grid is not None]
    for case in video:
        assert case.grid[0] * case.grid[1] * case.grid[2] + case.text_len == case.length


# -- problems -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [Full(32, 32), Random(0.3, 32, 32), Strided(32, 2, 3), Skewed(32, 2, 0.2)],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_pairs_are_counted_exactly(pattern, is_causal):
    case = replace(TINY, pattern=pattern, is_causal=is_causal)
    problem = build(case, "cpu")
    problem.plan.layout.check()
    dense = problem.plan.layout.to_dense(is_causal).expand(1, case.q_heads, -1, -1)
    assert problem.pairs == pytest.approx(dense.sum().item())
    ms = 2.0
    assert problem.tflops(ms) == pytest.approx(4 * 32 * dense.sum().item() / 2e-3 / 1e12)
    assert problem.tflops(ms, backward=True) == pytest.approx(2.5 * problem.tflops(ms))


def test_attended_keys_agree_with_the_layout():
    for pattern in (Random(0.3, 32, 32), Strided(32, 2, 3)):
        for is_causal in (False, True):
            problem = build(replace(TINY, pattern=pattern, is_causal=is_causal), "cpu")
            layout = problem.plan.layout
            for head in range(2):
                rows = [attended_keys(problem, head, i) for i in range(layout.num_query_blocks)]
                want = layout.to_dense(is_causal)[0, head % layout.heads]
                assert torch.equal(torch.cat(rows), want)


@pytest.mark.parametrize("method", ["blasst", "anchor", "s2", "sparsed", "vdit"])
def test_methods_run_through_the_harness(method):
    case = next(case for case in method_cases(330, 4, False) if case.name == method)
    if method == "anchor":  # more than one superblock, so that there are columns
        case = replace(case, pattern=ByMethod("anchor", {"theta": 6.0, "block_size": 32, "step": 2}))
    outcome = run_cases([replace(case, rounds=3, gate_length=330, peers=("sdpa",))], QUIET)
    assert not outcome.red
    steps = {row["step"]: row for row in outcome.rows if row["case"] == method}
    assert set(steps) == {"fwd", "select", "attend", "total"}
    assert 0 < steps["total"]["density"] <= 1
    recall = steps["total"]["mass_recall"]
    assert 0 <= recall["p1"] <= recall["mean"] <= 1 + 1e-4


def test_gpu_cases_run_short():
    """The suite triton, shrunk, on the reference engine: every pattern, grouping and gate of it works."""
    peers = ("sdpa",)
    cases = [replace(c.resized(260, 1), rounds=3, gate_length=200, peers=peers) for c in CASES["triton"]]
    outcome = run_cases(cases, QUIET)
    assert not outcome.red
    found = {(row["case"], row["step"]) for row in outcome.rows}
    assert {(bar.case, bar.step) for bar in BARS["triton"]} <= found


# -- timing ---------------------------------------------------------------------------------------


def test_quantiles_and_ratios():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1)
    assert Times([1.0, 3.0, 2.0]).median == 2
    # A drift that doubles all times of a round leaves the paired ratio alone.
    slow, fast = Times([2.0, 4.0, 8.0]), Times([1.0, 2.0, 4.0])
    assert paired_ratio(slow, fast) == 2
    with pytest.raises(ValueError, match="same rounds"):
        paired_ratio(slow, Times([1.0]))


def test_measure_alternates():
    order: list[str] = []

    def note(name):
        order.append(name)
        torch.randn(300, 300).matmul(torch.randn(300, 300))

    times = measure({n: lambda n=n: note(n) for n in "abc"}, "cpu", rounds=4)
    assert {len(t.rounds) for t in times.values()} == {4}
    starts = [name for name, before in zip(order[3:], order[2:], strict=False) if name != before]
    assert starts[:3] == ["a", "b", "c"] or starts[:2] == ["b", "c"]
    assert all(ms > 0 for t in times.values() for ms in t.rounds)


def test_measure_sees_a_slower_call():
    import time

    times = measure({"fast": lambda: time.sleep(0.021), "slow": lambda: time.sleep(0.063)}, "cpu", rounds=3)
    assert 2 < paired_ratio(times["slow"], times["fast"]) < 4
    assert 20 < times["fast"].median < 60


# -- the gate -------------------------------------------------------------------------------------


@pytest.fixture
def wrong_reference(monkeypatch):
    """The reference engine with one output element off by a tenth."""
    engine = get_engine("reference")
    right = engine.forward

    def forward(call):
        out, lse, kept = right(call)
        out[0, 1, -1, 3] += 0.1
        return out, lse, kept

    monkeypatch.setattr(engine, "forward", forward)


def test_gate_is_green_when_right():
    check_small(TINY, "reference", "cpu")
    problem = build(TINY, "cpu")
    check_spots(problem, problem.attend("reference").out, "reference")


def test_gate_is_red_when_wrong(wrong_reference):
    with pytest.raises(GateError, match="tiny on reference"):
        check_small(TINY, "reference", "cpu")


def test_wrong_results_are_not_reported(wrong_reference):
    outcome = run_cases([TINY], QUIET)
    assert outcome.red and not outcome.rows


def test_suite_with_a_red_gate_fails(wrong_reference, capsys):
    assert run_suite("smoke", engine="reference", device="cpu") == 1
    assert "WRONG RESULT, not reported" in capsys.readouterr().out


def test_spots_catch_a_missing_block():
    problem = build(replace(TINY, pattern=Random(0.6, 100, 32)), "cpu")
    out = problem.attend("reference").out
    check_spots(problem, out, "same")
    fewer = build(replace(TINY, pattern=Random(0.4, 100, 32)), "cpu").attend("reference").out
    with pytest.raises(GateError):
        check_spots(problem, fewer, "fewer blocks")


def test_peer_that_differs_is_left_out():
    a = torch.randn(1, 2, 50, 8)
    assert agrees(a, a) is None
    assert "differs" in (agrees(a + 0.1, a) or "")


def test_broken_peer_is_a_reason_and_not_an_end(monkeypatch):
    def broken(problem):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PROVIDERS, "sdpa", replace(PROVIDERS["sdpa"], make=broken))
    outcome = run_cases([replace(TINY, peers=("sdpa",))], QUIET)
    assert any("no such kernel" in why for why in outcome.absent.values())
    assert any(row["provider"] == "ours-reference" for row in outcome.rows)


# -- rows, bars, reports --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    cases = [
        replace(TINY, pattern=Full(32, 32), name="tiny-full", backward=True),
        replace(TINY, backward=True),
    ]
    outcome = run_cases(cases, QUIET)
    assert not outcome.red
    return outcome.rows


def test_rows_hold_what_was_measured(rows):
    found = {(row["case"], row["provider"], row["step"]): row for row in rows}
    sparse = found["tiny", "ours-reference", "fwd"]
    assert sparse["density"] == pytest.approx(build(TINY, "cpu").density, abs=1e-6)
    assert sparse["ms"]["p10"] <= sparse["ms"]["median"] <= sparse["ms"]["p90"]
    assert {"sdpa"} <= set(sparse["speed_vs"])
    assert ("tiny", "ours-reference", "bwd") in found and ("tiny-full", "ours-reference", "fwd") in found
    dense = [row for row in rows if row["provider"] == "sdpa" and row["step"] == "fwd"]
    assert len(dense) == 1, "the dense baseline of a shape is timed once"
    assert "sparse_efficiency" not in dense[0] and dense[0]["density"] == 1


def test_sparse_efficiency_is_best_dense_time_by_density(monkeypatch):
    def fake(runs, device, rounds, drop):
        ms = {name: 10.0 if name == "sdpa" else 8.0 if "full" in name else 4.0 for name in runs}
        return {name: Times([value] * 3) for name, value in ms.items()}

    monkeypatch.setattr(runner, "measure", fake)
    cases = [replace(TINY, pattern=Full(32, 32), name="tiny-full"), TINY]
    found = {(r["case"], r["provider"]): r for r in run_cases(cases, QUIET).rows}
    row = found["tiny", "ours-reference"]
    assert row["best_dense"] == "ours-reference"
    assert row["sparse_efficiency"] == pytest.approx(8 * row["density"] / 4, abs=1e-4)
    assert row["speed_vs"]["sdpa"] == 2.5


def test_judge():
    row = {"case": "c", "provider": "ours-cpu", "step": "fwd", "ms": {"median": 3.0}, "tflops": 400.0}
    peer = {"case": "c", "provider": "flex", "step": "fwd", "tflops": 900.0}
    bars = [
        Bar("met", "c", "tflops", "how", at_least=400),
        Bar("short", "c", "tflops", "how", at_least=401),
        Bar("most", "c", "ms.median", "how", at_most=3),
        Bar("over", "c", "ms.median", "how", at_most=2.9),
        Bar("absent", "c", "tflops", "how", step="bwd", at_least=1),
    ]
    words = [v.word for v in judge(bars, [peer, row])]
    assert words == ["met", "SHORT", "met", "SHORT", "not measured"]
    assert [v.met for v in judge(bars, [peer, row])] == [True, False, True, False, False]
    assert lookup(row, "speed_vs.flex") is None


@pytest.mark.parametrize("least, status", [(0.0, 0), (1e9, 1)], ids=["met", "short"])
def test_exit_status_follows_the_bars(monkeypatch, least, status, capsys):
    bar = Bar("speed", "smoke-d0.25", "speed_vs.sdpa", "how", at_least=least)
    monkeypatch.setitem(BARS, "smoke", [bar])
    assert run_suite("smoke", engine="reference", device="cpu") == status
    assert ("SHORT" in capsys.readouterr().out) == (status == 1)


def test_suite_writes_stamped_rows_and_a_picture(tmp_path, capsys):
    assert run_suite("smoke", engine="reference", out=str(tmp_path), picture=str(tmp_path / "p.png")) == 0
    path = next(tmp_path.glob("smoke-*.jsonl"))
    found = read_rows(path)
    for row in found:
        assert row["suite"] == "smoke" and row["versions"]["torch"] == torch.__version__
        assert {"commit", "card", "driver", "date", "threads"} <= set(row)
    assert (tmp_path / "p.png").stat().st_size > 1000
    capsys.readouterr()


def test_show_judges_a_file_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BARS, "smoke", [Bar("speed", "smoke-d0.25", "speed_vs.sdpa", "how", at_least=1e9)])
    monkeypatch.setenv("SPARSE_ATTN_BENCH_COMMIT", "abc123")
    assert run_suite("smoke", engine="reference", device="cpu", out=str(tmp_path / "x.jsonl")) == 1
    capsys.readouterr()
    assert show_file(str(tmp_path / "x.jsonl")) == 1
    text = capsys.readouterr().out
    assert "SHORT" in text and "smoke-full" in text
    assert {row["commit"] for row in read_rows(tmp_path / "x.jsonl")} == {"abc123"}


def test_tables_print_without_rich(rows, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_rows(rows)
    print_verdicts(judge([Bar("b", "tiny", "tflops", "how", at_least=0)], rows))
    text = capsys.readouterr().out
    assert "ours-reference" in text and "met" in text


def test_plot_needs_points(tmp_path):
    with pytest.raises(ValueError, match="sparse efficiency"):
        plot([], tmp_path / "x.png")


def test_rows_are_json(rows):
    assert json.loads(json.dumps(rows)) == rows


# -- memory ---------------------------------------------------------------------------------------


def test_peak_memory_counts_temporaries():
    def call():
        a = torch.zeros(1000, 250)  # 1 MB
        b = a + 1  # 2 MB held
        del a
        return b.sum()  # 1 MB held

    peak = peak_memory(call, "cpu")
    assert 2_000_000 <= peak.peak_bytes < 2_010_000
    assert peak.largest_bytes == 1_000_000


def test_peak_memory_sees_inside_operators():
    """A stable sort needs working buffers that no tensor shows."""
    x = torch.rand(1 << 18)
    result_bytes = (4 + 8) << 18
    assert peak_memory(lambda: torch.sort(x, stable=True), "cpu").peak_bytes >= result_bytes


def test_layout_bytes():
    layout = build(replace(TINY, pattern=Full(32, 32)), "cpu").plan.layout
    layout._cache.clear()
    assert layout_bytes(layout) == 8 * (7 + 1) + 4 * 49


def test_memory_suite(tmp_path, capsys):
    status = run_suite("memory", device="cpu", engine="reference", length=512, heads=2, out=str(tmp_path))
    found = read_rows(tmp_path / "memory-cpu.jsonl")
    assert {row["case"] for row in found} == set(METHODS)
    assert all(row["layout_bytes"] > 0 and row["largest_over_square"] > 0 for row in found)
    assert status == 0
    capsys.readouterr()


def test_memory_bars_by_size():
    assert memory_bars(512, 2) == []
    assert {bar.metric for bar in memory_bars(8192, 2)} == {"largest_over_square"}
    full = memory_bars(131072, 32)
    assert len(full) == 10 and {bar.met(1.0) for bar in full if bar.unit == "GiB"} == {True}


def test_square_allocation_is_seen(monkeypatch):
    """A selector that forms S x S bytes, in one head and for a moment, falls short of its bar."""
    case = next(case for case in method_cases(8192, 1, False) if case.name == "s2")
    case = replace(case, head_dim=32)

    def wasteful(case, q, k):
        torch.zeros(case.length, case.length, dtype=torch.bool)
        return memory_select(case, q, k)

    memory_select = memory.select
    bar = next(bar for bar in memory_bars(8192, 1) if bar.case == "s2")
    row = measure_case(case, QUIET)
    assert judge([bar], [row])[0].met
    monkeypatch.setattr(memory, "select", wasteful)
    row = measure_case(case, QUIET)
    assert not judge([bar], [row])[0].met
