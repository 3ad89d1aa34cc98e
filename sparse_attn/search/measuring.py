"""Measuring: passes over the calibration samples that try every candidate on every head.

One pass over each sample visits the layers in order; at each, all candidates run on the very queries, keys
and values of the dense model, one layer in memory at a time. What is measured lies in the work folder.

Of a denoising loop some steps of each phase are measured (`phases.py`), each in files of its own. A pattern
that is found once (SparseD's) is found at the first step of the phase and measured as later steps meet it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_attn.engines import ENGINES
from sparse_attn.integrations.diffusers_state import Tokens
from sparse_attn.layout_stats import visible_pairs
from sparse_attn.plan import Plan
from sparse_attn.search.candidates import Candidate, Shape, default_candidates, distinct
from sparse_attn.search.capture import query_runs, sdpa
from sparse_attn.search.cost import CostTable, select_key, shipped_table
from sparse_attn.search.cost_measure import one_thread, select_us
from sparse_attn.search.maps import attention_map, pattern_map, save_maps
from sparse_attn.search.measure import Call, add_scores, dense, run_candidate, score, select
from sparse_attn.search.models import Model
from sparse_attn.search.phases import Moment, Schedule
from sparse_attn.search.predict import Measured, collect, joined
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
        is_causal: whether the model's attention is; default: as the model says (`DenoisingModel`), else True.
        video: see `Shape`.
        prompt_len: tokens before the generated ones, for SparseD; default: as the model or `video`
            says, else 0.
        phases: of a model that denoises by steps: how many equal phases, or the steps at which they begin;
            default one.
        measured_steps: of a phase, spread from its first step to its last; 1: the middle.
        part: (rank, size): measure only the layers n with n % size == rank (`jobs.py`).
    """

    model: Model
    work: str | Path
    candidates: Sequence[Candidate] | None = None
    table: CostTable | None = None
    num_queries: int | None = None
    seed: int = 0
    resume: bool = False
    is_causal: bool | None = None
    video: tuple[int, int, int, int, bool] | None = None
    prompt_len: int | None = None
    phases: int | Sequence[int] | None = None
    measured_steps: int = 2
    part: tuple[int, int] = (0, 1)
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        f, model = self.model.fingerprint, self.model
        self.is_causal = getattr(model, "is_causal", True) if self.is_causal is None else self.is_causal
        if self.prompt_len is None:
            of_video = 0 if self.video is None else Tokens(self.video[:3], *self.video[3:]).prompt_len
            self.prompt_len = getattr(model, "prompt_len", of_video)
        shape = Shape(
            model.length, f.num_heads, f.num_kv_heads, f.head_dim, self.is_causal, self.video,
            model.device.type,
        )  # fmt: skip
        given = default_candidates(shape) if self.candidates is None else self.candidates
        self.options = distinct([*default_candidates(shape, []), *given])
        self.schedule = Schedule.of(model.num_steps, model.branches, self.phases, self.measured_steps)
        self._patterns = Patterns(self.schedule, self.options)
        by_step = model.num_steps is not None
        self.table = shipped_table(self.model.device.type) if self.table is None else self.table
        manifest = {
            "model": asdict(f),
            "calibration_hash": self.model.calibration_hash,
            "candidates": [{"label": c.label, **c.plain} for c in self.options],
            "num_queries": self.num_queries,
            "seed": self.seed,
            "prompt_len": self.prompt_len,
            "steps": json.loads(json.dumps(asdict(self.schedule))) if by_step else None,
            "engines": [name for name, engine in ENGINES.items() if not engine.why_off()],
        }
        self.folder = WorkFolder(self.work, manifest, resume=self.resume)

    def measure(self) -> None:
        """All that is not measured yet. May be interrupted anywhere."""
        samples, layers = self.model.num_samples, self.model.fingerprint.num_layers
        for sample in range(samples):
            missing = self._missing(sample)
            if not missing:
                continue
            self._gradients(sample, [layer for _, layer in missing])
            moments = self.schedule.moments(sample)
            self.progress.stage(f"measuring sample {sample + 1} of {samples}", layers * len(moments))
            with contextlib.suppress(Enough):
                self.model.run(sample, partial(self._measuring, sample, max(missing)))
            left = sorted({layer for _, layer in self._missing(sample)})
            if left:
                raise ValueError(
                    f"search: layers {left[:8]} of the model made no self-attention call that a search "
                    "can see (a sliding window, a mask, their own attention code?)."
                )

    def _is_mine(self, layer: int) -> bool:
        rank, size = self.part
        return layer % size == rank

    def _missing(self, sample: int) -> list[tuple[Moment, int]]:
        """Passes and layers of this search's part that have not been measured."""
        layers = [n for n in range(self.model.fingerprint.num_layers) if self._is_mine(n)]
        moments = self.schedule.moments(sample)
        return [(x, n) for x in moments for n in layers if not self.folder.has_measure(x, n)]

    def measure_first_layer(self) -> None:
        """For an estimate of the time."""
        with contextlib.suppress(Enough):
            self.model.run(0, partial(self._measuring, 0, (self.schedule.moments(0)[0], 0)))

    def _gradients(self, sample: int, missing: list[int]) -> None:
        if self.model.num_steps is not None:
            return
        if all(self.folder.read_gradient(sample, layer) is not None for layer in missing):
            return
        self.progress.stage(f"gradients of sample {sample + 1}", self.model.fingerprint.num_layers)

        def keep(layer: int, gradient: Tensor) -> None:
            if layer in missing:
                self.folder.write_gradient(sample, layer, gradient)
            self.progress.advance()

        self.model.gradients(sample, keep, self.seed)

    def _gradient(self, sample: int, layer: int, device: torch.device) -> Tensor | None:
        gradient = self.folder.read_gradient(sample, layer)
        return None if gradient is None else gradient.to(device)

    def _measuring(
        self,
        sample: int,
        last: tuple[Moment, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        is_causal: bool,
        scale: float,
        step: int | None = None,
        branch: int = 0,
    ) -> Tensor:
        """The attention function of a measuring pass: dense, and everything else on the side."""
        moment = Moment(sample, step, branch)
        if self._is_mine(layer):
            of_phase = self.schedule.moments(sample, self.schedule.phase_of(step))
            to_come = [x for x in of_phase if x.branch == branch and x >= moment]
            to_come = [x for x in to_come if not self.folder.has_measure(x, layer)]
            if to_come:
                gradient = self._gradient(sample, layer, q.device)
                call = Call(layer, q, k, v, is_causal, scale, gradient, self.prompt_len)
                self._patterns.find(moment, query_runs(call, self.num_queries))
            if moment in to_come:
                self._measure_call(moment, call)
            if to_come in ([], [moment]):
                self._patterns.drop(moment, layer)
        if moment in self.schedule.moments(sample):
            self.progress.advance()
        if (moment, layer) >= last and not self._ends_loop(moment, layer):
            raise Enough
        return sdpa(q, k, v, is_causal=is_causal, scale=scale)

    def _ends_loop(self, moment: Moment, layer: int) -> bool:
        """Whether this is the last call of a denoising loop, which then may end by itself: a model that makes
        more passes than it says is found out."""
        end = (self.model.num_steps or 0) - 1, self.model.branches - 1, self.model.fingerprint.num_layers - 1
        return (moment.step, moment.branch, layer) == end

    def _measure_call(self, moment: Moment, call: Call) -> None:
        self._measure_layer(moment, call)
        self.folder.drop_gradient(moment.sample, call.layer)

    def _measure_layer(self, moment: Moment, call: Call) -> None:
        if moment.sample == 0 and call.layer == 0:
            self._time_selections(call)
        runs = query_runs(call, self.num_queries)
        references = [dense(run) for run in runs]
        scores, patterns = [], []
        phase = self.schedule.phase_of(moment.step)
        is_drawn = moment == self.schedule.moments(0, phase)[0]
        for number, candidate in enumerate(self.options):
            parts = []
            kept = self._patterns.of(moment, call, number, len(runs))
            for run, reference, found in zip(runs, references, kept, strict=True):
                plan, result = run_candidate(run, candidate, found)
                parts.append(score(run, reference, plan, result))
            scores.append(add_scores(parts))
            if is_drawn:
                patterns.append(pattern_map(plan, result, call.q.shape[1]))
        if is_drawn:
            path = self.folder.map_path(call.layer, None if moment.step is None else phase)
            truth = attention_map(runs[-1], references[-1])
            save_maps(path, {"truth": truth, "kept": np.stack(patterns)})
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
        self.folder.write_measure(moment, call.layer, measure)

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
        threads = torch.get_num_threads() if self.table.device_type == "cpu" else self.table.threads
        parts = []
        for phase in range(len(self.schedule.ranges)):
            found = self._found(phase)
            found = {n: moments for n, moments in found.items() if layers is None or n in layers}
            if found:
                measures = {n: [self.folder.read_measure(x, n) for x in found[n]] for n in found}
                parts.append(
                    collect(
                        measures, self.options, self.table, self.folder.read_select_us(), num_threads=threads,
                        schedule=self.schedule, phase=phase,
                    )
                )  # fmt: skip
        if not parts:
            raise ValueError("search: no layer has been measured yet.")
        return joined(parts)

    def _found(self, phase: int) -> dict[int, list[Moment]]:
        """layer -> the measured passes of a phase."""
        moments = [x for s in range(self.model.num_samples) for x in self.schedule.moments(s, phase)]
        return self.folder.layers(moments, self.model.fingerprint.num_layers)

    def dtype(self) -> str:
        """Of what was measured."""
        found = next(x for n in range(len(self.schedule.ranges)) if (x := self._found(n)))
        layer, moments = next(iter(found.items()))
        return self.folder.read_measure(moments[0], layer)["dtype"]


@dataclass(eq=False)
class Patterns:
    """Patterns found at one step and measured at later ones, of one phase at a time: a layout for each layer,
    pass of the step and such candidate. They wait in the host's memory."""

    schedule: Schedule
    options: Sequence[Candidate]
    _kept: dict[tuple[int, int, int], dict[int, list[Plan]]] = field(default_factory=dict)

    def find(self, moment: Moment, runs: Sequence[Call]) -> None:
        """Select for the candidates that do so at this step of their phase."""
        if moment.step is None:
            return
        phase = self.schedule.phase_of(moment.step)
        for number, candidate in enumerate(self.options):
            if self.schedule.found_at(candidate.config, phase) == moment.step:
                plans = [select(run, candidate) for run in runs]
                plans = [replace(x, layout=x.layout.to("cpu")) for x in plans]
                self._kept.setdefault((phase, moment.branch, runs[0].layer), {})[number] = plans

    def of(self, moment: Moment, call: Call, number: int, num_runs: int) -> list[Plan | None]:
        """What was found for a candidate, of each run of the call; None where it selects anew."""
        place = self.schedule.phase_of(moment.step), moment.branch, call.layer
        found = self._kept.get(place, {}).get(number)
        if found is None:
            return [None] * num_runs
        return [replace(x, layout=x.layout.to(call.q.device)) for x in found]

    def drop(self, moment: Moment, layer: int) -> None:
        """The phase reads them no more."""
        self._kept.pop((self.schedule.phase_of(moment.step), moment.branch, layer), None)
