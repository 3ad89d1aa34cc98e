"""AnchorAttention's identification, key by key in float64, from the formulas of arXiv 2505.23520 with the
regions of the authors' first kernel: first blocks, the block before the superblock, the superblock."""

import math


def anchor(q, k, *, block, step, init_blocks, scale, reference="max"):
    """q [B, Hq, L, D], k [B, Hkv, S, D].

    Returns a dict (b, h, g) -> ({query of superblock g: set of its anchor keys}, {key: gap}). The gap of a
    key outside the anchor is the least (pooled anchor - pooled logit) over the query blocks: it is read if
    gap <= theta.
    """
    B, Hq, L, _ = q.shape
    Hkv, S = k.shape[1:3]
    shift = S - L
    result = {}
    for b in range(B):
        for h in range(Hq):
            kv = h // (Hq // Hkv)
            logits = (q[b, h].double() @ k[b, kv].double().T * scale).tolist()
            for g in range(math.ceil(L / (block * step))):
                queries = range(g * block * step, min((g + 1) * block * step, L))
                first = queries[0] + shift
                # whole key blocks that hold the superblock and at least `block` keys before it
                local_from = max((first // block - 1) * block, 0)
                anchor_of = {}
                for i in queries:
                    visible = range(0, i + shift + 1)
                    anchor_of[i] = {j for j in visible if j < init_blocks * block or j >= local_from}
                pooled_anchor = {}
                for start in range(queries[0], queries[-1] + 1, block):
                    x_a = []
                    for i in _rows(start, block, L):
                        seen = [logits[i][j] for j in anchor_of[i]]
                        top = max(seen, default=-math.inf)
                        if reference == "lse" and seen:
                            top += math.log(sum(math.exp(x - top) for x in seen))
                        x_a.append(top)
                    pooled_anchor[start] = sum(x_a) / len(x_a)
                gaps = {}
                for j in range(init_blocks * block, local_from):
                    gaps[j] = math.inf
                    for start in pooled_anchor:
                        rows = _rows(start, block, L)
                        pooled_logit = sum(logits[i][j] for i in rows) / len(rows)
                        gaps[j] = min(gaps[j], pooled_anchor[start] - pooled_logit)
                result[b, h, g] = (anchor_of, gaps)
    return result


def _rows(start, block, L):
    return range(start, min(start + block, L))
