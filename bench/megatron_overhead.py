"""What the Megatron adapter adds to a layer's call, on a CPU. Needs no Megatron.

    python -m sparse_attn.bench.megatron_overhead OUT.jsonl

Microseconds of one thread's own processor time, the least of many, of `SparseCoreAttention.forward` where
nothing is done in place of the method's run.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from sparse_attn.bench.run import stamp
from sparse_attn.bench.timing import cpu_us
from sparse_attn.integrations import megatron

HEADS, GROUPS, HEAD_DIM, LENGTH = 32, 8, 128, 64


class Mask(Enum):
    """Megatron's AttnMaskType, as far as it is used here."""

    causal = 1


def main(path: str) -> None:
    torch.set_num_threads(1)
    config = SimpleNamespace(
        num_layers=4, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_dropout=0.0,
        context_parallel_size=1, tensor_model_parallel_size=1,
    )  # fmt: skip
    layer = megatron.SparseCoreAttention(config, 1, Mask.causal, "self", method="s2")
    q, k, v = (torch.randn(LENGTH, 1, h, HEAD_DIM) for h in (HEADS, GROUPS, GROUPS))
    done = SimpleNamespace(out=q.permute(1, 2, 0, 3))
    rows = []
    with mock.patch.object(megatron, "run", lambda *args, **options: done), torch.no_grad():
        for name, mask in (
            ("no mask", None),
            ("a causal mask, checked", torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]),
        ):
            us = cpu_us(lambda mask=mask: layer(q, k, v, mask), repeats=100)
            rows.append({"case": name, "us": us, "shape": [LENGTH, 1, HEADS, HEAD_DIM], **stamp()})
            print(f"{name}: {us} us")
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1])
