"""AnchorAttention's selection in C++ (csrc/cpu/select.h), for CPU tensors of 32 and 16 bit.

The lists are those of the PyTorch passes (`anchor_select`, `anchor_sampled`), which run where these cannot;
only a key whose gap is theta to within float32's rounding may be listed by one and not by the other.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse_attn.engines.base import load_library
from sparse_attn.engines.cpu import DTYPES, run_operator
from sparse_attn.methods.anchor_regions import AnchorRegions
from sparse_attn.methods.anchor_sampled import MEASURE_EVERY, Sampling, sampled_queries

_REFERENCES = {"max": 1, "lse": 2, "all": 3}  # `Reference` in csrc/cpu/params.h
_GIVEN = 0
_MOST_LOGITS = 1 << 21  # speakers of a superblock x keys: a thread holds up to 16 times as many (float32)


def why_not_cpu(query: Tensor, key: Tensor, regions: AnchorRegions, sampling: Sampling | None) -> list[str]:
    """Reasons why the C++ selection cannot run; [] means it can. The PyTorch one runs then.

    Args:
        sampling: None for the published rule, which holds no logits but those of 128 keys.
    """
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"the tensors are on {query.device}")
    if query.dtype not in DTYPES or key.dtype != query.dtype:
        reasons.append(f"{query.dtype} is not float32, bfloat16 or float16")
    if sampling is not None and sampling.samples * regions.step * regions.S > _MOST_LOGITS:
        reasons.append(f"samples * step * keys is above {_MOST_LOGITS}")
    if not reasons:
        off = load_library("cpu")
        reasons += [] if off is None else [off]
    return reasons


def mean_lists(
    query: Tensor,
    key: Tensor,
    theta: float | Tensor,
    regions: AnchorRegions,
    scale: float,
    reference: str,
    share_kv_group: bool,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    """`pool_anchor` and `fill_columns`: offsets and indices of the columns.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, S, D].
        theta: a number or a tensor that broadcasts to [B, Hq, Lb]. Others as in `select_columns`.
    """
    B, Hq = query.shape[:2]
    anchor, pooled = pooled_anchor(query, key, regions, scale, reference)
    at_least = anchor - theta
    missing = regions.num_superblocks * regions.step - regions.num_query_blocks
    if missing:  # the last superblock may have fewer blocks
        pooled = torch.nn.functional.pad(pooled, (0, 0, 0, missing))
        at_least = torch.nn.functional.pad(at_least, (0, missing))
    shape = (B, Hq, regions.num_superblocks, regions.step)
    speaks = _geometry(regions).speaks
    given = at_least.float().contiguous().view(shape)
    return _lists(
        pooled.view(*shape, -1), speaks, key, regions, _GIVEN, given, None, None, share_kv_group, capacity
    )


def pooled_anchor(
    query: Tensor, key: Tensor, regions: AnchorRegions, scale: float, reference: str
) -> tuple[Tensor, Tensor]:
    """`pool_anchor`, with the scale in the mean queries: float32 [B, Hq, Lb] and [B, Hq, Lb, D]."""
    shape = (*query.shape[:2], regions.num_query_blocks)
    anchor = torch.empty(shape, dtype=torch.float32)
    pooled = torch.empty(*shape, query.shape[-1], dtype=torch.float32)
    where = _geometry(regions)
    run_operator(
        "anchor_pool", _last_stride_one(query), _last_stride_one(key), where.init_end, where.local,
        regions.block, scale, reference == "lse", anchor, pooled,
    )  # fmt: skip
    return anchor, pooled


def sampled_lists(
    query: Tensor,
    key: Tensor,
    theta: float | Tensor,
    regions: AnchorRegions,
    scale: float,
    sampling: Sampling,
    share_kv_group: bool,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    """`fill_sampled`: offsets and indices of the columns; arguments as there."""
    B, Hq = query.shape[:2]
    places, seen = _speakers(regions, sampling.samples)
    speakers = query[:, :, places].float().mul_(scale)  # [B, Hq, G, R, D], new memory
    limit = None
    if sampling.recall is None:
        shape = (B, Hq, regions.num_superblocks)
        if isinstance(theta, Tensor):
            per_block = theta.expand(B, Hq, regions.num_query_blocks)
            limit = per_block[..., :: regions.step].float().contiguous()
        else:
            limit = torch.full(shape, theta, dtype=torch.float32)
    reference = _REFERENCES[sampling.reference]
    return _lists(
        speakers, seen, key, regions, reference, None, limit, sampling.recall, share_kv_group, capacity
    )


def _lists(
    speakers: Tensor,
    seen: Tensor,
    key: Tensor,
    regions: AnchorRegions,
    reference: int,
    given: Tensor | None,
    theta: Tensor | None,
    recall: float | None,
    share: bool,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    where = _geometry(regions)
    if reference == _GIVEN:
        theta = torch.zeros(given.shape[:3], dtype=torch.float32)  # type: ignore[union-attr]
    offsets, indices = run_operator(
        "anchor_lists", speakers.contiguous(), seen, where.stop, _last_stride_one(key),
        regions.init_blocks * regions.block, where.first, reference, given, theta, recall, MEASURE_EVERY,
        share,
    )  # fmt: skip
    if capacity is None:
        return offsets, indices
    fitting = torch.zeros(capacity, dtype=torch.int32)  # what does not fit is lost, and offsets say so
    count = min(capacity, int(offsets[-1]))
    fitting[:count] = indices[:count]
    return offsets, fitting


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Geometry:
    """What the operators are told of the regions.

    Attributes:
        first: the first superblock that is offered keys.
        stop: int64 [G], where the keys offered to a superblock end.
        init_end, local: int64 [Lb], the end of a query block's first keys and the start of its neighbourhood.
        speaks: int64 [G, step], 1 for a query block that there is.
    """

    def __init__(self, regions: AnchorRegions) -> None:
        G, step = regions.num_superblocks, regions.step
        stops = [regions.first_local(g) * regions.block for g in range(G)]
        ends = [regions.init_end(g) * regions.block for g in range(G)]
        self.first = next((g for g in range(G) if regions.offered_keys(g)), G)
        self.stop = torch.tensor(stops)
        of_block = torch.arange(regions.num_query_blocks) // step
        self.init_end, self.local = torch.tensor(ends)[of_block], self.stop[of_block]
        self.speaks = (torch.arange(G * step) < regions.num_query_blocks).long().view(G, step)


@lru_cache(maxsize=16)
def _geometry(regions: AnchorRegions) -> _Geometry:
    with torch.inference_mode(False):
        return _Geometry(regions)


@lru_cache(maxsize=16)
def _speakers(regions: AnchorRegions, samples: int) -> tuple[Tensor, Tensor]:
    """`sampled_queries`: their numbers, and how many keys each sees (0: it is none), int64 [G, R]."""
    with torch.inference_mode(False):
        places, valid = sampled_queries(regions, samples, torch.device("cpu"))
        return places, (places + regions.shift + 1).clamp(min=0) * valid
