"""From patterns on a grid of video tokens to blocks and columns of a layout.

A query block reads a key block if the pattern holds for any pair of a query in the one and a key in
the other. Text is always dense: a block with a text query reads every key block, a block with a text
key is read by every query block. Ragged last blocks, frame edges inside a block and blocks that hold both
text and video need no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.index_list import IndexList
from sparse_attn.methods.vdit_patterns import Full, Pattern, Skip, Union, VerticalStripe, _Banded


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a sequence lie.

    Attributes:
        frames, frame_size: video tokens are `frames` times `frame_size`, frame by frame.
        text_len: text tokens, as queries.
        text_valid: text tokens as keys, the first of them; fewer only where the text comes last.
        text_first: text before video rather than after.
        block_size: tokens in a block of queries and of keys.
    """

    frames: int
    frame_size: int
    text_len: int
    text_valid: int
    text_first: bool
    block_size: int

    @property
    def num_video(self) -> int:
        return self.frames * self.frame_size

    @property
    def L(self) -> int:
        return self.num_video + self.text_len

    @property
    def S(self) -> int:
        return self.num_video + self.text_valid

    @property
    def video_start(self) -> int:
        """Position of video token 0."""
        return self.text_len if self.text_first else 0

    def blocks(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each block of a sequence of `length`: its first and last video token, whether it has a
        video token at all, and whether it has a text token. [num_blocks] each."""
        size, start = self.block_size, self.video_start
        low = torch.arange(0, length, size, device=device)
        high = (low + size).clamp(max=length) - 1
        first, last = low.clamp(min=start) - start, high.clamp(max=start + self.num_video - 1) - start
        return first, last, first <= last, (low < start) | (high >= start + self.num_video)


def head_lists(
    pattern: Pattern, tokens: TokenGrid, device: torch.device
) -> tuple[IndexList, IndexList | None]:
    """The block list and, for single-key stripes, the column list (group 1) of one head."""
    q_first, q_last, q_video, q_text = tokens.blocks(tokens.L, device)
    k_first, k_last, k_video, k_text = tokens.blocks(tokens.S, device)
    mask = torch.zeros(q_first.numel(), k_first.numel(), dtype=torch.bool, device=device)
    if isinstance(pattern, Skip):
        return IndexList.from_mask(mask), None
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    columns: list[Tensor] = []
    for part in parts:
        if isinstance(part, Full):
            mask.fill_(True)
        elif isinstance(part, _Banded):
            mask |= _band(part, tokens, (q_first, q_last), (k_first, k_last))
        elif isinstance(part, VerticalStripe):
            numbers = torch.tensor(part.column_numbers(tokens.frames, tokens.frame_size), device=device)
            if part.single:
                columns.append(numbers + tokens.video_start)
            else:
                mask[:, (numbers + tokens.video_start) // tokens.block_size] = True
    mask &= q_video[:, None] & k_video
    mask |= q_text[:, None] | k_text
    block_list = IndexList.from_mask(mask)
    if not columns:
        return block_list, None
    return block_list, _columns_outside(mask, torch.cat(columns).unique(), tokens.block_size)


def _band(
    band: _Banded, tokens: TokenGrid, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]
) -> Tensor:
    """bool [Lb, Sb]: some key lies within the half-width of some query's diagonal.

    The distances vk - vq between two blocks are all the integers of an interval, so the question is
    whether a diagonal offset n * P lies in that interval widened by the half-width."""
    reach = band.half_width(tokens.frame_size) - 1
    beyond_all = tokens.L + tokens.S + reach + 1
    numbers = [n * tokens.frame_size for n in band.lag_numbers(tokens.frames)] + [beyond_all]
    offsets = torch.tensor(numbers, device=queries[0].device)
    low = keys[0] - queries[1][:, None] - reach
    high = keys[1] - queries[0][:, None] + reach
    return offsets[torch.searchsorted(offsets, low)] <= high


def _columns_outside(mask: Tensor, columns: Tensor, block_size: int) -> IndexList:
    """The columns as a list for every query block, without those inside blocks that it reads."""
    rows = IndexList.from_mask(~mask[:, columns // block_size])
    return IndexList(rows.offsets, columns.to(torch.int32)[rows.indices.long()])
