"""The CPU engine beside PyTorch on one thread, by the thread's own CPU time.

    python bench/cpu_thread_time.py [rounds]

CPU time leaves out what other processes take, so the ratios hold on a machine that is not idle; what
they do to the caches stays in. Every round times each provider once; the least time of each counts.
Sparse efficiency = (least dense time x density) / sparse time, the dense time being the best of ours and
PyTorch's. For times of a whole idle machine: `sparse-attn bench --suite cpu`.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn import SparseLayout, sparse_attention

HEADS, LENGTH, BLOCK = 4, 4096, 64


def random_blocks(density: float) -> SparseLayout:
    """The same number of random key blocks in every row."""
    count = LENGTH // BLOCK
    scores = torch.rand(1, HEADS, count, count, generator=torch.Generator().manual_seed(1))
    size = {"block_m": BLOCK, "block_n": BLOCK, "L": LENGTH, "S": LENGTH}
    return SparseLayout.top_k(scores, max(1, round(density * count)), **size)


def measure(head_dim: int, dtype: torch.dtype, rounds: int) -> str:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, head_dim, generator=generator).to(dtype) for _ in range(3))
    full = SparseLayout.full(LENGTH, LENGTH, block_m=BLOCK, block_n=BLOCK)
    quarter, tenth = random_blocks(0.25), random_blocks(0.1)
    calls = {
        "torch": lambda: scaled_dot_product_attention(q, k, v),
        "full": lambda: sparse_attention(q, k, v, full, engine="cpu"),
        "quarter": lambda: sparse_attention(q, k, v, quarter, engine="cpu"),
        "tenth": lambda: sparse_attention(q, k, v, tenth, engine="cpu"),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
            call()
            best[name] = min(best[name], time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - start)
    gflops = 4e-9 * HEADS * LENGTH**2 * head_dim / best["full"]
    dense = min(best["torch"], best["full"])
    efficiency = [dense * x.density() / best[n] for n, x in (("quarter", quarter), ("tenth", tenth))]
    return (
        f"{head_dim:>4} {str(dtype)[6:]:>9} {1e3 * best['torch']:>9.0f} {1e3 * best['full']:>8.0f} "
        f"{gflops:>7.0f} {best['torch'] / best['full']:>9.2f} {efficiency[0]:>8.2f} {efficiency[1]:>8.2f}"
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    print("   D     dtype  SDPA ms  full ms  GFLOPS  SDPA/full  eff 0.25  eff 0.1")
    for head_dim in (64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            print(measure(head_dim, dtype, rounds), flush=True)


if __name__ == "__main__":
    main()
