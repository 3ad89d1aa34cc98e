"""The frontier: every method's knob on a tiny model, against numbers computed without it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from torch.nn.functional import cross_entropy  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from sparse_attn.cli import make_app  # noqa: E402
from sparse_attn.methods import METHODS  # noqa: E402
from sparse_attn.methods.base import Method  # noqa: E402
from sparse_attn.search import frontier  # noqa: E402
from sparse_attn.search.candidates import Candidate, Shape  # noqa: E402
from sparse_attn.search.frontier import Point, Probe, default_points, measure_point, oracle_layout, sweep  # noqa: E402
from sparse_attn.search.measure import Call  # noqa: E402
from sparse_attn.search.models import LanguageModel  # noqa: E402
from sparse_attn.testing_data import structured_qk  # noqa: E402

SHAPE = Shape(4096, 9, 3, 64)
LENGTH = 320


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=LENGTH, initializer_range=0.6,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return LanguageModel(model, torch.randint(0, 64, (2, LENGTH)))


def point(method, label="x", **options):
    return Point(method, label, Candidate(label, method, METHODS[method].config(**options)))


def call_of(L=LENGTH, seed=0):
    q, k = structured_qk(1, 2, L, 32, kv_heads=1, seed=seed)
    return Call(0, q, k, torch.randn(1, 1, L, 32), True, 32**-0.5)


def probabilities(call):
    """[Hq, L, S]"""
    x = call.q[0] @ call.k[0].repeat_interleave(2, 0).mT * call.scale
    L = x.shape[-1]
    return x.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


# -- what is swept --------------------------------------------------------------------------------------


def test_every_method_that_fits_takes_part_and_labels_are_unique():
    points = default_points(SHAPE)
    assert {p.candidate.method if p.candidate else "oracle" for p in points} == {
        "s2", "oracle", "anchor", "blasst", "sparsed",
    }  # fmt: skip
    assert len({p.label for p in points}) == len(points)
    published = [p.candidate.config for p in points if p.family == "anchor, published"]
    assert published and all(c.samples is None and c.local_blocks == 1 for c in published)
    assert {c.candidate.config.samples for c in points if "recall" in c.family} == {2, 4}
    for p in points:
        json.dumps(p.settings)


def test_a_sixth_method_joins_by_itself(monkeypatch):
    @dataclass(frozen=True)
    class NearConfig:
        blocks: int = 2

        @classmethod
        def search_grid(cls, shape):
            return [cls(1), cls(shape.length // 128)]

    near = Method("near", NearConfig, METHODS["s2"].select, METHODS["s2"].op, causal=True)
    monkeypatch.setitem(METHODS, "near", near)
    grid = [p for p in default_points(SHAPE) if p.family == "near"]
    assert [p.candidate.config for p in grid] == [NearConfig(1), NearConfig(32)]


def test_names_pick_families_and_unknown_ones_are_refused():
    assert {p.family for p in default_points(SHAPE, ["window", "oracle"])} == {
        frontier.WINDOW, frontier.ORACLE,
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown method 'flash'"):
        default_points(SHAPE, ["flash"])


# -- measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [0.5, 0.9])
@pytest.mark.parametrize("L", [320, 301])
def test_the_oracle_keeps_the_fewest_blocks_that_hold_the_mass(mass, L):
    call = call_of(L)
    kept = oracle_layout(call, mass).check().block_mask()[0]  # [Hq, blocks, blocks]
    p = probabilities(call)
    blocks = -(-L // 64)
    for h in range(2):
        for i in range(blocks):
            rows = p[h, 64 * i : 64 * i + 64]
            by_block = [rows[:, 64 * j : 64 * j + 64].sum().item() / len(rows) for j in range(blocks)]
            total, want = 0.0, set()
            for j in sorted(range(blocks), key=lambda j: -by_block[j]):
                if total >= mass:
                    break
                want.add(j)
                total += by_block[j]
            assert set(kept[h, i].nonzero().flatten().tolist()) == want


def test_sparsed_by_mass_is_the_oracle():
    call = call_of()
    config = METHODS["sparsed"].config(block_size=64, select_mass=0.9)
    chosen = Probe(Point("sparsed", "x", Candidate("x", "sparsed", config)))._plan(call).layout
    assert torch.equal(chosen.block_mask(), oracle_layout(call, 0.9).block_mask())


@pytest.mark.parametrize(
    "chosen",
    [
        point("anchor", theta=0.5, block_size=16, step=2),
        point("anchor", block_size=16, step=1, samples=3, recall=0.8),
        point("s2", block_size=16, local_blocks=2, vert_stride=4, per_query_head=True),
        point("blasst", threshold=0.3, block_m=16, block_n=16),
        Point("oracle", "o", mass=0.7),
    ],
    ids=lambda p: p.family + p.label,
)
def test_density_recall_and_output_are_those_of_the_mask(chosen):
    call = call_of()
    probe = Probe(chosen)
    out = probe(call.q, call.k, call.v, layer=0, is_causal=True, scale=call.scale)
    kept = torch.ones(1, 2, LENGTH, LENGTH).tril().bool()
    plan = probe._plan(call)
    if plan.skip_below is None:
        mask = plan.layout.to_dense(True).expand(1, 2, -1, -1)
    else:  # what it skipped is known from the output alone: compare with the method's own operator
        want, stats = METHODS["blasst"].op(
            call.q, call.k, call.v, 0.3, block_m=16, block_n=16, is_causal=True, enable_gqa=True,
            return_stats=True,
        )  # fmt: skip
        torch.testing.assert_close(out, want)
        assert probe.pairs / probe.visible < 1 and stats.sparsity.mean() > 0
        return
    p = probabilities(call)[None] * mask
    recall = p.sum(-1)
    want = (p / recall[..., None]) @ call.v.expand(1, 2, -1, -1)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-5)
    assert probe.pairs / probe.visible == pytest.approx((mask & kept).sum().item() / kept.sum().item())
    for h, (mean, worst) in enumerate(probe.recalls):
        assert mean == pytest.approx(recall[0, h].mean().item(), abs=1e-5)
        assert worst == pytest.approx(recall[0, h].sort().values[LENGTH // 100 - 1].item(), abs=1e-5)
    assert 0 < probe.pairs / probe.visible < 1


def test_dense_is_the_model_itself_and_less_is_worse(language):
    with torch.no_grad():
        logits = language.model(language.check).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), language.check[:, 1:].flatten())
    dense = measure_point(language, point("anchor", theta=float("inf"), block_size=16, step=2), 1.0)
    assert dense["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert dense["density"] == 1 and dense["recall"] == pytest.approx(1, abs=1e-5)
    some, few = (
        measure_point(
            language, point("s2", block_size=16, local_blocks=n, vert_stride=99), dense["perplexity"]
        )
        for n in (9, 2)
    )
    assert few["density"] < some["density"] < 1
    assert few["recall"] < some["recall"] < 1 and few["recall_worst"] < some["recall_worst"] < some["recall"]
    assert some["recall_worst_head"] <= some["recall_worst"]
    assert few["rise_percent"] == pytest.approx(100 * (few["perplexity"] / dense["perplexity"] - 1))
    assert few["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-5)


def test_a_sweep_goes_on_where_it_stopped(language, tmp_path, monkeypatch):
    points = [point("anchor", f"theta {x}", theta=x, block_size=16, step=2) for x in (0.0, 1.0, 2.0)]
    path, about = tmp_path / "f.jsonl", {"model": "tiny"}
    rows = sweep(language, points[:2], path, about)
    assert [r["label"] for r in rows] == ["dense", "theta 0.0", "theta 1.0"]
    measured = []
    real = frontier.measure_point
    monkeypatch.setattr(frontier, "measure_point", lambda *a: measured.append(a[1].label) or real(*a))
    again = sweep(language, points, path, about)
    assert measured == ["theta 2.0"] and again[:3] == rows
    assert [json.loads(x) for x in path.read_text().splitlines()] == again
    with pytest.raises(ValueError, match="another sweep"):
        sweep(language, points, path, {"model": "other"})


# -- the command ----------------------------------------------------------------------------------------


def invoke(*words):
    return CliRunner().invoke(make_app(), ["frontier", *map(str, words)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory, language):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:64]
    tokenizer = Tokenizer(models.BPE(vocab={x: n for n, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    language.model.save_pretrained(folder)
    (folder / "text.txt").write_text("BUTTHEYDIDNOTSEEWHATTHEYHADSEEN" * 40)
    return folder


def test_the_command_writes_rows_table_picture_and_page(directory, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "f.jsonl"
    words = (directory, "--text", directory / "text.txt", "--tokens", LENGTH, "--out", out, "--device", "cpu")
    done = invoke(*words, "--methods", "oracle,sparsed")
    assert done.exit_code == 0, done.output
    rows = [json.loads(x) for x in out.read_text().splitlines()]
    assert [r["family"] for r in rows] == ["dense", *[frontier.ORACLE] * 3, *["SparseD, each call"] * 3]
    assert rows[1]["select_ms"] is None and rows[4]["select_ms"] > 0 and rows[0]["density"] == 1
    table = out.with_suffix(".md").read_text()
    assert table.count("\n") == 2 + len(rows) and "| SparseD, each call 0.2 |" in table
    page = out.with_suffix(".html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "data:image/png;base64," in page
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", 1), "at least 2"),
        (("--tokens", LENGTH, "--methods", "flash"), "unknown method 'flash'"),
        (("--tokens", 4096), "reads at most"),
    ],
)
def test_bad_calls_are_refused(directory, tmp_path, words, message):
    done = invoke(directory, "--text", directory / "text.txt", "--out", tmp_path / "f.jsonl", *words)
    assert done.exit_code == 1 and message in done.output.replace("\n", " ")
    assert not (tmp_path / "f.jsonl").exists()
