"""AnchorAttention's identification by a few single queries of each block instead of the block's mean.

A mean of queries says little about what one of them looks for: the mean of exponentials is not the
exponential of the mean. Here `samples` queries of each block meet every key that they see, and a key is
listed if one of them wants it. Since their softmax is then known exactly, theta can follow from a share of
the mass that is to be kept (`recall`): what the lists of the other samples keep for a sample is about what
all of them keep for the queries that were not sampled.

Plain PyTorch, for every device; it works through a key head in chunks of superblocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.methods.anchor_lists import ListFiller, work_dtype
from sparse_attn.methods.anchor_regions import AnchorRegions

THETA_STEP, THETA_STEPS = 0.5, 32  # what `recall` chooses from: 0, 0.5 .. 16, then infinity
MEASURE_EVERY = 4  # superblocks for each that is measured; 1 gains nothing on SmolLM2 and costs a third more
_CHUNK_CPU, _CHUNK_GPU = 1 << 18, 1 << 26  # logits held at once: what stays in a cache; what fills a GPU


@dataclass(frozen=True)
class Sampling:
    """How keys are identified; fields as in `anchor_attention`.

    Attributes:
        samples: queries of a block. reference: "max", "lse" or "all". recall: None: theta is given.
    """

    samples: int
    reference: str
    recall: float | None


def fill_sampled(
    query: Tensor,
    key: Tensor,
    theta: float | Tensor,
    regions: AnchorRegions,
    scale: float,
    sampling: Sampling,
    share_kv_group: bool,
    capacity: int | None,
) -> IndexList:
    """The columns of every superblock.

    Args:
        query: [B, Hq, L, D]; key: [B, Hkv, S, D].
        theta: a number, or a tensor that broadcasts to [B, Hq, Lb] and is the same in a superblock.
        capacity: as in `anchor_select.fill_columns`.

    Returns:
        columns with rows = B * H' * superblocks and group = step, H' = Hkv if shared, else Hq.
    """
    B, Hq, S = query.shape[0], query.shape[1], regions.S
    group, G = Hq // key.shape[1], regions.num_superblocks
    places, valid = sampled_queries(regions, sampling.samples, query.device)
    theta = theta.expand(B, Hq, regions.num_query_blocks) if isinstance(theta, Tensor) else theta
    lists = ListFiller(S, capacity, key.device)
    for b in range(B):
        for kv in range(key.shape[1]):
            members = slice(kv * group, (kv + 1) * group)
            q = query[b, members][:, places].to(work_dtype(query)) * scale  # [group, G, R, D]
            k = key[b, kv].to(q.dtype)
            limit = theta[b, members, :: regions.step] if isinstance(theta, Tensor) else theta
            hits = torch.zeros(group, G, S, dtype=torch.bool, device=key.device)
            _fill_head(hits, q, k, places, valid, limit, regions, sampling)
            for member in hits.any(0, keepdim=True) if share_kv_group else hits:
                lists.append(member)
    return lists.finish(regions.step)


def sampled_queries(regions: AnchorRegions, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which queries speak for a superblock: numbers, int64 [G, R], and whether each is one, bool [G, R].

    Of a block of n queries it is c = min(samples, n) of them, in the middle of c equal parts.
    """
    block, L, G = regions.block, regions.L, regions.num_superblocks
    start = torch.arange(G * regions.step, device=device)[:, None] * block
    size = (L - start).clamp(0, block)
    count = size.clamp(max=samples)
    j = torch.arange(samples, device=device)
    place = start + torch.div((2 * j + 1) * size, (2 * count).clamp(min=1), rounding_mode="floor")
    valid = j < count
    return torch.where(valid, place, 0).view(G, -1), valid.view(G, -1)


def _fill_head(
    hits: Tensor,
    q: Tensor,
    k: Tensor,
    places: Tensor,
    valid: Tensor,
    limit: float | Tensor,
    regions: AnchorRegions,
    sampling: Sampling,
) -> None:
    """Set `hits` [group, G, S] for the query heads of one key head; `limit` a number or [group, G]."""
    least: Tensor | float
    group, G, R, _ = q.shape
    first = next((g for g in range(G) if regions.offered_keys(g)), G)
    chunk = max((_CHUNK_CPU if q.device.type == "cpu" else _CHUNK_GPU) // (group * R * regions.S), 1)
    span, begin = regions.step * regions.block, regions.init_blocks * regions.block
    kept = _Kept(group, first, q)
    for a in range(first, G, chunk):
        z = min(a + chunk, G)
        end = min(z * span, regions.L) + regions.shift
        x = (q[:, a:z].flatten(0, 2) @ k[:end].T).view(group, z - a, R, end)
        # Only keys past the first query's own position are hidden from anyone.
        edge = torch.arange(a * span + regions.shift + 1, end, device=q.device)
        hidden = edge > places[a:z, :, None] + regions.shift
        # On a CPU a sum is several times faster than masked_fill_.
        x[..., end - edge.numel() :] += torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(
            hidden, -torch.inf
        )
        if z * span > regions.L:  # a ragged end may have fewer samples
            x.masked_fill_(~valid[a:z, :, None], -torch.inf)

        superblock = torch.arange(a, z, device=q.device)
        local = torch.div(superblock * span + regions.shift, regions.block, rounding_mode="floor")
        local = (local - regions.local_blocks) * regions.block  # [superblocks], the end of what is offered
        stop = regions.offered_keys(z - 1).stop
        offered = torch.arange(begin, stop, device=q.device) < local[:, None]
        if sampling.recall is not None:
            share = _softmax_(x)[..., begin:stop]
            thetas = kept.theta(share, offered, valid[a:z], a, sampling.recall)
            best, least = share.amax(2), torch.exp(-thetas)[..., None]
        else:
            reference = _reference(x, begin, local, sampling.reference)
            # A place without a sample has -inf twice.
            best = (x[..., begin:stop] - reference[..., None]).nan_to_num_(nan=-torch.inf).amax(2)
            least = -limit[:, a:z, None] if isinstance(limit, Tensor) else -limit
        hits[:, a:z, begin:stop] = (best >= least) & offered


def _softmax_(x: Tensor) -> Tensor:
    """In place, over the last dimension; a row of -inf gives zeros."""
    x.sub_(x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)).exp_()
    return x.mul_(1 / x.sum(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny))


def _reference(x: Tensor, begin: int, local: Tensor, kind: str) -> Tensor:
    """What a sample's logits x [group, superblocks, R, keys] are compared with: [group, superblocks, R]."""
    if kind == "all":
        return x.logsumexp(-1)
    keys = torch.arange(x.shape[-1], device=x.device)
    outside = (keys >= begin) & (keys < local[:, None])
    anchor = x.masked_fill(outside[:, None], -torch.inf)
    return anchor.amax(-1) if kind == "max" else anchor.logsumexp(-1)


class _Kept:
    """How much mass of a sample each theta keeps, if the other samples of its superblock choose.

    Measured in the superblocks first, first + MEASURE_EVERY, ..; a superblock's theta follows from all that
    were measured up to it, so that no later query has a say.
    """

    def __init__(self, group: int, first: int, like: Tensor) -> None:
        self.first = first
        # By the least theta that keeps it; the last place is for what only infinity does.
        self.mass = torch.zeros(group, 1, THETA_STEPS + 2, dtype=torch.float64, device=like.device)
        self.samples = torch.zeros(1, dtype=torch.float64, device=like.device)

    def theta(self, share: Tensor, offered: Tensor, valid: Tensor, a: int, recall: float) -> Tensor:
        """For each superblock of a chunk that starts with number a: [group, superblocks].

        share: [group, superblocks, R, keys], of a key in a sample's mass; offered [superblocks, keys]; valid
        [superblocks, R].
        """
        skip = -(a - self.first) % MEASURE_EVERY
        if skip < share.shape[1]:
            measured = slice(skip, None, MEASURE_EVERY)
            mass, samples = _kept_mass(share[:, measured], offered[measured], valid[measured])
            self.mass = torch.cat([self.mass, mass], 1).cumsum(1)
            self.samples = torch.cat([self.samples, samples]).cumsum(0)
        reached = self.mass.cumsum(-1) >= recall * self.samples[:, None]
        steps = (~reached).sum(-1).to(share.dtype)  # [group, 1 + measured]
        thetas = torch.where(steps > THETA_STEPS, torch.inf, steps * THETA_STEP)
        # How many of the chunk's measured ones lie at or before each superblock.
        number = torch.arange(share.shape[1], device=share.device)
        number = torch.div(number - skip + MEASURE_EVERY, MEASURE_EVERY, rounding_mode="floor")
        thetas = thetas[:, number]
        self.mass, self.samples = self.mass[:, -1:], self.samples[-1:]
        return thetas


def _kept_mass(share: Tensor, offered: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the samples of a superblock: mass by the least theta that keeps it, float64 [group,
    superblocks, THETA_STEPS + 2], and their number, float64 [superblocks]."""
    best = share[:, :, 0]
    second = torch.zeros_like(best)
    for x in share.unbind(2)[1:]:
        second = torch.maximum(second, torch.minimum(best, x))
        best = torch.maximum(best, x)
    # For the sample that wants a key most the second best speaks, for all others the best.
    total, top = share.sum(2).mul_(offered), best * offered
    count = valid.sum(-1).to(torch.float64)
    mass = torch.zeros(*best.shape[:2], THETA_STEPS + 2, dtype=torch.float64, device=share.device)
    mass.scatter_add_(-1, _least_theta(best), (total - top).double())
    mass.scatter_add_(-1, _least_theta(second), top.double())
    mass[..., 0] += count - total.sum(-1, dtype=torch.float64)  # the anchor's, always kept
    return mass, count


def _least_theta(best: Tensor) -> Tensor:
    """The number of the least theta with best >= exp(-theta)."""
    return best.log().mul_(-1 / THETA_STEP).ceil_().clamp_(0, THETA_STEPS + 1).long()
