"""What the demo runs: methods, their settings at this length, and what a reader should know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_attn.methods import METHODS
from sparse_attn.recipe import Recipe

SEARCH = "search"  # the row that is no method but a recipe


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: in the registry, or SEARCH.
        label: for people.
        options: fields of the method's config, as a user would write them.
        fits: which models and phases the method is for.
        note: how to read the row's numbers.
        recipe: what runs instead of a method, once it has been found.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    fits: str = ""
    note: str = ""
    recipe: Recipe | None = None

    @property
    def is_causal(self) -> bool:
        return self.name == SEARCH or METHODS[self.name].causal

    def config(self) -> Any:
        return METHODS[self.name].config(**self.options)


# Causal methods run inside the language model; settings are for a few thousand tokens.
_CANDIDATES = (
    Candidate(
        "blasst",
        "BLASST",
        # lambda * S from the paper's range for prefill; 128 x 128 is the tile its threshold is stated for.
        {"threshold_scale": 120.0, "block_m": 128, "block_n": 128},
        fits="Any trained causal model, unchanged, in prefill. No search and no state: the kernel drops a "
        "tile whose scores all lie far below the maximum seen so far. One knob (lambda): raise it until "
        "perplexity moves.",
        note="Scores of skipped tiles are still computed, so time falls less than density.",
    ),
    Candidate(
        "anchor",
        "AnchorAttention",
        # Superblocks of 512 tokens: the paper's 2048 would leave half of a 4096-token prompt dense.
        {"theta": 12.0, "block_size": 64, "step": 8},
        fits="Any trained causal model, unchanged, in long prefill (from about 16k tokens), where a few key "
        "columns carry what the sinks and the local window miss.",
        note="The sinks and the local window are always read: much of the density at 4096 tokens, very "
        "little at 128k. A larger theta is denser and nearer to dense. Keys are chosen for 64 queries "
        "together, so one that a single query wants can be missed; it shows most in sink heads.",
    ),
    Candidate(
        "s2",
        "S2-Attention",
        # One shard a query head, so that nine heads cover all residues of the stride; one block of sinks.
        {"block_size": 64, "local_blocks": 8, "vert_stride": 8, "sink_blocks": 1, "per_query_head": True},
        fits="Models trained, or trained further, with it. The pattern is fixed before any token is seen: no "
        "selection cost, sparse backward, smaller key-value caches.",
        note="This model was never trained with the pattern: the perplexity shows what switching it on "
        "without training costs.",
    ),
    Candidate(
        SEARCH,
        "Recipe, searched",
        fits="Any trained model: `sparse-attn search` measures every method on every head and takes for each "
        "the cheapest that keeps the output within a budget. The recipe is a file; `sa.patch(model, FILE)` "
        "runs it.",
    ),
    Candidate(
        "sparsed",
        "SparseD",
        {"skip_ratio": 0.2, "select_ratio": 0.3, "block_size": 64},
        fits="Diffusion language models (LLaDA, Dream): bidirectional, many steps over the same tokens. One "
        "pattern a head is found once and reused at every later step.",
        note="Pattern found at the switch step, measured at a later one after queries and keys drifted.",
    ),
    Candidate(
        "vdit",
        "Sparse-vDiT",
        {},
        fits="Video diffusion transformers (HunyuanVideo, Wan, CogVideoX): each head keeps one of a few "
        "geometric patterns, found offline, at every step.",
        note="Each head takes the sparsest pattern on offer that keeps its share of the attention mass.",
    ),
)


def candidates(names: str | None) -> list[Candidate]:
    """The named methods, comma-separated, or all that are registered; and the search.

    Raises:
        ValueError: an unknown name.
    """
    present = {c.name: c for c in _CANDIDATES if c.name in (*METHODS, SEARCH)}
    if names is None:
        return list(present.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in present]
    if unknown or not wanted:
        what = ", ".join(map(repr, unknown)) or repr(names)
        raise ValueError(f"demo: unknown method {what}; choose from {','.join(present)}.")
    return [present[name] for name in dict.fromkeys(wanted)]
