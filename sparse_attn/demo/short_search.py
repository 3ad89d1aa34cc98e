"""The demo's recipe: a short search (`sparse_attn.search`) on text that no row of the table reads.

What makes it short: one sample as long as the table's, measured at its last 1024 queries; a third of the
default candidates; and a budget of relative error, which asks for no gradients and no trials.
(Shorter samples choose windows that miss what heads read at 4096 tokens: with half the length the perplexity
rose 2 to 4 %.)
`sparse-attn search demo` does the whole.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any

from rich.progress import Progress, TaskID

from sparse_attn.demo.candidates import Candidate
from sparse_attn.demo.model import LoadedModel, _require
from sparse_attn.search.models import LanguageModel

QUERIES = 1024  # of the sample
BUDGET = 0.05  # relative error, root mean square over the heads
RECIPE_FILE = "demo.recipe.json"


def check_installed() -> None:
    """Raises:
    MissingAssetError: what a search needs beyond the demo is missing.
    """
    for package in ("scipy", "safetensors"):
        _require(package, package)


def short_search(
    candidate: Candidate, loaded: LoadedModel, text: str, tokens: int, progress: Progress
) -> tuple[Candidate, dict[str, Any]]:
    """Find the recipe of the demo.

    Args:
        candidate: the row.
        text: whose beginning the rows read; the sample begins after half of it.
        tokens: that the rows read, and the search.

    Returns:
        The row with its recipe, and what the report shows: {"recipe", "seconds", "tokens", "candidates",
        "budget", "error", "settings": [{"label", "heads"}] most used first, "grid": for each layer the
        setting's number of each head}.
    """
    from sparse_attn.search.commands import text_samples
    from sparse_attn.search.run import Budget, Search

    started = time.perf_counter()
    ids = text_samples(loaded, text, tokens, 2)[1:].to(loaded.model.device)
    model = _WithoutGradients(loaded.model, ids)
    shown = _Shown(progress)
    with tempfile.TemporaryDirectory() as folder:
        search = Search(model, folder, _coarse(model), num_queries=QUERIES, curve=False, progress=shown)
        search.measure()
        found = search.choose(Budget(relative_error=BUDGET))
    seconds = round(time.perf_counter() - started, 1)
    note = (
        f"Found in {seconds:.0f} s: {len(found.candidates)} candidates measured on {tokens} tokens of a "
        f"later part of the text, within a relative error of {BUDGET}; it lies in {RECIPE_FILE}."
    )
    facts = {
        "recipe": RECIPE_FILE, "seconds": seconds, "tokens": tokens, "candidates": len(found.candidates),
        "budget": BUDGET, "error": found.summary["relative_error"], **_grid(found),
    }  # fmt: skip
    options = {x["label"]: x["heads"] for x in facts["settings"]}
    return replace(candidate, recipe=found.recipe, note=note, options=options), facts


class _WithoutGradients(LanguageModel):
    """A budget of relative error needs none, and they take as long as all else."""

    def gradients(self, sample: int, keep: Any, seed: int) -> bool:
        return False


def _coarse(model: Any) -> list[Any]:
    """Every other window, lists from single queries (on a GPU from coarser blocks), and one BLASST."""
    from sparse_attn.search.candidates import Shape, default_candidates

    f = model.fingerprint
    shape = Shape(model.length, f.num_heads, f.num_kv_heads, f.head_dim, device=model.device.type)
    windows, anchors, skips = (
        default_candidates(shape, [name])[1:] for name in ("window", "anchor", "blasst")
    )
    return [*windows[1::2], *anchors[-4:-1], *skips[-2:-1]]


def _grid(found: Any) -> dict[str, Any]:
    """Settings, most used first, and the number of each head's."""
    chosen = found.choice.reshape(len(found.measured.layers), -1)
    counts = {int(c): int((chosen == c).sum()) for c in set(found.choice.tolist())}
    order = sorted(counts, key=lambda c: (-counts[c], c))
    settings = [{"label": found.candidates[c].label, "heads": counts[c]} for c in order]
    return {"settings": settings, "grid": [[order.index(int(c)) for c in row] for row in chosen]}


class _Shown:
    """The search's progress as bars of the demo's."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def stage(self, name: str, total: int) -> None:
        for task in self.progress.tasks:
            if task.id == self.task and not task.completed:
                self.progress.remove_task(task.id)  # a stage that had nothing to do
        self.task = self.progress.add_task(f"search: {name}", total=total)

    def advance(self) -> None:
        if self.task is not None:
            self.progress.advance(self.task)

    def note(self, text: str) -> None:
        self.progress.console.print(f"  search: {text}", style="dim", highlight=False)
