"""AnchorAttention, keys identified by sampled queries, beside the published rule: selection and attention.

    python -m sparse_attn.bench.anchor_sampled OUT.jsonl [--device cuda]

A check comes first: the lists on the device against those of a CPU. Then, for the published rule and for the
options, times of selection, attention and the whole call, with density and mass recall, on structured q and
k: on a GPU H32 D128 in bfloat16 at 32768 and 131072 tokens, on a CPU 9 heads of 64 in float32 at 4096 tokens.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn.attend import attend
from sparse_attn.bench.timing import measure
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.anchor import AnchorConfig, select
from sparse_attn.plan import Plan
from sparse_attn.testing_data import structured_qk


def configs(block: int) -> dict[str, AnchorConfig]:
    wide = {"block_size": block, "step": 1}
    return {
        "published, theta 10": AnchorConfig(10.0, block, 512 // block),
        "4 samples, recall 0.95": AnchorConfig(**wide, samples=4, recall=0.95),
        "4 samples, recall 0.98": AnchorConfig(**wide, samples=4, recall=0.98),
        "2 samples, recall 0.98": AnchorConfig(**wide, samples=2, recall=0.98),
        "4 samples, theta 7 of all": AnchorConfig(7.0, **wide, samples=4, reference="all"),
    }


def check(device: str) -> int:
    """Entries whose listing differs between the device and a CPU in float64, of about a million offered."""
    q, k = structured_qk(1, 4, 3000, 64, kv_heads=2)
    config = AnchorConfig(block_size=64, step=1, samples=4, recall=0.95)
    masks = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        layout = select(q.to(place, dtype), k.to(place, dtype), config, is_causal=True, scale=0.125).layout
        assert layout.columns is not None
        masks.append(layout.check().columns.to_mask(3000).cpu())  # type: ignore[union-attr]
    return int((masks[0] != masks[1]).sum())


def time_config(
    name: str, config: AnchorConfig, q: Tensor, k: Tensor, v: Tensor, dense_lse: Tensor, rounds: int
) -> dict[str, Any]:
    scale, device = q.shape[-1] ** -0.5, q.device.type
    plan = select(q, k, config, is_causal=True, scale=scale)

    def choose() -> Plan:
        return select(q, k, config, is_causal=True, scale=scale)

    def whole() -> Tensor:
        return attend(q, k, v, choose(), is_causal=True, scale=scale, enable_gqa=True).out

    runs = {
        "select": choose,
        "attend": lambda: attend(q, k, v, plan, is_causal=True, scale=scale, enable_gqa=True),
        "whole": whole,
        "dense": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    times = {x: round(t.median, 3) for x, t in measure(runs, device, rounds=rounds).items()}
    lse = attend(q, k, v, plan, is_causal=True, scale=scale, enable_gqa=True).lse
    recall = torch.exp(lse - dense_lse).flatten()
    worst = recall.kthvalue(max(recall.numel() // 100, 1)).values.item()
    return {
        "config": name, "length": q.shape[2], "density": round(plan.layout.density(is_causal=True), 4),
        "recall": round(recall.mean().item(), 4), "recall_worst": round(worst, 4), **times,
        "select_of_attend": round(times["select"] / times["attend"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    card = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} thread(s)"
    print(card, "torch", torch.__version__)
    print("keys listed otherwise than by a CPU in float64:", check(options.device), flush=True)
    with open(options.out, "w") as file:
        for length in (32768, 131072) if gpu else (4096,):
            shape = (32, 8, 128, torch.bfloat16, 128) if gpu else (9, 3, 64, torch.float32, 64)
            heads, kv_heads, D, dtype, block = shape
            q, k = structured_qk(1, heads, length, D, kv_heads=kv_heads, device=options.device, dtype=dtype)
            v = torch.randn_like(k)
            full = SparseLayout.full(length, length, block_m=block, block_n=block, device=options.device)
            lse = attend(q, k, v, Plan(full), is_causal=True, scale=D**-0.5, enable_gqa=True).lse
            for name, config in configs(block).items():
                row = {"card": card, "torch": torch.__version__}
                row |= time_config(name, config, q, k, v, lse, 5)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
