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
from sparse_attn.search.solve import Problem


@dataclass(frozen=True, eq=False)
class Measured:
    """All that is known of some layers: arrays [heads of those layers, candidates] in float64.

    Attributes:
        layers: their numbers; heads of a layer lie together, in order.
        heads: query heads of a layer.
        time: microseconds of a head for one sequence, its share of the selection included.
        call_us: float64 [candidates], microseconds of a call beside its heads.
        relative: |out - dense| / |dense|. mse: mean of (out - dense)^2.
        harm: estimated Kullback-Leibler divergence, nats a token; nan where there are no gradients.
        density: share of the visible pairs. recall, recall_worst: of the attention mass.
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

    @property
    def layer_of(self) -> np.ndarray:
        return np.repeat(np.array(self.layers), self.heads)

    def problem(self, weight: str) -> Problem:
        """What the solver gets.

        Args:
            weight: "divergence": errors are `harm`; "head": squared relative errors over the number of heads,
                so that the square root of their sum is a root mean square.
        """
        error = self.harm if weight == "divergence" else self.relative**2 / len(self.relative)
        return Problem(self.time, error, self.layer_of, self.call_us)


def collect(
    measures: dict[int, list[dict[str, Any]]],
    candidates: Sequence[Candidate],
    table: CostTable,
    select_us: dict[str, tuple[float, float]],
    *,
    num_threads: int,
) -> Measured:
    """Add up the samples of each layer and predict times.

    Args:
        measures: layer -> what `WorkFolder.read_measure` gave for each of its samples.
        select_us: `select_key` -> microseconds a head and a call, for those that the table lacks.
        num_threads: that the recipe will run on.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    heads, calls = 0, np.zeros(len(candidates))
    for layer in sorted(measures):
        samples = measures[layer]
        first = samples[0]
        for n, candidate in enumerate(candidates):
            total = add_scores([x["scores"][n] for x in samples])
            heads = len(total["error"])
            columns = _columns(total)
            select, calls[n] = _selection(samples[0], candidate, table, select_us)
            columns["time"] = (_times(total, samples, table) + select) * table.threads / num_threads
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
    return Measured(sorted(measures), heads, **arrays, call_us=call_us)


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


def _times(total: Scores, samples: Sequence[dict[str, Any]], table: CostTable) -> np.ndarray:
    """Microseconds of each head for one sample, all its queries, on the table's threads; no selection."""
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
    """The layers of a recipe, equal settings grouped, with what is expected of each head."""
    result = []
    for n, layer in enumerate(measured.layers):
        own = choice[n * measured.heads : (n + 1) * measured.heads]
        groups = []
        for c in sorted(set(own.tolist())):
            heads = np.nonzero(own == c)[0]
            rows = n * measured.heads + heads
            groups.append(
                HeadGroup(
                    tuple(heads.tolist()), candidates[c].method, candidates[c].config,
                    relative_error=_numbers(measured.relative[rows, c]),
                    mass_recall=_numbers(measured.recall[rows, c]),
                    time_us=_numbers(measured.time[rows, c]),
                    dense_time_us=_numbers(measured.time[rows, dense]),
                )
            )  # fmt: skip
        result.append(LayerPlan(layer, tuple(groups), phase))
    return result


def _numbers(x: np.ndarray) -> tuple[float, ...]:
    """Six significant digits."""
    return tuple(float(f"{value:.6g}") for value in x)


def extra_us(plan: LayerPlan, measured: Measured, choice: np.ndarray, num_kv_heads: int) -> float:
    """Microseconds of calls beyond one a group: `run_layer` cuts a group whose key heads have
    unequally many of its query heads."""
    n = measured.layers.index(plan.layer) * measured.heads
    extra = 0.0
    for setting in plan.settings:
        of_key_head = Counter(h * num_kv_heads // plan.num_heads for h in setting.heads)
        extra += (len(set(of_key_head.values())) - 1) * measured.call_us[choice[n + setting.heads[0]]]
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
