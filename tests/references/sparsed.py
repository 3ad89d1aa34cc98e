"""SparseD's selection (arXiv 2509.24014), spelled out: float64, loops, the whole softmax in memory.

Written from a description of the algorithm and of what the authors' code does. `keep` is what both
return: bool [B, H, n, n], true where a query block reads a key block.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor


def pooled(p: Tensor, size: int, n: int, by_valid: bool) -> Tensor:
    """Mean of each size x size tile of p [rows, columns]; n key blocks in all."""
    rows, columns = p.shape
    scores = torch.zeros(ceil(rows / size), ceil(columns / size), dtype=torch.float64)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            tile = p[i * size : (i + 1) * size, j * size : (j + 1) * size]
            scores[i, j] = tile.sum() / (tile.numel() if by_valid else size * size)
    return scores


def best(scores: list[float], count: int) -> set[int]:
    """The numbers of the `count` largest scores; of equal ones the lower number."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return set(order[:count])


def select(
    query: Tensor,
    key: Tensor,
    *,
    prompt_len: list[int],
    select_ratio: float,
    block_size: int,
    mode: str,
    score_scale: float,
    per_kv_head: bool = False,
    select_mass: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """keep, and the prompt and generation scores it was made from (NaN where a block has none)."""
    query, key = query.double(), key.double()
    B, Hq, L, _ = query.shape
    group = Hq // key.shape[1]
    n = ceil(L / block_size)
    H = key.shape[1] if per_kv_head else Hq
    keep = torch.zeros(B, H, n, n, dtype=torch.bool)
    prompt_scores = torch.full((B, H, n, n), torch.nan, dtype=torch.float64)
    generation_scores = prompt_scores.clone()
    for b in range(B):
        last = first_generation_block(prompt_len[b], L, block_size, n, mode)
        for h in range(H):
            members = range(h * group, (h + 1) * group) if per_kv_head else [h]
            everything = torch.zeros(n, n, dtype=torch.float64)
            generation = torch.zeros(n, n - last, dtype=torch.float64)
            for member in members:
                logits = query[b, member] @ key[b, member // group].T * score_scale
                by_valid = mode == "paper"
                everything += pooled(logits.softmax(-1), block_size, n, by_valid)
                if last < n:
                    alone = logits[:, last * block_size :].softmax(-1)  # renormalised
                    generation += pooled(alone, block_size, n, by_valid)
            for i in range(n):
                rows = everything[i].tolist(), generation[i].tolist()
                chosen = choose(*rows, last, n, select_ratio, mode)
                if select_mass is not None:
                    keys = [min(block_size, L - j * block_size) for j in range(n)]
                    chosen = fewest(rows[0][:last], keys[:last], select_mass)
                    chosen |= {last + j for j in fewest(rows[1], keys[last:], select_mass)}
                keep[b, h, i, sorted(chosen)] = True
            ranked = n if mode == "repo" else last
            prompt_scores[b, h, :, :ranked] = everything[:, :ranked]
            generation_scores[b, h, :, last:] = generation
    return keep, prompt_scores, generation_scores


def first_generation_block(prompt_len: int, L: int, block_size: int, n: int, mode: str) -> int:
    """The first block that starts in the generated part; the last block where there is none."""
    if mode == "paper" and prompt_len == L:
        return n  # nothing is generated
    for i in range(n):
        if L - i * block_size <= L - prompt_len:
            return i
    return n - 1


def choose(
    everything: list[float], generation: list[float], last: int, n: int, ratio: float, mode: str
) -> set[int]:
    """Key blocks of one query block."""
    if mode == "repo":
        prompt = best(everything, max(1, int(n * ratio) + 1))
        prompt = {j for j in prompt if j < last}  # generation columns are erased afterwards
        part = best(generation, max(1, int((n - last) * ratio) + 1))
    else:
        prompt = best(everything[:last], up(last * ratio))
        part = best(generation, up((n - last) * ratio))
    return prompt | {last + j for j in part}


def fewest(scores: list[float], keys: list[int], share: float) -> set[int]:
    """The numbers of the largest mean scores until their sums hold `share` of all sums (our extension)."""
    mass = [x * n for x, n in zip(scores, keys, strict=True)]
    chosen: set[int] = set()
    for j in sorted(range(len(scores)), key=lambda j: (-scores[j], j)):
        if mass[j] <= 0 or sum(mass[i] for i in chosen) >= share * sum(mass):
            break
        chosen.add(j)
    return chosen


def up(x: float) -> int:
    """Ceiling of a number that floating point may have put a hair above an integer."""
    return round(x) if abs(x - round(x)) < 1e-9 else ceil(x)


def dense_steps(num_steps: int, skip_ratio: float, mode: str) -> list[int]:
    """The steps with full attention; the pattern is found at the last of them."""
    if mode == "repo":
        end = int(num_steps * skip_ratio) + 1
        return [t for t in range(num_steps) if t <= end]
    return list(range(max(1, up(num_steps * skip_ratio))))
