"""S2-Attention (arXiv 2407.17678) written out one (query, key) pair at a time, from the definition."""

from __future__ import annotations


def shift_rule(config, num_heads: int, num_kv_heads: int) -> list[int | None]:
    """The shift of each global pattern head; None for a dense one."""
    count = num_heads if config.per_query_head else num_kv_heads
    shifts: list[int | None] = []
    for h in range(count):
        key_head = h // (num_heads // num_kv_heads) if config.per_query_head else h
        if key_head >= num_kv_heads - config.num_dense_heads:
            shifts.append(None)
        elif config.head_shift is None and count >= config.vert_stride:
            shifts.append(h + config.shift_offset)
        elif config.head_shift is None:
            shifts.append(int(h * config.vert_stride / count) + config.shift_offset)
        elif config.head_shift == "dkernel":
            shifts.append(h * max(1, int(config.vert_stride / num_heads)) + config.shift_offset)
        elif isinstance(config.head_shift, tuple):
            shifts.append(config.head_shift[h] + config.shift_offset)
        else:
            shifts.append(h * config.head_shift + config.shift_offset)
    return shifts


def reads(config, shift: int | None, query: int, key: int, L: int, S: int, is_causal: bool) -> bool:
    """Whether the pattern lets one query look at the block of one key (before the causal edge)."""
    c = (query + S - L) // config.block_size  # floors, also for a position before the first key
    j = key // config.block_size
    if is_causal and j > c:
        return False
    if shift is None or j < config.sink_blocks:
        return True
    distance = c - j if is_causal else abs(c - j)
    return distance < config.local_blocks or (j + shift) % config.vert_stride == 0


def token_mask(config, shift: int | None, L: int, S: int, is_causal: bool) -> list[list[bool]]:
    """[L][S]: the attended pairs of one head, the causal edge included."""
    return [
        [
            reads(config, shift, query, key, L, S, is_causal) and (not is_causal or key <= query + S - L)
            for key in range(S)
        ]
        for query in range(L)
    ]


def block_mask(config, shift: int | None, L: int, S: int, is_causal: bool) -> list[list[bool]]:
    """[Lb][Sb]: a query block reads a key block if any of its queries does."""
    size = config.block_size
    return [
        [
            any(
                reads(config, shift, query, j * size, L, S, is_causal)
                for query in range(i * size, min((i + 1) * size, L))
            )
            for j in range(-(-S // size))
        ]
        for i in range(-(-L // size))
    ]
