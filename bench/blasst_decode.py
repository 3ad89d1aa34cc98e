"""BLASST in a decoding step on a CPU: one query over a cache of keys, beside dense attention.

    python bench/blasst_decode.py OUT.jsonl [rounds]

9 query heads on 3 key heads of 64 in float32, one thread, by the thread's own processor time (it leaves out
what other processes take). Calls take turns; the least time of each counts. Lambda is set so that the given
share of the tiles of 128 keys falls; the share that does is in the row.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn import SparseLayout, blasst_attention, sparse_attention
from sparse_attn.bench.run import stamp
from sparse_attn.search.calibrate import sparsity_at, tile_margins

HEADS, KEY_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 128
LENGTHS, SHARES = (1024, 4096, 16384), (0.5, 0.8)


def measure(length: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(1, HEADS, 1, HEAD_DIM, generator=generator)
    k, v = (torch.randn(1, KEY_HEADS, length, HEAD_DIM, generator=generator) for _ in range(2))
    margins = tile_margins(q, k, block_m=1, block_n=BLOCK, scale=HEAD_DIM**-0.5)
    full = SparseLayout.full(1, length, block_m=BLOCK, block_n=BLOCK)
    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "dense": lambda: sparse_attention(q, k, v, full, enable_gqa=True),
    }
    skipped = {}
    for share in SHARES:
        found = margins.flatten().quantile(share, interpolation="lower").item()
        threshold = math.exp(min(found, 0.0))
        skipped[f"blasst {share:g}"] = round(sparsity_at(margins, [threshold]).mean().item(), 4)
        calls[f"blasst {share:g}"] = lambda threshold=threshold: blasst_attention(
            q, k, v, threshold, block_m=BLOCK, block_n=BLOCK, enable_gqa=True, is_causal=True
        )
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
            call()
            best[name] = min(best[name], time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - start)
    us = {name: round(1e6 * x) for name, x in best.items()}
    return {
        "length": length,
        "us": us,
        "skipped": skipped,
        "of_torch": {n: round(x / us["torch"], 2) for n, x in us.items()},
    }


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    made = {
        "rounds": rounds,
        "heads": HEADS,
        "key_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
    }
    made |= {"block_n": BLOCK, **stamp()}
    with open(sys.argv[1], "w") as file:
        for length in LENGTHS:
            row = measure(length, rounds) | made
            print(row)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
