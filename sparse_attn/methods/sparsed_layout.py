"""The selection of SparseD: which key blocks each query block keeps (see `sparsed.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from numbers import Integral

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout, visible_blocks
from sparse_attn.scoring import block_mass, block_sizes, row_lse

OP = "sparsed_attention"
MODES = ("paper", "repo")
_TOP_CHUNK = 1 << 22  # scores sorted at once: a stable sort of them all would need several times their size
_ROUND = 1e-9  # 0.07 * 100 is 7.000000000000001, whose ceiling must be 7


@dataclass(frozen=True)
class SparseDConfig:
    """Settings of SparseD.

    Attributes:
        skip_ratio: share of the denoising steps that stay dense, in (0, 1]; paper: 0.2.
        select_ratio: share of the key blocks that each query block keeps, in (0, 1]; paper: 0.3 for long
            contexts, 0.5 for short ones.
        block_size: queries and keys in a block; paper: 128 for long contexts, 32 for short ones.
        mode: "paper" (isolated selection as the paper describes it) or "repo" (as the authors' code does
            it); `sparsed_layout` lists the differences.
        score_scale: multiplies q.k when blocks are scored; default: the scale of the attention. (The
            authors' LLaDA code scores with num_heads ** -0.5, their Dream code with head_dim ** -0.5.)
        per_kv_head: one pattern a key head, from the summed scores of its query heads, so that a kernel
            can read keys once a group; default: one a query head, as the paper.
        select_mass: instead of select_ratio (an extension of mode "paper"): each query block keeps the
            fewest blocks that hold this share of its attention mass in the prompt, and as many as hold it
            in the generation. A row that looks at little keeps little.
    """

    skip_ratio: float = 0.2
    select_ratio: float = 0.3
    block_size: int = 128
    mode: str = "paper"
    score_scale: float | None = None
    per_kv_head: bool = False
    select_mass: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be in (0, 1]"
            for name in ("skip_ratio", "select_ratio")
            if not 0 < getattr(self, name) <= 1
        ]
        if self.mode not in MODES:
            problems.append(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.select_mass is not None:
            if not 0 < self.select_mass <= 1:
                problems.append(f"select_mass is {self.select_mass}; it must be in (0, 1]")
            if self.mode == "repo":
                problems.append("select_mass needs mode='paper'; the authors' code has no such rule")
        if self.block_size < 1:
            problems.append(f"block_size is {self.block_size}; it must be at least 1")
        if self.score_scale is not None and not 0 < self.score_scale < float("inf"):
            problems.append(f"score_scale is {self.score_scale}; it must be positive and finite")
        if problems:
            raise ValueError(f"{OP}: " + "; ".join(problems) + ".")

    def switch_step(self, num_steps: int) -> int:
        """The last dense step, at which the pattern is found. Steps after it are sparse.

        paper: ceil(skip_ratio * num_steps) dense steps, so this is one less.
        repo: int(skip_ratio * num_steps) + 1, so there are int(skip_ratio * num_steps) + 2 dense steps
        (128 steps at 0.2: 27 instead of 26). At or past num_steps - 1 no step is sparse.
        """
        if self.mode == "repo":
            return int(num_steps * self.skip_ratio) + 1
        return ceil(num_steps * self.skip_ratio - _ROUND) - 1 if num_steps * self.skip_ratio > 1 else 0

    def beginning_at(self, step: int, num_steps: int) -> SparseDConfig:
        """The same, with the `skip_ratio` that makes `step`, below `num_steps`, the switch step: for a range
        of steps that begins there. (Mode "repo" cannot find its pattern at step 0, and does at 1.)"""
        if self.mode == "repo":
            return replace(self, skip_ratio=max(step - 0.5, 0.5) / num_steps)
        return replace(self, skip_ratio=(step + 1) / num_steps)


@torch.no_grad()
def sparsed_layout(
    query: Tensor,
    key: Tensor,
    config: SparseDConfig | None = None,
    *,
    prompt_len: int | Tensor | None,
    scale: float | None = None,
    is_causal: bool = False,
    lse: Tensor | None = None,
) -> SparseLayout:
    """The pattern of SparseD for these queries and keys: isolated selection of key blocks.

    n = ceil(L / block_size) blocks. `last`, the first block that holds generated tokens only, divides
    the key blocks: those before it are prompt, the others generation. The block that straddles the two
    counts as prompt; if that leaves the generation without a block, the last block counts as generation.
    A prompt block's score is the mean over its tile of the softmax over *all* keys, a generation block's
    that of the softmax over the generation keys alone. Equal scores: the lower block wins.

    | | paper | repo |
    |---|---|---|
    | prompt blocks kept | the best ceil(ratio * last) of the prompt | those of the best int(ratio * n) + 1 of *all* blocks that are prompt: generation blocks take places and are then erased |
    | generation blocks kept | the best ceil(ratio * (n - last)) | the best int(ratio * (n - last)) + 1 |
    | mean of the ragged last block | over its keys | over block_size keys, which biases it down |
    | no generated tokens | prompt only | the last block still counts as generation |

    `select_mass` replaces the two counts of "paper".

    Where the repository asks for more blocks than there are (ratio 1) it crashes; here it keeps them all.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, L, D].
        config: default `SparseDConfig()`.
        prompt_len: 0 .. L, an int or an integer tensor [B].
        scale: of the attention; default D ** -0.5. `config.score_scale` goes before it.
        is_causal: blocks beyond the causal edge are never kept.
        lse: [B, Hq, L], the log-sum-exp of dense attention at `scale`, if the caller has it; else one
            more pass computes it.

    Returns:
        A layout with Hq (or, `per_kv_head`, Hkv) heads. Its making does not synchronise with the host.
    """  # noqa: E501
    config = config or SparseDConfig()
    check_lengths(query, key, prompt_len)
    assert prompt_len is not None
    S, size = query.shape[2], config.block_size
    n = ceil(S / size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if config.score_scale is not None and config.score_scale != scale:
        scale, lse = config.score_scale, None
    last = _first_generation_block(prompt_len, S, config)
    if isinstance(last, Tensor):
        last = last.to(query.device)
    prompt, generation = _scores(query, key, lse, config, last, scale, is_causal)
    keep = torch.zeros(prompt.shape, dtype=torch.bool, device=query.device)
    if config.select_mass is not None:
        _keep_mass(keep, prompt, 0, last, S, config)
        most = n
    elif config.mode == "repo":
        _keep_best(keep, prompt, 0, n, config)
        boundary = last.view(-1, 1, 1, 1) if isinstance(last, Tensor) else last
        keep &= torch.arange(n, device=query.device) < boundary
        most = 2 * _count(n, config)
    else:
        _keep_best(keep, prompt, 0, last, config)
        most = _count(n, config) + 1  # of the ceilings of two parts
    if config.select_mass is not None:
        _keep_mass(keep, generation, last, n, S, config)
    else:
        _keep_best(keep, generation, last, n, config)
    return SparseLayout.from_dense_mask(
        keep, block_m=size, block_n=size, L=S, S=S, capacity=keep[..., 0].numel() * min(most, n)
    )


def _scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    config: SparseDConfig,
    last: int | Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Scores of prompt and of generation blocks, [B, H, n, n] each; -inf beyond the causal edge.

    In paper mode both are columns of one tensor, so that the logits are visited once.
    """
    S, size = query.shape[2], config.block_size
    if lse is None:
        lse = row_lse(query, key, scale=scale, is_causal=is_causal)

    def mass(normaliser: Tensor | None, key_range: tuple[int | Tensor, int | Tensor]) -> Tensor:
        return block_mass(
            query, key, normaliser, block_m=size, block_n=size, scale=scale, is_causal=is_causal,
            key_range=key_range, per_kv_head=config.per_kv_head,
        )  # fmt: skip

    if config.mode == "repo":
        # Sums rank as means over size x size do: dividing by a constant changes no order.
        both = [mass(lse, (0, S)), mass(None, (last * size, S))]
    else:
        means = mass(lse, (0, last * size)).add_(mass(None, (last * size, S)))
        means /= block_sizes(S, S, size, size, query.device)
        both = [means, means]
    if is_causal:
        hidden = ~visible_blocks(S, S, size, size, query.device)
        both = [x.masked_fill_(hidden, -torch.inf) for x in both]
    return both[0], both[1]


def _first_generation_block(prompt_len: int | Tensor, S: int, config: SparseDConfig) -> int | Tensor:
    """`last` of `sparsed_layout`."""
    size, n = config.block_size, ceil(S / config.block_size)
    all_prompt = n if config.mode == "paper" else n - 1
    if isinstance(prompt_len, Tensor):
        tokens = prompt_len.long().clamp(0, S)
        first = torch.div(tokens + size - 1, size, rounding_mode="floor").clamp(max=n - 1)
        return torch.where(tokens == S, all_prompt, first)
    return all_prompt if prompt_len == S else min(ceil(prompt_len / size), n - 1)


def _count(blocks: int, config: SparseDConfig) -> int:
    """How many of `blocks` key blocks are kept."""
    share = blocks * config.select_ratio
    return min(int(share) + 1 if config.mode == "repo" else ceil(share - _ROUND), blocks)


def _counts(blocks: Tensor, config: SparseDConfig) -> Tensor:
    """`_count` of each entry, on its device: float64 as Python's, so that the rounding is the same."""
    share = blocks.double() * config.select_ratio
    kept = share.floor() + 1 if config.mode == "repo" else (share - _ROUND).ceil()
    return kept.long().minimum(blocks)


def _keep_best(
    keep: Tensor, scores: Tensor, start: int | Tensor, end: int | Tensor, config: SparseDConfig
) -> None:
    """Set `keep` at the `_count(end - start)` best scores of each row within columns start .. end - 1.

    Bounds may differ by row of the batch (int64 [B]); then columns outside are masked.
    """
    B, n = scores.shape[0], scores.shape[-1]
    scores, keep = scores.flatten(1, 2), keep.flatten(1, 2)
    width = end - start
    if isinstance(width, int):
        for b in range(B):
            if width > 0:
                most = _count(width, config)
                _keep_best_rows(keep[b, :, start:end], scores[b, :, start:end], None, most, most)
        return
    column = torch.arange(n, device=scores.device)
    starts, ends, counts = _per_row(start, width), _per_row(end, width), _counts(width, config)
    for b in range(B):
        outside = (column < starts[b]) | (column >= ends[b])
        _keep_best_rows(keep[b], scores[b], outside, counts[b], _count(n, config))


def _keep_mass(
    keep: Tensor, scores: Tensor, start: int | Tensor, end: int | Tensor, S: int, config: SparseDConfig
) -> None:
    """Set `keep` at the best scores of columns start .. end - 1 until they hold `select_mass` of the mass
    there. Bounds as in `_keep_best`."""
    assert config.select_mass is not None
    n = scores.shape[-1]
    column = torch.arange(n, device=scores.device)
    keys = (S - column * config.block_size).clamp(max=config.block_size)  # a score is a mean over them
    for b in range(scores.shape[0]):
        low, high = (x[b] if isinstance(x, Tensor) else x for x in (start, end))
        outside = (column < low) | (column >= high)
        rows, kept = scores[b].flatten(0, 1), keep[b].view(-1, n)
        step = max(_TOP_CHUNK // n, 1)
        for i in range(0, rows.shape[0], step):
            best, order = (
                rows[i : i + step].masked_fill(outside, -torch.inf).sort(dim=-1, descending=True, stable=True)
            )
            mass = best.clamp(min=0) * keys[order]
            before = mass.cumsum(-1) - mass
            wanted = (before < config.select_mass * mass.sum(-1, keepdim=True)) & (mass > 0)
            kept[i : i + step] |= torch.zeros_like(wanted).scatter_(-1, order, wanted)


def _per_row(x: int | Tensor, like: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full_like(like, x)


def _keep_best_rows(
    keep: Tensor, scores: Tensor, outside: Tensor | None, count: int | Tensor, most: int
) -> None:
    """Set `keep` [rows, n] at the `count` (<= `most`) best finite scores of each row. The sort is stable,
    so that equal scores resolve alike on every device."""
    step = max(_TOP_CHUNK // scores.shape[1], 1)
    ranked = torch.arange(most, device=scores.device) < count
    for i in range(0, scores.shape[0], step):
        part = scores[i : i + step]
        if outside is not None:
            part = part.masked_fill(outside, -torch.inf)
        best, order = part.sort(dim=-1, descending=True, stable=True)
        wanted = ranked & (best[:, :most] > -torch.inf)
        chosen = torch.zeros_like(part, dtype=torch.bool).scatter_(-1, order[:, :most], wanted)
        keep[i : i + step].logical_or_(chosen)


def check_lengths(query: Tensor, key: Tensor, prompt_len: int | Tensor | None) -> None:
    """Raise one ValueError about the lengths, all problems at once."""
    B, L, S = query.shape[0], query.shape[2], key.shape[2]
    problems = []
    if L != S:
        problems.append(
            f"query has length {L} but key has {S}; the pattern is one of a whole sequence over itself, so "
            "pass prompt and generated tokens together (a cached prompt has no queries to rank blocks for)"
        )
    if isinstance(prompt_len, Tensor):
        if tuple(prompt_len.shape) != (B,) or prompt_len.is_floating_point() or prompt_len.is_complex():
            problems.append(
                f"prompt_len is {prompt_len.dtype} of shape {tuple(prompt_len.shape)}; "
                f"pass an int or an integer tensor of shape ({B},)"
            )
        elif prompt_len.device.type == "cpu" and not ((prompt_len >= 0) & (prompt_len <= L)).all():
            problems.append(f"prompt_len is {prompt_len.tolist()}; each must be between 0 and L = {L}")
    elif not isinstance(prompt_len, Integral) or isinstance(prompt_len, bool):
        problems.append(f"prompt_len is {prompt_len!r}; pass an int or an integer tensor of shape ({B},)")
    elif not 0 <= prompt_len <= L:
        problems.append(f"prompt_len is {prompt_len}; it must be between 0 and L = {L}")
    if problems:
        raise ValueError(f"{OP}: " + "; ".join(problems) + ".")
