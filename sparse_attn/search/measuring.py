"""Measuring: passes over the calibration samples that try every candidate on every head.

One pass over each sample visits the layers in order; at each, all candidates run on the very queries, keys
and values of the dense model, one layer in memory at a time. What is measured lies in the work folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_attn.engines import ENGINES
from sparse_attn.layout_stats import visible_pairs
from sparse_attn.search.candidates import Candidate, Shape, default_candidates, distinct
from sparse_attn.search.capture import query_runs, sdpa
from sparse_attn.search.cost import CostTable, select_key, shipped_table
from sparse_attn.search.cost_measure import one_thread, select_us
from sparse_attn.search.maps import attention_map, pattern_map, save_maps
from sparse_attn.search.measure import Call, add_scores, dense, run_candidate, score
from sparse_attn.search.models import Model
from sparse_attn.search.predict import Measured, collect
from sparse_attn.search.rules import Progress, Silent
from sparse_attn.search.work import WorkFolder


class Enough(Exception):
    """Ends a pass after the last layer that was to be measured."""


@dataclass(eq=False)
class Measuring:
    """Measurements of one model in one folder.

    Args:
        model: see `models.Model`.
        work: folder for measurements.
        candidates: default: `default_candidates` for the model's shape. The first must be dense.
        table: default: the one that ships for the model's device.
        num_queries: queries of a sample to measure (`query_runs`); default all.
        seed: of the tokens drawn for the divergence.
        resume: go on with an earlier search in `work`.
        is_causal: whether the model's attention is.
        video: see `Shape`.
        prompt_len: tokens before the generated ones, for SparseD.
        part: (rank, size): measure only the layers n with n % size == rank (`jobs.py`).
    """

    model: Model
    work: str | Path
    candidates: Sequence[Candidate] | None = None
    table: CostTable | None = None
    num_queries: int | None = None
    seed: int = 0
    resume: bool = False
    is_causal: bool = True
    video: tuple[int, int, int, int, bool] | None = None
    prompt_len: int = 0
    part: tuple[int, int] = (0, 1)
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        f = self.model.fingerprint
        shape = Shape(
            self.model.length, f.num_heads, f.num_kv_heads, f.head_dim, self.is_causal, self.video,
            self.model.device.type,
        )  # fmt: skip
        given = default_candidates(shape) if self.candidates is None else self.candidates
        self.options = distinct([*default_candidates(shape, []), *given])
        self.table = shipped_table(self.model.device.type) if self.table is None else self.table
        manifest = {
            "model": asdict(f),
            "calibration_hash": self.model.calibration_hash,
            "candidates": [{"label": c.label, **c.plain} for c in self.options],
            "num_queries": self.num_queries,
            "seed": self.seed,
            "prompt_len": self.prompt_len,
            "engines": [name for name, engine in ENGINES.items() if not engine.why_off()],
        }
        self.folder = WorkFolder(self.work, manifest, resume=self.resume)

    def measure(self) -> None:
        """All that is not measured yet. May be interrupted anywhere."""
        layers, samples = self.model.fingerprint.num_layers, self.model.num_samples
        missing = {s: self._missing(s) for s in range(samples)}
        for sample in (s for s in range(samples) if missing[s]):
            self._gradients(sample, missing[sample])
            self.progress.stage(f"measuring sample {sample + 1} of {samples}", layers)
            attention = partial(self._measuring, sample, max(missing[sample]))
            with contextlib.suppress(Enough):
                self.model.run(sample, attention)
            left = self._missing(sample)
            if left:
                raise ValueError(
                    f"search: layers {left[:8]} of the model made no self-attention call that a search "
                    "can see (a sliding window, a mask, their own attention code?)."
                )

    def _is_mine(self, layer: int) -> bool:
        rank, size = self.part
        return layer % size == rank

    def _missing(self, sample: int) -> list[int]:
        """Layers of this search's part that the sample has not measured."""
        layers = range(self.model.fingerprint.num_layers)
        return [n for n in layers if self._is_mine(n) and not self.folder.has_measure(sample, n)]

    def measure_first_layer(self) -> None:
        """For an estimate of the time."""
        with contextlib.suppress(Enough):
            self.model.run(0, partial(self._measuring, 0, 0))

    def _gradients(self, sample: int, missing: list[int]) -> None:
        if all(self.folder.read_gradient(sample, layer) is not None for layer in missing):
            return
        self.progress.stage(f"gradients of sample {sample + 1}", self.model.fingerprint.num_layers)

        def keep(layer: int, gradient: Tensor) -> None:
            if layer in missing:
                self.folder.write_gradient(sample, layer, gradient)
            self.progress.advance()

        self.model.gradients(sample, keep, self.seed)

    def _measuring(
        self,
        sample: int,
        last: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        """The attention function of a measuring pass: dense, and everything else on the side."""
        if self._is_mine(layer) and not self.folder.has_measure(sample, layer):
            self._measure_call(sample, q, k, v, layer=layer, is_causal=is_causal, scale=scale)
        self.progress.advance()
        if layer >= last:
            raise Enough
        return sdpa(q, k, v, is_causal=is_causal, scale=scale)

    def _measure_call(
        self, sample: int, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> None:
        gradient = self.folder.read_gradient(sample, layer)
        gradient = None if gradient is None else gradient.to(q.device)
        self._measure_layer(sample, Call(layer, q, k, v, is_causal, scale, gradient, self.prompt_len))
        self.folder.drop_gradient(sample, layer)

    def _measure_layer(self, sample: int, call: Call) -> None:
        if sample == 0 and call.layer == 0:
            self._time_selections(call)
        runs = query_runs(call, self.num_queries)
        references = [dense(run) for run in runs]
        scores, patterns = [], []
        for candidate in self.options:
            parts = []
            for run, reference in zip(runs, references, strict=True):
                plan, result = run_candidate(run, candidate)
                parts.append(score(run, reference, plan, result))
            scores.append(add_scores(parts))
            if sample == 0:
                patterns.append(pattern_map(plan, result, call.q.shape[1]))
        if sample == 0:
            truth = attention_map(runs[-1], references[-1])
            save_maps(self.folder.map_path(call.layer), {"truth": truth, "kept": np.stack(patterns)})
        B, L, S = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        measure = {
            "head_dim": call.q.shape[-1],
            "dtype": str(call.q.dtype).removeprefix("torch."),
            "length": S,
            "batch": B,
            "share": scores[0]["visible"][0] / (B * visible_pairs(L, S, call.is_causal)),
            "has_gradient": call.grad is not None,
            "scores": scores,
        }
        self.folder.write_measure(sample, call.layer, measure)

    def _time_selections(self, call: Call) -> None:
        """Selections that the table does not know are timed once, and kept: a resumed search must not see
        other numbers."""
        assert self.table is not None
        if self.folder.read_select_us():
            return
        kinds = {select_key(c.method, c.config): c for c in self.options}
        unknown = {
            key: c
            for key, c in kinds.items()
            if self.table.select_us(key, call.q.shape[-1], call.k.shape[2]) is None
        }
        with one_thread(call.q.device.type):
            self.folder.write_select_us(select_us(unknown, call, rounds=3))

    def measured(self, layers: Sequence[int] | None = None) -> Measured:
        """What has been measured so far, as arrays: of these layers, by default of all.

        Raises:
            ValueError: nothing has.
        """
        assert self.table is not None
        f = self.model.fingerprint
        found = self.folder.layers(self.model.num_samples, f.num_layers)
        found = {n: samples for n, samples in found.items() if layers is None or n in layers}
        if not found:
            raise ValueError("search: no layer has been measured yet.")
        measures = {n: [self.folder.read_measure(s, n) for s in samples] for n, samples in found.items()}
        threads = torch.get_num_threads() if self.table.device_type == "cpu" else self.table.threads
        return collect(measures, self.options, self.table, self.folder.read_select_us(), num_threads=threads)

    def dtype(self) -> str:
        """Of what was measured."""
        layer, samples = next(
            iter(self.folder.layers(self.model.num_samples, self.model.fingerprint.num_layers).items())
        )
        return self.folder.read_measure(samples[0], layer)["dtype"]
