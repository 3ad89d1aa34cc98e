"""AnchorAttention's selection: one operator, and the published rule's two passes in plain PyTorch for any
device and size.

`sparse_attn.kernels.anchor_select` holds the same two passes for GPUs, `anchor_sampled` the identification by
single queries.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.methods import anchor_cpu
from sparse_attn.methods.anchor_lists import ListFiller, work_dtype
from sparse_attn.methods.anchor_regions import AnchorRegions
from sparse_attn.methods.anchor_sampled import Sampling, fill_sampled

# One opaque operator, so that torch.compile sees neither the kernels nor a size that depends on data.
torch.library.define(
    "sparse_attn::anchor_columns",
    "(Tensor q, Tensor k, Tensor? thetas, float theta, int block, int step, int init_blocks, "
    "int local_blocks, float scale, str reference, int? samples, float? recall, bool share_kv_group, "
    "int? capacity) -> (Tensor, Tensor)",
)


def select_columns(
    query: Tensor,
    key: Tensor,
    regions: AnchorRegions,
    theta: float | Tensor,
    scale: float,
    reference: str,
    samples: int | None,
    recall: float | None,
    share_kv_group: bool,
    capacity: int | None,
) -> IndexList:
    """The columns of every superblock.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, S, D].
        theta: a number or a tensor that broadcasts to [B, Hq, Lb].
        reference, recall, share_kv_group, capacity: as in `anchor_attention`.
        samples: queries of a block that identify keys; None: their mean does.

    Returns:
        columns with rows = B * H' * superblocks and group = step, H' = Hkv if shared, else Hq.
    """
    thetas, number = (theta, 0.0) if isinstance(theta, Tensor) else (None, theta)
    with torch.no_grad():
        offsets, indices = torch.ops.sparse_attn.anchor_columns(
            query, key, thetas, number, regions.block, regions.step, regions.init_blocks,
            regions.local_blocks, scale, reference, samples, recall, share_kv_group, capacity,
        )  # fmt: skip
    return IndexList(offsets, indices, regions.step)


def _anchor_columns(
    q, k, thetas, theta, block, step, init_blocks, local_blocks, scale, reference, samples, recall,
    share_kv_group, capacity,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    regions = AnchorRegions(q.shape[2], k.shape[2], block, step, init_blocks, local_blocks)
    pool, fill = pool_anchor, fill_columns
    if q.is_cuda and not why_not_kernels(q, regions, scale, samples):
        from sparse_attn.kernels import anchor_select as kernels

        pool, fill = kernels.pool_anchor, kernels.fill_columns
    limit = theta if thetas is None else thetas
    sampling = None if samples is None else Sampling(samples, reference, recall)
    # Autocast would turn the float32 products of the comparison into 16 bit.
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu" and not anchor_cpu.why_not_cpu(q, k, regions, sampling):
            if sampling is None:
                return anchor_cpu.mean_lists(q, k, limit, regions, scale, reference, share_kv_group, capacity)
            return anchor_cpu.sampled_lists(q, k, limit, regions, scale, sampling, share_kv_group, capacity)
        if sampling is not None:
            lists = fill_sampled(q, k, limit, regions, scale, sampling, share_kv_group, capacity)
            return lists.offsets, lists.indices
        anchor, pooled = pool(q, k, regions, scale, reference)
        at_least = anchor - limit
        lists = fill(pooled, k, at_least, regions, scale, share_kv_group, capacity)
    return lists.offsets, lists.indices


def _anchor_columns_fake(
    q, k, thetas, theta, block, step, init_blocks, local_blocks, scale, reference, samples, recall,
    share_kv_group, capacity,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    regions = AnchorRegions(q.shape[2], k.shape[2], block, step, init_blocks, local_blocks)
    heads = k.shape[1] if share_kv_group else q.shape[1]
    if capacity is None:
        capacity = torch.library.get_ctx().new_dynamic_size(min=1)
    rows = q.shape[0] * heads * regions.num_superblocks
    return q.new_empty(rows + 1, dtype=torch.int64), q.new_empty(capacity, dtype=torch.int32)


torch.library.impl("sparse_attn::anchor_columns", ("CPU", "CUDA"), _anchor_columns)
torch.library.register_fake("sparse_attn::anchor_columns", _anchor_columns_fake)


def why_not_kernels(
    query: Tensor, regions: AnchorRegions, scale: float, samples: int | None = None
) -> list[str]:
    """Reasons why the Triton selection cannot run; [] means it can. The PyTorch one runs then."""
    reasons = [] if _has_triton() else ["Triton is not installed"]
    if samples is not None:
        reasons.append("samples is in PyTorch only: the kernels know means of blocks")
    if regions.block not in (16, 32, 64, 128):
        reasons.append(f"block_size {regions.block} is not 16, 32, 64 or 128")
    most = 128 if query.shape[-1] <= 128 else 32  # mean queries of a superblock that shared memory holds
    if regions.step > most:
        reasons.append(f"step {regions.step} is above {most}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"{query.dtype} is not float16, bfloat16 or float32")
    if not 0 < scale < math.inf:
        reasons.append(f"scale {scale} is not positive and finite")
    return reasons


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def pool_anchor(
    query: Tensor, key: Tensor, regions: AnchorRegions, scale: float, reference: str
) -> tuple[Tensor, Tensor]:
    """First pass: what the anchor gives, averaged over each query block.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, S, D].
        reference: "max" or "lse" of the scaled logits of a query in its anchor.

    Returns:
        anchor [B, Hq, Lb], -inf for a block with a query that sees no key, and the mean query
        [B, Hq, Lb, D]; float32 (float64 for float64 input). The largest buffer is
        [B, Hq, block, (init_blocks + local_blocks + step + 1) * block].
    """
    B, Hq, _, D = query.shape
    Hkv, work = key.shape[1], work_dtype(query)
    anchor = torch.empty(B, Hq, regions.num_query_blocks, dtype=work, device=query.device)
    pooled = torch.empty(B, Hq, regions.num_query_blocks, D, dtype=work, device=query.device)
    for i, g, start, stop in regions.query_blocks():
        q = query[:, :, start:stop].to(work)
        pooled[:, :, i] = q.mean(2)
        last = stop - 1 + regions.shift  # the key position of the last query
        if last < 0:
            anchor[:, :, i] = -torch.inf
            continue
        init, local = regions.init_end(g) * regions.block, regions.first_local(g) * regions.block
        k = torch.cat([key[:, :, :init], key[:, :, local : last + 1]], 2).to(work)
        # The query heads of a key head side by side: one product for all.
        logits = (q * scale).reshape(B, Hkv, -1, D) @ k.mT
        logits = logits.view(B, Hq, stop - start, -1)
        # Only keys past the first query's own position are hidden from anyone.
        edge = torch.arange(max(start + regions.shift + 1, 0), last + 1, device=query.device)
        position = torch.arange(start, stop, device=query.device)[:, None] + regions.shift
        logits[..., logits.shape[-1] - edge.numel() :].masked_fill_(edge > position, -torch.inf)
        rows = logits.amax(-1) if reference == "max" else logits.logsumexp(-1)
        anchor[:, :, i] = rows.mean(-1)
    return anchor, pooled


def fill_columns(
    pooled: Tensor,
    key: Tensor,
    at_least: Tensor,
    regions: AnchorRegions,
    scale: float,
    share_kv_group: bool,
    capacity: int | None,
) -> IndexList:
    """Second pass: list the keys whose pooled logit reaches the limit of a query block.

    Args:
        pooled: [B, Hq, Lb, D], mean queries; key: [B, Hkv, S, D].
        at_least: [B, Hq, Lb], the limit: a key enters the list of its superblock if
            `scale * pooled . k >= at_least` for one of the superblock's query blocks.
        share_kv_group: one list for the query heads of a key head, the union of theirs.
        capacity: entries of the result; None: as many as needed (waits for the device).

    Returns:
        columns with rows = B * H' * superblocks and group = step, H' = Hkv if shared, else Hq. Works on
        one key head at a time, with buffers of superblocks * S entries.
    """
    B, Hq, _, D = pooled.shape
    Hkv, group = key.shape[1], Hq // key.shape[1]
    G, S, work = regions.num_superblocks, regions.S, pooled.dtype
    lists = ListFiller(S, capacity, key.device)
    for b in range(B):
        for kv in range(Hkv):
            members = slice(kv * group, (kv + 1) * group)
            q, limit = pooled[b, members], at_least[b, members].to(work)
            k = key[b, kv].to(work)
            hits = torch.zeros(group, G, S, dtype=torch.bool, device=key.device)
            for g in range(G):
                offered = regions.offered_keys(g)
                if not offered:
                    continue
                rows = slice(g * regions.step, (g + 1) * regions.step)
                columns = slice(offered.start, offered.stop)
                logits = (q[:, rows].reshape(-1, D) @ k[columns].T * scale).view(group, -1, len(offered))
                hits[:, g, columns] = (logits >= limit[:, rows, None]).any(1)
            for member in hits.any(0, keepdim=True) if share_kv_group else hits:
                lists.append(member)
    return lists.finish(regions.step)
