"""AnchorAttention's identification, key by key in float64, from the formulas of arXiv 2505.23520 with the
regions of the authors' first kernel: first blocks, the block before the superblock, the superblock.

And our extensions, as literally: more blocks before the superblock, single queries instead of means, a
theta that follows from a share of the mass."""

import math


def anchor(
    q, k, *, block, step, init_blocks, scale, reference="max", local_blocks=1, samples=None
):  # fmt: skip
    """q [B, Hq, L, D], k [B, Hkv, S, D]. samples: None for the published rule.

    Returns a dict (b, h, g) -> ({query of superblock g: set of its anchor keys}, {key: gap}). The gap of a
    key outside the anchor is the least (pooled anchor - pooled logit) over the query blocks, or the least
    (anchor - logit) over the sampled queries: it is read if gap <= theta.
    """
    result = {}
    for at, queries, logits, anchor_of, outside in _superblocks(
        q, k, block, step, init_blocks, scale, local_blocks
    ):
        gaps = {j: math.inf for j in outside}
        shift = k.shape[2] - q.shape[2]
        if samples is None:
            speakers = [
                _rows(start, block, q.shape[2]) for start in range(queries[0], queries[-1] + 1, block)
            ]
        else:
            speakers = [[i] for i in sampled(queries, block, samples)]
        for rows in speakers:
            x_a = []
            for i in rows:
                keys = range(i + shift + 1) if reference == "all" else anchor_of[i]
                x_a.append(_reference([logits[i][j] for j in keys], reference))
            for j in outside:
                logit = sum(logits[i][j] for i in rows) / len(rows)
                gaps[j] = min(gaps[j], sum(x_a) / len(x_a) - logit)
        result[at] = (anchor_of, gaps)
    return result


def recall_thetas(q, k, *, block, step, init_blocks, scale, recall, local_blocks=1, samples=4, every=4):
    """dict (b, h, g) -> theta, for the superblocks that are offered keys.

    A sample keeps, at some theta, its anchor and the keys outside whose share in the mass of one of the
    *other* samples of its superblock is at least exp(-theta). Theta is the first of 0, 0.5 .. 16, inf at
    which the mean kept mass of all samples so far reaches `recall`; only every fourth superblock counts.
    """
    kept, result, shift = {}, {}, k.shape[2] - q.shape[2]
    for (b, h, g), queries, logits, _, outside in _superblocks(
        q, k, block, step, init_blocks, scale, local_blocks
    ):
        if not outside:
            continue
        so_far = kept.setdefault((b, h), {"first": g, "samples": []})
        if (g - so_far["first"]) % every == 0:
            shares = []
            for i in sampled(queries, block, samples):
                seen = logits[i][: i + shift + 1]
                total = _reference(seen, "all")
                shares.append({j: math.exp(x - total) for j, x in enumerate(seen)})
            for n, own in enumerate(shares):
                others = shares[:n] + shares[n + 1 :]
                so_far["samples"].append((own, {j: max((x[j] for x in others), default=0) for j in outside}))
        for theta in [0.5 * n for n in range(33)] + [math.inf]:
            least = math.exp(-theta)
            masses = [
                sum(p for j, p in own.items() if j not in best or best[j] >= least)
                for own, best in so_far["samples"]
            ]
            if sum(masses) >= recall * len(masses):
                break
        result[b, h, g] = theta
    return result


def sampled(queries, block, samples):
    """The middles of `samples` equal parts of each block."""
    found = []
    for start in range(queries[0], queries[-1] + 1, block):
        size = min(block, queries[-1] + 1 - start)
        count = min(samples, size)
        found += [start + (2 * n + 1) * size // (2 * count) for n in range(count)]
    return found


def _superblocks(q, k, block, step, init_blocks, scale, local_blocks):
    """Yields (b, h, g), its queries, logits of the head, anchor keys of each query, keys outside."""
    B, Hq, L, _ = q.shape
    Hkv, S = k.shape[1:3]
    shift = S - L
    for b in range(B):
        for h in range(Hq):
            kv = h // (Hq // Hkv)
            logits = (q[b, h].double() @ k[b, kv].double().T * scale).tolist()
            for g in range(math.ceil(L / (block * step))):
                queries = range(g * block * step, min((g + 1) * block * step, L))
                first = queries[0] + shift
                # whole key blocks that hold the superblock and `local_blocks` blocks of keys before it
                local_from = max((first // block - local_blocks) * block, 0)
                anchor_of = {
                    i: {j for j in range(0, i + shift + 1) if j < init_blocks * block or j >= local_from}
                    for i in queries
                }
                yield (b, h, g), queries, logits, anchor_of, range(init_blocks * block, local_from)


def _reference(logits, kind):
    top = max(logits, default=-math.inf)
    if kind == "max" or not logits:
        return top
    return top + math.log(sum(math.exp(x - top) for x in logits))


def _rows(start, block, L):
    return range(start, min(start + block, L))
