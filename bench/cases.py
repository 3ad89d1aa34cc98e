"""What is measured, as data: shapes of real models, sparsity patterns, cases and bars.

Nothing here touches a tensor. A case is one attention problem; a bar is one claim about a row that a
suite measures, so that the table of bars and the exit status follow from this file alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The self-attention of one layer of a published model at a length that it is used at.

    Attributes:
        grid: (frames, height, width) of the video tokens, text_len tokens of text beside them.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    length: int
    is_causal: bool
    grid: tuple[int, int, int] | None = None
    text_len: int = 0
    text_first: bool = False


# Lengths of the video models are those of their published resolutions; see docs/benchmarks.md.
SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128, 32768, True),
    "qwen2.5-7b": Shape(28, 4, 128, 32768, True),
    "qwen3-8b": Shape(32, 8, 128, 32768, True),
    "llada-8b": Shape(32, 32, 128, 16384, False),
    "hunyuan-video-720p": Shape(24, 24, 128, 119_056, False, (33, 45, 80), 256),
    "wan2.1-14b-720p": Shape(40, 40, 128, 75_600, False, (21, 45, 80)),
    "wan2.1-1.3b-480p": Shape(12, 12, 128, 32_760, False, (21, 30, 52)),
    "cogvideox1.5-5b": Shape(48, 48, 64, 45_106, False, (11, 48, 85), 226, True),
    "cogvideox-2b": Shape(30, 30, 64, 17_776, False, (13, 30, 45), 226, True),
}


@dataclass(frozen=True)
class Full:
    """Dense attention: every block."""

    block_m: int = 128
    block_n: int = 128


@dataclass(frozen=True)
class Random:
    """`round(density * Sb)` key blocks a row, drawn for every head and query block."""

    density: float
    block_m: int = 128
    block_n: int = 128


@dataclass(frozen=True)
class Strided:
    """S2: local window and every `stride`-th key block, shifted by one block a head (2407.17678)."""

    block: int
    local_blocks: int
    stride: int


@dataclass(frozen=True)
class Skewed:
    """Rows of very different length: sink block, local window and a share of random blocks, causal."""

    block: int
    local_blocks: int
    share: float


@dataclass(frozen=True)
class Columns:
    """Single keys: a random share of those that a group of `queries` queries can see, drawn for every
    head and group."""

    share: float
    queries: int
    block: int = 128


@dataclass(frozen=True)
class SkipTo:
    """BLASST with the lambda, found by bisection on the case's data, at which the engine skips this share
    of the visible tiles. It may have to be above 1, which the paper's rule does not use.

    Attributes:
        sparsity: 0 is lambda = 0, where nothing can be skipped.
        least_log_lambda: at least this; -64 with sparsity 0: every tile is voted on and none skipped.
    """

    sparsity: float
    block_m: int = 64  # the vote group of the public Hopper kernel, and of ours
    block_n: int = 128
    least_log_lambda: float = -inf


@dataclass(frozen=True)
class ByMethod:
    """Whatever a method's selector picks on the case's q and k.

    Attributes:
        method: name in `sparse_attn.methods.METHODS`.
        config: keyword arguments of its config class.
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)


Pattern = Full | Random | Strided | Skewed | Columns | SkipTo | ByMethod


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        data: "normal" (independent q, k, v), or a kind of `testing_data.structured_qk`: "causal",
            "bidirectional" or "video" (then `grid`).
        backward: time the gradients too.
        peers: names of providers to time beside ours; empty for every one that can run the case.
        rivals: peers of which the fastest of each round counts (timed in any case).
        group: cases of one shape and one group share tensors, rounds and dense baselines.
        rounds: how many times each provider is timed, in turn.
        gate_length: length at which the same pattern is checked against exact attention first.
        why: what the case stands for.
    """

    name: str
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    pattern: Pattern = Full()
    dtype: str = "bfloat16"
    is_causal: bool = False
    data: str = "normal"
    grid: tuple[int, int, int] | None = None
    text_len: int = 0
    text_first: bool = False
    backward: bool = False
    peers: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    group: str = ""
    rounds: int = 15
    gate_length: int = 1100
    why: str = ""

    @property
    def is_dense(self) -> bool:
        return isinstance(self.pattern, Full)

    def resized(self, length: int, kv_heads: int = 2) -> Case:
        """The same problem, shorter (a video grid: of another size) and with fewer heads (whole groups
        of query heads)."""
        kv = min(kv_heads, self.kv_heads)
        q = kv * (self.q_heads // self.kv_heads)
        grid = self.grid
        if grid is not None:
            grid = small_grid(grid, length - self.text_len)
            length = grid[0] * grid[1] * grid[2] + self.text_len
        elif length > self.length:
            length = self.length
        return replace(self, q_heads=q, kv_heads=kv, length=length, grid=grid)


def small_grid(grid: tuple[int, int, int], tokens: int) -> tuple[int, int, int]:
    """A grid of the same shape with about `tokens` tokens and at least 3 frames."""
    frames, height, width = grid
    shrink = (max(tokens, 27) / (frames * height * width)) ** (1 / 3)
    small = [max(3, round(x * shrink)) for x in grid]
    return small[0], small[1], small[2]


@dataclass(frozen=True)
class Bar:
    """One claim about a measured row.

    Attributes:
        name: as the table prints it.
        case, step: which row; step is "fwd", "bwd", "select", "attend" or "total".
        metric: dotted path into the row, such as "sparse_efficiency" or "speed_vs.sdpa";
            "speed_vs_rivals" is met only if every rival of the case was timed.
        at_least, at_most: exactly one of them.
        how: how the number is computed, for the reader of the table.
    """

    name: str
    case: str
    metric: str
    how: str
    step: str = "fwd"
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"bar {self.name!r}: give exactly one of at_least and at_most.")

    def met(self, measured: float) -> bool:
        if self.at_least is not None:
            return measured >= self.at_least
        assert self.at_most is not None
        return measured <= self.at_most

    @property
    def limit(self) -> str:
        sign, value = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {value:g} {self.unit}"


def from_shape(name: str, model: str, pattern: Pattern, **changes: Any) -> Case:
    """A case with the shape of a model."""
    shape = SHAPES[model]
    case = Case(
        name, shape.q_heads, shape.kv_heads, shape.length, shape.head_dim, pattern,
        is_causal=shape.is_causal, grid=shape.grid, text_len=shape.text_len, text_first=shape.text_first,
        why=model,
    )  # fmt: skip
    return replace(case, **changes)
