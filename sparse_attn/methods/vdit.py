"""Sparse-vDiT (arXiv 2506.03065): one fixed pattern a head for video diffusion transformers.

Heads of such models keep one of a few shapes of attention over prompts: full, a diagonal, several
diagonals at frame distance, vertical stripes, or next to nothing. Which head gets which is found offline;
here the patterns are given, and heads of all kinds run in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import check_inputs
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context, Method, run
from sparse_attn.methods.per_head import join_heads, register_maker, shape_layout
from sparse_attn.methods.vdit_blocks import TokenGrid, head_lists
from sparse_attn.methods.vdit_patterns import Pattern, Skip, parse_pattern
from sparse_attn.plan import Plan


@dataclass(frozen=True)
class VDiTConfig:
    """The patterns of one layer and the geometry of its tokens.

    Attributes:
        patterns: a list with one pattern for each query head, or a single pattern, not in a list, for
            all of them; patterns are objects, strings or dicts (`vdit_patterns.py` lists the forms).
        grid: (frames, height, width) in tokens; video tokens are numbered frame by frame, row by row.
        text_len: text tokens in the sequence (0 where text enters by cross-attention).
        text_first: the text precedes the video (CogVideoX) rather than follows it (HunyuanVideo).
        text_valid: how many of the text tokens, from the first, are real; the others are padding and no
            query reads them. None: all. Fewer needs the text to come last.
        block_size: tokens in a block of queries and of keys.
        skip_value: the output of a skipped head: "zero", as in the paper, or "mean", the mean of value
            over the keys, which is what a head of uniform attention would give.

    Raises:
        ValueError: everything wrong with the values, at once; or a pattern that cannot be read.
    """

    patterns: tuple[Pattern, ...]
    grid: tuple[int, int, int]
    text_len: int = 0
    text_first: bool = False
    text_valid: int | None = None
    block_size: int = 128
    skip_value: str = "zero"
    for_all_heads: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        given: Any = self.patterns
        if isinstance(given, (Pattern, str, Mapping)):
            given = (given,)
            object.__setattr__(self, "for_all_heads", True)
        object.__setattr__(self, "patterns", tuple(parse_pattern(x) for x in given))
        problems = [] if self.patterns else ["patterns is empty; pass one for each query head"]
        grid = tuple(self.grid) if isinstance(self.grid, (list, tuple)) else self.grid
        object.__setattr__(self, "grid", grid)
        if not isinstance(grid, tuple) or len(grid) != 3 or not all(_at_least(1, x) for x in grid):
            problems.append(f"grid is {grid!r}; expected (frames, height, width), integers of at least 1")
        if not _at_least(0, self.text_len):
            problems.append(f"text_len is {self.text_len!r}; it must be an integer of at least 0")
        elif self.text_valid is not None:
            problems += self._check_text_valid()
        if not _at_least(1, self.block_size):
            problems.append(f"block_size is {self.block_size!r}; it must be an integer of at least 1")
        if self.skip_value not in ("zero", "mean"):
            problems.append(f'skip_value is {self.skip_value!r}; choose "zero" or "mean"')
        if problems:
            raise ValueError("vdit_attention: " + "; ".join(problems) + ".")

    def _check_text_valid(self) -> list[str]:
        if not _at_least(0, self.text_valid) or self.text_valid > self.text_len:  # type: ignore[operator]
            return [f"text_valid is {self.text_valid!r}; it must lie between 0 and text_len={self.text_len}"]
        if self.text_first and self.text_valid < self.text_len:  # type: ignore[operator]
            return [
                "text_valid is smaller than text_len while text_first=True; padding between text and video "
                "cannot be left out: put the text last, or shorten it"
            ]
        return []

    @property
    def tokens(self) -> TokenGrid:
        """Where the tokens lie."""
        frames, height, width = self.grid
        valid = self.text_len if self.text_valid is None else self.text_valid
        return TokenGrid(frames, height * width, self.text_len, valid, self.text_first, self.block_size)


def _at_least(low: int, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def vdit_layout(config: VDiTConfig, device: torch.device | str | None = None) -> SparseLayout:
    """The layout of one layer, from the cache where it was seen before.

    Each distinct pattern becomes a list once; the heads are then joined. `L` is the number of all
    tokens, `S` leaves out padded text.

    Returns:
        A layout with one head for each pattern, or one head where all patterns are equal.

    Raises:
        ValueError: a stripe column outside the video.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    patterns = config.patterns[:1] if len(set(config.patterns)) == 1 else config.patterns
    args = (tuple(str(x) for x in patterns), astuple(config.tokens))
    return shape_layout("vdit", args, device, is_causal=False)


def _build(specs: tuple[str, ...], tokens_of: tuple[Any, ...], *, device: torch.device) -> SparseLayout:
    """Makes what `vdit_layout` gives, from the patterns and the `TokenGrid` as literals."""
    patterns, tokens = [parse_pattern(x) for x in specs], TokenGrid(*tokens_of)
    distinct = list(dict.fromkeys(patterns))
    number = [distinct.index(x) for x in patterns]
    lists = [head_lists(x, tokens, device) for x in distinct]
    columns = None
    if any(x is not None for _, x in lists):
        # Heads without columns get empty rows.
        nothing = head_lists(Skip(), tokens, device)[0]
        columns = join_heads([nothing if x is None else x for _, x in lists], number)
    blocks = join_heads([x for x, _ in lists], number)
    size = tokens.block_size
    return SparseLayout(blocks, size, size, tokens.L, tokens.S, 1, len(patterns), columns)


# A recipe of 60 layers at 120k tokens holds about this much.
register_maker("vdit", _build, max_bytes=512 << 20)


def vdit_densities(config: VDiTConfig) -> list[float]:
    """The share of all (query, key) pairs that each pattern attends: 1 - S_i in the paper's terms.

    Counted to the token on the layout, text and block rounding included; one number a pattern.
    """
    share = vdit_layout(config, "cpu").density(per_head=True)[0].tolist()
    return share * len(config.patterns) if len(share) == 1 else share


def diagonal_width(density: float, frames: int, frame_size: int, text_len: int = 0) -> float:
    """The half-width in frames at which a diagonal, with dense text, keeps a given share of all pairs.

    A band |i - j| < w covers 1 - (1 - w/N)^2 of N x N pairs; the text's rows and columns cost about
    2 * text_len / N. (This is how Sparse-VideoGen, arXiv 2502.01776, sets its bands.)

    Raises:
        ValueError: a density above 1 or too small for the text alone.
    """
    N = frames * frame_size + text_len
    band = density - 2 * text_len / N
    if not 0 < band <= 1 or density > 1:
        raise ValueError(
            f"diagonal_width: density is {density}; it must lie above {2 * text_len / N:.4f}, which the "
            "text takes, and be at most 1."
        )
    return N * (1 - (1 - band) ** 0.5) / frame_size


def select(
    query: Tensor, key: Tensor, config: VDiTConfig, *, is_causal: bool, scale: float, context: Context
) -> Plan:
    """The plan of one call; reads only shapes and the device. `key` comes without padded text.

    Raises:
        ValueError: the grid, the lengths or the number of patterns do not fit.
    """
    tokens, problems = config.tokens, []
    frames, height, width = config.grid
    L, S, heads = query.shape[2], key.shape[2], query.shape[1]
    if tokens.L != L:
        problems.append(
            f"grid {frames}x{height}x{width} holds {tokens.num_video} video tokens, with {config.text_len} "
            f"text tokens {tokens.L}, but query has {L} tokens; pass the grid and text_len of this sequence"
        )
    elif tokens.S != S:
        left_out = f" less {config.text_len - tokens.text_valid} of padded text" if tokens.S < L else ""
        problems.append(
            f"key has {S} tokens and query {L}; this is self-attention: key must have {tokens.S}"
            f"{left_out} (leave cross-attention dense)"
        )
    if len(config.patterns) != heads and not config.for_all_heads:
        problems.append(
            f"patterns has {len(config.patterns)} entries but query has {heads} heads; pass one a head"
        )
    if is_causal and config.skip_value == "mean" and any(isinstance(x, Skip) for x in config.patterns):
        problems.append('skip_value="mean" is the mean over all keys; pass is_causal=False or "zero"')
    if problems:
        raise ValueError("vdit_attention: " + "; ".join(problems) + ".")
    return Plan(vdit_layout(config, query.device))


def finish(out: Tensor, value: Tensor, config: VDiTConfig) -> Tensor:
    """Fill the skipped heads with the mean of value, if the config asks for it."""
    heads, group = out.shape[1], out.shape[1] // value.shape[1]
    patterns = config.patterns * heads if config.for_all_heads else config.patterns
    skipped = [h for h, pattern in enumerate(patterns) if isinstance(pattern, Skip)]
    if config.skip_value == "zero" or not skipped:
        return out
    at = torch.tensor(skipped, device=out.device)
    mean = value.mean(2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))
    fill = mean[:, at // group].to(out.dtype).expand(-1, -1, out.shape[2], -1)
    # Where autograd has kept `out` for the backward pass, it must not change.
    return out.index_copy(1, at, fill) if out.requires_grad else out.index_copy_(1, at, fill)


def vdit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    patterns: Sequence[Pattern | str | Mapping[str, Any]] | Pattern | str,
    grid: tuple[int, int, int],
    text_len: int = 0,
    text_first: bool = False,
    text_valid: int | None = None,
    block_size: int = 128,
    skip_value: str = "zero",
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    engine: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse-vDiT (arXiv 2506.03065): self-attention over video (and text) tokens, one pattern a head.

    A query block reads a key block when the head's pattern holds for any of their pairs; text queries
    read everything and everything reads text. All heads, whatever their patterns, run in one call.

    Args:
        query: [B, Hq, N, D] float16, bfloat16 or float32; key: [B, Hkv, N, D]; value: [B, Hkv, N, Dv].
            N = F * H * W + text_len.
        patterns: one for each query head, or one for all: `"full"`, `"skip"`, `"diagonal:0.5"`,
            `"multi_diagonal:64t,stride=2"`, `"vertical_stripe:first_frame"`, the same as dicts or as
            objects; all forms are in `sparse_attn/methods/vdit_patterns.py`.
        grid: (F, H, W), the token grid: frames, height and width.
        text_len: text tokens; default 0.
        text_first: the text comes before the video; default after.
        text_valid: real text tokens; the padding after them is not read. Default all. Text last only.
        block_size: tokens a block; default 128.
        skip_value: output of a skipped head, "zero" (default, its lse is -inf) or "mean" of value.
        is_causal: also cut above the diagonal; default False, as in diffusion models.
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the natural log-sum-exp, float32 [B, Hq, N].
        engine: insist on an engine by name.

    Returns:
        out [B, Hq, N, Dv], or (out, lse).

    Raises:
        ValueError: a bad argument. NotImplementedError: no engine can run the call.

    Example:
        >>> q = torch.randn(1, 4, 5 * 12 * 20 + 26, 64)
        >>> patterns = ["full", "diagonal:1", "multi_diagonal:32t", "skip"]
        >>> out = vdit_attention(q, q, q, patterns=patterns, grid=(5, 12, 20), text_len=26)
    """
    config = VDiTConfig(patterns, grid, text_len, text_first, text_valid, block_size, skip_value)  # type: ignore[arg-type]
    num_keys, num_all = config.tokens.S, config.tokens.L
    if num_keys < num_all:
        check_inputs("vdit_attention", query, key, value, enable_gqa)
        if key.shape[2] == num_all:
            key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    result = run(
        VDIT,
        query,
        key,
        value,
        config,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        engine=engine,
    )
    return (result.out, result.lse) if return_lse else result.out


VDIT = Method("vdit", VDiTConfig, select, vdit_attention, causal=False, finish=finish, by_shape=True)
