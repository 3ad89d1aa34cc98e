"""`SparseLayout`: which keys each block of queries reads.

This is the one sparsity format of the package. Selectors make layouts, engines execute them.
Letters: B batch, H heads, L query length, S key length, Lb = ceil(L / block_m) query blocks,
Sb = ceil(S / block_n) key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor

from sparse_attn import layout_bounds
from sparse_attn.index_list import IndexList


@dataclass(frozen=True, eq=False)
class SparseLayout:
    """A block list and, optionally, a column list for every query block of every head.

    Invariants (`check` enforces them; it synchronises, so it is meant for tests and debugging):

    1. Query block i holds queries `i*block_m .. min((i+1)*block_m, L)-1`. It reads row
       `(b, h, i // group)` of each list; `blocks.group` is always 1.
    2. The indices of a row are strictly ascending and in range; entries past a row's end are never
       read.
    3. A chosen block is attended whole, cut only by the causal edge and the sequence ends.
    4. No column lies inside a block that the same query block reads, else its key would count twice.
    5. An empty row is legal: its output is 0 and its lse is -inf.
    6. Causal is **bottom-right aligned**: query i sees keys `j <= i + S - L`. (PyTorch's
       `scaled_dot_product_attention` is upper-left aligned; the two agree when L == S.)

    Attributes:
        blocks: key-block numbers; rows = B' * H' * Lb, row-major.
        block_m, block_n: queries and keys in a block.
        L, S: query and key length in tokens.
        batch, heads: B' and H'. 1 broadcasts. H' counts query heads, or key heads (then the query
            heads of a group share a row), or is 1.
        columns: single key positions ("stripes"), or None; rows = B' * H' * ceil(Lb / group).
        neighbours_alike: the builder knows that query blocks of nearly equal row length, and key blocks
            of nearly equal transposed row length, read nearly the same blocks (windows and strided
            patterns do). An engine may then compute several small blocks in one tile; what is attended
            does not change.
        is_full: the builder knows that every query block reads every key block. An engine may then cut
            queries and keys into tiles of its own, and need not read the lists: who replaces them, replaces
            this.
    """

    blocks: IndexList
    block_m: int
    block_n: int
    L: int
    S: int
    batch: int = 1
    heads: int = 1
    columns: IndexList | None = None
    _cache: dict = field(default_factory=dict, repr=False)
    neighbours_alike: bool = False
    is_full: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "L", "S", "batch", "heads"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"SparseLayout: {name} is {value}; it must be at least 1.")
        if self.blocks.group != 1:
            raise ValueError(
                f"SparseLayout: blocks.group is {self.blocks.group}; only columns may be shared by "
                "several query blocks. Repeat the block rows instead."
            )
        self._expect_rows("blocks", self.blocks, self.num_query_blocks)
        if self.columns is not None:
            self._expect_rows("columns", self.columns, ceil(self.num_query_blocks / self.columns.group))

    def _expect_rows(self, name: str, rows: IndexList, per_head: int) -> None:
        expected = self.batch * self.heads * per_head
        if rows.rows != expected:
            raise ValueError(
                f"SparseLayout: {name} has {rows.rows} rows; expected {expected} "
                f"(batch {self.batch} x heads {self.heads} x {per_head})."
            )

    # -- shape ------------------------------------------------------------------------------------

    @property
    def num_query_blocks(self) -> int:
        return -(-self.L // self.block_m)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.S // self.block_n)

    @property
    def device(self) -> torch.device:
        return self.blocks.offsets.device

    def to(self, device: torch.device | str) -> SparseLayout:
        """The same layout on another device."""
        columns = None if self.columns is None else self.columns.to(device)
        return replace(self, blocks=self.blocks.to(device), columns=columns, _cache={})

    # -- builders ---------------------------------------------------------------------------------

    @classmethod
    def full(cls, L: int, S: int, *, block_m: int = 128, block_n: int = 128, device=None) -> SparseLayout:
        """Every query block reads every key block: dense attention, shared by all heads."""
        num_rows, width = _grid("full", L, S, block_m, block_n)
        offsets = torch.arange(num_rows + 1, dtype=torch.int64, device=device) * width
        indices = torch.arange(width, dtype=torch.int32, device=device).repeat(num_rows)
        return cls(IndexList(offsets, indices), block_m, block_n, L, S, is_full=True)

    @classmethod
    def from_dense_mask(
        cls,
        mask: Tensor,
        *,
        block_m: int,
        block_n: int,
        L: int,
        S: int,
        columns: Tensor | None = None,
        column_group: int = 1,
        capacity: int | None = None,
        column_capacity: int | None = None,
    ) -> SparseLayout:
        """Build from boolean masks.

        Args:
            mask: bool [B|1, H|1, Lb, Sb], true where a query block reads a key block.
            block_m, block_n: queries and keys in a block.
            L, S: query and key length in tokens.
            columns: bool [B|1, H|1, ceil(Lb / column_group), S], single keys read by
                `column_group` consecutive query blocks; they must not lie in blocks of `mask` that
                one of those query blocks reads.
            column_group: query blocks that share a column row.
            capacity, column_capacity: sizes of the index tensors. When both that apply are given,
                nothing synchronises with the host, and the check of `columns` against `mask` is left to
                `check`. Too small a capacity loses the last entries; `check` reports that too.

        Raises:
            ValueError: shapes or dtypes do not fit, or a column lies inside a chosen block.
        """
        Lb, Sb = _grid("from_dense_mask", L, S, block_m, block_n)
        if column_group < 1:
            raise ValueError(f"from_dense_mask: column_group is {column_group}; it must be at least 1.")
        _expect_mask("mask", mask, (Lb, Sb))
        batch, heads = mask.shape[:2]
        column_list = None
        if columns is not None:
            _expect_mask("columns", columns, (ceil(Lb / column_group), S))
            batch, heads = (
                _common(name, mask.shape[dim], columns.shape[dim])
                for dim, name in enumerate(("batch", "heads"))
            )
            column_rows = columns.expand(batch, heads, -1, -1).reshape(-1, S)
            column_list = IndexList.from_mask(column_rows, group=column_group, capacity=column_capacity)
        block_rows = mask.expand(batch, heads, -1, -1).reshape(-1, Sb)
        block_list = IndexList.from_mask(block_rows, capacity=capacity)
        layout = cls(block_list, block_m, block_n, L, S, batch, heads, column_list)
        if columns is not None and capacity is None and column_capacity is None:
            layout._check_columns_outside_blocks()
        return layout

    @classmethod
    def window(
        cls,
        L: int,
        S: int,
        *,
        block_m: int = 128,
        block_n: int = 128,
        left: int,
        right: int = 0,
        sink_blocks: int = 0,
        device=None,
        capacity: int | None = None,
    ) -> SparseLayout:
        """Sliding window of whole blocks around the (bottom-right aligned) diagonal.

        Args:
            left, right: key blocks kept before and after the blocks that the query block's own
                positions fall in; at least 0.
            sink_blocks: first key blocks that every query block reads; at least 0.
            capacity: see `from_dense_mask`.
        """
        Lb, Sb = _grid("window", L, S, block_m, block_n)
        _at_least("window", 0, left=left, right=right, sink_blocks=sink_blocks)
        row = torch.arange(Lb, device=device)[:, None]
        first = torch.div(row * block_m + S - L, block_n, rounding_mode="floor")
        last_query = (row * block_m + block_m - 1).clamp(max=L - 1)
        last = torch.div(last_query + S - L, block_n, rounding_mode="floor")
        col = torch.arange(Sb, device=device)[None]
        mask = ((col >= first - left) & (col <= last + right)) | (col < sink_blocks)
        mask = mask[None, None]
        layout = cls.from_dense_mask(mask, block_m=block_m, block_n=block_n, L=L, S=S, capacity=capacity)
        return replace(layout, neighbours_alike=True)

    @classmethod
    def strided(
        cls,
        L: int,
        S: int,
        *,
        heads: int,
        block: int = 64,
        local_blocks: int = 1,
        stride: int = 8,
        shifts: list[int] | Tensor | None = None,
        device=None,
        capacity: int | None = None,
    ) -> SparseLayout:
        """Local window plus every `stride`-th key block, shifted per head.

        Key block j is read by query block i of head h when `j <= c` (c the key block of the query
        block's last position) and `c - j < local_blocks` or `(j + shifts[h]) % stride == 0`.

        Args:
            local_blocks: nearest key blocks that every head reads; at least 0.
            stride: one of so many key blocks is read; at least 1.
            shifts: one shift a head; default 0, 1, 2, ... A list is copied to the device, which
                synchronises; an integer tensor [heads] that lies there does not.
            capacity: see `from_dense_mask`.
        """
        Lb, Sb = _grid("strided", L, S, block, block)
        _at_least("strided", 1, heads=heads, stride=stride)
        _at_least("strided", 0, local_blocks=local_blocks)
        shift = (
            torch.arange(heads, device=device) if shifts is None else torch.as_tensor(shifts, device=device)
        )
        if shift.shape != (heads,):
            raise ValueError(
                f"strided: shifts has shape {tuple(shift.shape)}; expected one for each of {heads} heads."
            )
        row = torch.arange(Lb, device=device)[:, None]
        last_query = (row * block + block - 1).clamp(max=L - 1)
        last = torch.div(last_query + S - L, block, rounding_mode="floor")
        col = torch.arange(Sb, device=device)[None]
        local = (col <= last) & (last - col < local_blocks)
        shard = (col[None] + shift[:, None, None]) % stride == 0
        mask = (local[None] | (shard & (col <= last)[None]))[None]
        layout = cls.from_dense_mask(mask, block_m=block, block_n=block, L=L, S=S, capacity=capacity)
        return replace(layout, neighbours_alike=True)

    @classmethod
    def top_k(
        cls,
        scores: Tensor,
        k: int,
        *,
        block_m: int,
        block_n: int,
        L: int,
        S: int,
        is_causal: bool = False,
        capacity: int | None = None,
    ) -> SparseLayout:
        """Each query block reads its `k` key blocks of highest score.

        Args:
            scores: float [B|1, H|1, Lb, Sb]; -inf and NaN are never chosen. Of equal scores any may be.
            k: blocks a row, 1 <= k <= Sb. Rows with fewer finite scores keep fewer.
            is_causal: ignore blocks that lie wholly beyond the causal edge.
        """
        Lb, Sb = _grid("top_k", L, S, block_m, block_n)
        _expect_grid("top_k", "scores", scores, (Lb, Sb))
        if not 1 <= k <= Sb:
            raise ValueError(f"top_k: k is {k}; it must be between 1 and {Sb} (the key blocks).")
        hidden = scores.isnan()  # which topk would take for the largest
        if is_causal:
            hidden |= ~visible_blocks(L, S, block_m, block_n, scores.device)
        scores = scores.masked_fill(hidden, -torch.inf)
        best = scores.topk(k, dim=-1)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.scatter_(-1, best.indices, best.values > -torch.inf)
        return cls.from_dense_mask(mask, block_m=block_m, block_n=block_n, L=L, S=S, capacity=capacity)

    @classmethod
    def threshold(
        cls,
        scores: Tensor,
        at_least: float,
        *,
        block_m: int,
        block_n: int,
        L: int,
        S: int,
        is_causal: bool = False,
        capacity: int | None = None,
    ) -> SparseLayout:
        """Each query block reads the key blocks whose score is `>= at_least`.

        Args:
            scores: float [B|1, H|1, Lb, Sb]; NaN is never chosen.
            is_causal: ignore blocks that lie wholly beyond the causal edge.
        """
        _expect_grid("threshold", "scores", scores, _grid("threshold", L, S, block_m, block_n))
        mask = scores >= at_least
        if is_causal:
            mask &= visible_blocks(L, S, block_m, block_n, scores.device)
        return cls.from_dense_mask(mask, block_m=block_m, block_n=block_n, L=L, S=S, capacity=capacity)

    # -- what the engines read --------------------------------------------------------------------

    def block_bounds(self, is_causal: bool) -> Tensor:
        """int32 [B'*H'*Lb, 2]: of each row, how many leading blocks need no mask, and how many are
        visible at all. Cached."""
        return self._cached(("block_bounds", is_causal), lambda: layout_bounds.block_bounds(self, is_causal))

    def column_bounds(self, is_causal: bool) -> Tensor:
        """int32 [B'*H'*Lb, 2], as `block_bounds`, for the columns that each query block reads."""
        return self._cached(
            ("column_bounds", is_causal), lambda: layout_bounds.column_bounds(self, is_causal)
        )

    def transposed(self) -> IndexList:
        """Key block -> query blocks: rows = B' * H' * Sb. Cached."""
        Lb, Sb = self.num_query_blocks, self.num_key_blocks
        return self._cached(("transposed",), lambda: self.blocks.transpose(Lb, Sb))

    def transposed_bounds(self, is_causal: bool) -> Tensor:
        """int32 [B'*H'*Sb, 2]: of each transposed row, the first entry that sees any key of the
        block, and the first whose queries all see all of its keys. Cached."""
        key = ("transposed_bounds", is_causal)
        return self._cached(key, lambda: layout_bounds.transposed_bounds(self, is_causal))

    def _cached(self, key, build):
        if key in self._cache:
            return self._cache[key]
        # A tensor made in inference mode could not serve a later call that needs gradients.
        with torch.inference_mode(False):
            value = build()
        if not torch.compiler.is_exporting():  # `torch.export` builds tensors without data
            self._cache[key] = value
        return value

    # -- views ------------------------------------------------------------------------------------

    def block_mask(self) -> Tensor:
        """bool [B', H', Lb, Sb]: the block list as a mask (see `from_dense_mask`)."""
        mask = self.blocks.to_mask(self.num_key_blocks)
        return mask.view(self.batch, self.heads, self.num_query_blocks, self.num_key_blocks)

    def column_mask(self) -> Tensor | None:
        """bool [B', H', ceil(Lb / group), S]: the column list as a mask, or None."""
        if self.columns is None:
            return None
        return self.columns.to_mask(self.S).view(self.batch, self.heads, -1, self.S)

    def token_rows(self, query_block: int, is_causal: bool) -> Tensor:
        """bool [B', H', m, S]: the keys that each query of one block attends to."""
        i = query_block
        first, last = i * self.block_m, min((i + 1) * self.block_m, self.L)
        keys = torch.arange(self.S, device=self.device)
        rows = self._cached(("block_mask",), self.block_mask)[:, :, i][..., keys // self.block_n]
        if self.columns is not None:
            rows = rows | self._cached(("column_mask",), self.column_mask)[:, :, i // self.columns.group]
        rows = rows[:, :, None].expand(-1, -1, last - first, -1)
        if is_causal:
            queries = torch.arange(first, last, device=self.device)[:, None]
            rows = rows & (keys <= queries + self.S - self.L)
        return rows

    def to_dense(self, is_causal: bool = False) -> Tensor:
        """bool [B', H', L, S]: every attended pair. For tests and pictures: L x S memory."""
        blocks = range(self.num_query_blocks)
        return torch.cat([self.token_rows(i, is_causal) for i in blocks], dim=2)

    def density(self, is_causal: bool = False, *, per_head: bool = False):
        """Share of the visible (query, key) pairs that are attended, exact to the token.

        Args:
            is_causal: count only pairs on or below the bottom-right aligned diagonal, in the layout and
                in the whole: dense causal attention has density 1.
            per_head: return float64 [B', H'] instead of the mean over B' and H'.

        Returns:
            A float (synchronises), or the tensor. 0 where no pair is visible.

        Example:
            >>> SparseLayout.window(1024, 1024, block_m=128, block_n=128, left=1).density(is_causal=True)
            0.344...
        """
        from sparse_attn.layout_stats import attended_pairs, visible_pairs

        share = attended_pairs(self, is_causal) / max(visible_pairs(self.L, self.S, is_causal), 1)
        return share if per_head else share.mean().item()

    # -- conversions (layout_convert.py) ----------------------------------------------------------

    def coarsen(self, block_m: int, block_n: int) -> SparseLayout:
        """The smallest layout of larger blocks that covers this one. Its density is higher: read
        `density` before and after.

        Args:
            block_m, block_n: multiples of the present block sizes.

        Raises:
            ValueError: not multiples, or the layout has columns.
        """
        from sparse_attn.layout_convert import coarsen

        return coarsen(self, block_m, block_n)

    def to_block_mask(self, is_causal: bool = False):
        """A FlexAttention `BlockMask` of the same pattern, right in compiled and in eager mode.

        It has the layout's batch and heads: FlexAttention accepts 1 or those of the query, so expand a
        layout with one row a key head first.

        Raises:
            ValueError: the layout has columns.
        """
        from sparse_attn.layout_convert import to_block_mask

        return to_block_mask(self, is_causal)

    @classmethod
    def from_block_mask(cls, block_mask, L: int | None = None, S: int | None = None) -> SparseLayout:
        """From a FlexAttention `BlockMask`.

        Args:
            block_mask: may have partial blocks if its `mask_mod` cuts nothing out of them, or exactly
                what bottom-right causality does (then attend with `is_causal=True`).
            L, S: default: the mask's own `seq_lengths`.

        Raises:
            ValueError: `mask_mod` cuts otherwise, or is causal in some blocks while others lie beyond
                the causal edge.
        """
        from sparse_attn.layout_convert import from_block_mask

        return from_block_mask(block_mask, L, S)

    def to_count_index(self) -> tuple[Tensor, Tensor]:
        """Padded rows as FA4, cuDNN and FlashInfer take them: counts int32 [B', H', Lb] and indices
        int32 [B', H', Lb, Sb], unused entries 0."""
        from sparse_attn.layout_convert import to_count_index

        return to_count_index(self)

    @classmethod
    def from_count_index(
        cls, counts: Tensor, indices: Tensor, *, block_m: int, block_n: int, L: int, S: int
    ) -> SparseLayout:
        """The inverse of `to_count_index`; indices of a row may be in any order."""
        from sparse_attn.layout_convert import from_count_index

        return from_count_index(counts, indices, block_m, block_n, L, S)

    # -- checks and pictures ----------------------------------------------------------------------

    def check(self) -> SparseLayout:
        """Verify every invariant; synchronises. Returns the layout itself.

        Raises:
            ValueError: naming the first broken invariant and where.
        """
        from sparse_attn.layout_stats import check

        return check(self)

    def _check_columns_outside_blocks(self) -> None:
        from sparse_attn.layout_stats import check_columns_outside_blocks

        check_columns_outside_blocks(self)

    def draw(self, *, batch: int = 0, head: int = 0, width: int = 64, is_causal: bool = False) -> str:
        """The pattern of one head as text: '#' read, '|' read through columns only, '.' not read."""
        from sparse_attn.layout_stats import draw

        return draw(self, batch, head, width, is_causal)

    def __repr__(self) -> str:
        from sparse_attn.layout_stats import describe

        return describe(self)


def visible_blocks(L: int, S: int, block_m: int, block_n: int, device=None) -> Tensor:
    """bool [Lb, Sb]: key blocks with at least one key on or below the causal edge."""
    Lb, Sb = ceil(L / block_m), ceil(S / block_n)
    last_query = (torch.arange(1, Lb + 1, device=device) * block_m - 1).clamp(max=L - 1)
    return torch.arange(Sb, device=device) * block_n <= (last_query + S - L)[:, None]


def _expect_mask(name: str, mask: Tensor, tail: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor):
        raise ValueError(f"from_dense_mask: {name} is {type(mask).__name__}; it must be a torch.Tensor.")
    if mask.dtype != torch.bool:
        raise ValueError(f"from_dense_mask: {name} has dtype {mask.dtype}; it must be torch.bool.")
    _expect_grid("from_dense_mask", name, mask, tail)


def _expect_grid(op: str, name: str, x: Tensor, tail: tuple[int, int]) -> None:
    if x.dim() != 4 or tuple(x.shape[2:]) != tail:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; expected "
            f"[batch or 1, heads or 1, {tail[0]}, {tail[1]}] for these lengths and block sizes."
        )


def _common(name: str, mask: int, columns: int) -> int:
    """The batch or heads of a layout whose mask and columns have these; 1 broadcasts."""
    if mask != columns and 1 not in (mask, columns):
        raise ValueError(
            f"from_dense_mask: mask has {name} {mask} but columns has {columns}; they must be equal, or one "
            "of them 1."
        )
    return max(mask, columns)


def _at_least(op: str, least: int, **values: int) -> None:
    problems = [f"{name} is {x}; it must be at least {least}" for name, x in values.items() if x < least]
    if problems:
        raise ValueError(f"{op}: " + "; ".join(problems) + ".")


def _grid(op: str, L: int, S: int, block_m: int, block_n: int) -> tuple[int, int]:
    """(Lb, Sb), once the sizes are known to be positive."""
    _at_least(op, 1, L=L, S=S, block_m=block_m, block_n=block_n)
    return -(-L // block_m), -(-S // block_n)
