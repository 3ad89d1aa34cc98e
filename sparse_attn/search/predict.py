"""From measurements to a problem: times and errors of every head under every candidate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_attn.recipe_plan import HeadGroup, LayerPlan
from sparse_attn.search.candidates import Candidate
from sparse_attn.search.cost import CostTable, select_key
from sparse_attn.search.measure import Scores, add_scores
from sparse_attn.search.phases import ONE_PASS, Schedule
from sparse_attn.search.solve import Problem


@dataclass(frozen=True, eq=False)
class Measured:
    """All that is known of some layers: arrays [heads of those layers, candidates] in float64.

    Numbers are those of one pass of the model; of a denoising phase, of its mean pass.

    Attributes:
        layers: their numbers; heads of a layer lie together, in order. With phases, those of the first one,
            then those of the second one, and so on.
        heads: query heads of a layer.
        time: microseconds of a head for one sequence, its share of the selection included.
        call_us: float64 [candidates], or [heads of those layers, candidates]: microseconds of a call beside
            its heads.
        relative: |out - dense| / |dense|. mse: mean of (out - dense)^2.
        harm: estimated Kullback-Leibler divergence, nats a token; nan where there are no gradients.
        density: share of the visible pairs. recall, recall_worst: of the attention mass.
        phases: the phase of each of `layers`; None: all are of the first.
        schedule: what the phases are.
    """

    layers: list[int]
    heads: int
    time: np.ndarray
    relative: np.ndarray
    mse: np.ndarray
    harm: np.ndarray
    density: np.ndarray
    recall: np.ndarray
    recall_worst: np.ndarray
    call_us: np.ndarray
    phases: list[int] | None = None
    schedule: Schedule = ONE_PASS

    @property
    def passes(self) -> np.ndarray:
        """float64 [heads of those layers]: passes of the model in the phase of each."""
        phases = self.phases or [0] * len(self.layers)
        return np.repeat([float(self.schedule.passes(x)) for x in phases], self.heads)

    @property
    def calls(self) -> np.ndarray:
        """`call_us` as [heads of those layers, candidates]."""
        return np.broadcast_to(self.call_us, self.time.shape)

    def mean(self, array: np.ndarray) -> float:
        """Of a number a head, over all passes."""
        return float(np.average(array, weights=self.passes))

    def problem(self, weight: str) -> Problem:
        """What the solver gets: times and errors of all passes.

        Args:
            weight: "divergence": errors are `harm`; "head": squared relative errors over the number of heads,
                so that the square root of their sum is a root mean square. Both are means over the passes.
        """
        passes = self.passes[:, None]
        if weight == "divergence":
            error = self.harm * passes / self.schedule.all_passes
        else:
            error = self.relative**2 * passes / passes.sum()
        layer = np.repeat(np.arange(len(self.layers)), self.heads)
        return Problem(self.time * passes, error, layer, self.calls * passes)


def collect(
    measures: dict[int, list[dict[str, Any]]],
    candidates: Sequence[Candidate],
    table: CostTable,
    select_us: dict[str, tuple[float, float]],
    *,
    num_threads: int,
    schedule: Schedule = ONE_PASS,
    phase: int = 0,
) -> Measured:
    """Add up the measured passes of each layer in one phase and predict times.

    Args:
        measures: layer -> what `WorkFolder.read_measure` gave for each of its passes.
        candidates: the first is dense.
        select_us: `select_key` -> microseconds a head and a call, for those that the table lacks.
        num_threads: that the recipe will run on.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    heads, calls = 0, np.zeros(len(candidates))
    for layer in sorted(measures):
        samples = measures[layer]
        first = samples[0]
        dense_columns: dict[str, np.ndarray] = {}
        for n, candidate in enumerate(candidates):
            total = add_scores([x["scores"][n] for x in samples])
            heads = len(total["error"])
            columns = _columns(total)
            select, calls[n] = _selection(samples[0], candidate, table, select_us)
            columns["time"] = _times(total, samples, table)
            dense_columns = dense_columns or dict(columns)
            found_at = schedule.found_at(candidate.config, phase)
            if found_at is not None:
                start, end = schedule.ranges[phase]
                select, calls[n] = select / (end - start), calls[n] / (end - start)
                columns = _kept(columns, dense_columns, (end - 1 - found_at) / (end - start))
            columns["time"] = (columns["time"] + select) * table.threads / num_threads
            if not first["has_gradient"]:
                columns["harm"] = np.full(heads, np.nan)
            for name in _COLUMNS:
                rows[name].append(columns[name])
    arrays = {
        name: np.array(parts).reshape(len(measures), len(candidates), heads).transpose(0, 2, 1).reshape(
            -1, len(candidates)
        )
        for name, parts in rows.items()
    }  # fmt: skip
    call_us = table.call_us + calls * table.threads / num_threads
    phases = [phase] * len(measures)
    return Measured(sorted(measures), heads, **arrays, call_us=call_us, phases=phases, schedule=schedule)


def joined(parts: Sequence[Measured]) -> Measured:
    """Phases one after another."""
    if len(parts) == 1:
        return parts[0]
    arrays = {name: np.concatenate([getattr(x, name) for x in parts]) for name in _COLUMNS}
    return Measured(
        [n for x in parts for n in x.layers], parts[0].heads, **arrays,
        call_us=np.concatenate([x.calls for x in parts]), phases=[n for x in parts for n in x.phases or ()],
        schedule=parts[0].schedule,
    )  # fmt: skip


_COLUMNS = ("time", "relative", "mse", "harm", "density", "recall", "recall_worst")


def _columns(total: Scores) -> dict[str, np.ndarray]:
    x = {name: np.array(values, dtype=np.float64) for name, values in total.items()}
    return {
        "relative": np.sqrt(x["error"] / np.maximum(x["norm"], 1e-300)),
        "mse": x["error"] / x["count"],
        "harm": x["harm"] / x["queries"],
        "density": x["pairs"] / np.maximum(x["visible"], 1),
        "recall": np.minimum(x["recall"], 1.0),
        "recall_worst": np.minimum(x["recall_worst"], 1.0),
    }


def _kept(
    columns: dict[str, np.ndarray], dense: dict[str, np.ndarray], sparse: float
) -> dict[str, np.ndarray]:
    """The mean over a phase whose first steps are dense and whose others, the share `sparse`, read the
    pattern found in them. The worst recall stays."""
    sparse = max(sparse, 0.0)
    mixed = {name: sparse * columns[name] + (1 - sparse) * dense[name] for name in columns}
    squares = sparse * columns["relative"] ** 2 + (1 - sparse) * dense["relative"] ** 2
    return mixed | {"relative": np.sqrt(squares), "recall_worst": columns["recall_worst"]}


def _times(total: Scores, samples: Sequence[dict[str, Any]], table: CostTable) -> np.ndarray:
    """Microseconds of each head for one pass over a sample, all its queries, on the table's threads; no
    selection."""
    first = samples[0]
    times = np.array(table.head_us(total, first["head_dim"], first["dtype"]))
    # Sampled queries stand for all of a sequence's.
    return times / (first["share"] * len(samples))


def _selection(
    measure: dict[str, Any],
    candidate: Candidate,
    table: CostTable,
    select_us: dict[str, tuple[float, float]],
) -> tuple[float, float]:
    """Microseconds of a selection, a head and a call, on the table's threads."""
    key = select_key(candidate.method, candidate.config)
    found = table.select_us(key, measure["head_dim"], measure["length"]) or select_us.get(key, (0.0, 0.0))
    return found[0] * measure["batch"], found[1]


def plans(
    measured: Measured, candidates: Sequence[Candidate], choice: np.ndarray, *, phase: str, dense: int = 0
) -> list[LayerPlan]:
    """The layers of a recipe, in the order of `measured`, equal settings grouped, with what is expected of
    each head."""
    result, schedule = [], measured.schedule
    number = measured.phases or [0] * len(measured.layers)
    for n, layer in enumerate(measured.layers):
        own = choice[n * measured.heads : (n + 1) * measured.heads]
        groups = []
        for c in sorted(set(own.tolist())):
            heads = np.nonzero(own == c)[0]
            rows = n * measured.heads + heads
            groups.append(
                HeadGroup(
                    tuple(heads.tolist()), candidates[c].method,
                    schedule.fitted(candidates[c].config, number[n]),
                    relative_error=_numbers(measured.relative[rows, c]),
                    mass_recall=_numbers(measured.recall[rows, c]),
                    time_us=_numbers(measured.time[rows, c]),
                    dense_time_us=_numbers(measured.time[rows, dense]),
                )
            )  # fmt: skip
        result.append(LayerPlan(layer, tuple(groups), phase, schedule.steps(number[n])))
    return result


def _numbers(x: np.ndarray) -> tuple[float, ...]:
    """Six significant digits."""
    return tuple(float(f"{value:.6g}") for value in x)


def extra_us(plan: LayerPlan, calls: np.ndarray, choice: np.ndarray, num_kv_heads: int) -> float:
    """Microseconds of calls beyond one a group: `run_layer` cuts a group whose key heads have
    unequally many of its query heads.

    Args:
        calls: float64 [heads, candidates], microseconds of a call; choice: int64 [heads]; both of this layer.
    """
    extra = 0.0
    for setting in plan.settings:
        of_key_head = Counter(h * num_kv_heads // plan.num_heads for h in setting.heads)
        head = setting.heads[0]
        extra += (len(set(of_key_head.values())) - 1) * calls[head, choice[head]]
    return extra


def copies_us(
    plan: LayerPlan, table: CostTable, *, num_kv_heads: int, length: int, head_dim: int, item: int
) -> float:
    """Microseconds that gathering heads takes in `run_layer`: queries and keys of calls whose heads do
    not lie side by side, and the outputs where a layer has several calls.

    Args:
        item: bytes of a number.
    """
    heads = plan.num_heads
    one = length * head_dim * item / 2**20
    group = heads // num_kv_heads
    copied = 0
    for setting in plan.settings:
        own = sorted(setting.heads)
        key_heads = sorted({h // group for h in own})
        copied += 0 if _adjacent(own) else len(own)
        copied += 0 if _adjacent(key_heads) else 2 * len(key_heads)
    if len(plan.settings) > 1:
        order = [h for setting in plan.settings for h in setting.heads]
        copied += heads + (0 if order == sorted(order) else heads)
    return copied * one * table.copy_us_per_mib


def _adjacent(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
