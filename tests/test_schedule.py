"""Rows of 64 queries walked in pairs (`schedule.merged_pairs`), which only an H100 executes."""

from __future__ import annotations

import pytest
import torch

from sparse_attn.layout import SparseLayout
from sparse_attn.schedule import merged_pairs, row_order

HEADS = 3


@pytest.mark.parametrize(("L", "S"), [(700, 700), (450, 900), (300, 130)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_n", [64, 128])
def test_pairs_hold_both_rows_and_know_what_needs_no_mask(block_n, causal, L, S):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, HEADS, -(-L // 64), -(-S // block_n), generator=generator) < 0.6
    layout = SparseLayout.from_dense_mask(mask, block_m=64, block_n=block_n, L=L, S=S)
    order = row_order(layout, causal)
    rows = merged_pairs(layout, causal, order)
    pairs = -(-layout.num_query_blocks // 2)
    some_unmasked = 0
    for row in range(HEADS * pairs):
        head, place = divmod(row, pairs)
        words = rows.indices[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        unmasked, visible = rows.bounds[row].tolist()
        members = order[head, 2 * place : 2 * place + 2].tolist()
        for bit in range(2):
            listed = {x >> 2 for x in words if x >> bit & 1}
            wanted = mask[0, head, members[bit]].nonzero().flatten().tolist() if bit < len(members) else []
            assert listed == set(wanted)
        assert len({x >> 2 for x in words}) == len(words)
        needs_no_mask = [_is_whole(x, members, block_n, causal, L, S) for x in words]
        assert all(needs_no_mask[:unmasked]) and 0 <= unmasked <= visible <= len(words)
        assert not any(_is_seen(x, members, block_n, causal, L, S) for x in words[visible:])
        if block_n == 64:  # all of them come first
            assert not any(needs_no_mask[unmasked:])
        else:  # in list order, which a skip rule needs
            assert words == sorted(words)
            assert unmasked == len(words) or not needs_no_mask[unmasked]
        some_unmasked += unmasked
    assert some_unmasked > 0 or S < 256


def _is_whole(word: int, members: list[int], block_n: int, causal: bool, L: int, S: int) -> bool:
    end = ((word >> 2) + 1) * block_n
    return word & 3 == 3 and end <= S and (not causal or all(end - 1 <= x * 64 + S - L for x in members))


def _is_seen(word: int, members: list[int], block_n: int, causal: bool, L: int, S: int) -> bool:
    first = (word >> 2) * block_n
    return not causal or any(first <= min(x * 64 + 63, L - 1) + S - L for x in members)
