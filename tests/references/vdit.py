"""Sparse-vDiT patterns written out one (query, key) pair of tokens at a time, from their definitions."""

from __future__ import annotations

from sparse_attn.methods import vdit_patterns as vp


def video_number(position: int, config, length: int) -> int | None:
    """The video-token number at a position of the sequence; None for text."""
    frames, height, width = config.grid
    number = position - (config.text_len if config.text_first else 0)
    assert 0 <= position < length
    return number if 0 <= number < frames * height * width else None


def holds(pattern, vq: int, vk: int, grid) -> bool:
    """Whether a head of this pattern lets video token vq read video token vk (whole-block stripes and
    single-key stripes alike)."""
    frames, height, width = grid
    P = height * width
    if isinstance(pattern, vp.Full):
        return True
    if isinstance(pattern, vp.Union):
        return any(holds(part, vq, vk, grid) for part in pattern.parts)
    if isinstance(pattern, vp.VerticalStripe):
        if pattern.columns == "first_frame":
            return vk < P
        if isinstance(pattern.columns, int):
            count, V = pattern.columns, frames * P
            return any(vk == (2 * i + 1) * V // (2 * count) for i in range(count))
        return vk in pattern.columns
    reach = max(1, round(pattern.width * P)) if pattern.unit == "frames" else int(pattern.width)
    if isinstance(pattern, vp.Diagonal):
        return abs(vk - vq) < reach
    for n in range(-(frames - 1), frames):
        if pattern.lags is not None:
            wanted = abs(n) in pattern.lags
        else:
            wanted = abs(n) % pattern.stride == 0 and (pattern.max_lag is None or abs(n) <= pattern.max_lag)
        if wanted and abs(vk - vq - n * P) < reach:
            return True
    return False


def parts_of(pattern):
    return pattern.parts if isinstance(pattern, vp.Union) else (pattern,)


def head_masks(pattern, config):
    """What one head reads: block mask [Lb][Sb], and the set of single keys of each query block."""
    frames, height, width = config.grid
    V, size = frames * height * width, config.block_size
    L = V + config.text_len
    S = V + (config.text_len if config.text_valid is None else config.text_valid)
    Lb, Sb = -(-L // size), -(-S // size)
    blocks = [[False] * Sb for _ in range(Lb)]
    singles: list[set[int]] = [set() for _ in range(Lb)]
    if isinstance(pattern, vp.Skip):
        return blocks, singles
    whole = [x for x in parts_of(pattern) if not getattr(x, "single", False)]
    alone = [x for x in parts_of(pattern) if getattr(x, "single", False)]
    for q in range(L):
        for k in range(S):
            vq, vk = video_number(q, config, L), video_number(k, config, L)
            if vq is None or vk is None or any(holds(x, vq, vk, config.grid) for x in whole):
                blocks[q // size][k // size] = True
    for k in range(S):
        vk = video_number(k, config, L)
        if vk is not None and any(holds(x, 0, vk, config.grid) for x in alone):
            for i in range(Lb):
                if not blocks[i][k // size]:
                    singles[i].add(k)
    return blocks, singles
