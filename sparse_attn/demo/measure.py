"""The causal half of the demo: a language model, dense and with each method switched in.

One forward pass of the dense model visits every layer. There, on the very same queries and keys, torch's
own attention, our full layout and every method run one after the other in rotating order: this gives
density, mass recall, output error and time. Then the model runs once more with each method in place of
its attention, for the perplexity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from sparse_attn.attend import Attended, attend
from sparse_attn.demo.candidates import Candidate
from sparse_attn.demo.heads import HeadPicker
from sparse_attn.demo.runs import Run, run_method, run_recipe, timed
from sparse_attn.integrations.patching import patched
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS
from sparse_attn.plan import Plan

DENSE_BLOCK = 128
WORST = 0.01
Advance = Callable[[], None]


@dataclass
class Row:
    """What the table says about one method. Times are milliseconds a layer, medians over the layers.

    Attributes:
        density: share of the visible (query, key) pairs that were attended.
        recall_mean, recall_worst: attention mass that the attended keys hold, exp(lse - dense lse), over all
            queries, heads and layers: mean, and the value that all but the worst 1 % exceed.
        output_error: |out - dense out| / |dense out| in the Euclidean norm, same inputs.
        select_ms, attend_ms: finding the pattern (its share of one call, where several calls use it);
            attention over it.
        sdpa_ms, full_ms: dense attention by torch, and by our engine over the full layout.
        time_ratio: (select + attend) / sdpa, median of the layers' ratios.
        perplexity: of the model with the method in every layer; None where there is no model.
    """

    name: str
    label: str
    input: str
    options: dict[str, Any]
    density: float
    recall_mean: float
    recall_worst: float
    output_error: float
    select_ms: float
    attend_ms: float
    sdpa_ms: float
    full_ms: float
    time_ratio: float
    perplexity: float | None = None
    fits: str = ""
    note: str = ""


@dataclass
class Tally:
    """What one method has shown so far, layer by layer."""

    density: list[float] = field(default_factory=list)
    recall: list[Tensor] = field(default_factory=list)
    error: float = 0.0
    norm: float = 0.0
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, result: Attended, dense: Attended, density: Tensor) -> None:
        self.density.append(density.mean().item())
        self.recall.append(torch.exp(result.lse - dense.lse).flatten().cpu())
        self.error += (result.out.double() - dense.out.double()).square().sum().item()
        self.norm += dense.out.double().square().sum().item()

    def row(
        self,
        candidate: Candidate,
        description: str,
        dense_times: dict[str, list[float]],
        *,
        options: dict[str, Any],
        uses: int = 1,
    ) -> Row:
        """uses: how many calls share one selection; its time is spread over them."""
        recall = torch.cat(self.recall)
        worst = recall.kthvalue(max(int(recall.numel() * WORST), 1)).values
        total = [a / uses + b for a, b in zip(self.times["select"], self.times["attend"], strict=True)]
        ratios = [mine / dense for mine, dense in zip(total, dense_times["sdpa"], strict=True)]
        return Row(
            candidate.name, candidate.label, description, options,
            density=sum(self.density) / len(self.density),
            recall_mean=recall.mean().item(), recall_worst=worst.item(),
            output_error=(self.error / self.norm) ** 0.5,
            select_ms=1e3 * median(self.times["select"]) / uses, attend_ms=1e3 * median(self.times["attend"]),
            sdpa_ms=1e3 * median(dense_times["sdpa"]), full_ms=1e3 * median(dense_times["full"]),
            time_ratio=median(ratios), fits=candidate.fits, note=candidate.note,
        )  # fmt: skip


class LayerProbe:
    """An attention function for `integrations.transformers` that is dense, and measures every method on
    the same tensors while it is at it."""

    def __init__(
        self, candidates: list[Candidate], advance: Advance, picker: HeadPicker | None = None
    ) -> None:
        self.candidates = candidates
        self.configs = {c.name: c.config() for c in candidates if c.recipe is None}
        self.tallies = {c.name: Tally() for c in candidates}
        self.dense_times: dict[str, list[float]] = defaultdict(list)
        self.engines: set[str] = set()
        self.advance = advance
        self.picker = picker
        self._full: SparseLayout | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        wide = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        if self._full is None:
            self._full = full_layout(q, k)
        full = Plan(self._full)
        work: dict[str, Callable[[], Any]] = {
            # SDPA gets its keys repeated beforehand: its grouped path is not the fastest everywhere.
            "sdpa": lambda: scaled_dot_product_attention(*wide, is_causal=is_causal, scale=scale),
            "full": lambda: attend(q, k, v, full, is_causal=is_causal, scale=scale, enable_gqa=True),
        }
        for c in self.candidates:
            work[c.name] = partial(self._run, c, q, k, v, layer, is_causal, scale)
        if not self.dense_times:  # threads, caches and lists that later layers share
            for run in work.values():
                run()
        names = list(work)
        turn = layer % len(names)
        done = {}
        for name in names[turn:] + names[:turn]:
            seconds, done[name] = timed(work[name], q.device)
            if name in ("sdpa", "full"):
                self.dense_times[name].append(seconds)
        self._note(q, k, scale, is_causal, done, layer)
        self.advance()
        return done["sdpa"]

    def _run(
        self, c: Candidate, q: Tensor, k: Tensor, v: Tensor, layer: int, is_causal: bool, scale: float
    ) -> Run:
        if c.recipe is not None:
            plan = c.recipe.plan_for(layer, "prefill")
            return run_recipe(plan, q, k, v, is_causal=is_causal, scale=scale)
        how: dict[str, Any] = {"layer": layer, "is_causal": is_causal, "scale": scale}
        return run_method(METHODS[c.name], self.configs[c.name], q, k, v, **how)

    def _note(
        self, q: Tensor, k: Tensor, scale: float, is_causal: bool, done: dict[str, Any], layer: int
    ) -> None:
        dense, patterns = done["full"], {}
        for c in self.candidates:
            run: Run = done[c.name]
            patterns[c.name] = run.pattern
            tally = self.tallies[c.name]
            tally.add(run.result, dense, run.pattern.density(is_causal, per_head=True))
            tally.times["select"].append(run.select_s)
            tally.times["attend"].append(run.attend_s)
            self.engines |= run.engines
        if self.picker is not None:
            self.picker.offer(layer, q, k, dense.lse, scale, patterns)


@torch.no_grad()
def measure_model(
    model: Any,
    ids: Tensor,
    candidates: list[Candidate],
    *,
    advance: Advance,
    picker: HeadPicker | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Run a causal language model dense and with every candidate.

    Args:
        model: of transformers, in evaluation mode.
        ids: int64 [1, T], the tokens it reads.
        candidates: causal methods.
        advance: called after every layer of every pass.
        picker: told of every layer, to choose heads worth drawing.

    Returns:
        A row for each candidate, and {"perplexity", "sdpa_ms", "full_ms", "engines"} of dense attention.

    Raises:
        ValueError: a model without full causal attention.
    """
    probe = LayerProbe(candidates, advance, picker)
    with patched(model, probe):
        dense: dict[str, Any] = {"perplexity": perplexity(model, ids)}
    if not probe.dense_times:
        raise ValueError(
            f"demo: no layer of {type(model).__name__} attends to all earlier tokens (a sliding window?), so "
            "there is nothing to measure; pass a model with full causal attention."
        )
    dense |= {f"{name}_ms": 1e3 * median(seconds) for name, seconds in probe.dense_times.items()}
    dense["engines"] = sorted(probe.engines)
    rows = []
    for c in candidates:
        row = probe.tallies[c.name].row(c, "language model", probe.dense_times, options=c.options)
        with _patched(model, c), advancing(model, advance):
            row.perplexity = perplexity(model, ids)
        rows.append(row)
    return rows, dense


def _patched(model: Any, c: Candidate) -> Any:
    return patched(model, c.name, c.config()) if c.recipe is None else patched(model, c.recipe)


class advancing:
    """Context manager: call `advance` after every decoder layer of a model."""

    def __init__(self, model: Any, advance: Advance) -> None:
        self.layers, self.advance = decoder_layers(model), advance

    def __enter__(self) -> None:
        self.hooks = [layer.register_forward_hook(lambda *_: self.advance()) for layer in self.layers]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def decoder_layers(model: Any) -> list[Any]:
    """The modules that hold one attention layer each: those with a `self_attn` or `attn` child."""
    return [m for m in model.modules() if hasattr(m, "self_attn") or hasattr(m, "attn")]


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, chunk: int = 512) -> float:
    """exp of the mean negative log-likelihood of tokens 1.. given those before; the logits are made
    `chunk` tokens at a time, since a whole [T, vocabulary] is most of a gigabyte."""
    head, config = model.get_output_embeddings(), model.config
    scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if any(getattr(config, name, None) is not None for name in scaled):
        logits = model(ids, use_cache=False).logits[0, :-1]
        return cross_entropy(logits.float(), ids[0, 1:]).exp().item()
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for states, targets in zip(hidden.split(chunk), ids[0, 1:].split(chunk), strict=True):
        total += cross_entropy(head(states).float(), targets, reduction="sum").item()
    return float(torch.tensor(total / (ids.shape[1] - 1)).exp())


# -- shared with the structured half ------------------------------------------------------------------


def full_layout(q: Tensor, k: Tensor) -> SparseLayout:
    return SparseLayout.full(
        q.shape[2], k.shape[2], block_m=DENSE_BLOCK, block_n=DENSE_BLOCK, device=q.device
    )
