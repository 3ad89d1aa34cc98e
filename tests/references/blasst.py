"""BLASST as in Algorithm 1 of arXiv 2512.12087 (section 3.1.2), one query row and one tile at a time, in
float64, with the vote of the released kernels: the maximum *before* the tile, one dissenting row keeps the
tile for all, a row that sees nothing of the tile does not dissent."""

import math

import torch


def blasst(q, k, v, lambdas, *, block_m, block_n, is_causal, scale):
    """q [B, Hq, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], lambdas [B][Hq] plain numbers.

    Returns float64 out [B, Hq, L, Dv] and lse [B, Hq, L], and kept, a set of (b, h, tile row, tile column).
    """
    B, Hq, L, _ = q.shape
    Hkv, S = k.shape[1:3]
    out = torch.zeros(B, Hq, L, v.shape[-1], dtype=torch.float64)
    lse = torch.full((B, Hq, L), -math.inf, dtype=torch.float64)
    kept = set()
    for b in range(B):
        for h in range(Hq):
            kv = h // (Hq // Hkv)
            logits = (q[b, h].double() @ k[b, kv].double().T * scale).tolist()
            values = v[b, kv].double()
            lam = lambdas[b][h]
            log_lambda = math.log(lam) if lam > 0 else -math.inf
            for tile_row in range(math.ceil(L / block_m)):
                rows = range(tile_row * block_m, min((tile_row + 1) * block_m, L))
                m = {i: -math.inf for i in rows}
                total = {i: 0.0 for i in rows}
                acc = {i: torch.zeros(v.shape[-1], dtype=torch.float64) for i in rows}
                for tile_column in range(math.ceil(S / block_n)):
                    keys = range(tile_column * block_n, min((tile_column + 1) * block_n, S))
                    seen = {i: [j for j in keys if not is_causal or j <= i + S - L] for i in rows}
                    tile_max = {i: max((logits[i][j] for j in seen[i]), default=-math.inf) for i in rows}
                    dissent = [
                        i for i in rows if tile_max[i] > -math.inf and not tile_max[i] < m[i] + log_lambda
                    ]
                    if not dissent:
                        continue
                    kept.add((b, h, tile_row, tile_column))
                    for i in rows:
                        m_new = max(m[i], tile_max[i])
                        if m_new == -math.inf:
                            continue
                        fade = math.exp(m[i] - m_new)
                        total[i] *= fade
                        acc[i] *= fade
                        for j in seen[i]:
                            p = math.exp(logits[i][j] - m_new)
                            total[i] += p
                            acc[i] += p * values[j]
                        m[i] = m_new
                for i in rows:
                    if total[i] > 0:
                        out[b, h, i] = acc[i] / total[i]
                        lse[b, h, i] = m[i] + math.log(total[i])
    return out, lse, kept
