"""Batches over pages: one call for all sequences beside a call for each.

    python -m sparse_attn.bench.paged_batches OUT.jsonl [rounds]

On a CPU, times are one thread's own processor time, the least of the rounds, so that what else runs adds
little; on a GPU, medians of the time until it is done, the host's work included. `calls` counts an engine's
calls for the whole batch. Every result is compared with that of the calls of single sequences first.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_attn import sparse_attention_paged
from sparse_attn.bench.run import stamp
from sparse_attn.engines import ENGINES

HEADS, KEY_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "blasst": {"method": "blasst", "threshold": 0.01, "block_m": 64},
    "s2": {"method": "s2", "local_blocks": 4},
    "anchor": {"method": "anchor", "theta": 10.0},
}


def batches() -> dict[str, list[tuple[int, int]]]:
    """(queries, keys) of each sequence."""
    rng = random.Random(0)
    decoding = [(1, rng.randint(500, 2000)) for _ in range(32)]
    lengths = [rng.randint(100, 600) for _ in range(8)]
    return {
        "decode 32 x 500-2000": decoding,
        "decode 32 x 50-300": [(1, rng.randint(50, 300)) for _ in range(32)],
        "decode 1 x 32768": [(1, 32768)],
        "prefill 8 x 100-600": [(n, n) for n in lengths],
        "prefill 8 x 100-600 after 512": [(n, n + 512) for n in lengths],
    }


class Batch:
    """Sequences in shuffled pages, as vLLM keeps them."""

    def __init__(self, sequences: list[tuple[int, int]], device: str) -> None:
        torch.manual_seed(0)
        self.sequences = sequences
        most = max(-(-S // PAGE) for _, S in sequences)
        self.table = torch.randperm(len(sequences) * most).view(-1, most).to(torch.int32).to(device)
        kv = torch.randn(self.table.numel(), KEY_HEADS, PAGE, 2 * HEAD_DIM, dtype=torch.bfloat16)
        self.caches = kv.to(device).transpose(1, 2).split(HEAD_DIM, -1)
        tokens = sum(L for L, _ in sequences)
        self.query = torch.randn(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16).to(device)

    def attend(self, numbers: list[int], first: int, **options: Any) -> Tensor:
        """Of some sequences that lie side by side, from token `first` on."""
        lengths = [self.sequences[n] for n in numbers]
        ends = [0]
        for L, _ in lengths:
            ends.append(ends[-1] + L)
        out = sparse_attention_paged(
            self.query[first : first + ends[-1]], *self.caches, cu_seqlens_q=ends,
            block_table=self.table[numbers[0] : numbers[-1] + 1], seqused_k=[S for _, S in lengths],
            is_causal=True, enable_gqa=True, trust_table=True, **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def together(self, **options: Any) -> Tensor:
        return self.attend(list(range(len(self.sequences))), 0, **options)

    def apart(self, **options: Any) -> Tensor:
        parts, first = [], 0
        for n, (L, _) in enumerate(self.sequences):
            parts.append(self.attend([n], first, **options))
            first += L
        return torch.cat(parts)


def count_calls(run: Callable[[], Tensor]) -> int:
    """An engine's calls."""
    made = []
    own = {type(engine): type(engine).forward for engine in ENGINES.values()}

    def counting(forward: Callable) -> Callable:
        return lambda self, call: made.append(call) or forward(self, call)

    try:
        for kind, forward in own.items():
            kind.forward = counting(forward)  # type: ignore[method-assign]
        run()
    finally:
        for kind, forward in own.items():
            kind.forward = forward  # type: ignore[method-assign]
    return len(made)


def milliseconds(runs: dict[str, Callable[[], Tensor]], rounds: int, on_gpu: bool) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter() if on_gpu else time.thread_time()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() if on_gpu else time.thread_time()) - start)
    best = statistics.median if on_gpu else min
    return {name: round(1e3 * best(x), 3) for name, x in times.items()}


def compare(batch: Batch, options: dict[str, Any], rounds: int, on_gpu: bool) -> dict[str, Any]:
    runs = {"together": partial(batch.together, **options)}
    if len(batch.sequences) > 1:
        runs["apart"] = partial(batch.apart, **options)
    results = [run().float() for run in runs.values()]
    assert all((x - results[0]).abs().max() < 0.02 for x in results), options
    calls = {kind: count_calls(run) for kind, run in runs.items()}
    return {"ms": milliseconds(runs, rounds, on_gpu), "calls": calls, "rounds": rounds}


@torch.inference_mode()
def main(path: str, rounds: int = 15) -> None:
    warnings.filterwarnings("ignore", message="s2_attention: no head reads")
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    with open(path, "a") as file:
        for name, sequences in batches().items():
            batch = Batch(sequences, "cuda" if on_gpu else "cpu")
            for method, options in METHODS.items():
                row = {"batch": name, "method": method, **compare(batch, options, rounds, on_gpu)}
                print(f"{name:30} {method:8} {row['ms']} {row['calls']}")
                file.write(json.dumps(row | {"heads": [HEADS, KEY_HEADS, HEAD_DIM]} | stamp()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
