"""AnchorAttention on a GPU, part by part: are the lists right, and what does each pass cost?

    python -m sparse_attn.bench.anchor_parts OUT.jsonl

Checks come first: the lists of the Triton selection against those of the portable one, and theta = inf
against dense attention. Then times at H32 D128 on structured q and k: both passes of the selection,
selection and attention apart, and the whole call beside dense causal attention, with the peak memory of the
selection above its inputs and its lists. The last lines are a table.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn.attend import attend
from sparse_attn.bench.timing import measure
from sparse_attn.kernels import anchor_select as kernels
from sparse_attn.methods import anchor_select as portable
from sparse_attn.methods.anchor import AnchorConfig, anchor_attention, select
from sparse_attn.methods.anchor_regions import AnchorRegions
from sparse_attn.testing_data import structured_qk

TIE = 1e-4  # natural-log units; logits here reach about 30, whose float32 products carry 1e-5
CHECKS: list[dict[str, Any]] = [
    dict(),
    dict(dtype=torch.float16, D=64),
    dict(dtype=torch.float32, reference="lse"),
    dict(L=4000, S=5003),
    dict(L=1, S=5000),
    dict(Hq=8, Hkv=2, share=True),
    dict(Hq=6, Hkv=2, D=96, reference="lse"),
    dict(D=256),
    dict(block=64, step=8, init=2),
    dict(block=16, step=5),
    dict(block=32, step=100),
]


def check_lists(
    L: int = 5000, S: int = 5000, Hq: int = 4, Hkv: int = 4, D: int = 128,
    dtype: torch.dtype = torch.bfloat16, block: int = 128, step: int = 4, init: int = 1,
    reference: str = "max", share: bool = False,
) -> str:  # fmt: skip
    """Compare the two selections; raises AssertionError where they differ beyond ties."""
    q, k = structured_qk(2, Hq, max(L, S), D, kv_heads=Hkv, device="cuda", dtype=dtype)
    q, k = q[:, :, max(L, S) - L :], k[:, :, :S]
    regions, scale, theta = AnchorRegions(L, S, block, step, init), D**-0.5, 9.0
    anchor, pooled = portable.pool_anchor(q, k, regions, scale, reference)
    ours, parts = kernels.pool_anchor(q, k, regions, scale, reference)
    assert (anchor - ours).abs().max() < TIE and (pooled - parts.float().sum(0)).abs().max() < 1e-5
    exact, strict = (
        portable.fill_columns(pooled, k, anchor - theta + x, regions, scale, share, None) for x in (-TIE, TIE)
    )
    lists = kernels.fill_columns(parts, k, ours - theta, regions, scale, share, None)
    used = int(lists.offsets[-1])
    most, least, mine = (x.to_mask(S) for x in (exact, strict, lists))
    assert (mine <= most).all() and (least <= mine).all(), "the lists differ beyond ties"
    again = kernels.fill_columns(parts, k, ours - theta, regions, scale, share, used + 7)
    assert torch.equal(again.indices[:used], lists.indices[:used]) and again.capacity == max(used + 7, 1)
    return f"{used} listed of {regions.offered * lists.rows // max(regions.num_superblocks, 1)}"


def check_dense(engine: str) -> float:
    """theta = inf against dense attention in float32: the error over that of PyTorch in bfloat16."""
    q, k = structured_qk(1, 4, 9000, 128, kv_heads=2, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    out = anchor_attention(q, k, v, theta=math.inf, step=8, enable_gqa=True, engine=engine).float()
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    want = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True).float()
    return ((out - want).abs().max() / (theirs - want).abs().max()).item()


def time_parts(length: int, theta: float, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds at H32 D128, bfloat16."""
    q, k = structured_qk(1, 32, length, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    regions, scale = AnchorRegions(length, length, 128, 16, 1), 128**-0.5
    config = AnchorConfig(theta)

    def choose():
        return select(q, k, config, is_causal=True, scale=scale)

    plan = choose()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = choose()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    anchor, pooled = kernels.pool_anchor(q, k, regions, scale, "max")
    limit = anchor - theta
    runs = {
        "pool": lambda: kernels.pool_anchor(q, k, regions, scale, "max"),
        "fill": lambda: kernels.fill_columns(pooled, k, limit, regions, scale, False, None),
        "select": choose,
        "attend": lambda: attend(q, k, v, plan, is_causal=True),
        "whole": lambda: anchor_attention(q, k, v, theta=theta),
        "dense": lambda: dense(q, k, v),
    }
    times = measure(runs, "cuda", rounds=rounds)
    listed = int(plan.layout.columns.offsets[-1]) if plan.layout.columns else 0
    row: dict[str, Any] = {name: round(x.median, 3) for name, x in times.items()}
    row |= {"p10_p90": [round(times["whole"].quantile(x), 3) for x in (0.1, 0.9)]}
    return row | {
        "length": length,
        "theta": theta,
        "column_ratio": round(listed / (32 * regions.offered), 4),
        "density": round(plan.layout.density(is_causal=True), 4),
        "select_peak_mib": round(peak / 2**20, 1),
    }


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def main(path: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name()
    about = {"card": card, "torch": torch.__version__, "triton": triton.__version__}
    with open(path, "w") as file:
        for case in CHECKS:
            print("lists agree:", case, check_lists(**case), flush=True)
        print("theta = inf against dense: error over PyTorch's", round(check_dense("triton"), 3), flush=True)
        rows = []
        for length, theta, rounds in (
            (32768, 10.0, 15),
            (32768, 12.0, 9),
            (32768, 14.0, 9),
            (131072, 10.0, 3),
        ):
            rows.append(time_parts(length, theta, rounds))
            file.write(json.dumps(about | rows[-1]) + "\n")
            file.flush()
        names = (
            "length",
            "theta",
            "column_ratio",
            "density",
            "pool",
            "fill",
            "select",
            "attend",
            "whole",
            "dense",
        )
        print(card, "ms, medians")
        print(" ".join(f"{x:>12}" for x in (*names, "select_MiB")))
        for row in rows:
            print(" ".join(f"{row[x]:>12}" for x in (*names, "select_peak_mib")))


if __name__ == "__main__":
    main(sys.argv[1])
