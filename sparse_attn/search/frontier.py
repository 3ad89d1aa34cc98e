"""The quality frontier: what each method's knob costs a real model, density against perplexity and recall.

Every point runs in all layers of the model at once, so that errors compound as they would in use. Beside the
methods stand two that need no method: sink + window, and an oracle that sees the true attention and keeps
the key blocks of largest mass.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.layout import SparseLayout
from sparse_attn.layout_stats import visible_pairs
from sparse_attn.methods import METHODS, Context
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import S2Config
from sparse_attn.methods.sparsed_layout import SparseDConfig
from sparse_attn.plan import Plan
from sparse_attn.scoring import block_mass, row_lse
from sparse_attn.search.candidates import Candidate, Shape, _of_method, windows
from sparse_attn.search.measure import WORST, Call, attended_layout
from sparse_attn.search.models import LanguageModel
from sparse_attn.search.rules import Progress, Silent

ORACLE, WINDOW = "oracle of 64-key blocks", "sink + window"
ORACLE_BLOCK = 64
RECALL_EVERY = 3  # layers for each whose recall is measured: it takes a dense pass more


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of one knob.

    Attributes:
        family: the curve that it belongs to. label: unique in a sweep.
        candidate: what runs, or None for the oracle.
        mass: for the oracle: the share of a query block's mass that it keeps.
    """

    family: str
    label: str
    candidate: Candidate | None = None
    mass: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"mass": self.mass} if self.candidate is None else self.candidate.plain


# -- what is swept --------------------------------------------------------------------------------------


def default_points(shape: Shape, only: Sequence[str] | None = None) -> list[Point]:
    """Sink + window, the oracle, and every method of the registry that can run in this model.

    Args:
        only: names to keep: of the registry, "window" or "oracle".

    Raises:
        ValueError: an unknown name.
    """
    known = ["window", "oracle", *METHODS]
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise ValueError(f"frontier: unknown method {unknown[0]!r}; choose from {', '.join(known)}.")
    found: list[Point] = []
    for name in known if only is None else [x for x in known if x in only]:
        if name == "window":
            fitting = [c for c in windows(shape) if c.config.block_size == 64 and c.config.local_blocks >= 5]
            found += [Point(WINDOW, c.label, c) for c in fitting]
        elif name == "oracle":
            found += [Point(ORACLE, f"oracle {mass:g}", mass=mass) for mass in (0.8, 0.9, 0.95)]
        else:
            found += _method_points(name, shape)
    return found


def _method_points(name: str, shape: Shape) -> list[Point]:
    """A method without a grid here takes part with the search's: `search_grid` of its config class, or its
    defaults."""
    if name not in GRIDS or not shape.is_causal:
        return [Point(name, c.label, c) for c in _of_method(name, shape)]
    rows: list[Point] = []
    block: int
    for family, knob, config in GRIDS[name](shape):
        block = getattr(config, "block_size", 0) or getattr(config, "block_m", 64)
        if block <= shape.length // 4:
            rows.append(Point(family, f"{family} {knob}", Candidate(f"{family} {knob}", name, config)))
    return rows


# (family, knob, config) of the language models that the methods are compared on.
Row = tuple[str, str, Any]


def _anchor(shape: Shape) -> Iterator[Row]:
    if shape.length // 2 >= 8 * 64:
        for theta in (5.0, 7.0, 9.0):
            yield "anchor, published", f"theta {theta:g}", AnchorConfig(theta, 64, 8)
        for theta in (5.0, 7.0):
            yield "anchor, LSE reference", f"theta {theta:g}", AnchorConfig(theta, 64, 8, reference="lse")
        for theta in (5.0, 7.0):
            yield "anchor, 4 local blocks", f"theta {theta:g}", AnchorConfig(theta, 64, 8, local_blocks=4)
    for theta in (7.0, 9.0):
        config = AnchorConfig(theta, 64, 1, reference="all", samples=4, local_blocks=2)
        yield "anchor, 4 samples by theta", f"theta {theta:g}", config
    for samples, recalls in ((4, (0.9, 0.95, 0.965, 0.98)), (2, (0.95, 0.965))):
        for recall in recalls:
            config = AnchorConfig(12.0, 64, 1, samples=samples, recall=recall)
            yield f"anchor, {samples} samples by recall", f"{recall:g}", config


def _blasst(shape: Shape) -> Iterator[Row]:
    for threshold in (40.0, 120.0, 400.0, 1200.0):
        yield "BLASST 128x128", f"{threshold:g}/S", BlasstConfig(None, threshold, 128, 128)


def _s2(shape: Shape) -> Iterator[Row]:
    for local, stride in ((2, 16), (4, 8), (8, 8), (8, 4)):
        if local * 64 <= shape.length // 2:
            config = S2Config(64, local, stride, sink_blocks=1, per_query_head=True)
            yield "S2, untrained", f"{local * 64} stride {stride}", config


def _sparsed(shape: Shape) -> Iterator[Row]:
    # Made for bidirectional models, and its selection pays only where it is reused; here for its quality.
    for ratio in (0.1, 0.2, 0.3):
        yield "SparseD, each call", f"{ratio:g}", SparseDConfig(select_ratio=ratio, block_size=64)


GRIDS: dict[str, Callable[[Shape], Iterable[Row]]] = {
    "anchor": _anchor, "blasst": _blasst, "s2": _s2, "sparsed": _sparsed,
}  # fmt: skip


# -- measuring ------------------------------------------------------------------------------------------


def oracle_layout(call: Call, mass: float) -> SparseLayout:
    """The fewest key blocks of each query block that hold `mass` of its attention, from dense attention."""
    L, S, size = call.q.shape[2], call.k.shape[2], ORACLE_BLOCK
    lse = row_lse(call.q, call.k, scale=call.scale, is_causal=call.is_causal)
    share = block_mass(
        call.q, call.k, lse, block_m=size, block_n=size, scale=call.scale, is_causal=call.is_causal
    )
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    best, order = share.sort(dim=-1, descending=True, stable=True)
    wanted = (best.cumsum(-1) - best < mass) & (best > 0)
    keep = torch.zeros_like(wanted).scatter_(-1, order, wanted)
    return SparseLayout.from_dense_mask(keep, block_m=size, block_n=size, L=L, S=S)


class Probe:
    """An attention function that runs one point in every layer and notes density, recall and time.

    Attributes:
        pairs, visible: (query, key) pairs attended, and those of dense attention.
        recalls: of every head of every `RECALL_EVERY`-th layer: the mean, and what all but the worst 1 % of
            the rows exceed.
        select_s, attend_s: seconds; of the processor on a CPU (all its threads together), so that other
            work on the machine does not count.
    """

    def __init__(self, point: Point) -> None:
        self.point = point
        self.pairs = self.visible = self.select_s = self.attend_s = 0.0
        self.recalls: list[tuple[float, float]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> Tensor:
        call = Call(layer, q, k, v, is_causal, scale)
        start = _now(q)
        plan = self._plan(call)
        middle = _now(q)
        result = attend(
            q, k, v, plan, is_causal=is_causal, scale=scale, enable_gqa=True,
            want_kept=plan.skip_below is not None, op=f"frontier: {self.point.label}",
        )  # fmt: skip
        self.select_s += middle - start
        self.attend_s += _now(q) - middle
        layout = attended_layout(plan, result)
        visible = visible_pairs(q.shape[2], k.shape[2], is_causal)
        self.pairs += layout.density(is_causal=is_causal) * visible
        self.visible += visible
        if layer % RECALL_EVERY == 0:
            self._note_recall(call, result.lse)
        finish = None if self.point.candidate is None else self.point.candidate.info.finish
        return result.out if finish is None else finish(result.out, v, self.point.candidate.config)  # type: ignore[union-attr]

    def _plan(self, call: Call) -> Plan:
        if self.point.candidate is None:
            assert self.point.mass is not None
            return Plan(oracle_layout(call, self.point.mass))
        candidate = self.point.candidate
        with warnings.catch_warnings():
            # S2 warns where one layer's heads do not cover the context; how much that costs is measured.
            warnings.simplefilter("ignore")
            return candidate.info.select(
                call.q, call.k, candidate.config, is_causal=call.is_causal, scale=call.scale,
                context=Context(layer=call.layer, prompt_len=call.q.shape[2]),
            )  # fmt: skip

    def _note_recall(self, call: Call, lse: Tensor) -> None:
        full = SparseLayout.full(call.q.shape[2], call.k.shape[2], block_m=64, block_n=64, device=lse.device)
        dense = attend(
            call.q, call.k, call.v, Plan(full), is_causal=call.is_causal, scale=call.scale, enable_gqa=True,
            op="frontier",
        ).lse  # fmt: skip
        rows = torch.exp(lse - dense).transpose(0, 1).flatten(1)  # [Hq, B * L]
        worst = rows.kthvalue(max(int(rows.shape[1] * WORST), 1), dim=1).values
        self.recalls += list(zip(rows.mean(1).tolist(), worst.tolist(), strict=True))


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        return time.perf_counter()
    return time.process_time()


def sweep(
    language: LanguageModel,
    points: Sequence[Point],
    path: Path,
    about: dict[str, Any],
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure points on `language.check` and write a JSON line for each, as soon as it is known.

    Args:
        path: of the lines. Those that are there already, of the same sweep, are not measured again.
        about: what tells sweeps apart; it stands in every row.

    Returns:
        The rows, dense first: about, family, label, settings, density, perplexity, rise_percent, recall,
        recall_worst (means over heads of the mean and the worst 1 % of the rows), recall_worst_head (the
        worst head's), select_ms and attend_ms a pass of one sample (None where that says nothing).

    Raises:
        ValueError: the file belongs to another sweep.
    """
    progress = progress or Silent()
    rows = _read_rows(path, about)
    known = {row["label"]: row for row in rows}
    progress.stage("measuring points", len(points) + 1)
    base = known.get("dense") or _add(path, about, _dense_row(language))
    progress.advance()
    found = [base]
    for point in points:
        row = known.get(point.label)
        if row is None:
            row = _add(path, about, measure_point(language, point, base["perplexity"]))
            progress.note(
                f"{point.label}: density {row['density']:.3f}, perplexity {row['rise_percent']:+.2f} %, "
                f"recall {row['recall']:.3f}, worst 1 % {row['recall_worst']:.3f}"
            )
        found.append(row)
        progress.advance()
    return found


def measure_point(language: LanguageModel, point: Point, dense_perplexity: float) -> dict[str, Any]:
    """A row without `about`."""
    probe = Probe(point)
    perplexity = math.exp(language.loss_on(language.check, probe))
    recalls = torch.tensor(probe.recalls, dtype=torch.float64)
    samples = language.check.shape[0]
    times = [round(1e3 * x / samples, 1) for x in (probe.select_s, probe.attend_s)]
    return {
        "family": point.family,
        "label": point.label,
        "settings": point.settings,
        "density": probe.pairs / probe.visible,
        "perplexity": perplexity,
        "rise_percent": 100 * (perplexity / dense_perplexity - 1),
        "recall": recalls[:, 0].mean().item(),
        "recall_worst": recalls[:, 1].mean().item(),
        "recall_worst_head": recalls[:, 1].min().item(),
        "select_ms": None if point.candidate is None else times[0],
        "attend_ms": times[1],
    }


def _dense_row(language: LanguageModel) -> dict[str, Any]:
    from sparse_attn.recipe_check import DenseConfig

    point = Point("dense", "dense", Candidate("dense", "dense", DenseConfig()))
    row = measure_point(language, point, 1.0)
    return row | {"rise_percent": 0.0, "select_ms": 0.0}


def _read_rows(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for row in rows:
        differ = [name for name, value in about.items() if row.get(name) != value]
        if differ:
            raise ValueError(
                f"frontier: {path} holds another sweep ({', '.join(differ)} differ); name another --out, or "
                "delete it."
            )
    return rows


def _add(path: Path, about: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Append a whole line; what an interruption leaves is whole lines."""
    from sparse_attn.recipe_files import write_whole

    row = {name: round(x, 6) if isinstance(x, float) else x for name, x in (about | row).items()}
    before = path.read_bytes() if path.is_file() else b""
    write_whole(path, before + json.dumps(row).encode() + b"\n")
    return row
